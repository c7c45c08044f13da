"""The demo's steps, with stand-ins for the commands that take minutes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm_serve import demo

MODELS = ("dense", "spiking", "spikes")
COPY_MODEL = (
    "import os, shutil, sys; out, tiny = sys.argv[1:]; "
    "os.path.exists(out) or shutil.copytree(tiny, out, copy_function=shutil.copyfile)"
)


@pytest.fixture
def commands(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for what takes minutes; the list of what the demo ran."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 20)
    announced = demo.announced
    ran: list[str] = []

    def stand_in(*arguments: str | Path) -> list[str]:
        command = str(arguments[0])
        ran.append(command)
        if command == "serve":
            words = announced("serve", tiny_folder, *arguments[2:])
            return [*words, "--model-name", Path(arguments[1]).name]
        if command == "eval":
            return [*announced(*arguments), "--data", str(text)]
        folder = str(arguments[3] if command == "train" else arguments[2])
        code = {
            "train": COPY_MODEL,
            "convert": COPY_MODEL,
            "generate": "print('a sample')",
        }[command]
        return [sys.executable, "-c", code, folder, str(tiny_folder)]

    monkeypatch.setattr(demo, "announced", stand_in)
    return ran


def test_demo_runs_and_continues(
    commands: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert demo.main(["--out", str(folder)]) == 0
    assert commands == ["train", "train", "convert", "eval", "serve", "generate"]
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() == {*MODELS, "xz_bits_per_byte"}
    wanted = "bits_per_byte perplexity silent_fraction weight_bytes_skipped_fraction state_bytes"
    for name in MODELS:
        assert {*wanted.split(), "tokens_per_second", "xz_bits_per_byte"} <= report[name].keys()
    out = capfd.readouterr().out
    assert "chat: What does this module do?" in out
    assert "the server has stopped" in out
    assert "spikelm chat" in out

    commands.clear()
    assert demo.main(["--out", str(folder)]) == 0
    assert commands == ["train", "train", "serve", "generate"]
    again = capfd.readouterr().out
    table = out[out.index(" dense  ") : out.index("== Serve")]
    assert table in again


def test_is_current(tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    source.touch()
    assert not demo.is_current(made, source)
    made.touch()
    os.utime(source, (100, 100))
    assert demo.is_current(made, source)
    os.utime(made, (99, 99))
    assert not demo.is_current(made, source)


def test_ask(
    serve: Callable[..., httpx.Client], make_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = serve(make_engine(" the file's name"))
    demo.ask(f"{client.base_url}/v1", "tiny")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "the file's name"
    assert lines[3] == "completion: The function returns the file's name"


def test_failing_step_stops_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        demo.main(["--out", str(tmp_path), "--set", "no.such.key=1"])
    assert info.value.code == 1
    out, err = capfd.readouterr()
    assert f"$ spikelm train demo --out {tmp_path}/spiking --set no.such.key=1" in out
    assert "spikelm: error: unknown key" in err
    assert "failed with status 2" in err
