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
from spikelm.kernels.rwkv7 import rwkv7, rwkv7_step

B, H, K, V = 2, 2, 4, 3
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]
FLOOR = -math.exp(-0.5)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(T: int, strongest: float = -FLOOR, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=g)

    r, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    removal_key = F.normalize(normal(B, T, H, K), dim=-1)
    log_decay, rate = -strongest * uniform(B, T, H, K), uniform(B, T, H, K)
    return r, log_decay, k, v, removal_key, rate, normal(B, H, K, V)


def outcome(function: Callable[..., tuple[Tensor, Tensor]], tensors: Inputs) -> list[Tensor]:
    """Outputs, final state and the gradients of every input under a fixed random loss."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, state = function(*leaves)
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=g)).sum() for x in (out, state)
    )
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("floor", [None, FLOOR])
def test_chunkwise_equals_the_loop(T: int, floor: float | None) -> None:
    tensors = inputs(T)
    expected = outcome(reference.rwkv7, tensors)
    assert_same(outcome(lambda *x: rwkv7(*x, decay_floor=floor), tensors), expected)


# A floor of -9 starts from blocks of 16 tokens.
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("floor", [None, FLOOR, -9.0])
def test_packed_documents(T: int, floor: float | None) -> None:
    tensors = inputs(T)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.05
    reset[0, T // 2] = True
    segment = reset.long().cumsum(1)
    assert_same(
        outcome(lambda *x: rwkv7(*x, segment, decay_floor=floor), tensors),
        outcome(lambda *x: reference.rwkv7(*x, reset), tensors),
    )


@pytest.mark.parametrize("extreme", [0.0, -30.0, -1e4, -math.inf])
def test_extreme_decays_in_float32(extreme: float) -> None:
    r, log_decay, *rest = (x.float() for x in inputs(130, strongest=0.05))
    strong = torch.rand(log_decay.shape) < 0.2
    tensors = (r, log_decay.masked_fill(strong, extreme), *rest)
    expected = outcome(reference.rwkv7, tuple(x.double() for x in tensors))
    actual = outcome(rwkv7, tensors)
    assert_same([x.double() for x in actual], expected, tolerance=1e-3)
    assert all(bool(x.isfinite().all()) for x in actual)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_split_carries_the_state(lengths: list[int], seed: int) -> None:
    *sequence, state = inputs(sum(lengths), seed=seed)
    expected, expected_state = rwkv7(*sequence, state, decay_floor=FLOOR)
    outputs = []
    for part in zip(*(x.split(lengths, 1) for x in sequence), strict=True):
        out, state = rwkv7(*part, state, decay_floor=FLOOR)
        outputs.append(out)
    assert_same([torch.cat(outputs, 1), state], [expected, expected_state])


def test_products_in_bfloat16_leave_decays_and_state_in_float32() -> None:
    tensors = tuple(x.float() for x in inputs(130))
    expected, expected_state = rwkv7(*tensors, decay_floor=FLOOR)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = rwkv7(*tensors, decay_floor=FLOOR)
    assert state.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.2)
    torch.testing.assert_close(state, expected_state, rtol=0.05, atol=0.2)


def test_the_paper_keeps_the_transposed_state() -> None:
    """Row vectors and a V x K state, as in the paper's equation and the author's code."""
    r, log_decay, k, v, removal_key, rate, state = inputs(30)
    paper = state.mT
    for t in range(30):
        transition = torch.diag_embed(log_decay[:, t].exp()) - (
            removal_key[:, t, :, :, None] * (rate * removal_key)[:, t, :, None]
        )
        paper = paper @ transition + v[:, t, :, :, None] * k[:, t, :, None]
    out, final = rwkv7(r, log_decay, k, v, removal_key, rate, state)
    torch.testing.assert_close(final.mT, paper, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        out[:, -1], (paper @ r[:, -1, :, :, None])[..., 0], rtol=1e-10, atol=1e-10
    )


def test_one_token_by_hand() -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor([[values]], dtype=torch.float64)

    state = torch.tensor([[[[2.0], [4.0]]]], dtype=torch.float64)
    # The removal key (0.6, 0.8) reads 1.2 + 3.2 = 4.4 before the decay; its rates (1/2, 1/4) take
    # 0.3 * 4.4 and 0.2 * 4.4 from the decayed (1, 1); k v = (0, 2) is added.
    out, state = rwkv7_step(
        row(1.0, 1.0),
        row(0.5, 0.25).log(),
        row(0.0, 1.0),
        row(2.0),
        row(0.6, 0.8),
        row(0.5, 0.25),
        state,
    )
    assert state.flatten().tolist() == pytest.approx([1 - 1.32, 3 - 0.88])
    assert out.item() == pytest.approx(1.8)


def test_a_row_does_not_depend_on_its_batch() -> None:
    *sequence, state = (x.float() for x in inputs(1))
    tokens = [x[:, 0] for x in sequence]
    together = rwkv7_step(*tokens, state)
    alone = rwkv7_step(*(x[1:] for x in tokens), state[1:])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:], b)
