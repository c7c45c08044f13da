"""Integer matrices in native memory (`native/matrix.h`), of which a product reads only the rows of
neurons that fired.

R rows (tokens), K input neurons, N outputs.
"""

from __future__ import annotations

import functools
import os
import platform
import weakref
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import BackendError
from spikelm.kernels import native

MAX_COUNT = 127
"""Largest |count| a product takes."""

MAX_INPUTS = 132_104
"""Largest K: beyond it 127 x 128 x K would overflow int32."""

ISAS = ("scalar", "avx2", "avx512", "neon")
"""Instruction sets in rising order; the best one of the machine is used unless SPIKELM_ISA names
another.
"""

_RANGES = {8: (-128, 127), 4: (-8, 7)}


def unavailable() -> str | None:
    """Why native matrices cannot be used here, or are not worth it; None if they are.

    Raises: BackendError if SPIKELM_ISA names an instruction set this machine lacks.
    """
    reason = native.unavailable()
    if reason is not None:
        return reason
    slow = isa() == "scalar" and not os.environ.get("SPIKELM_ISA")
    if slow and platform.machine().lower() in ("x86_64", "amd64"):
        return "neither AVX2 nor AVX-512 VNNI, or a compiler that cannot use them"
    return None


def isa() -> str:
    """The instruction set in use. The library must be available.

    Raises: BackendError if SPIKELM_ISA names one this machine lacks.
    """
    number = _library().spikelm_isa()
    if number < 0:
        raise BackendError(
            f"SPIKELM_ISA={os.environ.get('SPIKELM_ISA')} cannot run on this machine; "
            f"unset it, or take one of {', '.join(ISAS)} that the processor has"
        )
    return ISAS[number]


def set_isa(name: str) -> None:
    """Switches every matrix to another instruction set: the layout is the same for all.

    Raises: BackendError if the machine lacks it.
    """
    if name not in ISAS or not _library().spikelm_set_isa(ISAS.index(name)):
        raise BackendError(f"instruction set '{name}' cannot run on this machine")


class RowMatrix:
    """Weights int8 [K, N] of 8 or 4 bits (-8..7), copied into native memory; freed with the object.

    Raises: BackendError for what the native form cannot hold.
    """

    def __init__(self, weight: Tensor, bits: int = 8) -> None:
        if weight.dtype != torch.int8 or weight.ndim != 2 or weight.device.type != "cpu":
            raise BackendError(
                f"a native matrix takes int8 [K, N] on the CPU, not {weight.dtype} "
                f"{list(weight.shape)} on {weight.device.type}"
            )
        self.in_features, self.out_features = weight.shape
        self.bits = bits
        if not 1 <= self.in_features <= MAX_INPUTS or not self.out_features:
            raise BackendError(
                f"a native matrix has 1 to {MAX_INPUTS:,} inputs and at least one output, "
                f"not {list(weight.shape)}; use another backend"
            )
        if bits not in _RANGES:
            raise BackendError(f"native weights have 8 or 4 bits, not {bits}")
        low, high = _RANGES[bits]
        if bits == 4 and (int(weight.min()) < low or int(weight.max()) > high):
            raise BackendError(f"weights of 4 bits lie in {low}..{high}")
        isa()
        weight = weight.contiguous()
        library = _library()
        self.handle: int | None = library.spikelm_matrix_new(*weight.shape, bits, weight.data_ptr())
        """The address of the C++ `Matrix`, for native code; valid while this object lives."""
        if self.handle is None:
            raise BackendError(f"no memory for a native matrix {list(weight.shape)}")
        weakref.finalize(self, library.spikelm_matrix_free, self.handle)
        self.nbytes: int = library.spikelm_matrix_bytes(self.handle)
        """Bytes of all rows, with the padding to 64-byte blocks."""

    @property
    def row_bytes(self) -> int:
        """What the weights of one input neuron take."""
        return self.nbytes // self.in_features

    @property
    def dense(self) -> Tensor:
        """The weights again, int8 [K, N]."""
        weight = torch.empty(self.in_features, self.out_features, dtype=torch.int8)
        _library().spikelm_matrix_unpack(self.handle, weight.data_ptr(), torch.get_num_threads())
        return weight

    def product(self, counts: Tensor) -> Tensor:
        """counts [R, K] (integers of any dtype, |count| <= 127) -> exact int32 [R, N]."""
        R, K = counts.shape
        assert self.in_features == K, f"counts for {K} inputs, the matrix has {self.in_features}"
        counts = counts.to(torch.int8).contiguous()
        out = torch.empty(R, self.out_features, dtype=torch.int32)
        _library().spikelm_matrix_product(
            self.handle, counts.data_ptr(), R, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def __reduce__(self) -> tuple[type[RowMatrix], tuple[Tensor, int]]:
        # Copies and pickles carry the weights: an address would be freed twice.
        return RowMatrix, (self.dense, self.bits)


@functools.cache
def _library() -> Any:
    library = native._load()[0]
    for name, result, *arguments in (
        ("spikelm_isa", c_int),
        ("spikelm_set_isa", c_int, c_int),
        ("spikelm_matrix_new", c_void_p, c_int64, c_int64, c_int, c_void_p),
        ("spikelm_matrix_free", None, c_void_p),
        ("spikelm_matrix_bytes", c_int64, c_void_p),
        ("spikelm_matrix_unpack", None, c_void_p, c_void_p, c_int),
        ("spikelm_matrix_product", None, c_void_p, c_void_p, c_int64, c_void_p, c_int),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
