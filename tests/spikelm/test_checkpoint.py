from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikelm import checkpoint
from spikelm.config import ModelConfig
from spikelm.errors import BackendError, CheckpointError
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer


@pytest.fixture
def broken(float_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float_folder, tmp_path / "broken"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_save_and_load(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    for tied in (False, True):
        model = LanguageModel(tiny_config(tie_embeddings=tied)).initialise(0).eval()
        checkpoint.save(tmp_path / "m", model, Tokenizer.bytes())
        loaded = checkpoint.load(tmp_path / "m")
        ids = torch.arange(20)[None]
        assert torch.equal(loaded.model(ids)[0], model(ids)[0])
        assert loaded.manifest is None
        assert loaded.name == "m"
    assert not (tmp_path / "m" / ".saving").exists()


def test_fingerprint_follows_the_weights(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    prints = []
    for seed in (0, 0, 1):
        model = LanguageModel(tiny_config()).initialise(seed)
        checkpoint.save(tmp_path / "m", model, Tokenizer.bytes())
        prints.append(checkpoint.load(tmp_path / "m").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_coded_folder(coded_folder: Path) -> None:
    loaded = checkpoint.load(coded_folder)
    assert loaded.manifest is not None
    assert {entry["code"] for entry in loaded.manifest["neurons"]} == {"bitwise", "bitwise_signed"}
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        checkpoint.load(coded_folder, backend="gpu")


def test_missing_parts(float_folder: Path, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder at"):
        checkpoint.load(tmp_path / "nowhere")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (broken / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(broken)
        shutil.copy(float_folder / name, broken / name)
    checkpoint.load(broken)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_truncated_weights(broken: Path, keep: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged .* again"):
        checkpoint.load(broken)


def test_other_models_weights(broken: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    edit_config(broken, width=48)
    with pytest.raises(CheckpointError, match=r"has shape \[257, 32\].*asks for \[257, 48\]"):
        checkpoint.load(broken)
    edit_config(broken, width=32, mixers=["delta"])
    with pytest.raises(CheckpointError, match=r"has unknown \d+ tensor"):
        checkpoint.load(broken)
    edit_config(broken, mixers=["delta", "window", "window"])
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensor"):
        checkpoint.load(broken)


def test_other_models_tokenizer(broken: Path) -> None:
    Tokenizer.train_bpe(["some text to learn from " * 50], 270).save(broken)
    with pytest.raises(CheckpointError, match="is not the model's"):
        checkpoint.load(broken)


@pytest.mark.parametrize(
    "coding",
    [
        *("x", 5, {"bits": 8}, {"bits": 8, "group_size": 0}, {"bits": 5, "group_size": 1}),
        *({"bits": {"head": bits}, "group_size": 1} for bits in (8, "4")),
    ],
)
def test_damaged_spike_coding(coded_folder: Path, tmp_path: Path, coding: Any) -> None:
    folder = Path(shutil.copytree(coded_folder, tmp_path / "broken"))
    edit_config(folder, spike_coding=coding)
    with pytest.raises(CheckpointError, match="allowed: bits 4 or 8, once or for every"):
        checkpoint.load(folder)


def test_float_weights_where_integers_belong(coded_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(coded_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    floats = {n: t.float() for n, t in tensors.items()}
    save_file(floats, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is torch.float32, expected torch.int8"):
        checkpoint.load(folder)


def test_bad_config(broken: Path) -> None:
    edit_config(broken, width="wide")
    with pytest.raises(CheckpointError, match=r"width: expected int, got 'wide'"):
        checkpoint.load(broken)
    edit_config(broken, model_type="llama")
    with pytest.raises(CheckpointError, match="holds a 'llama' model"):
        checkpoint.load(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(broken)
