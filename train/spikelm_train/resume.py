"""The run folder: what is in it, whose it is, and where a run continues.

config.yaml           the resolved recipe
data/                 tokenizer and token files
checkpoint/           everything to continue; replaced as a whole
teacher.json          whom a distilled run learns from
metrics.jsonl  loss.png  tensorboard/  wandb/  tracker.json  profile/
report.md  curves.png  the finished run on one page
config.json  model.safetensors  tokenizer.json ...   the trained model, at the end
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from spikelm.config import from_dict, load_yaml, save_yaml, to_dict
from spikelm.errors import CheckpointError, ConfigError
from spikelm.tokenizer import FILES as TOKENIZER_FILES
from spikelm_train.config import TrainConfig, differences

CONFIG, CHECKPOINT, POSITION = "config.yaml", "checkpoint", "position.json"
TEACHER = "teacher.json"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    *TOKENIZER_FILES,
)
RUN_FILES = (
    CONFIG,
    CHECKPOINT,
    f"{CHECKPOINT}.tmp",
    f"{CHECKPOINT}.old",
    TEACHER,
    "data",
    "metrics.jsonl",
    "loss.png",
    "tensorboard",
    "wandb",
    "tracker.json",
    "profile",
    "report.md",
    "curves.png",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Wall-clock time spent in the loop."""
    num_processes: int = 1
    """Processes the run is spread over; its batches depend on it."""
    finished: bool = False
    """The trained model has been written."""


def claim(out: Path, config: TrainConfig, *, fresh: bool, num_processes: int) -> Position | None:
    """Makes `out` the folder of this run; where to continue, or None at the beginning.

    `fresh` deletes what an earlier run wrote, and nothing else.

    Raises: ConfigError for a folder that is not writable, another model's, or a run of another
    recipe or number of processes.
    """
    foreign = [name for name in MODEL_FILES + RUN_FILES if (out / name).exists()]
    if foreign and not _is_run(out):
        raise ConfigError(
            f"{out} holds {foreign[0]}, which no training run put there; use another --out"
        )
    try:
        if fresh and (out / CONFIG).exists():
            _remove(out, RUN_FILES + MODEL_FILES)
        found = find(out)
        if found is None:
            out.mkdir(parents=True, exist_ok=True)
            save_yaml(config, out / CONFIG)
            return None
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}; use another --out") from None
    _check_same(out, config)
    position = read_position(found)
    if position.num_processes != num_processes:
        raise ConfigError(
            f"{out} was begun on {position.num_processes} process(es), not {num_processes}; "
            "start as many, or use another --out or --fresh"
        )
    return position


@contextlib.contextmanager
def discarding(out: Path, begins: bool) -> Iterator[None]:
    """If this fails at the beginning of a run, what the run wrote goes, and its empty folder."""
    try:
        yield
    except BaseException:
        if begins:
            _remove(out, RUN_FILES)
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def _is_run(out: Path) -> bool:
    """Whether `config.yaml` is a resolved recipe, as only a run writes it."""
    try:
        saved = load_yaml(out / CONFIG)
    except ConfigError:
        return False
    return {"model", "tokenizer", "data", "optim"} <= saved.keys()


def _check_same(out: Path, config: TrainConfig) -> None:
    saved = from_dict(TrainConfig, load_yaml(out / CONFIG))
    changed = differences(to_dict(saved), to_dict(config))
    if changed:
        names = ", ".join(changed[:6]) + (", ..." if len(changed) > 6 else "")
        raise ConfigError(
            f"{out} holds a run of another recipe (different: {names}); use another --out, or "
            "--fresh to delete that run and start over"
        )


def find(out: Path) -> Path | None:
    """The checkpoint folder of a run, or None before the first one."""
    for name in (CHECKPOINT, f"{CHECKPOINT}.old"):
        if (out / name / POSITION).is_file():
            return out / name
    return None


def read_position(folder: Path) -> Position:
    """Where the checkpoint in `folder` stands. Raises: CheckpointError if it is damaged."""
    try:
        data: dict[str, Any] = json.loads((folder / POSITION).read_text(encoding="utf-8"))
        return Position(**data)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / POSITION} is damaged ({error}); start over with --fresh"
        ) from None


def replace(
    out: Path,
    position: Position,
    save_state: Callable[[str], object],
    *,
    is_main: bool,
    wait: Callable[[], None],
) -> None:
    """Writes a checkpoint beside the current one, then puts it in its place.

    Every process calls it; `save_state(folder)` writes, `wait` lets all processes catch up.
    """
    staging, current, old = (out / f"{CHECKPOINT}{end}" for end in (".tmp", "", ".old"))
    if is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    wait()
    save_state(str(staging))
    wait()
    if is_main:
        (staging / POSITION).write_text(json.dumps(asdict(position)) + "\n", encoding="utf-8")
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        staging.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    wait()


def _remove(out: Path, names: tuple[str, ...]) -> None:
    # The recipe goes last: while it is there, the folder is recognised as a run.
    for name in (*(n for n in names if n != CONFIG), CONFIG):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Interruption:
    """The first SIGINT or SIGTERM received; a second one acts at once."""

    signum = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals while open (in the main thread; elsewhere it does nothing)."""
        previous: dict[int, Any] = {}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def note(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            restore()

        with contextlib.suppress(ValueError):  # not the main thread
            for signum in (signal.SIGINT, signal.SIGTERM):
                previous[signum] = signal.signal(signum, note)
        try:
            yield
        finally:
            restore()
