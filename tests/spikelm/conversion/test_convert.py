from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikelm import checkpoint
from spikelm.coding.meter import DeadZones
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.conversion import calibrate
from spikelm.conversion.convert import Rounding, coded_config, convert
from spikelm.errors import CheckpointError, ConfigError
from spikelm.models.coded import CodedLinear, projections
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
    zones = DeadZones()
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


@pytest.fixture(scope="module")
def four_bit_folder(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four") / "coded"
    convert(float_folder, folder, WINDOWS, bits=4)
    return folder


def test_four_bits_take_half_the_bytes(coded_folder: Path, four_bit_folder: Path) -> None:
    eight, four = (load_file(f / "model.safetensors") for f in (coded_folder, four_bit_folder))
    for name, tensor in eight.items():
        if tensor.dtype == torch.int8:
            assert four[name].dtype == torch.uint8
            assert four[name].shape == (tensor.shape[0], -(-tensor.shape[1] // 2))
    config, manifest = (
        json.loads((four_bit_folder / name).read_text()) for name in ("config.json", "spikes.json")
    )
    assert config["spike_coding"] == {"bits": 4, "group_size": 1}
    assert (manifest["bits"], manifest["group_size"]) == (4, 1)
    found = {(e["bits"], e["rounding"]) for e in manifest["neurons"]}
    assert found == {(4, "compensated"), (None, None)}
    old = json.loads((coded_folder / "config.json").read_text())
    assert old["spike_coding"] == {"bits": 8, "group_size": 1}


def test_four_bits_give_the_same_integers_in_every_backend(four_bit_folder: Path) -> None:
    expected = checkpoint.load(four_bit_folder).model(WINDOWS)[0]
    plain = checkpoint.load(four_bit_folder, backend="matmul").model(WINDOWS)[0]
    assert torch.equal(plain, expected)


def test_compensation_keeps_the_logits_closer(dense_folder: Path, tmp_path: Path) -> None:
    dense = checkpoint.load(dense_folder).model(WINDOWS)[0]
    errors = {}
    for rounding in get_args(Rounding):
        convert(dense_folder, tmp_path / rounding, WINDOWS, bits=4, rounding=rounding)
        model = checkpoint.load(tmp_path / rounding).model
        errors[rounding] = float((model(WINDOWS)[0] - dense).norm() / dense.norm())
    assert errors["compensated"] < 0.9 * errors["nearest"] < 0.3


def test_bits_by_class_and_by_name(float_folder: Path, tmp_path: Path) -> None:
    choice = {"ffn_input": 4, "layers.1.ffn.input": 8, "head": 4}
    manifest = convert(float_folder, tmp_path / "out", WINDOWS, bits_of=choice, rounding="nearest")
    loaded = checkpoint.load(tmp_path / "out", backend="matmul")
    bits = {
        p.neuron.name: p.linear.bits
        for p in projections(loaded.model)
        if isinstance(p.linear, CodedLinear)
    }
    assert [name for name, own in bits.items() if own == 4] == ["layers.0.ffn.input", "head"]
    assert manifest["bits"] == bits
    entries = {e["name"]: (e["bits"], e["rounding"]) for e in manifest["neurons"] if e["bits"]}
    assert entries == {name: (own, "nearest") for name, own in bits.items()}
    # A matrix of 8 bits is what it is without its neighbours' 4.
    convert(float_folder, tmp_path / "eight", WINDOWS)
    mixed, eight = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "eight"))
    name = "model.layers.1.ffn.input.linear.weight"
    assert torch.equal(mixed[name], eight[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits 5 given; allowed: 4, 8"),
        ({"bits_of": {"head": 2}}, "bits 2 given; allowed: 4, 8"),
        ({"bits_of": {"ffn_hiden": 4}}, "'ffn_hiden' given, which is unknown; did you mean"),
        ({"bits_of": {"queries_keys": 4}}, "'queries_keys' given, which feeds no weights of this"),
    ],
)
def test_bad_bits(float_folder: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(float_folder, tmp_path / "out", WINDOWS, **options)
    assert not (tmp_path / "out").exists()


def test_damaged_packed_weights(four_bit_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(four_bit_folder, tmp_path / "broken"))
    path = folder / "model.safetensors"
    good = load_file(path)
    name = "model.head.linear.weight"
    # 257 outputs: the last half byte is nobody's.
    padding = good[name].clone()
    padding[3, -1] ^= 0x10
    for bad, message in (
        (good[name][:, :-1].contiguous(), r"shape \[32, 128\], config.json asks for \[32, 129\]"),
        (good[name].view(torch.int8), "is torch.int8, expected torch.uint8"),
        (padding, "damaged .the packed weights of model.head"),
    ):
        save_file({**good, name: bad}, path)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder)
