"""Leaky integrate-and-fire on CUDA: the two functions of `native` as Triton kernels.

One program walks the tokens of one sequence for a block of channels, with the membrane in
registers. float32 and float64; spikes and membranes have the bits of `neurons.lif.lif_step`: the
division is rounded to nearest, and products are not fused with sums. Only Triton's builtins are
called, so that the kernels also run interpreted. B sequences, T tokens, C channels.
"""

# Triton reads annotations as code, so the arguments of kernels have none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import contextlib

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from spikelm.config import NeuronConfig

BLOCK = 64


@triton.jit
def _divide(x, y):
    """x / y rounded to nearest; in float32 the bare operator is an approximation."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _logistic(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _fire(u, threshold, softness, SOFT: tl.constexpr):
    if SOFT:
        return _logistic((u - threshold) / softness)
    return tl.where(u - threshold >= 0, 1.0, 0.0).to(u.dtype)


@triton.jit
def _reset(u, s, threshold, HARD: tl.constexpr):
    if HARD:
        return (1 - s) * u
    return u - threshold * s


@triton.jit
def _slope(x, surrogate: tl.constexpr, alpha: tl.constexpr):
    """The derivatives of `neurons.surrogate`."""
    if surrogate == "arctan":
        z = 1.5707963267948966 * alpha * x
        return alpha / (2 * (1 + z * z))
    elif surrogate == "sigmoid":
        s = _logistic(alpha * x)
        return alpha * s * (1 - s)
    elif surrogate == "rectangle":
        return alpha * tl.where(tl.abs(x) < 0.5 / alpha, 1.0, 0.0).to(x.dtype)
    elif surrogate == "triangle":
        return alpha * tl.maximum(1 - alpha * tl.abs(x), 0.0)
    elif surrogate == "fast_sigmoid":
        z = 1 + alpha * tl.abs(x)
        return alpha / (2 * z * z)
    else:
        z = alpha * x
        return alpha * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _forward(
    x,
    v,
    tau,
    threshold,
    softness,
    begins,
    spikes,
    after,
    before,
    T,
    C,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = c < C
    membrane = tl.load(v + b * C + c, mask=mask, other=0.0)
    tau_c = tl.load(tau + c, mask=mask, other=1.0)
    threshold_c = tl.load(threshold + c, mask=mask, other=1.0)
    softness_c = tl.load(softness + c, mask=mask, other=1.0)
    at = b * T * C + c
    for t in range(T):
        if PACKED:
            first = tl.load(begins + b * T + t) != 0
            membrane = tl.where(first, 0.0, membrane).to(membrane.dtype)
        u = membrane + _divide(tl.load(x + at, mask=mask, other=0.0) - membrane, tau_c)
        s = _fire(u, threshold_c, softness_c, SOFT)
        tl.store(spikes + at, s, mask=mask)
        if KEEP:
            tl.store(before + at, u, mask=mask)
        membrane = _reset(u, s, threshold_c, HARD)
        at += C
    tl.store(after + b * C + c, membrane, mask=mask)


@triton.jit
def _backward(
    before,
    v,
    tau,
    threshold,
    softness,
    begins,
    grad_spikes,
    grad_v,
    grad_x,
    grad_constants,
    T,
    C,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    PACKED: tl.constexpr,
    LEARNED: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    DETACH_MEMBRANE: tl.constexpr,
    surrogate: tl.constexpr,
    alpha: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """grad_v becomes the initial membrane's gradient; grad_constants is [3, B, C]."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = c < C
    g = tl.load(grad_v + b * C + c, mask=mask, other=0.0)
    tau_c = tl.load(tau + c, mask=mask, other=1.0)
    threshold_c = tl.load(threshold + c, mask=mask, other=1.0)
    softness_c = tl.load(softness + c, mask=mask, other=1.0)
    zero = tl.full((WIDTH,), 0.0, g.dtype)
    of_tau, of_threshold, of_softness = zero, zero, zero
    at = (b * T + T - 1) * C + c
    u = tl.load(before + at, mask=mask, other=0.0)
    for i in range(T):
        t = T - 1 - i
        s = _fire(u, threshold_c, softness_c, SOFT)
        slope = s * (1 - s) / softness_c if SOFT else _slope(u - threshold_c, surrogate, alpha)
        through = tl.load(grad_spikes + at, mask=mask, other=0.0)
        if not DETACH_RESET:
            through -= g * (u if HARD else threshold_c)
        through = through * slope
        of_threshold -= through
        if SOFT:
            of_softness -= through * (u - threshold_c) / softness_c
        if HARD:
            gu = g * (1 - s) + through
        else:
            gu = g + through
            of_threshold -= g * s
        gx = gu / tau_c
        tl.store(grad_x + at, gx, mask=mask)
        # The membrane that the token found: u - v = (x - v) / tau gives the gradient of tau.
        # The comparison is a vector, as a loop counter is a plain int when interpreted.
        inner = tl.full((WIDTH,), 0, tl.int32) + t > 0
        earlier = tl.load(before + at - C, mask=mask & inner, other=0.0)
        fired = _fire(earlier, threshold_c, softness_c, SOFT)
        initial = tl.load(v + b * C + c, mask=mask, other=0.0)
        found = tl.where(inner, _reset(earlier, fired, threshold_c, HARD), initial)
        g = zero if DETACH_MEMBRANE else gu - gx
        if PACKED:
            first = tl.load(begins + b * T + t) != 0
            found = tl.where(first, 0.0, found).to(found.dtype)
            g = tl.where(first, 0.0, g).to(g.dtype)
        of_tau -= gx * (u - found)
        u = earlier
        at -= C
    tl.store(grad_v + b * C + c, g, mask=mask)
    if LEARNED:
        size = tl.num_programs(0) * C
        tl.store(grad_constants + b * C + c, of_tau, mask=mask)
        tl.store(grad_constants + size + b * C + c, of_threshold, mask=mask)
        tl.store(grad_constants + 2 * size + b * C + c, of_softness, mask=mask)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def lif_forward(
    x: Tensor,
    v: Tensor,
    tau: Tensor,
    v_threshold: Tensor,
    softness: Tensor | None,
    begins: Tensor | None,
    config: NeuronConfig,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `native.lif_forward`."""
    B, T, C = x.shape
    spikes, after = torch.empty_like(x), torch.empty_like(v)
    before = torch.empty_like(x) if keep else None
    # A pointer that the kernel does not read may be any.
    with _device_of(x):
        _forward[B, triton.cdiv(C, BLOCK)](
            x,
            v,
            tau,
            v_threshold,
            tau if softness is None else softness,
            x if begins is None else begins.view(torch.uint8),
            spikes,
            after,
            x if before is None else before,
            T,
            C,
            HARD=config.reset == "zero",
            SOFT=softness is not None,
            PACKED=begins is not None,
            KEEP=keep,
            WIDTH=BLOCK,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return spikes, after, before


def lif_backward(
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `native.lif_backward`."""
    B, T, C = before.shape
    grad_v, grad_x = grad_v.clone(), torch.empty_like(before)
    grads = before.new_empty(3, B, C) if learned else None
    with _device_of(before):
        _backward[B, triton.cdiv(C, BLOCK)](
            before,
            v,
            tau,
            v_threshold,
            tau if softness is None else softness,
            before if begins is None else begins.view(torch.uint8),
            grad_spikes,
            grad_v,
            grad_x,
            before if grads is None else grads,
            T,
            C,
            HARD=config.reset == "zero",
            SOFT=softness is not None,
            PACKED=begins is not None,
            LEARNED=learned,
            DETACH_RESET=config.detach_reset,
            DETACH_MEMBRANE=config.detach_membrane,
            surrogate=config.surrogate,
            alpha=config.alpha,
            WIDTH=BLOCK,
            num_warps=1,
            enable_fp_fusion=False,
        )
    if grads is None:
        return grad_x, grad_v, None, None, None
    of_tau, of_threshold, of_softness = grads.sum(1)
    return grad_x, grad_v, of_tau, of_threshold, None if softness is None else of_softness
