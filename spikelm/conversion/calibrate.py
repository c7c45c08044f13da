"""Thresholds for projections that were trained without a neuron, from a calibration text.

Each gets the integer neuron: the dead zone gives the silence asked for, then k is the one whose
counts, clipped to int8, come nearest to the float vector. Both are per-population statistics of
|x| / mean|x|, so nothing but small histograms is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spikelm.coding.meter import DeadZones, reached
from spikelm.config import WEIGHTLESS_CLASSES
from spikelm.kernels.event import MAX_COUNT
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.neurons.integer import integer_counts

# Candidates for k: counts per mean |x|, half an octave apart. A vector with one active channel in
# a thousand has a mean a thousandth of its entries' size and needs k < 1.
K_GRID = [2.0 ** (n / 2) for n in range(-10, 14)]


class Errors:
    """Probe: squared error of the integer code for every k of the grid."""

    def __init__(self, dead_zones: Mapping[str, float]) -> None:
        self.dead_zones = dead_zones
        self.errors: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        if neuron.name not in self.dead_zones:
            return
        zone = torch.tensor(self.dead_zones[neuron.name])
        errors = []
        for k in K_GRID:
            counts, v = integer_counts(x, torch.tensor(k), zone, MAX_COUNT, False)
            errors.append((counts * v - x).square().sum())
        self.errors[neuron.name] = self.errors.get(neuron.name, 0) + torch.stack(errors)


@torch.inference_mode()
def calibrate(
    model: LanguageModel, windows: Tensor, silence: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """(k, dead zone) of every neuron that is off and feeds a projection.

    `windows` [B, T] are calibration tokens; `silence` maps tensor classes to the silent fraction
    their dead zone should give (0 where absent).
    """
    names = {
        neuron.name: neuron.tensor_class
        for neuron in model.neurons()
        if neuron.config.kind == "off" and neuron.tensor_class not in WEIGHTLESS_CLASSES
    }
    zones = dict.fromkeys(names, 0.0)
    if any(silence.get(tensor_class) for tensor_class in names.values()):
        histograms = DeadZones()
        for window in windows.split(1):
            model(window, probe=histograms)
        for name, tensor_class in names.items():
            found = reached(name, names, histograms.histograms)
            zones[name] = histograms.quantile(found, silence.get(tensor_class, 0.0))
    errors = Errors(zones)
    for window in windows.split(1):
        model(window, probe=errors)
    return {
        name: (K_GRID[int(errors.errors[found].argmin())], zones[found])
        for name in names
        for found in [reached(name, names, errors.errors)]
    }
