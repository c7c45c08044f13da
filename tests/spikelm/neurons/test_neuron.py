from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.config import NeuronConfig
from spikelm.errors import ConfigError
from spikelm.neurons import Neuron, Spikes


def make(kind: Any, key: str | None = None, **fields: Any) -> Neuron:
    neuron = Neuron("ffn_input", 4, NeuronConfig(kind=kind, **fields), key)
    neuron.reset_parameters()
    return neuron


def test_off_passes_its_input() -> None:
    x = torch.randn(1, 3, 4)
    spikes, state = make("off")(x, {})
    assert spikes.values is x
    assert spikes.counts is None
    assert state == {}


def test_integer_values_are_counts_times_threshold_in_float32() -> None:
    spikes, _ = make("integer")(torch.randn(1, 3, 4, dtype=torch.bfloat16), {})
    assert spikes.values.dtype == torch.float32
    assert torch.equal(spikes.values, spikes.counts * spikes.v_threshold)


def test_the_membrane_is_part_of_the_state() -> None:
    neuron = make("lif")
    state = neuron.zero_state(1, torch.zeros(()))
    assert {name: t.shape for name, t in state.items()} == {"ffn_input.v": (1, 4)}
    spikes, after = neuron(torch.full((1, 1, 4), 1.5), state)
    assert not spikes.values.any()
    spikes, _ = neuron(torch.full((1, 1, 4), 1.5), after)
    assert spikes.values.all()
    assert not state["ffn_input.v"].any(), "the state given is not changed"


def test_the_probe_sees_every_neuron() -> None:
    seen: list[tuple[str, Tensor, Spikes]] = []
    x = torch.randn(1, 2, 4)
    for kind in ("off", "integer", "lif"):
        neuron = make(kind)
        spikes, _ = neuron(
            x, neuron.zero_state(1, x), None, lambda n, x, s: seen.append((n.name, x, s))
        )
        assert seen[-1][0] == "ffn_input"
        assert seen[-1][1] is x
        assert seen[-1][2] is spikes
    assert len(seen) == 3


def test_two_populations_of_a_class_keep_two_membranes() -> None:
    names = [
        *make("lif").zero_state(1, torch.zeros(())),
        *make("lif", "r").zero_state(1, torch.zeros(())),
    ]
    assert names == ["ffn_input.v", "r.v"]


def test_membranes_are_float32_at_least() -> None:
    neuron = make("lif")
    state = neuron.zero_state(2, torch.zeros((), dtype=torch.bfloat16))
    spikes, after = neuron(torch.ones(2, 3, 4, dtype=torch.bfloat16), state)
    assert spikes.values.dtype == after["ffn_input.v"].dtype == torch.float32


def test_step_fires_at_its_threshold() -> None:
    x = torch.tensor([[[-0.1, 0.0, 0.1, 2.0]]], requires_grad=True)
    spikes, state = make("step", v_threshold=0.0)(x, {})
    assert spikes.counts is not None
    assert spikes.counts.tolist() == [[[0, 1, 1, 1]]]
    assert spikes.v_threshold.tolist() == [[[1]]]
    assert state == {}
    # arctan with alpha 2: 1 / (1 + (pi x)^2).
    (grad,) = torch.autograd.grad(spikes.values.sum(), x)
    torch.testing.assert_close(grad, 1 / (1 + (torch.pi * x.detach()) ** 2))
    assert make("step", v_threshold=0.5)(x, {})[0].counts.tolist() == [[[0, 0, 0, 1]]]


def test_fixed_scale_has_one_step_for_all_tokens() -> None:
    neuron = make("integer", scale="fixed", v_threshold=0.25, max_count=4, unsigned=True)
    assert {name: p.item() for name, p in neuron.named_parameters()} == {"step": 0.25}
    assert not neuron.step.requires_grad
    x = torch.randn(2, 3, 4)
    spikes, _ = neuron(x, {})
    assert spikes.v_threshold.shape == (2, 3, 1)
    assert torch.equal(spikes.values, torch.floor((4 * x).clamp(0, 4) + 0.5) / 4)
    with pytest.raises(ConfigError, match="scale: adaptive"):
        make("integer", scale="fixed", dead_zone=0.5)


def test_learned_constants_start_as_configured_and_get_gradients() -> None:
    fields: dict[str, Any] = {"tau": 1.5, "v_threshold": 0.7, "softness": 0.2}
    neuron, fixed = make("lif", learn=True, **fields), make("lif", **fields)
    assert {n: tuple(p.shape) for n, p in neuron.named_parameters()} == {
        "tau_logit": (4,),
        "v_threshold_log": (4,),
        "softness_log": (4,),
    }
    assert not list(fixed.parameters())
    x = torch.randn(2, 9, 4)
    spikes, state = neuron(x, neuron.zero_state(2, x))
    expected, _ = fixed(x, fixed.zero_state(2, x))
    torch.testing.assert_close(spikes.values, expected.values)
    assert spikes.counts is None, "soft spikes are no integers"
    (spikes.values.sum() + state["ffn_input.v"].sum()).backward()
    for parameter in neuron.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_a_learned_tau_stays_at_least_1_and_a_learned_threshold_above_0() -> None:
    neuron = make("lif", learn=True)
    x = torch.randn(1, 50, 4)
    for value in (-80.0, 80.0):
        with torch.no_grad():
            for parameter in neuron.parameters():
                parameter.fill_(value)
        tau, v_threshold, _ = neuron.constants(torch.empty(0, dtype=torch.float32))
        assert (tau >= 1).all()
        assert (v_threshold > 0).all()
        assert torch.isfinite(neuron(x, neuron.zero_state(1, x))[0].values).all()
    with pytest.raises(ConfigError, match="tau: 1"):
        make("lif", learn=True, tau=1.0)


def test_a_learned_step_threshold_gets_a_gradient() -> None:
    neuron = make("step", learn=True, v_threshold=0.1)
    neuron(torch.randn(2, 3, 4), {})[0].values.sum().backward()
    assert (neuron.v_threshold.grad < 0).all()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("integer", {"dead_zone": 0.5}),
        ("integer", {"dead_zone": 0.5, "unsigned": True, "max_count": 2}),
        ("integer", {"scale": "fixed", "max_count": 2}),
        ("lif", {}),
        ("lif", {"softness": 0.5}),
        ("step", {"v_threshold": 0.5}),
    ],
)
def test_an_open_bypass_blends_values_and_leaves_the_spikes_alone(
    kind: Any, fields: dict[str, Any]
) -> None:
    neuron = make(kind, **fields)
    x = torch.randn(2, 5, 4, requires_grad=True)
    state = neuron.zero_state(2, x)
    closed, after = neuron(x, state)
    neuron.spiking = 0.25
    blended, kept = neuron(x, state)
    torch.testing.assert_close(blended.values, 0.25 * closed.values + 0.75 * x)
    for left, right in zip(blended[1:], closed[1:], strict=True):
        assert left is right is None or torch.equal(left, right)
    assert all(torch.equal(kept[name], after[name]) for name in after)
    (slope,) = torch.autograd.grad(closed.values.sum(), x)
    (grad,) = torch.autograd.grad(blended.values.sum(), x)
    torch.testing.assert_close(grad, 0.25 * slope + 0.75)
    outside, _ = neuron.eval()(x, state)
    assert torch.equal(outside.values, closed.values)


def test_a_bypass_around_half_precision_keeps_the_width_of_the_spikes() -> None:
    neuron = make("integer")
    neuron.spiking = 0.5
    spikes, _ = neuron(torch.randn(1, 3, 4, dtype=torch.bfloat16), {})
    assert spikes.values.dtype == torch.float32


def test_the_dead_zone_can_be_learned_alone() -> None:
    both, zone = make("integer", learn=True), make("integer", learn="dead_zone", dead_zone=0.7)
    assert both.k.requires_grad
    assert both.dead_zone.requires_grad
    assert zone.dead_zone.requires_grad
    assert not zone.k.requires_grad
    zone(torch.linspace(0, 1, 4)[None, None], {})[0].values.sum().backward()
    assert (zone.dead_zone.grad != 0).any()
    for fields in ({"kind": "lif"}, {"kind": "step"}, {"kind": "integer", "scale": "fixed"}):
        with pytest.raises(ConfigError, match="learn: dead_zone needs kind: integer"):
            NeuronConfig(learn="dead_zone", **fields)  # type: ignore[arg-type]
