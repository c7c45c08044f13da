"""RWKV-4's head-QK: a linear attention that adds logits to tokens seen before.

    logits_t[n] += sum over i <= t with token_i = n of (q_t . k_i) / dim

The sum is q_t^T M with M [dim, N] = sum_i k_i onehot(token_i)^T, so the memory does not grow.
B sequences, T tokens, D width, C dim, N vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.models.layers import Context, Projection, widen
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
        self, x: Tensor, tokens: Tensor, state: LayerState, context: Context
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, D] and the tokens [B, T] it came from -> logits [B, T, N] and the state."""
        q, kept = self.queries(x, state, context)
        k, kept_keys = self.keys(x, state, context)
        q, k = widen(q) / self.dim, widen(k)
        segment = torch.zeros_like(tokens) if context.segment is None else context.segment
        copies, outputs = state["copies"], []
        seen = torch.zeros_like(segment[:, :1])
        parts = (t.split(CHUNK, 1) for t in (q, k, tokens, segment))
        for q_n, k_n, tokens_n, segment_n in zip(*parts, strict=True):
            out, copies = _chunk(q_n, k_n, tokens_n, segment_n - seen, copies)
            seen = segment_n[:, -1:]
            outputs.append(out)
        return torch.cat(outputs, 1), {"copies": copies, **kept, **kept_keys}


def _chunk(
    q: Tensor, k: Tensor, tokens: Tensor, segment: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, C]; tokens, segment [B, T]; copies [B, C, N]."""
    T = tokens.shape[1]
    continues = (segment == 0)[..., None]
    if T == 1:
        # One row at a time in one order: the bits do not depend on the batch.
        out = (q[:, 0, :, None] * copies).sum(1)[:, None] * continues
        weights = (q * k).sum(-1, keepdim=True)
    else:
        out = (q @ copies) * continues
        same = segment[:, :, None] == segment[:, None]
        weights = ((q @ k.mT) * same).tril()
    out = out.scatter_add(2, tokens[:, None].expand(-1, T, -1), weights)
    closing = (segment == segment[:, -1:])[..., None]
    copies = copies * continues[:, -1:]
    index = tokens[:, None].expand(-1, k.shape[-1], -1)
    return out, copies.scatter_add(2, index, (k * closing).mT)
