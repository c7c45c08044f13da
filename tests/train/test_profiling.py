from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spikelm_train.profiling import NEURONS, WARM_UP, StepProfiler, backward_nodes, neuron_share
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]


class Event:
    def __init__(self, key: str, cpu: float, device: float = 0.0) -> None:
        self.key, self.cpu_time_total, self.device_time_total = key, cpu, device


def test_share_of_neurons() -> None:
    events = [
        Event("spikelm::step", 200.0, 50.0),
        Event(NEURONS, 10.0, 1.0),
        Event("_NativeSpikeBackward", 6.0, 1.0),
        Event("_IntegerSpikeBackward", 4.0),
        Event("MmBackward0", 90.0, 40.0),
    ]
    assert neuron_share(events) == pytest.approx(0.1)
    assert neuron_share(events, on_cuda=True) == pytest.approx(0.04)


def test_backward_nodes_are_the_neurons_own() -> None:
    nodes = backward_nodes()
    assert {"_NativeSpikeBackward", "_IntegerSpikeBackward", "_LIFBackward"} <= set(nodes)
    assert "_WKV4Backward" not in nodes


def test_a_profile_of_training_steps(make: Make, tmp_path: Path) -> None:
    trainer = make()
    said: list[str] = []
    folder = tmp_path / "profile"
    profiler = StepProfiler(2, folder, trainer.silence.neurons, said.append)
    for _ in range(WARM_UP + 4):
        with profiler.step():
            trainer.advance(0.0)
    profiler.close()
    assert len(said) == 1
    share = float(said[0].partition("neurons: ")[2].partition("%")[0])
    assert 1 < share < 80
    assert "aten::mm" in (folder / "table.txt").read_text()
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("spikelm::step") == 2
    # Once per population and step.
    assert names.count(NEURONS) == 2 * len(trainer.silence.neurons)
    assert any(name in names for name in backward_nodes())
    assert all("forward" not in vars(neuron) for neuron in trainer.silence.neurons)


def test_a_run_that_ends_first_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    trainer = make()
    profiler = StepProfiler(5, tmp_path / "profile", trainer.silence.neurons, print)
    with profiler.step():
        trainer.advance(0.0)
    profiler.close()
    assert all("forward" not in vars(neuron) for neuron in trainer.silence.neurons)


def test_no_profile(make: Make, tmp_path: Path) -> None:
    profiler = StepProfiler(0, tmp_path / "profile", make().silence.neurons, print)
    with profiler.step():
        pass
    profiler.close()
    assert not (tmp_path / "profile").exists()
