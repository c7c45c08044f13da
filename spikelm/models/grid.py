"""Integer grids for weights: their levels, their steps, and linears that are trained on them.

A weight of a grid is step * n with an integer n of 8 or 4 bits; outputs of a group share the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import TENSOR_CLASSES
from spikelm.errors import ConfigError, did_you_mean
from spikelm.models.layers import Linear, Projection

LEVELS = {8: (-127, 127), 4: (-8, 7)}
"""Smallest and largest integer weight, by its bits."""

# Sizes of one 4-bit level to choose from, relative to the one that clamps nothing. 7/8 of it still
# reaches the largest weight with -8.
_FOUR_BIT_STEPS = [1 - 0.025 * n for n in range(26)]
# Weights whose scales are searched together.
_PART_WEIGHTS = 2**16

Bits = TypeVar("Bits", bound=int | None)


def resolve_bits(
    bits: Bits, bits_of: Mapping[str, Bits], projections: Sequence[Projection]
) -> dict[str, Bits]:
    """The bits of every projection by the name of the population in front: what `bits_of` says for
    that name, else for its tensor class, else `bits`.

    Raises: ConfigError for a name that no projection has, or bits without LEVELS.
    """
    classes = {p.neuron.name: p.neuron.tensor_class for p in projections}
    known = {*classes, *classes.values()}
    for name in bits_of:
        if name not in known:
            reason = "feeds no weights of this model" if name in TENSOR_CLASSES else "is unknown"
            near = did_you_mean(name, sorted({*classes.values(), "head"}))
            raise ConfigError(f"bits for '{name}' given, which {reason}; {near}")
    for given in (bits, *bits_of.values()):
        if given is not None and given not in LEVELS:
            raise ConfigError(f"bits {given} given; allowed: {', '.join(map(str, sorted(LEVELS)))}")
    return {
        name: bits_of.get(name, bits_of.get(tensor_class, bits))
        for name, tensor_class in classes.items()
    }


def round_to_levels(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integer of `bits` nearest to weight / scale, as a float."""
    return torch.round(weight / scale).clamp(*LEVELS[bits])


def choose_scale(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """The scale [out / group] of weight [out, in].

    8 bits: the largest |weight| of a group maps to 127, so nothing is clamped. 4 bits: the step of
    least squared error; its sign points the longer side, -8, to the largest |weight|.
    """
    rows = weight.float()
    missing = -rows.shape[0] % group_size
    groups: Tensor = F.pad(rows, (0, 0, 0, missing)).unflatten(0, (-1, group_size)).flatten(1)
    if bits == 8:
        return groups.abs().amax(1).clamp(min=1e-12) / LEVELS[8][1]
    # A part at a time stays in the cache for all candidates.
    parts = groups.split(max(1, _PART_WEIGHTS // groups.shape[1]))
    return torch.cat([_four_bit_scale(part) for part in parts])


def _four_bit_scale(groups: Tensor) -> Tensor:
    """The scale of each row."""
    absmax = groups.abs().amax(1).clamp(min=1e-12)
    sign = torch.where(groups.amax(1) > -groups.amin(1), -1.0, 1.0)
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for step in _FOUR_BIT_STEPS:
        scale = sign * absmax * step / LEVELS[4][1]
        rounded = round_to_levels(groups, scale[:, None], 4) * scale[:, None]
        error = (rounded - groups).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


class _Rounded(torch.autograd.Function):
    """weight -> scale * integer, and weight itself where the scale is 0; see `RoundedLinear`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(weight, scale)
        chosen = scale != 0
        integers = round_to_levels(weight, torch.where(chosen, scale, 1.0), bits)
        return torch.where(chosen, integers * scale, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad = grads[0]
        weight, scale = ctx.saved_tensors
        chosen = scale != 0
        ratio = weight / torch.where(chosen, scale, 1.0)
        low, high = LEVELS[ctx.bits]
        inside = ((ratio >= low) & (ratio <= high)) | ~chosen
        grad_scale = None
        if ctx.needs_input_grad[1]:
            error = ratio.round().clamp(low, high) - ratio * inside
            grad_scale = (grad * error).sum(1, keepdim=True)
        return grad * inside, grad_scale, None


class RoundedLinear(Linear):
    """y = (scale * n) values with n = round(weight / scale) of `bits`: what a spike-coded linear
    computes, while the float weight is trained. weight [out, in], scale = step * e^stretch.

    step [out / group] is `choose_scale`'s of the weight as it was when rounding began, signed, and
    0 before: the weight is read as it is then. stretch [out / group] is learned if `learn_step`.

    Gradients: to the weight straight through within the levels, none beyond them; to the scale
    that of a learned step size (Esser et al. 2020), n - weight / scale within and n beyond them.
    That paper trains the step itself with its gradient scaled, which Adam would cancel; of the
    logarithm Adam's updates are fractions of the step, whatever its size.
    """

    step: Tensor
    stretch: nn.Parameter | None

    def __init__(self, linear: Linear, bits: int, group_size: int, learn_step: bool) -> None:
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, linear.init_scale, linear.init)
        # The same parameter, which may be tied to the embedding.
        self.weight = linear.weight
        self.bits, self.group_size = bits, group_size
        groups = -(-out_features // group_size)
        self.register_buffer("step", torch.zeros(groups))
        stretch = nn.Parameter(torch.zeros(groups)) if learn_step else None
        self.register_parameter("stretch", stretch)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.step.zero_()
        if self.stretch is not None:
            self.stretch.zero_()

    @torch.no_grad()
    def begin(self) -> None:
        """Chooses the steps for the weight as it is now; from here on it is rounded."""
        self.step.copy_(choose_scale(self.weight, self.group_size, self.bits))
        if self.stretch is not None:
            self.stretch.zero_()

    @property
    def begun(self) -> bool:
        """Whether the weight is rounded."""
        return bool(self.step.all())

    def scale(self) -> Tensor:
        """[out / group]"""
        return self.step if self.stretch is None else self.step * self.stretch.exp()

    def integers(self) -> Tensor:
        """The weight on its grid, int8 [in, out] as in a spike-coded linear."""
        integers = round_to_levels(self.weight, self._per_output(), self.bits)
        return integers.to(torch.int8).T.contiguous()

    def effective_weight(self) -> Tensor:
        rounded: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self.weight, self._per_output(), self.bits
        )
        return rounded

    def _per_output(self) -> Tensor:
        """The scale of each output [out, 1]."""
        scale = self.scale()
        if self.group_size > 1:
            scale = scale.repeat_interleave(self.group_size)[: self.weight.shape[0]]
        return scale[:, None]
