"""Experiment trackers: TensorBoard, offline and by default; Weights & Biases and trackio."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spikelm.doctor import EXTRAS
from spikelm.errors import MissingExtraError

TENSORBOARD, RUN_ID = "tensorboard", "tracker.json"
PROJECT = "spikelm"


class Tracker(Protocol):
    """Where a run's measurements go."""

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes numbers by tag, such as `silent/ffn_hidden`."""

    def flush(self) -> None:
        """Makes what was recorded readable."""

    def close(self) -> None:
        """Ends the session; a later one may continue the run."""


def open_trackers(
    names: Sequence[str], out: Path, step: int, recipe: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of the run in `out`, which goes on after `step` in the same tracker runs.

    Raises: MissingExtraError for one whose package is not installed.
    """
    return [
        TensorBoard(out, step) if name == "tensorboard" else Hosted(name, out, recipe)
        for name in names
    ]


class TensorBoard:
    """Event files in OUT/tensorboard, without what came after the checkpoint."""

    def __init__(self, out: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", EXTRAS["tensorboard"]) from None
        self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        for tag, number in numbers.items():
            self._board.add_scalar(tag, number, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Hosted:
    """wandb or trackio, which share one interface: init, log, finish.

    The run is named after the folder, and OUT/tracker.json keeps its id, under which it goes on.
    They never forget a step: of those repeated after a resume, wandb keeps the first value.
    """

    def __init__(self, name: str, out: Path, recipe: Mapping[str, Any]) -> None:
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise MissingExtraError(name, EXTRAS[name]) from None
        run_id = _run_id(out)
        own: dict[str, Any] = (
            {"id": run_id, "name": out.resolve().name, "dir": str(out)}
            if name == "wandb"
            else {"name": f"{out.resolve().name}-{run_id}"}
        )
        # What they print would stand in the middle of the progress line; the folder says it too.
        if name == "wandb":
            own["settings"] = module.Settings(silent=True)
        self._run = module.init(project=PROJECT, config=dict(recipe), resume="allow", **own)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def flush(self) -> None:
        """They send in the background."""

    def close(self) -> None:
        self._run.finish()


def _run_id(out: Path) -> str:
    """The id of the run in `out`, drawn at its beginning."""
    file = out / RUN_ID
    if not file.is_file():
        file.write_text(json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n", encoding="utf-8")
    found: str = json.loads(file.read_text(encoding="utf-8"))["id"]
    return found
