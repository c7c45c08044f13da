"""spikelm.kernels.rows and the native matrices behind it"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm.errors import BackendError
from spikelm.kernels import event, native, rows
from spikelm.kernels.rows import RowMatrix

SOURCES = Path(__file__).parents[3] / "native"

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"native: {native.unavailable()}"
)


def runs_here(isa: str) -> bool:
    before = rows.isa()
    try:
        rows.set_isa(isa)
    except BackendError:
        return False
    rows.set_isa(before)
    return True


@pytest.fixture(params=rows.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if not runs_here(request.param):
        pytest.skip(f"this machine has no {request.param}")
    before = rows.isa()
    rows.set_isa(request.param)
    yield request.param
    rows.set_isa(before)


def drawn(shape: tuple[int, ...], limit: int, g: torch.Generator) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, dtype=torch.int8, generator=g)


def expected(counts: Tensor, weight: Tensor) -> Tensor:
    return counts.long() @ weight.long()


@pytest.mark.parametrize("bits", [8, 4])
def test_exact_at_any_shape_and_silence(isa: str, bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    shapes = [(1, 1), (3, 129), (4, 64), (5, 255), (33, 257), (66, 1025), (4999, 7), (257, 4097)]
    # The last one has two panels if its weights have 4 bits.
    for K, N in [*shapes, (9, 8321)]:
        weight = drawn((K, N), 127 if bits == 8 else 7, g)
        # The values that no symmetric quantisation gives.
        weight[torch.rand(K, N, generator=g) < 0.1] = -128 if bits == 8 else -8
        matrix = RowMatrix(weight, bits)
        assert torch.equal(matrix.dense, weight)
        for silent in (0.0, 0.3, 0.9, 1.0):
            fires = torch.rand(3, K, generator=g) >= silent
            for counts in (drawn((3, K), 127, g) * fires, 127 * fires, -127 * fires):
                assert torch.equal(matrix.product(counts).long(), expected(counts, weight)), (K, N)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_do_not_depend_on_how_many_they_are(isa: str, bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    # More than a stretch of inputs, a strip of outputs, or a panel.
    for K, N in ((1, 1), (3, 129), (511, 65), (1027, 257), (521, 4161), (5, 8321)):
        weight = drawn((K, N), 127 if bits == 8 else 7, g)
        matrix = RowMatrix(weight, bits)
        silent = torch.tensor([0.0, 0.2, 0.6, 0.9, 1.0]).repeat(60)[:, None]
        counts = drawn((300, K), 127, g) * (torch.rand(300, K, generator=g) >= silent)
        exact = expected(counts, weight)
        for R in (1, 2, 7, 8, 9, 31, 300):
            assert torch.equal(matrix.product(counts[:R]).long(), exact[:R]), (K, N, R)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_sums_fit(isa: str, bits: int) -> None:
    least = -128 if bits == 8 else -8
    weight = torch.full((rows.MAX_INPUTS, 1), least, dtype=torch.int8)
    counts = torch.full((2, rows.MAX_INPUTS), 127)
    counts[1] = -127
    largest = rows.MAX_INPUTS * 127 * least
    assert RowMatrix(weight, bits).product(counts).flatten().tolist() == [largest, -largest]


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_change_no_bit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    weight, counts = drawn((700, 2100), 7, g), drawn((30, 700), 3, g)
    matrix = RowMatrix(weight, bits)
    for threads in (1, 2, 5, 300):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for _ in range(20):
            for some in (counts[:2], counts):
                assert torch.equal(matrix.product(some).long(), expected(some, weight))
        assert torch.equal(matrix.dense, weight)


def test_rows_take_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(10, 2048, dtype=torch.int8)
    assert RowMatrix(weight).row_bytes == 2048
    assert RowMatrix(weight, 4).row_bytes == 1024
    assert RowMatrix(weight[:, :65], 4).row_bytes == 64
    assert RowMatrix(weight).nbytes == weight.nbytes
    assert event.row_bytes(event.pack(weight, "native", bits=4)) == 1024


def test_counts_of_any_dtype_and_strides() -> None:
    g = torch.Generator().manual_seed(2)
    weight, counts = drawn((6, 5), 127, g), drawn((3, 6), 127, g)
    matrix = RowMatrix(weight.T.contiguous().T)
    for given in (counts.double(), counts.T.contiguous().T, counts.long()):
        assert torch.equal(matrix.product(given).long(), expected(counts, weight))
    assert matrix.product(counts[:0]).shape == (0, 5)


def test_copies_hold_their_own_memory() -> None:
    weight = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
    matrix = RowMatrix(weight, 4)
    copies = [copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))]
    assert len({matrix.handle, *(c.handle for c in copies)}) == 3
    del matrix
    gc.collect()
    for c in copies:
        assert c.bits == 4
        assert torch.equal(c.dense, weight)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_comes_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    weight = torch.ones(4096, 4096, dtype=torch.int8)
    small = RowMatrix(weight[:8])
    before = resident()
    matrices = [RowMatrix(weight) for _ in range(6)]
    assert resident() - before > 80e6
    del matrices
    gc.collect()
    assert resident() - before < 20e6
    assert small.dense.all()


def test_what_it_cannot_hold_is_refused() -> None:
    good = torch.ones(2, 3, dtype=torch.int8)
    for bad in (good.float(), good[0], good.to("meta")):
        with pytest.raises(BackendError, match=r"takes int8 \[K, N\] on the CPU"):
            RowMatrix(bad)
    for bad in (good[:0], good[:, :0], good.new_zeros(rows.MAX_INPUTS + 1, 1)):
        with pytest.raises(BackendError, match="1 to 132,104 inputs"):
            RowMatrix(bad)
    with pytest.raises(BackendError, match="8 or 4 bits, not 2"):
        RowMatrix(good, 2)
    with pytest.raises(BackendError, match=r"4 bits lie in -8\.\.7"):
        RowMatrix(8 * good, 4)
    with pytest.raises(AssertionError):
        RowMatrix(good).product(torch.ones(1, 3))


def test_the_bound_is_that_of_the_source() -> None:
    header = (SOURCES / "matrix.h").read_text(encoding="utf-8")
    assert f"MAX_INPUTS = {rows.MAX_INPUTS};" in header
    assert rows.MAX_INPUTS * rows.MAX_COUNT * 128 < 2**31
    (names,) = re.findall(r"UNKNOWN = -1, (.*?) \}", header)
    assert tuple(names.lower().split(", ")) == rows.ISAS


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_names_the_instruction_set() -> None:
    code = "from spikelm.kernels import event, rows; print(rows.isa(), event.resolve('auto'))"
    done = python(code, SPIKELM_ISA="scalar")
    assert done.stdout == "scalar native\n", done.stderr
    # Asked for by name, so it never falls back.
    done = python(code, SPIKELM_ISA="neon9")
    assert done.returncode == 1
    assert "BackendError: SPIKELM_ISA=neon9 cannot run on this machine" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_starts_threads_of_its_own() -> None:
    done = python(
        "import os, torch, warnings\n"
        "from spikelm.kernels.rows import RowMatrix\n"
        "torch.get_num_threads = lambda: 2\n"
        "warnings.simplefilter('ignore')\n"
        "matrix = RowMatrix(torch.ones(600, 1024, dtype=torch.int8))\n"
        "def works(): assert (matrix.product(torch.ones(2, 600)) == 600).all()\n"
        "works()\n"
        "child = os.fork()\n"
        "works()\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
        "os._exit(0)\n"
    )
    assert done.returncode == 0, done.stderr
