"""spikelm.eval.inspect"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.errors import CheckpointError, DataError
from spikelm.eval import inspect as module
from spikelm.eval.evaluate import evaluate
from spikelm.eval.inspect import describe_state, inspect
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer

TEXT = ["Return the absolute value of x, as fabs() does for floats.", "Another document."]


def test_spike_coded_model_tells_its_manifest(coded_folder: Path) -> None:
    manifest = json.loads((coded_folder / checkpoint.MANIFEST).read_text())
    report = inspect(coded_folder, backend="embedding_bag_int8")
    assert report["silence_measured_on"] == "calibration text, 192 tokens"
    assert (report["kind"], report["backend"]) == ("spike-coded", "embedding_bag_int8")
    entries = {entry["name"]: entry for entry in manifest["neurons"]}
    assert [row["name"] for row in report["populations"]] == list(entries)
    for row in report["populations"]:
        entry = entries[row["name"]]
        for key in ("tensor_class", "channels", "code", "steps", "silent_fraction"):
            assert row[key] == entry[key]
        assert row["threshold"]["origin"] == entry["threshold"]
        assert row["threshold"]["max_count"] == 127
        assert (row["weights"] is None) == (row["tensor_class"] == "queries_keys")
    assert json.loads(json.dumps(report)) == report


def test_bytes_read_add_up(coded_folder: Path) -> None:
    report = inspect(coded_folder, backend="embedding_bag_int8")
    weights = [(row["weights"], row) for row in report["populations"] if row["weights"]]
    for found, row in weights:
        out_features, in_features = found["shape"]
        assert found["bits"] == 8
        assert found["bytes"] == in_features * (out_features + 8)
        share = found["bytes_read_per_token"] / found["bytes"]
        assert share == pytest.approx(1 - row["silent_fraction"])
    other = report["other_bytes_per_token"]
    total = other + sum(found["bytes"] for found, _ in weights)
    read = other + sum(found["bytes_read_per_token"] for found, _ in weights)
    assert report["weight_bytes_per_token"] == total
    assert report["weight_bytes_read_per_token"] == pytest.approx(read)
    assert read < total


def test_float_model_is_measured_and_reads_everything(
    float_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "builtin_documents", {"validation": TEXT}.__getitem__)
    report = inspect(float_folder)
    tokens = sum(map(len, TEXT)) + len(TEXT)
    assert report["silence_measured_on"] == f"built-in validation text, {tokens} tokens"
    assert report["weight_bytes_read_per_token"] == report["weight_bytes_per_token"]
    evaluation = evaluate(float_folder, TEXT, decode_tokens=1)
    for name in ("ffn_hidden", "gate_input"):
        rows = [row for row in report["populations"] if row["tensor_class"] == name]
        mean = sum(row["silent_fraction"] for row in rows) / len(rows)
        assert mean == pytest.approx(evaluation["silent_fraction"][name])
    first, gates = report["populations"][:2]
    assert first["threshold"] == {
        "k": 6.0,
        "dead_zone": 0.5,
        "max_count": 127,
        "unsigned": False,
        "origin": None,
    }
    assert (gates["neuron"], gates["threshold"], gates["code"]) == ("off", None, None)
    assert first["weights"]["bits"] == 32


def test_given_text_is_measured_on_and_cut(
    coded_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEASURED_TOKENS", 20)
    report = inspect(coded_folder, TEXT)
    assert report["silence_measured_on"] == "given text, 20 tokens"
    first = evaluate(coded_folder, [TEXT[0][:19]], decode_tokens=1)
    head = report["populations"][-1]
    # The cut document has no end, the evaluated one has: the inputs are the same 20 tokens.
    assert head["silent_fraction"] == pytest.approx(first["silent_fraction"]["head_input"])
    assert head["threshold"]["origin"] == "calibrated"


def test_lif_threshold_and_membrane(tiny_config: Callable[..., ModelConfig]) -> None:
    lif = NeuronConfig(kind="lif", tau=4.0, v_threshold=0.5)
    model = LanguageModel(tiny_config(neurons=NeuronsConfig(ffn_hidden=lif, head_input=lif)))
    state = describe_state(model)
    assert state["per_layer"]["delta"]["tensors"]["ffn.output.v"] == 4 * 64
    assert state["head"] == {"head.v": 4 * 32}
    neuron = next(n for n in model.neurons() if n.tensor_class == "ffn_hidden")
    assert module._threshold(neuron, None) == {"v_threshold": 0.5, "tau": 4.0, "origin": None}


def test_state_is_the_models_and_grows_only_with_full(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    model = LanguageModel(tiny_config(mixers=("delta", "full", "delta", "full"))).initialise(0)
    described = describe_state(model)
    _, three = model(torch.zeros(1, 3, dtype=torch.int64))
    _, seven = model(torch.zeros(1, 7, dtype=torch.int64))
    assert described["bytes"] == model.zero_state(1).nbytes
    assert seven.nbytes - three.nbytes == 4 * described["bytes_per_token"] > 0
    assert described["per_layer"]["full"]["layers"] == [1, 3]
    assert described["per_layer"]["delta"]["tensors"]["mixer.S"] == 4 * 2 * 8 * 12
    per_layer = described["per_layer"].values()
    tensors = sum(len(kind["layers"]) * sum(kind["tensors"].values()) for kind in per_layer)
    assert tensors + 8 == described["bytes"]
    constant = LanguageModel(tiny_config())
    assert describe_state(constant)["bytes_per_token"] == 0


def test_manifest_of_another_model_is_an_error(coded_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(coded_folder, tmp_path / "copy")
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["neurons"].pop()
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lacks 'head'; convert the model again"):
        inspect(folder)


def test_empty_text_is_an_error(float_folder: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        inspect(float_folder, [])


def test_every_population_has_words(float_folder: Path) -> None:
    rows = inspect(float_folder, TEXT)["populations"]
    assert all(row["fed_by"] == module.FED_BY[row["tensor_class"]] for row in rows)
    assert [n.name for n in checkpoint.load(float_folder).model.neurons()] == [
        row["name"] for row in rows
    ]
    assert Tokenizer.bytes().vocab_size in rows[-1]["weights"]["shape"]
