"""The language model: embedding, [mixer, ffn] x L, head. Dense twin and spiking model alike.

    model(tokens, state=None) -> (logits, state)

is training, prefill and decode: the same call with different lengths.
B sequences, T tokens, D width, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.models.ffn import make_ffn
from spikelm.models.layers import Context, Projection, RMSNorm, reset_parameters, widen
from spikelm.models.mixers import make_mixer
from spikelm.neurons import Neuron, Probe
from spikelm.state import LayerState, State


class Embedding(nn.Module):
    """Rows of a table: weight [N, D]."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0.0, self.weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Layer(nn.Module):
    """x + mixer(norm x), then x + ffn(norm x)."""

    def __init__(self, index: int, config: ModelConfig) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.mixer_norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = make_mixer(config.mixers[index], name, config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = make_ffn(name, config)

    def zero_state(self, batch_size: int, like: Tensor) -> LayerState:
        return {
            **self.mixer.zero_state(batch_size, like),
            **self.ffn.zero_state(batch_size, like),
        }

    def forward(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        y, mixer_state = self.mixer(self.mixer_norm(x), state, context)
        x = x + y
        y, ffn_state = self.ffn(self.ffn_norm(x), state, context)
        return x + y, {**mixer_state, **ffn_state}


class LanguageModel(nn.Module):
    """A language model whose memory is an argument and a result."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(i, config) for i in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Projection("", "head_input", config.width, config.vocab_size, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head read the embedding's matrix, if the configuration says so."""
        if self.config.tie_embeddings:
            self.head.linear.register_parameter("weight", self.embedding.weight)

    def initialise(self, seed: int) -> LanguageModel:
        """Draws all parameters from `seed`, on the CPU generator; returns the model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.modules():
                reset_parameters(module)
        return self

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def neurons(self) -> Iterator[Neuron]:
        """Every neuron population, first layer to last."""
        return (module for module in self.modules() if isinstance(module, Neuron))

    def zero_state(self, batch_size: int) -> State:
        """The state before the first token; float32, or float64 if the model is."""
        weight = self.embedding.weight
        like = torch.empty((), dtype=widen(weight[:0]).dtype, device=self.device)
        layers = [layer.zero_state(batch_size, like) for layer in self._layers()]
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        head = self.head.zero_state(batch_size, like)
        return State((*layers, head), position)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        probe: Probe | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, State]:
        """Next-token logits of `tokens` [B, T] (T >= 1) after `state`, and the state after them.

        `reset` [B, T] marks tokens before which the state is forgotten: starts of packed
        documents. `last_only` computes the logits of the last token alone. Returns logits
        [B, T or 1, N] in the parameters' precision.
        """
        if state is None:
            state = self.zero_state(tokens.shape[0])
        context = Context(*_positions(tokens, state.position, reset), probe)
        x = widen(self.embedding(tokens))
        layers = []
        for layer, layer_state in zip(self._layers(), state.layers, strict=False):
            x, layer_state = layer(x, layer_state, context)
            layers.append(layer_state)
        x = self.norm(x)
        # A membrane in front of the head must see every token.
        if last_only and self.head.neuron.config.kind != "lif":
            x = x[:, -1:]
        logits, head = self.head(x, state.layers[-1], context)
        if last_only:
            logits = logits[:, -1:]
        return logits, State((*layers, head), context.position[:, -1] + 1)


def _positions(tokens: Tensor, seen: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Position within the document and documents begun, both [B, T] (the latter may be None)."""
    order = torch.arange(tokens.shape[1], device=tokens.device)
    if reset is None:
        return seen[:, None] + order, None
    segment = reset.long().cumsum(1)
    start = torch.where(reset, order, -1).cummax(1).values
    return torch.where(segment == 0, seen[:, None] + order, order - start), segment
