from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm import checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig, WeightsConfig
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer

Make = Callable[..., ModelConfig]


@pytest.fixture
def write(tiny_config: Make, tmp_path: Path) -> Callable[..., Path]:
    """Writes a model drawn from a seed and returns its folder."""

    def make(name: str, seed: int, **fields: Any) -> Path:
        model = LanguageModel(tiny_config(**fields)).initialise(seed)
        checkpoint.save(tmp_path / name, model, Tokenizer.bytes())
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "fields", [{}, {"tie_embeddings": True}, {"weights": WeightsConfig(bits=8)}]
)
def test_every_weight_is_the_mean(
    fields: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [write(f"{seed}", seed, **fields) for seed in range(3)]
    out = tmp_path / "mean"
    assert main(["average", *map(str, folders), "--out", str(out)]) == 0
    states = [checkpoint.load(folder).model.state_dict() for folder in folders]
    mean = checkpoint.load(out)
    assert mean.model.config == checkpoint.load(folders[0]).model.config
    for name, tensor in mean.model.state_dict().items():
        expected = sum(state[name].double() for state in states) / 3
        assert torch.equal(tensor, expected.float()), name  # type: ignore[union-attr]
    drawn = mean.model.embedding.weight
    assert not torch.equal(drawn, states[0]["embedding.weight"])


def test_what_cannot_be_averaged(
    write: Callable[..., Path],
    coded_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, wide = str(write("one", 0)), str(write("wide", 0, width=64))
    full = write("full", 1)
    for models, out, message in (
        ([one], "out", "give two or more"),
        ([one, wide], "out", "are different models (width)"),
        ([one, str(coded_folder)], "out", "is spike-coded; average the float models"),
        ([one, "missing"], "out", "no model folder at missing"),
        ([one, one], str(full), "exists and is not empty"),
    ):
        assert main(["average", *models, "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
