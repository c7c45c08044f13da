"""spikelm.eval.block"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.config import load_model_config
from spikelm.errors import BackendError, ConfigError
from spikelm.eval import block
from spikelm.eval.block import FORMS, bench_block, check
from spikelm.eval.cli import main_bench
from spikelm.kernels import native

LIF = "{kind: lif, v_threshold: 0.3}"
MODELS = {
    "wkv4": f"mixers: [wkv4]\nneurons: {{mixer_residual: {LIF}, ffn_residual: {LIF}}}",
    "gla": "mixers: [full, gla]\n"
    "gla: {num_heads: 2, num_kv_heads: 1, key_dim: 8, value_dim: 8, gate_rank: 4}",
    "delta": "mixers: [delta]\ndelta: {num_heads: 2, key_dim: 8, value_dim: 8, gate_rank: 4}\n"
    "neurons: {mixer_input: {kind: integer}, queries_keys: {kind: integer}}",
    "rwkv7": "mixers: [rwkv7]\n"
    "rwkv7: {head_dim: 8, decay_rank: 4, rate_rank: 4, value_rank: 4, gate_rank: 4}",
    "parallel": "mixers: [parallel]\n"
    "gla: {num_heads: 2, num_kv_heads: 1, key_dim: 8, value_dim: 8, decay: tied,"
    " feature_map: sigmoid}\n"
    "ffn: {kind: swiglu, hidden_dim: 8, experts: {num_experts: 2, top_k: 1}}",
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A function that writes a small model of one of `MODELS` and returns its file."""

    def write(text: str) -> str:
        heads = "attention: {num_heads: 2, num_kv_heads: 1, head_dim: 8, window: 16, kv_bits: 8}"
        ffn = "" if "ffn:" in text else "ffn: {hidden_dim: 24}\n"
        file = tmp_path / "model.yaml"
        file.write_text(f"vocab_size: 11\nwidth: 16\n{text}\n{ffn}{heads}\n")
        return str(file)

    return write


@pytest.mark.parametrize("name", MODELS)
def test_all_forms_are_the_same_function(name: str, write: Callable[..., str]) -> None:
    config = load_model_config(write(MODELS[name]))
    index = 1 if name == "gla" else 0
    assert config.mixers[index] == name
    layer = block._build(config, index)
    assert check(layer, config.width) < 1e-10
    x, grad = block._draw(1, 5, config.width, torch.float64)
    found = block.run(layer, x, grad, "shipped")
    alive = {n for n, tensor in found.items() if tensor.any()}
    names = {"output", "input", *dict(layer.named_parameters())}
    silent = ("k", "dead_zone", "bonus_key", "experts.")
    assert {n for n in names - alive if not any(part in n for part in silent)} == set()


def test_report_has_medians_of_runs_in_turns(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    clock = [0.0]
    script = {"shipped": [1.0, 9.0, 2.0], "token_loop": [4.0, 4.0, 4.0]}
    script["one_token_calls"] = [8.0, 1.0, 16.0]

    def run(layer: object, x: Tensor, grad: Tensor, form: str, dtype: str) -> None:
        clock[0] += script[form][sum(name == form for name, _ in calls)]
        calls.append((form, x.shape[1]))
        assert (x.dtype, dtype) == (torch.float32, "bfloat16")

    monkeypatch.setattr(block, "check", lambda *_: 1e-13)
    monkeypatch.setattr(block, "run", run)
    monkeypatch.setattr(block, "perf_counter", lambda: clock[0])
    options: Any = {"batch": 2, "tokens": 6, "call_tokens": 4, "repeats": 3, "dtype": "bfloat16"}
    report = bench_block(write(MODELS["rwkv7"]), **options)
    assert calls == 3 * [("shipped", 6), ("token_loop", 6), ("one_token_calls", 4)]
    rates = {m["form"]: m["tokens_per_second"] for m in report["measurements"]}
    assert rates == {"shipped": 2 * 6 / 2, "token_loop": 2 * 6 / 4, "one_token_calls": 2 * 4 / 8}
    assert [m["shipped_over_this"] for m in report["measurements"]] == [1, 2, 6]
    assert report["native"]["in_layer"] is False


@pytest.mark.skipif(native.unavailable() is not None, reason="no native library")
def test_forms_use_what_they_say(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    serves = native.serves
    monkeypatch.setattr(native, "serves", lambda x: calls.append(x.shape) or serves(x))
    config = load_model_config(write(MODELS["wkv4"]))
    layer = block._build(config, 0)
    x, grad = block._draw(1, 4, config.width, torch.float64)
    used = {}
    for form in FORMS:
        calls.clear()
        block.run(layer, x, grad, form)
        used[form] = len(calls)
    assert used["shipped"] > 0
    assert (used["torch"], used["token_loop"]) == (0, 0)
    report = bench_block(write(MODELS["wkv4"]), batch=1, tokens=8, repeats=1)
    assert [m["form"] for m in report["measurements"]] == [*FORMS, "no_neurons"]
    assert block.wkv4.wkv4.__module__ == "spikelm.kernels.wkv4", "swapped back"


def test_what_neurons_cost(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    neurons = []
    monkeypatch.setattr(block, "run", lambda layer, *_: neurons.append(spiking(layer)))
    monkeypatch.setattr(block, "check", lambda *_: 0.0)

    def spiking(layer: torch.nn.Module) -> int:
        found = (m for m in layer.modules() if isinstance(m, block.Neuron))
        return sum(neuron.config.kind != "off" for neuron in found)

    report = bench_block(write(MODELS["delta"]), tokens=3, repeats=1)
    assert report["measurements"][-1]["form"] == "no_neurons"
    assert report["native"]["in_layer"] is (native.unavailable() is None)
    *with_neurons, without = neurons
    # Mixer input, queries and keys.
    assert set(with_neurons) == {3}
    assert without == 0


def test_no_times_of_different_results(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = block.gla.gla

    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        out, state = right(*arguments, **options)
        return 1.001 * out, state

    monkeypatch.setattr(block.gla, "gla", wrong)
    with pytest.raises(BackendError, match=r"shipped and token_loop differ in output by"):
        bench_block(write(MODELS["gla"]), tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens: 0 given; allowed: an integer >= 1"),
        ({"call_tokens": -1}, "call tokens: -1 given"),
        ({"batch": 0}, "batch: 0 given"),
        ({"repeats": 0}, "repeats: 0 given"),
        ({"dtype": "float16"}, "dtype: float16 given; allowed: float32, bfloat16"),
        ({"model": "llama-3.2-1b"}, "no recurrent mixer, only full; allowed: a model with one of"),
        ({"model": "spikegpt"}, "'spikegpt'; did you mean"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bench_block(**({"model": "spikegpt-46m"} | options))
    assert message in str(caught.value)


def test_command(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch", "1", "--tokens", "3", "--repeats", "1"]
    assert main_bench(["block", write(MODELS["delta"]), *small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["mixer"], report["width"], report["batch"]) == ("delta", 16, 1)
    assert main_bench(["block", write(MODELS["rwkv7"]), *small]) == 0
    table = capsys.readouterr().out
    assert "one token per call" in table
    assert "layer 0: rwkv7, width 16" in table
