from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.cli import main
from spikelm.errors import CheckpointError, ConfigError
from spikelm_train.config import TrainConfig, load_recipe
from spikelm_train.resume import (
    Interruption,
    Position,
    claim,
    find,
    read_position,
    replace,
)


@pytest.fixture
def config(recipe: Callable[..., Path]) -> TrainConfig:
    return load_recipe(str(recipe()))


def checkpoint(out: Path, step: int, text: str = "weights") -> None:
    def write(folder: str) -> None:
        (Path(folder) / "state").write_text(text)

    replace(out, Position(step=step), write, is_main=True, wait=lambda: None)


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
    with pytest.raises(ConfigError, match="begun on 1 process"):
        claim(tmp_path, config, fresh=False, num_processes=2)
    assert find(tmp_path) is not None


def test_fresh_deletes_the_run_and_nothing_else(tmp_path: Path, config: TrainConfig) -> None:
    claim(tmp_path, config, fresh=False, num_processes=1)
    checkpoint(tmp_path, 7)
    (tmp_path / "model.safetensors").write_text("trained")
    (tmp_path / "notes.txt").write_text("mine")
    changed = dataclasses.replace(config, seed=3)
    assert claim(tmp_path, changed, fresh=True, num_processes=1) is None
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl") == sorted(
        ["config.yaml", "notes.txt", "recipe.yaml"]
    )


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


def test_replace_swaps_whole_folders(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "one")
    checkpoint(tmp_path, 2, "two")
    found = find(tmp_path)
    assert found is not None
    assert (found / "state").read_text() == "two"
    assert read_position(found) == Position(step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "one")

    def fail(folder: str) -> None:
        (Path(folder) / "state").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace(tmp_path, Position(step=2), fail, is_main=True, wait=lambda: None)
    found = find(tmp_path)
    assert found is not None
    assert (found / "state").read_text() == "one"
    checkpoint(tmp_path, 3, "three")
    assert (find(tmp_path) or tmp_path) / "state" == tmp_path / "checkpoint" / "state"


def test_find_between_the_two_renames(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "one")
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert find(tmp_path) == tmp_path / "checkpoint.old"


def test_damaged_position(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    (tmp_path / "checkpoint" / "position.json").write_text('{"stop": 3}')
    with pytest.raises(CheckpointError, match="--fresh"):
        read_position(tmp_path / "checkpoint")


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
