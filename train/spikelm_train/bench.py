"""`spikelm bench train`: what a training step costs, beside plainer ones. No torch at import.

overhead    our step (data, penalties, silence, steering, logging) over the bare model's forward,
            cross-entropy, backward, clipping and optimiser step on batches of the same size
neurons     the bare step over that of the same weights without neurons
transformer tokens/s and peak memory beside transformers' Llama of as many parameters
length      time per token while sequences get longer and the tokens of a step stay as many

Contestants take turns within a round and ratios are formed within rounds, so what slows the machine
slows both. CPU seconds of all threads stand beside the wall's: a busy machine changes them less.
Those of `transformer` have a process each, whose peak memory is theirs alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any, NamedTuple

from spikelm.config import ModelConfig, load_model_config
from spikelm.errors import BackendError, ConfigError, did_you_mean

PARTS = ("overhead", "neurons", "transformer", "length")
BARS = {"overhead": 1.05, "neurons": 1 / (1 - 0.15), "length": 1.05}
"""What the ratios of a part should not exceed."""
SECONDS = "seconds", "cpu_seconds"
SHORTEST = 512
LOG_EVERY = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PRESET", nargs="?", default="spikelm-demo")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to measure (%(default)s)", metavar="NAMES"
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences, of overhead and neurons (%(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=256, help="of theirs, in tokens (%(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=8192,
        help="of a step beside the Transformer, and of `length` (%(default)s)",
    )
    parser.add_argument(
        "--peer-lengths",
        default="512,2048,8192",
        metavar="NUMBERS",
        help="of sequences beside the Transformer (%(default)s)",
    )
    parser.add_argument(
        "--longest", type=int, default=8192, help="sequence of `length` (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of turns (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of everybody (%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))


def run(args: argparse.Namespace) -> int:
    report = bench_train(
        args.model,
        parts=[part for part in args.parts.split(",") if part],
        batch=args.batch,
        length=args.length,
        tokens=args.tokens,
        peer_lengths=numbers("--peer-lengths", args.peer_lengths),
        longest=args.longest,
        rounds=args.rounds,
        threads=args.threads,
        precision=args.precision,
    )
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ConfigError(f"{option} {text} given; allowed: integers >= 1 with commas between")
    return found


class Entry(NamedTuple):
    """A contestant, as `contestants.enter` takes it."""

    kind: str
    shape: ModelConfig
    length: int
    batch: int
    threads: int
    precision: str
    folder: str


def bench_train(
    model: str,
    *,
    parts: Sequence[str] = PARTS,
    batch: int = 8,
    length: int = 256,
    tokens: int = 8192,
    peer_lengths: Sequence[int] = (512, 2048, 8192),
    longest: int = 8192,
    rounds: int = 5,
    threads: int = 1,
    precision: str = "fp32",
) -> dict[str, Any]:
    """The measurements of every part, as JSON types.

    Raises: ConfigError for an unknown part or preset, numbers below 1, and sequences that `tokens`
    is no multiple of; BackendError if a contestant's process dies.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"--parts: '{part}' given; {did_you_mean(part, PARTS)}")
    for name, value in (
        ("batch", batch),
        ("length", length),
        ("tokens", tokens),
        ("rounds", rounds),
        ("threads", threads),
        ("longest", longest),
    ):
        if value < 1:
            raise ConfigError(f"--{name} {value} given; allowed: an integer >= 1")
    doubled = [SHORTEST << i for i in range(32) if SHORTEST << i <= longest]
    wanted = {"transformer": peer_lengths, "length": doubled}
    for part, lengths in wanted.items():
        for size in lengths if part in parts else ():
            if tokens % size:
                raise ConfigError(f"--tokens {tokens} is no multiple of the length {size}")
    shape = load_model_config(model)
    options = threads, precision
    report: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "length": length,
        "tokens": tokens,
        "threads": threads,
        "precision": precision,
        "rounds": rounds,
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="spikelm-") as folder:
        for part, kinds in (("overhead", ("spikelm", "bare")), ("neurons", ("bare", "dense"))):
            if part in parts:
                entries = {k: Entry(k, shape, length, batch, *options, folder) for k in kinds}
                # The record of every so many steps is part of the overhead.
                found[part] = compete(entries, rounds, LOG_EVERY, [kinds], apart=False)
        for size in peer_lengths if "transformer" in parts else ():
            pair = ("bare", "transformer")
            entries = {k: Entry(k, shape, size, tokens // size, *options, folder) for k in pair}
            found[f"transformer {size}"] = compete(entries, rounds, 1, [pair], apart=True)
        if "length" in parts:
            entries = {
                str(n): Entry("bare", shape, n, tokens // n, *options, folder) for n in doubled
            }
            pairs = [(long, short) for short, long in itertools.pairwise(entries)]
            found["length"] = compete(entries, rounds, 1, pairs, apart=False)
    return {**report, "parts": found}


def compete(
    entries: Mapping[str, Entry],
    rounds: int,
    steps: int,
    pairs: Iterable[tuple[str, str]],
    *,
    apart: bool,
) -> dict[str, Any]:
    """Seconds per training step of every contestant in every round of `steps` turns, and the median
    over the rounds of the ratio of each pair.

    They share a process, so that its luck with memory is everybody's, or live `apart`.

    Raises: BackendError if a process dies.
    """
    from spikelm_train import contestants

    try:
        with ExitStack() as stack:

            def process() -> ProcessPoolExecutor:
                return stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))

            shared = None if apart else process()
            homes = {name: shared or process() for name in entries}
            for name, entry in entries.items():
                homes[name].submit(contestants.enter, name, *entry).result()

            def turn(name: str) -> tuple[float, float]:
                return homes[name].submit(contestants.turn, name).result()

            found = measure(list(entries), turn, rounds, steps)
            for name, home in homes.items():
                facts = home.submit(contestants.facts, name).result()
                # Of a shared process nobody's.
                found[name] |= {k: v for k, v in facts.items() if apart or k != "peak_bytes"}
    except BrokenProcessPool:
        raise BackendError(
            f"a process of {', '.join(entries)} ended; most likely memory ran out: lower --tokens"
        ) from None
    ratios = {
        f"{a} / {b}": {key: ratio(found[a][key], found[b][key]) for key in SECONDS}
        for a, b in pairs
    }
    return {"contestants": found, "ratios": ratios}


def measure(
    names: Sequence[str],
    turn: Callable[[str], tuple[float, float]],
    rounds: int,
    steps: int,
) -> dict[str, dict[str, Any]]:
    """Wall and CPU seconds by contestant, a list over the rounds of means over `steps` turns, after
    a turn that does not count.
    """
    for name in names:
        turn(name)
    found: dict[str, dict[str, Any]] = {name: {key: [] for key in SECONDS} for name in names}
    for number in range(rounds):
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for step in range(steps):
            for name in names[:: -1 if (number + step) % 2 else 1]:
                taken[name].append(turn(name))
        for name, turns in taken.items():
            for key, seconds in zip(SECONDS, zip(*turns, strict=True), strict=True):
                found[name][key].append(statistics.fmean(seconds))
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(report: Mapping[str, Any]) -> str:
    """What the command prints: medians, and ratios of CPU time and of the wall's."""
    from spikelm.eval.tables import aligned, size

    rows = [["part", "contestant", "tokens/s", "CPU us/token", "peak memory", "parameters"]]
    ratios = [["ratio", "CPU", "wall", "at most"]]
    for part, found in report["parts"].items():
        together = part in ("overhead", "neurons")
        tokens = report["batch"] * report["length"] if together else report["tokens"]
        for name, one in found["contestants"].items():
            wall, cpu = (statistics.median(one[key]) for key in SECONDS)
            rows.append(
                [
                    part,
                    name,
                    f"{tokens / wall:,.0f}",
                    f"{1e6 * cpu / tokens:,.1f}",
                    size(one["peak_bytes"]) if "peak_bytes" in one else "",
                    f"{one['parameters']:,}",
                ]
            )
        bar = f"{BARS[part]:.3f}" if part in BARS else ""
        for name, by_clock in found["ratios"].items():
            wall, cpu = (f"{by_clock[key]:.3f}" for key in SECONDS)
            ratios.append([f"{part}: {name}", cpu, wall, bar])
    note = (
        f"{report['model']}, {report['precision']}, {report['threads']} thread(s), medians of "
        f"{report['rounds']} rounds; {report['batch']} x {report['length']} tokens a step, or "
        f"{report['tokens']:,}"
    )
    return "\n".join([note, "", aligned(rows, left=2), "", aligned(ratios)])
