"""Native matrices that are read by output (`native/outputs.h`): of a silent output nothing is read.

`OutputMatrix` reads the outputs that are wanted. `Gated` reads an output only if its gate is open,
`Halves` the lower half of the weights only where the upper one does not decide. The last two take
as many bytes as plain rows do.

R rows (tokens), K input neurons, N outputs.
"""

from __future__ import annotations

import functools
import weakref
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import BackendError
from spikelm.kernels import native
from spikelm.kernels.rows import RowMatrix

_LEVELS = 16


class OutputMatrix:
    """Weights int8 [K, N] of 8 or 4 bits (-8..7) with those of an output side by side, copied into
    native memory; freed with the object.
    """

    def __init__(self, weight: Tensor, bits: int = 8) -> None:
        self.in_features, self.out_features = weight.shape
        self.bits = bits
        weight, library = weight.contiguous(), _library()
        self.handle: int | None = library.spikelm_outputs_new(
            *weight.shape, bits, weight.data_ptr()
        )
        """The address of the C++ `Outputs`, for native code; valid while this object lives."""
        if self.handle is None:
            raise BackendError(f"no native matrix of {bits} bits and shape {list(weight.shape)}")
        weakref.finalize(self, library.spikelm_outputs_free, self.handle)
        self.nbytes: int = library.spikelm_outputs_bytes(self.handle)
        """Bytes of all outputs, with the padding to 64-byte blocks."""

    @property
    def dense(self) -> Tensor:
        """The weights again, int8 [K, N]."""
        weight = torch.empty(self.in_features, self.out_features, dtype=torch.int8)
        _library().spikelm_outputs_unpack(self.handle, weight.data_ptr(), torch.get_num_threads())
        return weight

    def product(self, counts: Tensor) -> Tensor:
        """counts [R, K] (integers of any dtype, |count| <= 127) -> exact int32 [R, N]."""
        counts = counts.to(torch.int8).contiguous()
        out = torch.empty(counts.shape[0], self.out_features, dtype=torch.int32)
        _library().spikelm_outputs_product(
            self.handle, counts.data_ptr(), len(counts), out.data_ptr(), torch.get_num_threads()
        )
        return out


class Gated:
    """Weights int8 [K, 2 N] of gates and, in equal number, of what they let through: one token
    reads of the second half only what stands behind open gates.
    """

    def __init__(self, weight: Tensor, bits: int = 8) -> None:
        gates, values = weight.chunk(2, 1)
        self.gates, self.values = RowMatrix(gates, bits), OutputMatrix(values, bits)
        self.bits = bits
        self.in_features, self.out_features = weight.shape
        self.nbytes = self.gates.nbytes + self.values.nbytes

    @property
    def dense(self) -> Tensor:
        return torch.cat([self.gates.dense, self.values.dense], 1)

    def product(self, counts: Tensor) -> Tensor:
        """As `RowMatrix.product`: all outputs."""
        return torch.cat([self.gates.product(counts), self.values.product(counts)], 1)

    def __reduce__(self) -> tuple[type[Gated], tuple[Tensor, int]]:
        return Gated, (self.dense, self.bits)


class Halves:
    """Weights int8 [K, N] as upper and lower halves, w = 16 upper + lower: the upper ones estimate
    every output, and the lower ones are read for those that matter, such as the largest logits.
    """

    bits = 8

    def __init__(self, weight: Tensor) -> None:
        upper = weight >> 4
        lower = weight - upper * _LEVELS - _LEVELS // 2
        self.upper, self.lower = RowMatrix(upper, 4), OutputMatrix(lower, 4)
        self.in_features, self.out_features = weight.shape
        self.nbytes = self.upper.nbytes + self.lower.nbytes

    @property
    def dense(self) -> Tensor:
        """The weights again, int8 [K, N]."""
        return self.upper.dense * _LEVELS + (self.lower.dense + _LEVELS // 2)

    def product(self, counts: Tensor) -> Tensor:
        """As `RowMatrix.product`: all outputs, exact."""
        total = counts.sum(-1, keepdim=True, dtype=torch.int32)
        lower = self.lower.product(counts) + _LEVELS // 2 * total
        return self.upper.product(counts) * _LEVELS + lower

    def __reduce__(self) -> tuple[type[Halves], tuple[Tensor]]:
        return Halves, (self.dense,)


@functools.cache
def _library() -> Any:
    library = native.library()
    for name, result, *arguments in (
        ("spikelm_outputs_new", c_void_p, c_int64, c_int64, c_int, c_void_p),
        ("spikelm_outputs_free", None, c_void_p),
        ("spikelm_outputs_bytes", c_int64, c_void_p),
        ("spikelm_outputs_unpack", None, c_void_p, c_void_p, c_int),
        ("spikelm_outputs_product", None, c_void_p, c_void_p, c_int64, c_void_p, c_int),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
