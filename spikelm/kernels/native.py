"""The compiled kernels in `native/`, called through ctypes: CPU, float32 and float64.

They exist where a C++ compiler did at installation; `unavailable` says why not, and whoever
dispatches runs its torch form then. SPIKELM_NATIVE=0 in the environment switches them off. Large
batches are split over torch's threads; nothing depends on that but the rounding of the sums over
sequences, in the gradients of constants. B sequences, T tokens, C channels; every tensor
contiguous and of one dtype.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from spikelm.config import NeuronConfig

# That of native/abi.cpp.
ABI = 11
SURROGATES = ("arctan", "sigmoid", "rectangle", "triangle", "fast_sigmoid", "gaussian")
"""In the order of the enumeration in native/lif.cpp."""

# Elements per thread that repay its start, which takes some 0.1 ms.
MIN_ELEMENTS = 2**19

_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}
_SIZES = [c_int64] * 3
_SIGNATURES = {
    "spikelm_lif_forward": [*_SIZES, *[c_void_p] * 6, c_int, *[c_void_p] * 2],
    "spikelm_lif_backward": [
        *_SIZES,
        *[c_void_p] * 6,
        *[c_int] * 4,
        c_double,
        *[c_void_p] * 6,
    ],
    "spikelm_integer_forward": [*_SIZES[:2], *[c_void_p] * 2, *[c_double] * 4, *[c_void_p] * 3],
    "spikelm_integer_backward": [*_SIZES[:2], *[c_void_p] * 2, *[c_double] * 5, *[c_void_p] * 3],
    "spikelm_integer_edges": [*_SIZES[:2], *[c_void_p] * 2, *[c_double] * 3, c_void_p],
    "spikelm_wkv4_forward": [*_SIZES, *[c_void_p] * 9],
    "spikelm_wkv4_backward": [*_SIZES, *[c_void_p] * 16],
}


def unavailable() -> str | None:
    """Why the library cannot be used; None if it can."""
    if os.environ.get("SPIKELM_NATIVE") == "0":
        return "switched off by SPIKELM_NATIVE=0"
    return _load()[1]


def serves(x: Tensor) -> bool:
    """Whether the kernels run on tensors of this device and dtype, here and now."""
    return x.device.type == "cpu" and x.dtype in _SUFFIXES and unavailable() is None


def library() -> Any:
    """The loaded library, for modules that declare functions of their own."""
    return _load()[0]


@functools.cache
def _load() -> tuple[Any, str | None]:
    """(the library, None), or (None, what is wrong)."""
    # Not imported, only found: an editable installation keeps the file away from the sources.
    spec = importlib.util.find_spec("spikelm.kernels._native")
    if spec is None or spec.origin is None:
        return None, "not built (no C++ compiler at installation)"
    try:
        library = ctypes.CDLL(spec.origin)
        if library.spikelm_abi() != ABI:
            return None, f"{spec.origin} is of another version; install spikelm anew"
        for name, arguments in _SIGNATURES.items():
            for suffix in _SUFFIXES.values():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError) as error:
        return None, f"cannot load {spec.origin}: {error}"
    return library, None


def _call(name: str, dtype: torch.dtype, *arguments: int | float | None) -> None:
    getattr(_load()[0], f"{name}_{_SUFFIXES[dtype]}")(*arguments)


def _by_rows(x: Tensor) -> list[slice]:
    """The rows of x, its first axis, in equal parts, one for each thread worth starting."""
    B = x.shape[0]
    parts = max(1, min(torch.get_num_threads(), B, x.numel() // MIN_ELEMENTS))
    edges = [B * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _run(parts: list[slice], kernel: Callable[[int, slice], None]) -> None:
    """The kernel on every part, at the same time: ctypes lets other threads run."""
    if len(parts) == 1:
        kernel(0, parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(kernel, range(len(parts)), parts))


def _at(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The address of the tensor, or a null pointer."""
    if tensor is None:
        return None
    given = tensor.device.type, tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()
    assert given == ("cpu", dtype, shape, True), (
        f"{given}, not contiguous {dtype} {shape} on the CPU"
    )
    return tensor.data_ptr()


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
    """`neurons.lif.lif` without gradients: x [B, T, C], v [B, C], the constants [C], begins
    bool [B, T]. Returns (spikes, v, the membranes before reset [B, T, C] if `keep`).
    """
    _, T, C = x.shape
    d = x.dtype
    v, spikes = v.clone(), torch.empty_like(x)
    before = torch.empty_like(x) if keep else None

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_lif_forward",
            d,
            *(n, T, C),
            _at(x[rows], d, n, T, C),
            _at(v[rows], d, n, C),
            *(_at(constant, d, C) for constant in (tau, v_threshold, softness)),
            _at(None if begins is None else begins[rows], torch.bool, n, T),
            config.reset == "zero",
            _at(spikes[rows], d, n, T, C),
            _at(None if before is None else before[rows], d, n, T, C),
        )

    _run(_by_rows(x), kernel)
    return spikes, v, before


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
    """The gradients of x, v and, if `learned`, of tau, v_threshold and softness [C].

    `before` as `lif_forward` kept it, v the initial membrane, grad_v that of the final one.
    """
    _, T, C = before.shape
    d = before.dtype
    parts = _by_rows(before)
    grad_v, grad_x = grad_v.clone(), torch.empty_like(before)
    grads = [
        before.new_zeros(len(parts), C) if learned and constant is not None else None
        for constant in (tau, v_threshold, softness)
    ]

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_lif_backward",
            d,
            *(n, T, C),
            _at(before[rows], d, n, T, C),
            _at(v[rows], d, n, C),
            *(_at(constant, d, C) for constant in (tau, v_threshold, softness)),
            _at(None if begins is None else begins[rows], torch.bool, n, T),
            config.reset == "zero",
            config.detach_reset,
            config.detach_membrane,
            SURROGATES.index(config.surrogate),
            config.alpha,
            _at(grad_spikes[rows], d, n, T, C),
            _at(grad_v[rows], d, n, C),
            _at(grad_x[rows], d, n, T, C),
            *(_at(None if grad is None else grad[part], d, C) for grad in grads),
        )

    _run(parts, kernel)
    of_tau, of_threshold, of_softness = (None if g is None else g.sum(0) for g in grads)
    return grad_x, grad_v, of_tau, of_threshold, of_softness


def integer_forward(
    x: Tensor, dead_zone: Tensor, k: float, power: float, limits: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`neurons.integer.integer_spike` without gradients: x [R, C], dead_zone [C], the lowest and
    highest count. Returns (values, counts [R, C], v_threshold [R]).
    """
    _, C = x.shape
    d = x.dtype
    values, counts, v_threshold = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0])

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_integer_forward",
            d,
            *(n, C),
            _at(x[rows], d, n, C),
            _at(dead_zone, d, C),
            *(k, power, *limits),
            *(_at(y[rows], d, n, C) for y in (values, counts)),
            _at(v_threshold[rows], d, n),
        )

    _run(_by_rows(x), kernel)
    return values, counts, v_threshold


def integer_backward(
    x: Tensor,
    dead_zone: Tensor,
    k: float,
    power: float,
    limits: tuple[float, float],
    band: float,
    grad: Tensor,
    learned: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x [R, C] and, if `learned`, of dead_zone [C], from those of the values."""
    _, C = x.shape
    d = x.dtype
    parts = _by_rows(x)
    grad_x = torch.empty_like(x)
    grad_zone = x.new_zeros(len(parts), C) if learned else None

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_integer_backward",
            d,
            *(n, C),
            _at(x[rows], d, n, C),
            _at(dead_zone, d, C),
            *(k, power, *limits, band),
            *(_at(y[rows], d, n, C) for y in (grad, grad_x)),
            _at(None if grad_zone is None else grad_zone[part], d, C),
        )

    _run(parts, kernel)
    return grad_x, None if grad_zone is None else grad_zone.sum(0)


def integer_edges(x: Tensor, dead_zone: Tensor, power: float, lowest: float, band: float) -> Tensor:
    """`neurons.integer.edge_counts` [C] of x [R, C]."""
    _, C = x.shape
    d = x.dtype
    parts = _by_rows(x)
    near = x.new_zeros(len(parts), C)

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_integer_edges",
            d,
            *(n, C),
            _at(x[rows], d, n, C),
            _at(dead_zone, d, C),
            *(power, lowest, band),
            _at(near[part], d, C),
        )

    _run(parts, kernel)
    return near.sum(0)


def wkv4_forward(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    begins: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """`wkv4.wkv4` without gradients; begins bool [B, T]."""
    _, T, C = k.shape
    d = k.dtype
    out = torch.empty_like(k)
    p, q, o = (x.clone() for x in state)

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_wkv4_forward",
            d,
            *(n, T, C),
            *(_at(x[rows], d, n, T, C) for x in (k, v)),
            *(_at(x, d, C) for x in (decay, bonus)),
            *(_at(x[rows], d, n, C) for x in (p, q, o)),
            _at(None if begins is None else begins[rows], torch.bool, n, T),
            _at(out[rows], d, n, T, C),
        )

    _run(_by_rows(k), kernel)
    return out, (p, q, o)


def wkv4_backward(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    begins: Tensor | None,
    grad: Tensor,
    grad_p: Tensor,
    grad_q: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of k, v, decay, bonus, p, q and o, from those of out and of the final p, q."""
    _, T, C = k.shape
    d = k.dtype
    parts = _by_rows(k)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    grad_decay, grad_bonus = k.new_zeros(len(parts), C), k.new_zeros(len(parts), C)
    grad_p, grad_q, grad_o = grad_p.clone(), grad_q.clone(), torch.empty_like(state[2])

    def kernel(part: int, rows: slice) -> None:
        n = rows.stop - rows.start
        _call(
            "spikelm_wkv4_backward",
            d,
            *(n, T, C),
            *(_at(x[rows], d, n, T, C) for x in (k, v)),
            *(_at(x, d, C) for x in (decay, bonus)),
            *(_at(x[rows], d, n, C) for x in state),
            _at(None if begins is None else begins[rows], torch.bool, n, T),
            _at(grad[rows], d, n, T, C),
            *(_at(x[rows], d, n, C) for x in (grad_p, grad_q, grad_o)),
            *(_at(x[rows], d, n, T, C) for x in (grad_k, grad_v)),
            *(_at(x[part], d, C) for x in (grad_decay, grad_bonus)),
        )

    _run(parts, kernel)
    return grad_k, grad_v, grad_decay.sum(0), grad_bonus.sum(0), grad_p, grad_q, grad_o
