from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spikelm import checkpoint
from spikelm.cli import main as spikelm
from spikelm_train.checkpoints import step_folder
from spikelm_train.cli import main as train

Recipe = Callable[..., Path]


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    stage = {"at": 0.6, "tensor_class": "mixer_input", "max_count": 3}
    path = recipe(steps=5, save_every=2, keep_last=3, stages=[stage])
    assert train([str(path), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_the_newest_checkpoint_is_the_trained_model(run: Path, tmp_path: Path) -> None:
    assert spikelm(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (run / name).read_bytes()


def test_an_earlier_one_has_the_neurons_it_had(run: Path, tmp_path: Path) -> None:
    counts = []
    for step in (2, 4):
        out = tmp_path / f"model{step}"
        assert spikelm(["export", str(run), "--out", str(out), "--step", str(step)]) == 0
        counts.append(checkpoint.load(str(out)).model.config.neurons.mixer_input.max_count)
    assert counts == [None, 3]


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert spikelm(["export", *arguments]) in (1, 2)
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    out = str(tmp_path / "model")
    assert "is no training run" in error(str(tmp_path), "--out", out)
    assert "is not empty" in error(str(run), "--out", str(run))
    assert "no checkpoint of step 3; kept: 2, 4, 5" in error(str(run), "--out", out, "--step", "3")
    (step_folder(run, 5) / "state.pt").write_bytes(b"PK")
    assert "--resume 4" in error(str(run), "--out", out)
    assert not Path(out).exists()
