"""A budget of weight bytes per token: thresholds rise until the spikes that are left read no more.

Every population of adaptive integer neurons in front of weights keeps the same share of its
spikes, those that are largest beside the token's mean |x|: its dead zone rises to a quantile of
|x| / mean|x| over what spikes now. Other kinds of neurons, and products without one, keep reading
what they read. The bytes are those behind spikes (`Traffic.spike_bytes`), a mean over a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spikelm.checkpoint import Checkpoint
from spikelm.coding.meter import DeadZones, Meter, reached
from spikelm.corpus import builtin_documents
from spikelm.errors import ConfigError, DataError
from spikelm.eval.evaluate import score, token_stream
from spikelm.eval.length import require_matplotlib
from spikelm.eval.tables import size
from spikelm.eval.traffic import weight_traffic
from spikelm.models.coded import projections
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Probe, Spikes

MEASURED_TOKENS = 256
"""A mean over so many is within 0.2 % of the one over thousands (docs/experiments.md)."""
TOLERANCE = 0.02
"""A budget is met by what reads no more than it and no less than this share below it."""
MAX_PASSES = 12

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for: bytes per token, or a share of those that are read now."""

    text: str
    value: float
    is_share: bool

    def num_bytes(self, now: float) -> float:
        return self.value * now if self.is_share else self.value


def parse_budget(text: str) -> Budget:
    """The budget of "4MiB", "500000" or "60%". Raises: ConfigError."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) *(%|[KMG]iB|B|)", text.strip())
    if not match or not float(match[1]):
        raise ConfigError(
            f"--spike-budget '{text}' given; allowed: weight bytes per token such as 4MiB or "
            "500000, or a share of those read now such as 60%"
        )
    is_share = match[2] == "%"
    return Budget(text.strip(), float(match[1]) * (0.01 if is_share else UNITS[match[2]]), is_share)


class Throttle:
    """Raises the dead zones of a checkpoint's model to what a budget leaves; never lowers one.

    Everything is measured on the first tokens of `documents`, by default the built-in training
    text, as thresholds are not fitted to what is evaluated. An engine is made after `spend`.

    Raises: ConfigError if the model has no dead zone to raise; DataError for empty documents.
    """

    def __init__(self, checkpoint: Checkpoint, documents: Iterable[str] | None = None) -> None:
        self.model = checkpoint.model
        self.neurons = raisable(self.model)
        if not self.neurons:
            raise ConfigError(
                f"{checkpoint.path} has no thresholds that --spike-budget could raise: no integer "
                "neuron of adaptive scale feeds weights"
            )
        texts = builtin_documents("train") if documents is None else documents
        stream = token_stream(checkpoint.tokenizer, texts, MEASURED_TOKENS + 1)
        if all(stream.begins):
            raise DataError("there is no text to measure the budget on; give documents with text")
        self._stream = stream.first(MEASURED_TOKENS + 1)
        self._traffic = weight_traffic(self.model)
        self._zones = {neuron.name: neuron.dead_zone.clone() for neuron in self.neurons}
        self._fired = DeadZones(fired=True)
        self.now = self._measure(self._fired)
        """Bytes per token before any threshold was raised."""
        self.least = self._keep(0.0)
        """Bytes per token with every raisable population silent."""
        self._restore()

    def limit(self, budget: Budget) -> float:
        """The budget in bytes per token. Raises: ConfigError if it is below `least`."""
        limit = budget.num_bytes(self.now)
        if limit < self.least:
            raise ConfigError(
                f"--spike-budget {budget.text} given, {size(limit)} per token; this model cannot "
                f"read less than {math.ceil(self.least)} bytes, "
                f"{self.least / self.now:.1%} of what it reads now"
            )
        return limit

    def spend(self, budget: Budget) -> dict[str, Any]:
        """Raises the dead zones for `budget`, from where they were when this object was made.
        Returns what was asked for and reached, as JSON types.

        Raises: as `limit` does.
        """
        limit = self.limit(budget)
        kept, num_bytes = 1.0, self.now
        if limit < self.now:
            kept, num_bytes = self._search(limit)
        else:
            self._restore()
        return {
            "asked": budget.text,
            "bytes_asked": limit,
            "bytes_before": self.now,
            "bytes_reached": num_bytes,
            "spikes_kept": kept,
            "populations": len(self.neurons),
            "measured_tokens": self._stream.num_scored,
            "skips": all(matrix.skips for matrix in self._traffic.matrices.values()),
        }

    def _search(self, limit: float) -> tuple[float, float]:
        """The share of spikes that meets the limit, and its bytes.

        Bytes would be linear in the share if no population changed what the next ones see, so the
        line through the nearest shares below and above the limit is followed; where that does not
        come near, halving does.
        """
        low, high = (0.0, self.least), (1.0, self.now)
        for n in range(MAX_PASSES):
            way = 0.5
            if n < MAX_PASSES // 2:
                aim = (1 - TOLERANCE / 2) * limit
                way = max(0.0, aim - low[1]) / (high[1] - low[1])
            share = low[0] + way * (high[0] - low[0])
            found = self._keep(share)
            if found > limit:
                high = share, found
                continue
            low = share, found
            if found >= (1 - TOLERANCE) * limit:
                break
        else:
            self._keep(low[0])
        return low

    def _keep(self, share: float) -> float:
        """Leaves every population `share` of its spikes; bytes per token."""
        classes = {neuron.name: neuron.tensor_class for neuron in self.neurons}
        for neuron in self.neurons:
            found = reached(neuron.name, classes, self._fired.histograms)
            # Behind silent populations a vector may be larger than any that was measured.
            zone = self._fired.quantile(found, 1 - share) if share else math.inf
            neuron.dead_zone.copy_(self._zones[neuron.name].clamp(min=zone))
        return self._measure()

    def _restore(self) -> None:
        for neuron in self.neurons:
            neuron.dead_zone.copy_(self._zones[neuron.name])

    def _measure(self, also: Probe | None = None) -> float:
        """Bytes per token on the text, as the thresholds are."""
        meter = Meter()

        def probe(neuron: Neuron, x: torch.Tensor, spikes: Spikes) -> None:
            meter(neuron, x, spikes)
            if also is not None and neuron.name in self._zones:
                also(neuron, x, spikes)

        score(self.model, self._stream, probe)
        # An expert that no token was sent to reads nothing.
        silence = dict.fromkeys(self._traffic.matrices, 1.0)
        silence |= self._traffic.silence(meter.tallies)
        return self._traffic.spike_bytes(silence)


def raisable(model: LanguageModel) -> list[Neuron]:
    """The populations that have a dead zone and feed weights."""
    feeding = {projection.neuron.name for projection in projections(model)}
    return [
        neuron
        for neuron in model.neurons()
        if neuron.name in feeding
        and (neuron.config.kind, neuron.config.scale) == ("integer", "adaptive")
    ]


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Draws bits per byte against weight bytes per token, a line for the evaluations of a model.

    Raises: MissingExtraError.
    """
    figure = require_matplotlib()(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for label, found in curves.items():
        curve = sorted(found, key=lambda point: point["spike_bytes_per_token"])
        read = [point["spike_bytes_per_token"] / UNITS["MiB"] for point in curve]
        bits = [point["bits_per_byte"] for point in curve]
        axes.plot(read, bits, marker="o", label=label)
        for x, y, point in zip(read, bits, curve, strict=True):
            text = point.get("spike_budget", {}).get("asked", "")
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("weight bytes per token that are not silent (MiB)")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
