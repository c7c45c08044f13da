"""Tokenised text on disk: shards of ids, one behind the other, and where documents start.

meta.json                             written last: the rest is complete
tokenizer/
train-00000.bin ...  train.starts     ids; int64 index of every document's first id
validation-00000.bin ...  validation.starts

Of conversations the answers alone are learned: a token that is read but not predicted is stored as
its complement ~id, a negative number.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from spikelm.errors import CheckpointError, DataError
from spikelm.tokenizer import Tokenizer

META, TOKENIZER = "meta.json", "tokenizer"
FORMAT = "spikelm-tokens-1"
Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")
SHARD_TOKENS = 1 << 28
STARTS_DTYPE = np.dtype("<i8")

Ids = npt.NDArray[np.integer[Any]]


class Tokens(Protocol):
    """A sequence of ids that may be larger than memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> Ids: ...


class Joined:
    """Arrays of ids one behind the other as one sequence; what is cut out of it is in memory."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: slice, /) -> Ids:
        start, stop, _ = at.indices(len(self))
        if start >= stop:
            return self.parts[0][:0]
        found = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while True:
            part = self.parts[index]
            before = int(self._ends[index]) - len(part)
            found.append(part[start - before : stop - before])
            start = int(self._ends[index])
            if start >= stop:
                return np.concatenate(found)
            index += 1


@dataclass(frozen=True, slots=True)
class Split:
    """One side of a text as memory-mapped files."""

    tokens: Tokens
    """All documents back to back, each begun by the separator."""
    starts: npt.NDArray[np.int64]
    """Where in `tokens` documents start, in rising order."""
    num_bytes: int
    """Bytes of the text."""
    num_learned: int
    """Tokens that are learned: all but those that are not answers in conversations."""

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    @staticmethod
    def join(splits: Sequence[Split]) -> Split:
        """All of them, one behind the other."""
        if len(splits) == 1:
            return splits[0]
        tokens = Joined([split.tokens for split in splits])
        offsets = np.cumsum([0, *(len(split.tokens) for split in splits)])
        starts = [s.starts + offset for s, offset in zip(splits, offsets[:-1], strict=True)]
        sizes = (sum(s.num_bytes for s in splits), sum(s.num_learned for s in splits))
        return Split(tokens, np.concatenate(starts), *sizes)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A folder of tokenised text."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    meta: dict[str, Any]
    """What meta.json says: per side its tokens, bytes, documents and files; tokenizer, sources."""


class Writer:
    """Writes one side of a text into `folder`."""

    def __init__(
        self, folder: Path, side: str, vocab_size: int, shard_tokens: int, *, signed: bool = False
    ) -> None:
        self.folder, self.side, self.shard_tokens = folder, side, shard_tokens
        kinds = ("<i2", "<i4") if signed else ("<u2", "<u4")
        self.dtype = np.dtype(kinds[vocab_size > np.iinfo(kinds[0]).max + 1])
        self.num_tokens = self.num_learned = self.num_documents = 0
        self._shards: list[_File] = []
        self._starts = _File(folder / f"{side}.starts")

    def add(self, ids: Ids, starts: npt.NDArray[np.int64]) -> None:
        """Appends ids; documents start at the indices `starts` of them."""
        self._starts.write((starts + self.num_tokens).astype(STARTS_DTYPE))
        self.num_documents += len(starts)
        self.num_learned += int(np.count_nonzero(ids >= 0))
        while len(ids):
            room = -self.num_tokens % self.shard_tokens
            if room == 0:
                room = self.shard_tokens
                name = f"{self.side}-{len(self._shards):05}.bin"
                self._close_shard()
                self._shards.append(_File(self.folder / name))
            self._shards[-1].write(ids[:room].astype(self.dtype, copy=False))
            self.num_tokens += len(ids[:room])
            ids = ids[room:]

    def close(self) -> None:
        try:
            self._close_shard()
        finally:
            self._starts.close()

    def _close_shard(self) -> None:
        for shard in self._shards[-1:]:
            shard.close()

    def finish(self) -> dict[str, Any]:
        """What meta.json says of the files."""
        self.close()
        return {
            "dtype": self.dtype.str,
            "tokens": self.num_tokens,
            "learned": self.num_learned,
            "documents": self.num_documents,
            "shards": [shard.about for shard in self._shards],
            "starts": self._starts.about,
        }


class _File:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._digest = path, path.open("wb"), hashlib.sha256()

    def write(self, values: npt.NDArray[Any]) -> None:
        data = values.tobytes()
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> None:
        self._file.close()

    @property
    def about(self) -> dict[str, Any]:
        size = self._path.stat().st_size
        return {"file": self._path.name, "bytes": size, "sha256": self._digest.hexdigest()}


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, which `finish` puts in its place."""
    text = json.dumps({"format": FORMAT, **meta}, indent=2) + "\n"
    (folder / f"{META}.tmp").write_text(text, encoding="utf-8")


def finish(folder: Path) -> None:
    """Says that `folder` is complete."""
    (folder / f"{META}.tmp").replace(folder / META)


def remove(folder: Path) -> None:
    """Takes away what an earlier preparation left in `folder`."""
    (folder / META).unlink(missing_ok=True)
    for side in SIDES:
        for path in [*folder.glob(f"{side}-*.bin"), folder / f"{side}.starts"]:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json. Raises: DataError if `folder` holds no complete tokenised text."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r}, not {FORMAT!r}")
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no tokenised text ({META} is missing); write it with: "
            f"spikelm data prepare SOURCES --out {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / META} is damaged ({error}); prepare the text again") from None
    return meta


def open_prepared(folder: Path) -> Prepared:
    """The text in `folder`; the sizes of its files are checked, their hashes by `verify`.

    Raises: DataError naming the file that is missing or has another size.
    """
    meta = read_meta(folder)
    try:
        train, validation = (_open(folder, meta[side]) for side in SIDES)
        fingerprint = meta["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / META} is damaged ({error!r}); prepare the text again") from None
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
    except CheckpointError as error:
        raise DataError(f"{error}; prepare the text again") from None
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{folder / TOKENIZER} is not the text's; prepare the text again")
    return Prepared(tokenizer, train, validation, meta)


def _open(folder: Path, about: dict[str, Any]) -> Split:
    dtype = np.dtype(about["dtype"])
    shards = [_mapped(folder, shard, dtype) for shard in about["shards"]]
    tokens: Tokens = shards[0] if len(shards) == 1 else Joined(shards)
    starts = _mapped(folder, about["starts"], STARTS_DTYPE)
    if (len(tokens), len(starts)) != (about["tokens"], about["documents"]):
        raise ValueError("the sizes of its files and its counts differ")
    learned = about["learned"] if dtype.kind == "i" else len(tokens)
    return Split(tokens, starts, about["bytes"], learned)


def _mapped(folder: Path, about: dict[str, Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    path = folder / about["file"]
    try:
        size = path.stat().st_size
        if size != about["bytes"]:
            raise DataError(
                f"{path} has {size} bytes, {META} says {about['bytes']}; copy it again, or prepare "
                "the text again"
            )
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; copy it again, or prepare the text again"
        ) from None


def verify(folder: Path) -> Iterator[tuple[str, int]]:
    """Reads every file of a prepared folder: its name and bytes, once its hash has been compared.

    Raises: DataError naming the first file that is missing, unreadable or changed.
    """
    prepared = open_prepared(folder)
    for side in SIDES:
        for about in [*prepared.meta[side]["shards"], prepared.meta[side]["starts"]]:
            path = folder / about["file"]
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from None
            if found != about["sha256"]:
                raise DataError(
                    f"{path} was changed: its sha256 is {found[:12]}, {META} says "
                    f"{about['sha256'][:12]}; copy it again, or prepare the text again"
                )
            yield about["file"], about["bytes"]
