"""What a result must say about where it came from: code, versions, machine."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

from spikelm import __version__
from spikelm.doctor import BASE, EXTRAS, cpu_flags, package_version, usable_cores


def provenance() -> dict[str, Any]:
    """Time, commit, versions and processor, as JSON types."""
    packages = {name: package_version(name) for name in (*BASE, *EXTRAS)}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit(),
        "spikelm": __version__,
        "python": platform.python_version(),
        "packages": {name: version for name, version in packages.items() if version},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_flags": [name for name, present in cpu_flags().items() if present],
        "cores": usable_cores(),
    }


def commit(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """The git commit of the code that runs, and whether the tree differs from it; null outside a
    checkout.
    """
    head = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    return {"commit": head, "dirty": None if head is None else bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name, or what the platform calls it."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
