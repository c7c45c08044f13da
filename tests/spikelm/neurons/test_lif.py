from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikelm.config import NeuronConfig
from spikelm.kernels import reference
from spikelm.neurons.lif import lif


def config(
    reset: Literal["zero", "subtract"], detach: bool = False, **fields: float
) -> NeuronConfig:
    return NeuronConfig(kind="lif", reset=reset, detach_reset=detach, **fields)  # type: ignore[arg-type]


def test_a_trace_by_hand() -> None:
    # tau 2 halves the distance to the input: 0.75, then 1.125 fires and resets to 0.
    x = torch.tensor([[[1.5], [1.5], [1.5], [1.0]]], dtype=torch.float64)
    spikes, v = lif(x, torch.zeros(1, 1, dtype=torch.float64), config("zero"))
    assert spikes.flatten().tolist() == [0, 1, 0, 0]
    assert v.item() == 0.875
    # The soft reset keeps 0.125: 0.8125, then 0.90625.
    spikes, v = lif(x, torch.zeros(1, 1, dtype=torch.float64), config("subtract"))
    assert spikes.flatten().tolist() == [0, 1, 0, 0]
    assert v.item() == 0.90625


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_loop(reset: Literal["zero", "subtract"], T: int, packed: bool) -> None:
    x = torch.randn(2, T, 3, dtype=torch.float64) * 2
    v = torch.randn(2, 3, dtype=torch.float64)
    starts = torch.rand(2, T) < 0.1 if packed else None
    segment = starts.long().cumsum(1) if starts is not None else None
    spikes, after = lif(x, v, config(reset, tau=1.7, v_threshold=0.8), segment)
    expected, expected_after = reference.lif(
        x, v, tau=1.7, v_threshold=0.8, hard_reset=reset == "zero", reset=starts
    )
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(after, expected_after)
    assert 0 < spikes.mean() < 1 or T < 3


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), detach=st.booleans())
def test_any_split_carries_the_membrane(lengths: list[int], detach: bool) -> None:
    x = torch.randn(2, sum(lengths), 3, dtype=torch.float64) * 2
    results = []
    for cuts in ([sum(lengths)], lengths):
        leaf = x.clone().requires_grad_()
        v, outputs = torch.zeros(2, 3, dtype=torch.float64), []
        for part in leaf.split(cuts, 1):
            spikes, v = lif(part, v, config("zero", detach))
            outputs.append(spikes)
        whole = torch.cat(outputs, 1)
        (whole.cumsum(1).sum() + v.square().sum()).backward()
        results.append((whole, v, leaf.grad))
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradient_through_the_soft_reset_by_hand() -> None:
    # One token, x = 3: v = 1.5 fires, then v - s. d v / d x = (1 - slope(0.5)) / 2 undetached.
    slope = 1 / (1 + (torch.pi * 0.5) ** 2)
    for detach, expected in ((True, 0.5), (False, 0.5 * (1 - slope))):
        x = torch.tensor([[[3.0]]], dtype=torch.float64, requires_grad=True)
        _, v = lif(x, torch.zeros(1, 1, dtype=torch.float64), config("subtract", detach))
        (grad,) = torch.autograd.grad(v.sum(), x)
        torch.testing.assert_close(grad.item(), expected)


def test_gradient_through_the_reset_by_hand() -> None:
    # Two tokens, v_1 = 0.75 (silent). d v_2 / d x_1 = 1/2 * d(v_1 (1 - s_1)) / d x_1, and the
    # undetached reset adds -v_1 * slope(v_1 - 1) to the 1 - s_1 = 1 of the detached one.
    x = torch.tensor([[[1.5], [0.0]]], dtype=torch.float64, requires_grad=True)
    slope = 1 / (1 + (torch.pi * 0.25) ** 2)
    for detach, expected in ((True, 0.25), (False, 0.25 * (1 - 0.75 * slope))):
        _, v = lif(x, torch.zeros(1, 1, dtype=torch.float64), config("zero", detach))
        # The second token's own reset: factor 1 - s_2 (and its surrogate when undetached).
        own = 1.0 if detach else 1 - 0.375 / (1 + (torch.pi * 0.625) ** 2)
        (grad,) = torch.autograd.grad(v.sum(), x)
        torch.testing.assert_close(grad[0, 0, 0].item(), expected * own)
