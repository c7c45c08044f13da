"""The tokens of a row shared out over processes: the same training as on one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spikelm import checkpoint
from spikelm.errors import ConfigError
from spikelm_train import dryrun
from spikelm_train.checkpoints import kept_steps, step_folder
from spikelm_train.cli import main
from spikelm_train.config import load_recipe
from spikelm_train.context import check_context
from spikelm_train.report import read_metrics
from spikelm_train.resume import claim

Recipe = Callable[..., Path]

WORKER = Path(__file__).with_name("context_worker.py")
MODELS = (
    "delta, window",
    "kda",
    "gated deltanet",
    "deltanet",
    "gla",
    "parallel",
    "rwkv7",
    "wkv4, LIF",
    "membranes without gradient, soft ones",
    "experts",
)


def recipe_of(tiny: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Slices of 17 tokens, documents of some 60, L1."""
    rows = [f"Document {i} says that cat number {i * i} sat on mat {i % 7}." for i in range(99)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    return {
        **tiny,
        "data": {**tiny["data"], "sources": [str(folder / "text.jsonl")], "sequence_length": 34},
        "l1_hidden": 1e-3,
        "steps": 8,
        "eval_every": 4,
        "save_every": 4,
        "keep_last": 9,
    }


@pytest.fixture(scope="module")
def launched(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one process (`one`), the same on four of which two share a row, all
    computed twice that may be (`two`), one that was continued so (`continued`), and errors.json.
    """
    folder = tmp_path_factory.mktemp("context")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tiny, folder)))
    common = [str(path), "--corpus", str(folder / "data"), "--out"]
    alone = ["--set", "grad_accum_steps=2"]
    again = ["--set", "activation_checkpointing=layers", "--set", "loss_chunk=48", "--profile", "2"]
    assert main([*common, str(folder / "one"), *alone]) == 0
    shutil.copytree(folder / "one", folder / "continued")
    (folder / "continued" / checkpoint.WEIGHTS).unlink()
    shutil.rmtree(step_folder(folder / "continued", 8))
    commands = [
        [*common, str(folder / out), "--context", "2", *given]
        for out, given in (("two", again), ("continued", alone))
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(folder)],
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    (folder / "shown.txt").write_text(done.stdout)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_slices_train_what_whole_rows_do(launched: Path, name: str) -> None:
    """Losses, gradients, parameters after two steps, states: on four slices, for some on all."""
    errors = json.loads((launched / "errors.json").read_text())
    assert errors.keys() == set(MODELS)
    assert "4" in errors[name]
    assert max(errors[name].values()) < 1e-12


@pytest.mark.parametrize("name", ["two", "continued"])
def test_a_run_with_slices_is_that_of_one_process(launched: Path, name: str) -> None:
    shown = (launched / "shown.txt").read_text()
    assert shown.count("4 x cpu of which 2 share a row, fp32") == 2
    assert shown.count("continuing after step 4") == 1
    assert kept_steps(launched / name) == [4, 8]
    assert (launched / name / "profile").exists() == (name == "two")
    assert_same_curve(launched / "one", launched / name)
    assert_same_model(launched / "one", launched / name)


def assert_same_curve(a: Path, b: Path) -> None:
    for one, two in zip(read_metrics(a), read_metrics(b), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "validation_loss", "gradient_norm", "silent_fraction"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4), (name, one, two)


def assert_same_model(a: Path, b: Path) -> None:
    left, right = (checkpoint.load(str(folder)).model.state_dict() for folder in (a, b))
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


LIF = "={kind: lif}"
EXPERTS = "model.ffn={kind: reglu, hidden_dim: 64, experts: {num_experts: 2, top_k: 1}}"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["data.sequence_length=33"], "sequence_length is 33; take a multiple of 2"),
        (["model.mixers=[delta, full]"], r"mixers whose state grows \(full\); take window"),
        (["model.attention.kv_bits=8"], "kv_bits: int8 keys hand back no gradient"),
        ([f"model.neurons.head_input{LIF}"], "model.neurons.head_input.kind: lif"),
        ([f"model.neurons.embedding_output{LIF}"], "model.neurons.embedding_output.kind: lif"),
        (["model.head_qk_dim=8"], "model.head_qk_dim; set it to 0"),
        (["model.sink_embeddings=1"], "model.sink_embeddings; set it to 0"),
        ([EXPERTS], "balance of experts.*set model.ffn.experts.balance=0"),
        (["data.sampling=carried"], "data.sampling: carried; take packed or random_window"),
        (["distill.teacher=runs/teacher"], "distill.teacher, who reads whole rows"),
    ],
)
def test_what_needs_whole_rows_is_refused(
    recipe: Recipe, assignments: list[str], message: str
) -> None:
    config = load_recipe(str(recipe()), assignments)
    check_context(config, 1, 1)
    with pytest.raises(ConfigError, match=f"--context 2.*{message}"):
        check_context(config, 2, 4)


@pytest.mark.parametrize("strategy", ["shards", "zero"])
def test_weights_that_are_shared_out_are_refused(recipe: Recipe, strategy: str) -> None:
    config = load_recipe(str(recipe()))
    check_context(config, 2, 4)
    with pytest.raises(ConfigError, match="--shard or DeepSpeed; start it with torchrun alone"):
        check_context(config, 2, 4, strategy)


def test_slices_and_processes_must_fit(recipe: Recipe, tmp_path: Path) -> None:
    path, config = str(recipe()), load_recipe(str(recipe()))
    for size in (-1, 0, 3):
        with pytest.raises(ConfigError, match=f"--context {size} given on 4 process"):
            check_context(config, size, 4)
    for given in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=r"--context 2 given on 1 process.*torchrun"):
            main([path, "--out", str(tmp_path / "out"), "--context", "2", *given])
    assert not (tmp_path / "out").exists()


def test_a_step_goes_on_with_as_many_rows(recipe: Recipe, launched: Path) -> None:
    folder = launched / "one"
    config = load_recipe(str(launched / "recipe.yaml"), ["grad_accum_steps=2"])
    for processes, context in ((2, 1), (4, 2), (3, 3), (8, 4)):
        position = claim(folder, config, fresh=False, num_processes=processes, context=context)
        assert position is not None
        assert position.rows == 8
    with pytest.raises(ConfigError, match=r"takes 8 sequences a step; 6.*allowed: 2, 4 process"):
        claim(folder, config, fresh=False, num_processes=6, context=2)


def test_a_slice_takes_its_share_of_memory(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(str(recipe()))
    monkeypatch.setenv("WORLD_SIZE", "4")
    whole, halves = (dryrun.plan(config, context) for context in (1, 2))
    assert halves["tokens_per_step"] * 2 == whole["tokens_per_step"] == 4 * 4 * 32
    assert halves["memory"]["activations"] < 0.6 * whole["memory"]["activations"]
    assert halves["memory"]["weights"] == whole["memory"]["weights"]
