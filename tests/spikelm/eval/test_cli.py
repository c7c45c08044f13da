"""spikelm.eval.cli and spikelm.eval.tables"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm import corpus
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.eval import length
from spikelm.eval.cli import first_bytes, labelled, main_bench, main_eval, main_inspect
from spikelm.eval.evaluate import xz_bits_per_byte
from spikelm.eval.tables import aligned, size

TEST = ["Return the absolute value of x.", "Another document, which is held out."]
TRAIN = ["Return the absolute value of y.", "This one is not held out."]


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"test": TEST, "validation": TEST, "train": TRAIN}
    monkeypatch.setattr(corpus, "builtin_documents", splits.__getitem__)
    monkeypatch.setattr(length, "builtin_documents", splits.__getitem__)


def test_eval_writes_table_and_report(
    float_folder: Path, coded_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "report.json"
    models = [f"spikes={coded_folder}", "--twin", f"dense={float_folder}"]
    assert main_eval([*models, "--twin", str(float_folder), "--report", str(file)]) == 0
    table = capsys.readouterr().out
    report = json.loads(file.read_text())
    xz, after = xz_bits_per_byte(TEST), xz_bits_per_byte(TEST, TRAIN)
    assert list(report) == [
        "spikes",
        "dense",
        "float",
        "xz_bits_per_byte",
        "xz_after_training_bits_per_byte",
    ]
    assert report["xz_bits_per_byte"] == xz
    assert report["xz_after_training_bits_per_byte"] == after
    assert [p.name for p in file.parent.iterdir()] == ["report.json"]
    wanted = {
        *("bits_per_byte", "perplexity", "silent_fraction", "weight_bytes_skipped_fraction"),
        *("state_bytes", "tokens_per_second", "xz_bits_per_byte"),
    }
    lines = table.splitlines()
    assert lines[0].split() == ["spikes", "dense", "float"]
    for label in ("spikes", "dense", "float"):
        assert wanted <= set(report[label])
        assert report[label]["xz_bits_per_byte"] == xz

    def row(start: str) -> str:
        return next(line for line in lines if line.strip().startswith(start))

    columns: list[dict[str, Any]] = [report[label] for label in lines[0].split()]
    for title, form in {
        "bits per byte": lambda m: f"{m['bits_per_byte']:.4f}",
        "perplexity per token": lambda m: f"{m['perplexity']:.3f}",
        "(a) silent fraction": lambda m: f"{100 * m['silent_fraction']['total']:.1f} %",
        "ffn_hidden": lambda m: f"{100 * m['silent_fraction']['ffn_hidden']:.1f} %",
        "(b) slot sparsity, ffn_hidden": lambda m: (
            f"{100 * m['slot_sparsity']['ffn_hidden']['value']:.1f} % (S=7)"
        ),
        "(c) weight bytes skipped": lambda m: f"{100 * m['weight_bytes_skipped_fraction']:.1f} %",
        "(d) tensors that spike": lambda m: f"{len(m['spiking_tensors'])} of 12",
        "tokens per second": lambda m: f"{m['tokens_per_second']:.1f}",
    }.items():
        assert row(title).split(title)[1].split() == " ".join(map(form, columns)).split()
    assert f"xz -9e: {xz:.4f} bits per byte" in table
    assert f"training text: {after:.4f}" in table


def test_eval_json_on_files(
    float_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("x" * 30)
    (tmp_path / "b.txt").write_text("y" * 30)
    data = ["--data", str(tmp_path / "*.txt"), "--max-bytes", "40"]
    assert main_eval([str(float_folder), *data, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"models", "xz_bits_per_byte"}
    assert report["models"]["float"]["bytes"] == 40
    assert report["models"]["float"]["tokens"] == 42
    assert report["xz_bits_per_byte"] == xz_bits_per_byte(["x" * 30 + "y" * 10])


def test_eval_errors_come_before_the_work(float_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        main_eval([str(float_folder), "--twin", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="called 'float'"):
        main_eval([str(float_folder), "--twin", f"float={float_folder}"])
    with pytest.raises(DataError, match="no such file"):
        main_eval([str(float_folder), "--data", str(tmp_path / "none.txt")])
    with pytest.raises(ConfigError, match="--max-bytes 0 given"):
        main_eval([str(float_folder), "--max-bytes", "0"])


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert labelled(["a=runs/x", "runs/y/"]) == {"a": "runs/x", "y": "runs/y/"}
    (tmp_path / "k=v").mkdir()
    assert labelled(["k=v"]) == {"k=v": "k=v"}
    for bad in ("xz_bits_per_byte=runs/x", "=runs/x"):
        with pytest.raises(ConfigError, match="name them"):
            labelled([bad])


def test_first_bytes_cuts_between_characters_and_stops_reading() -> None:
    def endless() -> Any:
        while True:
            yield "h\u00e9"

    assert first_bytes(endless(), 6) == ["h\u00e9", "h\u00e9"]
    assert first_bytes(endless(), 5) == ["h\u00e9", "h"]
    assert first_bytes(iter(["a", "b"]), None) == ["a", "b"]
    assert first_bytes(["a"], 100) == ["a"]


def test_inspect_prints_every_population(
    coded_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_inspect([str(coded_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main_inspect([str(coded_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = lines[1 : lines.index("")]
    assert [row.split()[0] for row in rows] == [p["name"] for p in report["populations"]]
    for row, entry in zip(rows, report["populations"], strict=True):
        assert entry["fed_by"] in row
        assert f"{100 * entry['silent_fraction']:.1f} %" in row
        assert f"{entry['code']} {entry['steps']} " in " ".join(row.split())
        if entry["weights"]:
            assert size(entry["weights"]["bytes_read_per_token"]) in row
    text = "\n".join(lines)
    skipped = 1 - report["weight_bytes_read_per_token"] / report["weight_bytes_per_token"]
    assert f"{100 * skipped:.1f} % skipped" in text
    assert f"state                {size(report['state']['bytes'])}, the same" in text
    (tmp_path / "text.txt").write_text("something else")
    assert main_inspect([str(coded_folder), "--data", str(tmp_path / "text.txt")]) == 0
    assert "given text, 15 tokens" in capsys.readouterr().out


def test_bench_length_in_fresh_processes(
    coded_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "length.png"
    arguments = ["--lengths", "70", "--repeats", "1", "--plot", str(plot), "--json"]
    assert main_bench(["length", str(coded_folder), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["measurements"]
    assert row["length"] == 70
    assert row["full"]["state_bytes"] == 70 * 4 * 2 * 2 * 2 * 8 + 4 * 2 * 32 + 8
    ratio = row["full"]["ms_per_token"] / row["ours"]["ms_per_token"]
    assert row["ratio"]["ms_per_token"] == ratio
    # A process that had counted its own start would show hundreds of megabytes.
    assert 0 < row["ours"]["peak_bytes"] < 2**26
    assert report["plot"] == str(plot)
    assert plot.read_bytes()[1:4] == b"PNG"


def test_bench_needs_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main_bench([])
    assert "length" in capsys.readouterr().err


def test_bench_length_bad_lengths(float_folder: Path) -> None:
    for bad in ("0", "ten"):
        with pytest.raises(ConfigError, match="lengths"):
            main_bench(["length", str(float_folder), "--lengths", bad])


@pytest.mark.parametrize("main", [main_eval, main_bench, main_inspect])
def test_help(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: spikelm ")


def test_the_command_module_imports_no_torch() -> None:
    code = "import sys, spikelm.eval.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_aligned_and_size() -> None:
    assert aligned([["a", "1", "22"], ["bbb", "333", "4"]]) == "a      1  22\nbbb  333   4"
    assert aligned([["a", "b"], ["cc", "ddd"]], left=2) == "a   b\ncc  ddd"
    sizes = [0, 1023, 1024, 1536, 20 * 2**20, 3 * 2**30, 5000 * 2**30]
    assert [size(n) for n in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "20.0 MiB",
        "3.0 GiB",
        "5000.0 GiB",
    ]


def test_a_misspelt_preset() -> None:
    with pytest.raises(ConfigError, match="no preset: 'spikegpt-47m'; did you mean 'spikegpt-46m'"):
        main_inspect(["spikegpt-47m"])
