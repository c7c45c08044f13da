"""What a run does about a loss that is not finite, or leaps: stop, leave the step out, go back.

A loss leaps if it exceeds the mean of the steps before it by `spike_deviations` standard
deviations, both being running averages over about a hundred steps. Leaving steps out and going
back to an earlier checkpoint and skipping the batches behind it are what PaLM's and OPT's authors
did by hand (Chowdhery et al. 2022, section 5.1; Zhang et al. 2022, section 2.5).
"""

from __future__ import annotations

import math
from typing import Any

from spikelm_train.config import GuardConfig

MEMORY = 0.99
# Before so many steps a deviation is not known.
WARMUP = 100


class Guard:
    """Watches the losses of a run; its counts are part of a checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.lr_factor = 1.0
        """What the learning rate is multiplied by."""
        self.data_steps = 0
        """Steps of data that were passed over: the step's batch is that of step + data_steps."""
        self.interventions = 0
        self._mean = self._square = 0.0
        self._seen = 0

    def leaps(self, loss: float) -> bool:
        """Whether a finite loss is so far above those before it that something is to be done."""
        variance = self._square - self._mean**2
        if self.config.spike == "ignore" or self._seen < WARMUP or variance <= 0:
            return False
        return loss - self._mean > self.config.spike_deviations * math.sqrt(variance)

    def watch(self, loss: float) -> None:
        """Takes the loss of a step that was made into the averages."""
        self._seen += 1
        weight = max(1 - MEMORY, 1 / self._seen)
        self._mean += weight * (loss - self._mean)
        self._square += weight * (loss**2 - self._square)

    def intervene(self, steps_back: int = 0) -> None:
        """Notes that a step was left out, or that the run went back so many, past their data."""
        self.interventions += 1
        self.lr_factor *= self.config.lower_lr
        self.data_steps += steps_back

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "config"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
