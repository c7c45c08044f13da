"""`rwkv7`: RWKV-7's time mix, a delta rule that removes with one key and writes with another.

    S = Diag(w) S - (a * kappa) (kappa^T S) + k v^T,    out = S^T r

w, a, the output gate g and the mix with the first layer's values come from low-rank maps of
token-shifted inputs. Source: Peng et al. 2025 (RWKV-7 "Goose").
B sequences, T tokens, D width, H heads of K channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.kernels.activation import sigmoid, tanh
from spikelm.kernels.precision import widen
from spikelm.kernels.rwkv7 import rwkv7
from spikelm.kernels.shift import causal_taps
from spikelm.models.layers import Context, LayerNorm, MixerTable, Part, Projection
from spikelm.state import LayerState

# log w = -exp(-1/2) sigmoid(.), so w stays above 0.545.
DECAY_FLOOR = -math.exp(-0.5)
# Added to the variance of a head's output, per channel of the head.
HEAD_NORM_EPS = 1e-5
# Lower bound of the removal key's length before it is normalised.
UNIT_EPS = 1e-12
SHIFTS = ("receptance", "decay", "key", "value", "rate", "gate")


class RWKV7Mixer(Part):
    """RWKV-7 time mix. The shifts are the share of the previous token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_layers = layer, config.num_layers
        self.config = c = config.rwkv7
        width = config.width
        for name in SHIFTS:
            self.register_parameter(f"{name}_shift", nn.Parameter(torch.empty(width)))
        self.receptance = Projection("mixer_input", width, width, config, init_scale=0.3)
        self.key = Projection("mixer_input", width, width, config, init_scale=0.03)
        self.value = Projection("mixer_input", width, width, config, init_scale=0.3)
        self.output = Projection("mixer_output", width, width, config, init_scale=0.0)
        self.decay_down, self.decay_up = self._gate(c.decay_rank, config)
        self.decay_bias = nn.Parameter(torch.empty(width))
        self.rate_down, self.rate_up = self._gate(c.rate_rank, config)
        self.rate_bias = nn.Parameter(torch.empty(width))
        self.gate_down, self.gate_up = self._gate(c.gate_rank, config)
        self.has_first_values = "rwkv7" in config.mixers[:layer]
        if self.has_first_values:
            self.value_down, self.value_up = self._gate(c.value_rank, config)
            self.value_bias = nn.Parameter(torch.empty(width))
        self.key_scale = nn.Parameter(torch.empty(width))
        self.key_rate = nn.Parameter(torch.empty(width))
        self.heads = width // c.head_dim, c.head_dim
        """H, K. Not read from a parameter, which may be elsewhere when weights are shared out."""
        self.bonus = nn.Parameter(torch.empty(self.heads))
        self.norm = LayerNorm(width, HEAD_NORM_EPS * c.head_dim)

    @staticmethod
    def _gate(rank: int, config: ModelConfig) -> tuple[Projection, Projection]:
        """A low-rank map that begins at zero."""
        return (
            Projection("mixer_input", config.width, rank, config, init_scale=0.0),
            Projection("gate_input", rank, config.width, config, init_scale=0.1),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width = self.decay_bias.numel()
        channel = torch.arange(width, device=self.decay_bias.device) / width
        depth = self.layer / max(self.num_layers - 1, 1)
        rest = 1 - self.layer / self.num_layers
        shares = {
            "receptance": 0.2,
            "decay": 0.9,
            "key": 0.7,
            "value": 0.7,
            "rate": 0.9,
            "gate": 0.2,
        }
        for name, power in shares.items():
            self.get_parameter(f"{name}_shift").copy_(1 - channel ** (power * rest))
        # Slow channels first: decays from about 0.9994 to 0.6 per token.
        self.decay_bias.copy_(-6.5 + 5 * channel ** (0.85 + depth**0.5))
        self.rate_bias.zero_()
        if self.has_first_values:
            self.value_bias.fill_(1.0)
        self.key_scale.fill_(0.85)
        self.key_rate.fill_(1.0)
        self.bonus.zero_()

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        H, K = self.heads
        projections = [m for m in self.children() if isinstance(m, Projection)]
        membranes = [projection.zero_state(batch_size, like) for projection in projections]
        return {
            "S": like.new_zeros(batch_size, H, K, K),
            "shift": like.new_zeros(batch_size, 1, H * K),
            **{name: tensor for entry in membranes for name, tensor in entry.items()},
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        (previous, _), shift = causal_taps(x, 2, state["shift"].to(x.dtype), context.segment)
        change = previous - x
        kept: LayerState = {"shift": shift.to(state["shift"].dtype)}

        def project(projection: Projection, inputs: Tensor) -> Tensor:
            y, membrane = projection(inputs, state, context)
            kept.update(membrane)
            return widen(y)

        def shifted(name: str) -> Tensor:
            return x + change * self.get_parameter(f"{name}_shift")

        def heads(y: Tensor) -> Tensor:
            split: Tensor = y.unflatten(-1, self.heads)
            return split

        r = project(self.receptance, shifted("receptance"))
        k = project(self.key, shifted("key"))
        v = project(self.value, shifted("value"))
        decay = project(self.decay_up, tanh(project(self.decay_down, shifted("decay"))))
        log_decay = DECAY_FLOOR * sigmoid(decay + self.decay_bias)
        rate = project(self.rate_up, project(self.rate_down, shifted("rate")))
        rate = sigmoid(rate + self.rate_bias)
        gate = project(self.gate_up, sigmoid(project(self.gate_down, shifted("gate"))))
        first = context.shared.setdefault("rwkv7.values", v)
        if self.has_first_values:
            mix = project(self.value_up, project(self.value_down, shifted("value")))
            v = v + (first - v) * sigmoid(mix + self.value_bias)

        removal_key = F.normalize(heads(k * self.key_scale), dim=-1, eps=UNIT_EPS)
        k = k * (1 + (rate - 1) * self.key_rate)
        out, S = rwkv7(
            heads(r),
            heads(log_decay),
            heads(k),
            heads(v),
            removal_key,
            heads(rate),
            state["S"],
            context.segment,
            decay_floor=DECAY_FLOOR,
        )
        bonus = (heads(r) * heads(k) * self.bonus).sum(-1, keepdim=True) * heads(v)
        out = (self._head_norm(out) + bonus).flatten(2) * gate
        return project(self.output, out), {"S": S, **kept}

    def _head_norm(self, out: Tensor) -> Tensor:
        """Layer norm of each head's channels [B, T, H, K] (a group norm)."""
        normed = F.layer_norm(out, out.shape[-1:], eps=self.norm.eps)
        weight, bias = (p.view(self.heads) for p in (self.norm.weight, self.norm.bias))
        return normed * weight + bias


MIXERS: MixerTable = {"rwkv7": RWKV7Mixer}
