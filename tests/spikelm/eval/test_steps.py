"""spikelm.eval.steps"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.conversion.convert import convert
from spikelm.errors import ConfigError, DataError
from spikelm.eval import evaluate as evaluation
from spikelm.eval.cli import main_bench
from spikelm.eval.evaluate import evaluate, score, token_stream
from spikelm.eval.steps import CHANGES, CONFIDENCES, Deltas, bench_steps, dropped_squares, send
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.tokenizer import Tokenizer

TEXT = ["def f(x):\n    return x + 1\n", "A second document, which begins anew. " * 3]


@pytest.fixture(scope="module")
def head_folder(tiny_config: Callable[..., ModelConfig], tmp_path_factory: object) -> Path:
    """A spike-coded model whose head reads counts of several bit planes."""
    make: Callable[[str], Path] = tmp_path_factory.mktemp  # type: ignore[attr-defined]
    fine = NeuronConfig(kind="integer", k=6.0, dead_zone=0.2)
    neurons = NeuronsConfig(mixer_input=fine, ffn_hidden=fine, head_input=fine)
    folder = make("steps")
    model = LanguageModel(tiny_config(neurons=neurons)).initialise(0)
    checkpoint.save(folder / "float", model, Tokenizer.bytes())
    convert(folder / "float", folder / "coded", torch.arange(96).view(2, 48))
    return folder / "coded"


def test_receivers_know_what_was_sent() -> None:
    counts = torch.tensor([[0.0], [1], [1], [-2], [-1], [3], [4]])
    begins = [True, False, False, False, False, True, False]
    held = send(counts, begins, torch.full((len(CHANGES), 1), 9.0))
    assert CHANGES == (1, 2, 4)
    assert held[:, 0].equal(counts), "every change is sent"
    assert held[:, 1, 0].tolist() == [0, 0, 0, -2, -2, 3, 3]
    assert held[:, 2, 0].tolist() == [0, 0, 0, 0, 0, 0, 4]


def test_error_of_a_dead_zone() -> None:
    sizes = torch.tensor([3, 2, 0, 2])  # |c| = 0 0 0 1 1 3 3
    assert [dropped_squares(sizes, kept) for kept in range(5)] == [20, 11, 2, 1, 1]


def spikes(counts: Tensor) -> Spikes:
    v = torch.full((*counts.shape[:-1], 1), 0.5)
    return Spikes(counts * v, counts, v)


def test_what_stays_the_same_is_sent_once() -> None:
    neuron = Neuron("mixer_input", 4, NeuronConfig(kind="integer"))
    counts = torch.tensor([3.0, 0.0, -1.0, 2.0]).expand(1, 10, 4)
    deltas = Deltas({"mixer_input": 0.5}, [t in (0, 6) for t in range(10)])
    for part in counts.split((4, 1, 5), 1):
        deltas(neuron, part, spikes(part))
    sums = deltas.sums["mixer_input"]
    assert (sums["entries"], sums["active"], sums["fixed"]) == (40, 30, 30)
    assert sums["events"].tolist() == [2 * 3, 2 * 2, 0]
    assert sums["error"].tolist() == [0, 10, 10 * (9 + 1 + 4)]
    assert sums["sizes"][:5].tolist() == [10, 10, 10, 10, 0]


def test_report_does_not_depend_on_pieces(
    head_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench_steps(head_folder, TEXT, tokens=90)
    monkeypatch.setattr(evaluation, "PIECE_TOKENS", 7)
    parts = bench_steps(head_folder, TEXT, tokens=90)
    assert whole["tokens"] == parts["tokens"] == 90
    for name, found in whole["delta"]["classes"].items():
        for key, value in found.items():
            assert parts["delta"]["classes"][name][key] == pytest.approx(value, abs=0.01)
    assert parts["delta"]["bytes"] == pytest.approx(whole["delta"]["bytes"], rel=0.01)


def test_report_agrees_with_evaluation(head_folder: Path) -> None:
    loaded = checkpoint.load(head_folder)
    report = bench_steps(head_folder, TEXT, tokens=10**6)
    expected = evaluate(head_folder, TEXT)
    delta, confidence = report["delta"], report["confidence"]
    for name, found in delta["classes"].items():
        assert found["silent"] == pytest.approx(expected["silent_fraction"][name])
        assert found["error"][0] == 0
        assert sorted(found["silent_changes"]) == found["silent_changes"]
    skipped = 1 - delta["bytes"] / delta["bytes_without_silence"]
    assert skipped == pytest.approx(expected["weight_bytes_skippable_fraction"])
    stream = token_stream(loaded.tokenizer, TEXT)
    nats, _ = score(loaded.model, stream)
    bits = nats / math.log(2) / report["tokens"]
    assert confidence["bits_per_token"] == pytest.approx(bits, rel=1e-5)


def test_stop_follows_the_planes_of_every_token(head_folder: Path) -> None:
    """Beside a plain walk: token by token, plane by plane."""
    report = bench_steps(head_folder, TEXT, tokens=40)["confidence"]
    loaded = checkpoint.load(head_folder)
    head = loaded.model.head
    ids = torch.tensor(token_stream(loaded.tokenizer, TEXT).ids)[:41]
    begins = torch.tensor(token_stream(loaded.tokenizer, TEXT).begins)[:41]
    seen: list[Spikes] = []

    def probe(neuron: Neuron, x: Tensor, found: Spikes) -> None:
        if neuron is head.neuron:
            seen.append(found)

    with torch.inference_mode():
        loaded.model(ids[None, :40], reset=begins[None, :40], probe=probe)
    (found,) = seen
    assert found.counts is not None
    assert found.v_threshold is not None
    counts, v = found.counts[0].int(), found.v_threshold[0]
    num_planes = int(counts.abs().max()).bit_length()
    assert report["planes"] == num_planes > 1
    for threshold, stop in zip(CONFIDENCES, report["stops"], strict=True):
        planes = rows = 0
        for c, step in zip(counts, v, strict=True):
            for p in reversed(range(num_planes)):
                known = c.sign() * (c.abs() >> p << p)
                planes, rows = planes + 1, rows + int((c.abs() >> p & 1).sum())
                values = known.float()
                logits = head.linear(Spikes(values * step, values[None, None], step[None, None]))
                if logits.softmax(-1).max() >= threshold:
                    break
        assert stop["confidence"] == threshold
        assert stop["planes"] == pytest.approx(planes / 40)
        assert stop["rows"] == pytest.approx(rows / int(counts.count_nonzero()))
    assert 0 < report["stops"][0]["planes"] <= report["stops"][-1]["planes"] <= num_planes


def test_bad_input(head_folder: Path, float_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokens 1 given; allowed: 2 or more"):
        bench_steps(head_folder, TEXT, tokens=1)
    with pytest.raises(DataError, match="no text to measure on"):
        bench_steps(head_folder, ["", ""])
    config = ModelConfig(vocab_size=257, width=16, mixers=("wkv4",))
    checkpoint.save(tmp_path / "dense", LanguageModel(config).initialise(0), Tokenizer.bytes())
    with pytest.raises(ConfigError, match="no projection of .* reads spikes; convert the model"):
        bench_steps(tmp_path / "dense", TEXT)
    report = bench_steps(float_folder, TEXT, tokens=20)
    assert (report["confidence"], report["confidence_missing"]) == (None, "the head reads floats")


def test_command(
    head_folder: Path, float_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT[1])
    small = ["--data", str(file), "--tokens", "16"]
    assert main_bench(["steps", str(head_folder), *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 16
    assert main_bench(["steps", str(head_folder), *small]) == 0
    table = capsys.readouterr().out
    assert "weight bytes per token" in table
    assert "never" in table
    assert main_bench(["steps", str(float_folder), *small]) == 0
    assert "dynamic confidence: none, the head reads floats" in capsys.readouterr().out
