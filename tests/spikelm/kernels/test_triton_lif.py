"""Triton's kernels, interpreted where there is no CUDA device."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spikelm.config import NeuronConfig
from spikelm.kernels.native import SURROGATES
from spikelm.neurons import lif as module
from spikelm.neurons.lif import LIFConstants, lif, lif_loop

pytest.importorskip("triton", reason="triton is not installed; `make test` does on Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = list(itertools.product(("zero", "subtract"), (False, True), (False, True)))


@pytest.fixture(scope="module", autouse=True)
def _triton() -> Iterator[None]:
    """`lif` runs Triton's kernels, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        kernels = importlib.import_module("spikelm.kernels.triton_lif")
        patch.setattr(module, "_kernels", lambda x: kernels)
        yield


def outcome(form: Any, c: NeuronConfig, packed: bool) -> list[torch.Tensor]:
    """Spikes, membrane and the gradients of x, v, tau, threshold and softness."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(DEVICE)

    B, T, C = 2, 6, 5
    begins = (torch.rand(B, T, generator=g) < 0.3).to(DEVICE) if packed else None
    leaves = [normal(B, T, C) * 2, normal(B, C), 1.2 + normal(C) ** 2, 0.5 + normal(C) ** 2]
    if c.softness is not None:
        leaves.append(0.1 + normal(C) ** 2)
    leaves = [x.requires_grad_() for x in leaves]
    x, v, tau, v_threshold, *soft = leaves
    constants = LIFConstants(tau, v_threshold, soft[0] if soft else None)
    if form is lif:
        segment = None if begins is None else begins.long().cumsum(1)
        spikes, after = lif(x, v, c, segment, constants)
    else:
        spikes, after = lif_loop(x, v, c, begins, constants)
    loss = (spikes * normal(B, T, C)).sum() + (after * normal(B, C)).sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [spikes.detach(), after.detach(), *grads]


@pytest.mark.parametrize("surrogate", [*SURROGATES, "soft"])
def test_equals_the_loop(surrogate: str) -> None:
    fields = {"softness": 0.3} if surrogate == "soft" else {"surrogate": surrogate, "alpha": 1.3}
    # Every surrogate meets one set of options, the first one all of them.
    chosen = OPTIONS if surrogate == "arctan" else OPTIONS[SURROGATES.index("sigmoid") :: 4]
    for reset, detach_reset, detach_membrane in chosen:
        c = NeuronConfig(
            kind="lif",
            reset=reset,  # type: ignore[arg-type]
            detach_reset=detach_reset,
            detach_membrane=detach_membrane,
            **fields,  # type: ignore[arg-type]
        )
        for packed in (False, True):
            pairs = zip(outcome(lif, c, packed), outcome(lif_loop, c, packed), strict=True)
            for actual, expected in pairs:
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_prefill_and_decode_have_the_same_bits(reset: str) -> None:
    c = NeuronConfig(kind="lif", reset=reset, tau=1.7, v_threshold=0.3)  # type: ignore[arg-type]
    x, v = torch.randn(2, 20, 70, device=DEVICE), torch.zeros(2, 70, device=DEVICE)
    spikes, after = lif(x, v, c)
    expected, expected_after = lif_loop(x, v, c)
    assert torch.equal(spikes, expected)
    assert torch.equal(after, expected_after)
