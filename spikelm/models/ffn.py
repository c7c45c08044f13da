"""Feed-forward layers, each `(x, state, context) -> (y, state)`; the hidden vector spikes.

B sequences, T tokens, D width, F hidden neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.kernels.activation import silu
from spikelm.kernels.shift import causal_taps
from spikelm.models.layers import Context, Projection
from spikelm.state import LayerState


class ChannelMix(nn.Module):
    """RWKV channel mix: token shift, up projection, squared ReLU, down projection."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.ffn.hidden_dim
        self.shift = nn.Parameter(torch.empty(width))
        self.input = Projection(name, "ffn_input", width, hidden, config)
        self.output = Projection(name, "ffn_hidden", hidden, width, config, init_scale=0.5)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.shift.copy_(torch.linspace(0.0, 0.5, self.shift.numel()))

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {
            "shift": like.new_zeros(batch_size, 1, self.shift.numel()),
            **self.input.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        (previous, _), shift = causal_taps(x, 2, state["shift"].to(x.dtype), context.segment)
        x = x + (previous - x) * self.shift
        hidden, kept = self.input(x, state, context)
        y, kept_output = self.output(F.relu(hidden).square(), state, context)
        return y, {"shift": shift.to(state["shift"].dtype), **kept, **kept_output}


class GatedFFN(nn.Module):
    """act(gate) * up, then down: SwiGLU with SiLU, ReGLU with ReLU."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.ffn.hidden_dim
        self.kind = config.ffn.kind
        self.input = Projection(name, "ffn_input", width, 2 * hidden, config)
        self.output = Projection(name, "ffn_hidden", hidden, width, config, init_scale=0.5)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {
            **self.input.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        projected, kept = self.input(x, state, context)
        gate, up = projected.chunk(2, -1)
        act = silu if self.kind == "swiglu" else F.relu
        y, kept_output = self.output(act(gate) * up, state, context)
        return y, {**kept, **kept_output}


def make_ffn(name: str, config: ModelConfig) -> ChannelMix | GatedFFN:
    """The feed-forward module of `config.ffn.kind`."""
    return (ChannelMix if config.ffn.kind == "channel_mix" else GatedFFN)(name, config)
