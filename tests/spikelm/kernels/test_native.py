from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import torch

from spikelm.config import NeuronConfig
from spikelm.kernels import native
from spikelm.neurons.surrogate import SURROGATES

SOURCES = Path(__file__).parents[3] / "native"
needs_library = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"native: {native.unavailable()}"
)


def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELM_NATIVE", "0")
    assert native.unavailable() == "switched off by SPIKELM_NATIVE=0"
    assert not native.serves(torch.zeros(1))


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    library, reason = native._load.__wrapped__()
    assert library is None
    assert "not built" in reason


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    library, reason = native._load.__wrapped__()
    assert library is None
    assert "another version" in reason


@needs_library
def test_it_serves_floats_on_the_cpu() -> None:
    assert native.serves(torch.zeros(1))
    assert native.serves(torch.zeros(1, dtype=torch.float64))
    assert not native.serves(torch.zeros(1, dtype=torch.bfloat16))
    assert not native.serves(torch.zeros(1, device="meta"))


@needs_library
def test_wrong_tensors_do_not_reach_the_library() -> None:
    x, v, c = torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.ones(4)
    config = NeuronConfig(kind="lif")
    for bad in (x.transpose(0, 1), x.double(), x[:, :, :3]):
        with pytest.raises(AssertionError):
            native.lif_forward(bad, v, c, c, None, None, config, keep=True)


def test_surrogates_are_numbered_as_in_the_source() -> None:
    source = (SOURCES / "lif.cpp").read_text(encoding="utf-8")
    (names,) = re.findall(r"enum Surrogate \{(.*?)\}", source)
    assert tuple(names.lower().replace(" ", "").split(",")) == native.SURROGATES
    assert tuple(SURROGATES) == native.SURROGATES
    hints = typing.get_type_hints(NeuronConfig)
    assert typing.get_args(hints["surrogate"]) == native.SURROGATES


def test_the_version_is_that_of_the_source() -> None:
    source = (SOURCES / "abi.cpp").read_text(encoding="utf-8")
    assert f"return {native.ABI};" in source


@needs_library
def test_the_exponential_is_accurate() -> None:
    # wkv4's second token from an empty state with k = (x, 0) weighs its past e^x to e^0.
    x = torch.linspace(-86, 0, 5000)
    zero, one = torch.zeros(1, 5000), torch.ones(5000)
    k = torch.stack([x, torch.zeros_like(x)])[None]
    v = torch.tensor([1.0, 0.0])[None, :, None].expand_as(k).contiguous()
    out, _ = native.wkv4_forward(k, v, 0 * one, 0 * one, (zero, zero, zero), None)
    e = x.double().exp()
    torch.testing.assert_close(out[0, 1].double(), e / (e + 1), rtol=3e-7, atol=0)


@needs_library
def test_threads_change_no_bit_but_the_sums_over_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, c = torch.randn(5, 7, 6), 1 + torch.rand(6)
    v, begins = torch.randn(5, 6), torch.rand(5, 7) < 0.2
    config = NeuronConfig(kind="lif")
    state = torch.randn(5, 6), torch.rand(5, 6) + 1, torch.randn(5, 6)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(native, "MIN_ELEMENTS", 1)
        spikes, after, before = native.lif_forward(x, v, c, c, None, begins, config, keep=True)
        assert before is not None
        lif = native.lif_backward(before, v, c, c, None, begins, config, x, v, learned=True)
        out, last = native.wkv4_forward(x, x, -c, c, state, begins)
        wkv = native.wkv4_backward(x, x, -c, c, state, begins, x, v, v)
        same = [spikes, after, before, *lif[:2], out, *last, *wkv[:2], *wkv[4:]]
        results.append((same, [lif[2], lif[3], wkv[2], wkv[3]]))
    (same, sums), (expected, expected_sums) = results
    assert all(torch.equal(a, e) for a, e in zip(same, expected, strict=True))
    for a, e in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(a, e)
