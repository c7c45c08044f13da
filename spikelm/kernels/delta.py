"""The gated delta rule: one token, and many tokens in chunks.

    S_t = (I - k_t (b_t * k_t)^T) Diag(a_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = S_t^T q_t

a = exp(log_decay): 1 (DeltaNet), a scalar per head (Gated DeltaNet) or a value per key channel
(KDA, GDN-2). b erases per key channel, w writes per value channel; b = w = beta is the tied form.
Sources: Yang et al. 2024 (DeltaNet, Gated DeltaNet), Kimi Team 2025 (KDA), GDN-2 2026; the
chunkwise form solves one unit-triangular system per chunk for the corrected values.

B sequences, T tokens, H heads, K key and V value channels, N chunks of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# exp(+-MAX_EXPONENT) must be finite in float32, whose largest exponent is 88.
MAX_EXPONENT = 80.0


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

    `decay_floor` promises log_decay >= decay_floor, which lets the decay between two tokens be
    split into two bounded factors and the scores be one matrix product. Without it channel decays
    use exact pairwise differences in short chunks: slower, right for any decay. Autocast may run
    the products in bfloat16; decays, the triangular solve and the state stay in float32.
    """
    if q.shape[1] == 1:
        if segment is not None:
            state = state * (segment == 0)[..., None, None]
        out, state = delta_step(
            q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], erase[:, 0], write[:, 0], state
        )
        return out[:, None], state
    T = q.shape[1]
    pairwise = log_decay.shape[-1] > 1 and decay_floor is None
    C = chunk_size or (16 if pairwise else 64)
    if decay_floor is not None:
        C = max(1, min(C, int(2 * MAX_EXPONENT / -decay_floor)))
    C = min(C, T)
    q, k, v, log_decay, erase, write = (
        _chunks(x, C) for x in (q, k, v, log_decay, erase * k, write * v)
    )
    same, carried, closing = _documents(segment, T, C) if segment is not None else (None,) * 3
    return _chunkwise(q, k, log_decay, erase, write, state, same, carried, closing, pairwise, T)


def _chunkwise(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    e: Tensor,
    w: Tensor,
    state: Tensor,
    same: Tensor | None,
    carried: Tensor | None,
    closing: Tensor | None,
    pairwise: bool,
    T: int,
) -> tuple[Tensor, Tensor]:
    """q, k, e = erase * k: [B, H, N, C, K]; w = write * v: [B, H, N, C, V]."""
    total = log_decay.cumsum(-2)
    reads, erases = _scores(q, e, k, total, pairwise)
    if same is not None:
        reads, erases = reads * same, erases * same
    from_state = total.exp()
    to_end = (total[..., -1:, :] - total).exp()
    if carried is not None and closing is not None:
        from_state, to_end = from_state * carried, to_end * closing[..., None]
    k_end = k * to_end
    identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    # Corrected values U = U_0 - P S: what each token writes once earlier writes are erased.
    solution = torch.linalg.solve_triangular(
        erases + identity, torch.cat([w, e * from_state], -1), upper=False, unitriangular=True
    )
    u, p = solution.split([w.shape[-1], k.shape[-1]], -1)
    # The state survives a chunk decayed, unless a document begins inside it.
    survive = from_state[..., -1, :, None]
    incoming, corrected = [], []
    # unbind, as the backward of indexing would fill a whole tensor per chunk.
    per_chunk = (x.unbind(2) for x in (u, p, survive, k_end.transpose(-1, -2)))
    for u_n, p_n, survive_n, k_n in zip(*per_chunk, strict=True):
        written = u_n - p_n @ state
        incoming.append(state)
        corrected.append(written)
        state = survive_n * state + k_n @ written
    out = (q * from_state) @ torch.stack(incoming, 2) + reads @ torch.stack(corrected, 2)
    return out.flatten(2, 3)[:, :, :T].transpose(1, 2), state


def _scores(
    q: Tensor, e: Tensor, k: Tensor, total: Tensor, pairwise: bool
) -> tuple[Tensor, Tensor]:
    """Decayed products q_i k_j (j <= i) and e_i k_j (j < i): two [B, H, N, C, C]."""
    if pairwise:
        difference = total[..., :, None, :] - total[..., None, :, :]
        k_decayed = k[..., None, :, :] * difference.clamp(max=0).exp()
        reads = (q[..., :, None, :] * k_decayed).sum(-1)
        erases = (e[..., :, None, :] * k_decayed).sum(-1)
    elif total.shape[-1] == 1:
        decay = (total - total.transpose(-1, -2)).clamp(max=0).exp()
        k_transposed = k.transpose(-1, -2)
        reads, erases = (q @ k_transposed) * decay, (e @ k_transposed) * decay
    else:
        # Referred to the middle of the chunk both factors stay within exp(+-C |floor| / 2).
        centred = total - total[..., total.shape[-2] // 2, None, :]
        up, down = centred.exp(), (k * (-centred).exp()).transpose(-1, -2)
        reads, erases = (q * up) @ down, (e * up) @ down
    return reads.tril(), erases.tril(-1)


def _chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, H, X] -> [B, H, N, C, X]; zeros fill the last chunk and leave the state alone."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % C))
    chunks: Tensor = x.unflatten(1, (-1, C))
    return chunks.permute(0, 3, 1, 2, 4)


def _documents(segment: Tensor, T: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks over chunks: pairs of one document [B, 1, N, C, C], tokens that see the incoming
    state [B, 1, N, C, 1], tokens whose document is open at the chunk's end [B, 1, N, C].
    """
    padding = -T % C
    if padding:
        segment = torch.cat([segment, segment[:, -1:].expand(-1, padding)], 1)
    chunks = segment.unflatten(1, (-1, C))[:, None]
    last = chunks[..., -1]
    before = F.pad(last[..., :-1], (1, 0))
    same = chunks[..., :, None] == chunks[..., None, :]
    return same, (chunks == before[..., None])[..., None], chunks == last[..., None]
