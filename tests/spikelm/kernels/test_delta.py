from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from spikelm.kernels import reference
from spikelm.kernels.delta import delta_rule, delta_step

B, H, K, V = 2, 2, 4, 3
MEMBERS = [(decay, gates) for decay in ("none", "scalar", "channel") for gates in ("tied", "split")]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(T: int, decay: str, gates: str, strongest: float = 1.0, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=g)

    q, k = normal(B, T, H, K), F.normalize(normal(B, T, H, K), dim=-1)
    v, state = normal(B, T, H, V), normal(B, H, K, V)
    rate = {"none": 0, "scalar": 1, "channel": K}[decay]
    log_decay = -strongest * uniform(B, T, H, rate) if rate else q.new_zeros(B, T, H, 1)
    erase = uniform(B, T, H, K if gates == "split" else 1)
    write = uniform(B, T, H, V) if gates == "split" else erase
    return q, k, v, log_decay, erase, write, state


def outcome(function: Callable[..., tuple[Tensor, Tensor]], tensors: Inputs) -> list[Tensor]:
    """Outputs, final state and the gradients of every input under a fixed random loss."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, state = function(*leaves)
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=g)).sum() for x in (out, state)
    )
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def documents(T: int, seed: int = 2) -> Tensor:
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.05
    reset[0, T // 2] = True
    return reset


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65])
@pytest.mark.parametrize(("decay", "gates"), MEMBERS)
def test_chunkwise_equals_the_loop(T: int, decay: str, gates: str) -> None:
    tensors = inputs(T, decay, gates)
    expected = outcome(reference.delta_rule, tensors)
    assert_same(outcome(delta_rule, tensors), expected)
    assert_same(outcome(lambda *x: delta_rule(*x, decay_floor=-1.0), tensors), expected)


@pytest.mark.parametrize(("decay", "gates"), MEMBERS)
def test_chunkwise_equals_the_loop_over_1000_tokens(decay: str, gates: str) -> None:
    tensors = inputs(1000, decay, gates)
    expected = outcome(reference.delta_rule, tensors)
    assert_same(outcome(lambda *x: delta_rule(*x, decay_floor=-1.0), tensors), expected)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("floor", [None, -1.0, -9.0])
def test_packed_documents(T: int, floor: float | None) -> None:
    tensors, reset = inputs(T, "channel", "split"), documents(T)
    segment = reset.long().cumsum(1)
    assert_same(
        outcome(lambda *x: delta_rule(*x, segment, decay_floor=floor), tensors),
        outcome(lambda *x: reference.delta_rule(*x, reset), tensors),
    )


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_any_decay_without_a_floor(decay: str) -> None:
    tensors = inputs(130, decay, "split", strongest=50.0)
    assert_same(outcome(delta_rule, tensors), outcome(reference.delta_rule, tensors))


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("extreme", [0.0, -1e4, -math.inf])
def test_extreme_decays_in_float32(decay: str, extreme: float) -> None:
    # Weak decays between strong ones: a difference of long sums would lose them.
    q, k, v, log_decay, *rest = (x.float() for x in inputs(130, decay, "split", strongest=0.05))
    strong = torch.rand(log_decay.shape) < 0.2
    tensors = (q, k, v, log_decay.masked_fill(strong, extreme), *rest)
    expected = outcome(reference.delta_rule, tuple(x.double() for x in tensors))
    for a, e in zip(outcome(delta_rule, tensors), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("floor", [-2.0, -5.0, -80.0])
def test_the_floor_keeps_float32_finite(floor: float) -> None:
    q, k, v, log_decay, *rest = (x.float() for x in inputs(300, "channel", "split"))
    log_decay = torch.full_like(log_decay, floor)
    out, state = delta_rule(q, k, v, log_decay, *rest, decay_floor=floor)
    wide = [x.double() for x in (q, k, v, log_decay, *rest)]
    expected, expected_state = reference.delta_rule(*wide)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_split_carries_the_state(lengths: list[int], seed: int) -> None:
    *sequence, state = inputs(sum(lengths), "channel", "split", seed=seed)
    expected, expected_state = delta_rule(*sequence, state, decay_floor=-1.0)
    outputs, start = [], 0
    for length in lengths:
        part = [x[:, start : start + length] for x in sequence]
        out, state = delta_rule(*part, state, decay_floor=-1.0)
        outputs.append(out)
        start += length
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, expected_state, rtol=1e-9, atol=1e-9)


def test_one_token_by_hand() -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor([[values]], dtype=torch.float64)

    state = torch.tensor([[[[2.0], [4.0]]]], dtype=torch.float64)
    # Decay by 1/2 gives S = (1, 2). Erasing k = (1, 0) with b = 1/2 reads 0.5; writing 0.25 * 8
    # puts 1 + (2 - 0.5) into the first row.
    out, state = delta_step(
        row(1.0, 1.0),
        row(1.0, 0.0),
        row(8.0),
        row(0.5).log(),
        row(0.5, 0.5),
        row(0.25),
        state,
    )
    assert state.flatten().tolist() == [2.5, 2.0]
    assert out.item() == 4.5


def test_a_row_does_not_depend_on_its_batch() -> None:
    *sequence, state = (x.float() for x in inputs(1, "channel", "split"))
    tokens = [x[:, 0] for x in sequence]
    together = delta_step(*tokens, state)
    alone = delta_step(*(x[1:] for x in tokens), state[1:])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:], b)
