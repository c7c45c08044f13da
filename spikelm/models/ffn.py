"""Feed-forward layers, each `(x, state, context) -> (y, state)`; the hidden vector spikes.

B sequences, T tokens, D width, F hidden neurons, E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ExpertsConfig, ModelConfig
from spikelm.kernels.activation import sigmoid, silu
from spikelm.kernels.precision import widen
from spikelm.kernels.shift import causal_taps
from spikelm.models.layers import Context, Linear, Part, Projection
from spikelm.neurons import Spikes
from spikelm.state import LayerState


class ChannelMix(Part):
    """RWKV channel mix: token shift, up projection, squared ReLU, down projection.

    With `receptance` (RWKV-4) a sigmoid of a second shifted input gates the output.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, hidden = config.width, config.ffn.hidden_dim
        self.config, self.layer = config, layer
        # The share of the previous token.
        self.shift = nn.Parameter(torch.empty(width))
        self.input = Projection("ffn_input", width, hidden, config)
        # RWKV-4 begins with layers that add nothing.
        zero = config.init == "orthogonal"
        down_scale, gate_scale = (0.0, 0.0) if zero else (0.5, None)
        self.output = Projection("ffn_hidden", hidden, width, config, init_scale=down_scale)
        self.receptance = None
        if config.ffn.receptance:
            self.receptance_shift = nn.Parameter(torch.empty(width))
            self.receptance = Projection("ffn_input", width, width, config, init_scale=gate_scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        shares = initial_shares(self.config, self.layer)
        self.shift.copy_(shares)
        if self.receptance is not None:
            self.receptance_shift.copy_(shares)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        gate = {} if self.receptance is None else self.receptance.zero_state(batch_size, like)
        return {
            "shift": like.new_zeros(batch_size, 1, self.config.width),
            **self.input.zero_state(batch_size, like),
            **gate,
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        (previous, _), shift = causal_taps(x, 2, state["shift"].to(x.dtype), context.segment)
        change = previous - x
        hidden, kept = self.input(x + change * self.shift, state, context)
        y, kept_output = self.output(F.relu(hidden).square(), state, context)
        if self.receptance is not None:
            gate, kept_gate = self.receptance(x + change * self.receptance_shift, state, context)
            y = y * sigmoid(gate)
            kept |= kept_gate
        return y, {"shift": shift.to(state["shift"].dtype), **kept, **kept_output}


class GatedFFN(Part):
    """act(gate) * up, then down: SwiGLU with SiLU, ReGLU with ReLU; a token shift if asked for."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, hidden = config.width, config.ffn.hidden_dim
        self.config, self.layer, self.kind = config, layer, config.ffn.kind
        self.shift: nn.Parameter | None = None
        if config.ffn.token_shift:
            self.shift = nn.Parameter(torch.empty(width))
        self.input = Projection("ffn_input", width, 2 * hidden, config)
        self.output = Projection("ffn_hidden", hidden, width, config, init_scale=0.5)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.shift is not None:
            self.shift.copy_(initial_shares(self.config, self.layer))

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        shift = {}
        if self.shift is not None:
            shift = {"shift": like.new_zeros(batch_size, 1, self.config.width)}
        return {
            **shift,
            **self.input.zero_state(batch_size, like),
            **self.output.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        kept_shift: LayerState = {}
        if self.shift is not None:
            before = state["shift"]
            (previous, _), last = causal_taps(x, 2, before.to(x.dtype), context.segment)
            x = x + (previous - x) * self.shift
            kept_shift = {"shift": last.to(before.dtype)}
        projected, kept = self.input(x, state, context)
        gate, up = projected.chunk(2, -1)
        act = silu if self.kind == "swiglu" else F.relu
        y, kept_output = self.output(act(gate) * up, state, context)
        return y, {**kept_shift, **kept, **kept_output}


def initial_shares(config: ModelConfig, layer: int) -> Tensor:
    """The share [D] of the previous token at the start of training."""
    if config.init == "normal":
        return torch.linspace(0.0, 0.5, config.width)
    channel = torch.arange(config.width) / config.width
    return 1 - channel ** (1 - layer / config.num_layers)


class ExpertsFFN(Part):
    """Mixture of gated FFNs: sum of p_e E_e(x) over the top-k routed ones, plus the shared ones.

    p is the router's softmax (or sigmoid), not renormalised over the chosen. The load-balance
    loss is E * sum_e (share of tokens sent to e) (mean p_e), 1 at balance (Fedus et al. 2021).
    """

    def __init__(self, config: ModelConfig, layer: int, experts: ExpertsConfig) -> None:
        super().__init__()
        self.config = experts
        # Float, and from zero: every expert begins with the same weight.
        self.router = Linear(config.width, experts.num_experts, init_scale=0.0)
        self.experts = nn.ModuleList(GatedFFN(config, layer) for _ in range(experts.num_experts))
        self.shared = nn.ModuleList(GatedFFN(config, layer) for _ in range(experts.num_shared))

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {}

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        tokens = x.flatten(0, 1)
        # A context without documents: experts see no neighbours.
        alone = Context(context.position, None, context.probe)
        weights, chosen = self._route(tokens, context, decode=x.shape[1] == 1)
        y = torch.zeros_like(tokens)
        for shared in self.shared:
            y = y + shared(tokens[None], {}, alone)[0][0]
        for e, expert in enumerate(self.experts):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            # In training all take part, as processes must agree on what has a gradient.
            if rows.numel() or self.training:
                out = expert(tokens[None, rows], {}, alone)[0][0]
                y = y.index_add(0, rows, (out * weights[rows, slot, None]).to(y.dtype))
        return y.view_as(x), {}

    def _route(self, tokens: Tensor, context: Context, *, decode: bool) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, both [tokens, top_k]."""
        c, wide = self.config, widen(tokens)
        if decode:
            # One order of summation: a matrix product may round a row differently in a batch.
            logits = (wide[:, None] * self.router.weight.to(wide.dtype)).sum(-1)
        else:
            with torch.autocast(tokens.device.type, enabled=False):
                logits = self.router(Spikes(wide, None, None))
        p = logits.softmax(-1) if c.router == "softmax" else sigmoid(logits)
        weights, chosen = p.topk(c.top_k, -1)
        if context.losses is not None:
            share = F.one_hot(chosen, c.num_experts).to(p.dtype).sum(1).mean(0) / c.top_k
            mean = p.mean(0) / (p.mean(0).sum() if c.router == "sigmoid" else 1)
            context.losses.append(c.balance * c.num_experts * (share * mean).sum())
        return weights, chosen


def make_ffn(config: ModelConfig, layer: int) -> ChannelMix | GatedFFN | ExpertsFFN:
    """The feed-forward module of layer `layer`."""
    if config.ffn.kind == "channel_mix":
        return ChannelMix(config, layer)
    experts = config.ffn.experts
    if experts is not None and layer not in experts.dense_layers:
        return ExpertsFFN(config, layer, experts)
    return GatedFFN(config, layer)
