"""spikelm.eval.length"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm import checkpoint
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError, ConfigError
from spikelm.eval import length as module
from spikelm.eval.length import bench_length, measure, parse_lengths, text_ids, write_full_twin
from spikelm.eval.tables import length_table
from spikelm.models.coded import CodedLinear
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"test": ["held out text"], "validation": ["more of it"], "train": ["a b c"]}
    monkeypatch.setattr(module, "builtin_documents", splits.__getitem__)


def cost(value: float) -> dict[str, float]:
    return dict.fromkeys(module.QUANTITIES, value)


def test_models_take_turns_and_medians_count(
    float_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    values = iter([1.0, 10.0, 2.0, 20.0, 9.0, 90.0, 7.0, 30.0, 3.0, 60.0, 4.0, 70.0])

    def scripted(path: str, ids: list[int], backend: str) -> dict[str, float]:
        calls.append((len(ids), path == str(float_folder), backend))
        return cost(next(values))

    monkeypatch.setattr(module, "_in_fresh_process", scripted)
    report = bench_length(float_folder, [8, 2, 8], repeats=3, backend="matmul")
    turn = [(n, ours, "matmul") for n in (2, 8) for ours in (True, False)]
    assert calls == 3 * turn
    two, eight = report["measurements"]
    assert (two["length"], two["ours"], two["full"]) == (2, cost(3.0), cost(60.0))
    assert (eight["ours"], eight["full"], eight["ratio"]) == (cost(4.0), cost(30.0), cost(7.5))
    table = length_table(report)
    assert "full / ours" in table
    assert "20.00 x" in table
    assert "7.50 x" in table
    assert "4.00 ms" in table
    assert "random" in table


def test_without_full_attention(float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_in_fresh_process", lambda *_: cost(1.0))
    report = bench_length(float_folder, [4], repeats=1, full=False)
    assert report["measurements"] == [{"length": 4, "ours": cost(1.0)}]
    assert report["note"] is None
    assert "full" not in length_table(report)


def test_a_killed_process_is_reported_and_the_rest_kept(
    float_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function: object, path: str, ids: list[int], backend: str) -> Any:
            if len(ids) == 8 and path != str(float_folder):
                raise BrokenProcessPool
            return self

        def result(self) -> dict[str, float]:
            return cost(2.0)

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    report = bench_length(float_folder, [4, 8], repeats=2)
    assert report["measurements"][0]["ratio"] == cost(1.0)
    assert report["measurements"][1] == {
        "length": 8,
        "ours": cost(2.0),
        "full": None,
        "ratio": None,
    }
    assert "killed" in length_table(report)
    module.plot(report, tmp_path / "plots" / "length.png")
    assert (tmp_path / "plots" / "length.png").read_bytes()[1:4] == b"PNG"


def test_ratio_of_nothing() -> None:
    assert module._ratio(cost(3.0), cost(0.0)) == dict.fromkeys(module.QUANTITIES)
    assert module._ratio(None, cost(1.0)) is None


def test_measure_has_constant_state_and_full_attention_has_not(
    coded_folder: Path, tmp_path: Path
) -> None:
    write_full_twin(coded_folder, tmp_path)
    ids = text_ids(Tokenizer.bytes(), 96)
    short, long = (measure(str(coded_folder), ids[:n], "auto") for n in (1, 96))
    assert short["state_bytes"] == long["state_bytes"]
    short, long = (measure(str(tmp_path), ids[:n], "auto") for n in (1, 96))
    assert long["state_bytes"] - short["state_bytes"] == 95 * 4 * 2 * 2 * 2 * 8
    assert long["first_token_ms"] > 0
    assert long["ms_per_token"] > 0


@pytest.mark.parametrize("kind", ["float", "coded"])
def test_full_twin_copies_what_fits(
    kind: str, float_folder: Path, coded_folder: Path, tmp_path: Path
) -> None:
    source = {"float": float_folder, "coded": coded_folder}[kind]
    write_full_twin(source, tmp_path)
    ours, twin = (checkpoint.load(f, backend="matmul") for f in (source, tmp_path))
    config: ModelConfig = twin.model.config
    assert config.mixers == ("full", "full")
    assert config.neurons == ours.model.config.neurons
    for mine, theirs in zip(ours.model.layers, twin.model.layers, strict=True):
        for a, b in ((mine.ffn, theirs.ffn), (mine.mixer_norm, theirs.mixer_norm)):
            for name, tensor in b.state_dict().items():
                assert torch.equal(tensor, a.state_dict()[name]), name
    mine, theirs = (m.model.layers[1].mixer.input.linear for m in (ours, twin))
    if kind == "coded":
        assert isinstance(theirs, CodedLinear)
        assert torch.equal(mine.weight, theirs.weight)
    else:
        assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(ours.model.embedding.weight, twin.model.embedding.weight)


def test_text_starts_over_where_it_ends() -> None:
    tokenizer = Tokenizer.bytes()
    ids = text_ids(tokenizer, 50)
    text = b"held out text" + b"more of it" + b"a b c"
    assert bytes(ids[:28]) == text
    assert bytes(ids[28:]) == text[:22]
    assert bytes(text_ids(tokenizer, 3)) == text[:3]


def test_bad_requests(float_folder: Path, tmp_path: Path) -> None:
    assert parse_lengths("256, 1024") == [256, 1024]
    for text in ("", "256,", "1k"):
        with pytest.raises(ConfigError, match="--lengths takes integers like 256,1024"):
            parse_lengths(text)
    for lengths in ([], [0, 4], [-1]):
        with pytest.raises(ConfigError, match="allowed: integers >= 1"):
            bench_length(float_folder, lengths)
    with pytest.raises(ConfigError, match="repeats: 0 given"):
        bench_length(float_folder, [4], repeats=0)
    with pytest.raises(CheckpointError, match="no model folder"):
        bench_length(tmp_path / "none", [4])


def test_full_attention_has_no_twin(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_in_fresh_process", lambda *_: cost(1.0))
    model = LanguageModel(tiny_config(mixers=("full", "full"))).initialise(0)
    checkpoint.save(tmp_path / "full", model, Tokenizer.bytes())
    report = bench_length(tmp_path / "full", [4], repeats=1)
    assert report["measurements"] == [{"length": 4, "ours": cost(1.0)}]
    assert "no twin" in length_table(report)
