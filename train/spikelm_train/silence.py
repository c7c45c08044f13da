"""Silence while training: measured, steered to its target, and rewarded.

After every optimiser step the dead zone of each neuron that has a target is multiplied by
exp(rate * (target - silent)), silent being the fraction of exact zeros the step saw. The zone is
stored with the model, so a trained model keeps its silence without the rule.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spikelm.config import TENSOR_CLASSES, WEIGHTLESS_CLASSES
from spikelm.neurons import Neuron, Spikes

MIN_DEAD_ZONE, MAX_DEAD_ZONE = 1e-3, 1e2


class Silence:
    """A probe that counts exact zeros in what projections read, neuron by neuron.

    `measure_all` includes the neurons without target; `penalise` collects the L1 term.
    """

    def __init__(self, neurons: Iterable[Neuron], rate: float) -> None:
        self.neurons = list(neurons)
        self.rate = rate
        self.measure_all = False
        self.penalise = False
        self.clear()

    def clear(self) -> None:
        """Forgets what was counted; call before every step."""
        self._zeros: dict[str, Tensor] = {}
        self._entries: dict[str, int] = {}
        self._l1: list[tuple[Tensor, int]] = []

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        values = spikes.values
        if self.penalise and neuron.tensor_class == "ffn_hidden":
            self._l1.append((values.abs().sum(), values[..., 0].numel()))
        if self.measure_all or neuron.config.target_silence is not None:
            values = values.detach()
            # Comparing into floats is 7 to 30 times as fast on a CPU as count_nonzero.
            zeros = torch.eq(values, 0, out=torch.empty_like(values)).sum()
            self._zeros[neuron.name] = self._zeros.get(neuron.name, 0) + zeros
            self._entries[neuron.name] = self._entries.get(neuron.name, 0) + values.numel()

    def take_l1(self) -> Tensor:
        """sum_c |h_c| of the hidden vectors since the last call, mean over those vectors."""
        sums, vectors = zip(*self._l1, strict=True)
        self._l1 = []
        total: Tensor = torch.stack(sums).sum() / sum(vectors)
        return total

    def counts(self) -> Tensor:
        """Zeros and entries of the measured neurons [2, n], float64, to be summed over ranks."""
        zeros = [self._zeros[neuron.name].double() for neuron in self._measured()]
        entries = [float(self._entries[neuron.name]) for neuron in self._measured()]
        if not zeros:
            return torch.zeros(2, 0, dtype=torch.float64)
        column = torch.stack(zeros)
        return torch.stack([column, column.new_tensor(entries)])

    @torch.no_grad()
    def steer(self, counts: Tensor) -> None:
        """Moves the dead zones towards the targets, given `counts` (summed over ranks)."""
        for neuron, (zeros, entries) in zip(self._measured(), counts.T, strict=True):
            target = neuron.config.target_silence
            # An expert may have seen no token.
            if target is not None and entries > 0:
                factor = torch.exp(self.rate * (target - zeros / entries))
                neuron.dead_zone.mul_(factor).clamp_(MIN_DEAD_ZONE, MAX_DEAD_ZONE)

    def fractions(self, counts: Tensor) -> tuple[float | None, dict[str, float]]:
        """Silent fraction of all vectors that enter projections, and per tensor class.

        Classes that enter no projection are left out of the total.
        """
        sums: dict[str, Tensor] = {}
        for neuron, column in zip(self._measured(), counts.T.cpu(), strict=True):
            name = neuron.tensor_class
            sums[name] = sums[name] + column if name in sums else column
        classes = {n: float(sums[n][0] / sums[n][1]) for n in TENSOR_CLASSES if n in sums}
        entering = [column for name, column in sums.items() if name not in WEIGHTLESS_CLASSES]
        if not entering:
            return None, classes
        zeros, entries = torch.stack(entering).sum(0)
        return float(zeros / entries), classes

    def _measured(self) -> list[Neuron]:
        return [neuron for neuron in self.neurons if neuron.name in self._entries]
