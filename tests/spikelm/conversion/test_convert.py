from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.conversion import calibrate
from spikelm.conversion.convert import coded_config, convert
from spikelm.errors import ConfigError
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.tokenizer import Tokenizer

WINDOWS = torch.randint(0, 257, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense_folder(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    model = LanguageModel(tiny_config(neurons=NeuronsConfig())).initialise(0)
    checkpoint.save(tmp_path / "dense", model, Tokenizer.bytes())
    return tmp_path / "dense"


def test_trained_thresholds_are_kept(float_folder: Path, coded_folder: Path) -> None:
    before = {n.name: n for n in checkpoint.load(float_folder).model.neurons()}
    coded = checkpoint.load(coded_folder)
    for neuron in coded.model.neurons():
        if before[neuron.name].config.kind == "integer":
            assert torch.equal(neuron.dead_zone, before[neuron.name].dead_zone)
            assert neuron.k == before[neuron.name].k
    assert coded.manifest is not None
    thresholds = {e["tensor_class"]: e["threshold"] for e in coded.manifest["neurons"]}
    assert thresholds["ffn_hidden"] == "trained"
    assert thresholds["head_input"] == "calibrated"


def test_manifest_measures_what_it_says(coded_folder: Path) -> None:
    manifest = json.loads((coded_folder / "spikes.json").read_text())
    model = checkpoint.load(coded_folder).model
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 257, (4, 48), generator=generator)
    zeros: dict[str, list[float]] = {}
    for window in windows.split(1):
        model(
            window,
            probe=lambda n, x, s: zeros.setdefault(n.name, []).append(
                (s.counts == 0).double().mean().item()
            ),
        )
    for entry in manifest["neurons"]:
        measured = sum(zeros[entry["name"]]) / 4
        assert entry["silent_fraction"] == pytest.approx(measured, abs=1e-6)
        assert entry["largest_count"] <= 127
        assert entry["silent_fraction"] <= entry["slot_sparsity"] <= 1


def test_conversion_keeps_the_logits_close(dense_folder: Path, tmp_path: Path) -> None:
    convert(dense_folder, tmp_path / "coded", WINDOWS)
    dense = checkpoint.load(dense_folder).model(WINDOWS)[0]
    coded = checkpoint.load(tmp_path / "coded").model(WINDOWS)[0]
    assert (coded - dense).norm() < 0.1 * dense.norm()


def test_silence_asked_for_is_given(dense_folder: Path, tmp_path: Path) -> None:
    silence = {"mixer_input": 0.6, "ffn_hidden": 0.97}
    manifest = convert(dense_folder, tmp_path / "coded", WINDOWS, silence=silence)
    for name, asked in silence.items():
        assert manifest["silent_fraction"][name] == pytest.approx(asked, abs=0.02)
    assert manifest["silent_fraction"]["mixer_output"] < 0.2


def test_sparse_vectors_are_calibrated() -> None:
    """One active channel in a hundred: most of its code lies far above the mean."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 400, generator=g).square() * (torch.rand(200, 400, generator=g) < 0.01)
    neuron = Neuron("ffn_hidden", 400, NeuronConfig())
    neuron.name = "n"
    zones = calibrate.DeadZones()
    zones(neuron, x, Spikes(x, None, None))
    assert zones.quantile("n", 0.9) == 0.0
    zone = zones.quantile("n", 0.995)
    silent = (x.abs() <= zone * x.mean(-1, keepdim=True)).double().mean().item()
    assert silent == pytest.approx(0.995, abs=0.0005)
    errors = calibrate.Errors({"n": 0.0})
    errors(neuron, x, Spikes(x, None, None))
    assert errors.errors["n"].min() < 1e-3 * x.square().sum()


def test_saturated_counts_are_reported(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    ternary = NeuronConfig(kind="integer", k=6.0, max_count=1)
    model = LanguageModel(tiny_config(neurons=NeuronsConfig(ffn_input=ternary))).initialise(0)
    checkpoint.save(tmp_path / "model", model, Tokenizer.bytes())
    manifest = convert(tmp_path / "model", tmp_path / "coded", WINDOWS)
    entry = next(e for e in manifest["neurons"] if e["name"] == "layers.0.ffn.input")
    assert (entry["code"], entry["steps"]) == ("ternary", 1)
    # Every count is -1, 0 or 1, and every one that is not silent sits at the clip.
    assert entry["saturated_fraction"] == pytest.approx(1 - entry["silent_fraction"])


def test_unclipped_counts_are_clipped_to_int8(tiny_config: Callable[..., ModelConfig]) -> None:
    faithful = NeuronConfig(kind="integer", k=3.0)
    config = coded_config(tiny_config(neurons=NeuronsConfig(mixer_input=faithful)))
    assert config.neurons.mixer_input.max_count == 127
    assert config.neurons.queries_keys.kind == "off"
    assert config.neurons.head_input.kind == "integer"


@pytest.mark.parametrize(
    ("silence", "message"),
    [
        ({"ffn_hiden": 0.5}, "did you mean 'ffn_hidden'"),
        ({"head_input": 1.0}, "allowed: 0 <= fraction < 1"),
        ({"ffn_hidden": 0.5}, "its threshold was trained"),
    ],
)
def test_bad_silence(
    float_folder: Path, tmp_path: Path, silence: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(float_folder, tmp_path / "out", WINDOWS, silence=silence)
    assert not (tmp_path / "out").exists()


def test_a_coded_folder_is_not_converted_again(coded_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="spike-coded already"):
        convert(coded_folder, tmp_path / "out", WINDOWS)
