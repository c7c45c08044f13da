"""spikelm.doctor"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from spikelm import doctor
from spikelm.kernels import event, native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What `spikelm.kernels.event.available()` answers."""
    answer: list[tuple[str, str | None]] = [("native", "no compiler"), ("torch", None)]
    monkeypatch.setattr(event, "available", lambda: answer)
    return answer


def test_json_is_one_object(
    backends: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**20
    assert set(found["cpu_flags"]) == {"avx2", "avx512_vnni", "avx512_bf16", "amx", "neon"}
    assert found["problems"] == []
    assert found["event_backend"] == "torch"
    assert found["event_backends"][0] == {"name": "native", "unavailable": "no compiler"}


def test_no_usable_backend(backends: list[tuple[str, str | None]]) -> None:
    backends[:] = [("native", "no compiler")]
    found = doctor.examine()
    assert found["event_backend"] is None
    assert re.search(r"^event used +none$", doctor.render(found), re.MULTILINE)


def test_native_code_or_what_runs_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: None)
    assert re.search(r"^native +kernels available$", doctor.render(doctor.examine()), re.M)
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    found = doctor.examine()
    assert found["native"] == {"unavailable": "no compiler"}
    assert re.search(r"^native +no compiler; torch forms run instead", doctor.render(found), re.M)


def test_missing_packages(
    backends: list[tuple[str, str | None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    present = doctor.package_version
    monkeypatch.setattr(
        doctor,
        "package_version",
        lambda name: None if name in ("uvicorn", "pyyaml") else present(name),
    )
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert re.search(r'^uvicorn +not installed; pip install "spikelm\[serve\]"$', text, re.M)
    assert re.search(r"^PROBLEM +pyyaml is not installed$", text, re.M)


def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.examine()
    assert found["event_backend"] is None
    assert found["problems"][0].startswith("torch does not work:")
    assert re.search(r"^native +unknown", doctor.render(found), re.M)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni avx512_bf16", {"avx2", "avx512_vnni", "avx512_bf16"}),
        ("flags\t\t: fpu avx2 amx_tile amx_int8", {"avx2", "amx"}),
        ("Features\t: fp asimd bf16", {"neon"}),
        ("model name\t: avx2", set()),
    ],
)
def test_cpu_flags(
    line: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    flags = doctor.cpu_flags(cpuinfo)
    assert {name for name, present in flags.items() if present} == expected


def test_cpu_flags_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "arm64")
    assert doctor.cpu_flags(tmp_path / "absent")["neon"]


def test_package_version_of_nothing() -> None:
    assert doctor.package_version("spikelm-no-such-package") is None


def test_the_extras_named_bring_their_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {
        extra: {re.split(r"[\[<>=~]", item)[0].replace("-", "_") for item in items}
        for extra, items in {
            **project["optional-dependencies"],
            "": project["dependencies"],
        }.items()
    }
    assert set(doctor.BASE) == names[""]
    for package, extra in doctor.EXTRAS.items():
        assert package in names[extra], (package, extra)
