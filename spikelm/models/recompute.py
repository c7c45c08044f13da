"""Activation checkpointing: a part of the model is computed again in the backward pass.

Only its input is kept from the forward pass, so memory falls by what the part would have saved and
its time grows by one more forward (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spikelm.models.layers import Context
from spikelm.neurons import Neuron, Probe, Spikes

Result = TypeVar("Result")


@runtime_checkable
class DifferentiableProbe(Protocol):
    """A probe that computes terms of the loss."""

    def repeat(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        """The differentiable part of a call once more, in the backward pass; what comes out is
        dropped. Autograd wants to see as many tensors saved as before.
        """


def recomputed(
    function: Callable[[Tensor, Context], Result], x: Tensor, context: Context
) -> Result:
    """`function(x, context)`, whose activations the backward pass computes again.

    Probes and the terms of the loss that layers add see the first pass alone.
    """
    if not torch.is_grad_enabled():
        return function(x, context)
    passes = itertools.count()
    shared = dict(context.shared)
    probe = context.probe
    repeat: Probe | None = probe.repeat if isinstance(probe, DifferentiableProbe) else None

    def run(x: Tensor) -> Result:
        if next(passes) == 0:
            return function(x, context)
        losses: list[Tensor] | None = None if context.losses is None else []
        again = dataclasses.replace(context, probe=repeat, losses=losses, shared=dict(shared))
        return function(x, again)

    result: Result = checkpoint(run, x, use_reentrant=False)
    return result
