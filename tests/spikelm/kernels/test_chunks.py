from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikelm.errors import ConfigError
from spikelm.kernels.chunks import chunk_length, chunks, decayed, solve_unit, unchunk

B, G, N, R, M, C, K = 2, 2, 2, 2, 3, 16, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# No floor starts from single tokens, -30 from blocks of 4, -1 from the whole chunk.
@pytest.mark.parametrize("floor", [None, -30.0, -1.0])
@pytest.mark.parametrize("channels", [1, K])
@pytest.mark.parametrize("before", [(False, False), (False, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_by_their_definition(
    floor: float | None, channels: int, before: tuple[bool, bool], packed: bool
) -> None:
    q, k = normal(B, G, N, R, C, K), normal(B, G, N, M, C, K)
    log_decay = -torch.rand(B, G, N, C, channels, dtype=torch.float64)
    begins = torch.zeros(B, N * C, dtype=torch.bool)
    if packed:
        begins[0, [0, 3, 4, C]] = begins[1, C + 7] = True
    result = decayed(q, k, log_decay, begins.long().cumsum(1), before=before, decay_floor=floor)

    keep = (~begins).double().unflatten(1, (N, C))[:, None, :, :, None]
    decay = (log_decay.exp() * keep).expand(B, G, N, C, K)
    for r in range(R):
        for i in range(C):
            # From token j to what query i reads; `since` grows backwards from i.
            since = (keep if before[r] else decay)[:, :, :, i]
            for j in range(i - 1, -1, -1):
                expected = torch.einsum("bgnk,bgnmk->bgnm", q[:, :, :, r, i] * since, k[..., j, :])
                torch.testing.assert_close(result.scores[:, :, :, r, :, i, j], expected)
                since = since * decay[:, :, :, j]
            torch.testing.assert_close(result.q[:, :, :, r, i], q[:, :, :, r, i] * since)
        if not before[r]:
            diagonal = torch.einsum("bgnck,bgnmck->bgnmc", q[:, :, :, r], k)
            scores = result.scores[:, :, :, r]
            torch.testing.assert_close(scores.diagonal(dim1=-2, dim2=-1), diagonal)
    assert not result.scores.triu(1).any()
    to_end = torch.ones_like(decay[:, :, :, 0])
    for j in range(C - 1, -1, -1):
        torch.testing.assert_close(result.k[..., j, :], k[..., j, :] * to_end[:, :, :, None])
        to_end = to_end * decay[:, :, :, j]
    torch.testing.assert_close(result.decay.expand(B, G, N, K, 1)[..., 0], to_end)


def test_chunks_are_padded_and_joined_again() -> None:
    x = normal(B, 13, G, K)
    parts = chunks(x, 8)
    assert parts.shape == (B, G, 2, 8, K)
    assert not parts[:, :, 1, 5:].any()
    assert torch.equal(unchunk(parts, 13), x)


def test_the_length_of_a_chunk() -> None:
    assert [chunk_length(T, None) for T in (1, 2, 3, 33, 64, 500)] == [1, 2, 4, 64, 64, 64]
    assert chunk_length(500, 16) == 16
    with pytest.raises(ConfigError, match="chunk_size is 24"):
        chunk_length(500, 24)


def test_the_solver_reads_the_strictly_lower_triangle_only() -> None:
    lower, x = normal(3, 5, 5), normal(3, 5, 2)
    right = x + lower.tril(-1) @ x
    torch.testing.assert_close(solve_unit(lower, right), x)
