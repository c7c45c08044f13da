from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikelm.kernels import native, reference
from spikelm.kernels.wkv4 import WKVState, wkv4, wkv4_step

B, C = 2, 3
Inputs = tuple[Tensor, ...]
"""k, v, decay, bonus, p, q, o."""


@pytest.fixture(params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form that `wkv4` takes on this machine, and the one without native code."""
    if request.param == "torch":
        monkeypatch.setenv("SPIKELM_NATIVE", "0")
    elif native.unavailable() is not None:
        pytest.skip(f"native code {native.unavailable()}")
    return str(request.param)


def inputs(T: int, *, strength: float = 1.0, spread: float = 1.0, empty: bool = False) -> Inputs:
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    k, v, bonus = normal(B, T, C) * spread, normal(B, T, C), normal(C)
    decay = -strength * torch.tensor([1e-4, 0.3, 5.0], dtype=torch.float64)
    if empty:
        return k, v, decay, bonus, *torch.zeros(3, B, C, dtype=torch.float64)
    return k, v, decay, bonus, normal(B, C), 1 + normal(B, C) ** 2, normal(B, C)


def outcome(function: Callable[..., tuple[Tensor, WKVState]], tensors: Inputs) -> list[Tensor]:
    """Output, final state, and the gradients of all inputs under a fixed random loss."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    k, v, decay, bonus, *state = leaves
    out, after = function(k, v, decay, bonus, tuple(state))
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=g).to(x.dtype)).sum()
        for x in (out, *after[:2])
    )
    grads = torch.autograd.grad(loss, leaves)
    return [x.detach() for x in (out, *after)] + list(grads)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_loop(form: str, T: int, empty: bool, packed: bool) -> None:
    tensors = inputs(T, empty=empty)
    reset = torch.rand(B, T) < 0.1 if packed else None
    segment = None if reset is None else reset.long().cumsum(1)
    assert_same(
        outcome(lambda *x: wkv4(*x, segment), tensors),
        outcome(lambda *x: reference.wkv4(*x, reset), tensors),
    )


@pytest.mark.parametrize("strength", [1e-3, 1.0, 20.0])
def test_equals_the_loop_over_1000_tokens_with_extreme_keys(form: str, strength: float) -> None:
    tensors = inputs(1000, strength=strength, spread=20.0, empty=True)
    tensors[0][:, ::7], tensors[0][:, 3::11] = 50.0, -50.0
    assert_same(outcome(wkv4, tensors), outcome(reference.wkv4, tensors))


def test_the_loop_is_the_formula() -> None:
    k, v, decay, bonus, *state = inputs(20, empty=True)
    out, _ = reference.wkv4(k, v, decay, bonus, (state[0], state[1], state[2]))
    for t in range(20):
        ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)
        weights = torch.cat(
            [(ages[:, None] * decay + k[:, :t]).exp(), (bonus + k[:, t : t + 1]).exp()], 1
        )
        expected = (weights * v[:, : t + 1]).sum(1) / weights.sum(1)
        torch.testing.assert_close(out[:, t], expected, rtol=1e-10, atol=1e-10)


def test_the_loop_has_the_formulas_gradient() -> None:
    k, v, decay, bonus, *state = inputs(4)
    leaves = [x.requires_grad_() for x in (k, v, decay, bonus, *state)]

    def function(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *state: Tensor) -> Tensor:
        out, (p, _, o) = reference.wkv4(k, v, decay, bonus, (state[0], state[1], state[2]))
        return torch.cat([out.flatten(), (p * o.exp()).flatten()])

    # What the state stands for, p e^o, moves with o's maximum too; the output alone does not.
    assert torch.autograd.gradcheck(lambda *x: function(*x)[: k.numel()], leaves)


def test_a_mean_by_hand() -> None:
    def row(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    decay, bonus = row(-math.log(2))[0], row(math.log(3))[0]
    zero = row(0.0)
    out, state = wkv4_step(row(0.0), row(4.0), decay, bonus, (zero, zero, zero))
    assert out.item() == 4.0
    out, state = wkv4_step(row(0.0), row(8.0), decay, bonus, state)
    # Weight 1 for the first token's value, e^u = 3 for the present one.
    torch.testing.assert_close(out, row((4 + 3 * 8) / 4))
    # Then the first token weighs 1/2 and the second 1.
    torch.testing.assert_close(state[0] * state[2].exp(), row(4 / 2 + 8))
    torch.testing.assert_close(state[1] * state[2].exp(), row(1.5))


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_any_split_carries_the_state(lengths: list[int]) -> None:
    tensors = inputs(sum(lengths), empty=True)

    def split(
        k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState
    ) -> tuple[Tensor, WKVState]:
        outputs = []
        for k_part, v_part in zip(k.split(lengths, 1), v.split(lengths, 1), strict=True):
            out, state = wkv4(k_part, v_part, decay, bonus, state)
            outputs.append(out)
        return torch.cat(outputs, 1), state

    assert_same(outcome(split, tensors), outcome(wkv4, tensors))


def test_float32_stays_finite_and_close(form: str) -> None:
    tensors = inputs(300, spread=20.0, empty=True)
    tensors[0][:, 5] = -90.0
    expected = outcome(reference.wkv4, tensors)
    actual = outcome(wkv4, tuple(x.float() for x in tensors))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-4, atol=2e-4)


def test_half_precision_is_computed_in_the_states_dtype(form: str) -> None:
    k, v, decay, bonus, *state = (x.float() for x in inputs(9, empty=True))
    out, after = wkv4(
        k.bfloat16(), v.bfloat16(), decay, bonus.bfloat16(), (state[0], state[1], state[2])
    )
    assert {x.dtype for x in (out, *after)} == {torch.float32}


def test_zeroed_rows_are_empty(form: str) -> None:
    k, v, decay, bonus, *state = inputs(5)
    alive = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    out, _ = wkv4(k, v, decay, bonus, (state[0] * alive, state[1] * alive, state[2] * alive))
    fresh = torch.zeros(1, C, dtype=torch.float64)
    alone, _ = wkv4(k[1:], v[1:], decay, bonus, (fresh, fresh, fresh))
    torch.testing.assert_close(out[1:], alone)
