from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml

from spikelm.cli import main as spikelm
from spikelm.config import ModelConfig, from_dict
from spikelm.errors import ConfigError
from spikelm_train.bench import add_options, bench_train, measure, numbers, ratio, table
from spikelm_train.contestants import enter, facts, llama_twin, turn

SHAPE = {
    "width": 64,
    "vocab_size": 300,
    "mixers": ["delta", "window"],
    "delta": {"num_heads": 2, "key_dim": 16, "value_dim": 16, "gate_rank": 8},
    "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "window": 16},
    "ffn": {"kind": "channel_mix", "hidden_dim": 256},
    "neurons": {"ffn_hidden": {"kind": "integer", "unsigned": True, "dead_zone": 0.5}},
}


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "shape.yaml"
    path.write_text(yaml.safe_dump(SHAPE))
    return str(path)


@pytest.mark.slow
def test_parts_with_processes_of_their_own(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "train", preset, "--tokens", "1024", "--peer-lengths", "512", "--json"]
    command += ["--longest", "1024", "--rounds", "1", "--parts", "transformer,length"]
    assert spikelm(command) == 0
    report = json.loads(capsys.readouterr().out)
    parts = report["parts"]
    assert {part: list(found["ratios"]) for part, found in parts.items()} == {
        "transformer 512": ["bare / transformer"],
        "length": ["1024 / 512"],
    }
    peers = parts["transformer 512"]["contestants"]
    ours, theirs = (peers[name]["parameters"] for name in ("bare", "transformer"))
    assert theirs == pytest.approx(ours, rel=0.02)
    assert all(one["peak_bytes"] > 50e6 for one in peers.values())
    assert "peak_bytes" not in parts["length"]["contestants"]["512"]
    shown = table(report)
    for part in ("length: 1024 / 512", "1.050", "transformer 512", "MiB"):
        assert part in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["overheat"]}, "did you mean 'overhead'"),
        ({"rounds": 0}, "--rounds 0"),
        ({"tokens": 1000, "parts": ["length"]}, "no multiple of the length 512"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_train("spikelm-demo", **options)  # type: ignore[arg-type]


def test_numbers_of_an_option() -> None:
    assert numbers("--peer-lengths", "512,2048") == [512, 2048]
    for text in ("512,", "0", "x"):
        with pytest.raises(ConfigError, match="--peer-lengths"):
            numbers("--peer-lengths", text)


def test_turns_alternate_and_ratios_are_formed_within_rounds() -> None:
    order: list[str] = []

    def take(name: str) -> tuple[float, float]:
        order.append(name)
        return float(len(order)), 2.0 * len(order)

    found = measure(["a", "b"], take, 2, 2)
    # The first turns do not count.
    assert order == ["a", "b", "a", "b", "b", "a", "b", "a", "a", "b"]
    assert found["a"] == {"seconds": [4.5, 8.5], "cpu_seconds": [9.0, 17.0]}
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_contestants_take_steps(tmp_path: Path) -> None:
    shape = from_dict(ModelConfig, SHAPE)
    for kind in ("spikelm", "bare", "dense", "transformer"):
        enter(kind, kind, shape, 32, 2, 1, "fp32", str(tmp_path))
        wall, cpu = turn(kind)
        assert wall > 0
        assert cpu > 0
    assert facts("dense")["parameters"] < facts("bare")["parameters"]
    # The first step is a logged one.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_transformer_has_as_many_parameters() -> None:
    shape = from_dict(ModelConfig, SHAPE)
    own = 2 * 300 * 64 + 64  # embedding, head, last norm
    twin = llama_twin(shape, 32)
    assert sum(p.numel() for p in twin.parameters()) > own
    assert twin(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.shape == (1, 8, 300)
    with pytest.raises(ConfigError, match="without an FFN"):
        llama_twin(from_dict(ModelConfig, {**SHAPE, "ffn": {"hidden_dim": 1}}), 32)


def test_options_have_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert parser.parse_args([]).model == "spikelm-demo"
