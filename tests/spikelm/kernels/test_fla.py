"""Against the plain loops of flash-linear-attention, which others wrote from the same papers.

Its modules are loaded by path: importing `fla.ops` needs triton. They compute in float32 and scale
queries by K^(-1/2).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.kernels import reference
from spikelm.kernels.delta import delta_rule
from spikelm.kernels.gla import gla
from spikelm.kernels.rwkv7 import rwkv7

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("fla") and importlib.util.find_spec("einops")),
    reason="needs fla-core and einops",
)

B, T, H, K, V = 2, 70, 2, 8, 6
SCALE = K**-0.5
Form = Callable[..., tuple[Tensor, Tensor]]


def naive(operator: str) -> Any:
    """The module fla/ops/<operator>/naive.py."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "ops" / operator / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def assert_same(ours: Form, theirs: Form, *tensors: Tensor, tolerance: float = 2e-5) -> None:
    """Outputs, final states and every gradient of two functions of `tensors`."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, state = function(*leaves)
        loss = out.double().sin().sum() + state.double().sin().sum()
        results.append([out, state, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=tolerance, atol=tolerance)


def by_head(*tensors: Tensor) -> list[Tensor]:
    """[B, T, H, ...] -> [B, H, T, ...]."""
    return [x.transpose(1, 2) for x in tensors]


@pytest.mark.parametrize("form", [reference.gla, gla])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_gla(form: Form, decay: str) -> None:
    def theirs(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        options = {"initial_state": state, "output_final_state": True}
        if decay == "channel":
            return naive("gla").naive_recurrent_gla(q, k, v, log_decay, **options)
        return naive("simple_gla").naive_recurrent_simple_gla(q, k, v, log_decay[..., 0], **options)

    log_decay = -2 * uniform(B, T, H, K if decay == "channel" else 1)
    q, k, v, state = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), normal(B, H, K, V)
    assert_same(lambda *x: form(*x, scale=SCALE), theirs, q, k, v, log_decay, state)


@pytest.mark.parametrize("form", [reference.delta_rule, delta_rule])
def test_delta_rule(form: Form) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return form(SCALE * q, k, v, torch.zeros_like(beta), beta, beta, state)

    def theirs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *sequence, state = tensors
        out, final = naive("delta_rule").delta_rule_recurrence(*by_head(*sequence), state)
        return out.transpose(1, 2), final

    q, k, v = normal(B, T, H, K), F.normalize(normal(B, T, H, K), dim=-1), normal(B, T, H, V)
    assert_same(ours, theirs, q, k, v, uniform(B, T, H, 1), normal(B, H, K, V))


@pytest.mark.parametrize("form", [reference.delta_rule, delta_rule])
def test_delta_rule_in_float64(form: Form) -> None:
    """The one function that computes in the dtype of its inputs; from a zero state."""

    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        state = q.new_zeros(B, H, K, V)
        return form(SCALE * q, k, v, torch.zeros_like(beta), beta, beta, state)

    def theirs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta = by_head(*tensors)
        out, final = naive("delta_rule").delta_rule_chunkwise(q, k, v, beta[..., 0])
        return out.transpose(1, 2), final

    q, k, v = normal(B, 64, H, K), F.normalize(normal(B, 64, H, K), dim=-1), normal(B, 64, H, V)
    assert_same(ours, theirs, q, k, v, uniform(B, 64, H, 1), tolerance=1e-10)


@pytest.mark.parametrize("form", [reference.delta_rule, delta_rule])
@pytest.mark.parametrize("member", ["gated_delta_rule", "kda", "gdn2"])
def test_gated_delta_rule(form: Form, member: str) -> None:
    def theirs(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        erase: Tensor,
        write: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options = {"initial_state": state, "output_final_state": True}
        recurrent = getattr(naive(member), f"naive_recurrent_{member}")
        if member == "gdn2":
            return recurrent(q, k, v, log_decay, erase, write, **options)
        # Tied gates: the same number erases and writes; half of each, so that both have a gradient.
        beta = (erase + write)[..., 0] / 2
        if member == "kda":
            return recurrent(q, k, v, log_decay, beta, **options)
        return recurrent(q, k, v, beta, log_decay[..., 0], **options)

    def ours(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        erase: Tensor,
        write: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if member != "gdn2":
            erase = write = (erase + write) / 2
        return form(SCALE * q, k, v, log_decay, erase, write, state)

    channels = (K, V) if member == "gdn2" else (1, 1)
    assert_same(
        ours,
        theirs,
        normal(B, T, H, K),
        F.normalize(normal(B, T, H, K), dim=-1),
        normal(B, T, H, V),
        -uniform(B, T, H, 1 if member == "gated_delta_rule" else K),
        *(uniform(B, T, H, c) for c in channels),
        normal(B, H, K, V),
    )


@pytest.mark.parametrize("form", [reference.rwkv7, rwkv7])
def test_rwkv7(form: Form) -> None:
    """RWKV-7 is the diagonal-plus-low-rank rule with alpha = -kappa and beta = a * kappa."""

    def ours(r: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return form(SCALE * r, *rest)

    def theirs(
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
        removal_key: Tensor,
        rate: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sequence = by_head(r, k, v, -removal_key, rate * removal_key, log_decay)
        narrow = [x.float() for x in (*sequence, state)]
        out, final = naive("generalized_delta_rule/dplr").dplr_recurrence(*narrow)
        return out.transpose(1, 2), final

    assert_same(
        ours,
        theirs,
        normal(B, T, H, K),
        -0.6 * uniform(B, T, H, K),
        normal(B, T, H, K),
        normal(B, T, H, V),
        F.normalize(normal(B, T, H, K), dim=-1),
        uniform(B, T, H, K),
        normal(B, H, K, V),
    )
