"""Which part of a text is held out, decided without holding the text.

The hash of a block of text, white space aside, says on which side it is, so copies of a held-out
block are never trained on. The order of the documents does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from spikelm.corpus import BLOCK_CHARACTERS, Piece
from spikelm.errors import DataError
from spikelm_train.texts.shards import Side

BUCKETS = 1 << 20
"""Parts of the range of hashes; their sizes, 8 MiB, are all that is kept of a text."""
# What a short text holds out is cut into so many blocks.
_SMALL_PARTS, _SMALL_CHARACTERS = 4, 256


def digest(text: str) -> bytes:
    """SHA-256 of the text, white space aside."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def utf8_size(text: str) -> int:
    """Bytes of the text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def check_disjoint(train: Iterable[str], held_out: Iterable[str], name: str) -> None:
    """Raises: DataError if a held-out document is a training document, white space aside."""
    seen = {digest(text) for text in train}
    leaked = [text for text in held_out if digest(text) in seen]
    if leaked:
        raise DataError(
            f"{len(leaked)} {name} document(s) are training documents too, the first one "
            f"{shown(leaked[0])}; take them out of one of the two"
        )


def shown(text: str) -> str:
    """How a text begins, on one line."""
    return repr(" ".join(text[:200].split())[:60])


def _bucket(text: str) -> int:
    return int.from_bytes(digest(text)[:4], "big") // (2**32 // BUCKETS)


@dataclass
class Held:
    """The held-out blocks seen so far, some 100 bytes of memory for each."""

    duplicates: int = 0
    """Copies that were left out."""
    _digests: set[bytes] = field(default_factory=set)

    def add(self, text: str) -> bool:
        """Whether `text` is there for the first time, white space aside."""
        before = len(self._digests)
        self._digests.add(digest(text))
        return len(self._digests) > before

    def __contains__(self, text: str) -> bool:
        return digest(text) in self._digests


@dataclass(frozen=True, slots=True)
class Division:
    """The result of reading a text once (`divide`)."""

    limit: int
    """Characters of a block at most."""
    last: int
    """The last held-out bucket."""
    num_bytes: int
    """Bytes of the whole text."""

    def split(self, pieces: Iterable[Piece], held: Held) -> Iterator[tuple[Side, Piece]]:
        """Each piece with its side; neighbours on one side stay one document."""
        before: Side | None = None
        for piece in pieces:
            side: Side = "validation" if _bucket(piece.text) <= self.last else "train"
            if side == "validation" and not held.add(piece.text):
                held.duplicates += 1
                before = None
                continue
            yield side, piece._replace(begins=piece.begins or side != before)
            before = side


def divide(read: Callable[[int], Iterable[Piece]], fraction: float) -> Division:
    """Holds out at least `fraction` of the characters, copies of held-out blocks included.

    `read(limit)` gives the text in blocks of at most `limit` characters: 64 Ki, so that a single
    book has a held-out part, or fewer where that would be twice as much of a short text, or all.

    Raises: DataError if either side would be empty.
    """
    whole, total = _divide(read, BLOCK_CHARACTERS, fraction)
    if whole is not None and whole.held_out <= 2 * fraction * total:
        return whole.division
    limit = max(_SMALL_CHARACTERS, int(min(fraction, 1 - fraction) * total / _SMALL_PARTS))
    finer, _ = _divide(read, limit, fraction)
    found = finer or whole
    if found is None:
        raise DataError(
            f"{total} characters cannot be split into training and validation text; give more, or "
            "held-out text of its own (validation_sources)"
        )
    return found.division


class _Found(NamedTuple):
    division: Division
    held_out: int
    """Characters."""


def _divide(
    read: Callable[[int], Iterable[Piece]], limit: int, fraction: float
) -> tuple[_Found | None, int]:
    """The division into blocks of `limit` characters, None if a side is empty; all characters."""
    sizes, num_bytes = np.zeros(BUCKETS, np.int64), 0
    for piece in read(limit):
        sizes[_bucket(piece.text)] += len(piece.text)
        num_bytes += utf8_size(piece.text)
    held = np.cumsum(sizes)
    total = int(held[-1])
    last = int(np.searchsorted(held, fraction * total))
    if 0 < held[last] < total:
        return _Found(Division(limit, last, num_bytes), int(held[last])), total
    return None, total
