"""Lazy decay: a row of the state that no key writes keeps its numbers, and its decays are summed.

    S_t = Diag(exp(pending)) S,    pending [B, G, K] <= 0

So a token with spiking queries and keys rewrites the rows whose key fired, reads those whose query
fired, and leaves the others alone. The step itself is the dense one: what a row owes is its decay.

B sequences, T tokens, G heads, K key and V value channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(log_decay [B, T, G, K or 1], state [B, G, K, V], segment) -> (out, state)."""


def settled(state: Tensor, pending: Tensor) -> Tensor:
    """The state [B, G, K, V] with the log-decays that its rows owe, pending [B, G, K], applied."""
    return state * pending.exp()[..., None]


def lazily(
    rule: Rule,
    k: Tensor,
    log_decay: Tensor,
    state: Tensor,
    pending: Tensor,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A rule for T tokens with keys k [B, T, G, K]; returns (out, state, pending).

    One token leaves decays pending; many settle them.
    """
    if k.shape[1] > 1:
        out, state = rule(log_decay, settled(state, pending), segment)
        return out, state, torch.zeros_like(pending)
    if segment is not None:
        begins = segment[..., None] != 0
        state = state.masked_fill(begins[..., None], 0)
        pending = pending.masked_fill(begins, 0)
    owed = pending[:, None] + log_decay
    out, written = rule(owed, state, None)
    # A key of 0 still has a slope: where gradients are wanted, every row is written.
    silent = (k[:, 0] == 0) & (not k.requires_grad)
    return (
        out,
        torch.where(silent[..., None], state, written),
        owed[:, 0].masked_fill(~silent, 0),
    )
