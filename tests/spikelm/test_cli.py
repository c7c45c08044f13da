"""spikelm.cli"""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from spikelm import __version__, cli
from spikelm.errors import ConfigError

ROOT = Path(__file__).parents[2]
COMMANDS = list(cli.COMMANDS)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Installs a function as the command `try`."""

    def install(function: Callable[[list[str]], int]) -> None:
        module = types.ModuleType("spikelm_try")
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "spikelm_try", module)
        monkeypatch.setitem(cli.COMMANDS, "try", ("spikelm_try:main", "for tests"))

    return install


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_help_version_and_bare_import_are_light() -> None:
    code = (
        "import sys, spikelm, spikelm.cli, spikelm.config, spikelm.errors\n"
        "try: spikelm.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'starlette', 'accelerate', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_python_m_spikelm_version() -> None:
    result = python("-m", "spikelm", "--version")
    assert (result.returncode, result.stdout) == (0, f"spikelm {__version__}\n")


def test_no_command_prints_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "commands:" in captured.err


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "spikelm: error: unknown command 'trian'; did you mean 'train'?\n"
    )


def test_unknown_option_before_the_command() -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--verbose", "doctor"])
    assert exit_.value.code == 2


def test_unknown_option_of_a_command() -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--jsno"])
    assert exit_.value.code == 2


def test_arguments_and_status_pass_through(command: Callable[..., None]) -> None:
    seen: list[list[str]] = []
    command(lambda argv: seen.append(argv) or 7)
    assert cli.main(["try", "a", "--help", "--set", "x=1"]) == 7
    assert seen == [["a", "--help", "--set", "x=1"]]


def test_user_error_is_one_line(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(ConfigError("k: 0 given; allowed: a number > 0")))
    assert cli.main(["try"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "spikelm: error: k: 0 given; allowed: a number > 0\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--debug", "try"], ["try", "--debug"]])
def test_debug_shows_the_traceback(
    arguments: list[str], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(ConfigError("bad")))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("spikelm: error: bad\n")


def test_failed_run_is_one_line_and_exits_1(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(OSError(28, "No space left on device")))
    assert cli.main(["try"]) == 1
    assert capsys.readouterr().err == "spikelm: error: [Errno 28] No space left on device\n"


def test_our_own_bugs_are_not_swallowed(command: Callable[..., None]) -> None:
    command(raising(AssertionError("bug")))
    with pytest.raises(AssertionError, match="bug"):
        cli.main(["try"])


def test_missing_extra_says_what_to_install(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn.config")))
    assert cli.main(["try"]) == 2
    error = capsys.readouterr().err
    assert "'uvicorn'" in error
    assert 'pip install "spikelm[serve]"' in error


def test_missing_module_of_our_own_is_a_bug(command: Callable[..., None]) -> None:
    command(raising(ModuleNotFoundError("No module named 'spikelm.x'", name="spikelm.x")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["try"])


def test_interrupt_exits_130_without_traceback(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "spikelm: interrupted\n"


def test_a_reader_that_goes_away_is_quiet() -> None:
    writer = (
        "import sys, types; from spikelm import cli\n"
        "module = types.ModuleType('spikelm_try')\n"
        "module.main = lambda argv: [print('x' * 100) for _ in range(10000)] and 0\n"
        "sys.modules['spikelm_try'] = module\n"
        "cli.COMMANDS['try'] = ('spikelm_try:main', 'for tests')\n"
        "sys.exit(cli.main(['try']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writer], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_logging_shows_our_notes_and_only_warnings_of_others(command: Callable[..., None]) -> None:
    def main(argv: list[str]) -> int:
        assert logging.getLogger("spikelm.kernels").isEnabledFor(logging.INFO)
        assert not logging.getLogger("spikelm.kernels").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
        return 0

    command(main)
    assert cli.main(["try"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"usage: spikelm {name}" in capsys.readouterr().out


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently")
def test_the_documented_command_line_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli.reference(), "run `make docs`"
