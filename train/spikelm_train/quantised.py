"""Quantisation-aware training: from a share of the run on, weights are rounded in every forward.

Before that they are floats, as a network that has learned something loses less by rounding than
one that begins with it. The rounding itself is the model's (`spikelm.models.grid`).
"""

from __future__ import annotations

from spikelm.models.grid import RoundedLinear
from spikelm.models.spikelm import LanguageModel


class Rounding:
    """When the weights of `model` begin to be rounded. The steps in the model's state say whether
    they have, so a checkpoint needs nothing else.
    """

    def __init__(self, model: LanguageModel, at: float) -> None:
        self.linears = [m for m in model.modules() if isinstance(m, RoundedLinear)]
        self.at = at
        self._begun = False

    def enter(self, progress: float) -> bool:
        """Begins it if that is due when `progress` (0 to 1) of the run is over; whether it did."""
        if self._begun or progress < self.at or not self.linears:
            return False
        self._begun = True
        if self.linears[0].begun:  # before an interruption
            return False
        for linear in self.linears:
            linear.begin()
        return True
