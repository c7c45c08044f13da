"""Integer spike counts times integer weights, reading only the rows of neurons that fired.

Weights are input-major: the bytes one input neuron reads lie together. All backends give the same
integers, as float32 holds sums below 2^24 exactly and longer sums take an integer product, so
they are each other's test oracle and a row's result does not depend on its batch.

R rows (tokens), K input neurons, N outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.errors import BackendError, did_you_mean
from spikelm.kernels import rows
from spikelm.kernels.outputs import Gated, Halves
from spikelm.kernels.rows import MAX_COUNT as MAX_COUNT
from spikelm.kernels.rows import RowMatrix

Table = Tensor | RowMatrix | Gated | Halves
"""Weights in a backend's own layout."""

Layout = Literal["rows", "gated", "halves"]
"""How `native` lays out a matrix; the other backends know rows only."""

BACKENDS = ("native", "embedding_bag_int8", "embedding_bag_float", "matmul")
"""In the order `auto` tries them."""

# Up to this many tokens a call gathers rows of active neurons; more share one integer GEMM, as
# the union of their active sets is nearly everything. `native` gathers on, from a tile of weights
# that stays in the cache, unless more than this share of the neurons fires, by bits.
EVENT_ROWS = 8
EVENT_SHARE = {8: 0.4, 4: 0.7}

_EXACT_IN_FLOAT32 = 2**24
_OFFSET = 128


def available(device_type: str = "cpu") -> list[tuple[str, str | None]]:
    """Every backend in fallback order, with the reason why it cannot run here or None."""
    return [(name, _obstacle(name, device_type)) for name in BACKENDS]


def resolve(backend: str, device_type: str = "cpu") -> str:
    """The backend to use: `auto` takes the first that runs, a name is taken at its word.

    Raises: BackendError for an unknown name or one that cannot run here.
    """
    if backend == "auto":
        return next(name for name, obstacle in available(device_type) if obstacle is None)
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend '{backend}'; {did_you_mean(backend, BACKENDS)}")
    obstacle = _obstacle(backend, device_type)
    if obstacle is not None:
        raise BackendError(f"backend '{backend}' cannot run here: {obstacle}; use backend 'auto'")
    return backend


def pack(weight: Tensor, backend: str, bits: int = 8, layout: Layout = "rows") -> Table:
    """The int8 weights [K, N] in the backend's own layout; `matmul` takes them as they are. Only
    `native` makes less of `bits` = 4 (weights in -8..7), and has another `layout` than rows
    (`kernels.outputs`; halves are for 8 bits).

    Raises: BackendError for a shape that `native` cannot hold.
    """
    if backend == "native":
        if layout == "halves" and bits == 8:
            return Halves(weight)
        return Gated(weight, bits) if layout == "gated" else RowMatrix(weight, bits)
    if backend == "matmul":
        return weight
    if backend == "embedding_bag_float":
        return weight.float()
    # A byte-rowwise table: w + 128 as uint8, then the row's float32 scale 1 and offset -128.
    rows = (weight.to(torch.int16) + _OFFSET).to(torch.uint8)
    tail = torch.tensor([1.0, -_OFFSET]).view(torch.uint8).to(weight.device)
    return torch.cat([rows, tail.expand(weight.shape[0], -1)], 1).contiguous()


def row_bytes(table: Table) -> int:
    """What the weights of one input neuron take."""
    if isinstance(table, Tensor):
        return table.shape[1] * table.element_size()
    return table.nbytes // table.in_features


def product(counts: Tensor, table: Table, backend: str) -> Tensor:
    """counts [R, K] (integers of any dtype, |count| <= 127) times the packed weights -> the exact
    integers [R, N], as float32, or as float64 where they may not fit.
    """
    if not isinstance(table, Tensor):
        counts = counts.to(torch.int8)
        few = counts.shape[0] <= EVENT_ROWS
        few = few or int(counts.count_nonzero()) <= EVENT_SHARE[table.bits] * counts.numel()
        sums = table.product(counts) if few else _integer_gemm(counts, table.dense, "matmul")
        return sums.float() if _fits_float32(counts) else sums.double()
    if not _fits_float32(counts):
        return _integer_gemm(counts, table, backend).to(torch.float64)
    if backend == "matmul" or counts.shape[0] > EVENT_ROWS:
        return _integer_gemm(counts, table, backend).float()
    return _gather(counts, table, backend)


def _fits_float32(counts: Tensor) -> bool:
    if counts.shape[1] * MAX_COUNT * 127 < _EXACT_IN_FLOAT32:
        return True
    return int(counts.abs().sum(-1).max()) * 127 < _EXACT_IN_FLOAT32


def _gather(counts: Tensor, table: Tensor, backend: str) -> Tensor:
    """The event-driven product: a weighted sum of the rows of active neurons."""
    K = counts.shape[1]
    fired = counts.flatten().nonzero()[:, 0]
    values = counts.flatten()[fired].float()
    # Where each row's events begin in the list, and where the last row's end.
    starts = torch.arange(0, counts.numel() + 1, K, device=counts.device)
    offsets = torch.searchsorted(fired, starts)
    neurons = fired if counts.shape[0] == 1 else fired % K
    if backend == "embedding_bag_int8":
        out: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            table, neurons, offsets, False, 0, False, values, None, True
        )
        return out
    return F.embedding_bag(
        neurons, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _integer_gemm(counts: Tensor, table: Tensor, backend: str) -> Tensor:
    """The dense product of all rows at once."""
    weight = table.to(torch.int8)
    if backend == "embedding_bag_int8":
        # Flipping the top bit of w + 128 gives w in two's complement.
        weight = (table[:, :-8] ^ _OFFSET).view(torch.int8)
    if counts.device.type != "cpu":
        # CUDA's int8 product wants shapes in multiples of 8 and more than 16 rows.
        return counts.double() @ weight.double()
    # Strides of size-1 axes are anything in torch, but the product believes them.
    return torch._int_mm(counts.to(torch.int8), weight.flatten().view(weight.shape))


def _obstacle(backend: str, device_type: str) -> str | None:
    if backend == "matmul":
        return None
    if device_type != "cpu":
        return "the gather of active rows is for CPUs"
    if backend == "native":
        return rows.unavailable()
    if backend == "embedding_bag_int8" and not hasattr(
        torch.ops.quantized, "embedding_bag_byte_rowwise_offsets"
    ):
        return "this torch was built without quantised CPU operators"
    return None
