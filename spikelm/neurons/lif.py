"""Leaky integrate-and-fire on the token axis (SpikeGPT, Zhu et al. 2023): one step per token."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.config import NeuronConfig
from spikelm.neurons.surrogate import fire


def lif_step(x: Tensor, v: Tensor, config: NeuronConfig) -> tuple[Tensor, Tensor]:
    """Charge, fire, reset for inputs x and membranes v of one shape. Returns (spikes, v).

    v += (x - v) / tau; spike = [v >= v_threshold]; hard reset v *= 1 - spike, soft reset
    v -= v_threshold * spike, with the reset's spike detached if the config says so.
    """
    v = v + (x - v) / config.tau
    spikes = fire(v - config.v_threshold, config.surrogate, config.alpha)
    fired = spikes.detach() if config.detach_reset else spikes
    v = (1 - fired) * v if config.reset == "zero" else v - config.v_threshold * fired
    return spikes, v


def lif(
    x: Tensor, v: Tensor, config: NeuronConfig, segment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lif_step` over tokens: x [B, T, C], membrane v [B, C]; a document starts at v = 0.

    `segment` [B, T] counts the documents begun in this call. Returns spikes [B, T, C] and v.
    """
    spikes = []
    for t in range(x.shape[1]):
        if segment is not None:
            begins = segment[:, t] > (segment[:, t - 1] if t else 0)
            v = v * ~begins[:, None]
        fired, v = lif_step(x[:, t], v, config)
        spikes.append(fired)
    return torch.stack(spikes, 1), v
