"""spikelm.kernels.measure"""

from __future__ import annotations

import pytest
import torch

from spikelm.kernels import rows
from spikelm.kernels.measure import Passes
from spikelm.kernels.rows import RowMatrix

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_both_products_are_the_integers(bits: int, threads: int) -> None:
    g = torch.Generator().manual_seed(bits)
    # One of several panels, one narrower than a strip, one of which nothing is read.
    shapes = [(37, 9001), (300, 70), (5, 513)]
    weights = [torch.randint(-8, 8, shape, dtype=torch.int8, generator=g) for shape in shapes]
    counts = [torch.randint(-2, 3, (K,), dtype=torch.int8, generator=g) for K, _ in shapes]
    counts[2].zero_()
    matrices = [RowMatrix(weight, bits) for weight in weights]
    passes = Passes(matrices, counts)
    expected = [c.long() @ w.long() for c, w in zip(counts, weights, strict=True)]
    for run in (passes.event, passes.dense):
        for out in passes._tensors:
            out[-1].fill_(-1)
        run(threads)
        for sums, right in zip(passes.sums, expected, strict=True):
            assert torch.equal(sums.long(), right)
    fired = [int(c.count_nonzero()) for c in counts]
    assert passes.num_bytes == sum(m.nbytes for m in matrices)
    assert passes.event_bytes == sum(n * m.row_bytes for n, m in zip(fired, matrices, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_listed_byte_is_read_once(bits: int, threads: int) -> None:
    fires = torch.tensor([1, 0, -2, 1, 0, 0, 1, 1, 1, 1, 3, 1, 1, 0, 1, 1, 1, 1, 1, 1])
    values = torch.arange(len(fires)) % 15 - 7
    # Every byte of a row is the same, also in a panel that is narrower than the first.
    weight = values.to(torch.int8)[:, None].expand(-1, 128 * 77)
    passes = Passes([RowMatrix(weight, bits)] * 2, [fires, fires.flip(0)])
    one = 0x0101010101010101
    words = [one * (v + 128 if bits == 8 else 17 * (v + 8)) for v in values.tolist()]
    per_row = 128 * 77 * bits // 64
    assert passes.stream(threads) == 2 * per_row * sum(words) % 2**64
    for counts in (fires, fires.flip(0)):
        listed = [word for word, count in zip(words, counts.tolist(), strict=True) if count]
        alone = Passes([RowMatrix(weight, bits)], [counts])
        assert alone.touch(threads) == per_row * sum(listed) % 2**64
