"""Leaky integrate-and-fire on the token axis (SpikeGPT, Zhu et al. 2023): one step per token.

    u_t = v_{t-1} + (x_t - v_{t-1}) / tau         charge
    s_t = [u_t >= v_threshold]                    fire
    v_t = (1 - s_t) u_t  or  u_t - v_threshold s_t    hard or soft reset

The gradient of the spike is a surrogate's. With `softness` eps the spike is instead
s_t = sigmoid((u_t - v_threshold) / eps), the derivative of the soft maximum
eps log(1 + exp((u_t - v_threshold) / eps)), forward and backward alike (UltraLIF, Minoza 2026);
eps -> 0 is the threshold. That paper's own membrane equation could not be recovered, so this is
its threshold on the membrane above. B sequences, T tokens, C channels.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikelm.config import NeuronConfig
from spikelm.kernels import native
from spikelm.kernels.documents import first_tokens
from spikelm.neurons.surrogate import fire


class LIFConstants(NamedTuple):
    """What a LIF neuron may learn; each a scalar or [C]."""

    tau: Tensor
    """Membrane time constant in tokens, >= 1."""
    v_threshold: Tensor
    """Firing threshold, > 0."""
    softness: Tensor | None
    """Temperature eps > 0 of the soft threshold; None is the hard one."""

    @staticmethod
    def of(config: NeuronConfig, like: Tensor) -> LIFConstants:
        """The configured values, on the device and in the dtype of `like`."""
        softness = None if config.softness is None else like.new_full((), config.softness)
        return LIFConstants(
            like.new_full((), config.tau), like.new_full((), config.v_threshold), softness
        )


def lif_step(
    x: Tensor, v: Tensor, config: NeuronConfig, constants: LIFConstants | None = None
) -> tuple[Tensor, Tensor]:
    """Charge, fire, reset for inputs x and membranes v [..., C]. Returns (spikes, v).

    `detach_reset` stops the gradient through the reset's spike, `detach_membrane` the one through
    the membrane that earlier tokens left (SLTT, Meng et al. 2023). The constants default to those
    of the configuration.
    """
    tau, v_threshold, softness = constants or LIFConstants.of(config, x)
    v = v.detach() if config.detach_membrane else v
    u = v + (x - v) / tau
    if softness is None:
        spikes = fire(u - v_threshold, config.surrogate, config.alpha)
    else:
        spikes = torch.sigmoid((u - v_threshold) / softness)
    fired = spikes.detach() if config.detach_reset else spikes
    return spikes, (1 - fired) * u if config.reset == "zero" else u - v_threshold * fired


def lif_loop(
    x: Tensor,
    v: Tensor,
    config: NeuronConfig,
    begins: Tensor | None = None,
    constants: LIFConstants | None = None,
) -> tuple[Tensor, Tensor]:
    """`lif_step` over tokens in torch: what the kernels must equal, gradients included.

    x [B, T, C], v [B, C], begins [B, T] true at tokens before which the membrane becomes 0.
    """
    constants = constants or LIFConstants.of(config, x)
    spikes = []
    for t, token in enumerate(x.unbind(1)):
        if begins is not None:
            v = v * ~begins[:, t, None]
        fired, v = lif_step(token, v, config, constants)
        spikes.append(fired)
    return torch.stack(spikes, 1), v


def lif(
    x: Tensor,
    v: Tensor,
    config: NeuronConfig,
    segment: Tensor | None = None,
    constants: LIFConstants | None = None,
) -> tuple[Tensor, Tensor]:
    """`lif_step` over tokens: x [B, T, C], membrane v [B, C]; a document starts at v = 0.

    `segment` [B, T] counts the documents begun in this call. Returns spikes [B, T, C] and v.
    Gradients reach x, v and the constants. Native code runs it on the CPU and Triton on CUDA, where
    they are there, else `lif_loop`; without `softness` all give the same bits, so that prefill
    and decode fire alike. For the backward pass the kernels keep one tensor, the membranes
    before reset u [B, T, C], and recompute the rest from it.
    """
    begins = None if segment is None else first_tokens(segment)
    constants = constants or LIFConstants.of(config, x)
    kernels = _kernels(x)
    if kernels is None:
        return lif_loop(x, v, config, begins, constants)
    x, v = x.contiguous(), v.contiguous()
    tau, v_threshold, softness = (
        None if c is None else c.expand(x.shape[-1]).contiguous() for c in constants
    )
    assert tau is not None
    assert v_threshold is not None
    if torch.is_grad_enabled():
        spikes, v = _LIF.apply(  # type: ignore[no-untyped-call]
            kernels, config, begins, x, v, tau, v_threshold, softness
        )
        return spikes, v
    spikes, v, _ = kernels.lif_forward(x, v, tau, v_threshold, softness, begins, config, False)
    return spikes, v


class _Kernels(Protocol):
    """A compiled form: `kernels.native` documents the two functions."""

    def lif_forward(
        self,
        x: Tensor,
        v: Tensor,
        tau: Tensor,
        v_threshold: Tensor,
        softness: Tensor | None,
        begins: Tensor | None,
        config: NeuronConfig,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def lif_backward(
        self,
        before: Tensor,
        v: Tensor,
        tau: Tensor,
        v_threshold: Tensor,
        softness: Tensor | None,
        begins: Tensor | None,
        config: NeuronConfig,
        grad_spikes: Tensor,
        grad_v: Tensor,
        learned: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]: ...


def _kernels(x: Tensor) -> _Kernels | None:
    """The compiled form for tensors like x; None if there is none."""
    if native.serves(x):
        return native
    if x.is_cuda and x.dtype in (torch.float32, torch.float64) and find_spec("triton"):
        return cast(_Kernels, import_module("spikelm.kernels.triton_lif"))
    return None


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: _Kernels,
        config: NeuronConfig,
        begins: Tensor | None,
        x: Tensor,
        v: Tensor,
        tau: Tensor,
        v_threshold: Tensor,
        softness: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        constants = tau, v_threshold, softness
        keep = any(ctx.needs_input_grad)
        spikes, after, before = kernels.lif_forward(x, v, *constants, begins, config, keep)
        ctx.kernels, ctx.config = kernels, config
        ctx.save_for_backward(before, v, *constants, begins)
        return spikes, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.kernels.lif_backward(
            *ctx.saved_tensors,
            ctx.config,
            grad_spikes.contiguous(),
            grad_v.contiguous(),
            any(ctx.needs_input_grad[5:]),
        )
        return None, None, None, *grads
