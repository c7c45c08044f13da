"""spikelm.eval.decode"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spikelm.config import ModelConfig, NeuronsConfig, load_model_config, save_yaml
from spikelm.errors import BackendError, CheckpointError, ConfigError
from spikelm.eval import decode as module
from spikelm.eval.cli import main_bench
from spikelm.eval.decode import OurReader, bench_decode, parse_silence
from spikelm.eval.kernel import shape_of
from spikelm.eval.peers import InProcess, Reader, Seconds
from spikelm.kernels import rows

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


@pytest.fixture(scope="module")
def shape() -> ModelConfig:
    """Three layers of an RWKV-7."""
    config = load_model_config("rwkv7-0.1b")
    return dataclasses.replace(
        config,
        vocab_size=300,
        width=128,
        mixers=config.mixers[:3],
        ffn=dataclasses.replace(config.ffn, hidden_dim=512),
    )


@pytest.fixture
def preset(shape: ModelConfig, tmp_path: Path) -> str:
    save_yaml(shape, tmp_path / "tiny.yaml")
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants in this process."""

    def spawned(name: str, build: Callable[..., Reader], *arguments: Any) -> InProcess:
        return InProcess(name, build(*arguments))

    monkeypatch.setattr(module, "Spawned", spawned)


@pytest.mark.parametrize(("silence", "hidden", "bits"), [(0.8, 0.8, 8), (0.5, 0.85, 4)])
def test_silence_is_what_was_asked_for(
    shape: ModelConfig, silence: float, hidden: float, bits: int
) -> None:
    reader = OurReader(shape, silence, hidden, bits, 1)
    reader.hold(7)
    reader.read(20)
    assert reader.state.position.item() == 27
    facts = reader.facts()
    # The bottlenecks of gates, which all fire, are 7 % of the entries here.
    low, high = min(silence, hidden), max(silence, hidden)
    assert low - 0.15 < facts["silent_fraction"] < high + 0.05
    assert 0 < facts["bytes_per_token"] < facts["weight_bytes"]
    assert {m.bits for n, m in reader.traffic.matrices.items() if n != "head"} == {bits}
    assert reader.traffic.matrices["head"].bits == 8


def test_dense_fires(shape: ModelConfig) -> None:
    reader = OurReader(shape, 0.0, 0.0, 8, 1)
    reader.hold(0)
    reader.read(10)
    # Squared ReLU silences half of the hidden vector whatever the threshold.
    assert reader.facts()["silent_fraction"] < 0.3


@pytest.mark.usefixtures("here")
def test_rounds_and_ratios(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"spikelm": [1.0, 2.0, 4.0], "dense": [3.0, 4.0, 4.0]}
    turns = []

    def timed(self: InProcess, position: int, n: int) -> list[Seconds]:
        wall = script[self.name][sum(name == self.name for name in turns)]
        turns.append(self.name)
        assert (position, n) == (9, 5)
        return [Seconds(wall, 2 * wall)] * n

    monkeypatch.setattr(InProcess, "decode_at", timed)
    report = bench_decode(preset, rounds=3, tokens=5, position=9)
    assert turns == 3 * ["spikelm", "dense"]
    ours, dense = report["contestants"]
    assert (ours["name"], ours["ms_per_token"], ours["cpu_ms_per_token"]) == ("spikelm", 2e3, 4e3)
    assert (dense["name"], dense["ms_per_token"]) == ("dense", 4e3)
    assert ours["bytes_per_token"] < dense["bytes_per_token"] <= dense["weight_bytes"]
    assert report["ratios"]["dense"]["wall"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}


@pytest.mark.usefixtures("here")
def test_limit_and_load(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [0]

    @contextlib.contextmanager
    def busy(processes: int) -> Iterator[None]:
        running[0] = processes
        yield
        running[0] = 0

    def timed(self: InProcess, position: int, n: int) -> list[Seconds]:
        wall = 1.0 + running[0] * (2 if self.name == "dense" else 1)
        return [Seconds(wall, 1.0)] * n

    rates = iter([{"stream": 4e6, "touch": 2e6}, {"stream": 2e6, "touch": 1e6}])
    monkeypatch.setattr(module, "busy", busy)
    monkeypatch.setattr(InProcess, "decode_at", timed)
    monkeypatch.setattr(OurReader, "bandwidth", lambda self, threads: next(rates))
    report = bench_decode(preset, rounds=2, load=3)
    assert {name: r["wall"]["median"] for name, r in report["slowdown"].items()} == {
        "spikelm": 4.0,
        "dense": 7.0,
    }
    assert report["contestants"][0]["ms_per_token"] == 1e3
    limit, ours = report["limit"], report["contestants"][0]
    gathered, read = ours["row_bytes"], ours["bytes_per_token"] + 2 * ours["state_bytes"]
    assert 0 < gathered < ours["bytes_per_token"]
    best = [read / 4e6, read / 2e6]
    assert limit["ms_per_token_at_stream"] == pytest.approx(1e3 * sum(best) / 2)
    real = [gathered / 2e6 + (read - gathered) / 4e6, gathered / 1e6 + (read - gathered) / 2e6]
    assert limit["ms_per_token"] == pytest.approx(1e3 * sum(real) / 2)
    assert limit["ours_over"]["highest"] == pytest.approx(1 / real[0])
    assert limit["weights_gb_per_s"]["median"] == pytest.approx(ours["bytes_per_token"] / 1e9)


def test_bandwidth_is_that_of_rows_that_are_skipped(shape: ModelConfig) -> None:
    reader = OurReader(shape, 0.8, 0.8, 8, 1)
    assert all(rate > 0 for rate in reader.bandwidth(1).values())
    assert reader.passes is not None
    expected = reader.facts()["row_bytes"]
    assert reader.passes.event_bytes == pytest.approx(expected, rel=0.1)
    assert reader.passes.num_bytes < reader.traffic.num_bytes
    dense = OurReader(shape, 0.0, 0.0, 8, 1)
    assert set(dense.bandwidth(1)) == {"stream", "touch"}


@pytest.mark.usefixtures("here")
def test_command(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rounds", "1", "--tokens", "2", "--silence", "0.5,0.9"]
    assert main_bench(["decode", preset, *small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["silence_asked_for"] == {"inputs": 0.5, "ffn_hidden": 0.9}
    assert main_bench(["decode", preset, *small, "--load", "1"]) == 0
    printed = capsys.readouterr().out
    assert "over ours" in printed
    assert "memory allows" in printed
    assert "beside 1 busy processes" in printed
    assert main_bench(["decode", preset, *small, "--batch", "3"]) == 0
    assert "3 sequences at once" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("folder", ["float_folder", "coded_folder"])
def test_a_models_folder_gives_its_shape(
    folder: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(request.getfixturevalue(folder))
    small = ["--rounds", "1", "--against", "dense", "--json"]
    weights = {}
    for name, value in {"decode": ["--tokens", "2"], "prefill": ["--prompt-tokens", "5"]}.items():
        assert main_bench([name, model, *small, *value]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["preset"] == model
        ours, dense = report["contestants"]
        assert ours["bytes_per_token"] < dense["bytes_per_token"]
        weights[name] = ours["weight_bytes"]
    # What its own neurons are does not matter, nor that it is spike-coded.
    shape = shape_of(model)
    reader = OurReader(dataclasses.replace(shape, neurons=NeuronsConfig()), 0.8, 0.8, 8, 1)
    assert set(weights.values()) == {reader.facts()["weight_bytes"]}


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        bench_decode(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="holds a 'llama' model; expected 'spikelm'"):
        bench_decode("rwkv7-0.1b", peer_model=str(tmp_path))


@pytest.mark.parametrize(
    ("peer", "package"),
    [("llama.cpp", "llama_cpp"), ("transformers", "transformers"), ("rwkv", "rwkv")],
)
def test_everybody_says_what_a_token_reads(preset: str, peer: str, package: str) -> None:
    pytest.importorskip(package)
    report = bench_decode(preset, rounds=1, tokens=1, against=[peer], bits=4)
    ours, other = report["contestants"]
    assert ours["bytes_per_token"] < other["bytes_per_token"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"silence": 1.0}, "silence: 1.0 given; allowed: 0 <= silence < 1"),
        ({"hidden_silence": -0.1}, "hidden silence: -0.1 given"),
        ({"bits": 3}, "bits: 3 given; allowed: 8, 4"),
        ({"threads": 0}, "threads: 0 given"),
        ({"rounds": 0}, "rounds: 0 given"),
        ({"load": -1}, "load: -1 given"),
        ({"position": -1}, "position: -1 given; allowed: an integer >= 0"),
        ({"batch": 0}, "batch: 0 given; allowed: an integer >= 1"),
        (
            {"batch": 2, "against": ["dense", "rwkv"]},
            "batch: 2 given against rwkv; several sequences at once are",
        ),
        ({"against": ["vllm"]}, "against: 'vllm' given"),
        ({"preset": "rwkv7"}, "no such file or preset"),
        ({"peer_model": "qwen"}, "no such file or preset"),
        (
            {"preset": "spikelm-demo", "against": ["dense", "llama.cpp"]},
            "this shape is neither; give llama.cpp another one: --peer-model",
        ),
        (
            {"peer_model": "qwen2.5-0.5b", "against": ["rwkv"]},
            "the rwkv package reads shapes with rwkv7 layers; leave it out",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bench_decode(**({"preset": "rwkv7-0.1b"} | options))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["x", "0.5,0.6,0.7", ""])
def test_bad_silence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"one number like 0.8 or two"):
        parse_silence(text)


def test_what_does_not_decode_natively_is_said(shape: ModelConfig) -> None:
    config = dataclasses.replace(shape, head_qk_dim=8)
    with pytest.raises(BackendError, match="does not decode natively: there is no native form of"):
        OurReader(config, 0.5, 0.5, 8, 1)


def test_a_batch_shares_the_time_of_a_step(
    preset: str, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Seconds(3.0, 6.0)]
    monkeypatch.setattr(InProcess, "decode_at", lambda self, position, n: n * steps)
    report = bench_decode(preset, rounds=1, tokens=2, batch=3, against=[])
    (ours,) = report["contestants"]
    assert (ours["ms_per_token"], ours["cpu_ms_per_token"]) == (1e3, 2e3)
