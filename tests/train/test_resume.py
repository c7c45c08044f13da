from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.cli import main
from spikelm.errors import CheckpointError, ConfigError
from spikelm_train.checkpoints import Position, Writer, find, kept_steps, load, read_position
from spikelm_train.config import TrainConfig, load_recipe
from spikelm_train.resume import Interruption, begun, claim, occupied


@pytest.fixture
def config(recipe: Callable[..., Path]) -> TrainConfig:
    return load_recipe(str(recipe()))


def checkpoint(out: Path, step: int, text: str = "weights", **position: Any) -> None:
    writer = Writer(out, 0, 2, lambda: None)
    place = Position(step=step, rows=position.pop("rows", 4), **position)
    writer.begin(place, {"text": text}, {}, lambda folder: None)
    writer.finish()
    writer.close()


def text_of(out: Path) -> str:
    found = find(out)
    assert found is not None
    return str(load(found, 0)[0]["text"])


def test_claim_makes_the_folder_and_keeps_the_recipe(tmp_path: Path, config: TrainConfig) -> None:
    out = tmp_path / "a" / "b"
    assert claim(out, config, fresh=False, num_processes=1) is None
    assert load_recipe(str(out / "config.yaml")) == config
    other = dataclasses.replace(config, steps=99)
    assert claim(out, other, fresh=False, num_processes=1) is None, "nothing to lose yet"
    assert load_recipe(str(out / "config.yaml")) == other


def test_claim_continues_the_same_recipe_only(tmp_path: Path, config: TrainConfig) -> None:
    claim(tmp_path, config, fresh=False, num_processes=1)
    checkpoint(tmp_path, 7)
    position = claim(tmp_path, config, fresh=False, num_processes=1)
    assert position is not None
    assert position.step == 7
    optim = dataclasses.replace(config.optim, lr=0.5)
    changed = dataclasses.replace(config, optim=optim, seed=3)
    with pytest.raises(ConfigError, match=r"optim.lr, seed.*--out.*--fresh"):
        claim(tmp_path, changed, fresh=False, num_processes=1)
    assert kept_steps(tmp_path) == [7]


def test_other_processes_share_the_rows_out_equally(tmp_path: Path, config: TrainConfig) -> None:
    claim(tmp_path, config, fresh=False, num_processes=3)
    checkpoint(tmp_path, 7, rows=24, num_processes=3)
    for count in (1, 2, 6):
        assert claim(tmp_path, config, fresh=False, num_processes=count) is not None
    with pytest.raises(ConfigError, match=r"24 sequences a step; 4 .*allowed: 1, 2, 3, 6 process"):
        claim(tmp_path, config, fresh=False, num_processes=4)
    with pytest.raises(ConfigError, match="begun without sharding.*spikelm export"):
        claim(tmp_path, config, fresh=False, num_processes=1, strategy="shards")


def test_deepspeed_continues_on_as_many_processes(tmp_path: Path, config: TrainConfig) -> None:
    claim(tmp_path, config, fresh=False, num_processes=2)
    checkpoint(tmp_path, 7, rows=8, num_processes=2, strategy="zero")
    assert claim(tmp_path, config, fresh=False, num_processes=2, strategy="zero") is not None
    with pytest.raises(ConfigError, match="begun on 2 process"):
        claim(tmp_path, config, fresh=False, num_processes=1, strategy="zero")


def test_claim_continues_at_a_step(tmp_path: Path, config: TrainConfig) -> None:
    claim(tmp_path, config, fresh=False, num_processes=1)
    for step in (5, 6, 7):
        checkpoint(tmp_path, step)
    position = claim(tmp_path, config, fresh=False, num_processes=1, step=6)
    assert position is not None
    assert position.step == 6
    with pytest.raises(ConfigError, match="no checkpoint of step 5; kept: 6, 7"):
        claim(tmp_path, config, fresh=False, num_processes=1, step=5)


def test_fresh_deletes_the_run_and_nothing_else(tmp_path: Path, config: TrainConfig) -> None:
    claim(tmp_path, config, fresh=False, num_processes=1)
    checkpoint(tmp_path, 7)
    (tmp_path / "model.safetensors").write_text("trained")
    (tmp_path / "notes.txt").write_text("mine")
    changed = dataclasses.replace(config, seed=3)
    assert claim(tmp_path, changed, fresh=True, num_processes=1) is None
    assert kept_steps(tmp_path) == []
    begun(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl") == sorted(
        ["config.yaml", "notes.txt", "recipe.yaml"]
    )


def kept(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_fresh_that_cannot_begin_keeps_the_run(recipe: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", str(recipe()), "--out", str(out)]
    assert main([*command, "--set", "steps=2"]) == 0
    before = kept(out)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for wrong in (["--data", str(short)], ["--set", "data.sequence_length=99999"]):
        assert main([*command, "--fresh", *wrong]) == 2
        assert kept(out) == before
    assert main([*command, "--fresh", "--set", "steps=1"]) == 0
    assert (
        kept(out).keys() - before.keys()
        == {p for p in kept(out) if p.startswith(("checkpoints", "tensorboard"))} - before.keys()
    )
    assert kept_steps(out) == [1]


@pytest.mark.parametrize("moved", [1, 2, 99])
def test_a_killed_fresh_loses_nothing(tmp_path: Path, config: TrainConfig, moved: int) -> None:
    out = tmp_path / "run"
    claim(out, config, fresh=False, num_processes=1)
    checkpoint(out, 7)
    for name in ("data", "metrics.jsonl"):
        (out / name).write_text(name)
    before = kept(out)
    with pytest.MonkeyPatch.context() as patch:
        renames = itertools.count()
        rename = Path.rename

        def killed(here: Path, there: Path) -> Path:
            if next(renames) == moved:
                raise KeyboardInterrupt
            return rename(here, there)

        patch.setattr(Path, "rename", killed)
        with contextlib.suppress(KeyboardInterrupt):
            claim(out, dataclasses.replace(config, seed=3), fresh=True, num_processes=1)
            (out / "data").write_text("half of it")
            (out / "teacher.json").write_text("new")
        assert kept(out) != before
    with occupied(out):
        assert {n: x for n, x in kept(out).items() if n != ".training.lock"} == before
    assert kept(out) == before


def test_a_run_folder_has_one_command(recipe: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with occupied(out):
        for extra in ([], ["--fresh"]):
            found = subprocess.run(
                [sys.executable, "-m", "spikelm", "train", recipe(), "--out", out, *extra],
                capture_output=True,
                text=True,
            )
            assert found.returncode == 2
            assert "another command is training in" in found.stderr
            assert found.stderr.count("\n") == 1
    assert not out.exists()


def test_what_is_no_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with occupied(out):
        pass
    assert out.read_text() == "a file"


@pytest.mark.parametrize("fresh", [False, True])
def test_claim_leaves_other_peoples_models_alone(
    tmp_path: Path, config: TrainConfig, fresh: bool
) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(ConfigError, match="another --out"):
        claim(tmp_path, config, fresh=fresh, num_processes=1)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_claim_of_an_unwritable_place(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*another --out"):
        claim(tmp_path / "file" / "out", config, fresh=False, num_processes=1)
    with pytest.raises(ConfigError, match=r"cannot write to .*another --out"):
        claim(tmp_path / "file", config, fresh=False, num_processes=1)


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        checkpoint(tmp_path, step, f"text {step}")
    assert kept_steps(tmp_path) == [2, 30]
    assert text_of(tmp_path) == "text 30"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000030",
    ]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "one")
    writer = Writer(tmp_path, 0, 2, lambda: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        writer.begin(Position(step=2), {"w": torch.zeros(100_000)}, {}, lambda folder: None)
        with pytest.raises(CheckpointError, match=r"of step 2 could not .*that of step 1 is kept"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert text_of(tmp_path) == "one"
    assert kept_steps(tmp_path) == [1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_what_is_written_is_what_was_there(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 0, 2, lambda: None)
    weights = torch.zeros(1_000_000)
    writer.begin(Position(step=1), {"w": [weights]}, {"r": (1, 2.0)}, lambda folder: None)
    weights += 1
    assert find(tmp_path) is None
    writer.finish()
    shared, own = load(tmp_path / "checkpoints" / "step-00000001", 0)
    assert not shared["w"][0].any()
    assert own == {"r": (1, 2.0)}
    assert load(tmp_path / "checkpoints" / "step-00000001", 1)[1] is None


def test_damaged_position(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    found = tmp_path / "checkpoints" / "step-00000002"
    (found / "position.json").write_text('{"stop": 3}')
    with pytest.raises(CheckpointError, match="--resume 1, or start over with --fresh"):
        read_position(found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_notes_the_first_signal_and_restores(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interruption = Interruption()
    with interruption.listening():
        assert signal.getsignal(number) is not before
        os.kill(os.getpid(), number)
        assert interruption.signum == number
        assert signal.getsignal(number) is before, "a second one acts at once"
    assert signal.getsignal(number) is before


def test_a_folder_with_files_of_its_own_is_refused(tmp_path: Path, capsys: Any) -> None:
    for name, text in (("config.yaml", "other: 1\n"), ("data/notes.txt", "mine")):
        out = tmp_path / name.partition(".")[0].replace("/", "-")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
        for extra in ([], ["--fresh"]):
            assert main(["train", "demo", "--out", str(out), *extra]) == 2
            assert "no training run put there" in capsys.readouterr().err
        assert (out / name).read_text() == text
        assert len(list(out.rglob("*"))) == len(Path(name).parts)


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    arguments = ["train", "demo", "--out", str(tmp_path / "run"), "--data", str(empty)]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_larger_than_the_machine_is_refused(tmp_path: Path, capsys: Any) -> None:
    arguments = ["train", "demo", "--out", str(tmp_path / "run"), "--set", "model.width=50000000"]
    assert main(arguments) == 2
    assert "GB are here; lower model.width" in capsys.readouterr().err


def test_what_is_only_looked_at_may_change(make: Callable[..., Any]) -> None:
    first = make(out="run")
    first.advance(0.0)
    first.save(0.0)
    first.writer.finish()
    changed = load_recipe(str(first.out / "config.yaml"), ["log_every=7", "report_to=[]"])
    assert claim(first.out, changed, fresh=False, num_processes=1) is not None
    other = load_recipe(str(first.out / "config.yaml"), ["log_every=7", "optim.lr=1e-4"])
    with pytest.raises(ConfigError, match=r"another recipe \(different: optim.lr\)"):
        claim(first.out, other, fresh=False, num_processes=1)
