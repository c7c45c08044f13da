"""spikelm.eval.load"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikelm.eval import load


def test_processes_end_with_the_block_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt), load.busy(2):  # noqa: PT012 - what happens in between
        assert [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert None not in [process.returncode for process in started]
    with load.busy(0):
        assert len(started) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_one_that_is_killed() -> None:
    code = (
        "import os, signal, subprocess, time\n"
        "from spikelm.eval import load\n"
        "start = subprocess.Popen\n"
        "def shown(*a, **k):\n"
        "    process = start(*a, **k)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "subprocess.Popen = shown\n"
        "with load.busy(1): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    process = Path("/proc") / done.stdout.strip()
    for _ in range(100):
        if not process.exists() or ") Z " in (process / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("it goes on")
