"""Weight traffic: the bytes of weights that decoding one token reads or, thanks to silence, skips.

Counted over the whole model in the layout that runs: every projection (head included), norms,
biases, convolutions, thresholds, scales and one row of the embedding. Caches are not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spikelm.coding.meter import Tally
from spikelm.kernels import event
from spikelm.kernels.outputs import Gated, Halves
from spikelm.models.coded import CodedLinear, projections, relu_projections
from spikelm.models.ffn import ExpertsFFN
from spikelm.models.layers import Linear, Projection
from spikelm.models.spikelm import LanguageModel


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weights behind one neuron population."""

    in_features: int
    out_features: int
    bits: int
    """Bits per weight as stored."""
    row_bytes: int
    """What the weights of one input neuron take where they run."""
    backend: str | None
    """The event-driven implementation of a spike-coded matrix; None for a float one."""
    share: float = 1.0
    """Share of the tokens that read it: below 1 for routed experts."""

    @property
    def num_bytes(self) -> float:
        """Bytes a token reads of it on average if nothing is silent."""
        return self.in_features * self.row_bytes * self.share

    @property
    def skips(self) -> bool:
        """Whether the rows of silent neurons stay unread."""
        return self.backend not in (None, "matmul")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one token reads if nothing is silent, and what silence changes."""

    matrices: dict[str, Matrix]
    """By the name of the neuron population in front."""
    other_bytes: float
    """Everything that silence does not change."""
    by_output: Mapping[str, str] = field(default_factory=dict)
    """Of matrices of which half is read by output, the population that gets what a ReLU leaves."""

    @property
    def num_bytes(self) -> float:
        """Bytes per token without silence."""
        return self.other_bytes + sum(matrix.num_bytes for matrix in self.matrices.values())

    def silence(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Share of each matrix's bytes that need not be read, as far as it was measured: that of
        silent neurons, and half of it that of outputs that a ReLU makes 0 where it is read so.
        """
        found = {name: tally.silent_fraction for name, tally in tallies.items()}
        for name, behind in self.by_output.items():
            if behind in tallies:
                found[name] = (found[name] + tallies[behind].zero_input_fraction) / 2
        return found

    def skippable_fraction(self, silence: Mapping[str, float]) -> float:
        """Share of the bytes that belongs to silent neurons; `silence` is by population, and 0
        for one that is not named, such as an expert that no token reached.
        """
        silent = sum(silence.get(n, 0.0) * m.num_bytes for n, m in self.matrices.items())
        return silent / self.num_bytes

    def spike_bytes(self, silence: Mapping[str, float]) -> float:
        """Bytes per token that do not belong to silent neurons."""
        return self.num_bytes * (1 - self.skippable_fraction(silence))

    def skipped_fraction(self, silence: Mapping[str, float]) -> float:
        """Share of the bytes that is not read: of the skippable, what the backend skips."""
        silent = sum(silence.get(n, 0.0) * m.num_bytes for n, m in self.matrices.items() if m.skips)
        return silent / self.num_bytes


def weight_traffic(model: LanguageModel) -> Traffic:
    """The traffic of a model as it is laid out now."""
    populations = projections(model)
    apart = {id(p.linear.weight) for p in populations} | {id(model.embedding.weight)}
    # Sink embeddings are read once, for the initial state.
    apart.add(id(model.sink_embeddings))
    routed = {
        id(module): layer.config.top_k / layer.config.num_experts
        for layer in model.modules()
        if isinstance(layer, ExpertsFFN)
        for module in layer.experts.modules()
    }
    other = sum(
        routed.get(id(module), 1.0) * tensor.nbytes
        for module in model.modules()
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if id(tensor) not in apart
    )
    tables = {p.neuron.name: getattr(p.linear, "table", None) for p in populations}
    by_gates = {
        name: behind.neuron.name
        for name, (_, behind) in relu_projections(model).items()
        if isinstance(tables[name], Gated | Halves)
    }
    return Traffic(
        {p.neuron.name: _matrix(p, routed.get(id(p), 1.0)) for p in populations},
        other + model.embedding.weight[0].nbytes,
        by_gates,
    )


def weight_bytes(model: LanguageModel) -> int:
    """Bytes the weights take in memory, the whole embedding included."""
    tensors = [*model.parameters(), *model.buffers()]
    tables = [linear.table for linear in _coded_linears(model) if linear.table is not None]
    return sum(tensor.nbytes for tensor in [*tensors, *tables])


def num_parameters(model: LanguageModel) -> int:
    """Numbers in the model, thresholds included; scales of integer weights are not counted."""
    coded = sum(linear.in_features * linear.out_features for linear in _coded_linears(model))
    return coded + sum(parameter.numel() for parameter in model.parameters())


def _matrix(projection: Projection, share: float) -> Matrix:
    linear = projection.linear
    if isinstance(linear, CodedLinear):
        table = linear.weight if linear.table is None else linear.table
        assert table is not None
        shape = linear.in_features, linear.out_features
        return Matrix(*shape, linear.bits, event.row_bytes(table), linear.backend, share)
    assert isinstance(linear, Linear)
    out_features, in_features = linear.weight.shape
    size = linear.weight.element_size()
    return Matrix(in_features, out_features, 8 * size, out_features * size, None, share)


def _coded_linears(model: LanguageModel) -> list[CodedLinear]:
    return [p.linear for p in projections(model) if isinstance(p.linear, CodedLinear)]
