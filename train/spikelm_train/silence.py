"""Silence while training: measured, steered to its target, and rewarded.

After every optimiser step the dead zone of each neuron that has a target is multiplied by
exp(rate * (target - silent)), silent being the fraction of exact zeros the step saw. Where the
optimiser trains the zone too, its gradient loses the part that changes the silence of the whole:
the gradient decides which channels have the wider zones, the rule how wide they are together. The
zone is stored with the model, so a trained model keeps its silence without the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spikelm.config import TENSOR_CLASSES, WEIGHTLESS_CLASSES
from spikelm.neurons import Neuron, Spikes
from spikelm.neurons.integer import edge_counts
from spikelm_train.stages import ramp

MIN_DEAD_ZONE, MAX_DEAD_ZONE = 1e-3, 1e2
# What the dead zone of a channel is multiplied by when it has been silent for too long.
REVIVAL = 0.5


class Silence:
    """A probe that counts exact zeros in what projections read, channel by channel.

    Zeros are those of the spikes, also while a bypass is open. `measure_all` includes neurons that
    are off, and entries at the clip; `penalise` collects the L1 term. Every `revive_after` steps
    in which a channel never fired, its dead zone is halved (0: never), as homeostasis makes a
    silent neuron more excitable (Turrigiano 2008; thresholds that adapt to the rate: Diehl and
    Cook 2015).
    """

    def __init__(self, neurons: Iterable[Neuron], rate: float, revive_after: int = 0) -> None:
        self.neurons = list(neurons)
        self.rate = rate
        self.revive_after = revive_after
        self.measure_all = False
        self.penalise = False
        self.revived = 0
        """Times that a dead zone was halved."""
        self._spiking = [neuron for neuron in self.neurons if neuron.config.kind != "off"]
        # Steps since each channel of the spiking neurons fired; silence before steering.
        self._idle = torch.zeros(sum(n.channels for n in self._spiking), dtype=torch.int64)
        self._natural: dict[str, float] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets what was counted; call before every step."""
        self._zeros: dict[str, Tensor] = {}
        self._entries: dict[str, int] = {}
        self._clipped: dict[str, Tensor] = {}
        self._l1: list[tuple[Tensor, int]] = []
        self._near: dict[str, Tensor] = {}

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        name, values = neuron.name, spikes.values
        if self._penalises(neuron):
            self._l1.append((_l1(values), values[..., 0].numel()))
        if self.measure_all or neuron.config.kind != "off":
            values = (values if spikes.counts is None else spikes.counts).detach()
            # Comparing into floats is 7 to 30 times as fast on a CPU as count_nonzero.
            zeros = torch.eq(values, 0, out=torch.empty_like(values)).flatten(0, -2)
            self._add(self._zeros, name, zeros.sum(0, dtype=torch.float32))
            self._entries[name] = self._entries.get(name, 0) + values.numel()
        limit = neuron.config.max_count
        if self.measure_all and limit is not None and spikes.counts is not None:
            self._add(self._clipped, name, (spikes.counts.detach().abs() >= limit).sum())
        if _shaped(neuron):
            c = neuron.config
            near = edge_counts(x.detach().float(), neuron.dead_zone.detach(), c.unsigned, c.power)
            self._add(self._near, name, near)

    def repeat(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        """Computes the L1 term again, for a layer that the backward pass computes again."""
        if self._penalises(neuron):
            _l1(spikes.values)

    def _penalises(self, neuron: Neuron) -> bool:
        return self.penalise and neuron.tensor_class == "ffn_hidden"

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def take_l1(self) -> Tensor:
        """sum_c |h_c| of the hidden vectors since the last call, mean over those vectors."""
        sums, vectors = zip(*self._l1, strict=True)
        self._l1 = []
        total: Tensor = torch.stack(sums).sum() / sum(vectors)
        return total

    def counts(self) -> Tensor:
        """Zeros, entries and entries at the clip of the measured neurons [3, n], float64.

        To be summed over ranks.
        """
        measured = self._measured()
        if not measured:
            return torch.zeros(3, 0, dtype=torch.float64)
        zeros = torch.stack([self._zeros[neuron.name].double().sum() for neuron in measured])
        entries = zeros.new_tensor([self._entries[neuron.name] for neuron in measured])
        clipped = [self._clipped.get(n.name, zeros.new_zeros(())).double() for n in measured]
        return torch.stack([zeros, entries, torch.stack(clipped)])

    def fired(self) -> Tensor:
        """Vectors in which each channel of the spiking neurons fired, and vectors it saw [2, N].

        To be summed over ranks.
        """
        columns = []
        for neuron in self._spiking:
            zeros = self._zeros.get(neuron.name, torch.zeros(neuron.channels))
            seen = torch.full_like(zeros, self._entries.get(neuron.name, 0) / neuron.channels)
            columns.append(torch.stack([seen - zeros, seen]))
        return torch.cat(columns, 1) if columns else torch.zeros(2, 0)

    def edges(self) -> Tensor:
        """How often each channel of the zones that both learn and have a target was near its edge
        [M]: the slope of its silence. To be summed over ranks.
        """
        near = [self._near[neuron.name] for neuron in self._spiking if _shaped(neuron)]
        return torch.cat(near) if near else torch.zeros(0)

    @torch.no_grad()
    def shape(self, edges: Tensor) -> None:
        """Takes out of the gradient of those zones what would change their neuron's silence, given
        `edges` (summed over ranks); call between the backward pass and the optimiser's step.

        What is left trades entries of one channel for as many of another: the sparsity term of
        JumpReLU (Rajamanoharan et al. 2024) with the weight that balances the loss.
        """
        shaped = [neuron for neuron in self._spiking if _shaped(neuron)]
        parts = edges.split([neuron.channels for neuron in shaped])
        for neuron, slope in zip(shaped, parts, strict=True):
            grad = neuron.dead_zone.grad
            if grad is not None:
                grad -= (grad @ slope) / (slope @ slope).clamp(min=1.0) * slope

    @torch.no_grad()
    def steer(self, counts: Tensor, progress: float = 1.0) -> None:
        """Moves the dead zones towards the targets, given `counts` (summed over ranks).

        `progress` (0 to 1) says how much of the run is over, for targets with a ramp.
        """
        for neuron, (zeros, entries, _) in zip(self._measured(), counts.T, strict=True):
            if _learned(neuron):
                neuron.dead_zone.clamp_(MIN_DEAD_ZONE, MAX_DEAD_ZONE)
            # An expert may have seen no token.
            if neuron.config.target_silence is not None and entries > 0:
                silent = zeros / entries
                factor = torch.exp(self.rate * (self._target(neuron, silent, progress) - silent))
                neuron.dead_zone.mul_(factor).clamp_(MIN_DEAD_ZONE, MAX_DEAD_ZONE)

    def _target(self, neuron: Neuron, silent: Tensor, progress: float) -> float:
        """The silent fraction wanted now."""
        target, share = neuron.config.target_silence, neuron.config.target_ramp
        assert target is not None
        if not share:
            return target
        natural = self._natural.setdefault(neuron.name, float(silent))
        return natural + ramp(progress, share) * (target - natural)

    @torch.no_grad()
    def watch(self, fired: Tensor) -> None:
        """Notes how long channels have been silent, given `fired` (summed over ranks), and makes
        those that are due more excitable.
        """
        spoke, seen = fired
        self._idle = self._idle.to(fired.device) + (seen > 0)
        self._idle[spoke > 0] = 0
        if not self.revive_after:
            return
        due = (self._idle > 0) & (self._idle % self.revive_after == 0) & (seen > 0)
        for neuron, channels in zip(self._spiking, self._by_neuron(due), strict=True):
            if _has_zone(neuron):
                neuron.dead_zone[channels] = (REVIVAL * neuron.dead_zone[channels]).clamp(
                    min=MIN_DEAD_ZONE
                )
                self.revived += int(channels.sum())

    def fractions(self, counts: Tensor) -> tuple[float | None, dict[str, float]]:
        """Silent fraction of all vectors that enter projections, and per tensor class.

        Classes that enter no projection are left out of the total.
        """
        sums = _by_class(self._measured(), counts.T.cpu())
        classes = {name: float(zeros / entries) for name, (zeros, entries, _) in sums.items()}
        entering = [column for name, column in sums.items() if name not in WEIGHTLESS_CLASSES]
        if not entering:
            return None, classes
        zeros, entries, _ = torch.stack(entering).sum(0)
        return float(zeros / entries), classes

    def saturated(self, counts: Tensor) -> dict[str, float]:
        """Entries at the clip per tensor class, as a fraction; classes without clip are left out.

        They were counted if `measure_all` was set.
        """
        sums = _by_class(self._measured(), counts.T.cpu())
        limited = {n.tensor_class for n in self.neurons if n.config.max_count is not None}
        return {n: float(clipped / all_) for n, (_, all_, clipped) in sums.items() if n in limited}

    def dead(self, steps: int) -> dict[str, float]:
        """Channels that fired in none of the last `steps` steps per tensor class, as a fraction."""
        long = (self._idle.cpu() >= steps).double()
        columns = [
            torch.stack([part.sum(), part.new_tensor(len(part))]) for part in self._by_neuron(long)
        ]
        sums = _by_class(self._spiking, columns)
        return {name: float(dead / channels) for name, (dead, channels) in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the rules remember from step to step."""
        return {"idle": self._idle, "natural": self._natural, "revived": self.revived}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._idle, self._natural, self.revived = state["idle"], state["natural"], state["revived"]

    def _measured(self) -> list[Neuron]:
        return [neuron for neuron in self.neurons if neuron.name in self._entries]

    def _by_neuron(self, channels: Tensor) -> Sequence[Tensor]:
        """What belongs to each of the spiking neurons [C] of a vector over all channels [N]."""
        parts: Sequence[Tensor] = channels.split([neuron.channels for neuron in self._spiking])
        return parts


def _by_class(neurons: Iterable[Neuron], columns: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sums of the neurons' columns per tensor class, in the order of the classes."""
    sums: dict[str, Tensor] = {}
    for neuron, column in zip(neurons, columns, strict=True):
        name = neuron.tensor_class
        sums[name] = sums[name] + column if name in sums else column
    return {name: sums[name] for name in TENSOR_CLASSES if name in sums}


def _l1(values: Tensor) -> Tensor:
    return values.abs().sum()


def _has_zone(neuron: Neuron) -> bool:
    return (neuron.config.kind, neuron.config.scale) == ("integer", "adaptive")


def _learned(neuron: Neuron) -> bool:
    """Whether the optimiser moves its dead zone."""
    return _has_zone(neuron) and neuron.dead_zone.requires_grad


def _shaped(neuron: Neuron) -> bool:
    """Whether it moves a zone that is steered too."""
    return _learned(neuron) and neuron.config.target_silence is not None
