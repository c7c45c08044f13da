"""Gated linear attention: one token, and many tokens in chunks.

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

a = exp(log_decay) is a value per key channel (GLA; HGRN2 and SpikingBrain-76B tie k = 1 - a), a
scalar per head (Simple GLA, Mamba-2) or fixed (RetNet, Lightning attention). With fewer key/value
heads than query heads, the queries of a group read one state.
Sources: Yang et al. 2023 (GLA, chunkwise form), Sun et al. 2023 (RetNet), Qin et al. 2024
(Lightning attention, HGRN2).

B sequences, T tokens, H query heads, G key/value heads, K key and V value channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spikelm.errors import ConfigError, did_you_mean
from spikelm.kernels.chunks import chunk_length, chunks, decayed, unchunk


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token: q [B, H, K]; k [B, G, K]; v [B, G, V]; log_decay [B, G, K or 1];
    state [B, G, K, V]. Returns (out [B, H, V], state).

    Products and sums are elementwise, so a row's result does not depend on the rest of the batch.
    """
    state = state * log_decay.exp()[..., None] + k[..., None] * v[..., None, :]
    grouped: Tensor = (scale * q).unflatten(1, (k.shape[1], -1))
    return (grouped[..., None] * state[:, :, None]).sum(-2).flatten(1, 2), state


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    segment: Tensor | None = None,
    *,
    scale: float = 1.0,
    decay_floor: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Many tokens at once: q [B, T, H, K]; k [B, T, G, K]; v [B, T, G, V], G a divisor of H;
    log_decay <= 0 [B, T, G, K or 1]; state [B, G, K, V]; segment [B, T] counts the documents begun
    in this call (0 continues `state`). Returns (out [B, T, H, V], state).

    Right for any decay, 0 included; `decay_floor`, a promise that log_decay >= decay_floor, makes
    channel decays faster. Autocast may run the products in bfloat16; decays and the state stay in
    float32.

    Raises: ConfigError if chunk_size is not a power of two.
    """
    T, G = k.shape[1:3]
    if T == 1:
        if segment is not None:
            state = state * (segment == 0)[..., None, None]
        out, state = gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], state, scale=scale)
        return out[:, None], state
    C = chunk_length(T, chunk_size)
    # The queries of a group are rows of one matrix, so the state is never repeated.
    q = chunks(scale * q, C).unflatten(1, (G, -1)).transpose(2, 3)
    k, v, log_decay = (chunks(x, C) for x in (k, v, log_decay))
    scores, q, k, decay = decayed(q, k.unsqueeze(3), log_decay, segment, decay_floor=decay_floor)
    written = k.squeeze(3).mT @ v
    incoming = []
    # unbind, as the backward of indexing would fill a whole tensor per chunk.
    for decay_n, written_n in zip(decay.unbind(2), written.unbind(2), strict=True):
        incoming.append(state)
        state = decay_n * state + written_n
    out = q.flatten(3, 4) @ torch.stack(incoming, 2) + scores.squeeze(4).flatten(3, 4) @ v
    return unchunk(out.unflatten(3, q.shape[3:5]).transpose(2, 3).flatten(1, 2), T), state


def fixed_log_decay(
    kind: Literal["lightning", "retnet"], num_heads: int, layer: int = 0, num_layers: int = 1
) -> Tensor:
    """The log-decays of heads that do not learn them: float64 [H], all < 0.

    retnet: log(1 - 2^(-5 - h)), the same in every layer (Sun et al. 2023). lightning: ALiBi slopes
    -2^(-8 (h + 1) / H) times 1 - layer / (num_layers - 1) + 1e-5, so that the last of the layers
    forgets next to nothing (Qin et al. 2024).

    Raises: ConfigError for another kind.
    """
    head = torch.arange(num_heads, dtype=torch.float64)
    if kind == "retnet":
        return torch.log1p(-(2.0 ** (-5 - head)))
    if kind == "lightning":
        depth = layer / (num_layers - 1) if num_layers > 1 else 0.0
        slopes: Tensor = 2.0 ** (-8 * (head + 1) / num_heads)
        return -slopes * (1 - depth + 1e-5)
    raise ConfigError(
        f"unknown fixed decay '{kind}'; {did_you_mean(kind, ('lightning', 'retnet'))}"
    )
