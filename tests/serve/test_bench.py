"""`spikelm bench serve`: what it measures of a started server, and of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spikelm import cli
from spikelm.checkpoint import load
from spikelm.eval.gguf import stored_tensors
from spikelm.eval.traffic import num_parameters
from spikelm_serve.rivals import shape_like

COMMAND = ["bench", "serve"]


def test_load_forks_and_a_long_conversation(
    coded_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--parts", "load,fork,endless", "--streams", "1,3", "--tokens", "4"]
    options += ["--rounds", "1", "--endless", "60000", "--json"]
    assert cli.main([*COMMAND, str(coded_folder), *options]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [row["streams"] for row in report["load"]] == [1, 3]
    assert report["load"][0]["over_one_stream"] == 1
    assert all(row["tokens_per_second"] > 0 for row in report["load"])
    assert report["fork"]["fork_ms"] > 0
    tenths = report["endless"]["tenths"]
    assert len(tenths) == 10
    assert tenths[-1]["tokens"] >= 60_000
    assert all(row["state_bytes"] == tenths[0]["state_bytes"] for row in tenths)
    assert all(row["resident_bytes"] > 0 for row in tenths)


def test_turns_as_text(coded_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--parts", "turns", "--turns", "12"]
    assert cli.main([*COMMAND, str(coded_folder), *options]) == 0
    assert "turns 2 to 11 of a chat: first text after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "loads"], "--parts loads given; allowed: some of load,"),
        (["--against", "vllm"], "--against vllm given; allowed: some of llama.cpp, transformers"),
    ],
)
def test_what_is_refused(
    coded_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main([*COMMAND, str(coded_folder), *options]) != 0
    assert message in capsys.readouterr().err


def test_a_rival_has_as_many_parameters(coded_folder: Path) -> None:
    shape = shape_like(coded_folder)
    model = load(coded_folder).model
    rival = sum(tensor.num_weights for tensor in stored_tensors(shape, "Q8_0").values())
    # The tiny model is hardly larger than what every Qwen2 has.
    assert rival == pytest.approx(num_parameters(model), rel=0.5)
    assert shape.num_layers == model.config.num_layers
