"""What the layers share: the call's context, the norm, and projections fed by neurons.

B sequences, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.neurons import Neuron, Probe, Spikes
from spikelm.state import LayerState


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer of one forward call needs to know."""

    position: Tensor
    """Tokens since the start of the document [B, T]."""
    segment: Tensor | None
    """Documents begun in this call [B, T], 0 continuing the state; None if none begins."""
    probe: Probe | None
    """Called by every neuron."""


@runtime_checkable
class _Resettable(Protocol):
    def reset_parameters(self) -> None: ...


def reset_parameters(module: object) -> None:
    """Draws a module's own parameters anew, if it has any."""
    if isinstance(module, _Resettable):
        module.reset_parameters()


def widen(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last axis, in float32 at least."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Module):
    """y = W values: the float product. weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.init_scale = init_scale

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0.0, self.init_scale * self.weight.shape[1] ** -0.5)

    def forward(self, spikes: Spikes) -> Tensor:
        values = spikes.values
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            values = values.to(self.weight.dtype)
        return F.linear(values, self.weight)


class Projection(nn.Module):
    """A neuron population and the linear layer that reads its spikes."""

    def __init__(
        self,
        name: str,
        tensor_class: str,
        in_features: int,
        out_features: int,
        config: ModelConfig,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.neuron = Neuron(
            f"{name}.{tensor_class}" if name else tensor_class,
            tensor_class,
            in_features,
            getattr(config.neurons, tensor_class),
        )
        # A converted model puts a spike-coded linear here.
        self.linear: nn.Module = Linear(in_features, out_features, init_scale)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return self.neuron.zero_state(batch_size, like)

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        """x [B, T, in] -> y [B, T, out] and the neuron's part of the state."""
        spikes, kept = self.neuron(x, state, context.segment, context.probe)
        return self.linear(spikes), kept
