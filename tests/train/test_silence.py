from __future__ import annotations

import pytest
import torch

from spikelm.config import NeuronConfig
from spikelm.neurons import Neuron
from spikelm_train.silence import MAX_DEAD_ZONE, Silence


def make_neuron(tensor_class: str, config: NeuronConfig, layer: int = 0) -> Neuron:
    neuron = Neuron(tensor_class, 64, config)
    neuron.name = f"layers.{layer}.{tensor_class}"
    neuron.reset_parameters()
    return neuron


STEERED = NeuronConfig(kind="integer", dead_zone=0.5, target_silence=0.7)


def test_dead_zone_converges_to_the_target() -> None:
    neuron = make_neuron("mixer_input", STEERED)
    silence = Silence([neuron], rate=0.2)
    for _ in range(200):
        silence.clear()
        neuron(torch.randn(2, 50, 64), {}, probe=silence)
        silence.steer(silence.counts())
    total, classes = silence.fractions(silence.counts())
    assert total == pytest.approx(0.7, abs=0.02)
    assert classes == {"mixer_input": total}


def test_steer_moves_by_the_stated_factor_and_stays_in_range() -> None:
    neuron = make_neuron("mixer_input", STEERED)
    silence = Silence([neuron], rate=0.2)
    neuron(torch.zeros(1, 1, 64), {}, probe=silence)  # all silent
    silence.steer(silence.counts())
    torch.testing.assert_close(
        neuron.dead_zone.data, torch.full((64,), 0.5) * torch.exp(torch.tensor(0.2 * (0.7 - 1)))
    )
    neuron.dead_zone.data.fill_(MAX_DEAD_ZONE)
    silence.clear()
    neuron(torch.randn(1, 1, 64), {}, probe=silence)
    silence.steer(silence.counts() * torch.tensor([[0.0], [1.0]]))
    assert neuron.dead_zone.max() == MAX_DEAD_ZONE


def test_only_neurons_with_a_target_are_counted_unless_all_are_asked_for() -> None:
    steered, off = make_neuron("mixer_input", STEERED), make_neuron("ffn_input", NeuronConfig())
    silence = Silence([steered, off], rate=0.2)
    x = torch.randn(2, 3, 64)
    x[..., :16] = 0
    for neuron in (steered, off):
        neuron(x, {}, probe=silence)
    assert silence.counts().shape == (2, 1)
    silence.clear()
    silence.measure_all = True
    for neuron in (steered, off):
        neuron(x, {}, probe=silence)
    counts = silence.counts()
    assert counts[:, 1].tolist() == [2 * 3 * 16, 2 * 3 * 64]
    before = steered.dead_zone.clone()
    silence.steer(counts)
    assert not torch.equal(steered.dead_zone, before)


def test_fractions_add_up_over_layers_and_forwards_without_queries_and_keys() -> None:
    first = make_neuron("ffn_hidden", NeuronConfig(), 0)
    second = make_neuron("ffn_hidden", NeuronConfig(), 1)
    queries = make_neuron("queries_keys", NeuronConfig(), 0)
    silence = Silence([first, second, queries], rate=0.2)
    silence.measure_all = True
    for _ in range(2):
        first(torch.zeros(1, 1, 64), {}, probe=silence)
        second(torch.ones(1, 2, 64), {}, probe=silence)
        queries(torch.zeros(1, 9, 64), {}, probe=silence)
    total, classes = silence.fractions(silence.counts())
    assert total == pytest.approx(1 / 3)
    assert classes == pytest.approx({"queries_keys": 1.0, "ffn_hidden": 1 / 3})


def test_nothing_measured_has_no_fraction() -> None:
    silence = Silence([make_neuron("ffn_hidden", NeuronConfig())], rate=0.2)
    assert silence.fractions(silence.counts()) == (None, {})
    silence.steer(silence.counts())


def test_l1_is_differentiable_and_averages_tokens_and_layers() -> None:
    neurons = [make_neuron("ffn_hidden", NeuronConfig(), layer) for layer in range(2)]
    other = make_neuron("ffn_input", NeuronConfig())
    silence = Silence([*neurons, other], rate=0.2)
    silence.penalise = True
    x = torch.full((2, 5, 64), -2.0, requires_grad=True)
    neurons[0](x, {}, probe=silence)
    neurons[1](3 * x, {}, probe=silence)
    other(x, {}, probe=silence)
    loss = silence.take_l1()
    assert loss.item() == pytest.approx((2 * 64 + 6 * 64) / 2)
    loss.backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full_like(x, -(1 + 3) / 2 / 10))
