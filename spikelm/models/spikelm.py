"""The language model: embedding, [mixer, ffn] x L, head. Dense twin and spiking model alike.

    model(tokens, state=None) -> (logits, state)

is training, prefill and decode: the same call with different lengths.
B sequences, T tokens, D width, N vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.kernels.precision import widen
from spikelm.models.copying import HeadQK
from spikelm.models.ffn import make_ffn
from spikelm.models.grid import RoundedLinear, resolve_bits
from spikelm.models.layers import (
    Context,
    Linear,
    Projection,
    draw,
    make_norm,
    make_optional_neuron,
    prefixed,
    reset_parameters,
    unprefixed,
)
from spikelm.models.mixers import make_mixer
from spikelm.models.recompute import recomputed
from spikelm.neurons import Neuron, Probe, Spikes
from spikelm.state import LayerState, State

Reader = Callable[[Tensor, slice], Tensor]
"""Takes the logits [B, t, N] of the tokens in a slice; what it makes of them is [B, t, ...]."""


class Handover(Protocol):
    """The processes that have the tokens before and behind those of a call."""

    def receive(self, state: LayerState) -> LayerState:
        """What a layer remembers of the tokens before; `state` is what it would begin with."""
        ...

    def send(self, state: LayerState) -> None:
        """Passes on what a layer remembers after the call's tokens."""
        ...


class Embedding(nn.Module):
    """Rows of a table: weight [N, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows, width = config.vocab_size, config.width
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.init = config.init
        # RWKV-4 begins with tiny rows, which the norm behind them scales up.
        self.init_scale = 1e-4 * math.sqrt(max(rows, width)) if self.init == "orthogonal" else 1.0

    def reset_parameters(self) -> None:
        draw(self.weight, self.init, self.init_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = F.embedding(tokens, self.weight)
        return rows


class Layer(nn.Module):
    """x + mixer(norm x), then x + ffn(norm x); what is added may pass a neuron first."""

    def __init__(self, index: int, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = make_mixer(config, index)
        self.mixer_residual = make_optional_neuron("mixer_residual", config.width, config)
        self.ffn_norm = make_norm(config)
        self.ffn = make_ffn(config, index)
        self.ffn_residual = make_optional_neuron("ffn_residual", config.width, config)
        self.dropout = config.dropout

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        residuals = (n for n in (self.mixer_residual, self.ffn_residual) if n is not None)
        return {
            **prefixed("mixer.", self.mixer.zero_state(batch_size, like)),
            **prefixed("ffn.", self.ffn.zero_state(batch_size, like)),
            **{
                n: t for neuron in residuals for n, t in neuron.zero_state(batch_size, like).items()
            },
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        after: LayerState = {}
        y, kept = self.mixer(self.mixer_norm(x), unprefixed("mixer.", state), context)
        after |= prefixed("mixer.", kept)
        x = x + _through(self.mixer_residual, y, state, after, context)
        y, kept = self.ffn(self.ffn_norm(x), unprefixed("ffn.", state), context)
        after |= prefixed("ffn.", kept)
        x = x + _through(self.ffn_residual, y, state, after, context)
        return F.dropout(x, self.dropout, self.training), after


def _through(
    neuron: Neuron | None, x: Tensor, state: LayerState, after: LayerState, context: Context
) -> Tensor:
    """What the neuron makes of x, its part of the state going into `after`."""
    if neuron is None:
        return x
    spikes: Spikes
    spikes, kept = neuron(x, state, context.segment, context.probe)
    after |= kept
    return spikes.values


class LanguageModel(nn.Module):
    """A language model whose memory is an argument and a result."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_layers = False
        """Whether training computes each layer again in the backward pass."""
        self.embedding = Embedding(config)
        self.embedding_output = make_optional_neuron("embedding_output", config.width, config)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.sink_embeddings = None
        if config.sink_embeddings:
            self.sink_embeddings = nn.Parameter(torch.empty(config.sink_embeddings, config.width))
        self.layers = nn.ModuleList(Layer(i, config) for i in range(config.num_layers))
        self.norm = make_norm(config)
        wide = config.init == "orthogonal" and config.vocab_size > config.width
        gain = 0.5 * math.sqrt(config.vocab_size / config.width) if wide else 1.0
        self.head = Projection(
            "head_input", config.width, config.vocab_size, config, init_scale=gain
        )
        self.head_qk = HeadQK(config) if config.head_qk_dim else None
        self.tie_weights()
        self._name_neurons()
        self._round_weights()

    def tie_weights(self) -> None:
        """Makes the head read the embedding's matrix, if the configuration says so."""
        if self.config.tie_embeddings:
            self.head.linear.register_parameter("weight", self.embedding.weight)

    def _name_neurons(self) -> None:
        """Every population gets its module's path for a name, and within its layer's part (mixer,
        ffn) the rest of that path as the key of its membrane.
        """
        for path, module in self.named_modules():
            if isinstance(module, Neuron):
                module.name = path.removesuffix(".neuron")
                parts = module.name.split(".")
                own = parts[3:] if len(parts) > 3 else parts[-1:]
                module.key = ".".join(own)

    def _round_weights(self) -> None:
        """Linears that are trained on an integer grid, where the configuration asks for them."""
        c = self.config.weights
        populations = {m.neuron.name: m for m in self.modules() if isinstance(m, Projection)}
        for name, bits in resolve_bits(c.bits, c.bits_of, [*populations.values()]).items():
            linear = populations[name].linear
            assert isinstance(linear, Linear)
            if bits is not None:
                rounded = RoundedLinear(linear, bits, c.group_size, c.learn_step)
                populations[name].linear = rounded

    def initialise(self, seed: int) -> LanguageModel:
        """Draws all parameters from `seed`, on the CPU generator; returns the model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.modules():
                reset_parameters(module)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.sink_embeddings is not None:
            self.sink_embeddings.normal_(0.0, self.config.width**-0.5)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.embedding.weight.device
        return device

    def neurons(self) -> Iterator[Neuron]:
        """Every neuron population, first layer to last."""
        return (module for module in self.modules() if isinstance(module, Neuron))

    def initial_state(self, batch_size: int) -> State:
        """The state before the first token; float32, or float64 if the model is.

        Zeros, or with sink embeddings what the layers remember of them.
        """
        state = self.zero_state(1 if self.sink_embeddings is not None else batch_size)
        if self.sink_embeddings is None:
            return state
        position = torch.arange(self.config.sink_embeddings, device=self.device)[None]
        context = Context(position, None, causal=False)
        _, state = self._layers_forward(widen(self.sink_embeddings)[None], state, context)
        return state.map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    def zero_state(self, batch_size: int) -> State:
        """Memory that holds nothing, not even sink embeddings."""
        weight = self.embedding.weight
        like = torch.empty((), dtype=widen(weight[:0]).dtype, device=self.device)
        layers = [layer.zero_state(batch_size, like) for layer in self._layers()]
        outer = self.head.zero_state(batch_size, like)
        if self.embedding_output is not None:
            outer |= self.embedding_output.zero_state(batch_size, like)
        if self.head_qk is not None:
            outer |= self.head_qk.zero_state(batch_size, like)
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        return State((*layers, outer), position)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _layers_forward(
        self, x: Tensor, state: State, context: Context, handover: Handover | None = None
    ) -> tuple[Tensor, State]:
        """The residual stream [B, T, D] through all layers."""
        layers = []
        for layer, layer_state in zip(self._layers(), state.layers, strict=False):
            if handover is not None:
                layer_state = handover.receive(layer_state)
            if self.recompute_layers and self.training:
                run = functools.partial(_run_layer, layer, layer_state)
                x, layer_state = recomputed(run, x, context)
            else:
                x, layer_state = layer(x, layer_state, context)
            if handover is not None:
                handover.send(layer_state)
            layers.append(layer_state)
        return x, State((*layers, state.layers[-1]), context.position[:, -1] + 1)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        probe: Probe | None = None,
        losses: list[Tensor] | None = None,
        last_only: bool = False,
        read: Reader | None = None,
        read_tokens: int = 0,
        handover: Handover | None = None,
    ) -> tuple[Tensor, State]:
        """Next-token logits of `tokens` [B, T] (T >= 1) after `state`, and the state after them.

        `reset` [B, T] marks tokens before which the state is forgotten: starts of packed
        documents. Layers add terms of the training loss (load balance) to `losses`. `last_only`
        computes the logits of the last token alone. Returns logits [B, T or 1, N] in the
        parameters' precision.

        With `read` the result is what that makes of the logits [B, T, ...], such as losses. Those
        of `read_tokens` tokens (of all sequences together) are then in memory at a time, and
        computed again in the backward pass.

        With `handover` the tokens are a slice of longer rows: the states of layers come from the
        process that has the slice before and go to the one that has the next.
        """
        if reset is not None and self.sink_embeddings is not None:
            assert handover is None
            return self._forward_documents(
                tokens, state, reset, probe, losses, last_only, read, read_tokens
            )
        if state is None:
            state = self.initial_state(tokens.shape[0])
        context = Context(*positions(tokens, state.position, reset), probe, losses)
        outer, after = state.layers[-1], dict[str, Tensor]()
        x = widen(self.embedding(tokens))
        x = _through(self.embedding_output, x, outer, after, context)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x, state = self._layers_forward(x, state, context, handover)
        x = self.norm(x)
        if read is None:
            y, kept = self._logits(x, tokens, outer, context, last_only)
        else:
            y, kept = self._read(x, tokens, outer, context, read, read_tokens)
        after |= kept
        return y, State((*state.layers[:-1], after), state.position)

    def _logits(
        self,
        x: Tensor,
        tokens: Tensor,
        state: LayerState,
        context: Context,
        last_only: bool = False,
    ) -> tuple[Tensor, LayerState]:
        """The logits of what leaves the last norm [B, T, D], and the head's part of the state."""
        after: LayerState = {}
        copied = None
        if self.head_qk is not None:
            copied, kept = self.head_qk(x, tokens, state, context, last_only)
            after |= kept
        # A membrane in front of the head must see every token.
        if last_only and self.head.neuron.config.kind != "lif":
            x = x[:, -1:]
        logits, kept = self.head(x, state, context)
        after |= kept
        if copied is not None:
            logits = logits[:, -copied.shape[1] :] + copied.to(logits.dtype)
        if last_only:
            logits = logits[:, -1:]
        return logits, after

    def _read(
        self,
        x: Tensor,
        tokens: Tensor,
        state: LayerState,
        context: Context,
        read: Reader,
        read_tokens: int,
    ) -> tuple[Tensor, LayerState]:
        """`read` of the logits, a few tokens after the other, and the head's part of the state."""
        B, T = tokens.shape
        size = max(1, read_tokens // B)
        outputs, after = [], dict[str, Tensor]()
        for start in range(0, T, size):
            part = slice(start, min(start + size, T))

            def run(
                x: Tensor, context: Context, part: slice = part, before: LayerState = after
            ) -> tuple[Tensor, LayerState]:
                logits, kept = self._logits(x, tokens[:, part], state | before, context)
                return read(logits, part), kept

            y, after = recomputed(run, x[:, part], context.part(part))
            outputs.append(y)
        return torch.cat(outputs, 1), after

    def _forward_documents(
        self,
        tokens: Tensor,
        state: State | None,
        reset: Tensor,
        probe: Probe | None,
        losses: list[Tensor] | None,
        last_only: bool,
        read: Reader | None,
        read_tokens: int,
    ) -> tuple[Tensor, State]:
        """Pieces between resets one after the other, as a document's initial state is not zero."""
        T = tokens.shape[1]
        cuts = [0, *(t for t in range(1, T) if bool(reset[:, t].any()))]
        start = self.initial_state(tokens.shape[0])
        state = start if state is None else state
        outputs = []
        for begin, end in zip(cuts, [*cuts[1:], T], strict=True):
            begins = [row for row in range(tokens.shape[0]) if bool(reset[row, begin])]
            if begins:
                state = state.put(begins, start.take(begins))
            with shared_losses(losses, (end - begin) / T) as terms:
                y, state = self(
                    tokens[:, begin:end],
                    state,
                    probe=probe,
                    losses=terms,
                    last_only=last_only,
                    read=None if read is None else functools.partial(_shifted, read, begin),
                    read_tokens=read_tokens,
                )
            outputs.append(y)
        return (outputs[-1] if last_only else torch.cat(outputs, 1)), state


def _run_layer(
    layer: Layer, state: LayerState, x: Tensor, context: Context
) -> tuple[Tensor, LayerState]:
    after: tuple[Tensor, LayerState] = layer(x, state, context)
    return after


def _shifted(read: Reader, start: int, logits: Tensor, part: slice) -> Tensor:
    """`read` for tokens that are counted from `start` on."""
    return read(logits, slice(start + part.start, start + part.stop))


@contextlib.contextmanager
def shared_losses(losses: list[Tensor] | None, share: float) -> Iterator[list[Tensor] | None]:
    """A list for the losses of `share` of the tokens, which are then added weighted to `losses`."""
    part: list[Tensor] | None = None if losses is None else []
    yield part
    if losses is not None and part is not None:
        losses += [share * loss for loss in part]


def positions(tokens: Tensor, seen: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Position within the document and documents begun, both [B, T] (the latter may be None).

    `seen` [B] tokens of the open documents came before.
    """
    order = torch.arange(tokens.shape[1], device=tokens.device)
    if reset is None:
        return seen[:, None] + order, None
    segment = reset.long().cumsum(1)
    start = torch.where(reset, order, -1).cummax(1).values
    return torch.where(segment == 0, seen[:, None] + order, order - start), segment
