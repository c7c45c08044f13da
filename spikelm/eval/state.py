"""What spiking queries and keys save of the state: bytes touched, time, and digits it costs.

Layers of the delta rule alone, without matrices: queries and keys are drawn with a chosen share of
channels that spike. The same tokens go through the native step that touches the rows of spikes and
leaves the decays of the others pending, through the native step that decays every row of every
token, and through the dense step in float64.

H heads, K key and V value channels.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from spikelm.decoder.lower import MAX_HEAD
from spikelm.decoder.program import Code, Program
from spikelm.errors import BackendError, ConfigError
from spikelm.kernels import native
from spikelm.kernels.activation import sigmoid
from spikelm.kernels.delta import delta_step
from spikelm.kernels.lazy import settled
from spikelm.models.mixers.delta import UNIT_EPS
from spikelm.state import State

NORM_EPS, DECAY_FLOOR = 1e-6, -1.0
# Tokens of a turn, before the other contestant's.
TURN = 8
FORMS = ("lazy", "dense")


def bench_state(
    *,
    num_heads: int = 16,
    key_dim: int = 128,
    value_dim: int = 128,
    num_layers: int = 24,
    spiking: Sequence[float] = (0.1, 0.2, 0.3, 1.0),
    tokens: int = 256,
    threads: int = 1,
) -> dict[str, Any]:
    """Of each share of `spiking` channels: bytes of state per token, median times and the largest
    deviation from float64, as JSON types. Decays are per key channel, erase and write rates split.

    Raises: ConfigError for what is not allowed, BackendError without native code.
    """
    for name, count in (("heads", num_heads), ("layers", num_layers), ("threads", threads)):
        if count < 1:
            raise ConfigError(f"{name}: {count} given; allowed: an integer >= 1")
    for name, count in (("key channels", key_dim), ("value channels", value_dim)):
        if not 1 <= count <= MAX_HEAD:
            raise ConfigError(f"{name}: {count} given; allowed: 1 to {MAX_HEAD}")
    most = num_heads * value_dim
    if not TURN <= tokens <= most:
        raise ConfigError(f"tokens: {tokens} given; allowed: {TURN} to {most}, heads x values")
    for share in spiking:
        if not 0 < share <= 1:
            raise ConfigError(f"spiking: {share} given; allowed: 0 < share <= 1")
    if (obstacle := native.unavailable()) is not None:
        raise BackendError(f"no native code: {obstacle}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shape = num_heads, key_dim, value_dim
        rows = [_measure(_Layer(*shape, share, tokens), num_layers) for share in spiking]
    finally:
        torch.set_num_threads(before)
    return {
        "num_heads": num_heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "num_layers": num_layers,
        "tokens": tokens,
        "threads": threads,
        "measurements": rows,
    }


class _Layer:
    """The tokens of one layer: everything a step of the delta rule takes."""

    def __init__(self, H: int, K: int, V: int, share: float, tokens: int) -> None:
        self.shape = self.H, self.K, self.V = H, K, V
        self.sizes = [H * K, H * K, H * V, H * K, H * K, H * V, H * V]
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(tokens, sum(self.sizes), generator=generator)
        spikes = torch.rand(tokens, 2 * H * K, generator=generator) < share
        self.inputs[:, : 2 * H * K] *= spikes
        self.bias = torch.zeros(sum(self.sizes[3:]))
        # As the mixer begins: half-lives from a few tokens to a few hundred.
        self.bias[: H * K] = torch.linspace(-6.0, -1.0, H * K)

    def program(self, layers: int, *, lazy: bool) -> Program:
        """Its native steps, `layers` times over states of their own."""
        program = Program()
        at, out = program.vector(sum(self.sizes)), program.vector(self.H * self.V)
        program.emit(
            Code.EMBED, "inputs", size=[sum(self.sizes)], at=[at], data=[self.inputs.contiguous()]
        )
        weight = torch.ones(self.V)
        for layer in range(layers):
            program.barrier()
            names = ("S", "pending") if lazy else ("S",)
            program.emit(
                Code.DELTA,
                "delta",
                size=[*self.shape, self.K, self.K, self.V],
                at=[at, at + sum(self.sizes[:3]), out],
                state=[program.state(layer, name) for name in names],
                number=[DECAY_FLOOR, UNIT_EPS, NORM_EPS],
                data=[self.bias, weight],
            )
        program.finish(out, self.H * self.V)
        return program

    def zero_state(self, layers: int) -> State:
        H, K, V = self.shape
        empty = [
            {"S": torch.zeros(1, H, K, V), "pending": torch.zeros(1, H, K)} for _ in range(layers)
        ]
        return State(tuple(empty), torch.zeros(1, dtype=torch.int64))

    def reference(self) -> tuple[Tensor, Tensor]:
        """Outputs [T, H V] and final state [1, H, K, V] of the dense step in float64."""
        inputs = self.inputs.double()
        inputs[:, sum(self.sizes[:3]) :] += self.bias.double()
        parts = [x.unflatten(-1, (self.H, -1)) for x in inputs.split(self.sizes, -1)]
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS) for x in parts[:2])
        decay, erase, write, gate = (sigmoid(x) for x in parts[3:])
        state, outputs = inputs.new_zeros(1, *self.shape), []
        for t in range(len(inputs)):
            token = (x[t : t + 1] for x in (q, k, parts[2], DECAY_FLOOR * decay, erase, write))
            q_t, k_t, v_t, log_decay, b, w = token
            out, state = delta_step(q_t, k_t, v_t, log_decay, b, w, state)
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + NORM_EPS)
            outputs.append((out[0] * gate[t]).flatten())
        return torch.stack(outputs), state


def _measure(layer: _Layer, num_layers: int) -> dict[str, Any]:
    tokens = len(layer.inputs)
    programs = {form: layer.program(num_layers, lazy=form == "lazy") for form in FORMS}
    states = {form: layer.zero_state(num_layers) for form in FORMS}
    touched = dense = 0
    outputs: dict[str, list[Tensor]] = {form: [] for form in FORMS}
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for start in range(0, tokens, TURN):
        for form in FORMS:
            for t in range(start, min(start + TURN, tokens)):
                token = torch.tensor([t])
                wall, cpu = perf_counter(), process_time()
                out, counts = programs[form].run(token, states[form])
                times[form].append((perf_counter() - wall, process_time() - cpu))
                if form == "lazy":
                    touched += counts.state_bytes
                    dense += counts.dense_state_bytes
                outputs[form].append(out[0])
    expected, expected_state = layer.reference()
    deviations = {}
    for form in FORMS:
        kept = states[form].layers[-1]
        state = settled(kept["S"].double(), kept["pending"].double())
        deviations[form] = {
            "outputs": _deviation(torch.stack(outputs[form]), expected),
            "state": _deviation(state, expected_state),
        }
    keys = layer.H * layer.K
    q, k = (part != 0 for part in layer.inputs[:, : 2 * keys].split(keys, -1))
    return {
        "query_fraction": q.float().mean().item(),
        "key_fraction": k.float().mean().item(),
        "union_fraction": (q | k).float().mean().item(),
        "state_bytes": sum(kept["S"].nbytes for kept in states["lazy"].layers),
        "bytes_per_token": touched / tokens,
        "dense_bytes_per_token": dense / tokens,
        **{
            form: {
                "ms_per_token": 1e3 * statistics.median(wall for wall, _ in times[form]),
                "cpu_ms_per_token": 1e3 * statistics.median(cpu for _, cpu in times[form]),
                "deviation": deviations[form],
            }
            for form in FORMS
        },
    }


def _deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
