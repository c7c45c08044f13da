from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spikelm import checkpoint
from spikelm.models.coded import CodedLinear, projections, quantise
from spikelm.models.spikelm import LanguageModel


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
