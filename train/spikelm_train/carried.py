"""The state that a run's rows carry from step to step (truncated backpropagation through time)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spikelm.errors import CheckpointError
from spikelm.state import State

Gather = Callable[[list[Any]], list[Any]]


class CarriedState:
    """What the rows of this process's forwards remember of the step before.

    `gather` joins the lists of all processes. The state dict has the rows of all of them, so a run
    may go on with another division of its rows between processes and forwards.
    """

    def __init__(self, device: torch.device, gather: Gather = list) -> None:
        self._device = device
        self._gather = gather
        self._parts: dict[range, State] = {}
        self._loaded: dict[int, State] = {}

    def take(self, rows: range) -> State | None:
        """The state with which `rows` of the step's global batch begin; None is the empty one."""
        if rows in self._parts:
            return self._parts[rows]
        if not self._loaded:
            return None
        missing = [row for row in rows if row not in self._loaded]
        if missing:
            raise CheckpointError(
                f"the checkpoint has no state for row {missing[0]} of a step; continue with as "
                "many rows per step, or start over with --fresh"
            )
        return State.merge([self._loaded.pop(row) for row in rows]).map(self._to_device)

    def put(self, rows: range, state: State) -> None:
        """Keeps the state after `rows`, outside the autograd graph."""
        self._parts[rows] = state.detach()

    def state_dict(self) -> dict[str, Any]:
        """The state of every row of a step, on the CPU; all processes call it."""
        mine = [
            (row, part.layers, part.position)
            for rows, state in self._parts.items()
            for index, row in enumerate(rows)
            for part in [state.take([index]).map(torch.Tensor.cpu)]
        ]
        rows = self._gather(mine) if self._parts else self._kept()
        return {"rows": rows}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self._parts.clear()
        self._loaded = {row: State(layers, position) for row, layers, position in saved["rows"]}

    def _kept(self) -> list[Any]:
        return [(row, state.layers, state.position) for row, state in self._loaded.items()]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)
