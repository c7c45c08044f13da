"""`window` and `full`: softmax attention, with the options of Llama, Qwen and Gated Attention.

B sequences, T tokens, D width, H query heads, G key/value heads, K channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.kernels.attention import Memory, attention, pack
from spikelm.kernels.precision import widen
from spikelm.kernels.rope import rotate
from spikelm.models.heads import gate_size, gated, split_qkv
from spikelm.models.layers import (
    Context,
    MixerTable,
    Part,
    Projection,
    RMSNorm,
    make_optional_neuron,
)
from spikelm.state import LayerState


class SoftmaxHeads(nn.Module):
    """Heads over a window with sinks, or over all tokens (`window` None): q, k, v -> out."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.config = c = config.attention
        self.window = window
        self.query_norm = RMSNorm(c.head_dim, config.norm_eps) if c.qk_norm else None
        self.key_norm = RMSNorm(c.head_dim, config.norm_eps) if c.qk_norm else None
        self.queries = make_optional_neuron("attention_queries", c.head_dim, config)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        c = self.config
        slots = 0 if self.window is None else self.window
        sinks = 0 if self.window is None else c.sinks
        token = like.new_zeros(c.num_kv_heads, c.head_dim)
        token = token if c.kv_bits is None else pack(token)
        shapes = {"k": slots, "v": slots, "sink_k": sinks, "sink_v": sinks}
        return {n: token.new_zeros(batch_size, size, *token.shape) for n, size in shapes.items()}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState, context: Context
    ) -> tuple[Tensor, LayerState]:
        """q [B, T, H, K]; k, v [B, T, G, K] -> out [B, T, H, K] and the memory."""
        c = self.config
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q_recent, q_sink = q, None
        if c.rope_theta is not None:
            k = rotate(k, context.position, c.rope_theta, c.rope_scaling)
            q_recent = rotate(q, context.position, c.rope_theta, c.rope_scaling)
            if self.window is not None and c.sinks:
                # A sink that has left the window keeps the distance it has in a full memory.
                at = context.position.clamp(max=c.sinks + self.window - 1)
                q_sink = rotate(q, at, c.rope_theta, c.rope_scaling)
        if self.queries is not None:
            q_recent = self.queries(q_recent, {}, context.segment, context.probe)[0].values
            if q_sink is not None:
                q_sink = self.queries(q_sink, {}, context.segment)[0].values
        memory = Memory(state["k"], state["v"], state["sink_k"], state["sink_v"])
        out, memory = attention(
            q_recent,
            k,
            v,
            memory,
            context.position,
            context.segment,
            window=self.window,
            q_sink=q_sink,
            causal=context.causal,
        )
        return out, {
            "k": memory.k,
            "v": memory.v,
            "sink_k": memory.sink_k,
            "sink_v": memory.sink_v,
        }


class AttentionMixer(Part):
    """Projections around `SoftmaxHeads`."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        c = config.attention
        self.head_dim = c.head_dim
        self.sizes = [c.num_heads * c.head_dim] + [c.num_kv_heads * c.head_dim] * 2
        gates = gate_size(c.output_gate, c.num_heads, c.head_dim)
        self.input = Projection("mixer_input", config.width, sum(self.sizes) + gates, config)
        self.qkv_bias = nn.Parameter(torch.empty(sum(self.sizes))) if c.qkv_bias else None
        self.heads = SoftmaxHeads(config, window)
        self.output = Projection(
            "mixer_output",
            self.sizes[0],
            config.width,
            config,
            bias=c.output_bias,
            init_scale=0.5,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.qkv_bias is not None:
            self.qkv_bias.zero_()

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {
            **self.heads.zero_state(batch_size, like),
            **self.input.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        projected, kept = self.input(x, state, context)
        qkv, gate = split_qkv(widen(projected), self.sizes, self.qkv_bias)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        out, memory = self.heads(q, k, v, state, context)
        out = gated(out, gate)
        y, kept_output = self.output(out.flatten(2), state, context)
        return y, {**memory, **kept, **kept_output}


MIXERS: MixerTable = {
    "window": lambda config, layer: AttentionMixer(config, config.attention.window),
    "full": lambda config, layer: AttentionMixer(config, None),
}
