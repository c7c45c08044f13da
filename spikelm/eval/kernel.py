"""The event-driven products of a preset's shape alone, beside what limits them.

Times are CPU time per thread: what other programs on the machine change least.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from spikelm.config import ModelConfig, load_model_config
from spikelm.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from spikelm.kernels.measure import Passes
    from spikelm.kernels.rows import RowMatrix

PASSES = ("event", "dense", "touch", "stream")
"""In the order of a round: `dense` empties the caches between the two that read the same rows."""

ENOUGH_BYTES = 3e8
"""Matrices are made up to this size: what no cache holds."""


def bench_kernel(
    preset: str,
    *,
    silence: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
    bits: int = 8,
    threads: int = 1,
    rounds: int = 9,
) -> dict[str, Any]:
    """Times of passes through a preset's matrices, and ratios formed within a round, as JSON types.

    `event` lists the events of every vector and multiplies their rows, `dense` multiplies all rows,
    `touch` reads the rows of `event` without arithmetic, `stream` reads all of them. The head, and
    layers beyond 0.3 GB, are left out if the layers before are enough; so are the narrow matrices
    behind vectors that all fire.

    Raises: ConfigError for what is not allowed, BackendError without native matrices.
    """
    for fraction in silence:
        if not 0 <= fraction < 1:
            raise ConfigError(f"silence: {fraction} given; allowed: 0 <= silence < 1")
    if bits not in (8, 4):
        raise ConfigError(f"bits: {bits} given; allowed: 8, 4")
    for name, count in (("threads", threads), ("rounds", rounds)):
        if count < 1:
            raise ConfigError(f"{name}: {count} given; allowed: an integer >= 1")
    import torch

    from spikelm.kernels import rows
    from spikelm.kernels.measure import Passes

    obstacle = rows.unavailable()
    if obstacle is not None:
        raise BackendError(f"no native matrices here: {obstacle}")
    generator = torch.Generator().manual_seed(0)
    matrices = random_matrices(preset, bits, generator)
    measured = []
    for fraction in silence:
        counts = [random_counts(m.in_features, fraction, generator) for m in matrices]
        passes = Passes(matrices, counts)
        _check(passes)
        wall, cpu = interleaved(passes, threads, rounds)
        measured.append({"silence": fraction, **_summary(passes, wall, cpu)})
    return {
        "preset": preset,
        "bits": bits,
        "threads": threads,
        "rounds": rounds,
        "isa": rows.isa(),
        "matrices": len(matrices),
        "bytes": sum(m.nbytes for m in matrices),
        "measurements": measured,
    }


def parse_fractions(text: str) -> list[float]:
    """The numbers of "0.7,0.9". Raises: ConfigError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--silence takes numbers like 0.7,0.9, got '{text}'") from None


def shape_of(name: str) -> ModelConfig:
    """The shape of a preset, by name or file, or of the model in a folder."""
    folder = Path(name)
    if not folder.is_dir():
        return load_model_config(name)
    from spikelm.checkpoint import model_config_of, read_config

    return model_config_of(read_config(folder), folder)


def random_matrices(preset: str, bits: int, generator: Generator) -> list[RowMatrix]:
    """Distinct random matrices of the shapes in a preset, in the order of its layers."""
    import torch

    from spikelm.kernels.rows import RowMatrix
    from spikelm.models.coded import projections
    from spikelm.models.layers import Linear
    from spikelm.models.spikelm import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(shape_of(preset))
    found: list[RowMatrix] = []
    top = 2 ** (bits - 1)
    for projection in projections(model):
        linear = projection.linear
        if projection.neuron.tensor_class == "gate_input":
            continue
        if sum(m.nbytes for m in found) >= ENOUGH_BYTES:
            break
        assert isinstance(linear, Linear)
        N, K = linear.weight.shape
        weight = torch.randint(-top, top, (K, N), dtype=torch.int8, generator=generator)
        found.append(RowMatrix(weight, bits))
    return found


def random_counts(n: int, silence: float, generator: Generator) -> Tensor:
    """int8 [n], of which `silence` are 0 and the others from -2 to 2."""
    import torch

    sizes = torch.randint(1, 3, (n,), generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (n,), generator=generator)
    fires = torch.rand(n, generator=generator) >= silence
    return (sizes * signs * fires).to(torch.int8)


def interleaved(
    passes: Passes, threads: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every kind of pass in every round: of the clock, and of a thread's CPU."""
    wall: dict[str, list[float]] = {name: [] for name in PASSES}
    cpu: dict[str, list[float]] = {name: [] for name in PASSES}
    for _ in range(rounds):
        for name in PASSES:
            run = getattr(passes, name)
            begun, busy = perf_counter(), process_time()
            run(threads)
            wall[name].append(perf_counter() - begun)
            cpu[name].append((process_time() - busy) / threads)
    return wall, cpu


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _summary(
    passes: Passes, wall: dict[str, list[float]], cpu: dict[str, list[float]]
) -> dict[str, Any]:
    def read(name: str) -> int:
        return passes.event_bytes if name in ("event", "touch") else passes.num_bytes

    def ratio(a: str, b: str) -> dict[str, float]:
        return spread([x / y for x, y in zip(cpu[a], cpu[b], strict=True)])

    return {
        "event_bytes": passes.event_bytes,
        "passes": {
            name: {
                "ms": 1e3 * statistics.median(wall[name]),
                "cpu_ms": 1e3 * statistics.median(cpu[name]),
                "gb_per_s": spread([read(name) / seconds / 1e9 for seconds in cpu[name]]),
                "wall_gb_per_s": spread([read(name) / seconds / 1e9 for seconds in wall[name]]),
            }
            for name in PASSES
        },
        "event_over_touch": ratio("event", "touch"),
        "dense_over_event": ratio("dense", "event"),
    }


def _check(passes: Passes) -> None:
    """Both products give the same integers, or their times mean nothing."""
    import torch

    passes.event()
    events = passes.sums
    passes.dense()
    if not all(map(torch.equal, events, passes.sums)):
        raise BackendError("the event-driven and the dense product differ")
