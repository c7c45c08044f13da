"""A spike train, the integers it stands for, and the product that only reads what fired.

Letters: S spike steps, K channels in, N channels out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.errors import CodingError


@dataclass(frozen=True, slots=True)
class Train:
    """Spikes over S steps; step s is worth `weights[s]`, low bit first."""

    spikes: Tensor
    """[S, ...] int8, in {0, 1} or {-1, 0, 1}."""
    weights: tuple[int, ...]
    """S integers: the train stands for sum_s weights[s] * spikes[s]."""
    saturated: int = 0
    """Counts that were clamped to the range of the code; they decode to its nearest end."""

    @property
    def steps(self) -> int:
        return len(self.weights)

    def counts(self) -> Tensor:
        """The integers the train stands for, [...] int64."""
        total = torch.zeros(self.spikes.shape[1:], dtype=torch.int64, device=self.spikes.device)
        for weight, spikes in zip(self.weights, self.spikes, strict=True):
            total += weight * spikes.long()
        return total


def event_matmul(train: Train, weight: Tensor) -> Tensor:
    """`counts @ weight.T` from the spikes alone: [..., K] by [N, K] integers gives [..., N] int64.

    Each step adds or subtracts the columns of the channels that fired in it and reads no other.
    Exact: a step's sums are integers below 2**53, which float64 products hold on every device.

    Raises: CodingError for a weight that is not [N, K] of at most 32-bit integers.
    """
    channels = train.spikes.shape[-1] if train.spikes.ndim > 1 else 0
    kinds = (torch.int8, torch.uint8, torch.int16, torch.int32)
    if weight.ndim != 2 or weight.shape[1] != channels or weight.dtype not in kinds:
        raise CodingError(
            f"weight is {weight.dtype} {list(weight.shape)}; "
            f"allowed: [N, {channels}] integers of 8 to 32 bits"
        )
    spikes = train.spikes.flatten(1, -2) if train.spikes.ndim > 2 else train.spikes[:, None]
    total = weight.new_zeros(spikes.shape[1], weight.shape[0], dtype=torch.int64)
    for value, step in zip(train.weights, spikes, strict=True):
        fired = step.any(dim=0).nonzero().flatten()
        total += value * (step[:, fired].double() @ weight[:, fired].double().T).long()
    return total.reshape(*train.spikes.shape[1:-1], weight.shape[0])


@dataclass(frozen=True, slots=True)
class Statistics:
    """How quiet a train is. The two fractions answer different questions; never mix them."""

    silent_fraction: float
    """Counts that are exactly zero: weight columns that need not be read at all."""
    slot_sparsity: float
    """Empty slots of the S x counts grid; means nothing without `steps`."""
    steps: int
    """S."""


def statistics(train: Train) -> Statistics:
    """Both silences of a train; one of no counts is wholly silent."""
    fired = train.spikes != 0
    size = fired[0].numel()
    if size == 0:
        return Statistics(1.0, 1.0, train.steps)
    return Statistics(
        silent_fraction=1 - int(fired.any(dim=0).sum()) / size,
        slot_sparsity=1 - int(fired.sum()) / fired.numel(),
        steps=train.steps,
    )
