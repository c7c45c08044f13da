"""spikelm.eval.kernel"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.config import load_model_config, save_yaml
from spikelm.errors import ConfigError
from spikelm.eval import kernel as module
from spikelm.eval.cli import main_bench
from spikelm.eval.kernel import PASSES, bench_kernel, random_counts, random_matrices
from spikelm.kernels import rows
from spikelm.kernels.measure import Passes

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


@pytest.fixture
def preset(tmp_path: Path) -> str:
    config = load_model_config("rwkv7-0.1b")
    config = dataclasses.replace(
        config,
        vocab_size=300,
        width=128,
        mixers=config.mixers[:2],
        ffn=dataclasses.replace(config.ffn, hidden_dim=512),
    )
    save_yaml(config, tmp_path / "tiny.yaml")
    return str(tmp_path / "tiny.yaml")


def test_matrices_are_those_of_the_layers(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(m.in_features, m.out_features) for m in random_matrices(preset, 4, g)]
    assert shapes.count((128, 512)) == shapes.count((512, 128)) == 2
    assert shapes[-1] == (128, 300)
    # Not the second halves of low-rank gates.
    assert all(inputs >= 128 for inputs, _ in shapes)
    monkeypatch.setattr(module, "ENOUGH_BYTES", 2e5)
    matrices = random_matrices(preset, 8, g)
    assert sum(m.nbytes for m in matrices[:-1]) < 2e5 <= sum(m.nbytes for m in matrices)


def test_counts_are_as_silent_as_asked_for() -> None:
    counts = random_counts(10_000, 0.9, torch.Generator().manual_seed(0))
    assert abs((counts == 0).float().mean().item() - 0.9) < 0.02
    assert counts.unique().tolist() == [-2, -1, 0, 1, 2]


def test_ratios_are_formed_within_a_round(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    clock = [0.0]
    script = {"event": [2, 6, 4], "dense": [4, 6, 12], "touch": [1, 2, 4], "stream": [1, 1, 1]}

    def turn(name: str) -> Any:
        def run(self: Passes, threads: int) -> None:
            clock[0] += script[name][sum(t == name for t in turns)]
            turns.append(name)
            assert threads == 2

        return run

    monkeypatch.setattr(module, "_check", lambda passes: None)
    monkeypatch.setattr(Passes, "__init__", lambda self, *_: self.__dict__.update(event_bytes=0))
    monkeypatch.setattr(Passes, "num_bytes", 6e9, raising=False)
    for name in PASSES:
        monkeypatch.setattr(Passes, name, turn(name))
    monkeypatch.setattr(module, "process_time", lambda: clock[0])
    report = bench_kernel(preset, silence=[0.5], threads=2, rounds=3)
    assert turns == 3 * list(PASSES)
    (row,) = report["measurements"]
    assert row["event_over_touch"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert row["dense_over_event"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    # By the CPU time of one of the two threads.
    assert row["passes"]["dense"]["cpu_ms"] == 3e3
    assert row["passes"]["dense"]["gb_per_s"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}


def test_command(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rounds", "1", "--silence", "0.5,0.9", "--bits", "4"]
    assert main_bench(["kernel", preset, *small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["silence"] for row in report["measurements"]] == [0.5, 0.9]
    assert main_bench(["kernel", preset, *small]) == 0
    assert "over touch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"silence": [0.5, 1.0]}, "silence: 1.0 given; allowed: 0 <= silence < 1"),
        ({"bits": 3}, "bits: 3 given; allowed: 8, 4"),
        ({"threads": 0}, "threads: 0 given"),
        ({"rounds": 0}, "rounds: 0 given"),
        ({"preset": "rwkv7"}, "no such file or preset"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bench_kernel(**({"preset": "rwkv7-0.1b"} | options))
    assert message in str(caught.value)


def test_bad_silence(preset: str) -> None:
    with pytest.raises(ConfigError, match=r"takes numbers like 0.7,0.9, got '0.7;0.9'"):
        main_bench(["kernel", preset, "--silence", "0.7;0.9"])
