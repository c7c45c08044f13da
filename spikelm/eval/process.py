"""The memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path


def memory_bytes(field: str, process: int | None = None) -> int:
    """The resident memory (VmRSS) of this or, on Linux, another process, or its peak (VmHWM)."""
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text()
    except OSError:
        status = ""
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is not None:
        return 1024 * int(found[1])
    # Second choice, as on Linux it starts from the peak of the process that spawned this one.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak() -> None:
    """Makes the peak so far, loading's for example, not count from here on (Linux)."""
    if sys.platform != "linux":
        return
    # What loading freed but the allocator kept would hide as much of the run's own memory.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
