"""spikelm_train.texts.enwik8 and `spikelm data`"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from spikelm.errors import ConfigError, DataError
from spikelm_train.texts import enwik8
from spikelm_train.texts.cli import main

# Borders at 10 and 14 fall on a character's first byte and on its third.
TEXT = "0123456789ab€defgh".encode()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short file in place of the long one."""
    monkeypatch.setattr(enwik8, "NUM_BYTES", len(TEXT))
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(enwik8, "STARTS", (0, 10, 14))
    (tmp_path / "enwik8").write_bytes(TEXT)
    return tmp_path / "enwik8"


@pytest.mark.parametrize("packed", [False, True])
def test_splits_end_with_characters(
    source: Path, packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if packed:
        with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
            archive.write(source, "enwik8")
        source = tmp_path / "enwik8.zip"
    out = tmp_path / "out"
    assert main(["enwik8", str(source), str(out)]) == 0
    parts = [(out / f"{split}.txt").read_text("utf-8") for split in enwik8.SPLITS]
    assert parts == ["0123456789", "ab€", "defgh"]
    assert "train.txt: 10 bytes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not empty"):
        main(["enwik8", str(source), str(out)])


def test_other_files_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tmp_path / "other"
    for data, message in (
        (TEXT[1:], "other has 19 bytes, enwik8 has 20; take the file of"),
        (b"X" + TEXT[1:], "is not enwik8: its sha256 is"),
    ):
        other.write_bytes(data)
        with pytest.raises(DataError, match=message):
            main(["enwik8", str(other), str(out)])
    with pytest.raises(DataError, match="cannot read"):
        main(["enwik8", str(tmp_path / "none"), str(out)])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("enwik9", TEXT)
    with pytest.raises(DataError, match="cannot read .*enwik8"):
        main(["enwik8", str(tmp_path / "other.zip"), str(out)])
    assert not out.exists()


def test_the_published_numbers() -> None:
    assert (enwik8.NUM_BYTES, enwik8.STARTS) == (10**8, (0, 9 * 10**7, 95 * 10**6))
    assert len(enwik8.SHA256) == 64
