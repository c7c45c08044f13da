"""State: everything a model remembers, as named tensors that people own.

Every tensor has the batch axis first, so rows can be taken, put and merged. Nothing but `full`
attention layers makes a state grow. B sequences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from spikelm.errors import CheckpointError

FORMAT = "spikelm-state-2"

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
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        metadata = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "num_layers": json.dumps(len(self.layers)),
        }
        temporary = path.with_name(path.name + ".tmp")
        save_file({**tensors, "position": self.position.contiguous()}, temporary, metadata)
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path, fingerprint: str) -> State:
        """Reads a state of the model `fingerprint`.

        Raises: CheckpointError if the file is missing, damaged or of another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the state {path}: {error}") from None
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "none")
            raise CheckpointError(f"{path} is not a state of format {FORMAT}; its format: {found}")
        if metadata["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{path} belongs to model {metadata['fingerprint'][:12]}, "
                f"not to {fingerprint[:12]}; load the model it was saved with"
            )
        layers: list[LayerState] = [{} for _ in range(int(metadata["num_layers"]))]
        position = tensors.pop("position")
        for key, tensor in tensors.items():
            _, layer, name = key.split(".", 2)
            layers[int(layer)][name] = tensor
        return State(tuple(layers), position)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Joins along the batch axis, padding the cache axis 1 with zeros where lengths differ."""
    if tensors[0].ndim > 2:
        longest = max(t.shape[1] for t in tensors)
        padding = [0, 0] * (tensors[0].ndim - 2)
        tensors = [F.pad(t, [*padding, 0, longest - t.shape[1]]) for t in tensors]
    return torch.cat(tensors)
