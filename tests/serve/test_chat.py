"""The terminal chat with piped lines and with Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm.errors import RequestError
from spikelm.generate import Engine
from spikelm.sampling import SamplingParams
from spikelm.template import ChatTemplate
from spikelm_serve.chat import HELP, main, talk
from spikelm_serve.conversation import Conversation
from spikelm_serve.keys import Keys, make


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


def chat(
    url: str, lines: str, *options: str, key: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if key is None else {"SPIKELM_API_KEY": key})}
    command = [sys.executable, "-m", "spikelm", "chat", url, *options]
    return subprocess.run(
        command, input=lines, capture_output=True, text=True, env=environment, timeout=60
    )


def test_with_a_server(serve: Callable[..., httpx.Client], coded_engine: Engine) -> None:
    client = serve(coded_engine)
    url = f"{client.base_url}".rstrip("/") + "/v1"
    options = ("--temperature", "0", "--max-tokens", "9")
    found = chat(url, "Hello\nAnd then?\n/reset\nHello\n", *options)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if "tokens/s" in line]
    assert len(lines) == 3
    assert "0 of" in lines[0]
    known = [int(re.findall(r"(\d+) of \d+ known before", line)[0]) for line in lines]
    assert known[1] > 20
    assert known[2] > 10
    talk = [{"role": "user", "content": "Hello"}]
    ask = {"messages": talk, "temperature": 0, "max_tokens": 9}
    answer = client.post("/v1/chat/completions", json=ask).json()
    assert found.stdout.count(answer["choices"][0]["message"]["content"]) >= 2


def test_a_server_that_wants_a_key_or_is_not_there(
    serve: Callable[..., httpx.Client], make_engine: Any, tmp_path: Path
) -> None:
    key, line = make("me")
    (tmp_path / "keys").write_text(line + "\n")
    client = serve(make_engine(" Hi."), keys=Keys.read(tmp_path / "keys"))
    url = f"{client.base_url}".rstrip("/") + "/v1"
    refused = chat(url, "Hello\n")
    assert refused.returncode == 2
    assert "SPIKELM_API_KEY" in refused.stderr
    assert "Hi." in chat(url, "Hello\n", key=key).stdout
    for wrong in ("http://127.0.0.1:1/v1", "http:///x"):
        gone = chat(wrong, "Hello\n")
        assert gone.returncode == 2
        assert gone.stderr.count("\n") == 1
