"""Time and memory against length: a model beside itself with `full` attention in every layer.

Every measurement runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from safetensors.torch import load_file

from spikelm import checkpoint
from spikelm.config import Mixer
from spikelm.corpus import SPLITS, builtin_documents
from spikelm.errors import ConfigError, MissingExtraError
from spikelm.eval.evaluate import timed_decode
from spikelm.eval.process import memory_bytes, reset_peak
from spikelm.generate import Engine
from spikelm.models.coded import coded_copy
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer

DECODE_STEPS = 32
WARM_UP_TOKENS = 64

QUANTITIES = {
    "first_token_ms": "time to first token (ms)",
    "ms_per_token": "time per token after it (ms)",
    "peak_bytes": "peak memory above the loaded model (bytes)",
    "state_bytes": "state (bytes)",
}

NOTE = (
    "'full' is the same model with full attention in every layer; weights that do not fit are "
    "random, so only its time and memory mean something"
)

_log = logging.getLogger(__name__)

Cost = dict[str, float]
"""What one run costs, by the names in QUANTITIES."""


def bench_length(
    path: str | Path,
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    full: bool = True,
    backend: str = "auto",
) -> dict[str, Any]:
    """Medians over `repeats` runs at every length, as JSON types.

    A row of `measurements` holds the model's costs (`ours`), those with full attention (`full`)
    and full over ours (`ratio`); None stands for a process that was killed, which is what
    running out of memory looks like.

    Raises: ConfigError for lengths or repeats that are not positive; CheckpointError.
    """
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] < 1:
        raise ConfigError(f"lengths: {lengths} given; allowed: integers >= 1")
    if repeats < 1:
        raise ConfigError(f"repeats: {repeats} given; allowed: an integer >= 1")
    path = Path(path)
    config = checkpoint.read_config(path)
    kind = "spike-coded" if "spike_coding" in config else "float"
    note = NOTE if full else None
    if full and set(checkpoint.model_config_of(config, path).mixers) == {"full"}:
        full, note = False, "no twin: this model has full attention in every layer itself"
    ids = text_ids(Tokenizer.load(path), lengths[-1])
    with tempfile.TemporaryDirectory() as folder:
        models = {"ours": path}
        if full:
            models["full"] = Path(folder)
            write_full_twin(path, models["full"])
        runs = _run_all(models, lengths, repeats, ids, backend)
    rows = []
    for length in lengths:
        row: dict[str, Any] = {"length": length}
        row |= {label: _median(runs[label, length]) for label in models}
        if full:
            row["ratio"] = _ratio(row["full"], row["ours"])
        rows.append(row)
    return {
        "name": path.resolve().name,
        "path": str(path),
        "kind": kind,
        "repeats": repeats,
        "measurements": rows,
        "note": note,
    }


def parse_lengths(text: str, option: str = "--lengths") -> list[int]:
    """The integers of "256,1024". Raises: ConfigError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} takes integers like 256,1024, got '{text}'") from None


def text_ids(tokenizer: Tokenizer, length: int) -> list[int]:
    """The first `length` tokens of the built-in corpus, starting over where it ends."""
    ids: list[int] = []
    for split in reversed(SPLITS):
        if len(ids) < length:
            # Without separators, which would empty the state in the middle of the prompt.
            ids += [i for text in builtin_documents(split) for i in tokenizer.encode(text)]
    return list(itertools.islice(itertools.cycle(ids), length))


def write_full_twin(source: Path, folder: Path) -> None:
    """Saves the model `source` with `full` attention in every layer into `folder`.

    Weights of the same name and shape are copied, the others are random.
    """
    config = checkpoint.read_config(source)
    ours = checkpoint.model_config_of(config, source)
    mixer: Mixer = "full"
    theirs = dataclasses.replace(ours, mixers=(mixer,) * ours.num_layers)
    model, manifest = LanguageModel(theirs).initialise(0), None
    if "spike_coding" in config:
        manifest = config["spike_coding"]
        model = coded_copy(model, theirs, manifest["group_size"], manifest["bits"])
    wanted = model.state_dict()
    tensors = load_file(source / checkpoint.WEIGHTS)
    named = {name.removeprefix(checkpoint.PREFIX): tensor for name, tensor in tensors.items()}
    fitting = {n: t for n, t in named.items() if n in wanted and t.shape == wanted[n].shape}
    model.load_state_dict(fitting, strict=False)
    checkpoint.save(folder, model, Tokenizer.load(source), manifest=manifest)


def measure(path: str, ids: Sequence[int], backend: str) -> Cost:
    """One run: prefill of `ids`, then DECODE_STEPS greedy steps; run it in a fresh process."""
    engine = Engine(checkpoint.load(path, backend=backend))
    # The first calls page the weights in and start the thread pools.
    warm_up = (list(ids) * WARM_UP_TOKENS)[:WARM_UP_TOKENS]
    timed_decode(engine, *engine.prefill(warm_up), 2)
    reset_peak()
    loaded = memory_bytes("VmRSS")
    start = perf_counter()
    logits, state = engine.prefill(ids)
    logits.argmax(-1)
    first_token = perf_counter() - start
    state_bytes = state.nbytes
    seconds, _ = timed_decode(engine, logits, state, DECODE_STEPS)
    return {
        "first_token_ms": 1e3 * first_token,
        "ms_per_token": 1e3 * statistics.median(seconds),
        "peak_bytes": max(0, memory_bytes("VmHWM") - loaded),
        "state_bytes": state_bytes,
    }


def _run_all(
    models: dict[str, Path], lengths: Sequence[int], repeats: int, ids: list[int], backend: str
) -> dict[tuple[str, int], list[Cost | None]]:
    """Every run, the models in turns so that a busy machine is busy for both."""
    runs: dict[tuple[str, int], list[Cost | None]] = {}
    for repeat, length, label in itertools.product(range(repeats), lengths, models):
        cost = _in_fresh_process(str(models[label]), ids[:length], backend)
        runs.setdefault((label, length), []).append(cost)
        told = f"{cost['ms_per_token']:.2f} ms/token" if cost else "killed"
        _log.info("run %d/%d, %d tokens, %s: %s", repeat + 1, repeats, length, label, told)
    return runs


def _in_fresh_process(path: str, ids: list[int], backend: str) -> Cost | None:
    """`measure` in a new interpreter; None if it was killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, path, ids, backend).result()
        except BrokenProcessPool:
            return None


def _median(costs: list[Cost | None]) -> Cost | None:
    finished = [cost for cost in costs if cost is not None]
    if len(finished) < len(costs):
        return None
    return {name: statistics.median(cost[name] for cost in finished) for name in QUANTITIES}


def _ratio(full: Cost | None, ours: Cost | None) -> dict[str, float | None] | None:
    if full is None or ours is None:
        return None
    return {name: full[name] / ours[name] if ours[name] else None for name in QUANTITIES}


def plot(report: dict[str, Any], file: Path) -> None:
    """Draws the four quantities against length. Raises: MissingExtraError."""
    Figure = require_matplotlib()
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    rows = report["measurements"]
    lengths = [row["length"] for row in rows]
    labels = {"ours": report["name"], "full": "full attention"}
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, QUANTITIES.items(), strict=True):
        for key, label in labels.items():
            if key in rows[0]:
                values = [row[key][name] if row[key] else float("nan") for row in rows]
                axes.plot(lengths, values, marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def require_matplotlib() -> Any:
    """matplotlib's Figure, which draws without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "eval") from None
    return Figure
