from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spikelm.kernels import native
from spikelm.neurons.integer import (
    DEAD_ZONE_BAND,
    edge_counts,
    expand,
    fixed_spike,
    integer_counts,
    integer_spike,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


K3, NO_ZONE = torch.tensor(3.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def test_counts_by_hand() -> None:
    # mean |x| = 1.5, so v_threshold = 0.5 with k = 3; 0.25 / 0.5 ties to the even 0.
    x = tensor(0.25, -0.75, 1.0, -4.0)
    counts, v = integer_counts(x, K3, NO_ZONE, None, False)
    assert v.item() == 0.5
    assert counts.tolist() == [[0, -2, 2, -8]]
    assert integer_counts(x, K3, NO_ZONE, 1, False)[0].tolist() == [[0, -1, 1, -1]]
    assert integer_counts(x, K3, NO_ZONE, None, True)[0].tolist() == [[0, 0, 2, 0]]
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert integer_counts(x, K3, half, 7, False)[0].tolist() == [[0, 0, 2, -7]]


@given(seed=st.integers(0, 999), k=st.floats(0.3, 20), zone=st.floats(0, 2))
def test_counts_are_integers_in_range_and_silent_in_the_dead_zone(
    seed: int, k: float, zone: float
) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * 10
    counts, _v = integer_counts(x, torch.tensor(k), torch.tensor(zone), 9, False)
    assert torch.equal(counts, counts.round())
    assert counts.abs().max() <= 9
    assert (counts[x.abs() <= zone * x.abs().mean(-1, keepdim=True)] == 0).all()
    assert (counts * x >= 0).all()
    scaled, _ = integer_counts(x * 4, torch.tensor(k), torch.tensor(zone), 9, False)
    assert torch.equal(scaled, counts), "the threshold adapts to the token's scale"


def test_zero_input_stays_silent() -> None:
    counts, v = integer_counts(torch.zeros(2, 3), torch.tensor(3.0), torch.zeros(3), None, False)
    assert not counts.any()
    assert (v == 1e-5).all()


def test_gradient_to_x_is_straight_through_inside_the_clip() -> None:
    x = tensor(0.25, -0.75, 1.0, -4.0).requires_grad_()
    zone = torch.full((4,), 0.1, dtype=torch.float64)
    values, counts, v = integer_spike(x, K3, zone, 7, False)
    assert torch.equal(values, counts * v)
    values.backward(tensor(1.0, 2.0, 3.0, 4.0))
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 2.0, 3.0, 0.0]]
    x.grad = None
    integer_spike(x, K3, zone, None, True)[0].backward(tensor(1.0, 2.0, 3.0, 4.0))
    assert x.grad.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_gradient_to_k_is_that_of_a_learned_step() -> None:
    x = tensor(0.25, -0.75, 1.05, -4.0)
    k = K3.clone().requires_grad_()
    integer_spike(x, k, NO_ZONE, 7, False)[0].backward(tensor(1.0, 1.0, 1.0, 1.0))
    v = x.abs().mean().item() / 3
    counts, _ = integer_counts(x, K3, NO_ZONE, 7, False)
    # d value / d v: count - x / v for the three rounded entries, -7 for the clipped one.
    per_v = sum(c - xi / v for c, xi in ((0, 0.25), (-1, -0.75), (2, 1.05))) - 7
    assert counts.tolist() == [[0, -1, 2, -7]]
    torch.testing.assert_close(k.grad, torch.tensor(per_v * -v / 3, dtype=torch.float64))


def test_gradient_to_the_dead_zone_sees_a_band_around_its_edge() -> None:
    x = tensor(1.0, 1.0, -1.04, 0.96)  # mean 1, so the edge is at the zone itself
    zone = torch.tensor([0.5, 1.02, 1.0, 0.97], dtype=torch.float64, requires_grad=True)
    integer_spike(x, K3, zone, None, False)[0].backward(torch.ones_like(x))
    assert zone.grad is not None
    expected = [0.0, -1.0 / DEAD_ZONE_BAND, 1.04 / DEAD_ZONE_BAND, -0.96 / DEAD_ZONE_BAND]
    torch.testing.assert_close(zone.grad, torch.tensor(expected, dtype=torch.float64))


def test_entries_in_the_dead_zone_leave_k_alone() -> None:
    k = K3.clone().requires_grad_()
    zone = torch.full((4,), 9.0, dtype=torch.float64)
    integer_spike(tensor(0.2, 0.1, 1.0, -2.0), k, zone, None, False)[0].sum().backward()
    assert k.grad == 0


def test_the_dead_zone_learns_under_a_tight_clip() -> None:
    # Ternary with v_threshold = 1/3: past the edge the value jumps to 1/3, not to x.
    zone = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    integer_spike(tensor(1.0, -1.0), K3, zone.expand(2), 1, False)[0].backward(tensor(1.0, -1.0))
    torch.testing.assert_close(zone.grad, torch.tensor([-2 / 3 / DEAD_ZONE_BAND]).double())


def test_k_never_reaches_zero() -> None:
    counts, v = integer_counts(torch.ones(1, 3), torch.tensor(-5.0), torch.zeros(3), None, False)
    # k stands at its least, 1/1000: one count is worth a thousand times the mean.
    assert not counts.any()
    torch.testing.assert_close(v.item(), 1000.0)


def test_fixed_counts_and_gradients_by_hand() -> None:
    # step 1/2, at most 4 counts: x / step is 0.5 (up to 1), -1, 2.1, 9 (clipped).
    x = tensor(0.25, -0.5, 1.05, 4.5).requires_grad_()
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for unsigned, expected, passed, per_step in (
        (True, [1, 0, 2, 4], [1, 0, 1, 1 - 1], (1 - 0.5) + 0 + (2 - 2.1) + 4),
        (False, [1, -1, 2, 4], [1, 1, 1, 0], (1 - 0.5) + 0 + (2 - 2.1) + 4),
    ):
        values, counts, v = fixed_spike(x, step, 4, unsigned)
        assert counts.tolist() == [expected]
        assert v.tolist() == [[0.5]]
        assert torch.equal(values, v * counts)
        grad_x, grad_step = torch.autograd.grad(values.sum(), (x, step))
        assert grad_x.tolist() == [passed]
        torch.testing.assert_close(grad_step.item(), per_step)


def test_fixed_counts_of_qsd() -> None:
    # s = floor(clip(4 x, 0, 4) + 0.5) / 4 (QSD-Transformer).
    x = torch.linspace(-1, 2, 301, dtype=torch.float64)[None]
    values, counts, _ = fixed_spike(x, torch.tensor(0.25, dtype=torch.float64), 4, True)
    assert torch.equal(values, torch.floor((4 * x).clamp(0, 4) + 0.5) / 4)
    assert counts.unique().tolist() == [0, 1, 2, 3, 4]


def test_unclipped_fixed_counts_pass_every_gradient() -> None:
    x = tensor(-100.0, 0.1, 77.7).requires_grad_()
    values, counts, _ = fixed_spike(x, torch.tensor(0.5, dtype=torch.float64), None, False)
    assert counts.tolist() == [[-200, 0, 155]]
    assert torch.autograd.grad(values.sum(), x)[0].tolist() == [[1, 1, 1]]


def test_a_fixed_step_never_reaches_zero() -> None:
    values, counts, v = fixed_spike(torch.ones(1, 2), torch.tensor(-1.0), 7, False)
    assert counts.tolist() == [[7, 7]]
    assert torch.isfinite(values).all()
    assert (v == 1e-5).all()


@pytest.mark.parametrize("start", [0.0, -0.5, 5e-4])
def test_a_k_that_fell_too_low_comes_back(start: float) -> None:
    k = torch.tensor(start, requires_grad=True)
    x = torch.randn(4, 16)
    for _ in range(3):
        values, _, _ = integer_spike(x, k, torch.zeros(16), 7, False)
        (grad,) = torch.autograd.grad((values - x).square().mean(), k)
        assert grad.isfinite()
        assert grad < 0, "finer counts are nearer"
        k = (k - 0.1 * grad.sign()).detach().requires_grad_()
    assert k > start


@given(st.sampled_from([1.0, 1.25, 1.5, 2.0]), st.integers(0, 9))
def test_a_power_keeps_order_sign_and_scale(power: float, seed: int) -> None:
    x = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0, 3] = 0.0
    y = expand(x, power)
    mean = x.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(y, x * (x.abs() / mean) ** (power - 1))
    torch.testing.assert_close(expand(7 * x, power), 7 * y)
    assert torch.equal(y.sign(), x.sign())
    assert torch.equal(y.argsort(), x.argsort())


@pytest.mark.parametrize("power", [1.25, 1.5, 2.0])
def test_a_power_has_a_slope_everywhere(power: float) -> None:
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expand(x, power), x)
    zeros = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(expand(zeros, power).sum(), zeros)
    assert grad.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.skipif(native.unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 17), (4, 7, 2, 33), (700, 800)])
@pytest.mark.parametrize("power", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize(("max_count", "unsigned"), [(None, False), (3, False), (5, True)])
def test_compiled_spikes_are_the_reference(
    shape: tuple[int, ...],
    power: float,
    max_count: int | None,
    unsigned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    x[..., ::3] *= 4
    if len(shape) == 3:
        x[0, 1] = 0.0
        x[1, 2, 3] = 0.0
    zone = torch.rand(shape[-1], dtype=torch.float64)
    grad = torch.randn(shape, dtype=torch.float64)

    def run() -> list[Tensor]:
        own, edge = x.clone().requires_grad_(), zone.clone().requires_grad_()
        values, counts, v = integer_spike(own, K3, edge, max_count, unsigned, power)
        values.backward(grad)
        assert own.grad is not None
        assert edge.grad is not None
        with torch.no_grad():
            again = integer_spike(x, K3, zone, max_count, unsigned, power)
        assert all(torch.equal(a, b) for a, b in zip((values, counts, v), again, strict=True))
        near = edge_counts(x, zone, unsigned, power)
        return [values.detach(), counts, v, own.grad, edge.grad, near]

    monkeypatch.setenv("SPIKELM_NATIVE", "1")
    found = run()
    monkeypatch.setenv("SPIKELM_NATIVE", "0")
    expected = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("native_code", ["1", "0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(
    native_code: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKELM_NATIVE", native_code)
    x = torch.randn(2, 40)
    x[1, 7] = bad
    for power in (1.0, 1.5):
        values, _, _ = integer_spike(
            x, torch.tensor(3.0), torch.full((40,), 0.5), 127, False, power
        )
        assert values[0].isfinite().all()
        assert not values[1].isfinite().all()
