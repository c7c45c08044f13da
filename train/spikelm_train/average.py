"""An exponential moving average of the weights: what is validated and written in their place.

    average = d average + (1 - d) weights after every step,    d = min(decay, (1 + n) / (10 + n))

after n steps, so that the first weights are soon forgotten (the warm-up of TensorFlow's
ExponentialMovingAverage). Everything that is a parameter is averaged, steered dead zones too, as
they belong to the weights beside them; buffers are copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average:
    """The average of `model`'s weights; without a `decay` just the weights, and nothing is done."""

    def __init__(self, model: nn.Module, decay: float | None, device: torch.device) -> None:
        self.model = model
        self.averaged: AveragedModel | None = None
        if decay is not None:
            limit = decay

            def average(ours: Any, theirs: Any, steps: Tensor | int) -> None:
                n = int(steps)
                get_ema_multi_avg_fn(min(limit, (1 + n) / (10 + n)))(ours, theirs, n)

            self.averaged = AveragedModel(model, device=device, multi_avg_fn=average)

    def update(self) -> None:
        """Takes in the weights; call after every step."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def restart(self) -> None:
        """Begins again at the present weights, as the model has become another."""
        if self.averaged is not None:
            self.averaged.n_averaged.zero_()
            self.update()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights while open."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        if self.averaged is not None:
            pairs = zip(self.model.parameters(), self.averaged.module.parameters(), strict=True)
            for ours, theirs in pairs:
                ours.data, theirs.data = theirs.data, ours.data

    def state_dict(self) -> dict[str, Any]:
        assert self.averaged is not None
        state: dict[str, Any] = self.averaged.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.averaged is not None
        self.averaged.load_state_dict(state)
