from __future__ import annotations

import pytest
import torch

from spikelm.neurons.surrogate import SURROGATES, fire


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("alpha", [0.7, 2.0, 5.0])
def test_slope_is_the_derivative_of_the_documented_step(name: str, alpha: float) -> None:
    step, slope = SURROGATES[name]
    # Off the kinks: 0, those of the rectangle at +-1 / (2 alpha), of the triangle at +-1 / alpha.
    x = torch.linspace(-2.03, 2.07, 201, dtype=torch.float64)
    for kink in (0.0, 0.5 / alpha, 1 / alpha):
        x = x[(x.abs() - kink).abs() > 1e-3]
    h = 1e-6
    numerical = (step(x + h, alpha) - step(x - h, alpha)) / (2 * h)
    torch.testing.assert_close(slope(x, alpha), numerical, rtol=1e-6, atol=1e-7)


def test_fire_is_hard_forward_and_smooth_backward() -> None:
    x = torch.tensor([-0.1, 0.0, 0.2], requires_grad=True)
    spikes = fire(x, "arctan", 2.0)
    assert spikes.tolist() == [0.0, 1.0, 1.0]
    spikes.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, SURROGATES["arctan"][1](x.detach(), 2.0))


@pytest.mark.parametrize("name", SURROGATES)
def test_the_step_rises_from_0_to_1_through_one_half(name: str) -> None:
    step, _ = SURROGATES[name]
    x = torch.tensor([-1e6, 0.0, 1e6], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(step(x, 2.0), expected, rtol=0, atol=1e-6)
