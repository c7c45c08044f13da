"""Stages: a run that begins with the model of another one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.conversion.convert import convert
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm_train.cli import main
from spikelm_train.config import load_recipe
from spikelm_train.report import read_metrics
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]
Recipe = Callable[..., Path]


@pytest.fixture
def begun(make: Make, tmp_path: Path) -> Path:
    """A model after twenty steps, with three rows of its vocabulary unused."""
    trainer = make("tokenizer.pad_to=10", out="first")
    for _ in range(20):
        trainer.advance(0.0)
    trainer.export(tmp_path / "model")
    return tmp_path / "model"


def write_tokenizer(tmp_path: Path) -> Path:
    Tokenizer.train_bpe(["another text"] * 9, 260).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def stage(recipe: Recipe) -> Path:
    """The tiny recipe without model or tokenizer."""
    return recipe(model=None, tokenizer=None)


def test_it_goes_on_with_model_and_tokenizer(begun: Path, stage: Path, make: Make) -> None:
    config = load_recipe(str(stage), [f"init={begun}"])
    first = checkpoint.load(begun)
    assert config.model == first.model.config
    assert config.model.vocab_size == 260
    trainer = make(f"init={begun}", path=stage)
    assert trainer.corpus.tokenizer.fingerprint == first.tokenizer.fingerprint
    torch.testing.assert_close(trainer.module.state_dict(), first.model.state_dict())
    loss = trainer.validate()[0]
    for _ in range(20):
        trainer.advance(0.0)
    assert trainer.validate()[0] < loss < 5.0


def test_what_differs_is_laid_over_it(begun: Path, stage: Path, make: Make) -> None:
    neurons = "{kind: integer, k: 3.0, dead_zone: 0.25, learn: dead_zone}"
    trainer = make(
        f"init={begun}",
        f"model.neurons.mixer_output={neurons}",
        "model.neurons.ffn_hidden.target_silence=0.7",
        "model.weights.bits=8",
        path=stage,
    )
    config, theirs = trainer.module.config, checkpoint.load(begun).model
    assert config.neurons.ffn_hidden.target_silence == 0.7
    assert config.neurons.ffn_hidden.unsigned
    assert config.width == theirs.config.width
    ours = trainer.module.state_dict()
    begun_as_configured = [n for n in ours if n not in theirs.state_dict() and "neuron" in n]
    assert any(n.endswith("dead_zone") and (ours[n] == 0.25).all() for n in begun_as_configured)
    shared = [name for name in theirs.state_dict() if name.endswith("linear.weight")]
    assert shared
    for name in shared:
        assert torch.equal(ours[name], theirs.state_dict()[name])
    trainer.advance(0.0)


def test_a_preset_takes_the_weights_where_they_fit(begun: Path, stage: Path, make: Make) -> None:
    with pytest.raises(ConfigError, match=r"init: .* in this recipe's model; leave model out"):
        make(f"init={begun}", "model.width=64", path=stage)
    with pytest.raises(ConfigError, match=r"lacks layers\.2\."):
        make(f"init={begun}", "model.mixers=[delta, window, delta]", path=stage)
    with pytest.raises(ConfigError, match=r"has, but this recipe's model lacks, layers\.1\."):
        make(f"init={begun}", "model.mixers=[delta]", path=stage)


def test_what_cannot_be_begun_with(begun: Path, stage: Path, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init: no model folder at missing"):
        load_recipe(str(stage), ["init=missing"])
    with pytest.raises(ConfigError, match=r"not finished; continue it, or .* spikelm export"):
        load_recipe(str(stage), [f"init={tmp_path / 'first'}"])
    for other in ("{kind: bpe}", f"{{kind: file, path: {write_tokenizer(tmp_path)}}}"):
        with pytest.raises(ConfigError, match="has that model's tokenizer: leave kind and path"):
            load_recipe(str(stage), [f"init={begun}", f"tokenizer={other}"])
    assert load_recipe(str(stage), [f"init={begun}", "tokenizer.kind=bytes"]).model.vocab_size
    convert(begun, tmp_path / "coded", torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ConfigError, match="is spike-coded, its weights are integers"):
        make(f"init={tmp_path / 'coded'}", path=stage)
    with pytest.raises(ConfigError, match=r"--set model=PRESET.*--set init=MODEL"):
        load_recipe(str(stage))


def test_stages_one_after_the_other(recipe: Recipe, tmp_path: Path) -> None:
    dialogues = tmp_path / "talks.jsonl"
    rows = [
        [
            {"role": "user", "content": f"Where is cat {i}?"},
            {"role": "assistant", "content": f"On mat {i % 7}."},
        ]
        for i in range(40)
    ]
    dialogues.write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    first, longer, chat = (str(tmp_path / name) for name in ("first", "longer", "chat"))
    assert main([str(recipe()), "--out", first]) == 0
    path = str(recipe(model=None, tokenizer=None))
    length = ["--set", "data.sequence_length=128", "--set", "micro_batch_size=1"]
    assert main([path, "--out", longer, "--set", f"init={first}", *length]) == 0
    talks = ["--data", str(dialogues), "--set", "data.messages_key=messages"]
    talks += ["--set", "steps=150", "--set", "data.sequence_length=64", "--set", "log_every=149"]
    assert main([path, "--out", chat, "--set", f"init={longer}", *talks]) == 0
    assert f"| begins with | {longer} |" in (Path(chat) / "report.md").read_text()
    losses = [record["loss"] for record in read_metrics(Path(chat)) if "loss" in record]
    assert losses[-1] < 0.2 * losses[0]
    assert main([path, "--out", chat, "--set", f"init={longer}", *talks]) == 0
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        main([path, "--out", chat, "--set", f"init={first}", *talks])
    # It takes turns, and stops where its turn ends.
    asked = "Where is cat 3?\nWhere is cat 24?\n"
    command = [sys.executable, "-m", "spikelm", "chat", chat, "--temperature", "0"]
    shown = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    answers = [line for line in shown.stdout.splitlines() if "On mat" in line]
    assert len(answers) == 2
    assert all(re.fullmatch(r" ?On mat \d\.", answer) for answer in answers), shown.stdout


@pytest.mark.parametrize("name", ["long-8k", "long-32k", "long-128k", "chat", "distill"])
def test_the_recipes_of_the_stages(
    name: str, begun: Path, text: Path, make: Make, tmp_path: Path
) -> None:
    dialogues = tmp_path / "talks.jsonl"
    pairs = [("user", "Where is the cat?"), ("assistant", "On the mat.")]
    talks = [[{"role": r, "content": f"{c} ({i})"} for r, c in pairs] for i in range(99)]
    dialogues.write_text("".join(json.dumps({"messages": m}) + "\n" for m in talks))
    sources = f"data.sources=[{dialogues if name == 'chat' else text}]"
    small = [
        "precision=fp32",
        "data.sequence_length=64",
        "data.validation_fraction=0.1",
        "grad_accum_steps=2",
    ]
    more = [f"distill.teacher={begun}"] if name == "distill" else []
    trainer = make(f"init={begun}", "data.prepared=null", sources, *small, *more, path=Path(name))
    records = [trainer.advance(0.0) for _ in range(2)]
    assert records[0] is not None
    assert 0 < records[0]["loss"] < 6
    assert trainer.step == 2


def test_pretraining_is_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="spikelm data prepare SOURCES --out runs/text"):
        load_recipe("pretrain")
    config = load_recipe("pretrain", ["data.prepared=null", "tokenizer={kind: bytes}"])
    assert config.model.num_layers == 24


def test_a_run_is_not_begun_over_the_model_it_begins_with(begun: Path, stage: Path) -> None:
    with pytest.raises(ConfigError, match="this run's own folder; use another --out"):
        main([str(stage), "--out", str(begun), "--set", f"init={begun}", "--fresh"])
    assert (begun / "model.safetensors").is_file()
