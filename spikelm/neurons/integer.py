"""The adaptive integer spike: a float vector becomes signed or unsigned spike counts.

    v_threshold = mean_c |x_c| / k,  clamped to [1e-5, 1e4]
    count = round(x / v_threshold), 0 where |x| <= dead_zone * mean|x|, clipped to max_count
    value = v_threshold * count

k = 3 without dead zone and clip is SpikingBrain's neuron (Pan et al. 2025). The dead zone sets
how many channels are silent apart from how fine the counts are. C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4
# Width of the band around the dead zone's edge that its gradient sees, in units of mean|x|.
DEAD_ZONE_BAND = 0.2


def integer_counts(
    x: Tensor, k: Tensor, dead_zone: Tensor, max_count: int | None, unsigned: bool
) -> tuple[Tensor, Tensor]:
    """Counts [..., C] (integers in x's dtype) and v_threshold [..., 1] of x [..., C].

    k is a scalar, dead_zone [C] is in units of the token's mean |x|. Ties round to even.
    """
    mean = x.abs().mean(-1, keepdim=True)
    v_threshold = (mean / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    counts = torch.round(x / v_threshold)
    counts = counts * (x.abs() > dead_zone * mean)
    if max_count is not None or unsigned:
        low = 0 if unsigned else -(max_count or 0)
        counts = counts.clamp(low, max_count)
    return counts, v_threshold


class _IntegerSpike(torch.autograd.Function):
    """value = v_threshold * count; see `integer_spike` for the gradients."""

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
            clipped = torch.zeros_like(x, dtype=torch.bool) if inside is None else ~inside
            error = torch.where(clipped | (counts == 0), counts, counts - x / v_threshold)
            grad_k = (grad * error * -v_threshold / k).sum().reshape(k.shape)
            mean = x.abs().mean(-1, keepdim=True)
            near = (x.abs() - dead_zone * mean).abs() < DEAD_ZONE_BAND / 2 * mean
            slope = torch.where(near & ~clipped, -x / DEAD_ZONE_BAND, torch.zeros_like(x))
            grad_zone = (grad * slope).flatten(0, -2).sum(0)
        return grad_x, grad_k, grad_zone, None, None


def integer_spike(
    x: Tensor, k: Tensor, dead_zone: Tensor, max_count: int | None, unsigned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, counts, v_threshold) of x [..., C]; gradients reach x, k and dead_zone.

    x: straight through inside the clip range (the dead zone included), zero outside it.
    k: as for a learned step size (Esser et al. 2020): d value / d v_threshold is
    count - x / v_threshold for counted entries, +-max_count for clipped ones, 0 in the dead zone.
    dead_zone: d/d theta of x [|x| > theta] with a rectangle of width DEAD_ZONE_BAND in place of
    the delta function (JumpReLU, Rajamanoharan et al. 2024).
    """
    if not torch.is_grad_enabled():
        counts, v_threshold = integer_counts(x, k, dead_zone, max_count, unsigned)
        return counts * v_threshold, counts, v_threshold
    values, counts, v_threshold = _IntegerSpike.apply(  # type: ignore[no-untyped-call]
        x, k, dead_zone, max_count, unsigned
    )
    return values, counts, v_threshold
