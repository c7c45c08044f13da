"""The RWKV-7 recurrence: one token, and many tokens in chunks.

    S_t = (Diag(w_t) - c_t kappa_t^T) S_{t-1} + k_t v_t^T,    c = a * kappa,    o_t = S_t^T r_t

w = exp(log_decay) is a decay per key channel, kappa the removal key of unit length and a the
in-context rate in (0, 1) per key channel. The removal reads the state before its decay, and its
key is not the key that writes. RWKV's own code keeps the transpose of this state.
Source: Peng et al. 2025 (RWKV-7 "Goose"). The chunkwise form solves one unit-triangular system
per chunk for what each token removes.

B sequences, T tokens, H heads, K key and V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.chunks import chunk_length, chunks, decayed, solve_unit, unchunk


def rwkv7_step(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    removal_key: Tensor,
    rate: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: r, log_decay, k, removal_key, rate [B, H, K]; v [B, H, V]; state [B, H, K, V].
    Returns (out [B, H, V], state).

    Products and sums are elementwise, so a row's result does not depend on the rest of the batch.
    """
    removed = (removal_key[..., None] * state).sum(-2)
    state = (
        log_decay.exp()[..., None] * state
        - (rate * removal_key)[..., None] * removed[..., None, :]
        + k[..., None] * v[..., None, :]
    )
    return (r[..., None] * state).sum(-2), state


def rwkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    removal_key: Tensor,
    rate: Tensor,
    state: Tensor,
    segment: Tensor | None = None,
    *,
    decay_floor: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Many tokens at once: r, log_decay <= 0, k, removal_key, rate [B, T, H, K]; v [B, T, H, V];
    state [B, H, K, V]; segment [B, T] counts the documents begun in this call (0 continues
    `state`). Returns (out [B, T, H, V], state).

    Right for any decay, 0 included; `decay_floor`, a promise that log_decay >= decay_floor, is
    faster (RWKV-7 keeps -exp(-1/2)). Autocast may run the products in bfloat16; decays, the
    triangular solve and the state stay in float32.

    Raises: ConfigError if chunk_size is not a power of two.
    """
    T = r.shape[1]
    if T == 1:
        if segment is not None:
            state = state * (segment == 0)[..., None, None]
        out, state = rwkv7_step(
            r[:, 0], log_decay[:, 0], k[:, 0], v[:, 0], removal_key[:, 0], rate[:, 0], state
        )
        return out[:, None], state
    C = chunk_length(T, chunk_size)
    r, log_decay, k, v, removal_key, rate = (
        chunks(x, C) for x in (r, log_decay, k, v, removal_key, rate)
    )
    scores, queries, keys, decay = decayed(
        torch.stack([r, removal_key], 3),
        torch.stack([rate * removal_key, k], 3),
        log_decay,
        segment,
        before=(False, True),
        decay_floor=decay_floor,
    )
    reads, removes = scores.unbind(3)
    # What the removal keys read, U = U_0 + P S, once earlier removals are applied.
    read_first = torch.cat([removes[:, :, :, 1].tril(-1) @ v, queries[:, :, :, 1]], -1)
    solution = solve_unit(removes[:, :, :, 0], read_first)
    u, p = solution.split([v.shape[-1], r.shape[-1]], -1)
    incoming, values = [], []
    # unbind, as the backward of indexing would fill a whole tensor per chunk.
    per_chunk = (x.unbind(2) for x in (u, p, v, decay, keys.flatten(3, 4).mT))
    for u_n, p_n, v_n, decay_n, keys_n in zip(*per_chunk, strict=True):
        values_n = torch.cat([-(u_n + p_n @ state), v_n], -2)
        incoming.append(state)
        values.append(values_n)
        state = decay_n * state + keys_n @ values_n
    reads = reads.transpose(3, 4).flatten(4, 5)
    out = queries[:, :, :, 0] @ torch.stack(incoming, 2) + reads @ torch.stack(values, 2)
    return unchunk(out, T), state
