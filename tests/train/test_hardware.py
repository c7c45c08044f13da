from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm_train.config import load_recipe
from spikelm_train.hardware import Gauge, data_sheet, matmul_flops, peak_bytes, peak_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.2),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA L40", 181.0, 90.5),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
    ],
)
def test_data_sheets(name: str, bf16: float, fp32: float) -> None:
    for precision, expected in (("bf16", bf16), ("fp32", fp32)):
        found = data_sheet(name, precision)
        assert found is not None
        assert found.flops == pytest.approx(1e12 * expected)
        assert found.source.startswith("data sheet")


def test_an_unknown_device_has_no_data_sheet() -> None:
    assert data_sheet("NVIDIA GeForce GTX 1080", "bf16") is None


def test_the_peak_of_a_cpu_is_measured_unless_it_is_given() -> None:
    assert peak_of(CPU, "fp32", 2e12).flops == 2e12
    found = peak_of(CPU, "fp32")
    assert found.source == "measured matmul peak"
    # One core of anything: more than a loop in Python, less than a GPU.
    assert 1e8 < found.flops < 1e13


def test_the_measured_peak_is_beyond_what_a_product_just_took() -> None:
    import time

    peak = matmul_flops(CPU, "fp32")
    a = torch.ones(256, 256)
    began = time.perf_counter()
    a @ a
    assert 2 * 256**3 / (time.perf_counter() - began) < 3 * peak


def test_gauge(recipe: Callable[..., Path]) -> None:
    config = load_recipe(str(recipe()), ["peak_flops=1e9"])
    gauge = Gauge(config, CPU, "fp32")
    found = gauge.read(1000.0, 2)
    assert found["tokens_per_second"] == 1000.0
    # Two devices have twice the peak.
    assert found["mfu"] == pytest.approx(1000 * gauge.flops_per_token / 2e9)
    assert found["memory_bytes"] == pytest.approx(peak_bytes(CPU), rel=0.1)
    assert found["memory_bytes"] > 50e6
