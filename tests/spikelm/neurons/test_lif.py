from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikelm.config import NeuronConfig
from spikelm.kernels import native, reference
from spikelm.kernels.documents import first_tokens
from spikelm.neurons.lif import LIFConstants, lif, lif_loop, lif_step
from spikelm.neurons.surrogate import SURROGATES


@pytest.fixture(params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form that `lif` takes on this machine, and the one without native code."""
    if request.param == "torch":
        monkeypatch.setenv("SPIKELM_NATIVE", "0")
    elif native.unavailable() is not None:
        pytest.skip(f"native code {native.unavailable()}")
    return str(request.param)


def config(reset: Literal["zero", "subtract"], detach: bool = False, **fields: Any) -> NeuronConfig:
    return NeuronConfig(kind="lif", reset=reset, detach_reset=detach, **fields)


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
def test_equals_the_loop(
    form: str, reset: Literal["zero", "subtract"], T: int, packed: bool
) -> None:
    x = torch.randn(2, T, 3, dtype=torch.float64) * 2
    v = torch.randn(2, 3, dtype=torch.float64)
    starts = torch.rand(2, T) < 0.1 if packed else None
    segment = starts.long().cumsum(1) if starts is not None else None
    spikes, after = lif(x, v, config(reset, tau=1.7, v_threshold=0.8), segment)
    expected, expected_after = reference.lif(
        x, v, tau=1.7, v_threshold=0.8, hard_reset=reset == "zero", reset=starts
    )
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(after, expected_after, rtol=1e-12, atol=1e-12)
    assert 0 < spikes.mean() < 1 or T < 3


@settings(max_examples=25)
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


def test_gradient_of_the_detached_membrane_is_the_tokens_own() -> None:
    # d s_t / d x_t = slope / tau, and earlier inputs get nothing (SLTT).
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    sltt = config("zero", detach_membrane=True)
    spikes, _ = lif(x, v, sltt)
    before, own = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(6):
        u = before + (x.detach()[:, t] - before) / 2
        own.append(SURROGATES["arctan"][1](u - 1, 2.0) / 2)
        _, before = lif_step(x.detach()[:, t], before, sltt)
    grads = torch.autograd.grad(spikes.sum(), (x, v), materialize_grads=True)
    torch.testing.assert_close(grads[0], torch.stack(own, 1))
    assert not grads[1].any()


Form = Callable[..., tuple[Tensor, Tensor]]


def outcome(form: Form, c: NeuronConfig, packed: bool, T: int = 33) -> list[Tensor]:
    """Spikes, membrane and the gradients of x, v, tau, threshold and softness."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    segment = (torch.rand(2, T, generator=g) < 0.1).long().cumsum(1) if packed else None
    leaves = [normal(2, T, 5) * 2, normal(2, 5), 1.2 + normal(5) ** 2, 0.5 + normal(5) ** 2]
    if c.softness is not None:
        leaves.append(0.1 + normal(5) ** 2)
    leaves = [x.requires_grad_() for x in leaves]
    x, v, tau, v_threshold, *soft = leaves
    constants = LIFConstants(tau, v_threshold, soft[0] if soft else None)
    spikes, after = form(x, v, c, segment, constants)
    loss = (spikes * normal(2, T, 5)).sum() + (after * normal(2, 5)).sum()
    return [
        spikes.detach(),
        after.detach(),
        *torch.autograd.grad(loss, leaves, materialize_grads=True),
    ]


def loop(
    x: Tensor, v: Tensor, c: NeuronConfig, segment: Tensor | None, constants: LIFConstants
) -> tuple[Tensor, Tensor]:
    return lif_loop(x, v, c, None if segment is None else first_tokens(segment), constants)


@pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")
@pytest.mark.parametrize("surrogate", [*SURROGATES, "soft"])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_native_gradients_equal_the_loops(surrogate: str, reset: str) -> None:
    fields = {"softness": 0.3} if surrogate == "soft" else {"surrogate": surrogate, "alpha": 1.3}
    for detach_reset, detach_membrane, packed in itertools.product((False, True), repeat=3):
        c = NeuronConfig(
            kind="lif",
            reset=reset,  # type: ignore[arg-type]
            detach_reset=detach_reset,
            detach_membrane=detach_membrane,
            **fields,  # type: ignore[arg-type]
        )
        pairs = zip(outcome(lif, c, packed), outcome(loop, c, packed), strict=True)
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_the_soft_threshold_has_its_own_gradient(form: str, reset: str) -> None:
    c = NeuronConfig(kind="lif", reset=reset, softness=0.5)  # type: ignore[arg-type]
    leaves = [
        (scale * torch.rand(*shape, dtype=torch.float64) + least).requires_grad_()
        for scale, least, shape in (
            (3, 0, (1, 5, 2)),
            (1, 0, (1, 2)),
            (1, 1.1, (2,)),
            (1, 0.5, (2,)),
            (1, 0.3, (2,)),
        )
    ]
    assert torch.autograd.gradcheck(
        lambda x, v, *constants: lif(x, v, c, None, LIFConstants(*constants)), leaves
    )


def test_the_soft_threshold_becomes_the_hard_one() -> None:
    x, v = torch.randn(1, 50, 4, dtype=torch.float64) * 2, torch.zeros(1, 4, dtype=torch.float64)
    hard, _ = lif(x, v, config("zero"))
    soft, _ = lif(x, v, config("zero", softness=1e-6))
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("width", [1, 37, 300])
def test_prefill_and_decode_have_the_same_bits(
    form: str, reset: Literal["zero", "subtract"], width: int
) -> None:
    c = config(reset, tau=1.7, v_threshold=0.3)
    x, v = torch.randn(3, 200, width), torch.zeros(3, width)
    spikes, after = lif(x, v, c)
    for t in range(200):
        fired, v = lif_step(x[:, t], v, c)
        assert torch.equal(fired, spikes[:, t])
    assert torch.equal(v, after)
    with torch.no_grad():
        assert torch.equal(lif(x, torch.zeros(3, width), c)[0], spikes)


def test_strided_inputs_are_read_as_what_they_are(form: str) -> None:
    x = torch.randn(2, 4, 9, dtype=torch.float64).transpose(1, 2)
    v = torch.randn(4, 2, dtype=torch.float64).T
    spikes, after = lif(x, v, config("zero"))
    expected = lif(x.contiguous(), v.contiguous(), config("zero"))
    assert torch.equal(spikes, expected[0])
    assert torch.equal(after, expected[1])


@pytest.mark.parametrize("detach", [False, True])
def test_equals_spikingjellys(form: str, detach: bool) -> None:
    """An independent implementation, where it is installed (a development dependency)."""
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import neuron, surrogate

    arguments: dict[str, Any] = {"tau": 2.0, "decay_input": True, "v_threshold": 1.0}
    arguments |= {"v_reset": 0.0, "detach_reset": detach}
    x = torch.randn(2, 60, 5, dtype=torch.float64) * 2.5
    weights, last = torch.randn(2, 60, 5, dtype=torch.float64), torch.randn(2, 5).double()

    leaf = x.clone().requires_grad_()
    spikes, v = lif(leaf, torch.zeros(2, 5, dtype=torch.float64), config("zero", detach))
    ((spikes * weights).sum() + (v * last).sum()).backward()  # type: ignore[no-untyped-call]

    theirs = x.clone().requires_grad_()
    many = neuron.LIFNode(
        **arguments, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m", store_v_seq=True
    )
    out = many(theirs.transpose(0, 1)).transpose(0, 1)
    ((out * weights).sum() + (many.v_seq[-1] * last).sum()).backward()
    assert torch.equal(spikes, out)
    torch.testing.assert_close(v, many.v_seq[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, theirs.grad, rtol=1e-10, atol=1e-10)

    one = neuron.LIFNode(**arguments, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="s")
    v = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(60):
        fired, v = lif_step(x[:, t], v, config("zero", detach))
        assert torch.equal(fired, one(x[:, t]))
        torch.testing.assert_close(v, one.v, rtol=1e-12, atol=1e-12)
