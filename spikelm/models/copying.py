"""RWKV-4's head-QK: a linear attention that adds logits to tokens seen before.

    logits_t[n] += sum over i <= t with token_i = n of (q_t . k_i) / dim

The sum is q_t^T M with M [dim, N] = sum_i k_i onehot(token_i)^T, so the memory does not grow.
B sequences, T tokens, D width, C dim, N vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.kernels.precision import widen
from spikelm.models.layers import Context, Projection
from spikelm.state import LayerState

CHUNK = 256


class HeadQK(nn.Module):
    """Adds what `forward` returns to the head's logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, self.vocab_size = config.head_qk_dim, config.vocab_size
        self.queries = Projection("head_input", config.width, self.dim, config, init_scale=0.0)
        self.keys = Projection("head_input", config.width, self.dim, config, init_scale=0.1)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {
            "copies": like.new_zeros(batch_size, self.dim, self.vocab_size),
            **self.queries.zero_state(batch_size, like),
            **self.keys.zero_state(batch_size, like),
        }

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        state: LayerState,
        context: Context,
        last_only: bool = False,
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, D] and the tokens [B, T] it came from -> logits [B, T, N] and the state.

        `last_only` gives the logits of the last token alone [B, 1, N].
        """
        q, kept = self.queries(x, state, context)
        k, kept_keys = self.keys(x, state, context)
        q, k = widen(q) / self.dim, widen(k)
        copies, outputs = state["copies"], []
        starts = range(0, tokens.shape[1], CHUNK)
        for start in starts:
            part = slice(start, start + CHUNK)
            segment = context.part(part).segment
            if not last_only or start == starts[-1]:
                asked = slice(-1, None) if last_only else slice(None)
                now = q[:, part], k[:, part], tokens[:, part], segment
                outputs.append(_logits(*now, copies, asked))
            copies = _remember(k[:, part], tokens[:, part], segment, copies)
        return torch.cat(outputs, 1), {"copies": copies, **kept, **kept_keys}


def _logits(
    q: Tensor, k: Tensor, tokens: Tensor, segment: Tensor | None, copies: Tensor, asked: slice
) -> Tensor:
    """q, k [B, T, C]; tokens, segment [B, T]; copies [B, C, N] -> [B, asked of T, N]."""
    T = tokens.shape[1]
    q = q[:, asked]
    # Row by row: the bits of a product of one vector do not depend on the batch.
    out = torch.stack([row @ memory for row, memory in zip(q, copies, strict=True)])
    if T == 1:
        weights = (q * k).sum(-1, keepdim=True)
    else:
        weights = (q @ k.mT) * torch.ones(T, T, device=q.device).tril()[asked]
    if segment is not None:
        weights = weights * (segment[:, asked, None] == segment[:, None])
        out = out * (segment[:, asked, None] == 0)
    index = tokens[:, None].expand(-1, q.shape[1], -1)
    return out.scatter_add(2, index, weights)


def _remember(k: Tensor, tokens: Tensor, segment: Tensor | None, copies: Tensor) -> Tensor:
    """The memory [B, C, N] after the keys [B, T, C] of the open document's tokens."""
    if segment is not None:
        last = segment[:, -1:]
        k, copies = k * (segment == last)[..., None], copies * (last == 0)[..., None]
    index = tokens[:, None].expand(-1, k.shape[-1], -1)
    return copies.scatter_add(2, index, k.mT)
