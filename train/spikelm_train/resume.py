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
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from spikelm.config import from_dict, load_yaml, save_yaml, to_dict
from spikelm.errors import ConfigError
from spikelm.tokenizer import FILES as TOKENIZER_FILES
from spikelm_train import checkpoints, lora
from spikelm_train.checkpoints import Position
from spikelm_train.config import TrainConfig, differences

CONFIG, BEST, TEACHER, TOKENIZER = "config.yaml", "best", "teacher.json", "tokenizer"
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

    It continues at the newest checkpoint or that of `step`. `fresh` deletes what an earlier run
    wrote, and nothing else. `context` processes share a row.

    Raises: ConfigError for a folder that is not writable, another model's, a run of another
    recipe, or one that these processes cannot continue.
    """
    for key, given in (("init", config.init), ("distill.teacher", config.distill.teacher)):
        if given is not None and Path(given).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{key}: {given} is in {out}, this run's own folder; use another --out"
            )
    foreign = [name for name in MODEL_FILES + RUN_FILES if (out / name).exists()]
    if foreign and not _is_run(out):
        raise ConfigError(
            f"{out} holds {foreign[0]}, which no training run put there; use another --out"
        )
    try:
        if fresh and (out / CONFIG).exists():
            _remove(out, RUN_FILES + MODEL_FILES)
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
    """Raises: ConfigError if the run would train differently than it began."""
    saved = from_dict(TrainConfig, load_yaml(out / CONFIG))
    changed = [n for n in differences(to_dict(saved), to_dict(config)) if n not in OBSERVATION]
    if changed:
        names = ", ".join(changed[:6]) + (", ..." if len(changed) > 6 else "")
        raise ConfigError(
            f"{out} holds a run of another recipe (different: {names}); use another --out, or "
            "--fresh to delete that run and start over"
        )


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
