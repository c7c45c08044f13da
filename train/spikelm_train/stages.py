"""Stages and ramps of a run: neurons that count less and less, with the same weights.

A network that begins with fine counts and is made coarser while it trains ends better than one
that is coarse from the start, or so IIR-SNN found for time steps (Chowdhury et al. 2021, "One
timestep is all you need").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron
from spikelm_train.config import StageConfig, staged


def ramp(progress: float, share: float) -> float:
    """Rises linearly from 0 to 1 over the first `share` of the run; 1 throughout if that is 0."""
    return min(1.0, progress / share) if share else 1.0


def close_bypasses(neurons: Iterable[Neuron], progress: float) -> None:
    """Gives the spikes their part of the values when `progress` (0 to 1) of the run is over."""
    for neuron in neurons:
        neuron.spiking = ramp(progress, neuron.config.bypass)


class Stages:
    """How many of the run's stages have begun; the part of a checkpoint that knows it.

    The model's configuration and that of its neurons are those of the current stage, so whatever
    reads them, saving included, needs to know nothing of stages.
    """

    def __init__(self, stages: Sequence[StageConfig], model: LanguageModel) -> None:
        self.stages = stages
        self.model = model
        self.initial = model.config
        self.begun = 0

    @torch.no_grad()
    def enter(self, progress: float) -> Sequence[StageConfig]:
        """Begins the stages that are due when `progress` (0 to 1) of the run is over."""
        due = sum(stage.at <= progress for stage in self.stages)
        new = self.stages[self.begun : due]
        if new:
            self._configure(due)
        for stage in new:
            for neuron in self.model.neurons():
                if stage.k is not None and neuron.tensor_class == stage.tensor_class:
                    neuron.k.fill_(stage.k)
        return new

    def state_dict(self) -> dict[str, int]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # k comes with the weights; a learned one has moved since its stage began.
        self._configure(state["begun"])

    def _configure(self, begun: int) -> None:
        self.begun = begun
        self.model.config = staged(self.initial, self.stages[:begun])
        for neuron in self.model.neurons():
            neuron.config = getattr(self.model.config.neurons, neuron.tensor_class)
