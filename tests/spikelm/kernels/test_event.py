from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.errors import BackendError
from spikelm.kernels import event

HERE = [name for name, obstacle in event.available() if obstacle is None]


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=40, deadline=None)
@given(
    R=st.integers(1, 12),
    K=st.integers(1, 70),
    N=st.integers(1, 33),
    silent=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 999),
)
def test_every_backend_gives_the_exact_integers(
    backend: str, R: int, K: int, N: int, silent: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (K, N), dtype=torch.int8, generator=g)
    counts = torch.randint(-127, 128, (R, K), generator=g) * (
        torch.rand(R, K, generator=g) > silent
    )
    out = event.product(counts.float(), event.pack(weight, backend), backend)
    assert torch.equal(out.long(), counts @ weight.long())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("R", [1, 20])
def test_one_input_neuron_of_any_strides(backend: str, R: int) -> None:
    weight = torch.arange(-2, 3, dtype=torch.int8)[:, None].T
    assert weight.stride() == (1, 1)
    out = event.product(torch.full((R, 1), 3.0), event.pack(weight, backend), backend)
    assert out.tolist() == [[-6, -3, 0, 3, 6]] * R


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("R", [1, 20])
def test_sums_beyond_float32_stay_exact(backend: str, R: int) -> None:
    weight = torch.full((4001, 3), 127, dtype=torch.int8)
    counts = torch.full((R, 4001), 127.0)
    out = event.product(counts, event.pack(weight, backend), backend)
    assert out[0].tolist() == [4001 * 127 * 127] * 3


def test_native_is_the_first_choice_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert event.BACKENDS[0] == "native"
    monkeypatch.setenv("SPIKELM_NATIVE", "0")
    assert event.resolve("auto") != "native"
    with pytest.raises(BackendError, match="switched off by SPIKELM_NATIVE=0"):
        event.resolve("native")
    monkeypatch.delenv("SPIKELM_NATIVE")
    assert event.resolve("auto", "cuda") == "matmul"


def test_auto_takes_the_first_that_runs() -> None:
    assert event.resolve("auto") == HERE[0]


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event, "_obstacle", lambda name, device: "no such operator")
    with pytest.raises(BackendError, match="no such operator"):
        event.resolve("embedding_bag_int8")
    with pytest.raises(BackendError, match="did you mean 'matmul'"):
        event.resolve("matmull")
