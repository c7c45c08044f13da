from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.config import NeuronConfig
from spikelm.conversion import quantise as subject
from spikelm.conversion.convert import coded_config
from spikelm.conversion.quantise import BLOCK, DAMPING, Hessians, compensate, compensated
from spikelm.models.coded import CodedLinear, coded_copy, projections, quantise
from spikelm.models.grid import LEVELS, choose_scale, round_to_levels
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes

WINDOWS = torch.randint(0, 257, (4, 48), generator=torch.Generator().manual_seed(0))


def hessian(inputs: int, tokens: int = 400) -> Tensor:
    """Of inputs that depend on each other, and differ in size."""
    x = torch.randn(tokens, inputs // 3 + 1) @ torch.randn(inputs // 3 + 1, inputs)
    x = (x + 0.3 * torch.randn(tokens, inputs)) * torch.rand(inputs)
    return x.T @ x


def output_error(weight: Tensor, integers: Tensor, scale: Tensor, h: Tensor) -> float:
    """sum over tokens |W x - Q x|^2."""
    group = -(-weight.shape[0] // scale.numel())
    per_output = scale.repeat_interleave(group)[: weight.shape[0], None].double()
    error = weight.double() - integers.T.double() * per_output
    return float((error @ h.double() * error).sum())


def one_by_one(weight: Tensor, h: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The specification, for inputs that all fire: the inverse Hessian of the weights that are
    left, kept as such. Integers [K, N].
    """
    w, h = weight.double().T.clone(), h.double()
    order = h.diagonal().argsort(descending=True).tolist()
    inverse = (h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)).inverse()
    integers = torch.empty_like(w)
    for i in order:
        integers[i] = round_to_levels(w[i], scale.double(), bits)
        share = inverse[:, i] / inverse[i, i]
        w -= torch.outer(share, w[i] - integers[i] * scale)
        inverse -= torch.outer(share, inverse[i])
    return integers


@pytest.mark.parametrize("bits", LEVELS)
def test_equals_the_plain_loop(bits: int) -> None:
    weight, h = torch.randn(9, BLOCK + 21), hessian(BLOCK + 21)
    scale = choose_scale(weight, 1, bits)
    integers = compensated(weight, h, scale, 1, bits)
    expected = one_by_one(weight, h, scale, bits)
    # In float32 a weight half way between two levels may fall the other way, and others follow.
    assert (integers == expected).double().mean() > 0.98
    assert output_error(weight, integers, scale, h) == pytest.approx(
        output_error(weight, expected, scale, h), rel=0.02
    )


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("bits", "share"), [(4, 0.5), (8, 0.5)])
def test_lowers_the_error_of_the_outputs(bits: int, share: float, group: int) -> None:
    weight, h = torch.randn(30, 90) * torch.rand(30, 1), hessian(90)
    rounded, scale = quantise(weight, group, bits)
    nearest = output_error(weight, rounded, scale, h)
    integers = compensated(weight, h, scale, group, bits)
    low, high = LEVELS[bits]
    assert low <= integers.min()
    assert integers.max() <= high
    assert output_error(weight, integers, scale, h) < share * nearest


@pytest.mark.parametrize("bits", LEVELS)
def test_exact_where_nothing_is_rounded(bits: int) -> None:
    low, high = LEVELS[bits]
    integers = torch.randint(low, high + 1, (40, 12))
    integers[:2] = torch.tensor([[low], [high]])
    step = torch.rand(12) + 0.1
    weight = (integers * step).T
    rounded, scale = quantise(weight, 1, bits)
    torch.testing.assert_close(rounded * scale, integers * step)
    assert torch.equal(compensated(weight, hessian(40), scale, 1, bits), rounded)


@pytest.mark.parametrize("bits", LEVELS)
def test_silent_inputs_take_no_part(bits: int) -> None:
    weight, h = torch.randn(7, 30), hessian(30)
    silent = torch.arange(0, 30, 4)
    h[silent], h[:, silent] = 0.0, 0.0
    nearest, scale = quantise(weight, 1, bits)
    integers = compensated(weight, h, scale, 1, bits)
    assert torch.equal(integers[silent], nearest[silent])
    heard = [i for i in range(30) if i % 4]
    alone = compensated(weight[:, heard], h[heard][:, heard], scale, 1, bits)
    assert torch.equal(integers[heard], alone)
    assert not torch.equal(integers[heard], nearest[heard])


def test_projections_that_saw_nothing_are_rounded_to_nearest() -> None:
    weight = torch.randn(5, 8)
    nearest, scale = quantise(weight, 2, 4)
    assert torch.equal(compensated(weight, torch.zeros(()), scale, 2, 4), nearest)


def test_hessians_add_up_over_calls() -> None:
    neuron, other = (Neuron("ffn_input", 6, NeuronConfig()) for _ in range(2))
    neuron.name, other.name = "mine", "other"
    probe = Hessians(["mine", "unheard"])
    x = torch.randn(2, 9, 6)
    for piece in x.split(4, 1):
        probe(neuron, torch.full_like(piece, torch.nan), Spikes(piece, None, None))
        probe(other, piece, Spikes(piece, None, None))
    torch.testing.assert_close(probe.sums["mine"], x.flatten(0, 1).T @ x.flatten(0, 1))
    assert set(probe.sums) == {"mine", "unheard"}
    assert probe.sums["unheard"] == 0


def coded(source: LanguageModel) -> tuple[LanguageModel, dict[str, Tensor]]:
    """Its 4-bit form, rounded to nearest, and the float weights."""
    weights = {p.neuron.name: p.linear.get_parameter("weight") for p in projections(source)}
    return coded_copy(source, coded_config(source.config), 1, 4), weights


def test_a_model_comes_nearer_to_its_float_form(float_folder: Path) -> None:
    source = checkpoint.load(float_folder).model
    model, weights = coded(source)
    hessians = Hessians(list(weights))
    with torch.inference_mode():
        for window in WINDOWS.split(1):
            model(window, probe=hessians)

    def error(name: str) -> float:
        linear = next(p.linear for p in projections(model) if p.neuron.name == name)
        assert isinstance(linear, CodedLinear)
        return output_error(weights[name], linear.integers(), linear.scale, hessians.sums[name])

    before = {name: error(name) for name in weights}
    compensate(model, {n: w for n, w in weights.items() if n != "head"}, WINDOWS)
    after = {name: error(name) for name in weights}
    assert after.pop("head") == before.pop("head")
    # The inputs of a random model depend little on each other, most of all in its first layer.
    assert all(after[name] < 0.95 * before[name] for name in after)
    assert after["layers.1.ffn.output"] < 0.5 * before["layers.1.ffn.output"]


def test_hessians_share_a_pass_as_far_as_they_fit(
    float_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint.load(float_folder).model
    passes: list[list[str]] = []

    class Recorded(Hessians):
        def __init__(self, names: list[str]) -> None:
            super().__init__(names)
            passes.append(names)

    monkeypatch.setattr(subject, "Hessians", Recorded)
    model, weights = coded(source)
    compensate(model, weights, WINDOWS)
    assert passes == [list(weights)]
    passes.clear()
    channels = {p.neuron.name: p.neuron.channels for p in projections(model)}
    room = 4 * max(n**2 for n in channels.values())
    compensate(model, weights, WINDOWS, room)
    assert [name for names in passes for name in names] == list(weights)
    assert len(passes) > 2
    assert all(4 * sum(channels[n] ** 2 for n in names) <= room for names in passes)
    passes.clear()
    compensate(model, weights, WINDOWS[:1], 1)
    assert passes == [[name] for name in weights]
