"""Activations whose bits do not depend on where an element stands in its tensor.

torch's sigmoid and SiLU use one exponential in the vector loop and another for the elements left
over, so a row's last bits can change with the batch around it. `exp` has one kernel for both.
Under autograd, where rounding is moot, the fused operators are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    if torch.is_grad_enabled():
        return torch.sigmoid(x)
    return (1 + torch.exp(-x)).reciprocal()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return F.silu(x) if torch.is_grad_enabled() else x * sigmoid(x)


def log_sigmoid(x: Tensor) -> Tensor:
    """-log(1 + exp(-x))."""
    if torch.is_grad_enabled():
        return F.logsigmoid(x)
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def tanh(x: Tensor) -> Tensor:
    """2 sigmoid(2 x) - 1."""
    return torch.tanh(x) if torch.is_grad_enabled() else 2 * sigmoid(2 * x) - 1
