"""The run folder: what is in it, whose it is, and where a run continues.

config.yaml           the resolved recipe
data/                 tokenizer and token files
checkpoints/          everything to continue, by step
best/                 the model with the lowest validation loss, if the recipe keeps it
tokenizer/            of the text, and of every checkpoint
teacher.json          whom a distilled run learns from
metrics.jsonl  curves.png  tensorboard/  wandb/  tracker.json  profile/
report.md             the finished run on one page
config.json  model.safetensors  tokenizer.json ...   the trained model, at the end
adapter/              and what was added to the model it began with, of low rank
.training.lock        there is a command at work here
.earlier/             the run that --fresh is about to replace
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from spikelm.config import from_dict, load_yaml, save_yaml, to_dict
from spikelm.errors import ConfigError
from spikelm.tokenizer import FILES as TOKENIZER_FILES
from spikelm_train import checkpoints, lora
from spikelm_train.checkpoints import Position
from spikelm_train.config import TrainConfig, differences

CONFIG, BEST, TEACHER, TOKENIZER = "config.yaml", "best", "teacher.json", "tokenizer"
LOCK, EARLIER = ".training.lock", ".earlier"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "chat_template.jinja",
    *TOKENIZER_FILES,
)
RUN_FILES = (
    CONFIG,
    checkpoints.FOLDER,
    BEST,
    TEACHER,
    TOKENIZER,
    "data",
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    "tracker.json",
    "profile",
    "report.md",
    "curves.png",
    lora.FOLDER,
)

# While the recipe is there, the folder is recognised as a run.
_CONFIG_LAST = (*(n for n in MODEL_FILES + RUN_FILES if n != CONFIG), CONFIG)

OBSERVATION = (
    "log_every",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep_last",
    "keep_best",
    "sample_every",
    "sample_prompt",
    "sample_tokens",
    "report_to",
    "peak_flops",
)
"""Keys of a recipe that change nothing in the weights: a run may continue with others."""


@contextlib.contextmanager
def occupied(out: Path) -> Iterator[None]:
    """Keeps other commands from training in `out` while open; leaves no empty folder. What one that
    was killed had set aside comes back.

    A folder that cannot be written needs no keeping. Raises: ConfigError if one is at work there.
    """
    lock = FileLock(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"another command is training in {out}; wait for its end, stop it (each of its "
            "processes, if a launcher was killed), or use another --out"
        ) from None
    except OSError:
        yield
        return
    try:
        _put_back(out)
        yield
    finally:
        # While it is held, so that nobody else's is deleted.
        with contextlib.suppress(OSError):
            (out / LOCK).unlink()
            out.rmdir()
        lock.release()


def claim(
    out: Path,
    config: TrainConfig,
    *,
    fresh: bool,
    num_processes: int,
    strategy: str = "copies",
    step: int | None = None,
    context: int = 1,
) -> Position | None:
    """Makes `out` the folder of this run; where to continue, or None at the beginning.

    It continues at the newest checkpoint or that of `step`. `fresh` sets what an earlier run wrote
    aside, and nothing else, until the new one has `begun`. `context` processes share a row.

    Raises: ConfigError for a folder that is not writable, another model's, a run of another
    recipe, or one that these processes cannot continue.
    """
    _check_needed(out, config)
    foreign = [name for name in MODEL_FILES + RUN_FILES if (out / name).exists()]
    if foreign and not _is_run(out):
        raise ConfigError(
            f"{out} holds {foreign[0]}, which no training run put there; use another --out"
        )
    try:
        if fresh and (out / CONFIG).exists():
            _set_aside(out)
        found = checkpoints.find(out, step)
        if found is None:
            out.mkdir(parents=True, exist_ok=True)
            save_yaml(config, out / CONFIG)
            return None
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}; use another --out") from None
    _check_same(out, config)
    position = checkpoints.read_position(found)
    _check_processes(out, config, position, num_processes, strategy, context)
    return position


def _check_needed(out: Path, config: TrainConfig) -> None:
    """Raises: ConfigError for a folder that the run reads and would write over."""
    prepared = [config.data.prepared, *(part.prepared for part in config.data.mixture)]
    needed = [("init", config.init), ("distill.teacher", config.distill.teacher)]
    for key, given in needed + [("data.prepared", folder) for folder in prepared]:
        if given is not None and Path(given).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{key}: {given} is in {out}, this run's own folder; use another --out"
            )


def _check_processes(
    out: Path,
    config: TrainConfig,
    position: Position,
    num_processes: int,
    strategy: str,
    context: int,
) -> None:
    if position.strategy != strategy:
        how = {"copies": "without sharding", "shards": "with --shard", "zero": "by DeepSpeed"}
        raise ConfigError(
            f"{out} was begun {how[position.strategy]}; start it so again, or use another --out "
            "(spikelm export makes a model of what it has)"
        )
    if strategy == "zero" and position.num_processes != num_processes:
        raise ConfigError(
            f"{out} was begun on {position.num_processes} process(es), not {num_processes}; "
            "DeepSpeed continues on as many, start so many"
        )
    per_forward = config.micro_batch_size * num_processes // context
    if position.rows % per_forward:
        possible = [
            n * context
            for n in range(1, position.rows + 1)
            if not position.rows % (n * config.micro_batch_size)
        ]
        raise ConfigError(
            f"{out} takes {position.rows} sequences a step; {num_processes} process(es) of "
            f"micro_batch_size {config.micro_batch_size} cannot share them out equally; allowed: "
            f"{', '.join(map(str, possible))} process(es)"
        )


@contextlib.contextmanager
def undone_if_it_fails(out: Path, begins: bool) -> Iterator[None]:
    """A part of the beginning of a run: if it fails, what the run wrote goes, and an earlier run
    comes back.
    """
    try:
        yield
    except BaseException:
        if begins:
            _remove(out, RUN_FILES)
            _put_back(out)
        raise


def begun(out: Path) -> None:
    """Deletes the earlier run: the one that takes its place can train."""
    shutil.rmtree(out / EARLIER, ignore_errors=True)


def _set_aside(out: Path) -> None:
    (out / EARLIER).mkdir()
    _move(out, out / EARLIER)


def _put_back(out: Path) -> None:
    """Undoes `_set_aside`, also one that was cut off."""
    earlier = out / EARLIER
    if not earlier.is_dir():
        return
    if (earlier / CONFIG).exists() and (out / CONFIG).exists():
        # That of a run that had not begun.
        _remove(out, RUN_FILES)
    _move(earlier, out)
    earlier.rmdir()


def _move(here: Path, there: Path) -> None:
    for name in _CONFIG_LAST:
        if (here / name).exists():
            (here / name).rename(there / name)


def _is_run(out: Path) -> bool:
    """Whether `config.yaml` is a resolved recipe, as only a run writes it."""
    try:
        saved = load_yaml(out / CONFIG)
    except ConfigError:
        return False
    return {"model", "tokenizer", "data", "optim"} <= saved.keys()


def _check_same(out: Path, config: TrainConfig) -> None:
    """Raises: ConfigError if the run would train differently than it began."""
    saved = from_dict(TrainConfig, load_yaml(out / CONFIG))
    changed = [n for n in differences(to_dict(saved), to_dict(config)) if n not in OBSERVATION]
    if changed:
        names = ", ".join(changed[:6]) + (", ..." if len(changed) > 6 else "")
        raise ConfigError(
            f"{out} holds a run of another recipe (different: {names}); use another --out, or "
            "--fresh to delete that run and start over"
        )


def _remove(out: Path, names: Sequence[str]) -> None:
    for name in (n for n in _CONFIG_LAST if n in names):
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
