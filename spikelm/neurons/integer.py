"""Integer spikes: a float vector becomes signed or unsigned spike counts. The adaptive one:

    v_threshold = mean_c |x_c| / k,  clamped to [1e-5, 1e4]
    count = round(x / v_threshold), 0 where |x| <= dead_zone * mean|x|, clipped to max_count
    value = v_threshold * count

k = 3 without dead zone and clip is SpikingBrain's neuron (Pan et al. 2025). The dead zone sets
how many channels are silent apart from how fine the counts are. A power p > 1 puts
x |x / mean|x||^(p - 1) in place of x. The fixed one has one step for all
tokens (QSD-Transformer, Qiu et al. 2025):

    count = floor(clip(x / step, 0 or -max_count, max_count) + 1/2),  value = step * count

C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spikelm.kernels import native

MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4
# A learned k must not reach 0; below this the gradient is that of this k, so it can come back.
MIN_K = 1e-3
# Width of the band around the dead zone's edge that its gradient sees, in units of mean|x|.
DEAD_ZONE_BAND = 0.2


def expand(x: Tensor, power: float) -> Tensor:
    """sign(x) m |x / m|^power of x [..., C], m the mean |x| of a vector: large entries grow, small
    ones shrink, and order and sign stay. Differentiable, also at 0.
    """
    if power == 1:
        return x
    magnitude = x.abs()
    mean = magnitude.mean(-1, keepdim=True).clamp(min=MIN_THRESHOLD)
    return torch.copysign((magnitude / mean).pow(power) * mean, x)


def integer_counts(
    x: Tensor, k: Tensor, dead_zone: Tensor, max_count: int | None, unsigned: bool
) -> tuple[Tensor, Tensor]:
    """Counts [..., C] (integers in x's dtype) and v_threshold [..., 1] of x [..., C].

    k is a scalar, dead_zone [C] is in units of the token's mean |x|. Ties round to even.
    """
    mean = x.abs().mean(-1, keepdim=True)
    v_threshold = (mean / k.clamp(min=MIN_K)).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    counts = torch.round(x / v_threshold)
    counts = counts * (x.abs() > dead_zone * mean)
    if max_count is not None or unsigned:
        counts = counts.clamp(*_limits(max_count, unsigned))
    return counts, v_threshold


def _limits(max_count: int | None, unsigned: bool) -> tuple[float, float]:
    """The lowest and the highest count."""
    high = math.inf if max_count is None else max_count
    return (0.0 if unsigned else -high), high


def near_edge(x: Tensor, dead_zone: Tensor) -> Tensor:
    """Which entries of x [..., C] lie in the band around the edge of the dead zone [C]."""
    magnitude, mean = x.abs(), x.abs().mean(-1, keepdim=True)
    return (magnitude - dead_zone * mean).abs() < DEAD_ZONE_BAND / 2 * mean


@torch.no_grad()
def edge_counts(x: Tensor, dead_zone: Tensor, unsigned: bool, power: float = 1.0) -> Tensor:
    """How many vectors of x [..., C] stand near the edge in each channel [C]: the slope of its
    silence in the dead zone. Of unsigned neurons only what is above 0 can fire.
    """
    if native.serves(x) and x.numel() > 0:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        low, zone = 0.0 if unsigned else -math.inf, dead_zone.to(x.dtype).contiguous()
        return native.integer_edges(rows, zone, power, low, DEAD_ZONE_BAND)
    x = expand(x, power)
    near = near_edge(x, dead_zone)
    if unsigned:
        near &= x > 0
    return near.flatten(0, -2).sum(0).to(x.dtype)


class _IntegerSpike(torch.autograd.Function):
    """value = v_threshold * count; see `integer_spike` for the gradients. The reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        k: Tensor,
        dead_zone: Tensor,
        max_count: int | None,
        unsigned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        counts, v_threshold = integer_counts(x, k, dead_zone, max_count, unsigned)
        inside = None
        if max_count is not None:
            inside = (x <= (max_count + 0.5) * v_threshold) & (
                x >= (0.0 if unsigned else -(max_count + 0.5)) * v_threshold
            )
        elif unsigned:
            inside = x >= 0
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.max_count, ctx.unsigned = max_count, unsigned
        ctx.save_for_backward(inside, *((x, k, dead_zone, counts, v_threshold) if learned else ()))
        ctx.mark_non_differentiable(counts, v_threshold)
        return counts * v_threshold, counts, v_threshold

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        grad = grads[0]
        inside, *learned = ctx.saved_tensors
        grad_x = grad if inside is None else grad * inside
        grad_k = grad_zone = None
        if learned:
            x, k, dead_zone, counts, v_threshold = learned
            magnitude, mean = x.abs(), x.abs().mean(-1, keepdim=True)
            beyond = magnitude - dead_zone * mean
            fixed = beyond <= 0 if inside is None else (beyond <= 0) | ~inside
            error = torch.where(fixed, counts, counts - x / v_threshold)
            grad_k = (grad * error * -v_threshold / k.clamp(min=MIN_K)).sum().reshape(k.shape)
            # The value an entry jumps to at the edge: its own, or that of the clip.
            low, high = _limits(ctx.max_count, ctx.unsigned)
            jump = torch.clamp(x / v_threshold, low, high) * v_threshold
            near = near_edge(x, dead_zone)
            grad_zone = (grad * jump * near / -DEAD_ZONE_BAND).flatten(0, -2).sum(0)
        return grad_x, grad_k, grad_zone, None, None


class _NativeSpike(torch.autograd.Function):
    """The same in compiled form, power included; k is not trained here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dead_zone: Tensor, k: float, power: float, limits: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.settings = k, power, limits
        ctx.save_for_backward(rows, dead_zone)
        values, counts, v_threshold = native.integer_forward(rows, dead_zone, k, power, limits)
        ctx.mark_non_differentiable(counts, v_threshold)
        return values.view_as(x), counts.view_as(x), v_threshold.view(*x.shape[:-1], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        rows, dead_zone = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape).contiguous()
        k, power, limits = ctx.settings
        grad_x, grad_zone = native.integer_backward(
            rows, dead_zone, k, power, limits, DEAD_ZONE_BAND, grad, ctx.needs_input_grad[1]
        )
        return grad_x.view_as(grads[0]), grad_zone, None, None, None


def integer_spike(
    x: Tensor,
    k: Tensor,
    dead_zone: Tensor,
    max_count: int | None,
    unsigned: bool,
    power: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, counts, v_threshold) of x [..., C]; gradients reach x, k and dead_zone.

    x: straight through inside the clip range (the dead zone included), zero outside it.
    k: as for a learned step size (Esser et al. 2020): d value / d v_threshold is
    count - x / v_threshold for rounded entries, the count for clipped ones, 0 in the dead zone.
    dead_zone: d/d theta of value [|x| > theta] with a rectangle of width DEAD_ZONE_BAND in place
    of the delta function (JumpReLU, Rajamanoharan et al. 2024).

    Compiled on the CPU, unless k is trained.
    """
    if native.serves(x) and x.numel() > 0 and not (torch.is_grad_enabled() and k.requires_grad):
        values, counts, v_threshold = _NativeSpike.apply(  # type: ignore[no-untyped-call]
            x,
            dead_zone.to(x.dtype).contiguous(),
            max(k.item(), MIN_K),
            power,
            _limits(max_count, unsigned),
        )
        return values, counts, v_threshold
    x = expand(x, power)
    if not torch.is_grad_enabled():
        counts, v_threshold = integer_counts(x, k, dead_zone, max_count, unsigned)
        return counts * v_threshold, counts, v_threshold
    values, counts, v_threshold = _IntegerSpike.apply(  # type: ignore[no-untyped-call]
        x, k, dead_zone, max_count, unsigned
    )
    return values, counts, v_threshold


class _FixedSpike(torch.autograd.Function):
    """value = step * count; see `fixed_spike` for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, max_count: int | None, unsigned: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        step = step.to(x.dtype).clamp(min=MIN_THRESHOLD)
        low, high = _limits(max_count, unsigned)
        ratio = x / step
        counts = torch.floor(ratio.clamp(low, high) + 0.5)
        ctx.limits = low, high
        ctx.save_for_backward(ratio, counts)
        v_threshold = step.expand(*x.shape[:-1], 1)
        ctx.mark_non_differentiable(counts, v_threshold)
        return step * counts, counts, v_threshold

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad = grads[0]
        ratio, counts = ctx.saved_tensors
        low, high = ctx.limits
        inside = (ratio >= low) & (ratio <= high)
        grad_step = (grad * (counts - ratio * inside)).sum() if ctx.needs_input_grad[1] else None
        return grad * inside, grad_step, None, None


def fixed_spike(
    x: Tensor, step: Tensor, max_count: int | None, unsigned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, counts, v_threshold = step [..., 1]) of x [..., C]; step is a scalar > 0.

    Gradients: to x straight through inside the clip range, zero outside it; to the step that of a
    learned step size (Esser et al. 2020), count - x / step inside and the count outside, without
    that paper's scale, which Adam would cancel.
    """
    values, counts, v_threshold = _FixedSpike.apply(  # type: ignore[no-untyped-call]
        x, step, max_count, unsigned
    )
    return values, counts, v_threshold
