"""spikelm.folders"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from spikelm import checkpoint
from spikelm.errors import CheckpointError, ConfigError
from spikelm.folders import STAGING, check_out, staged


def test_files_appear_together(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out) as folder:
        (folder / "x").write_text("1")
        (folder / "y").write_text("2")
        assert [p.name for p in out.iterdir()] == [STAGING]
    assert sorted(p.name for p in out.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(out: Path) -> None:
        with staged(out) as folder:
            (folder / "x").write_text("new")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "x").write_text("old")
    with pytest.raises(error):
        fail(kept)
    assert [(p.name, p.read_text()) for p in kept.iterdir()] == [("x", "old")]


def test_what_can_be_written(tmp_path: Path) -> None:
    for name in ("new", "new/deep"):
        check_out(tmp_path / name)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    (tmp_path / "broken" / STAGING).mkdir(parents=True)
    check_out(tmp_path / "broken")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for out, message in (
        (tmp_path / "model", "exists and is not empty"),
        (tmp_path / "model" / "config.json", "config.json is no folder"),
        (tmp_path / "model" / "config.json" / "x", "config.json is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_out(out)
    with pytest.raises(ConfigError, match=r"has no spikes.json to replace"):
        check_out(tmp_path / "model", replace="spikes.json")
    check_out(tmp_path / "model", replace="config.json")


def test_a_full_disk_is_an_error_and_the_retry_works(
    float_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("no space left on device")

    loaded, out = checkpoint.load(float_folder), tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="cannot write the model to .*: no space left"):
            checkpoint.save(out, loaded.model, loaded.tokenizer)
    assert not out.exists()
    checkpoint.save(out, loaded.model, loaded.tokenizer)
    assert checkpoint.load(out).fingerprint == loaded.fingerprint
