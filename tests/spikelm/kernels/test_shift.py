from __future__ import annotations

import pytest
import torch

from spikelm.kernels import reference
from spikelm.kernels.shift import causal_taps

B, C = 3, 5


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 63])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_loop(size: int, T: int, packed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, C, generator=g)
    history = torch.randn(B, size - 1, C, generator=g)
    reset = torch.rand(B, T, generator=g) < 0.3 if packed else None
    segment = reset.long().cumsum(1) if reset is not None else None
    taps, after = causal_taps(x, size, history, segment)
    expected, expected_after = reference.causal_taps(x, size, reset, history)
    assert torch.equal(torch.stack(taps, 2), expected)
    assert torch.equal(after, expected_after)
