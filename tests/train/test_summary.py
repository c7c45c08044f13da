from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm_train.cli import main
from spikelm_train.report import read_metrics
from spikelm_train.trainer import Trainer

Recipe = Callable[..., Path]


def test_a_finished_run_writes_its_page(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my run"
    path = recipe(eval_every=5, sample_every=5, save_every=5, seed=7, sample_tokens=8)
    assert main([str(path), "--out", str(out), "--set", "peak_flops=1e12"]) == 0
    assert "MFU" in capsys.readouterr().out
    page = (out / "report.md").read_text()
    records = read_metrics(out)
    validated = [r for r in records if "validation_loss" in r][-1]
    trained = [r for r in records if "loss" in r][-1]
    for part in (
        "# my run",
        "1 delta, 1 window, width 32",
        "1,280 in 10 steps of 128",
        "| seed | 7 |",
        "1 TFLOP/s (peak_flops)",
        f"{validated['validation_loss']:.4f} nats",
        f"{validated['validation_bits_per_byte']:.4f}",
        f"ffn_hidden {trained['silent']['ffn_hidden']:.1%}",
        "![curves](curves.png)",
        "Step 10:",
        f"spikelm convert {str(out)!r}",
        "torch 2.",
    ):
        assert part in page, part
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [r["step"] for r in records if "sample" in r] == [5, 10]
    assert not (out / "report.md.tmp").exists()


def test_the_page_covers_a_run_that_was_continued(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(recipe(save_every=4))
    whole, continued = tmp_path / "whole", tmp_path / "continued"
    assert main([path, "--out", str(whole)]) == 0
    advance = Trainer.advance

    def die(trainer: Trainer, seconds: float) -> dict[str, Any] | None:
        if trainer.step == 6:
            raise RuntimeError("killed")
        return advance(trainer, seconds)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", die)
        with pytest.raises(RuntimeError, match="killed"):
            main([path, "--out", str(continued)])
    assert not (continued / "report.md").exists()
    assert main([path, "--out", str(continued), "--profile", "1"]) == 0
    assert (continued / "profile" / "trace.json").is_file()
    assert [r["step"] for r in read_metrics(continued) if "loss" in r] == list(range(1, 11))

    def told(out: Path) -> list[str]:
        page = (out / "report.md").read_text()
        return [line for line in page.splitlines() if "loss" in line or "| tokens |" in line]

    assert len(told(whole)) == 3
    assert told(continued) == told(whole)
