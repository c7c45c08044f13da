"""The wheel: what is in it, and that it works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import spikelm

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "spikelm": ROOT / "spikelm",
    "spikelm_train": ROOT / "train" / "spikelm_train",
    "spikelm_serve": ROOT / "serve" / "spikelm_serve",
    "spikelm/configs": ROOT / "configs",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from scikit_build_core.build import build_wheel; build_wheel({str(folder)!r})"
    # No compiler and no CMake: they are not on this PATH. pip would fetch CMake and then find no
    # compiler, which is another way to the same wheel.
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": str(folder), "SPIKELM_NATIVE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_name_says_any_platform_and_the_version(wheel: Path) -> None:
    assert wheel.name == f"spikelm-{spikelm.__version__}-py3-none-any.whl"


def test_wheel_holds_every_file_of_the_packages(unpacked: Path) -> None:
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert expected == {name for name in found if ".dist-info/" not in name}
    assert {f"{name}/py.typed" for name in PACKAGES if "/" not in name} <= found


def test_wheel_takes_no_generic_name(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"spikelm", "spikelm_train", "spikelm_serve"}


def test_licence_comes_along(unpacked: Path) -> None:
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in next(unpacked.glob("*/METADATA")).read_text("utf-8")


def test_command_and_presets_work_from_the_wheel_alone(unpacked: Path, tmp_path: Path) -> None:
    # -S leaves out the .pth files, through which an editable install would show the checkout.
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(unpacked)!r}, {sysconfig.get_paths()['purelib']!r}]\n"
        "import spikelm, spikelm.cli, spikelm.config\n"
        f"assert spikelm.__file__.startswith({str(unpacked)!r}), spikelm.__file__\n"
        "folder = spikelm.config.Path(spikelm.__file__).parent / 'configs' / 'models'\n"
        "for preset in folder.glob('*.yaml'):\n"
        "    assert spikelm.config.find_config('models', preset.stem) == preset\n"
        "    spikelm.config.load_model_config(preset.stem)\n"
        "sys.exit(spikelm.cli.main(['--version']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"spikelm {spikelm.__version__}\n"


def test_public_names_are_sorted_and_exist() -> None:
    assert spikelm.__all__ == sorted(spikelm.__all__)
    for name in spikelm.__all__:
        assert getattr(spikelm, name).__module__.startswith("spikelm.")
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        _ = spikelm.Manager  # type: ignore[attr-defined]


def test_nothing_but_the_package_and_a_page_lies_beside_it() -> None:
    for folder, package in (("train", "spikelm_train"), ("serve", "spikelm_serve")):
        names = {path.name for path in (ROOT / folder).iterdir() if path.name != "__pycache__"}
        assert names == {"README.md", package}
