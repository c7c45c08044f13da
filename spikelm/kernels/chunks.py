"""Scores of a chunk of tokens under decay: what the chunkwise forms of linear attention share.

For queries q_i, keys k_j and decays a_t = exp(log_decay_t) <= 1 of the same chunk

    scores_ij = q_i^T Diag(a_i a_{i-1} ... a_{j+1}) k_j    (j <= i)

The decay between two tokens is never a quotient of two running products, which overflows, nor
the difference of two long sums, which cancels. Neighbouring blocks are joined instead: across a
border both the decay since it and the decay up to it are products of numbers <= 1. A decay of 0
is exact, so a document that begins inside the chunk is a decay of 0.

B sequences, T tokens, G heads, R queries and M keys per token and head, K key channels, N chunks
of C tokens, n blocks of L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.errors import ConfigError
from spikelm.kernels.documents import first_tokens

# exp(+-MAX_EXPONENT) must be finite in float32, whose largest exponent is 88.
MAX_EXPONENT = 80.0


class Decayed(NamedTuple):
    """Blocks of tokens with every decay applied."""

    scores: Tensor
    """[B, G, N, R, M, C, C]: rows are the queries' tokens; zero where the key is later."""
    q: Tensor
    """Queries as they read the incoming state [B, G, N, R, C, K]."""
    k: Tensor
    """Keys as they stand in the outgoing state [B, G, N, M, C, K]."""
    decay: Tensor
    """What is left of the incoming state [B, G, N, K or 1, 1]."""


def chunk_length(T: int, chunk_size: int | None) -> int:
    """The tokens C in a chunk: `chunk_size` (64 if None), or fewer for a short text.

    Raises: ConfigError unless chunk_size is a power of two.
    """
    C = 64 if chunk_size is None else chunk_size
    if C < 1 or C & (C - 1):
        raise ConfigError(f"chunk_size is {chunk_size}; allowed: a power of two, or None for 64")
    return min(C, 1 << (T - 1).bit_length())


def chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, G, X] -> [B, G, N, C, X]; zeros fill the last chunk and leave the state alone."""
    padding = -x.shape[1] % C
    if padding:
        x = F.pad(x, (0, 0, 0, 0, 0, padding))
    parts: Tensor = x.unflatten(1, (-1, C))
    return parts.permute(0, 3, 1, 2, 4)


def unchunk(x: Tensor, T: int) -> Tensor:
    """[B, G, N, C, X] -> [B, T, G, X]."""
    return x.flatten(2, 3)[:, :, :T].transpose(1, 2)


def solve_unit(lower: Tensor, right: Tensor) -> Tensor:
    """X of (I + the strictly lower triangle of `lower`) X = right, in the dtype of `right`."""
    # The solver takes the diagonal for ones whatever stands there, and copies strided input slowly.
    lower = lower.to(right.dtype).contiguous()
    x: Tensor = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return x


def decayed(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    segment: Tensor | None,
    *,
    before: tuple[bool, ...] | None = None,
    decay_floor: float | None = None,
) -> Decayed:
    """Scores and decayed operands of q [B, G, N, R, C, K], k [B, G, N, M, C, K] and log_decay
    [B, G, N, C, K or 1], C a power of two; segment [B, T] counts the documents begun.

    `before[r]` says that query r reads the state before its token's decay and write, which leaves
    its scores right for j < i only. `decay_floor` promises log_decay >= decay_floor: then blocks
    start at as many tokens as keep both factors of one matrix product finite, not at one.
    """
    C = q.shape[-2]
    before = before or (False,) * q.shape[3]
    if log_decay.shape[-1] == 1 and not any(before):
        return _scalar(q, k, log_decay, segment)
    L = 1
    if decay_floor is not None:
        while L < C and 2 * L * -decay_floor <= 2 * MAX_EXPONENT:
            L *= 2
    q, k, log_decay = (_blocks(x, L) for x in (q, k, log_decay.unsqueeze(3)))
    leaf = _factorised if L > 1 else _single
    blocks = leaf(q, k, log_decay, segment, before)
    while L < C:
        blocks = _joined(blocks)
        L *= 2
    return blocks


def _blocks(x: Tensor, L: int) -> Tensor:
    """[B, G, N, R, C, K] -> [B, G, n, R, L, K]."""
    if x.shape[-2] == L:
        return x
    parts: Tensor = x.unflatten(-2, (-1, L))
    return parts.permute(0, 1, 2, 4, 3, 5, 6).flatten(2, 3)


def _begins(segment: Tensor, T: int) -> Tensor:
    """Tokens that begin a document, padded to T tokens: bool [B, T]."""
    return F.pad(first_tokens(segment), (0, T - segment.shape[1]))


def _scalar(q: Tensor, k: Tensor, log_decay: Tensor, segment: Tensor | None) -> Decayed:
    """One decay per head: a single matrix product times the decays between tokens."""
    N, C = log_decay.shape[2:4]
    if segment is not None:
        begins = _begins(segment, N * C).unflatten(1, (N, C))
        log_decay = log_decay.masked_fill(begins[:, None, :, :, None], -torch.inf)
    # Summing from each token j on: [.., i, j] is the sum over (j, i].
    between = log_decay.expand(*log_decay.shape[:-1], C).tril(-1).cumsum(-2).exp().tril()
    since_start = log_decay.exp()[..., :1, :] * between[..., :1]
    return Decayed(
        _products(q, k) * between[:, :, :, None, None],
        q * since_start.unsqueeze(3),
        k * between[..., -1, :, None].unsqueeze(3),
        since_start[..., -1:, :],
    )


def _single(
    q: Tensor, k: Tensor, log_decay: Tensor, segment: Tensor | None, before: tuple[bool, ...]
) -> Decayed:
    """Blocks of one token."""
    decay = log_decay.exp()
    own = decay
    if any(before):
        own = torch.cat([torch.ones_like(decay) if b else decay for b in before], 3)
    if segment is not None:
        begins = _begins(segment, q.shape[2])[:, None, :, None, None, None]
        decay, own = decay.masked_fill(begins, 0), own.masked_fill(begins, 0)
    scores = (q.unsqueeze(4) * k.unsqueeze(3)).sum(-1, keepdim=True)
    return Decayed(scores, q * own, k, decay.squeeze(3).mT)


def _factorised(
    q: Tensor, k: Tensor, log_decay: Tensor, segment: Tensor | None, before: tuple[bool, ...]
) -> Decayed:
    """Blocks over which the decay is bounded: scores are one matrix product of two factors."""
    L = q.shape[-2]
    total = log_decay.cumsum(-2)
    since = total
    if any(before):
        earlier = F.pad(total[..., :-1, :], (0, 0, 1, 0))
        since = torch.cat([earlier if b else total for b in before], 3)
    # Referred to the middle of the block both factors stay within exp(+-L |floor| / 2).
    middle = total[..., L // 2, None, :]
    scores = _products(q * (since - middle).exp(), k * (middle - total).exp()).tril()
    from_start, to_end = since.exp(), (total[..., -1:, :] - total).exp()
    decay = total[..., -1:, :].exp()
    if segment is not None:
        same, carried, closing = _documents(segment, q.shape[2], L)
        scores = scores * same
        from_start, to_end = from_start * carried, to_end * closing
        decay = decay * carried[..., -1:, :]
    return Decayed(scores, q * from_start, k * to_end, decay.squeeze(3).mT)


def _documents(segment: Tensor, n: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks over blocks: pairs of one document [B, 1, n, 1, 1, L, L], tokens that see the incoming
    state and tokens whose document is open at the block's end [B, 1, n, 1, L, 1].
    """
    padding = segment[:, -1:].expand(-1, n * L - segment.shape[1])
    blocks = torch.cat([segment, padding], 1).unflatten(1, (n, L))[:, None, :, None, :, None]
    last = blocks[..., -1:, :]
    before = F.pad(last[:, :, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    same = blocks == blocks.mT
    return same.unsqueeze(3), blocks == before, blocks == last


def _joined(blocks: Decayed) -> Decayed:
    """Neighbouring blocks of L tokens become one of 2 L."""
    scores, q, k, decay = blocks
    earlier_scores, later_scores = _halves(scores)
    earlier_q, later_q = _halves(q)
    earlier_k, later_k = _halves(k)
    earlier_decay, later_decay = _halves(decay)
    across = _products(later_q, earlier_k)
    top = torch.cat([earlier_scores, torch.zeros_like(across)], -1)
    bottom = torch.cat([across, later_scores], -1)
    return Decayed(
        torch.cat([top, bottom], -2),
        torch.cat([earlier_q, later_q * earlier_decay.mT.unsqueeze(3)], -2),
        torch.cat([earlier_k * later_decay.mT.unsqueeze(3), later_k], -2),
        earlier_decay * later_decay,
    )


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q [..., R, L, K], k [..., M, L, K] -> q_i^T k_j [..., R, M, L, L], one matrix product."""
    products: Tensor = q.flatten(-3, -2) @ k.flatten(-3, -2).mT
    products = products.unflatten(-2, q.shape[-3:-1]).unflatten(-1, k.shape[-3:-1])
    return products.transpose(-3, -2)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    earlier, later = x.unflatten(2, (-1, 2)).unbind(3)
    return earlier, later
