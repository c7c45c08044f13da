from __future__ import annotations

import math

import torch

from spikelm.kernels.rope import rotate


def test_quarter_turn() -> None:
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    # One pair turns by `position` radians whatever theta is.
    turned = rotate(x, torch.tensor(math.pi / 2, dtype=torch.float64), 10000.0)
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def test_products_depend_on_the_distance_only() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64, generator=g)

    def product(i: int, j: int) -> torch.Tensor:
        return (rotate(q, torch.tensor(i), 1e4) * rotate(k, torch.tensor(j), 1e4)).sum()

    torch.testing.assert_close(product(7, 3), product(100_007, 100_003), rtol=1e-9, atol=1e-9)


def test_angles_stay_exact_far_out_in_float32() -> None:
    x = torch.randn(1, 1, 8)
    far = torch.tensor([10_000_019])
    expected = rotate(x.double(), far, 1e4)
    torch.testing.assert_close(rotate(x, far, 1e4).double(), expected, rtol=1e-5, atol=1e-5)
