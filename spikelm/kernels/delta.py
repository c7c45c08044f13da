"""The gated delta rule: one token, and many tokens in chunks.

    S_t = (I - k_t (b_t * k_t)^T) Diag(a_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = S_t^T q_t

a = exp(log_decay): 1 (DeltaNet), a scalar per head (Gated DeltaNet) or a value per key channel
(KDA, GDN-2). b erases per key channel, w writes per value channel; b = w = beta is the tied form.
Sources: Yang et al. 2024 (DeltaNet, Gated DeltaNet), Kimi Team 2025 (KDA), GDN-2 2026; the
chunkwise form solves one unit-triangular system per chunk for the corrected values.

B sequences, T tokens, H heads, K key and V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.chunks import chunk_length, chunks, decayed, solve_unit, unchunk


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    erase: Tensor,
    write: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, H, K]; v [B, H, V]; log_decay, erase [B, H, K or 1];
    write [B, H, V or 1]; state [B, H, K, V]. Returns (out [B, H, V], state).

    Products and sums are elementwise, so a row's result does not depend on the rest of the batch.
    """
    state = state * log_decay.exp()[..., None]
    erased = ((erase * k)[..., None] * state).sum(-2)
    state = state + k[..., None] * (write * v - erased)[..., None, :]
    return (q[..., None] * state).sum(-2), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    erase: Tensor,
    write: Tensor,
    state: Tensor,
    segment: Tensor | None = None,
    *,
    decay_floor: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Many tokens at once: q, k [B, T, H, K]; v [B, T, H, V]; log_decay <= 0 and erase
    [B, T, H, K or 1]; write [B, T, H, V or 1]; state [B, H, K, V]; segment [B, T] counts the
    documents begun in this call (0 continues `state`). Returns (out [B, T, H, V], state).

    Right for any decay, 0 included; `decay_floor`, a promise that log_decay >= decay_floor, makes
    channel decays faster. Autocast may run the products in bfloat16; decays, the triangular solve
    and the state stay in float32.

    Raises: ConfigError if chunk_size is not a power of two.
    """
    T = q.shape[1]
    if T == 1:
        if segment is not None:
            state = state * (segment == 0)[..., None, None]
        out, state = delta_step(
            q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], erase[:, 0], write[:, 0], state
        )
        return out[:, None], state
    C = chunk_length(T, chunk_size)
    q, k, log_decay, erase, write = (chunks(x, C) for x in (q, k, log_decay, erase * k, write * v))
    scores, queries, keys, decay = decayed(
        torch.stack([q, erase], 3), k.unsqueeze(3), log_decay, segment, decay_floor=decay_floor
    )
    reads, erases = scores.squeeze(4).unbind(3)
    # Corrected values U = U_0 - P S: what each token writes once earlier writes are erased.
    solution = solve_unit(erases, torch.cat([write, queries[:, :, :, 1]], -1))
    u, p = solution.split([v.shape[-1], k.shape[-1]], -1)
    incoming, corrected = [], []
    # unbind, as the backward of indexing would fill a whole tensor per chunk.
    per_chunk = (x.unbind(2) for x in (u, p, decay, keys.squeeze(3).mT))
    for u_n, p_n, decay_n, keys_n in zip(*per_chunk, strict=True):
        written = u_n - p_n @ state
        incoming.append(state)
        corrected.append(written)
        state = decay_n * state + keys_n @ written
    out = queries[:, :, :, 0] @ torch.stack(incoming, 2) + reads @ torch.stack(corrected, 2)
    return unchunk(out, T), state
