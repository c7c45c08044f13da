"""enwik8: the first 10^8 bytes of a dump of the English Wikipedia of 2006 (Mahoney), in the split
that character-level results are published on: 90, 5 and 5 million bytes in the order of the file.
"""

from __future__ import annotations

import hashlib
import zipfile
from itertools import pairwise
from pathlib import Path

from spikelm.corpus import SPLITS
from spikelm.errors import DataError
from spikelm.folders import check_out, staged

NUM_BYTES = 100_000_000
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
STARTS = (0, 90_000_000, 95_000_000)
# In UTF-8 every byte of a character but its first one begins with these bits.
CONTINUATION, MASK = 0b1000_0000, 0b1100_0000


def split_enwik8(source: Path, out: Path) -> dict[str, int]:
    """Writes train.txt, validation.txt and test.txt into `out`; their bytes, by split.

    `source` is enwik8, or the enwik8.zip it is distributed in. A split that would begin within a
    character begins after it, one to three bytes later than published.

    Raises: DataError for any other file; ConfigError if `out` cannot be written.
    """
    check_out(out)
    data = _read(source)
    if len(data) != NUM_BYTES:
        raise DataError(
            f"{source} has {len(data):,} bytes, enwik8 has {NUM_BYTES:,}; take the file of "
            "https://mattmahoney.net/dc/enwik8.zip"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"{source} is not enwik8: its sha256 is {digest}, not {SHA256}; take the file of "
            "https://mattmahoney.net/dc/enwik8.zip"
        )
    borders = [*(_first_byte(data, start) for start in STARTS), NUM_BYTES]
    parts = {split: data[slice(*at)] for split, at in zip(SPLITS, pairwise(borders), strict=True)}
    with staged(out) as folder:
        for split, part in parts.items():
            (folder / f"{split}.txt").write_bytes(part)
    return {split: len(part) for split, part in parts.items()}


def _read(source: Path) -> bytes:
    try:
        if not zipfile.is_zipfile(source):
            return source.read_bytes()
        with zipfile.ZipFile(source) as archive:
            return archive.read("enwik8")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {source}: {error}") from None


def _first_byte(data: bytes, start: int) -> int:
    while data[start] & MASK == CONTINUATION:
        start += 1
    return start
