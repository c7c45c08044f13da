"""spikelm.kernels.outputs: matrices read by output."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch

from spikelm.errors import BackendError
from spikelm.kernels import native, rows
from spikelm.kernels.outputs import Gated, Halves, OutputMatrix

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"native: {native.unavailable()}"
)


@pytest.fixture(params=rows.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = rows.isa()
    try:
        rows.set_isa(request.param)
    except BackendError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    rows.set_isa(before)


def forms(weight: torch.Tensor, bits: int) -> list[OutputMatrix | Gated | Halves]:
    found: list[OutputMatrix | Gated | Halves] = [OutputMatrix(weight, bits)]
    found += [Gated(weight, bits)] if weight.shape[1] % 2 == 0 else []
    return found + ([Halves(weight)] if bits == 8 else [])


@pytest.mark.parametrize("bits", [8, 4])
def test_exact_at_any_shape(isa: str, bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    low, high = (-128, 128) if bits == 8 else (-8, 8)
    for K, N in [(1, 1), (5, 2), (63, 65), (128, 66), (129, 7), (1000, 301), (4999, 4)]:
        weight = torch.randint(low, high, (K, N), dtype=torch.int8, generator=g)
        counts = torch.randint(-127, 128, (3, K), generator=g)
        counts[1] *= torch.rand(K, generator=g) < 0.2
        counts[2] = 0
        for matrix in forms(weight, bits):
            assert torch.equal(matrix.dense, weight)
            assert torch.equal(matrix.product(counts).long(), counts @ weight.long()), (K, N)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_sums_fit(isa: str, bits: int) -> None:
    least = -128 if bits == 8 else -8
    weight = torch.full((rows.MAX_INPUTS, 2), least, dtype=torch.int8)
    counts = torch.full((1, rows.MAX_INPUTS), 127)
    for matrix in forms(weight, bits):
        for sign in (1, -1):
            found = matrix.product(sign * counts)
            assert found.tolist() == [[sign * 127 * least * rows.MAX_INPUTS] * 2]


def test_copies_and_pickles_hold_the_weights() -> None:
    weight = torch.randint(-128, 128, (70, 6), dtype=torch.int8)
    for matrix in forms(weight, 8)[1:]:
        for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
            assert torch.equal(other.dense, weight)


def test_halves_take_no_more_than_rows() -> None:
    weight = torch.zeros(128, 256, dtype=torch.int8)
    assert Halves(weight).nbytes == Gated(weight).nbytes == rows.RowMatrix(weight).nbytes


def test_what_no_matrix_holds_is_refused() -> None:
    for shape, bits in (((0, 4), 8), ((4, 0), 8), ((4, 4), 5), ((rows.MAX_INPUTS + 1, 1), 8)):
        with pytest.raises(BackendError, match=rf"no native matrix of {bits} bits"):
            OutputMatrix(torch.zeros(shape, dtype=torch.int8), bits)
