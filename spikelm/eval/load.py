"""A busy machine, for benchmarks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Ends with the process that started it, however that ends.
_BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6): pass
"""


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """While the block runs, so many processes compute without a pause, each on one core."""
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(processes):
            command = [sys.executable, "-I", "-S", "-c", _BUSY, str(os.getpid())]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
