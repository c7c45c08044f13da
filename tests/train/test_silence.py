from __future__ import annotations

import dataclasses

import pytest
import torch

from spikelm.config import NeuronConfig
from spikelm.errors import ConfigError
from spikelm.neurons import Neuron
from spikelm_train.silence import MAX_DEAD_ZONE, MIN_DEAD_ZONE, Silence


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
    silence.steer(silence.counts() * torch.tensor([[0.0], [1.0], [1.0]]))
    assert neuron.dead_zone.max() == MAX_DEAD_ZONE


def test_only_neurons_that_spike_are_counted_unless_all_are_asked_for() -> None:
    steered, off = make_neuron("mixer_input", STEERED), make_neuron("ffn_input", NeuronConfig())
    silence = Silence([steered, off], rate=0.2)
    x = torch.randn(2, 3, 64)
    x[..., :16] = 0
    for neuron in (steered, off):
        neuron(x, {}, probe=silence)
    assert silence.counts().shape == (3, 1)
    silence.clear()
    silence.measure_all = True
    for neuron in (steered, off):
        neuron(x, {}, probe=silence)
    counts = silence.counts()
    assert counts[:, 1].tolist() == [2 * 3 * 16, 2 * 3 * 64, 0]
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


def step(silence: Silence, neuron: Neuron, x: torch.Tensor, progress: float = 1.0) -> float:
    """One step of the rules on x; the silent fraction it saw."""
    silence.clear()
    neuron(x, {}, probe=silence)
    counts = silence.counts()
    silence.steer(counts, progress)
    silence.watch(silence.fired())
    return float(counts[0, 0] / counts[1, 0])


def test_silence_is_that_of_the_spikes_while_a_bypass_is_open() -> None:
    neuron = make_neuron("mixer_input", STEERED)
    neuron.spiking = 0.25
    silence = Silence([neuron], rate=0.2)
    x = torch.randn(2, 50, 64)
    spikes, _ = neuron(x, {}, probe=silence)
    assert (spikes.values != 0).all()
    assert spikes.counts is not None
    assert silence.counts()[0, 0] == (spikes.counts == 0).sum() > 0


def test_a_target_with_a_ramp_rises_from_what_the_first_step_saw() -> None:
    config = dataclasses.replace(STEERED, dead_zone=0.1, target_silence=0.8, target_ramp=0.5)
    neuron = make_neuron("mixer_input", config)
    silence = Silence([neuron], rate=2.0)
    seen = [step(silence, neuron, torch.randn(4, 50, 64), i / 400) for i in range(400)]
    natural = seen[0]
    assert natural < 0.3
    # The rule follows a rising target a little late.
    for i in (100, 150, 199):
        assert seen[i] == pytest.approx(natural + i / 200 * (0.8 - natural), abs=0.03)
    assert seen[399] == pytest.approx(0.8, abs=0.02)
    resumed = Silence([neuron], rate=2.0)
    resumed.load_state_dict(silence.state_dict())
    assert resumed.state_dict()["natural"] == {neuron.name: pytest.approx(natural)}
    with pytest.raises(ConfigError, match="target_ramp needs target_silence"):
        NeuronConfig(kind="integer", target_ramp=0.1)


def test_a_learned_zone_is_shaped_by_its_gradient_and_sized_by_the_target() -> None:
    """Channels that weigh more in the loss end with smaller zones, at the same silence."""

    def train(config: NeuronConfig) -> tuple[Neuron, float, float]:
        torch.manual_seed(0)
        neuron = make_neuron("mixer_input", config)
        weights = torch.logspace(-1, 1, 64)
        silence = Silence([neuron], rate=0.2)
        optimizer = torch.optim.Adam([neuron.dead_zone, neuron.k], lr=1e-2)
        seen, losses = [], []
        for _ in range(300):
            x = torch.randn(4, 50, 64)
            silence.clear()
            spikes, _ = neuron(x, {}, probe=silence)
            loss = (weights * (spikes.values - x)).square().mean()
            if config.learn:
                optimizer.zero_grad()
                loss.backward()
                silence.shape(silence.edges())
                optimizer.step()
            counts = silence.counts()
            silence.steer(counts)
            seen.append(float(counts[0, 0] / counts[1, 0]))
            losses.append(loss.item())
        return neuron, sum(seen[-50:]) / 50, sum(losses[-50:]) / 50

    learned, silent, loss = train(dataclasses.replace(STEERED, learn="dead_zone"))
    _, expected, uniform = train(STEERED)
    assert silent == pytest.approx(expected, abs=0.01) == pytest.approx(0.7, abs=0.01)
    assert loss < 0.2 * uniform
    zones = learned.dead_zone.detach()
    assert zones[-16:].mean() < 0.5 * zones[:16].mean()
    assert (zones >= MIN_DEAD_ZONE).all()
    assert learned.k.item() == 3.0
    assert not learned.k.requires_grad


def test_a_learned_zone_without_target_stays_in_range() -> None:
    neuron = make_neuron("mixer_input", NeuronConfig(kind="integer", learn="dead_zone"))
    silence = Silence([neuron], rate=0.2)
    neuron.dead_zone.data[:2] = torch.tensor([-1.0, 1e3])
    neuron.dead_zone.data[2:] = 0.3
    step(silence, neuron, torch.randn(2, 3, 64))
    assert neuron.dead_zone[:3].tolist() == pytest.approx([MIN_DEAD_ZONE, MAX_DEAD_ZONE, 0.3])


def test_channels_that_stay_silent_are_dead_and_revived() -> None:
    zoned = NeuronConfig(kind="integer", k=2.0, dead_zone=0.3, max_count=2)
    neuron, other = make_neuron("mixer_input", zoned), make_neuron("ffn_hidden", STEERED)
    silence = Silence([neuron, other, make_neuron("head_input", NeuronConfig())], 0.0, 4)
    neuron.dead_zone.data[:8] = 50.0
    zones = []
    for i in range(9):
        silence.clear()
        silence.measure_all = i == 8
        x = torch.ones(2, 3, 64)
        x[..., 32:48] = 5.0
        neuron(x, {}, probe=silence)
        other(x if i == 5 else torch.zeros_like(x), {}, probe=silence)
        counts = silence.counts()
        silence.steer(counts)
        silence.watch(silence.fired())
        zones.append(neuron.dead_zone[0].item())
    assert zones == [50.0] * 3 + [25.0] * 4 + [12.5] * 2
    assert neuron.dead_zone[8:].tolist() == pytest.approx([0.3] * 56)
    # Once for the other one: its wait began again with the step in which it fired.
    assert other.dead_zone.tolist() == [0.25] * 64
    assert silence.revived == 2 * 8 + 64
    assert silence.dead(9) == {"mixer_input": 8 / 64, "ffn_hidden": 0.0}
    assert silence.dead(3) == {"mixer_input": 8 / 64, "ffn_hidden": 1.0}
    assert silence.saturated(counts) == {"mixer_input": pytest.approx(16 / 64)}


def test_without_revival_zones_are_left_alone() -> None:
    neuron = make_neuron("mixer_input", NeuronConfig(kind="integer", dead_zone=0.5))
    silence = Silence([neuron], rate=0.2)
    for _ in range(5):
        step(silence, neuron, torch.zeros(1, 2, 64))
    assert (neuron.dead_zone == 0.5).all()
    assert silence.dead(5) == {"mixer_input": 1.0}
    assert silence.dead(6) == {"mixer_input": 0.0}
    assert silence.revived == 0


def test_ranks_add_up_to_one_process() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(STEERED, dead_zone=2.5)
    whole, left, right = (make_neuron("mixer_input", config) for _ in range(3))
    one, *ranks = (Silence([neuron], 0.2, 2) for neuron in (whole, left, right))
    for _ in range(6):
        x = torch.randn(2, 3, 64)
        step(one, whole, x)
        for silence, neuron, part in zip(ranks, (left, right), x, strict=True):
            silence.clear()
            neuron(part[None], {}, probe=silence)
        counts, fired = (sum(f(s) for s in ranks) for f in (Silence.counts, Silence.fired))
        for silence in ranks:
            silence.steer(counts)
            silence.watch(fired)
    assert one.revived > 0
    for silence, neuron in zip(ranks, (left, right), strict=True):
        assert torch.equal(neuron.dead_zone, whole.dead_zone)
        assert silence.revived == one.revived
        assert torch.equal(silence.state_dict()["idle"], one.state_dict()["idle"])
