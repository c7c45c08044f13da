"""spikelm_train.experiments: runner, report and command"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.cli import main as spikelm
from spikelm.errors import DataError
from spikelm.eval import race
from spikelm.eval.peers import InProcess, Reader
from spikelm.kernels import rows
from spikelm_train.checkpoints import kept_steps
from spikelm_train.experiments import runner as module
from spikelm_train.experiments.cli import main
from spikelm_train.experiments.provenance import commit, cpu_name
from spikelm_train.experiments.report import delta, pareto
from spikelm_train.experiments.runner import LOCK, excerpts, locked, train_process
from spikelm_train.experiments.study import load_study, plan
from spikelm_train.report import METRICS

Write = Callable[..., Path]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Everything in this process; the folders that were trained in."""
    trained: list[Path] = []

    def train(recipe: Path, out: Path, corpus: Path, lock: int) -> int:
        trained.append(out)
        return spikelm(["train", str(recipe), "--out", str(out), "--corpus", str(corpus)])

    def spawned(name: str, build: Callable[..., Reader], *arguments: Any) -> InProcess:
        return InProcess(name, build(*arguments))

    monkeypatch.setattr(module, "train_process", train)
    monkeypatch.setattr(race, "Spawned", spawned)
    return trained


def results(out: Path) -> dict[str, dict[str, Any]]:
    files = sorted((out / "results").glob("*.json"))
    return {(r := json.loads(file.read_text()))["variant"]: r for file in files}


def test_a_study_from_training_to_table(
    study: Write, tmp_path: Path, here: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(study()), "--out", str(out)]
    assert main([*command, "--only", "spiking"]) == 0
    assert "1 of 3 runs finished" in capsys.readouterr().out
    assert not (out / "decode.json").exists(), "timed before all models are there"

    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 runs finished" in shown
    assert len(here) == 2, "a variant of other bits trains nothing"
    found = results(out)
    assert list(found) == ["dense,bits=4", "dense", "spiking"]
    for record in found.values():
        training, validation = record["training"], record["validation"]
        assert record["error"] is None
        assert training["tokens"] == 4 * 4 * 32
        assert training["tokens_x_parameters"] == training["tokens"] * training["parameters"]
        assert training["cpu_seconds"] + training["seconds"] > 0
        assert training["sessions"][0]["status"] == 0
        assert len(training["sessions"][0]["text"]["validation"]["sha256"]) == 64
        assert record["recipe"]["seed"] == record["seed"] == 0
        assert record["recipe"]["steps"] == 4
        assert record["provenance"]["packages"]["torch"]
        assert 0 < validation["bits_per_byte"] < 10
        assert validation["bytes"] == pytest.approx(2000, rel=0.05)
        assert record["test"] is None
    assert found["dense"]["trained"] == found["dense,bits=4"]["trained"]
    assert (
        found["dense,bits=4"]["validation"]["weight_bytes_per_token"]
        < 0.9 * found["dense"]["validation"]["weight_bytes_per_token"]
    )
    assert len(list((out / "data").iterdir())) == 1
    for name in ("table.md", "summary.json", "study.yaml"):
        assert (out / name).is_file()
    assert (out / "bits-bytes.png").read_bytes().startswith(b"\x89PNG")

    before = {file: file.read_bytes() for file in (out / "results").iterdir()}
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert len(here) == 2
    assert before == {file: file.read_bytes() for file in (out / "results").iterdir()}
    by_name = {row["variant"]: row for row in summary["rows"]}
    best = summary["twins"]["dense"]
    assert best == "dense", "other bits are another model, not a better tuned one"
    ours, theirs = (found[name]["validation"] for name in ("spiking", best))
    beside = by_name["spiking"]["deltas"]["dense"]
    difference = ours["bits_per_byte"] - theirs["bits_per_byte"]
    assert beside["bits_per_byte"]["mean"] == pytest.approx(difference)
    ratio = ours["perplexity"] / theirs["perplexity"]
    assert beside["perplexity_percent"]["mean"] == pytest.approx(100 * (ratio - 1))
    assert "dense" not in by_name[best]["deltas"]
    if rows.unavailable() is None:
        decoding = json.loads((out / "decode.json").read_text())
        assert all(len(model["ms"]) == 2 for model in decoding["models"].values())
        assert by_name["spiking"]["speedup"]["dense"]["median"] > 0
        assert (out / "bits-ms.png").is_file()

    assert main([*command, "--list", "--json"]) == 0
    assert {run["state"] for run in json.loads(capsys.readouterr().out)} == {"finished"}

    assert not (out / "test-reads.jsonl").exists()
    assert main([*command, "--test", "--only", "dense"]) == 0
    assert "the test text was read 1 time(s)" in capsys.readouterr().out
    found = results(out)
    assert found["spiking"]["test"] is None
    assert found["dense"]["test"]["bits_per_byte"] != found["dense"]["validation"]["bits_per_byte"]
    (read,) = map(json.loads, (out / "test-reads.jsonl").read_text().splitlines())
    assert read["runs"] == ["dense seed 0", "dense,bits=4 seed 0"]
    # What was measured on it is not measured again.
    assert main([*command, "--test", "--only", "dense"]) == 0
    assert len((out / "test-reads.jsonl").read_text().splitlines()) == 1


def test_a_teacher_is_trained_first(study: Write, tmp_path: Path, here: list[Path]) -> None:
    out = tmp_path / "out"
    taught = {"teacher": "dense", "set": {"distill.weight": 0.5}}
    variants = {"dense": {"set": {"model.neurons": {}}}, "taught": taught, "alone": {}}
    command = [str(study(variants=variants, sweeps={})), "--out", str(out)]
    assert main([*command, "--only", "taught"]) == 0
    teacher, student = (path.name for path in here)
    (found,) = results(out).values()
    assert found["trained"] == f"trained/{student}"
    assert found["recipe"]["distill"]["teacher"] == f"trained/{teacher}"
    assert found["error"] is None
    assert main(command) == 0
    assert [path.name for path in here] == [teacher, student, here[-1].name]
    assert found["recipe"] == results(out)["taught"]["recipe"]
    # Moved, it is still the same study.
    out.rename(tmp_path / "moved")
    assert main([command[0], "--out", str(tmp_path / "moved")]) == 0
    assert len(here) == 3


def test_what_was_interrupted_or_failed_is_taken_up_again(
    study: Write,
    tmp_path: Path,
    here: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = module.train_process
    statuses = [143, 2, 0]

    def train(recipe: Path, out: Path, corpus: Path, lock: int) -> int:
        status = statuses.pop(0)
        (out / "train.log").write_text("spikelm: error: step 3: loss nan\n")
        return status or whole(recipe, out, corpus, lock)

    monkeypatch.setattr(module, "train_process", train)
    path = study(sweeps={}, measure={"decode_rounds": 0, "max_bytes": 500})
    command = [str(path), "--out", str(tmp_path / "out"), "--only", "spiking"]
    assert main(command) == 143
    assert not (tmp_path / "out" / "results").exists()
    assert "run the same command again" in capsys.readouterr().out
    assert main(command) == 1
    assert "failed: spiking seed 0: step 3: loss nan" in capsys.readouterr().out
    assert main(command) == 0
    (found,) = results(tmp_path / "out").values()
    assert found["error"] is None
    assert [session["status"] for session in found["training"]["sessions"]] == [143, 2, 0]


def test_a_run_of_another_process_is_left_to_it(
    study: Write, tmp_path: Path, here: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = load_study(str(study()))
    run = plan(found, found.data.resolve(), only=["spiking"])[0]
    with locked(tmp_path / "out" / "trained" / run.train_key) as held:
        assert held is not None
        assert main([str(study()), "--out", str(tmp_path / "out"), "--only", "spiking"]) == 0
    assert "1 runs are being done by another process" in capsys.readouterr().out
    assert here == []


def test_a_test_document_that_was_trained_on_is_told(
    study: Write, tmp_path: Path, texts: Path, here: list[Path]
) -> None:
    lines = (texts / "one.jsonl").read_text().splitlines()
    (texts / "last.jsonl").write_text(lines[4].replace(" ", "  ") + "\n")
    path = study(sweeps={}, measure={"decode_rounds": 0, "max_bytes": 500})
    command = [str(path), "--out", str(tmp_path / "out"), "--only", "spiking"]
    assert main(command) == 0
    with pytest.raises(DataError, match="1 test document"):
        main([*command, "--test"])
    # Even so it was read.
    assert (tmp_path / "out" / "test-reads.jsonl").is_file()


def test_training_stops_with_a_checkpoint_when_the_study_is_stopped(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()

    def stop() -> None:
        while not (out / METRICS).is_file() or not (out / METRICS).read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with (out / LOCK).open("w") as lock:
        path = recipe(steps=1_000_000)
        status = train_process(path, out, tmp_path / "corpus", lock.fileno())
    thread.join()
    assert status == 143, (out / "train.log").read_text()
    assert kept_steps(out)[-1] > 0
    assert "stopped after step" in (out / "train.log").read_text()
    assert (tmp_path / "corpus" / "train-00000.bin").is_file()
    assert not (out / "data").exists()


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert spikelm(["experiment", "--list"]) == 0
    assert "books-small" in capsys.readouterr().out
    assert spikelm(["experiment"]) == 2
    assert "--list shows" in capsys.readouterr().err
    assert spikelm(["experiment", "demo-ablatio"]) == 2
    assert "did you mean 'demo-ablation'?" in capsys.readouterr().err


def test_pareto_front() -> None:
    points = {"a": (1, 5), "b": (2, 3), "c": (2, 4), "d": (3, 3), "e": (4, 1), "f": (5, 2)}
    assert pareto(points) == ["a", "b", "e"]


def test_differences_are_taken_seed_by_seed() -> None:
    def record(bits: float, perplexity: float, tokens: int = 9) -> dict[str, Any]:
        validation = {"bits_per_byte": bits, "perplexity": perplexity, "tokens": tokens}
        return {"validation": validation, "training": {"flops": 10 * bits}}

    ours = {0: record(2.0, 11.0), 1: record(3.0, 22.0), 2: record(1.0, 1.0)}
    theirs = {0: record(1.0, 10.0), 1: record(2.5, 20.0)}
    found = delta(ours, theirs)
    assert found is not None
    assert found["seeds"] == [0, 1]
    assert found["bits_per_byte"] == {"mean": 0.75, "lowest": 0.5, "highest": 1.0}
    assert found["perplexity_percent"]["mean"] == pytest.approx(10)
    assert found["training_flops"] == 2
    other = delta(ours, {0: record(1.0, 10.0, tokens=8)})
    assert other is not None
    assert other["perplexity_percent"] is None
    assert delta(ours, {7: record(1, 1)}) is None


def test_excerpts_are_the_same_share_of_every_document() -> None:
    documents = ["a" * 100 + "b" * 100, "ä" * 300]
    assert excerpts(documents, None) == excerpts(documents, 800) == documents
    first, second = excerpts(documents, 400)
    assert first == "a" * 50 + "b" * 50
    assert second == "ä" * 150


def test_provenance_outside_a_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert cpu_name(tmp_path / "missing")
