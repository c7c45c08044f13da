"""Rotary position code (Su et al. 2021), half-split layout as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotates x [..., H, K] by its token's `position` [...] (tokens since the document's start).

    Angles are formed in float64: at position 100,000 a float32 angle is off by 0.01 rad.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angle = position.to(torch.float64)[..., None] * theta**-exponent
    cos = angle.cos().to(x.dtype)[..., None, :]
    sin = angle.sin().to(x.dtype)[..., None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
