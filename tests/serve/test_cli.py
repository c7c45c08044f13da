"""`spikelm serve` as a process: start, answer, end; and what keeps it from starting."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from spikelm.errors import ConfigError
from spikelm_serve.cli import allowed_hosts, example, listen

COMMAND = [sys.executable, "-m", "spikelm", "serve"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_starts_answers_and_ends(tiny_folder: Path, number: signal.Signals) -> None:
    command = [*COMMAND, str(tiny_folder), "--port", "0", "--model-name", "it's"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("serving it's at http://127.0.0.1:"), process.stderr.read()
        assert "bytes of state" in line
        arguments = shlex.split(process.stdout.readline().removeprefix("try: "))
        assert arguments[:2] == ["curl", f"{line.split()[3].rstrip(',')}/chat/completions"]
        headers = dict([arguments[3].split(": ")])
        with httpx.Client(trust_env=False, timeout=20) as client:
            answer = client.post(arguments[1], headers=headers, content=arguments[5].encode())
            assert answer.json()["model"] == "it's"
            evil = client.get(f"{line.split()[3].rstrip(',')}/models", headers={"Host": "evil"})
            assert evil.status_code == 403
            if number == signal.SIGTERM:
                # A stream that is running does not keep the server alive.
                body = {**json.loads(arguments[5]), "max_tokens": 1_000_000, "stream": True}
                request = client.build_request("POST", arguments[1], json=body)
                client.send(request, stream=True)
                start = time.monotonic()
        process.send_signal(number)
        assert process.wait(15) == 0
        if number == signal.SIGTERM:
            assert time.monotonic() - start < 12
        assert "Traceback" not in process.stderr.read()


def test_port_in_use_is_one_line(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [*COMMAND, str(tiny_folder), "--port", str(port)],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"spikelm: error: cannot listen on 127.0.0.1:{port}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70_000, "--port: 70000 given"),
        ("127.0.0.1", -1, "--port: -1 given"),
        ("256.1.1.1", 0, "cannot listen on 256.1.1.1:0"),
    ],
)
def test_listen_refuses(host: str, port: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listen(host, port)


def test_allowed_hosts() -> None:
    names = allowed_hosts("127.0.0.1")
    assert names is not None
    assert {"localhost", "127.0.0.1", "::1"} <= names
    assert allowed_hosts("localhost") == {"localhost", "127.0.0.1", "::1"}
    assert allowed_hosts("127.0.0.2") == {"127.0.0.2", "localhost", "127.0.0.1", "::1"}
    assert allowed_hosts("0.0.0.0") is None


def test_example_is_one_shell_line() -> None:
    words = shlex.split(example("http://h/v1", "it's"))
    assert json.loads(words[5])["model"] == "it's"


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        "import sys, spikelm.cli\n"
        f"try: spikelm.cli.run('{command}', ['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'uvicorn', 'starlette', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"usage: spikelm {command}" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"
