from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikelm.cli import main
from spikelm.eval.presets import describe_preset, with_table

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("spikegpt-46m", 46_553_088),
        ("rwkv7-0.1b", 191_034_624),
        ("rwkv7-0.4b", 450_767_872),
        ("rwkv7-1.5b", 1_527_404_544),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    report = describe_preset(name)
    assert report["parameters"] == report["active_parameters"] == parameters


def test_spikingbrain_is_qwen_with_gates_and_one_state_per_group() -> None:
    report = describe_preset("spikingbrain-7b")
    gates = 14 * (3584 * 16 + 16 * 512 + 512 + 128)
    assert report["parameters"] == 7_615_616_512 + gates
    states = 14 * 4 * 128 * 128
    caches = 14 * 4096 * 2 * 4 * (128 + 4)
    assert report["state"]["bytes"] == 4 * states + caches + 8
    assert report["state"]["bytes_per_token"] == 0
    assert {"ffn_hidden", "attention_queries", "mixer_input"} <= set(report["spiking"])


def test_a_token_uses_twelve_of_the_76_billion() -> None:
    report = describe_preset("spikingbrain-76b")
    assert report["parameters"] == pytest.approx(76e9, rel=0.005)
    assert report["active_parameters"] == pytest.approx(12e9, rel=0.02)
    assert report["layers"] == {"parallel": 24, "parallel_full": 4}
    assert report["state"]["bytes_per_token"] == 4 * 2 * 4 * (128 + 4)


def test_the_documented_table_is_current() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert with_table(page) == page, "run `make docs`"


def test_inspect_takes_presets_and_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "spikegpt-46m"]) == 0
    assert "46,553,088" in capsys.readouterr().out
    file = str(ROOT / "configs" / "models" / "spikegpt-46m.yaml")
    assert main(["inspect", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == {"wkv4": 12}
    assert main(["inspect", "no-such.yaml"]) == 2
    assert "no such file or preset" in capsys.readouterr().err
