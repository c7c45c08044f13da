from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spikelm import checkpoint
from spikelm.eval.traffic import weight_traffic
from spikelm.kernels import event
from spikelm.models.coded import (
    CodedLinear,
    coding,
    pack_nibbles,
    projections,
    quantise,
    unpack_nibbles,
    use_coded_linears,
)
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Spikes


@pytest.mark.parametrize("group", [1, 4, 7])
def test_quantise(group: int) -> None:
    weight = torch.randn(10, 6) * torch.rand(10, 1)
    integers, scale = quantise(weight, group)
    assert integers.shape == (6, 10)
    assert scale.shape == (-(-10 // group),)
    assert integers.abs().max() == 127
    linear = CodedLinear(6, 10, group)
    linear.weight, linear.scale = integers, scale
    largest = scale.repeat_interleave(group)[:10]
    assert ((linear.dequantised() - weight).abs() <= largest[:, None] * 0.5001).all()


@pytest.mark.parametrize("group", [1, 4, 7])
def test_quantise_to_four_bits(group: int) -> None:
    weight = torch.randn(10, 60) * torch.rand(10, 1)
    integers, scale = quantise(weight, group, 4)
    assert integers.shape == (60, 10)
    assert scale.shape == (-(-10 // group),)
    assert integers.min() == -8
    assert integers.max() == 7
    linear = CodedLinear(60, 10, group, 4)
    linear.fill(integers, scale)
    largest = torch.stack([rows.abs().max() for rows in weight.split(group)])
    clampless = (largest / 7).repeat_interleave(group)[:10, None]
    error = (linear.dequantised() - weight).square().sum()
    assert error < 0.85 * (torch.round(weight / clampless) * clampless - weight).square().sum()


def test_the_largest_weight_has_the_longer_side() -> None:
    for sign in (1.0, -1.0):
        weight = sign * torch.tensor([[8.0, -7.0, 3.0, 0.0]])
        integers, scale = quantise(weight, 1, 4)
        assert torch.equal(integers * scale, weight.T)
        assert integers[:2].tolist() == [[-8], [7]]
    integers, _ = quantise(torch.zeros(3, 4), 1, 4)
    assert not integers.any()


@pytest.mark.parametrize("outputs", [1, 6, 7])
def test_nibbles(outputs: int) -> None:
    integers = torch.randint(-8, 8, (5, outputs), dtype=torch.int8)
    packed = pack_nibbles(integers)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, -(-outputs // 2)))
    assert torch.equal(unpack_nibbles(packed, outputs), integers)
    assert packed[0, 0] & 15 == integers[0, 0] + 8


@pytest.mark.parametrize("outputs", [6, 7])
def test_four_bit_products(outputs: int) -> None:
    """Every backend, and the packed weights themselves, give the products of the integers."""
    integers = torch.randint(-8, 8, (16, outputs), dtype=torch.int8)
    counts = torch.randint(-127, 128, (1, 2, 16)) * (torch.rand(1, 2, 16) < 0.4)
    spikes = Spikes(counts.float(), counts.to(torch.int8), torch.ones(1, 2, 1))
    runs = [name for name, obstacle in event.available() if obstacle is None]
    for backend in [None, *runs]:
        linear = CodedLinear(16, outputs, 1, 4)
        linear.fill(integers, torch.full((outputs,), 0.5))
        if backend is not None:
            linear.pack(backend)
        assert torch.equal(linear(spikes), 0.5 * (counts.float() @ integers.float())), backend


def test_bits_of_each_projection(coded_folder: Path) -> None:
    """Rows have half the bytes as long as they are packed; torch's backends unpack them."""
    config = checkpoint.load(coded_folder).model.config
    model = LanguageModel(config)
    use_coded_linears(model, 1, {"head": 4, "layers.0.ffn.input": 4})
    bits = coding(model)["bits"]
    assert [name for name, own in bits.items() if own == 4] == ["layers.0.ffn.input", "head"]
    assert len(bits) == len(projections(model))
    head = weight_traffic(model).matrices["head"]
    assert (head.bits, head.row_bytes, head.out_features) == (4, 129, 257)
    for projection in projections(model):
        assert isinstance(projection.linear, CodedLinear)
        projection.linear.pack("matmul")
    head = weight_traffic(model).matrices["head"]
    assert (head.bits, head.row_bytes) == (4, 257)


def dequantised(folder: Path) -> LanguageModel:
    """The coded model with float weights: the same neurons, float products."""
    coded = checkpoint.load(folder, backend="matmul").model
    floating = LanguageModel(coded.config)
    kept = {n: t for n, t in coded.state_dict().items() if not n.endswith("linear.weight")}
    floating.load_state_dict(kept, strict=False)
    for source, target in zip(projections(coded), projections(floating), strict=True):
        assert isinstance(source.linear, CodedLinear)
        target.linear.register_parameter("weight", nn.Parameter(source.linear.dequantised()))
    return floating.eval()


def test_logits_equal_the_dequantised_float_path(coded_folder: Path) -> None:
    """In float64, where rounding cannot flip a spike, counts are the same integers."""
    coded = checkpoint.load(coded_folder).model.double()
    floating = dequantised(coded_folder).double()
    ids = torch.randint(0, 257, (2, 65), generator=torch.Generator().manual_seed(0))
    counts: dict[str, list[torch.Tensor]] = {}

    def record(neuron, x, spikes) -> None:  # type: ignore[no-untyped-def]
        counts.setdefault(neuron.name, []).append(spikes.counts)

    expected, _expected_state = floating(ids, probe=record)
    actual, _state = coded(ids, probe=record)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for name, (a, b) in counts.items():
        assert torch.equal(a, b), name
    # In float32 most tokens agree to rounding; where a count sits on the edge it may flip.
    single, _ = checkpoint.load(coded_folder).model(ids)
    close = (single - dequantised(coded_folder)(ids)[0]).abs().amax(-1) < 1e-3
    assert close.float().mean() > 0.5
