from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from spikelm import checkpoint
from spikelm.cli import main as spikelm
from spikelm.tokenizer import Tokenizer
from spikelm_train.checkpoints import kept_steps
from spikelm_train.cli import build_parser, count_parameters, main
from spikelm_train.config import load_recipe
from spikelm_train.data import prepare
from spikelm_train.report import read_metrics

Recipe = Callable[..., Path]
Patch = pytest.MonkeyPatch

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_end_to_end(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = [str(recipe(eval_every=5, save_every=5, sample_every=10)), "--out", str(out)]
    command += ["--set", "sample_prompt=The cat", "--set", "steps=12"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for part in ("step 12 ", "100%", "bits/byte", "tok/s", "silent", "ffn_hidden"):
        assert part in shown, part
    assert "sample at step 10: 'The cat" in shown
    records = read_metrics(out)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert [r["step"] for r in records if "validation_loss" in r] == [5, 10, 12]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    loaded = checkpoint.load(out)
    assert loaded.model.config == load_recipe(str(out / "config.yaml")).model
    assert loaded.tokenizer.vocab_size == 257
    assert (out / "chat_template.jinja").is_file()

    before = contents(out)
    assert main(command) == 0
    assert "is finished after 12 steps" in capsys.readouterr().out
    assert contents(out) == before
    assert spikelm(["train", *command, "--set", "optim.lr=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*command, "--set", "steps=1", "--fresh"]) == 0
    assert "finished after 1 steps" in capsys.readouterr().out
    assert len(read_metrics(out)) == 3


def test_a_deleted_model_is_written_again(recipe: Recipe, tmp_path: Path) -> None:
    command = [str(recipe()), "--out", str(tmp_path / "run"), "--set", "steps=2"]
    assert main(command) == 0
    model = tmp_path / "run" / "model.safetensors"
    before = model.read_bytes()
    model.unlink()
    assert main(command) == 0
    assert model.read_bytes() == before


def test_dry_run_writes_nothing(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    path = recipe(max_seconds=600)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = contents(tmp_path)
    command = [str(path), "--out", str(tmp_path / "run"), "--dry-run", "--set", "optim.lr=0.5"]
    assert main(command) == 0
    assert contents(tmp_path) == before
    resolved, _, summary = capsys.readouterr().out.partition("\n\n")
    data = yaml.safe_load(resolved)
    assert data["optim"]["lr"] == 0.5
    assert data["model"]["vocab_size"] == 257
    for part in ("parameters:", "tokens per step: 128", "10 steps or 600 s", "0.5 at 0%", "fp32"):
        assert part in summary, part
    for part in ("state:", "activations", "M per token forward", "two steps:", "MFU", "measured"):
        assert part in summary, part


def test_dry_run_as_json(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(grad_accum_steps=2, peak_flops=1e12))
    assert main([path, "--out", "nowhere", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["grad_accum_steps"] == 2
    assert found["tokens_per_step"] == 2 * 4 * 32
    assert found["tokens"] == 10 * found["tokens_per_step"]
    kinds = found["parameters"]
    assert sum(kinds.values()) == 2 * kinds["total"]
    first, second = found["step_seconds"]
    assert first > 0
    speed = found["tokens_per_step"] / second
    assert found["tokens_per_second"] == pytest.approx(speed)
    assert found["mfu"] == pytest.approx(speed * found["flops_per_token"]["training"] / 1e12)
    assert found["seconds"] == pytest.approx(10 * second)


def test_estimated_memory_is_near_what_steps_take(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = ["model.width=128", "model.ffn.hidden_dim=512", "data.sequence_length=128"]
    for batch in (8, 24):
        command = [str(recipe()), "--out", "nowhere", "--dry-run", "--json"]
        for assignment in (*larger, f"micro_batch_size={batch}"):
            command += ["--set", assignment]
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)
        held = found["memory"]["process"]
        steps = sum(found["memory"].values()) - held
        # Memory that earlier steps freed may still be resident, and then counts as the process'.
        assert 0.3 * steps < found["memory_measured"] - held < 1.4 * steps


def test_a_run_that_does_not_fit_is_told_before_any_step(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    command = ["train", str(recipe()), "--out", str(tmp_path / "run")]
    for present in (10_000, 3_000_000):
        monkeypatch.setattr("spikelm_train.cost.memory_bytes", lambda: present)  # noqa: B023
        assert spikelm(command) == 2
        assert "lower model.width" in capsys.readouterr().err
        assert spikelm([*command, "--dry-run"]) == 2
        shown = capsys.readouterr()
        assert "memory:" in shown.out
        assert "two steps" not in shown.out
        assert "lower model.width" in shown.err
    assert not (tmp_path / "run").exists()


def test_demo_model_has_about_two_million_parameters() -> None:
    sizes = [count_parameters(load_recipe(name).model) for name in ("demo", "demo-dense")]
    assert all(1.8e6 < size < 2.4e6 for size in sizes), sizes


def test_data_replaces_the_sources(recipe: Recipe, tmp_path: Path) -> None:
    lines = "".join(
        json.dumps({"text": f"{i:02} other words here and there"}) + "\n" for i in range(60)
    )
    (tmp_path / "other.jsonl").write_text(lines)
    out = tmp_path / "run"
    source = str(tmp_path / "other.jsonl")
    assert main([str(recipe()), "--out", str(out), "--data", source, "--set", "steps=1"]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["sources"] == [source]
    tokens = prepare(load_recipe(str(out / "config.yaml")), out / "data").train.tokens
    assert Tokenizer.bytes().decode(tokens[1:30].tolist()).endswith("other words here and there")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'lr'?"),
        (["--set", "steps"], "--set takes key=value"),
        (["--set", "report_to=[tensorbord]"], "report_to"),
        (["--set", "peak_flops=0"], "peak_flops: 0"),
        (["--profile", "-1"], "--profile -1"),
        (["--data", "/nowhere/text.txt"], "no such file: /nowhere/text.txt"),
        (["--data", "{empty}"], "no text in"),
        (["--data", "{single}"], "cannot be split"),
        (["--set", "data.sequence_length=50000"], "fewer than one sequence"),
        (["--set", "tokenizer.kind=bpe"], "tokenizer.vocab_size"),
        (["--out", "{recipe}/run"], "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    path, out = recipe(), tmp_path / "run"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "single.txt").write_text("only this")
    names = {"empty": tmp_path / "empty.txt", "single": tmp_path / "single.txt", "recipe": path}
    given = [argument.format(**names) for argument in arguments]
    assert spikelm(["train", str(path), "--out", str(out), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spikelm: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (out / "model.safetensors").exists()


def test_missing_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert spikelm(["train", "dem", "--out", str(tmp_path / "run")]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_the_ways_to_start() -> None:
    text = build_parser().format_help()
    for part in ("--dry-run", "--fresh", "--set", "--data", "torchrun", "Ctrl-C"):
        assert part in text


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`python -m spikelm_train ARGUMENTS` with its output on one pipe."""
    path = os.pathsep.join(str(ROOT / name) for name in ("", "train", "serve"))
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "spikelm_train", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_signals_leave_a_checkpoint_to_continue_from(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = (str(recipe(steps=1_000_000)), "--out", str(out))
    steps = []
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(*command)
        assert process.stdout is not None
        shown = ""
        for line in process.stdout:
            shown += line
            if line.startswith("step "):
                process.send_signal(number)
                break
        shown += process.communicate(timeout=60)[0]
        assert process.returncode == status, shown
        assert "run the same command again to continue" in shown
        steps.append(kept_steps(out)[-1])
        assert f"stopped after step {steps[-1]};" in shown
    assert 0 < steps[0] < steps[1]
    assert [record["step"] for record in read_metrics(out)] == list(range(1, steps[1] + 1))
    assert not (out / "model.safetensors").exists()


def test_two_processes_train_what_one_does(recipe: Recipe, tmp_path: Path) -> None:
    # Everything that is shared between processes, and a teacher whose features need a map.
    wider = ["--set", "model.width=48", "--set", "steps=1"]
    assert main([str(recipe()), "--out", str(tmp_path / "teacher"), *wider]) == 0
    distill = {"teacher": str(tmp_path / "teacher"), "features": 1.0}
    path = str(recipe(steps=3, l1_hidden=1e-3, revive_after=1, distill=distill, quantise_at=0.4))
    zone = (
        "{kind: integer, dead_zone: 1.5, target_silence: 0.5, target_ramp: 0.9, learn: dead_zone}"
    )
    rules = ["--set", f"model.neurons.mixer_input={zone}", "--set", "model.weights.bits=4"]
    one_rank = ["--out", str(tmp_path / "one"), "--set", "grad_accum_steps=2"]
    assert main([path, *one_rank, *rules]) == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(path, "--out", str(tmp_path / "two"), *rules, launcher=torchrun)
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 0, shown
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        shared = {"loss", "validation_loss", "gradient_norm", "silent_fraction", "dead", "revived"}
        shared |= {"divergence", "feature_error"}
        for key in a.keys() & shared:
            assert a[key] == pytest.approx(b[key], rel=1e-3), (key, a, b)
