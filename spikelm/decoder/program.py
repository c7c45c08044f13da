"""The list of operations that `native/decode.cpp` runs for a token, and the running of it.

Vectors of a row lie in an arena of floats at offsets, spike lists are numbered, and what a sequence
remembers is reached by the layer and the name it has in `State`. Operations between two barriers
do not depend on each other, so threads share them.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import itertools
import math
import operator
import threading
import weakref
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.errors import DataError, SpikelmError
from spikelm.kernels import native
from spikelm.state import State

ALIGNMENT = 16
"""Floats of one cache line."""

TOKENS_AT_ONCE = 128
"""Of a prompt: each has a row's vectors, and all share what they read of the weights."""

BAD_TOKEN = -2
"""What native code says of an id outside the vocabulary."""

MIN_ROOM = 64
"""Tokens that a growing cache has room for at first; it doubles when it is full."""


class Code(enum.IntEnum):
    """As in native/decode.cpp, where each is described."""

    EMBED = 0
    NORM = 1
    SPIKE = 2
    MATVEC = 3
    KEEP = 4
    CONV = 5
    DELTA = 6
    RWKV7 = 7
    WINDOW = 8
    GATED_ADD = 9
    ADD_SPIKES = 10
    WKV4 = 11
    GLA = 12
    MEAN = 13
    ROUTE = 14
    ADD_EXPERTS = 15
    OPEN = 16
    OUTPUTS = 17
    ESTIMATE = 18
    SHORTLIST = 19


class Counts(NamedTuple):
    """What one call read, summed over its sequences."""

    silent: int = 0
    """Exact zeros among the entries that entered projections."""
    total: int = 0
    """All those entries."""
    weight_bytes: int = 0
    """Bytes of projections' weights that were read, each sequence reading its own."""
    state_bytes: int = 0
    """Bytes of matrix-valued states that were read or written."""
    dense_state_bytes: int = 0
    """Those of an update of every row."""


@dataclass
class Watch:
    """Filled by a call: what each of its B rows did."""

    bits: bool = False
    """Whether to say who fired, which is asked for."""
    counts: list[Counts] = field(default_factory=list)
    fired: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    """By the name of the neurons in front of a matrix: [B, n], whether each sent something."""


class _Op(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("code", c_int32),
        ("wave", c_int32),
        ("list", c_int32),
        ("when", c_int32),
        ("size", c_int32 * 10),
        ("at", c_int32 * 10),
        ("state", c_int32 * 4),
        ("number", c_float * 8),
        ("data", c_void_p * 9),
    ]


class Program:
    """Built operation by operation, then `finish`ed and run."""

    def __init__(self) -> None:
        self.used = 0
        """Floats of the arena in use: set it back to use them again."""
        self.when = -1
        """Operations are done where this float of the arena is not 0; -1: always."""
        self._ops: list[_Op] = []
        self._names: list[str] = []
        self._wave = 0
        self._arena = 0
        self._lists: list[int] = []
        self._neurons: dict[str, int] = {}
        self._states: dict[tuple[int, str], int] = {}
        self._growing: list[tuple[int, str]] = []
        self._alive: list[object] = []
        self._handle: int | None = None
        self._logits = (0, 0)
        # The state tensors of the last call, so that they live as long as their addresses are kept.
        self._bound: list[Tensor] = []
        self._identities: list[int] = []
        self._addresses: Any = None
        self._slots: Any = None
        self._lock = threading.Lock()

    def vector(self, size: int) -> int:
        """Room for `size` floats."""
        at = self.used
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        self._arena = max(self._arena, self.used)
        return at

    def list(self, size: int, *, counted: bool = True) -> int:
        """A new list of the spikes of `size` neurons; `counted` among those that enter matrices."""
        self._lists.append(size if counted else -size)
        return len(self._lists) - 1

    def state(self, layer: int, name: str, *, grows: bool = False) -> int:
        """The slot of a state tensor; if it `grows`, axis 1 has room for one entry per token."""
        if grows:
            self._growing.append((layer, name))
        return self._states.setdefault((layer, name), len(self._states))

    def barrier(self) -> None:
        """What follows may read what came before."""
        self._wave += 1

    def emit(
        self,
        code: Code,
        name: str,
        *,
        size: Sequence[int] = (),
        at: Sequence[int | None] = (),
        state: Sequence[int | None] = (),
        number: Sequence[float] = (),
        data: Sequence[Tensor | int | None] = (),
        spikes: int = -1,
    ) -> None:
        """Appends an operation; `name` is the module's, for errors. Tensors are kept alive."""
        op = _Op(code=code, wave=self._wave, list=spikes, when=self.when)
        op.size[: len(size)] = list(size)
        for array, given in ((op.at, at), (op.state, state)):
            array[:] = [-1] * len(array)
            array[: len(given)] = [-1 if entry is None else entry for entry in given]
        op.number[: len(number)] = list(number)
        op.data[: len(data)] = [self._address(entry) for entry in data]
        self._ops.append(op)
        self._names.append(name)
        if code == Code.SPIKE and self._lists[spikes] > 0:
            self._neurons[name] = spikes

    def finish(self, logits: int, num_logits: int) -> None:
        """Ends the list; the logits are the vector at `logits`."""
        ops = (_Op * len(self._ops))(*self._ops)
        lists = (c_int32 * len(self._lists))(*self._lists)
        self._logits = (logits, num_logits)
        library = _library()
        self._handle = library.spikelm_program_new(
            ops, len(ops), self._arena, lists, len(self._lists)
        )
        weakref.finalize(self, library.spikelm_program_free, self._handle)

    def run(
        self,
        tokens: Tensor,
        state: State | Sequence[State],
        within: float | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Counts]:
        """One token for each of B sequences, which one state or several have in order: int64 [B].
        They are changed in place. Logits more than `within` below the largest may be estimates;
        None: all are exact. `watch` gets what each of them did.

        Returns logits float32 [B, N] and what was counted. Raises: DataError for ids outside the
        vocabulary or another number of sequences than the state's; SpikelmError naming the neurons
        whose input is not finite.
        """
        states = [state] if isinstance(state, State) else state
        sequences = sum(state.batch_size for state in states)
        if sequences != len(tokens):
            raise DataError(f"{len(tokens)} tokens given for a state of {sequences} sequences")
        return self._run(tokens, states, within, watch, sequence=False)

    @property
    def reads_prompts(self) -> bool:
        """Whether `read` is the fast way to read many tokens: softmax attention over all of them is
        faster as matrix products.
        """
        return not self._growing

    def read(self, tokens: Tensor, state: State) -> tuple[Tensor, Counts]:
        """The next T >= 1 tokens of the one sequence of `state`: int64 [T]. As `run`, with the
        logits [1, N] after the last.
        """
        if state.batch_size != 1:
            raise DataError(f"a state of one sequence is needed, not of {state.batch_size}")
        logits, counts = torch.empty(0), Counts()
        for some in tokens.split(TOKENS_AT_ONCE):
            logits, more = self._run(some, [state], None, None, sequence=True)
            counts = Counts(*map(operator.add, counts, more))
        return logits, counts

    def _run(
        self,
        tokens: Tensor,
        states: Sequence[State],
        within: float | None,
        watch: Watch | None,
        *,
        sequence: bool,
    ) -> tuple[Tensor, Counts]:
        rows, B = len(tokens), 1 if sequence else len(tokens)
        start, size = self._logits
        logits = torch.empty(B, size)
        counters = np.zeros((rows, len(Counts._fields)), np.int64)
        fired = None
        if watch is not None and watch.bits:
            fired = np.zeros((rows, self._bits_at()[-1]), np.uint8)
        tokens = tokens.contiguous()
        positions = states[0].position
        if len(states) > 1:
            positions = torch.cat([state.position for state in states])
        assert positions.is_contiguous()
        seen = rows if sequence else 1
        # Native code works in the program's own vectors, and Python lets other threads run.
        with self._lock:
            self._bind(states, seen)
            broken = _library().spikelm_program_run(
                self._handle,
                rows,
                sequence,
                tokens.data_ptr(),
                positions.data_ptr(),
                self._addresses,
                self._slots,
                len(self._states),
                start,
                size,
                math.inf if within is None else within,
                logits.data_ptr(),
                counters.ctypes.data,
                None if fired is None else fired.ctypes.data,
                torch.get_num_threads(),
            )
        if broken == BAD_TOKEN:
            low, high = (int(bound) for bound in tokens.aminmax())
            raise DataError(f"token ids {low}..{high} given; allowed: 0..{size - 1}")
        if broken >= 0:
            raise SpikelmError(
                f"{self._names[broken]} got numbers that are not finite; the weights or the state "
                "are broken"
            )
        if len(states) > 1:
            for state, position in zip(
                states, positions.split([s.batch_size for s in states]), strict=True
            ):
                state.position.copy_(position)
        if watch is not None:
            watch.counts = [Counts(*row) for row in counters.tolist()]
        if watch is not None and fired is not None:
            bits, starts = np.unpackbits(fired, axis=1, bitorder="little"), self._bits_at()
            for name, number in self._neurons.items():
                start = 8 * starts[number]
                watch.fired[name] = bits[:, start : start + self._lists[number]].astype(bool)
        return logits, Counts(*counters.sum(0).tolist())

    def _bits_at(self) -> Sequence[int]:
        """Where native code puts the bits of each list, in bytes, and how many there are."""
        return [0, *itertools.accumulate(-(-abs(size) // 8) for size in self._lists)]

    def _bind(self, states: Sequence[State], tokens: int) -> None:
        """Looks up the addresses of the states' tensors, unless they are those of the last call;
        makes tensors contiguous, and growing ones long enough for so many tokens more.
        """
        self._make_room(states, tokens)
        # One pass in C: by the time a large model comes back here its Python objects are cold.
        if [*map(id, _tensors(states))] == self._identities:
            return
        rows: list[list[int]] = []
        for state in states:
            for layer, name in self._states:
                tensor = state.layers[layer][name]
                assert tensor.dtype in (torch.float32, torch.int8)
                state.layers[layer][name] = tensor.contiguous()
            bound = [state.layers[layer][name] for layer, name in self._states]
            rows += (
                [t.data_ptr() + b * t.stride(0) * t.itemsize for t in bound]
                for b in range(state.batch_size)
            )
        self._bound = [*_tensors(states)]
        self._identities = [*map(id, self._bound)]
        self._addresses = (c_void_p * (len(rows) * len(bound)))(*itertools.chain(*rows))
        self._slots = (c_int64 * len(bound))(*(t.shape[1] for t in bound))

    def _make_room(self, states: Sequence[State], tokens: int) -> None:
        """Growing caches are as long in every state."""
        if not self._growing:
            return
        needed = max(int(state.position.max()) for state in states) + tokens
        for layer, name in self._growing:
            sizes = [state.layers[layer][name].shape[1] for state in states]
            size = max(sizes) if max(sizes) >= needed else max(MIN_ROOM, 2 * needed)
            for state, own in zip(states, sizes, strict=True):
                if own < size:
                    tensor = state.layers[layer][name]
                    state.layers[layer][name] = F.pad(tensor, (0, 0, 0, 0, 0, size - own))

    def _address(self, entry: Tensor | int | None) -> int | None:
        if isinstance(entry, Tensor):
            assert entry.is_contiguous()
            self._alive.append(entry)
            return entry.data_ptr()
        return entry


def _tensors(states: Sequence[State]) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(
        layer.values() for state in states for layer in state.layers
    )


@functools.cache
def _library() -> Any:
    library = native.library()
    signatures: list[tuple[Any, ...]] = [
        ("spikelm_program_new", c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64),
        ("spikelm_program_free", None, c_void_p),
        (
            "spikelm_program_run",
            *(c_int64, c_void_p, c_int64, c_int, *[c_void_p] * 4),
            *(c_int64, c_int64, c_int64, c_float, c_void_p, c_void_p, c_void_p, c_int),
        ),
    ]
    for name, result, *arguments in signatures:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
