"""Checkpoints of a run: written in the background, there whole or not at all.

checkpoints/
  step-00000250/
    position.json     how far the run was; written last, before the folder gets its name
    state.pt          what is the same for all processes (rank 0 writes it)
    rank-0.pt ...     what each process has of its own: random numbers
    shards/           weights that are shared out (FSDP2, ZeRO)
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import CheckpointError, ConfigError

FOLDER, POSITION, STATE, SHARDS = "checkpoints", "position.json", "state.pt", "shards"

_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Wall-clock time spent in the loop."""
    num_processes: int = 1
    """Processes that wrote it."""
    rows: int = 0
    """Sequences of a step, over all processes; the order of the data depends on it."""
    strategy: str = "copies"
    """How the weights are spread; a checkpoint is read as it was written."""
    finished: bool = False
    """The trained model has been written."""


def step_folder(out: Path, step: int) -> Path:
    return out / FOLDER / f"step-{step:08}"


def kept_steps(out: Path) -> list[int]:
    """The steps a run can continue from, oldest first."""
    folders = (out / FOLDER).glob(f"step-*/{POSITION}")
    names = (path.parent.name.removeprefix("step-") for path in folders)
    return sorted(int(name) for name in names if name.isdecimal())


def find(out: Path, step: int | None = None) -> Path | None:
    """The checkpoint of `step`, or the newest; None if there is none.

    Raises: ConfigError for a step of which there is none.
    """
    steps = kept_steps(out)
    if step is not None and step not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"{out} has no checkpoint of step {step}; kept: {kept}")
    return step_folder(out, steps[-1] if step is None else step) if steps else None


def forget_after(out: Path, step: int) -> None:
    """Deletes the checkpoints of later steps, as the run goes another way from `step` on."""
    for later in kept_steps(out):
        if later > step:
            _remove(step_folder(out, later))


def _remove(folder: Path) -> None:
    # Its position goes first: half of a checkpoint must not look like one.
    (folder / POSITION).unlink()
    shutil.rmtree(folder)


def read_position(folder: Path) -> Position:
    """Where the checkpoint in `folder` stands. Raises: CheckpointError if it is damaged."""
    try:
        return Position(**json.loads((folder / POSITION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, error: BaseException) -> CheckpointError:
    """What to say of a checkpoint that cannot be read."""
    out = folder.parent.parent
    others = [step for step in kept_steps(out) if step_folder(out, step) != folder]
    older = f"continue from an older one with --resume {others[-1]}, or " if others else ""
    detail = " ".join(str(error).split())
    return CheckpointError(f"{folder} is damaged ({detail:.200}); {older}start over with --fresh")


class Writer:
    """Writes the checkpoints of one process of a run, and keeps the last few.

    `begin` copies what is to be written and returns; a thread writes it. Once all processes have
    (`written`), `finish` gives the folder its name. Until then it ends in .tmp, and the one before
    is the newest.
    """

    def __init__(self, out: Path, rank: int, keep: int, wait: Callable[[], None]) -> None:
        self.out, self.rank, self.keep = out, rank, keep
        self.wait = wait
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[Position, Future[None]] | None = None

    @property
    def busy(self) -> bool:
        """Whether one was begun and not finished."""
        return self._writing is not None

    def written(self) -> bool:
        """Whether this process has written its part of it."""
        return self._writing is None or self._writing[1].done()

    def begin(
        self,
        position: Position,
        shared: dict[str, Any],
        own: dict[str, Any],
        save_shards: Callable[[Path], None],
    ) -> None:
        """Copies `shared` (rank 0) and `own`, and begins to write them; `save_shards(folder)`
        writes at once. Every process calls it, after `finish`.
        """
        assert self._writing is None
        staging = self._staging(position)
        if self.rank == 0:
            for killed in (self.out / FOLDER).glob("*.tmp"):
                shutil.rmtree(killed, ignore_errors=True)
            (staging / SHARDS).mkdir(parents=True)
        self.wait()
        save_shards(staging / SHARDS)
        parts = {f"rank-{self.rank}.pt": copied(own)}
        if self.rank == 0:
            parts[STATE] = copied(shared)
        self._writing = position, self._pool.submit(_write, staging, parts)

    def finish(self) -> None:
        """Waits for all processes, and gives the checkpoint its name.

        Raises: CheckpointError if it could not be written; nothing is left of it then.
        """
        if self._writing is None:
            return
        position, writing = self._writing
        self._writing = None
        staging, final = self._staging(position), step_folder(self.out, position.step)
        error = writing.exception()
        if error is not None:
            shutil.rmtree(staging, ignore_errors=True)
        # Before anything is raised, as the other processes wait here too.
        self.wait()
        if isinstance(error, OSError | RuntimeError):  # torch's writer has RuntimeErrors of its own
            self.wait()
            kept = kept_steps(self.out)
            last = f"that of step {kept[-1]} is kept" if kept else "there is no earlier one"
            raise CheckpointError(
                f"the checkpoint of step {position.step} could not be written "
                f"({' '.join(str(error).split()):.200}); {last}"
            ) from None
        if error is not None:
            raise error
        if self.rank == 0 and staging.is_dir():
            if not any((staging / SHARDS).iterdir()):
                (staging / SHARDS).rmdir()
            _write_text(staging / POSITION, json.dumps(asdict(position)) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            for step in kept_steps(self.out)[: -self.keep]:
                _remove(step_folder(self.out, step))
        self.wait()

    def close(self) -> None:
        self._pool.shutdown()

    def _staging(self, position: Position) -> Path:
        return step_folder(self.out, position.step).with_suffix(".tmp")


def load(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What `Writer` wrote: `shared`, and `own` of this rank (None if it was written by fewer).

    Raises: CheckpointError if it is damaged.
    """
    mine = folder / f"rank-{rank}.pt"
    try:
        shared = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        own = torch.load(mine, map_location="cpu", weights_only=True) if mine.exists() else None
    except _UNREADABLE as error:
        raise damaged(folder, error) from None
    return shared, own


def copied(value: Any) -> Any:
    """`value` with copies of its tensors on the CPU, in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def _write(folder: Path, parts: dict[str, Any]) -> None:
    for name, state in parts.items():
        with (folder / name).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
