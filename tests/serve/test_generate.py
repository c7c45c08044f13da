"""`spikelm generate`: the engine's text on stdout, the cost on stderr."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikelm.errors import CheckpointError
from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.sampling import SamplingParams
from spikelm_serve.generate import main


def expected_text(engine: Engine, prompt: str, **params: float) -> str:
    ids = prompt_ids(engine.tokenizer, prompt)
    sampling = SamplingParams(max_tokens=20, temperature=0.8, seed=1, **params)  # type: ignore[arg-type]
    return "".join(chunk.text for chunk in stream_text(engine, ids, sampling))


def test_streams_the_engines_text(
    tiny_folder: Path, tiny_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_folder), "--prompt", "def f", "--max-tokens", "20", "--seed", "1"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == expected_text(tiny_engine, "def f") + "\n"
    assert err.startswith("[20 tokens, ")
    state_bytes = tiny_engine.model.zero_state(1).nbytes
    assert err.endswith(f" silent, {state_bytes:,} bytes of state]\n")


def test_json_and_stdin(
    tiny_folder: Path,
    tiny_engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("d\u00e9f"))
    arguments = [str(tiny_folder), "--prompt", "-", "--max-tokens", "20", "--seed", "1"]
    assert main([*arguments, "--json", "--top-p", "0.9"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt"] == "d\u00e9f"
    assert report["text"] == expected_text(tiny_engine, "d\u00e9f", top_p=0.9)
    assert tiny_engine.tokenizer.decode(report["token_ids"]) == report["text"]
    assert (report["finish_reason"], report["prompt_tokens"]) == ("length", 5)
    assert 0 <= report["silent_fraction"] <= 1
    assert report["tokens_per_second"] > 0


def test_stop(tiny_folder: Path, tiny_engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    whole = expected_text(tiny_engine, "x")
    stop = whole[5:7]
    arguments = [str(tiny_folder), "--prompt", "x", "--max-tokens", "20", "--seed", "1"]
    main([*arguments, "--stop", stop, "--stop", "unlikely"])
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_utf8_whatever_the_locale(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "spikelm", "generate", str(tiny_folder)]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [*command, "--prompt", "-", "--seed", "1", "--max-tokens", "30"],
        input=b"caf\xc3\xa9 \xff",
        capture_output=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert "\ufffd" in result.stdout.decode()


def test_missing_folder() -> None:
    with pytest.raises(CheckpointError, match="no model folder at nowhere"):
        main(["nowhere", "--prompt", "x"])
