"""Training speed of one layer: forward and backward, as shipped and by plainer forms of the same.

The layer is the first of a model with a recurrent mixer: norm, mixer, residual neuron, norm, feed
forward, residual neuron. All forms share its weights and differ in the order of the work alone,
which float64 shows before the clock runs. B sequences, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig, load_model_config
from spikelm.errors import BackendError, ConfigError
from spikelm.kernels import native
from spikelm.kernels.delta import delta_step
from spikelm.kernels.gla import gla_step
from spikelm.kernels.rwkv7 import rwkv7_step
from spikelm.kernels.wkv4 import wkv4_step
from spikelm.models.layers import Context, reset_parameters
from spikelm.models.mixers import delta, gla, rwkv7, wkv4
from spikelm.models.spikelm import LanguageModel, Layer
from spikelm.neurons import Neuron, neuron
from spikelm.neurons.lif import lif_loop

RECURRENT = ("wkv4", "gla", "delta", "rwkv7", "parallel", "parallel_full")
# Odd, so that chunks have a rest.
CHECK_BATCH, CHECK_TOKENS = 2, 37
# Of float64, in units of a tensor's largest entry; the forms differ by some 1e-12.
TOLERANCE = 1e-8

Form = Literal["shipped", "torch", "token_loop", "one_token_calls"]
Dtype = Literal["float32", "bfloat16"]
FORMS: tuple[Form, ...] = get_args(Form)
NO_NEURONS = "no_neurons"
"""The shipped form of the same layer without its neurons: another function, timed beside them."""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

_log = logging.getLogger(__name__)

Step = Callable[..., tuple[Tensor, Any]]
"""(tensors of one token, the state before) -> (out, the state after)."""


def bench_block(
    model: str,
    *,
    batch: int = 4,
    tokens: int = 1024,
    call_tokens: int | None = None,
    repeats: int = 5,
    dtype: Dtype = "float32",
) -> dict[str, Any]:
    """Medians over `repeats` runs of every form, in turns on the CPU, as JSON types.

    shipped: the fastest form there is. torch: without native code; left out where the layer has
    none. token_loop: recurrences and LIF neurons one token after the other, everything else for
    all tokens at once. one_token_calls: the layer called as in decode, once per token, and the
    gradient taken back through all calls; it sees `call_tokens` tokens (`tokens`). no_neurons: the
    shipped form of the layer's dense twin, where the layer has neurons. `dtype` bfloat16 is
    autocast.

    Raises: ConfigError for an unknown model, one without a recurrent mixer, or a number that is
    not positive; BackendError if the forms do not agree in every output and gradient.
    """
    call_tokens = tokens if call_tokens is None else call_tokens
    numbers = {"batch": batch, "tokens": tokens, "call tokens": call_tokens, "repeats": repeats}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} given; allowed: an integer >= 1")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype} given; allowed: {', '.join(DTYPES)}")
    config = load_model_config(model)
    index = _first_recurrent(model, config)
    layer = _build(config, index)
    forms = [f for f in FORMS if f != "torch" or _runs_natively(config.mixers[index], layer)]
    difference = check(layer, config.width, forms)
    layer.float()
    timed: dict[str, tuple[Layer, Form]] = {form: (layer, form) for form in forms}
    if any(isinstance(m, Neuron) and m.config.kind != "off" for m in layer.modules()):
        timed[NO_NEURONS] = _build(config.dense_twin(), index).float(), "shipped"
    lengths = {name: call_tokens if name == "one_token_calls" else tokens for name in timed}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats):
        for name, (timed_layer, form) in timed.items():
            x, grad = _draw(batch, lengths[name], config.width, torch.float32)
            start = perf_counter()
            run(timed_layer, x, grad, form, dtype)
            seconds[name].append(perf_counter() - start)
            _log.info("run %d/%d, %s: %.2f s", repeat + 1, repeats, name, seconds[name][-1])
    rates = {name: batch * lengths[name] / statistics.median(seconds[name]) for name in timed}
    return {
        "model": model,
        "layer": index,
        "mixer": config.mixers[index],
        "width": config.width,
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
        "batch": batch,
        "dtype": dtype,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "native": {"unavailable": native.unavailable(), "in_layer": "torch" in forms},
        "largest_difference": difference,
        "measurements": [
            {
                "form": name,
                "tokens": lengths[name],
                "seconds": seconds[name],
                "tokens_per_second": rates[name],
                "shipped_over_this": rates["shipped"] / rates[name],
            }
            for name in timed
        ],
    }


def check(layer: Layer, width: int, forms: Sequence[Form] = FORMS) -> float:
    """Compares outputs and all gradients of the forms in float64, which the layer must be in.

    Returns the largest difference from `token_loop`, in units of each tensor's largest entry.
    Raises: BackendError if it is not rounding.
    """
    x, grad = _draw(CHECK_BATCH, CHECK_TOKENS, width, torch.float64)
    expected = run(layer, x, grad, "token_loop")
    largest = 0.0
    for form in forms:
        found = run(layer, x, grad, form)
        if found.keys() != expected.keys():
            names = ", ".join(sorted(found.keys() ^ expected.keys()))
            raise BackendError(f"{form} and token_loop disagree on what has a gradient: {names}")
        for name, tensor in found.items():
            error = (tensor - expected[name]).abs().max().item()
            error /= expected[name].abs().max().item() or 1.0
            if not error <= TOLERANCE:
                raise BackendError(
                    f"{form} and token_loop differ in {name} by {error:.1e} of its largest entry, "
                    f"allowed: {TOLERANCE:.0e}; times of different results mean nothing"
                )
            largest = max(largest, error)
    return largest


def run(
    layer: Layer, x: Tensor, grad: Tensor, form: Form, dtype: Dtype = "float32"
) -> dict[str, Tensor]:
    """Forward of x [B, T, D] from the empty state, and backward of `grad`, which y has.

    Returns `output` y [B, T, D] and by their names the gradients of the input and the parameters.
    """
    x = x.detach().requires_grad_()
    B, T, _ = x.shape
    position = torch.arange(T).expand(B, -1)
    size = 1 if form == "one_token_calls" else T
    state, outputs = layer.zero_state(B, x), []
    # The backward pass too asks whether there is native code.
    with _swapped(*_swaps(form)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            for part, at in zip(x.split(size, 1), position.split(size, 1), strict=True):
                y, state = layer(part, state, Context(at, None))
                outputs.append(y)
            y = torch.cat(outputs, 1)
        named = {"input": x, **dict(layer.named_parameters())}
        trained = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
        # An expert may see no token.
        grads = torch.autograd.grad(y, list(trained.values()), grad, allow_unused=True)
    found = {n: g for n, g in zip(trained, grads, strict=True) if g is not None}
    return {"output": y.detach(), **found}


def _first_recurrent(model: str, config: ModelConfig) -> int:
    for index, kind in enumerate(config.mixers):
        if kind in RECURRENT:
            return index
    raise ConfigError(
        f"{model} has no recurrent mixer, only {', '.join(sorted(set(config.mixers)))}; "
        f"allowed: a model with one of {', '.join(RECURRENT)}"
    )


def _build(config: ModelConfig, index: int) -> Layer:
    """Layer `index` in float64, its neurons named as in the model, in which everything is alive."""
    # Integers pass no gradient, so int8 keys and values would end it at every call.
    config = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, kv_bits=None)
    )
    with torch.device("meta"):
        layer = LanguageModel(config).layers[index]
    assert isinstance(layer, Layer)
    layer.to_empty(device="cpu").double().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in layer.modules():
            reset_parameters(module)
        for parameter in layer.parameters():
            # Some begin at zero, and others so small that no LIF neuron would fire.
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return layer


def _draw(B: int, T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and the gradient of the output, both [B, T, D]; always the same."""
    x, grad = torch.randn(2, B, T, D, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, grad


def _runs_natively(mixer: str, layer: Layer) -> bool:
    """Whether native code can be part of the shipped form: wkv4, LIF and adaptive integer neurons
    have some.
    """
    neurons = [m.config for m in layer.modules() if isinstance(m, Neuron)]
    compiled = any(
        c.kind == "lif" or (c.kind == "integer" and c.scale == "adaptive") for c in neurons
    )
    return native.unavailable() is None and (mixer == "wkv4" or compiled)


Swap = tuple[ModuleType, str, Callable[..., Any]]
"""(module, name of a function it calls, what it calls instead)."""


def _swaps(form: Form) -> list[Swap]:
    if form == "torch":
        return [(native, "serves", lambda x: False)]
    if form == "token_loop":
        return [
            (wkv4, "wkv4", _wkv4_loop),
            (gla, "gla", _loop(gla_step)),
            (delta, "delta_rule", _loop(delta_step)),
            (rwkv7, "rwkv7", _loop(rwkv7_step)),
            (neuron, "lif", lif_loop),
        ]
    return []


@contextlib.contextmanager
def _swapped(*swaps: Swap) -> Iterator[None]:
    """The modules call the other functions inside."""
    before = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    try:
        for module, name, function in swaps:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _walk(step: Step, inputs: Sequence[Tensor], state: Any) -> tuple[Tensor, Any]:
    """`step` for every token of the inputs [B, T, ...]."""
    outputs = []
    # unbind, as the backward of indexing would fill a whole tensor per token.
    for token in zip(*(x.unbind(1) for x in inputs), strict=True):
        out, state = step(*token, state)
        outputs.append(out)
    return torch.stack(outputs, 1), state


def _loop(step: Step) -> Callable[..., tuple[Tensor, Any]]:
    """`step` with the arguments of the form for many tokens; `decay_floor` only speeds that up."""

    def loop(
        *arguments: Any, decay_floor: float | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        *inputs, state, segment = arguments
        assert segment is None
        return _walk(functools.partial(step, **options), inputs, state)

    return loop


def _wkv4_loop(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: Any, segment: Tensor | None
) -> tuple[Tensor, Any]:
    assert segment is None
    return _walk(lambda k, v, state: wkv4_step(k, v, decay, bonus, state), (k, v), state)
