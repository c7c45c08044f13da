"""The last few inputs of each token: what token shift and short convolutions read.

B sequences, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_taps(
    x: Tensor, size: int, history: Tensor, segment: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """`size` tensors [B, T, C], oldest input first, the last being x [B, T, C] itself.

    `history` [B, size - 1, C] holds the inputs before the call; the new one is returned. With
    `segment` [B, T] (documents begun in this call), taps from another document are zero.
    """
    T = x.shape[1]
    joined = torch.cat([history, x], 1)
    taps = [joined[:, i : i + T] for i in range(size)]
    history = joined[:, T:]
    if segment is not None:
        before = segment.new_zeros(segment.shape[0], size - 1)
        owner = torch.cat([before, segment], 1)
        taps = [
            tap * (owner[:, i : i + T] == segment)[..., None] for i, tap in enumerate(taps[:-1])
        ] + taps[-1:]
        history = history * (owner[:, T:] == segment[:, -1:])[..., None]
    # A view would keep the whole call's inputs alive as long as the state.
    return taps, history.clone()
