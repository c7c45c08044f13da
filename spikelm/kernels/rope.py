"""Rotary position code (Su et al. 2021), half-split layout as in Llama."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikelm.config import RopeScaling


def rotate(x: Tensor, position: Tensor, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Rotates x [..., H, K] by its token's `position` [...] (tokens since the document's start).

    Angles are formed in float64: at position 100,000 a float32 angle is off by 0.01 rad.
    """
    half = x.shape[-1] // 2
    angle = position.to(torch.float64)[..., None] * frequencies(half, theta, scaling, x.device)
    cos = angle.cos().to(x.dtype)[..., None, :]
    sin = angle.sin().to(x.dtype)[..., None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def frequencies(
    half: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Radians per token of each channel pair [half], float64.

    Llama 3's scaling divides frequencies of long wavelength by `factor`, leaves short ones alone
    and goes over linearly (in original_positions / wavelength) between.
    """
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    frequency = theta**-exponent
    if scaling is None:
        return frequency
    turns = scaling.original_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)
