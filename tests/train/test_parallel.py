"""One recipe on one process, on two, and with weights shared out: the same training."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spikelm import checkpoint
from spikelm.errors import ConfigError, MissingExtraError
from spikelm.models.spikelm import LanguageModel
from spikelm_train import parallel
from spikelm_train.checkpoints import Position, find, kept_steps, read_position
from spikelm_train.config import load_recipe
from spikelm_train.loop import Trainer
from spikelm_train.parallel import (
    launched_strategy,
    learned_neurons,
    make_accelerator,
    take_out_neurons,
)
from spikelm_train.report import read_metrics

Recipe = Callable[..., Path]
Make = Callable[..., Trainer]

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file")
SHOWN = ("loss", "gradient_norm", "silent_fraction", "validation_loss")

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture
def rich(recipe: Recipe) -> Path:
    """Accumulation, trained and steered zones, L1, a tied head, four checkpoints."""
    path = recipe(
        steps=8,
        grad_accum_steps=2,
        l1_hidden=1e-3,
        eval_every=4,
        save_every=2,
        keep_last=9,
        sample_every=8,
        sample_tokens=2,
    )
    data = yaml.safe_load(path.read_text())
    data["model"]["tie_embeddings"] = True
    data["model"]["neurons"]["mixer_input"]["learn"] = "dead_zone"
    path.write_text(yaml.safe_dump(data))
    return path


def start(launcher: tuple[str, ...], path: Path, out: Path, *rest: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher]
    command += ["-m", "spikelm_train"] if launcher[:1] else ["-m", "spikelm_train"]
    folder = ["--corpus", str(out.parent / "data")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    return subprocess.Popen(
        [*command, str(path), "--out", str(out), *folder, *rest],
        env={**env, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(launcher: tuple[str, ...], path: Path, out: Path, *rest: str) -> str:
    process = start(launcher, path, out, *rest)
    shown = process.communicate(timeout=240)[0]
    assert process.returncode == 0, shown
    return shown


def assert_same_curve(a: Path, b: Path, rel: float = 1e-4) -> None:
    left, right = read_metrics(a), read_metrics(b)
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & set(SHOWN):
            assert one[name] == pytest.approx(two[name], rel=rel), (name, one, two)


def assert_same_model(a: Path, b: Path, **tolerance: float) -> None:
    left, right = (checkpoint.load(str(folder)).model.state_dict() for folder in (a, b))
    torch.testing.assert_close(left, right, **tolerance)


def deepspeed_config(folder: Path, **settings: Any) -> tuple[str, ...]:
    """The launcher's arguments for a configuration of its own, two processes."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        **settings,
    }
    (folder / "ds.json").write_text(yaml.safe_dump(config, default_flow_style=True))
    launcher = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "ds.json"),
            "zero3_init_flag": False,
        },
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": 2,
    }
    (folder / "launch.yaml").write_text(yaml.safe_dump(launcher))
    return (*ACCELERATE, str(folder / "launch.yaml"))


def test_copies_and_shards_train_alike_and_change_places(rich: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    run((), rich, one, "--set", "grad_accum_steps=4")
    two, shards = tmp_path / "two", tmp_path / "shards"
    assert "2 x cpu" in run((*TORCHRUN, "2"), rich, two)
    assert_same_curve(one, two)
    run((*TORCHRUN, "2"), rich, shards, "--shard")
    assert_same_curve(one, shards)
    for other in (two, shards):
        assert_same_model(one, other, rtol=1e-3, atol=1e-4)
        assert read_position(find(other) or other).num_processes == 2
    # From the middle on, another number of processes: the same data in the same order.
    for out, options in ((two, ()), (shards, ("--shard",))):
        for name in ("model.safetensors", "checkpoints/step-00000006", "checkpoints/step-00000008"):
            path = out / name
            path.unlink() if path.is_file() else __import__("shutil").rmtree(path)
        shown = run((), rich, out, *options)
        assert "1 x cpu" in shown
        assert "continuing after step 4" in shown
        assert_same_curve(one, out)
        assert_same_model(one, out, rtol=1e-3, atol=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_what_one_process_does(rich: Path, tmp_path: Path, stage: int) -> None:
    one, zero = tmp_path / "one", tmp_path / "zero"
    run((), rich, one, "--set", "grad_accum_steps=4")
    launcher = (*ACCELERATE, str(ROOT / f"configs/accelerate/zero{stage}.yaml"))
    run(launcher, rich, zero)
    assert_same_curve(one, zero)
    assert_same_model(one, zero, rtol=1e-3, atol=1e-4)
    # A continued run ends with the same bits.
    straight = (zero / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "checkpoints/step-00000006", "checkpoints/step-00000008"):
        path = zero / name
        path.unlink() if path.is_file() else __import__("shutil").rmtree(path)
    assert "continuing after step 4" in run(launcher, rich, zero)
    assert (zero / "model.safetensors").read_bytes() == straight
