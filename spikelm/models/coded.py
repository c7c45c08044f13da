"""Spike-coded linears: integer weights of which only the spikes' rows are read.

y = v_threshold * scale * (W counts),   the product in exact integers
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.kernels import event
from spikelm.models.ffn import ChannelMix, GatedFFN
from spikelm.models.grid import RoundedLinear, choose_scale, round_to_levels
from spikelm.models.layers import Linear, Projection
from spikelm.models.spikelm import LanguageModel, Layer
from spikelm.neurons import Spikes

TWO_STAGE_OUTPUTS = 8192
"""Heads of so many 8-bit logits are laid out in halves, so that a token reads little more than the
upper ones. Of fewer logits too many matter."""

_FOUR_BIT_OFFSET = 8


class CodedLinear(nn.Module):
    """weight int8 [in, out], input-major, or packed (`pack_nibbles`) if it has 4 bits;
    scale [out / group], shared by groups of outputs.

    Scales lie along the output, never along the input, so the sum over input neurons stays an
    exact integer and a silent neuron's scale is not read either.
    """

    weight: Tensor | None
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, group_size: int, bits: int = 8) -> None:
        super().__init__()
        groups = -(-out_features // group_size)
        self.group_size, self.bits = group_size, bits
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", None)
        self.register_buffer("scale", None)
        self.fill(torch.zeros(in_features, out_features, dtype=torch.int8), torch.zeros(groups))
        self.layout: event.Layout = "rows"
        """What `pack` for `native` makes of the weights."""
        self.backend = "matmul"
        self.table: event.Table | None = None

    def fill(self, integers: Tensor, scale: Tensor) -> None:
        """Takes int8 weights [in, out] and their scale."""
        self.weight = integers if self.bits == 8 else pack_nibbles(integers)
        self.scale = scale

    def integers(self) -> Tensor:
        """The weights as int8 [in, out]; not after `pack` for another backend than `matmul`."""
        if self.weight is None:
            assert self.backend == "matmul"
            assert isinstance(self.table, Tensor)
            return self.table
        return self.weight if self.bits == 8 else unpack_nibbles(self.weight, self.out_features)

    def padding_is_zero(self) -> bool:
        """Whether the half bytes that belong to no output hold a zero weight."""
        if self.bits == 8 or self.out_features % 2 == 0:
            return True
        assert self.weight is not None
        return bool((self.weight[:, -1] >> 4 == _FOUR_BIT_OFFSET).all())

    def pack(self, backend: str) -> None:
        """Moves the weights into the backend's layout: for running, no longer for saving.

        `matmul` uses int8 weights as they are.
        """
        assert self.weight is not None
        if backend == "matmul" and self.bits == 8:
            return
        self.table = event.pack(self.integers(), backend, self.bits, self.layout)
        self.backend = backend
        self.weight = None

    def forward(self, spikes: Spikes) -> Tensor:
        assert spikes.counts is not None, "a spike-coded linear needs a neuron in front of it"
        assert spikes.v_threshold is not None
        table = self.integers() if self.table is None else self.table
        rows = event.product(spikes.counts.flatten(0, -2), table, self.backend)
        y = (rows * self.out_scale()).to(spikes.values.dtype)
        return y.view(*spikes.counts.shape[:-1], -1) * spikes.v_threshold

    def dequantised(self) -> Tensor:
        """The float weights [out, in] these integers stand for."""
        return self.integers().T * self.out_scale()[:, None]

    def out_scale(self) -> Tensor:
        """The scale of each output [out]."""
        if self.group_size == 1:
            return self.scale
        return self.scale.repeat_interleave(self.group_size)[: self.out_features]


def pack_nibbles(integers: Tensor) -> Tensor:
    """Integers -8..7 [in, out] as bytes uint8 [in, out / 2], which hold (integer + 8) of output 2j
    in the low half of byte j and of 2j + 1 in the high one; an odd last half is a zero weight.
    """
    halves = (F.pad(integers, (0, integers.shape[1] % 2)) + _FOUR_BIT_OFFSET).to(torch.uint8)
    return halves[:, 0::2] | halves[:, 1::2] << 4


def unpack_nibbles(packed: Tensor, out_features: int) -> Tensor:
    """The int8 [in, out] behind the bytes of `pack_nibbles`."""
    halves = packed.new_empty(*packed.shape, 2)
    torch.bitwise_and(packed, 15, out=halves[..., 0])
    torch.bitwise_right_shift(packed, 4, out=halves[..., 1])
    integers = halves.view(torch.int8).flatten(1).sub_(_FOUR_BIT_OFFSET)
    return integers[:, :out_features].contiguous()


def quantise(weight: Tensor, group_size: int, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Integers nearest to weight [out, in] under `choose_scale`: (int8 [in, out],
    scale [out / group]).
    """
    scale = choose_scale(weight, group_size, bits)
    per_output = scale.repeat_interleave(group_size)[: weight.shape[0], None]
    return round_to_levels(weight.float(), per_output, bits).to(torch.int8).T.contiguous(), scale


def use_coded_linears(
    model: LanguageModel, group_size: int, bits: int | Mapping[str, int] = 8
) -> None:
    """Replaces every projection's float linear by an empty spike-coded one of `bits`: one number,
    or by the name of the population in front, 8 where it is not named.
    """
    for projection in projections(model):
        if isinstance(projection.linear, Linear):
            own = bits if isinstance(bits, int) else bits.get(projection.neuron.name, 8)
            out_features, in_features = projection.linear.weight.shape
            projection.linear = CodedLinear(in_features, out_features, group_size, own)


def trained_grid(projection: Projection) -> RoundedLinear | None:
    """The projection's linear if its weight was rounded in training; None if it is a float."""
    linear = projection.linear
    return linear if isinstance(linear, RoundedLinear) and linear.begun else None


def coded_copy(
    model: LanguageModel,
    config: ModelConfig,
    group_size: int,
    bits: int | Mapping[str, int] = 8,
) -> LanguageModel:
    """The float `model` with integer weights of `bits` (as in `use_coded_linears`), under `config`,
    which puts a neuron before every projection. Neurons `model` lacks keep their initial
    thresholds, and weights that were rounded in training the integers and scales of that.
    """
    with torch.device("meta"):
        coded = LanguageModel(config)
    use_coded_linears(coded, group_size, bits)
    coded.to_empty(device="cpu")
    for neuron in coded.neurons():
        neuron.reset_parameters()
    kept = {name: t for name, t in model.state_dict().items() if not name.endswith("linear.weight")}
    coded.load_state_dict(kept, strict=False)
    for source, target in zip(projections(model), projections(coded), strict=True):
        assert isinstance(target.linear, CodedLinear)
        grid = trained_grid(source)
        if grid is not None and (grid.bits, grid.group_size) == (target.linear.bits, group_size):
            target.linear.fill(grid.integers(), grid.scale().detach().clone())
            continue
        weight = source.linear.get_parameter("weight")
        target.linear.fill(*quantise(weight, group_size, target.linear.bits))
    return coded.eval().requires_grad_(False)


def coding(model: LanguageModel) -> dict[str, Any]:
    """How a spike-coded model's weights are stored, as JSON types: `group_size`, `bits` as in
    `use_coded_linears`, and where there are any, the projections `by_output` (`read_by_output`).
    """
    linears = {
        p.neuron.name: p.linear for p in projections(model) if isinstance(p.linear, CodedLinear)
    }
    bits = {name: linear.bits for name, linear in linears.items()}
    alike = len(set(bits.values())) == 1
    read = relu_projections(model)
    by_output = [name for name in read if linears[name].layout != "rows"]
    return {
        "bits": next(iter(bits.values())) if alike else bits,
        "group_size": next(iter(linears.values())).group_size,
        **({"by_output": by_output} if by_output else {}),
    }


def relu_projections(model: LanguageModel) -> dict[str, tuple[event.Layout, Projection]]:
    """By its name, each projection of which a ReLU decides what counts: how it is laid out if it is
    read by output, and the projection that gets the result.
    """
    found: dict[str, tuple[event.Layout, Projection]] = {}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        ffn = layer.ffn
        if isinstance(ffn, GatedFFN) and ffn.kind == "reglu":
            found[ffn.input.neuron.name] = "gated", ffn.output
        elif isinstance(ffn, ChannelMix) and _bits(ffn.input) == 8:
            found[ffn.input.neuron.name] = "halves", ffn.output
    return found


def _bits(projection: Projection) -> int | None:
    return projection.linear.bits if isinstance(projection.linear, CodedLinear) else None


def read_by_output(model: LanguageModel, names: Collection[str]) -> None:
    """Native code reads of these projections (of `relu_projections`) what a ReLU leaves: behind
    gates that are open, or the lower halves where the upper ones do not say it is negative.
    """
    layouts = relu_projections(model)
    for projection in projections(model):
        linear = projection.linear
        if isinstance(linear, CodedLinear) and projection.neuron.name in names:
            linear.layout, _ = layouts[projection.neuron.name]


def use_two_stages(model: LanguageModel) -> None:
    """Native code reads a large 8-bit head in two stages, where not all logits are asked for."""
    head = model.head.linear
    if isinstance(head, CodedLinear) and head.out_features >= TWO_STAGE_OUTPUTS and head.bits == 8:
        head.layout = "halves"


def projections(model: LanguageModel) -> list[Projection]:
    """Every projection, first layer to last."""
    return [module for module in model.modules() if isinstance(module, Projection)]
