"""How fast the device could be: the yardstick of MFU, and the memory a process has used.

MFU is model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311): the FLOPs that a step's
matrix products need, over the time of the step, over the device's peak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from spikelm.config import ModelConfig
from spikelm.eval import process
from spikelm_train.config import TrainConfig
from spikelm_train.cost import layer_costs, training_flops

# Dense (no structured sparsity) TFLOP/s of bf16 and of fp32 without TF32, from the vendors' data
# sheets; the first name that occurs in the device's counts.
_DEVICES: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 35.0),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("MI300X", 1307.4, 163.4),
)
_MATMUL = {"cpu": 1024, "cuda": 8192}
_MEASURED_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Peak:
    """A device's FLOP/s in a precision, and where the number is from."""

    flops: float
    source: str


def peak_of(device: torch.device, precision: str, given: float | None = None) -> Peak:
    """`given`, or the data sheet's number of a known GPU, or what a matrix product reaches here."""
    if given is not None:
        return Peak(given, "peak_flops")
    if device.type == "cuda":
        found = data_sheet(torch.cuda.get_device_name(device), precision)
        if found is not None:
            return found
    return Peak(matmul_flops(device, precision), "measured matmul peak")


def data_sheet(name: str, precision: str) -> Peak | None:
    """The peak of a GPU by its name; None for one that is not listed."""
    for part, bf16, fp32 in _DEVICES:
        if part in name:
            return Peak(1e12 * (bf16 if precision == "bf16" else fp32), f"data sheet, {part}")
    return None


@torch.no_grad()
def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a square matrix product, the best of a quarter of a second, on as many threads as
    the run uses.
    """
    n = _MATMUL.get(device.type, 4096)
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
    best, until = float("inf"), time.perf_counter() + _MEASURED_SECONDS
    for _ in range(1000):
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() > until:
            break
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors (CUDA) or the process (CPU, resident) ever took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process.memory_bytes("VmHWM")


class Gauge:
    """What the progress line says of speed and memory."""

    def __init__(self, config: TrainConfig, device: torch.device, precision: str) -> None:
        self.device = device
        self.peak = peak_of(device, precision, config.peak_flops)
        self.flops_per_token = flops_per_token(
            config.model, config.data.sequence_length, device, precision
        )

    def read(self, tokens_per_second: float, processes: int) -> dict[str, Any]:
        """Measurements of a logging interval, all processes together but for the memory."""
        reached = tokens_per_second * self.flops_per_token / processes
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": reached / self.peak.flops,
            "memory_bytes": peak_bytes(self.device),
        }


def flops_per_token(model: ModelConfig, tokens: int, device: torch.device, precision: str) -> float:
    """Of training in sequences of `tokens`, counted on this device."""
    return training_flops(model, layer_costs(model, tokens, device, precision))
