"""`gla`: GLA, Simple-GLA, tied gates (HGRN2, SpikingBrain-76B), Lightning attention and RetNet.

B sequences, T tokens, D width, H query heads, G key/value heads, K key and V value channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.kernels.activation import log_sigmoid, sigmoid, silu
from spikelm.kernels.gla import fixed_log_decay, gla
from spikelm.kernels.precision import widen
from spikelm.models.heads import gate_size, gated, split_qkv
from spikelm.models.layers import Context, MixerTable, Part, Projection, RMSNorm
from spikelm.state import LayerState

FEATURE_MAPS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": sigmoid,
    "silu": silu,
    "identity": lambda x: x,
}


class LinearHeads(nn.Module):
    """Heads over one constant-size state per key/value head: q, k, v -> normed out."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config.gla
        self.layer, self.num_layers = layer, config.num_layers
        self.norm = RMSNorm(config.gla.value_dim, config.norm_eps)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        c = self.config
        return {"S": like.new_zeros(batch_size, c.num_kv_heads, c.key_dim, c.value_dim)}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        state: LayerState,
        context: Context,
    ) -> tuple[Tensor, LayerState]:
        """q [B, T, H, K]; k [B, T, G, K]; v [B, T, G, V]; gate logits [B, T, G, K or 1] of a
        learned decay -> out [B, T, H, V], normed, and the state.
        """
        log_decay = self._log_decay(k, gate)
        q, k = self._features(q), self._features(k)
        out, S = gla(
            q, k, v, log_decay, state["S"], context.segment, scale=self.config.key_dim**-0.5
        )
        return self.norm(out), {"S": S}

    def _log_decay(self, key_logits: Tensor, gate: Tensor | None) -> Tensor:
        c = self.config
        if gate is not None:
            return log_sigmoid(gate) / c.gate_temperature
        if c.decay == "lightning" or c.decay == "retnet":
            fixed = fixed_log_decay(c.decay, c.num_kv_heads, self.layer, self.num_layers)
            return fixed.to(key_logits)[:, None].expand(*key_logits.shape[:2], -1, -1)
        assert c.decay == "tied"
        return log_sigmoid(-key_logits)  # a = 1 - sigmoid(key logit)

    def _features(self, x: Tensor) -> Tensor:
        return FEATURE_MAPS[self.config.feature_map](x)


class GLAMixer(Part):
    """Projections and the decay's gate around `LinearHeads`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = c = config.gla
        keys, values = c.num_kv_heads * c.key_dim, c.num_kv_heads * c.value_dim
        self.sizes = [c.num_heads * c.key_dim, keys, values]
        self.decays = {"channel": keys, "scalar": c.num_kv_heads}.get(c.decay, 0)
        bottleneck = self.decays if c.gate_rank is None else c.gate_rank if self.decays else 0
        gates = gate_size(c.output_gate, c.num_heads, c.value_dim)
        self.gate_sizes = [bottleneck, gates]
        outputs = sum(self.sizes) + sum(self.gate_sizes)
        self.input = Projection("mixer_input", config.width, outputs, config)
        self.qkv_bias = nn.Parameter(torch.empty(sum(self.sizes))) if c.qkv_bias else None
        self.decay_bias = nn.Parameter(torch.empty(self.decays)) if self.decays else None
        self.decay = None
        if self.decays and c.gate_rank is not None:
            self.decay = Projection("gate_input", c.gate_rank, self.decays, config)
        self.heads = LinearHeads(config, layer)
        self.output = Projection(
            "mixer_output", c.num_heads * c.value_dim, config.width, config, init_scale=0.5
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.qkv_bias is not None:
            self.qkv_bias.zero_()
        if self.decay_bias is not None:
            # At gate_temperature 16, half-lives from some ten tokens to some hundred.
            self.decay_bias.copy_(torch.linspace(0.0, 4.0, self.decays))

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        decay = {} if self.decay is None else self.decay.zero_state(batch_size, like)
        return {
            **self.heads.zero_state(batch_size, like),
            **self.input.zero_state(batch_size, like),
            **decay,
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        c = self.config
        projected, kept = self.input(x, state, context)
        qkv, rest = split_qkv(projected, self.sizes, self.qkv_bias)
        logits, output_gate = rest.split(self.gate_sizes, -1)
        gate = None
        if self.decay_bias is not None:
            if self.decay is not None:
                logits, kept_decay = self.decay(logits, state, context)
                kept |= kept_decay
            gate = (widen(logits) + self.decay_bias).unflatten(-1, (c.num_kv_heads, -1))
        channels = (c.key_dim, c.key_dim, c.value_dim)
        q, k, v = (widen(x).unflatten(-1, (-1, n)) for x, n in zip(qkv, channels, strict=True))
        out, memory = self.heads(q, k, v, gate, state, context)
        out = gated(out, widen(output_gate))
        y, kept_output = self.output(out.flatten(2), state, context)
        return y, {**memory, **kept, **kept_output}


MIXERS: MixerTable = {"gla": GLAMixer}
