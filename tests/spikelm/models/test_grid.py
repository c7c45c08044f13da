"""spikelm.models.grid"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig, WeightsConfig, from_dict
from spikelm.conversion.convert import convert
from spikelm.errors import ConfigError
from spikelm.models.coded import CodedLinear, projections
from spikelm.models.grid import LEVELS, RoundedLinear, choose_scale
from spikelm.models.layers import Linear
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Spikes
from spikelm.tokenizer import Tokenizer

WINDOWS = torch.randint(0, 257, (4, 48), generator=torch.Generator().manual_seed(0))
INTEGER = NeuronConfig(kind="integer", k=6.0, dead_zone=0.5, max_count=127)
EVERYWHERE = NeuronsConfig(
    mixer_input=INTEGER,
    mixer_output=INTEGER,
    gate_input=INTEGER,
    ffn_input=INTEGER,
    ffn_hidden=INTEGER,
    head_input=INTEGER,
)


def rounded(
    bits: int, group: int = 1, *, learn_step: bool = True, shape: tuple[int, int] = (10, 24)
) -> RoundedLinear:
    linear = Linear(shape[1], shape[0])
    linear.reset_parameters()
    return RoundedLinear(linear, bits, group, learn_step)


def train_a_little(model: LanguageModel) -> None:
    """Steps of SGD that move weights and scales off what they begin with."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(3):
        logits, _ = model(WINDOWS[:, :16] + step)
        grads = torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    parameter -= 0.05 * grad / grad.norm().clamp(min=1e-9)


def trained_folder(config: ModelConfig, folder: Path) -> LanguageModel:
    model = LanguageModel(config).initialise(0)
    for linear in model.modules():
        if isinstance(linear, RoundedLinear):
            linear.begin()
    train_a_little(model)
    checkpoint.save(folder, model, Tokenizer.bytes())
    return model


def test_before_it_begins_the_weight_is_read_as_it_is() -> None:
    linear = rounded(4)
    assert not linear.begun
    x = torch.randn(3, 24)
    y = linear(Spikes(x, None, None))
    assert torch.equal(y, x @ linear.weight.T)
    y.sum().backward()
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, x.sum(0).expand(10, -1))
    # A gradient of zero, not none: processes wait for one from every parameter.
    assert linear.stretch is not None
    assert linear.stretch.grad is not None
    assert not linear.stretch.grad.any()


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("group", [1, 3])
def test_gradients(bits: int, group: int) -> None:
    """Against differences of the rounded weight at fixed rounding errors, entry by entry."""
    linear = rounded(bits, group)
    linear.begin()
    with torch.no_grad():
        assert linear.stretch is not None
        linear.stretch.copy_(-torch.rand(linear.stretch.shape) * 0.4)  # some fall outside
    weight, low_high = linear.weight, LEVELS[bits]
    scale = linear.scale().repeat_interleave(group)[:10, None].detach()
    ratio = (weight / scale).detach()
    outside = (ratio < low_high[0]) | (ratio > low_high[1])
    assert outside.any()
    g = torch.randn(10, 24)
    (linear.effective_weight() * g).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.where(outside, 0.0, g))
    n = ratio.round().clamp(*low_high)
    slope = torch.where(outside, n, n - ratio)  # of scale * n, with weight / scale moving along
    expected = (g * slope * scale).sum(1)
    padded = torch.nn.functional.pad(expected, (0, -10 % group)).view(-1, group).sum(1)
    torch.testing.assert_close(linear.stretch.grad, padded)


@pytest.mark.parametrize("bits", LEVELS)
def test_learned_steps_lower_the_rounding_error(bits: int) -> None:
    linear = rounded(bits)
    with torch.no_grad():
        linear.weight[:, 0] *= 8  # one large weight makes the first step too coarse for the rest
    linear.begin()
    assert linear.stretch is not None
    target = linear.weight.detach().clone()
    target[:, 0] = 0
    optimizer = torch.optim.Adam([linear.stretch], lr=0.02)
    errors = []
    for _ in range(60):
        loss = (linear.effective_weight()[:, 1:] - target[:, 1:]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors) < 0.7 * errors[0]


def test_begin_takes_the_scale_of_conversion() -> None:
    linear = rounded(4, 3)
    linear.begin()
    assert torch.equal(linear.scale(), choose_scale(linear.weight, 3, 4))
    linear.reset_parameters()
    assert not linear.begun


@pytest.mark.parametrize("backend", ["auto", "matmul"])
@pytest.mark.parametrize(
    "weights",
    [
        WeightsConfig(bits=4),
        WeightsConfig(bits=8, group_size=3),
        WeightsConfig(bits=4, bits_of={"ffn_input": 8, "head": 8}, learn_step=False),
    ],
)
def test_conversion_keeps_integers_and_logits(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, weights: WeightsConfig, backend: str
) -> None:
    config = tiny_config(neurons=EVERYWHERE, weights=weights, tie_embeddings=True)
    trained_folder(config, tmp_path / "float")
    model = checkpoint.load(tmp_path / "float").model
    manifest = convert(tmp_path / "float", tmp_path / "coded", WINDOWS)
    assert {e["rounding"] for e in manifest["neurons"] if e["bits"]} == {"trained"}
    assert manifest["group_size"] == weights.group_size
    coded = checkpoint.load(tmp_path / "coded", backend="matmul").model
    moved = 0
    for ours, theirs in zip(projections(model), projections(coded), strict=True):
        assert isinstance(ours.linear, RoundedLinear)
        assert isinstance(theirs.linear, CodedLinear)
        assert theirs.linear.bits == ours.linear.bits
        assert torch.equal(theirs.linear.integers(), ours.linear.integers())
        # Bit for bit: the trained forward's matrix is what the integers stand for.
        assert torch.equal(theirs.linear.dequantised(), ours.linear.effective_weight())
        again = choose_scale(ours.linear.weight, weights.group_size, ours.linear.bits)
        moved += int(not torch.equal(ours.linear.scale(), again))
    assert moved > len(projections(model)) / 2, "training moved what calibration would choose"

    counts: list[list[Tensor]] = [[], []]
    for found, side in zip(counts, (model, checkpoint_model(tmp_path, backend)), strict=True):
        logits, _ = side(WINDOWS, probe=lambda n, x, s, found=found: keep(found, s))
        found.append(logits)
    assert len(counts[0]) == len(counts[1])
    for a, b in zip(counts[0][:-1], counts[1][:-1], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(counts[0][-1], counts[1][-1], rtol=1e-4, atol=1e-5)


def keep(found: list[Tensor], spikes: Spikes) -> None:
    if spikes.counts is not None:
        found.append(spikes.counts)


def checkpoint_model(folder: Path, backend: str) -> LanguageModel:
    return checkpoint.load(folder / "coded", backend=backend).model


def test_only_what_was_not_trained_is_calibrated(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    config = tiny_config(neurons=EVERYWHERE, weights=WeightsConfig(bits_of={"ffn_input": 4}))
    model = trained_folder(config, tmp_path / "float")
    found = [p.neuron.name for p in projections(model) if isinstance(p.linear, RoundedLinear)]
    assert found == ["layers.0.ffn.input", "layers.1.ffn.input"]
    manifest = convert(tmp_path / "float", tmp_path / "four", WINDOWS, bits=4)
    roundings = {e["name"]: e["rounding"] for e in manifest["neurons"] if e["bits"]}
    assert {n for n, r in roundings.items() if r == "trained"} == set(found)
    assert {r for n, r in roundings.items() if n not in found} == {"compensated"}
    manifest = convert(tmp_path / "float", tmp_path / "mixed", WINDOWS)
    assert manifest["bits"]["layers.0.ffn.input"] == 4
    assert manifest["bits"]["head"] == 8


def test_a_grid_that_was_never_begun_is_converted_like_floats(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    for name, weights in (("a", WeightsConfig(bits=4)), ("b", WeightsConfig())):
        model = LanguageModel(tiny_config(weights=weights)).initialise(0)
        checkpoint.save(tmp_path / name, model, Tokenizer.bytes())
        convert(tmp_path / name, tmp_path / f"{name}8", WINDOWS)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("a8", "b8")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "bits 8 given for layers.0.mixer.input, whose weights were trained with 4"),
        ({"bits_of": {"head": 8}}, "bits 8 given for head, whose weights were trained with 4"),
        ({"group_size": 2}, "group size 2 given, but the weights were trained with 1"),
        ({"rounding": "compensated"}, "but all weights were rounded in training"),
    ],
)
def test_options_that_contradict_training(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, options: Any, message: str
) -> None:
    trained_folder(tiny_config(weights=WeightsConfig(bits=4)), tmp_path / "float")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "float", tmp_path / "out", WINDOWS, **options)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "float", tmp_path / "out", WINDOWS, bits=4, group_size=1)


def test_configuration() -> None:
    config = from_dict(WeightsConfig, {"bits": 4, "bits_of": {"head": None, "ffn_input": 8}})
    assert config == WeightsConfig(bits=4, bits_of={"head": None, "ffn_input": 8})
    for data, message in (
        ({"bits": 5}, "bits: '5' given; allowed: 8, 4"),
        ({"bits_of": {"head": 2}}, "bits_of.head: '2' given; allowed: 8, 4"),
        ({"bits_of": [4]}, "bits_of: expected keys and values"),
        ({"group_size": 0}, "group_size: 0 given"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(WeightsConfig, data)
    unknown = ModelConfig(weights=WeightsConfig(bits_of={"ffn_hiden": 4}))
    with torch.device("meta"), pytest.raises(ConfigError, match="'ffn_hiden' given, which is unk"):
        LanguageModel(unknown)


def test_the_same_seed_draws_the_same_weights(tiny_config: Callable[..., ModelConfig]) -> None:
    for tied in (False, True):
        floats = LanguageModel(tiny_config(tie_embeddings=tied)).initialise(3)
        config = tiny_config(tie_embeddings=tied, weights=WeightsConfig(bits=8))
        grid = LanguageModel(config).initialise(3)
        wanted = grid.state_dict()
        for name, tensor in floats.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
        assert torch.equal(floats(WINDOWS)[0], grid(WINDOWS)[0])
