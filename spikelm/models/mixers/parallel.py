"""`parallel`, `parallel_full`: a linear and a softmax branch on the same queries, keys, values.

    out = (norm(linear) + norm(softmax)) / 2, each norm per head

The report leaves the branches' weights open; one half each is what SpikingBrain 2.0 ships.
Source: Pan et al. 2025 (SpikingBrain-76B).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.kernels.precision import widen
from spikelm.models.heads import split_qkv
from spikelm.models.layers import (
    Context,
    MixerTable,
    Part,
    Projection,
    RMSNorm,
    prefixed,
    unprefixed,
)
from spikelm.models.mixers.attention import SoftmaxHeads
from spikelm.models.mixers.gla import LinearHeads
from spikelm.state import LayerState


class ParallelMixer(Part):
    """One projection to q, k and v, both kinds of heads, one output projection."""

    def __init__(self, config: ModelConfig, layer: int, window: int | None) -> None:
        super().__init__()
        c = config.attention
        self.head_dim = c.head_dim
        self.sizes = [c.num_heads * c.head_dim] + [c.num_kv_heads * c.head_dim] * 2
        self.input = Projection("mixer_input", config.width, sum(self.sizes), config)
        self.qkv_bias = nn.Parameter(torch.empty(sum(self.sizes))) if c.qkv_bias else None
        self.linear = LinearHeads(config, layer)
        self.softmax = SoftmaxHeads(config, window)
        self.softmax_norm = RMSNorm(c.head_dim, config.norm_eps)
        self.output = Projection(
            "mixer_output", self.sizes[0], config.width, config, bias=c.output_bias, init_scale=0.5
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.qkv_bias is not None:
            self.qkv_bias.zero_()

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {
            **prefixed("linear.", self.linear.zero_state(batch_size, like)),
            **prefixed("softmax.", self.softmax.zero_state(batch_size, like)),
            **self.input.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        projected, kept = self.input(x, state, context)
        qkv, _ = split_qkv(widen(projected), self.sizes, self.qkv_bias)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        linear, S = self.linear(q, k, v, None, unprefixed("linear.", state), context)
        softmax, memory = self.softmax(q, k, v, unprefixed("softmax.", state), context)
        out = (linear + self.softmax_norm(softmax)) / 2
        y, kept_output = self.output(out.flatten(2), state, context)
        return y, {
            **prefixed("linear.", S),
            **prefixed("softmax.", memory),
            **kept,
            **kept_output,
        }


MIXERS: MixerTable = {
    "parallel": lambda config, layer: ParallelMixer(config, layer, config.attention.window),
    "parallel_full": lambda config, layer: ParallelMixer(config, layer, None),
}
