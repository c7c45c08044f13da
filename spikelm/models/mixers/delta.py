"""`delta`: DeltaNet, Gated DeltaNet, KDA and GDN-2.

B sequences, T tokens, D width, H heads, K key and V value channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.kernels.activation import sigmoid, silu
from spikelm.kernels.delta import delta_rule
from spikelm.kernels.lazy import lazily
from spikelm.kernels.precision import widen
from spikelm.kernels.shift import causal_taps
from spikelm.models.layers import (
    Context,
    MixerTable,
    Part,
    Projection,
    RMSNorm,
    make_neuron,
)
from spikelm.neurons import Neuron
from spikelm.state import LayerState

# Added to the squared length of queries and keys.
UNIT_EPS = 1e-6


class DeltaMixer(Part):
    """Gated delta rule with short convolutions, shared low-rank gates and an output gate.

    One spike vector feeds q, k, v and the gates' bottleneck, so a silent channel skips one
    contiguous weight row.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config.delta
        keys, values = c.num_heads * c.key_dim, c.num_heads * c.value_dim
        self.qkv_sizes = [keys, keys, values]
        decays = {"none": 0, "scalar": c.num_heads, "channel": keys}[c.decay]
        rates = [keys, values] if c.gates == "split" else [c.num_heads]
        self.gate_sizes = [decays, *rates, values]
        self.input = Projection(
            "mixer_input", config.width, sum(self.qkv_sizes) + c.gate_rank, config
        )
        self.gates = Projection("gate_input", c.gate_rank, sum(self.gate_sizes), config)
        self.gate_bias = nn.Parameter(torch.empty(sum(self.gate_sizes)))
        self.conv = nn.Parameter(torch.empty(c.conv_size, sum(self.qkv_sizes)))
        self.queries = make_neuron("queries_keys", c.key_dim, config)
        self.keys = make_neuron("queries_keys", c.key_dim, config)
        self.norm = RMSNorm(c.value_dim, config.norm_eps)
        self.output = Projection("mixer_output", values, config.width, config, init_scale=0.5)

    @property
    def lazy(self) -> bool:
        """Whether silent rows of the state owe their decays."""
        return self.config.decay != "none" and self.keys.config.kind != "off"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.conv.zero_()
        self.conv[-1] = 1.0
        # Half-lives from a few tokens to a few hundred, spread over the channels.
        decay, *rest = self.gate_bias.split(self.gate_sizes)
        decay.copy_(torch.linspace(-6.0, -1.0, decay.numel()))
        for bias in rest:
            bias.zero_()

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        c = self.config
        rows = batch_size, c.num_heads, c.key_dim
        return {
            "S": like.new_zeros(*rows, c.value_dim),
            **({"pending": like.new_zeros(rows)} if self.lazy else {}),
            "conv": like.new_zeros(batch_size, c.conv_size - 1, sum(self.qkv_sizes)),
            **self.input.zero_state(batch_size, like),
            **self.gates.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        c = self.config
        projected, kept = self.input(x, state, context)
        qkv, bottleneck = projected.split([sum(self.qkv_sizes), c.gate_rank], -1)
        gates, kept_gates = self.gates(bottleneck, state, context)

        taps, conv = causal_taps(qkv, c.conv_size, state["conv"].to(qkv.dtype), context.segment)
        weights = self.conv.to(qkv.dtype)
        mixed = torch.stack([tap * w for tap, w in zip(taps, weights, strict=True)]).sum(0)
        q, k, v = silu(mixed).split(self.qkv_sizes, -1)
        q = self._normalised(self.queries, q, context)
        k = self._normalised(self.keys, k, context)
        v = widen(v.unflatten(-1, (c.num_heads, c.value_dim)))

        log_decay, erase, write, gate = self._gates(widen(gates))

        def rule(log_decay: Tensor, S: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
            return delta_rule(
                q, k, v, log_decay, erase, write, S, segment, decay_floor=c.decay_floor
            )

        memory: LayerState = {}
        if self.lazy:
            out, memory["S"], memory["pending"] = lazily(
                rule, k, log_decay, state["S"], state["pending"], context.segment
            )
        else:
            out, memory["S"] = rule(log_decay, state["S"], context.segment)
        out = (self.norm(out) * gate).flatten(2)
        y, kept_output = self.output(out, state, context)
        return y, {
            **memory,
            "conv": conv.to(state["conv"].dtype),
            **kept,
            **kept_gates,
            **kept_output,
        }

    def _normalised(self, neuron: Neuron, x: Tensor, context: Context) -> Tensor:
        """[B, T, H K] -> spiking vectors of unit length [B, T, H, K]."""
        heads = widen(x.unflatten(-1, (self.config.num_heads, self.config.key_dim)))
        spikes, _ = neuron(heads, {}, context.segment, context.probe)
        # Under the root, so that an all-silent vector has a finite slope.
        square = spikes.values.square().sum(-1, keepdim=True)
        unit: Tensor = spikes.values * torch.rsqrt(square + UNIT_EPS)
        return unit

    def _gates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log_decay [B, T, H, K or 1], erase, write and output gate, from the gate logits."""
        c = self.config
        parts = (logits + self.gate_bias).split(self.gate_sizes, -1)
        rates = [sigmoid(part).unflatten(-1, (c.num_heads, -1)) for part in parts[1:]]
        if c.decay == "none":
            log_decay = torch.zeros_like(rates[0][..., :1])
        else:
            log_decay = c.decay_floor * sigmoid(parts[0]).unflatten(-1, (c.num_heads, -1))
        erase, write = (rates[0], rates[1]) if c.gates == "split" else (rates[0], rates[0])
        return log_decay, erase, write, rates[-1]


MIXERS: MixerTable = {"delta": lambda config, layer: DeltaMixer(config)}
