"""`wkv4`: RWKV-4's time mix, the attention of SpikeGPT.

    out = W_o (sigmoid(r) * wkv(k, v)),    k, v and r each read their own token-shifted input

Source: Peng et al. 2023 (RWKV); the initialisation is the one SpikeGPT's release means to run.
B sequences, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.kernels.activation import sigmoid
from spikelm.kernels.precision import widen
from spikelm.kernels.shift import causal_taps
from spikelm.kernels.wkv4 import wkv4
from spikelm.models.layers import Context, MixerTable, Part, Projection
from spikelm.state import LayerState


class WKV4Mixer(Part):
    """RWKV-4 time mix. The shifts are the share of the previous token, 1 - RWKV-4's time_mix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.width = width = config.width
        self.layer, self.num_layers = layer, config.num_layers
        self.key_shift = nn.Parameter(torch.empty(width))
        self.value_shift = nn.Parameter(torch.empty(width))
        self.receptance_shift = nn.Parameter(torch.empty(width))
        # The log-decay is -exp(decay).
        self.decay = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(width))
        # RWKV-4 begins with layers that add nothing.
        zero = config.init == "orthogonal"
        scale, output_scale = (0.0, 0.0) if zero else (None, 0.5)
        self.key = Projection("mixer_input", width, width, config, init_scale=scale)
        self.value = Projection("mixer_input", width, width, config)
        self.receptance = Projection("mixer_input", width, width, config, init_scale=scale)
        self.output = Projection("mixer_output", width, width, config, init_scale=output_scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width = self.width
        channel = torch.arange(width, device=self.decay.device)
        depth = self.layer / max(self.num_layers - 1, 1)
        power = 0.7 + 1.3 * depth
        self.decay.copy_(-5 + 8 * (channel / max(width - 1, 1)) ** power)
        self.bonus.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        ramp = (channel / width) ** (1 - self.layer / self.num_layers)
        self.key_shift.copy_(1 - ramp)
        self.value_shift.copy_(1 - ramp - 0.3 * depth)
        self.receptance_shift.copy_(1 - ramp.sqrt())

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        width = self.width
        return {
            **{name: like.new_zeros(batch_size, width) for name in ("p", "q", "o")},
            "shift": like.new_zeros(batch_size, 1, width),
            **self.key.zero_state(batch_size, like),
            **self.value.zero_state(batch_size, like),
            **self.receptance.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        (previous, _), shift = causal_taps(x, 2, state["shift"].to(x.dtype), context.segment)
        change = previous - x
        k, kept_k = self.key(x + change * self.key_shift, state, context)
        v, kept_v = self.value(x + change * self.value_shift, state, context)
        r, kept_r = self.receptance(x + change * self.receptance_shift, state, context)
        memory = (state["p"], state["q"], state["o"])
        decay, bonus = -widen(self.decay).exp(), widen(self.bonus)
        out, (p, q, o) = wkv4(widen(k), widen(v), decay, bonus, memory, context.segment)
        y, kept_output = self.output(sigmoid(widen(r)) * out, state, context)
        return y, {
            "p": p,
            "q": q,
            "o": o,
            "shift": shift.to(state["shift"].dtype),
            **kept_k,
            **kept_v,
            **kept_r,
            **kept_output,
        }


MIXERS: MixerTable = {"wkv4": WKV4Mixer}
