"""The neuron in front of a projection: a shell that stores parameters and picks the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikelm.config import NeuronConfig
from spikelm.kernels.precision import widen
from spikelm.neurons.integer import expand, fixed_spike, integer_spike
from spikelm.neurons.lif import LIFConstants, lif
from spikelm.neurons.surrogate import fire
from spikelm.state import LayerState


class Spikes(NamedTuple):
    """What a neuron sends to its projection."""

    values: Tensor
    """What a float projection reads [..., C]; differentiable."""
    counts: Tensor | None
    """Integers [..., C] with values = v_threshold * counts (unless a bypass is open); None if the
    neuron is off or soft."""
    v_threshold: Tensor | None
    """[..., 1]; None if the neuron is off or soft."""


class Neuron(nn.Module):
    """One neuron population of C channels; `config.kind` off passes its input through.

    The membrane of a LIF neuron is the entry `<key>.v` [B, C] of its layer's state, float32 at
    least; several populations of one class in one layer take different keys. `name` is the
    module's path, which the model fills in.

    In training `spiking` is the share of the spikes in the values, the rest being the input:
    below 1 while a bypass is open. Counts are always those of the spikes.

    Parameters: the adaptive integer neuron has `k` and `dead_zone` [C], the fixed one `step`. With
    `learn` a LIF neuron has per channel `tau_logit` (tau = 1 + exp(-tau_logit), as in PLIF, Fang
    et al. 2021), `v_threshold_log` and, if soft, `softness_log`; a step neuron has `v_threshold`.
    """

    k: Tensor
    dead_zone: Tensor
    step: Tensor
    v_threshold: Tensor
    tau_logit: Tensor
    v_threshold_log: Tensor
    softness_log: Tensor

    def __init__(
        self, tensor_class: str, channels: int, config: NeuronConfig, key: str | None = None
    ) -> None:
        super().__init__()
        self.name: str = tensor_class
        self.key = key or tensor_class
        self.tensor_class = tensor_class
        self.channels = channels
        self.config = config
        self.spiking = 1.0
        for name, (_, shape) in self._initial().items():
            learned = config.learn is True or config.learn == name
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=learned))

    def _initial(self) -> dict[str, tuple[float, tuple[int, ...]]]:
        """The initial value and the shape of each parameter."""
        c, per_channel = self.config, (self.channels,)
        if c.kind == "integer" and c.scale == "adaptive":
            return {"k": (c.k, ()), "dead_zone": (c.dead_zone, per_channel)}
        if c.kind == "integer":
            return {"step": (c.v_threshold, ())}
        if c.kind == "step" and c.learn:
            return {"v_threshold": (c.v_threshold, per_channel)}
        if c.kind == "lif" and c.learn:
            initial: dict[str, tuple[float, tuple[int, ...]]] = {
                "tau_logit": (-math.log(c.tau - 1), per_channel),
                "v_threshold_log": (math.log(c.v_threshold), per_channel),
            }
            if c.softness is not None:
                initial["softness_log"] = (math.log(c.softness), per_channel)
            return initial
        return {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, (value, _) in self._initial().items():
            self.get_parameter(name).fill_(value)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        if self.config.kind != "lif":
            return {}
        return {f"{self.key}.v": widen(like).new_zeros(batch_size, self.channels)}

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        segment: Tensor | None = None,
        probe: Probe | None = None,
    ) -> tuple[Spikes, LayerState]:
        """x [B, T, ..., C] -> spikes of the same shape and this neuron's part of the state."""
        c = self.config
        kept: LayerState = {}
        if c.kind == "integer" and c.scale == "adaptive":
            # Whoever loaded the parameters may have marked all of them as trained.
            k = self.k if c.learn is True else self.k.detach()
            zone = self.dead_zone if c.learn else self.dead_zone.detach()
            spikes = Spikes(*integer_spike(widen(x), k, zone, c.max_count, c.unsigned, c.power))
        elif c.kind == "integer":
            spikes = Spikes(*fixed_spike(widen(x), self.step, c.max_count, c.unsigned))
        elif c.kind == "step":
            wide = widen(x)
            fired = fire(
                wide - (self.v_threshold if c.learn else c.v_threshold), c.surrogate, c.alpha
            )
            spikes = _binary(fired)
        elif c.kind == "lif":
            key = f"{self.key}.v"
            v = state[key]
            fired, kept[key] = lif(x.to(v.dtype), v, c, segment, self.constants(v))
            spikes = _binary(fired) if c.softness is None else Spikes(fired, None, None)
        else:
            spikes = Spikes(x, None, None)
        if self.training and self.spiking < 1:
            passed = self.expanded(x).to(spikes.values.dtype)
            values = torch.lerp(passed, spikes.values, self.spiking)
            spikes = spikes._replace(values=values)
        if probe is not None:
            probe(self, x, spikes)
        return spikes, kept

    def expanded(self, x: Tensor) -> Tensor:
        """What becomes counts in place of x, and what the dead zone is measured on."""
        return x if self.config.power == 1 else expand(widen(x), self.config.power)

    def constants(self, like: Tensor) -> LIFConstants:
        """tau, threshold and softness of a LIF neuron: [C] as trained, or as configured."""
        dtype = like.dtype
        if not self.config.learn:
            return LIFConstants.of(self.config, like)
        tau = 1 + torch.exp(-self.tau_logit.to(dtype))
        softness = None if self.config.softness is None else self.softness_log.to(dtype).exp()
        return LIFConstants(tau, self.v_threshold_log.to(dtype).exp(), softness)


def _binary(fired: Tensor) -> Spikes:
    return Spikes(fired, fired.detach(), torch.ones_like(fired[..., :1]))


Probe = Callable[[Neuron, Tensor, Spikes], None]
"""Called by every neuron with its input and its spikes: measuring, penalties, calibration."""
