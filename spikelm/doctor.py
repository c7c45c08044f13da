"""`spikelm doctor`: what this machine and this installation can do."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from spikelm import __version__
from spikelm.errors import BackendError

BASE = ("torch", "numpy", "pyyaml", "safetensors", "tokenizers")

EXTRAS = {
    "accelerate": "train",
    "tensorboard": "train",
    "tqdm": "train",
    "wandb": "wandb",
    "trackio": "trackio",
    "transformers": "hf",
    "datasets": "data",
    "pyarrow": "data",
    "starlette": "serve",
    "uvicorn": "serve",
    "jinja2": "serve",
    "llguidance": "serve",
    "prometheus_client": "serve",
    "matplotlib": "eval",
}
"""Optional package -> the extra that brings it."""

_CPU_FLAGS = {
    "avx2": {"avx2"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile"},
    "neon": {"neon", "asimd"},
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm doctor",
        description="Versions, processor, memory, accelerators, and what spikelm makes of them. "
        "Exits with 1 if the installation cannot work.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything `doctor` prints, as JSON types; sizes in bytes."""
    packages = {name: package_version(name) for name in (*BASE, *EXTRAS)}
    problems = [f"{name} is not installed" for name in BASE if packages[name] is None]
    flags = cpu_flags()
    found: dict[str, Any] = {
        "spikelm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "cpu_flags": flags,
        "cuda_devices": [],
        "bf16_training_pays": flags["avx512_bf16"] or flags["amx"],
        "native": None,
        "native_isa": None,
        "event_backends": [],
        "event_backend": None,
        "problems": problems,
    }
    try:
        found.update(_examine_torch(found["bf16_training_pays"]))
    except BackendError as error:
        problems.append(str(error))
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(f"torch does not work: {error}")
    return found


def _examine_torch(bf16_on_cpu: bool) -> dict[str, Any]:
    import torch

    from spikelm.kernels import event, native, rows

    backends = event.available()
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": [{"name": d.name, "memory_bytes": d.total_memory} for d in devices],
        "bf16_training_pays": torch.cuda.is_bf16_supported() if cuda else bf16_on_cpu,
        "native": {"unavailable": native.unavailable()},
        "native_isa": rows.isa() if native.unavailable() is None else None,
        "event_backends": [{"name": name, "unavailable": reason} for name, reason in backends],
        "event_backend": next((name for name, reason in backends if reason is None), None),
    }


def package_version(name: str) -> str | None:
    """The installed version, without importing the package; None if there is none."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Which instruction sets that matter here the processor has (Linux; elsewhere only NEON)."""
    present = {"neon"} if platform.machine() in ("arm64", "aarch64") else set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                present.update(value.split())
    return {name: bool(aliases & present) for name, aliases in _CPU_FLAGS.items()}


def usable_cores() -> int:
    """Cores this process may run on, which a container makes fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def render(found: dict[str, Any]) -> str:
    """The report of `examine` for people, one fact a line."""
    memory = found["memory_bytes"]
    flags = [name for name, present in found["cpu_flags"].items() if present]
    rows = [
        ("spikelm", found["spikelm"]),
        ("python", f"{found['python']}  {found['platform']}"),
        *((name, version or _how_to_install(name)) for name, version in found["packages"].items()),
        ("cores", f"{found['cores']}"),
        ("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
        ("cpu flags", " ".join(flags) or "none of " + ", ".join(found["cpu_flags"])),
        ("cuda", ", ".join(d["name"] for d in found["cuda_devices"]) or "no device"),
        ("bf16", "training pays" if found["bf16_training_pays"] else "training does not pay"),
        ("native", _native(found["native"])),
        ("native uses", found["native_isa"] or "nothing"),
        *(
            ("event", f"{b['name']}: {b['unavailable'] or 'available'}")
            for b in found["event_backends"]
        ),
        ("event used", found["event_backend"] or "none"),
        *(("PROBLEM", problem) for problem in found["problems"]),
    ]
    return "\n".join(f"{name:14}{value}" for name, value in rows)


def _native(found: dict[str, Any] | None) -> str:
    if found is None:
        return "unknown, as torch does not work"
    reason = found["unavailable"]
    return "kernels available" if reason is None else f"{reason}; torch forms run instead, slower"


def _how_to_install(name: str) -> str:
    extra = EXTRAS.get(name)
    return f'not installed; pip install "spikelm[{extra}]"' if extra else "not installed"
