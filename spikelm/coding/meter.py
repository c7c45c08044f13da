"""Measuring spikes while a model runs: probes that add up what every neuron gets and emits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.coding.codes import CODES, Code
from spikelm.config import WEIGHTLESS_CLASSES, NeuronConfig
from spikelm.neurons import Neuron, Spikes


def code_of(config: NeuronConfig, largest: int) -> tuple[Code, int] | None:
    """The code a neuron's counts are reported in and its steps S; None if the neuron is off or
    soft (UltraLIF): then it has no counts.

    Clipped counts have the S of their clip, unclipped ones that of the largest count seen.
    """
    if config.kind == "off" or (config.kind == "lif" and config.softness is not None):
        return None
    if config.kind in ("lif", "step"):
        return CODES["binary"], 1
    top = config.max_count or max(largest, 1)
    if top == 1:
        return CODES["binary" if config.unsigned else "ternary"], 1
    return CODES["bitwise" if config.unsigned else "bitwise_signed"], top.bit_length()


# Histograms are of log2 (|x| / mean|x|); what lies outside belongs to the first or last bin.
BINS, OCTAVES = 4096, 16


@dataclass(slots=True)
class Tally:
    """Sums over everything one neuron population emitted."""

    neuron: Neuron
    entries: int = 0
    """Tokens x channels."""
    silent: int = 0
    """Exact zeros among them."""
    zero_inputs: int = 0
    """Exact zeros among what the neurons got."""
    spikes: int = 0
    """Ones in the bitwise train of |count|; the non-zero entries of an off neuron are none."""
    largest: int = 0
    """Largest |count|."""
    saturated: int = 0
    """Counts that sit at the clip."""

    @property
    def silent_fraction(self) -> float:
        return self.silent / self.entries if self.entries else 0.0

    @property
    def zero_input_fraction(self) -> float:
        return self.zero_inputs / self.entries if self.entries else 0.0

    @property
    def code(self) -> tuple[Code, int] | None:
        return code_of(self.neuron.config, self.largest)

    @property
    def slot_sparsity(self) -> float | None:
        """Empty slots over S x entries, S being `code`'s; None if the neuron is off."""
        if self.code is None or not self.entries:
            return None
        return 1 - self.spikes / (self.entries * self.code[1])


class Meter:
    """A `Probe`: pass it to the model's forward, read `tallies` by neuron name afterwards."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}

    @torch.no_grad()
    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        tally = self.tallies.setdefault(neuron.name, Tally(neuron))
        tally.entries += spikes.values.numel()
        tally.silent += int((spikes.values == 0).sum())
        tally.zero_inputs += int((x == 0).sum())
        if spikes.counts is None:
            return
        magnitude = spikes.counts.abs().to(torch.int32)
        largest = int(magnitude.max())
        tally.largest = max(tally.largest, largest)
        for bit in range(largest.bit_length()):
            tally.spikes += int(((magnitude >> bit) & 1).sum())
        if neuron.config.max_count is not None:
            tally.saturated += int((magnitude >= neuron.config.max_count).sum())

    def silent_fractions(self) -> dict[str, float]:
        """Silent fraction per tensor class, and `total` over every projection input.

        Classes that no projection reads are not part of the total.
        """
        classes = dict.fromkeys(t.neuron.tensor_class for t in self.tallies.values())
        groups = {
            name: [t for t in self.tallies.values() if t.neuron.tensor_class == name]
            for name in classes
        }
        groups["total"] = [
            t for t in self.tallies.values() if t.neuron.tensor_class not in WEIGHTLESS_CLASSES
        ]
        return {
            name: sum(t.silent for t in group) / max(1, sum(t.entries for t in group))
            for name, group in groups.items()
        }


class DeadZones:
    """Probe: histograms of |x| / mean|x| (of what x is expanded to), exact zeros in the first bin;
    `fired` counts only the entries that spike.
    """

    def __init__(self, *, fired: bool = False) -> None:
        self.fired = fired
        self.histograms: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        x = neuron.expanded(x)
        ratio = x.abs() / x.abs().mean(-1, keepdim=True).clamp(min=1e-12)
        if self.fired:
            ratio = ratio[spikes.values != 0]
        octave = ratio.log2().clamp(-OCTAVES, OCTAVES).float()
        histogram = torch.histc(octave, BINS, -OCTAVES, OCTAVES)
        self.histograms[neuron.name] = self.histograms.get(neuron.name, 0) + histogram

    def quantile(self, name: str, fraction: float) -> float:
        """The ratio that `fraction` of the entries do not exceed; 0 if that many are zero."""
        share = self.histograms[name].cumsum(0) / self.histograms[name].sum()
        below = int((share < fraction).sum())
        return 2.0 ** (2 * OCTAVES * (below + 1) / BINS - OCTAVES) if below else 0.0


def reached(name: str, classes: Mapping[str, str], statistics: Mapping[str, Tensor]) -> str:
    """The population whose statistics `name` takes: its own, or, for a routed expert that no
    token was sent to, those of the first of its tensor class that has some.
    """
    if name in statistics:
        return name
    return next(other for other in statistics if classes.get(other) == classes[name])
