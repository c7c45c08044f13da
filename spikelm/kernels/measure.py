"""What limits the products of native matrices (`native/measure.cpp`), for benchmarks.

A pass takes one vector through each of several matrices in one native call, so that nothing of
Python is in its time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from spikelm.kernels import native
from spikelm.kernels.rows import RowMatrix

# How many entries more than inputs a list of events may have.
_PADDING = 4


class _Job(ctypes.Structure):
    _fields_ = (
        ("matrix", c_void_p),
        ("counts", c_void_p),
        ("index", c_void_p),
        ("value", c_void_p),
        ("events", c_int64),
        ("out", c_void_p),
    )


class Passes:
    """Passes through `matrices`, each with its own counts int8 [K]: the products, and the same
    memory read without arithmetic.
    """

    def __init__(self, matrices: Sequence[RowMatrix], counts: Sequence[Tensor]) -> None:
        self._matrices = list(matrices)
        self._tensors = [
            (
                c.to(torch.int8).contiguous(),
                torch.empty(m.in_features + _PADDING, dtype=torch.int32),
                torch.empty(m.in_features + _PADDING, dtype=torch.int8),
                torch.zeros(m.out_features, dtype=torch.int32),
            )
            for m, c in zip(matrices, counts, strict=True)
        ]
        jobs = [
            _Job(m.handle, c.data_ptr(), index.data_ptr(), value.data_ptr(), 0, out.data_ptr())
            for m, (c, index, value, out) in zip(self._matrices, self._tensors, strict=True)
        ]
        self._jobs = (_Job * len(jobs))(*jobs)
        self.num_bytes = sum(m.nbytes for m in self._matrices)
        """Bytes of all rows."""
        self.event_bytes = sum(
            m.row_bytes * int(c.count_nonzero())
            for m, (c, *_) in zip(self._matrices, self._tensors, strict=True)
        )
        """Bytes of the rows whose neuron fired."""
        self.event()

    @property
    def sums(self) -> list[Tensor]:
        """The int32 [N] of the last product of each matrix."""
        return [out.clone() for *_, out in self._tensors]

    def event(self, threads: int = 1) -> None:
        """Lists the events and multiplies the rows of neurons that fired."""
        self._call("event", threads)

    def dense(self, threads: int = 1) -> None:
        """Multiplies all rows in order."""
        self._call("dense", threads)

    def touch(self, threads: int = 1) -> int:
        """Reads the rows of neurons that fired, in the order of `event`. Returns the sum of their
        64-bit words, modulo 2^64.
        """
        return int(self._call("touch", threads))

    def stream(self, threads: int = 1) -> int:
        """Reads all rows in order. Returns the sum of their words."""
        return int(self._call("stream", threads))

    def _call(self, name: str, threads: int) -> Any:
        function = getattr(_library(), f"spikelm_measure_{name}")
        return function(self._jobs, len(self._jobs), threads)


@functools.cache
def _library() -> Any:
    library = native.library()
    for name in ("event", "dense", "touch", "stream"):
        function = getattr(library, f"spikelm_measure_{name}")
        function.argtypes = c_void_p, c_int64, c_int
        function.restype = c_uint64 if name in ("touch", "stream") else None
    return library
