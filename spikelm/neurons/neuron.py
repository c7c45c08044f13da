"""The neuron in front of a projection: a shell that stores parameters and picks the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikelm.config import NeuronConfig
from spikelm.neurons.integer import integer_spike
from spikelm.neurons.lif import lif
from spikelm.state import LayerState


class Spikes(NamedTuple):
    """What a neuron sends to its projection."""

    values: Tensor
    """What a float projection reads [..., C]; differentiable."""
    counts: Tensor | None
    """Integers [..., C] with values = v_threshold * counts; None if the neuron is off."""
    v_threshold: Tensor | None
    """[..., 1]; None if the neuron is off."""


class Neuron(nn.Module):
    """One neuron population of C channels; `config.kind` off passes its input through.

    The membrane of a LIF neuron is the entry `<tensor_class>.v` [B, C] of its layer's state.
    """

    k: Tensor
    dead_zone: Tensor

    def __init__(self, name: str, tensor_class: str, channels: int, config: NeuronConfig) -> None:
        super().__init__()
        self.name = name
        self.tensor_class = tensor_class
        self.channels = channels
        self.config = config
        if config.kind == "integer":
            self.k = nn.Parameter(torch.empty(()), requires_grad=config.learn)
            self.dead_zone = nn.Parameter(torch.empty(channels), requires_grad=config.learn)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.config.kind == "integer":
            self.k.fill_(self.config.k)
            self.dead_zone.fill_(self.config.dead_zone)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        if self.config.kind != "lif":
            return {}
        return {f"{self.tensor_class}.v": like.new_zeros(batch_size, self.channels)}

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        segment: Tensor | None = None,
        probe: Probe | None = None,
    ) -> tuple[Spikes, LayerState]:
        """x [B, T, ..., C] -> spikes of the same shape and this neuron's part of the state."""
        kept: LayerState = {}
        if self.config.kind == "integer":
            # Thresholds and counts in float32 at least: bfloat16 holds integers only up to 256.
            wide = x if x.dtype == torch.float64 else x.float()
            spikes = Spikes(
                *integer_spike(
                    wide, self.k, self.dead_zone, self.config.max_count, self.config.unsigned
                )
            )
        elif self.config.kind == "lif":
            key = f"{self.tensor_class}.v"
            fired, kept[key] = lif(x.to(state[key].dtype), state[key], self.config, segment)
            spikes = Spikes(fired, fired.detach(), torch.ones_like(fired[..., :1]))
        else:
            spikes = Spikes(x, None, None)
        if probe is not None:
            probe(self, x, spikes)
        return spikes, kept


Probe = Callable[[Neuron, Tensor, Spikes], None]
"""Called by every neuron with its input and its spikes: measuring, penalties, calibration."""
