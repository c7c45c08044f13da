"""spikelm.eval.prefill"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.config import load_model_config, save_yaml
from spikelm.errors import ConfigError
from spikelm.eval import decode
from spikelm.eval.cli import main_bench
from spikelm.eval.peers import InProcess, Reader, Seconds
from spikelm.eval.prefill import bench_prefill
from spikelm.kernels import rows

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


@pytest.fixture(params=["rwkv7-0.1b", "rwkv7-0.1b with a window"])
def preset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    config = load_model_config("rwkv7-0.1b")
    mixers = ("window", "rwkv7") if "window" in request.param else config.mixers[:2]
    ffn = dataclasses.replace(config.ffn, hidden_dim=256)
    attention = dataclasses.replace(config.attention, num_heads=2, num_kv_heads=2, head_dim=64)
    tiny = dataclasses.replace(
        config, vocab_size=300, width=128, mixers=mixers, ffn=ffn, attention=attention
    )
    save_yaml(tiny, tmp_path / "tiny.yaml")
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants in this process."""

    def spawned(name: str, build: Callable[..., Reader], *arguments: Any) -> InProcess:
        return InProcess(name, build(*arguments))

    monkeypatch.setattr(decode, "Spawned", spawned)


@pytest.mark.usefixtures("here")
def test_command(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rounds", "1", "--prompt-tokens", "20", "--silence", "0.5,0.9"]
    assert main_bench(["prefill", preset, *small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, _ = report["contestants"]
    assert report["tokens"] == 20
    assert ours["tokens_per_second"] == pytest.approx(1e3 / ours["ms_per_token"])
    assert 0.3 < ours["silent_fraction"] < 0.9
    assert main_bench(["prefill", preset, *small]) == 0
    assert "medians of 1 prompts of 20 tokens" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_times_are_those_of_a_token(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InProcess, "prefill", lambda self, n: Seconds(n * 0.004, n * 0.008))
    (ours,) = bench_prefill(preset, rounds=2, prompt_tokens=7, against=[])["contestants"]
    assert ours["ms_per_token"] == pytest.approx(4)
    assert ours["cpu_ms_per_token"] == pytest.approx(8)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="tokens: 0 given; allowed: an integer >= 1"):
        bench_prefill("rwkv7-0.1b", prompt_tokens=0)
