from __future__ import annotations

import torch
from torch import Tensor

from spikelm.config import NeuronConfig
from spikelm.neurons import Neuron, Spikes


def make(kind: str) -> Neuron:
    neuron = Neuron("layers.0.ffn_input", "ffn_input", 4, NeuronConfig(kind=kind))  # type: ignore[arg-type]
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
        assert seen[-1][0] == "layers.0.ffn_input"
        assert seen[-1][1] is x
        assert seen[-1][2] is spikes
    assert len(seen) == 3
