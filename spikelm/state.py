"""State: everything a model remembers, as named tensors that people own.

Every tensor has the batch axis first, so rows can be taken, put and merged. Nothing but `full`
attention layers makes a state grow. B sequences.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor
from torch.nn import functional as F

from spikelm.errors import CheckpointError

FORMAT = "spikelm-state-2"
MAX_LAYERS = 10_000
"""Of a file, which may come from anywhere."""

LayerState = dict[str, Tensor]
"""The tensors of one layer, each [B, ...]; the names belong to the layer."""


@dataclass(frozen=True, slots=True)
class State:
    """The memory of B sequences: an argument and a result of every forward, never an attribute."""

    layers: tuple[LayerState, ...]
    """One entry per layer."""
    position: Tensor
    """Tokens seen since the start of the document, int64 [B]."""

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.position.nbytes + sum(t.nbytes for layer in self.layers for t in layer.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state with `function` applied to every tensor."""
        layers = tuple({n: function(t) for n, t in layer.items()} for layer in self.layers)
        return State(layers, function(self.position))

    def clone(self) -> State:
        """A copy that shares no memory, every tensor contiguous."""
        return self.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))

    def detach(self) -> State:
        """The same values outside the autograd graph (truncated backpropagation)."""
        return self.map(torch.detach)

    def take(self, rows: Sequence[int]) -> State:
        """The state of the sequences `rows`, in that order; rows may repeat (fork)."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.position.device)
        return self.map(lambda tensor: tensor.index_select(0, index))

    def put(self, rows: Sequence[int], other: State) -> State:
        """This state with the sequences `rows` replaced by those of `other`."""
        source = {row: self.batch_size + i for i, row in enumerate(rows)}
        if len(source) != other.batch_size or not set(source) <= set(range(self.batch_size)):
            raise ValueError(
                f"{other.batch_size} sequences given for rows {list(rows)} of {self.batch_size}; "
                "give each sequence a row of its own"
            )
        merged = State.merge([self, other])
        return merged.take([source.get(row, row) for row in range(self.batch_size)])

    @staticmethod
    def merge(states: Sequence[State]) -> State:
        """One state holding the sequences of all `states`, in order.

        The caches of `full` layers are padded to the longest; `position` says what is valid.
        """
        layers = tuple(
            {name: _concatenate([s.layers[i][name] for s in states]) for name in layer}
            for i, layer in enumerate(states[0].layers)
        )
        return State(layers, torch.cat([s.position for s in states]))

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Writes a safetensors file that names the model it belongs to (its
        `Checkpoint.fingerprint`); it appears complete or not at all.
        """
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(self.pack(fingerprint))
        temporary.replace(path)

    def pack(
        self,
        fingerprint: str,
        about: Mapping[str, str] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> bytes:
        """The content of such a file, with what else there is to say `about` it, and `more` tensors
        beside it.
        """
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        metadata = {
            **(about or {}),
            "format": FORMAT,
            "fingerprint": fingerprint,
            "num_layers": json.dumps(len(self.layers)),
        }
        return pack({**tensors, **(more or {}), "position": self.position.contiguous()}, metadata)

    @staticmethod
    def load(path: str | Path, fingerprint: str, like: State | None = None) -> State:
        """Reads a state of the model `fingerprint`; with `like`, a state of that model, its tensors
        are checked.

        Raises: CheckpointError if the file is missing, damaged or of another model.
        """
        with opened(path) as file:
            return State.of(file, fingerprint, like, str(path))

    @staticmethod
    def of(file: Any, fingerprint: str, like: State | None, where: str) -> State:
        """The state in an open safetensors file; other tensors in it are left alone.

        Raises: CheckpointError as `load` does.
        """
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "none")
            raise CheckpointError(f"{where} is not a state of format {FORMAT}; its format: {found}")
        if metadata.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"{where} belongs to model {metadata.get('fingerprint', 'unknown')[:12]}, "
                f"not to {fingerprint[:12]}; load the model it was saved with"
            )
        names = set(file.keys())
        try:
            number = int(metadata["num_layers"])
            if not 0 <= number <= MAX_LAYERS:
                raise ValueError(f"{number} layers")
            layers: list[LayerState] = [{} for _ in range(number)]
            for key in names:
                if key.startswith("layers."):
                    _, layer, name = key.split(".", 2)
                    layers[int(layer)][name] = file.get_tensor(key)
            state = State(tuple(layers), file.get_tensor("position"))
        except (KeyError, ValueError, IndexError, SafetensorError) as error:
            raise CheckpointError(f"{where} is damaged: {error}") from None
        if like is not None:
            state.check_like(like, where)
        return state

    def check_like(self, like: State, where: str) -> None:
        """Raises: CheckpointError if this cannot be a later state of the sequences of `like`."""
        position = self.position
        fits = position.dtype == torch.int64 and position.shape == like.position.shape
        if not fits or bool((position < 0).any()):
            raise CheckpointError(f"{where} is damaged: its position is no count of tokens")
        ours = [layer.keys() for layer in self.layers]
        if ours != [layer.keys() for layer in like.layers]:
            raise CheckpointError(f"{where} does not have the tensors of this model's state")
        for own, other in zip(_tensors(self), _tensors(like), strict=True):
            shape = list(other.shape)
            if len(shape) > 2 and shape[1] == 0:
                # A cache that grows with the tokens.
                shape[1] = max(own.shape[1] if own.ndim == len(shape) else 0, int(position.max()))
            if own.dtype != other.dtype or list(own.shape) != shape:
                raise CheckpointError(
                    f"{where} has a tensor {list(own.shape)} of {own.dtype}; this model's is "
                    f"{shape} of {other.dtype}"
                )
            if not bool(torch.isfinite(own).all()):
                raise CheckpointError(f"{where} has numbers that are not finite")


def _tensors(state: State) -> Iterator[Tensor]:
    return (layer[name] for layer in state.layers for name in sorted(layer))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file. Raises: CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the state {path}: {error}") from None


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Joins along the batch axis, padding the cache axis 1 with zeros where lengths differ."""
    if tensors[0].ndim > 2:
        longest = max(t.shape[1] for t in tensors)
        padding = [0, 0] * (tensors[0].ndim - 2)
        tensors = [F.pad(t, [*padding, 0, longest - t.shape[1]]) for t in tensors]
    return torch.cat(tensors)
