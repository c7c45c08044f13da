"""What the layers share: the call's context, norms, and projections fed by neurons.

B sequences, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig, NeuronConfig
from spikelm.kernels.precision import widen
from spikelm.neurons import Neuron, Probe, Spikes
from spikelm.state import LayerState


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer of one forward call needs to know."""

    position: Tensor
    """Tokens since the start of the document [B, T]."""
    segment: Tensor | None
    """Documents begun in this call [B, T], 0 continuing the state; None if none begins."""
    probe: Probe | None = None
    """Called by every neuron."""
    losses: list[Tensor] | None = None
    """Where layers put terms of the training loss; None outside training."""
    causal: bool = True
    """False for the sink embeddings, which see each other in both directions."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """What an earlier layer of this call hands to later ones."""

    def part(self, tokens: slice) -> Context:
        """The same for some of the tokens, the state in front of which is known."""
        segment = self.segment
        if segment is not None:
            before = segment[:, tokens.start - 1 : tokens.start] if tokens.start else 0
            segment = segment[:, tokens] - before
        return replace(self, position=self.position[:, tokens], segment=segment)


class Part(nn.Module):
    """A mixer or a feed-forward layer: what it remembers is an argument and a result."""

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        """Its memory before the first token, in `like`'s dtype and device."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        """x [B, T, D] -> y [B, T, D] and the memory after it."""
        raise NotImplementedError


MixerTable = Mapping[str, Callable[[ModelConfig, int], Part]]
"""Kind -> a function of the configuration and the layer's index that makes the mixer."""


@runtime_checkable
class _Resettable(Protocol):
    def reset_parameters(self) -> None: ...


def reset_parameters(module: object) -> None:
    """Draws a module's own parameters anew, if it has any."""
    if isinstance(module, _Resettable):
        module.reset_parameters()


def prefixed(prefix: str, state: LayerState) -> LayerState:
    """The entries with `prefix` before their names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def unprefixed(prefix: str, state: LayerState) -> LayerState:
    """The entries that begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


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


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32 at least."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.eps = eps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm of the residual stream."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.width, config.norm_eps)


Init = Literal["normal", "orthogonal"]


@torch.no_grad()
def draw(weight: Tensor, init: Init, scale: float) -> None:
    """Fills a matrix [out, in]: normal of deviation scale / sqrt(in), or orthogonal times scale."""
    if scale == 0:
        weight.zero_()
    elif init == "normal":
        weight.normal_(0.0, scale * weight.shape[1] ** -0.5)
    else:
        nn.init.orthogonal_(weight, gain=scale)


class Linear(nn.Module):
    """y = W values: the float product. weight [out, in]."""

    def __init__(
        self, in_features: int, out_features: int, init_scale: float = 1.0, init: Init = "normal"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.init_scale, self.init = init_scale, init

    def reset_parameters(self) -> None:
        draw(self.weight, self.init, self.init_scale)

    def effective_weight(self) -> Tensor:
        """What the product reads."""
        return self.weight

    def forward(self, spikes: Spikes) -> Tensor:
        values, weight = spikes.values, self.effective_weight()
        if weight.dtype in (torch.bfloat16, torch.float16):
            values = values.to(weight.dtype)
        return F.linear(values, weight)


class Projection(nn.Module):
    """A neuron population and the linear layer that reads its spikes, with a bias if asked for."""

    def __init__(
        self,
        tensor_class: str,
        in_features: int,
        out_features: int,
        config: ModelConfig,
        *,
        bias: bool = False,
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.neuron = make_neuron(tensor_class, in_features, config)
        if init_scale is None:
            # Orthogonal rows of a taller matrix keep the variance of a square one (RWKV-4).
            taller = config.init == "orthogonal" and out_features > in_features
            init_scale = math.sqrt(out_features / in_features) if taller else 1.0
        # A converted model puts a spike-coded linear here.
        self.linear: nn.Module = Linear(in_features, out_features, init_scale, config.init)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias is not None:
            self.bias.zero_()

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return self.neuron.zero_state(batch_size, like)

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        """x [B, T, in] -> y [B, T, out] and the neuron's part of the state."""
        spikes, kept = self.neuron(x, state, context.segment, context.probe)
        y = self.linear(spikes)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), kept


def make_neuron(tensor_class: str, channels: int, config: ModelConfig) -> Neuron:
    """The neuron population that `config` puts at a tensor class."""
    neuron: NeuronConfig = getattr(config.neurons, tensor_class)
    return Neuron(tensor_class, channels, neuron)


def make_optional_neuron(tensor_class: str, channels: int, config: ModelConfig) -> Neuron | None:
    """As `make_neuron`, or None where it is off: for classes few models use."""
    neuron: NeuronConfig = getattr(config.neurons, tensor_class)
    return None if neuron.kind == "off" else Neuron(tensor_class, channels, neuron)
