from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikelm.errors import ConfigError
from spikelm.kernels import reference
from spikelm.kernels.gla import fixed_log_decay, gla, gla_step

B, G, K, V = 2, 2, 4, 3
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(T: int, decay: str, heads: int = G, strongest: float = 1.0, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    channels = {"scalar": 1, "channel": K}[decay]
    log_decay = -strongest * torch.rand(B, T, G, channels, dtype=torch.float64, generator=g)
    q, k, v = normal(B, T, heads, K), normal(B, T, G, K), normal(B, T, G, V)
    return q, k, v, log_decay, normal(B, G, K, V)


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
@pytest.mark.parametrize(("decay", "floor"), [("scalar", None), ("channel", None), ("channel", -1)])
def test_chunkwise_equals_the_loop(T: int, decay: str, floor: float | None) -> None:
    tensors = inputs(T, decay, heads=3 * G)
    expected = outcome(lambda *x: reference.gla(*x, scale=0.5), tensors)
    assert_same(outcome(lambda *x: gla(*x, scale=0.5, decay_floor=floor), tensors), expected)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(
    ("decay", "floor"), [("scalar", None), ("channel", None), ("channel", -1), ("channel", -9)]
)
def test_packed_documents(T: int, decay: str, floor: float | None) -> None:
    tensors = inputs(T, decay)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.05
    reset[0, T // 2] = True
    segment = reset.long().cumsum(1)
    assert_same(
        outcome(lambda *x: gla(*x, segment, decay_floor=floor), tensors),
        outcome(lambda *x: reference.gla(*x, reset), tensors),
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 32, 128])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_any_chunk_size(chunk_size: int, decay: str) -> None:
    tensors = inputs(130, decay)
    expected = outcome(reference.gla, tensors)
    assert_same(outcome(lambda *x: gla(*x, chunk_size=chunk_size), tensors), expected)


@pytest.mark.parametrize("chunk_size", [0, 48])
def test_a_chunk_size_that_is_no_power_of_two(chunk_size: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        gla(*inputs(4, "scalar"), chunk_size=chunk_size)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("extreme", [0.0, -30.0, -1e4, -1e30, -math.inf])
def test_extreme_decays_in_float32(decay: str, extreme: float) -> None:
    # Weak decays between strong ones: a difference of long sums would lose them.
    q, k, v, log_decay, state = (x.float() for x in inputs(130, decay, strongest=0.05))
    strong = torch.rand(log_decay.shape) < 0.2
    tensors = (q, k, v, log_decay.masked_fill(strong, extreme), state)
    expected = outcome(reference.gla, tuple(x.double() for x in tensors))
    actual = outcome(gla, tensors)
    assert_same([x.double() for x in actual], expected, tolerance=2e-4)
    assert all(bool(x.isfinite().all()) for x in actual)


def test_a_group_of_queries_shares_its_keys_values_and_state() -> None:
    q, k, v, log_decay, state = inputs(20, "channel", heads=3 * G)
    out, S = gla(q, k, v, log_decay, state)
    own = [x.repeat_interleave(3, 2) for x in (k, v, log_decay)]
    alone, S_alone = gla(q, *own, state.repeat_interleave(3, 1))
    torch.testing.assert_close(out, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S.repeat_interleave(3, 1), S_alone, rtol=1e-12, atol=1e-12)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_split_carries_the_state(lengths: list[int], seed: int) -> None:
    *sequence, state = inputs(sum(lengths), "channel", seed=seed)
    expected, expected_state = gla(*sequence, state)
    outputs = []
    for part in zip(*(x.split(lengths, 1) for x in sequence), strict=True):
        out, state = gla(*part, state)
        outputs.append(out)
    assert_same([torch.cat(outputs, 1), state], [expected, expected_state])


def test_products_in_bfloat16_leave_decays_and_state_in_float32() -> None:
    tensors = tuple(x.float() for x in inputs(130, "channel", strongest=0.05))
    expected, expected_state = gla(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = gla(*tensors)
    assert state.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.2)
    torch.testing.assert_close(state, expected_state, rtol=0.05, atol=0.2)


def test_one_token_by_hand() -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor([[values]], dtype=torch.float64)

    state = torch.tensor([[[[2.0], [4.0]]]], dtype=torch.float64)
    # Decays 1/2 and 1/4 give S = (1, 1); k v = (3, 0) makes it (4, 1); q = (1, 2) reads 6, halved.
    out, state = gla_step(
        row(1.0, 2.0), row(1.0, 0.0), row(3.0), row(0.5, 0.25).log(), state, scale=0.5
    )
    assert state.flatten().tolist() == [4.0, 1.0]
    assert out.item() == 3.0


def test_a_row_does_not_depend_on_its_batch() -> None:
    *sequence, state = (x.float() for x in inputs(1, "channel", heads=3 * G))
    tokens = [x[:, 0] for x in sequence]
    together = gla_step(*tokens, state)
    alone = gla_step(*(x[1:] for x in tokens), state[1:])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:], b)


def test_fixed_decays() -> None:
    retnet = fixed_log_decay("retnet", 3)
    assert retnet.exp().tolist() == pytest.approx([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
    assert torch.equal(retnet, fixed_log_decay("retnet", 3, layer=2, num_layers=4))
    # ALiBi's slopes for 4 heads are 1/4, 1/16, 1/64, 1/256.
    slopes = [0.25, 0.0625, 0.015625, 0.00390625]
    for layer, depth in [(0, 1.0), (1, 0.5), (2, 0.0)]:
        decay = fixed_log_decay("lightning", 4, layer, num_layers=3)
        assert decay.tolist() == pytest.approx([-s * (depth + 1e-5) for s in slopes])
    with pytest.raises(ConfigError, match="did you mean 'lightning'"):
        fixed_log_decay("lightening", 4)  # type: ignore[arg-type]
