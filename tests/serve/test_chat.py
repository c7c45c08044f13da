"""The terminal chat with piped lines and with Ctrl-C."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import RequestError
from spikelm.sampling import SamplingParams
from spikelm.template import ChatTemplate
from spikelm_serve.chat import HELP, main, talk
from spikelm_serve.conversation import Conversation


def session(
    engine: Any, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    params = SamplingParams(temperature=0)
    assert talk(Conversation(engine, ChatTemplate(), params)) == 0
    return capsys.readouterr().out


def test_piped_session(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine(" caf\u00e9")
    out = session(engine, "Hello\n\n/help\n/reset\nBye\n/nonsense\n", monkeypatch, capsys)
    lines = out.splitlines()
    assert lines[0] == lines[4] == "caf\u00e9"
    assert lines[1].startswith("[7 tokens, ")
    assert lines[1].endswith("tokens/s, 25.0% silent, 16 bytes of state]")
    assert lines[2:4] == [HELP, "[forgotten]"]
    assert lines[6] == HELP
    assert engine.prompts[1] == [256, *b"User: Bye\n\nAssistant:"]


def test_exit(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session(make_engine("no"), "/exit\nHello\n", monkeypatch, capsys) == ""


def test_interrupt_stops_the_answer_only(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine("0123456789" * 5)
    step = engine.step

    def interrupted_step(ids: Any, state: Any, **options: Any) -> Any:
        if engine.steps == 4:
            engine.steps += 1
            raise KeyboardInterrupt
        return step(ids, state, **options)

    engine.step = interrupted_step
    out = session(engine, "one\ntwo\n", monkeypatch, capsys)
    assert out.startswith("01234 [stopped]\n[5 tokens")
    assert "0123456789" * 5 in out
    assert bytes(engine.prompts[1]).endswith(b"\n\nUser: two\n\nAssistant:")


def test_command_in_a_pipe(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "spikelm", "chat", str(tiny_folder), "--max-tokens", "5"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run(
        command, input="h\u00e9 \xff\n".encode("latin-1"), capture_output=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    greeting, *_, last = result.stdout.decode().splitlines()
    assert greeting == f"tiny: {HELP}"
    assert "bytes of state]" in result.stdout.decode()
    assert last == ""


def test_bad_sampling_is_a_user_error(tiny_folder: Path) -> None:
    with pytest.raises(RequestError, match="temperature"):
        main([str(tiny_folder), "--temperature", "7"])
