"""Spike functions: a hard threshold forward, the derivative of a smooth step backward.

Each entry documents the smooth step whose exact derivative it uses; x = v - v_threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def arctan_step(x: Tensor, alpha: float) -> Tensor:
    """atan(pi/2 alpha x) / pi + 1/2 (Fang et al. 2021)."""
    return torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5


def arctan_slope(x: Tensor, alpha: float) -> Tensor:
    """alpha / (2 (1 + (pi/2 alpha x)^2))."""
    return alpha / (2 * (1 + (math.pi / 2 * alpha * x) ** 2))


def sigmoid_step(x: Tensor, alpha: float) -> Tensor:
    """1 / (1 + exp(-alpha x))."""
    return torch.sigmoid(alpha * x)


def sigmoid_slope(x: Tensor, alpha: float) -> Tensor:
    """alpha s (1 - s) with s = sigmoid(alpha x)."""
    s = torch.sigmoid(alpha * x)
    return alpha * s * (1 - s)


def rectangle_step(x: Tensor, alpha: float) -> Tensor:
    """A ramp of slope alpha around 0, clipped to [0, 1]."""
    return (alpha * x + 0.5).clamp(0, 1)


def rectangle_slope(x: Tensor, alpha: float) -> Tensor:
    """alpha where |x| < 1 / (2 alpha), else 0."""
    return alpha * (x.abs() < 0.5 / alpha).to(x.dtype)


def triangle_step(x: Tensor, alpha: float) -> Tensor:
    """(1 + alpha x)^2 / 2 below 0 and 1 - (1 - alpha x)^2 / 2 above, clipped to [0, 1]."""
    half = (1 - alpha * x.abs()).clamp(min=0) ** 2 / 2
    return torch.where(x < 0, half, 1 - half)


def triangle_slope(x: Tensor, alpha: float) -> Tensor:
    """alpha max(0, 1 - alpha |x|) (Bellec et al. 2018)."""
    return alpha * (1 - alpha * x.abs()).clamp(min=0)


def fast_sigmoid_step(x: Tensor, alpha: float) -> Tensor:
    """(1 + alpha x / (1 + alpha |x|)) / 2 (Zenke and Ganguli 2018)."""
    return (1 + alpha * x / (1 + alpha * x.abs())) / 2


def fast_sigmoid_slope(x: Tensor, alpha: float) -> Tensor:
    """alpha / (2 (1 + alpha |x|)^2)."""
    return alpha / (2 * (1 + alpha * x.abs()) ** 2)


def gaussian_step(x: Tensor, alpha: float) -> Tensor:
    """Phi(alpha x), the normal distribution's cumulative function."""
    return (1 + torch.erf(alpha * x / math.sqrt(2))) / 2


def gaussian_slope(x: Tensor, alpha: float) -> Tensor:
    """alpha exp(-(alpha x)^2 / 2) / sqrt(2 pi)."""
    return alpha / math.sqrt(2 * math.pi) * torch.exp(-((alpha * x) ** 2) / 2)


SURROGATES: Mapping[
    str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]
] = {
    "arctan": (arctan_step, arctan_slope),
    "sigmoid": (sigmoid_step, sigmoid_slope),
    "rectangle": (rectangle_step, rectangle_slope),
    "triangle": (triangle_step, triangle_slope),
    "fast_sigmoid": (fast_sigmoid_step, fast_sigmoid_slope),
    "gaussian": (gaussian_step, gaussian_slope),
}
"""Name -> (smooth step, its derivative)."""


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.alpha = SURROGATES[surrogate][1], alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.slope(x, ctx.alpha), None, None


def fire(x: Tensor, surrogate: str, alpha: float) -> Tensor:
    """1 where x >= 0, else 0; the gradient is the surrogate's slope with sharpness `alpha`."""
    spikes: Tensor = _Fire.apply(x, surrogate, alpha)  # type: ignore[no-untyped-call]
    return spikes
