"""Conversation states, kept by name: prefix cache, fork tree and saved sessions are one structure.

The id of a state is the hash of the id before it and of the next token, from a root that belongs to
one model and one owner: equal beginnings have equal ids, and nobody can name another's. A state is
never changed once it is kept. Memory and disk have budgets; what was used longest ago goes first,
saved states stay.

A state of n tokens costs as much as one of any other length; hashing costs a microsecond per token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor

from spikelm.errors import CheckpointError, ConfigError, RequestError
from spikelm.state import State, opened

Reason = Literal["no_prefix", "evicted", "disabled"]
"""Why nothing of a prompt was found."""

MEMORY_BYTES = 1 << 30
DISK_BYTES = 10 << 30
REMEMBERED = 20_000
"""Ids of evicted states that are remembered as such."""
MAX_WRITING = 64
"""States that wait to be written, at most: a cache may do without one."""
LOOK_SECONDS = 1.0
"""Between looks for what other servers have written."""
MEASURE_SECONDS = 10.0
"""Between measurements of a folder that other servers may write to."""
STALE_SECONDS = 3600
"""Age of a temporary file that nobody is writing any more."""
# What is kept because somebody asked for it, and what may go.
SAVED, CACHE = "saved", "cache"
SUFFIX = ".safetensors"
_ID = re.compile(r"st_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Kept:
    """A state and what is known of it."""

    id: str
    parent: str | None
    """The state it was reached from; None: the beginning."""
    tokens: int
    """Read since the beginning."""
    owner: str
    delta: npt.NDArray[np.int32]
    """Those read since the parent."""
    state: State
    logits: Tensor
    """[N] after the last token."""
    messages: int | None = None
    """Of a conversation, read whole; None within a message, and of plain text."""
    role: str | None = None
    """Whose the last of them is."""
    name: str | None = None
    saved: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.logits.nbytes + self.delta.nbytes

    def pack(self, fingerprint: str) -> bytes:
        """As a file."""
        names = ("id", "parent", "tokens", "owner", "messages", "role", "name", "saved", "created")
        about = {"conversation": json.dumps({name: getattr(self, name) for name in names})}
        more = {"logits": self.logits.contiguous(), "delta": torch.from_numpy(self.delta)}
        return self.state.pack(fingerprint, about, more)

    @staticmethod
    def read(
        path: Path, fingerprint: str, like: State | None, vocab_size: int | None = None
    ) -> Kept:
        """Raises: CheckpointError for a file that is missing, damaged or of another model."""
        where = path.name
        with opened(path) as file:
            state = State.of(file, fingerprint, like, where)
            about = _about(file, where)
            extra = {name for name in file.keys() if not name.startswith("layers.")}  # noqa: SIM118
            try:
                logits, delta = file.get_tensor("logits"), file.get_tensor("delta")
            except SafetensorError as error:
                raise CheckpointError(f"{where} is damaged: {error}") from None
        size = logits.numel() if vocab_size is None else vocab_size
        fits = (
            extra == {"logits", "delta", "position"}
            and logits.dtype == torch.float32
            and logits.shape == (size,)
            and bool(torch.isfinite(logits).all())
            and delta.dtype == torch.int32
            and delta.ndim == 1
            and len(delta) <= about["tokens"]
            and bool(((delta >= 0) & (delta < size)).all())
        )
        if not fits:
            raise CheckpointError(f"{where} is damaged: its tokens or logits are not readable")
        return Kept(delta=delta.numpy(), state=state, logits=logits, **about)


def _about(file: Any, where: str) -> dict[str, Any]:
    """What the header of a file says, checked."""
    kinds: dict[str, tuple[type, ...]] = {
        "id": (str,),
        "parent": (str, type(None)),
        "tokens": (int,),
        "owner": (str,),
        "messages": (int, type(None)),
        "role": (str, type(None)),
        "name": (str, type(None)),
        "saved": (bool,),
        "created": (int,),
    }
    try:
        about = json.loads((file.metadata() or {})["conversation"])
        fits = about.keys() == kinds.keys() and all(
            isinstance(about[name], kind) for name, kind in kinds.items()
        )
    except (KeyError, ValueError, AttributeError, RecursionError):
        fits = False
    if not fits or not _ID.fullmatch(about["id"]) or about["tokens"] < 0:
        raise CheckpointError(f"{where} is damaged: its header is not readable")
    found: dict[str, Any] = about
    return found


@dataclass(frozen=True, slots=True)
class Found:
    """How much of a prompt is already read."""

    tokens: int
    """Of the prompt."""
    kept: Kept | None
    reason: Reason | None
    """Why it is nothing."""


class StateStore:
    """States in memory, and in a folder that several servers of the model may share.

    `like` is a state of the model and `vocab_size` its tokens, with which files are compared.
    """

    def __init__(
        self,
        fingerprint: str,
        like: State | None = None,
        vocab_size: int | None = None,
        *,
        memory_bytes: int = MEMORY_BYTES,
        folder: Path | None = None,
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        self.fingerprint = fingerprint
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self.folder = folder
        self.used = 0
        """Bytes in memory."""
        self.restored = 0
        """States read from disk so far."""
        self.evictions = 0
        self._expected = (fingerprint, like, vocab_size)
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._evicted: OrderedDict[str, None] = OrderedDict()
        self._on_disk: dict[str, Path] = {}
        self._looked = -LOOK_SECONDS
        self._disk_used, self._measured = 0, -MEASURE_SECONDS
        self._lock = threading.RLock()
        self._writer = ThreadPoolExecutor(1, "spikelm-states")
        self._writing: set[Future[None]] = set()
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        try:
            for part in (SAVED, CACHE):
                (folder / part).mkdir(parents=True, exist_ok=True)
                for path in (folder / part).glob("*.tmp"):
                    # Perhaps another server's, which is writing it.
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot keep states in {folder}: {error.strerror}") from None

    @property
    def num_kept(self) -> int:
        """States in memory."""
        return len(self._kept)

    def root(self, owner: str, salt: str = "") -> str:
        """The id before the first token."""
        return _name(_digest(f"{self.fingerprint}\n{owner}\n{salt}".encode()))

    def chain(self, start: str, ids: Sequence[int]) -> list[str]:
        """The id after each token."""
        found, last = [], bytes.fromhex(start.removeprefix("st_"))
        for token in ids:
            last = _digest(last + token.to_bytes(4, "little"))
            found.append(last)
        return [_name(digest) for digest in found]

    def find(self, chain: Sequence[str], owner: str) -> Found:
        """The longest beginning of `chain` of which a state is kept."""
        with self._lock:
            self._look()
            for at in range(len(chain), 0, -1):
                key = chain[at - 1]
                if key in self._kept or key in self._on_disk:
                    kept = self._get(key)
                    if kept is not None and kept.owner == owner:
                        return Found(at, kept, None)
            evicted = any(key in self._evicted for key in chain)
        return Found(0, None, "evicted" if evicted else "no_prefix")

    def keep(self, kept: Kept) -> Kept:
        """Keeps it in memory, and begins to write it to disk, unless the same state is there
        already. Returns the one that is there.
        """
        with self._lock:
            known = self._get(kept.id)
            if known is not None and (known.saved or not kept.saved):
                return known
            self._put(kept)
            # As many wait only if the disk is slower than the model.
            late = len(self._writing) >= MAX_WRITING
            if self.folder is not None and kept.id not in self._on_disk and not late:
                self._later(lambda: self._write(kept))
            return kept

    def save(self, state_id: str, owner: str, name: str | None = None) -> Kept:
        """Keeps a state until it is deleted; when this returns it is on the disk, if there is a
        folder.

        Raises: RequestError without such a state, or where no room is left.
        """
        kept = replace(self.get(state_id, owner), saved=True)
        kept = kept if name is None else replace(kept, name=name)
        if self.folder is None:
            with self._lock:
                saved = sum(other.nbytes for other in self._kept.values() if other.saved)
                if saved + kept.nbytes > self.memory_bytes:
                    raise _no_room("memory")
                self._put(kept)
            return kept
        self._write(kept)
        with self._lock:
            self._put(kept)
        return kept

    def get(self, state_id: str, owner: str) -> Kept:
        """Raises: RequestError (404) if `owner` has no such state, (400) for a damaged file."""
        if not _ID.fullmatch(state_id):
            raise _unknown(state_id)
        with self._lock:
            self._look()
            kept = self._get(state_id, strict=True)
        if kept is None or kept.owner != owner:
            raise _unknown(state_id)
        return kept

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """What there is of `owner`'s, the newest first."""
        with self._lock:
            self._look()
            found = {k.id: describe(k, self.fingerprint) for k in self._kept.values()}
            owners = {k.id: k.owner for k in self._kept.values()}
            paths = [path for key, path in self._on_disk.items() if key not in found]
        for path in paths:
            with contextlib.suppress(CheckpointError), opened(path) as file:
                about = _about(file, path.name)
                owners[about["id"]] = about["owner"]
                size = path.stat().st_size
                found[about["id"]] = _described(about, size, self.fingerprint)
        mine = [entry for key, entry in found.items() if owners[key] == owner]
        return sorted(mine, key=lambda entry: (-entry["created"], -entry["tokens"]))

    def delete(self, state_id: str, owner: str) -> None:
        """Raises: RequestError without such a state."""
        self.get(state_id, owner)
        self.flush()
        with self._lock:
            self._drop(state_id)
            self._on_disk.pop(state_id, None)
            if self.folder is not None:
                for part in (SAVED, CACHE):
                    (self.folder / part / f"{state_id}{SUFFIX}").unlink(missing_ok=True)

    def fork(self, state_id: str, owner: str, name: str | None = None) -> Kept:
        """The same state under an id of its own: deleted, saved and gone on from apart."""
        kept = self.get(state_id, owner)
        own = _name(_digest(f"{kept.id}\n{uuid.uuid4().hex}".encode()))
        fork = replace(
            kept,
            id=own,
            parent=kept.id,
            delta=np.zeros(0, np.int32),
            name=name,
            saved=False,
            created=int(time.time()),
        )
        self.keep(fork)
        return fork

    def ancestors(self, kept: Kept) -> Iterator[Kept]:
        """The states it was reached from, as far as they are still there."""
        while kept.parent is not None:
            with self._lock:
                found = self._get(kept.parent)
            if found is None or found.owner != kept.owner:
                return
            kept = found
            yield kept

    def take_in(self, data: bytes, owner: str, name: str | None = None) -> Kept:
        """A state from a file's content, under an id of its own.

        Raises: RequestError (400) that says what does not fit.
        """
        # The library reads declared sizes from a file, and compares them with its length.
        folder = Path(tempfile.gettempdir()) if self.folder is None else self.folder / CACHE
        temporary = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(data)
            found = Kept.read(temporary, *self._expected)
        except CheckpointError as error:
            message = str(error).replace(str(temporary), "the file")
            message = message.replace(temporary.name, "the file")
            raise RequestError(message, code="state_refused") from None
        finally:
            temporary.unlink(missing_ok=True)
        own = _name(_digest(f"{owner}\n{name or ''}\n".encode() + data))
        return self.keep(replace(found, id=own, parent=None, owner=owner, name=name, saved=False))

    def flush(self) -> None:
        """Waits until everything that is to be written has been."""
        for future in list(self._writing):
            with contextlib.suppress(Exception):
                future.result()

    def close(self) -> None:
        self.flush()
        self._writer.shutdown()

    def _get(self, key: str, *, strict: bool = False) -> Kept | None:
        """From memory or disk; a damaged file is an error if `strict`, else as good as none."""
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        path = self._path(key)
        if path is None:
            return None
        try:
            kept = Kept.read(path, *self._expected)
            if kept.id != key:
                raise CheckpointError(f"{path.name} holds {kept.id}")
            os.utime(path)
        except (CheckpointError, OSError) as error:
            if strict:
                raise RequestError(str(error), code="state_damaged") from None
            return None
        self.restored += 1
        kept = replace(kept, saved=path.parent.name == SAVED)
        self._put(kept)
        return kept

    def _put(self, kept: Kept) -> None:
        known = self._kept.pop(kept.id, None)
        self.used += kept.nbytes - (known.nbytes if known else 0)
        self._kept[kept.id] = kept
        for key in list(self._kept):
            if self.used <= self.memory_bytes:
                break
            # What is saved can be read again if it is on the disk.
            if key != kept.id and (not self._kept[key].saved or key in self._on_disk):
                self._drop(key)
                self.evictions += 1
                if key not in self._on_disk:
                    self._evicted[key] = None
                    while len(self._evicted) > REMEMBERED:
                        self._evicted.popitem(last=False)

    def _drop(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        self.used -= kept.nbytes if kept else 0

    def _look(self) -> None:
        """Learns what is on the disk, also from other servers, from time to time."""
        now = time.monotonic()
        if self.folder is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._on_disk = {
            entry.name.removesuffix(SUFFIX): Path(entry.path)
            for part in (CACHE, SAVED)
            for entry in os.scandir(self.folder / part)
            if _ID.fullmatch(entry.name.removesuffix(SUFFIX)) and entry.name.endswith(SUFFIX)
        }

    def _path(self, key: str) -> Path | None:
        """Its file, if there is one."""
        path = self._on_disk.get(key)
        if path is None and self.folder is not None:
            # Another server's, written since the last look.
            paths = (self.folder / part / f"{key}{SUFFIX}" for part in (SAVED, CACHE))
            path = next((path for path in paths if path.is_file()), None)
        return None if path is None or path.is_symlink() else path

    def _later(self, work: Callable[[], None]) -> None:
        def safely() -> None:
            # A cache that cannot be written is a cache that is not there.
            with contextlib.suppress(OSError, RequestError):
                work()

        future = self._writer.submit(safely)
        self._writing.add(future)
        future.add_done_callback(self._writing.discard)

    def _write(self, kept: Kept) -> None:
        """Puts the file in its place, whole. Raises: RequestError (507) without room for it."""
        assert self.folder is not None
        data = kept.pack(self.fingerprint)
        part = self.folder / (SAVED if kept.saved else CACHE)
        path = part / f"{kept.id}{SUFFIX}"
        self._make_room(len(data), kept.saved)
        temporary = part / f"{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                if kept.saved:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if kept.saved:
                _sync(part)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if kept.saved:
                raise RequestError(
                    f"the state could not be saved: {error.strerror}",
                    status=507,
                    code="insufficient_storage",
                ) from None
            return
        with self._lock:
            self._on_disk[kept.id] = path
            if kept.saved:
                with contextlib.suppress(OSError):
                    (self.folder / CACHE / path.name).unlink(missing_ok=True)

    def _make_room(self, size: int, for_good: bool) -> None:
        assert self.folder is not None
        now = time.monotonic()
        soon = now - self._measured < MEASURE_SECONDS
        if soon and not for_good and self._disk_used + size <= self.disk_bytes:
            self._disk_used += size
            return
        saved = sum(_sizes(self.folder / SAVED).values())
        if for_good and saved + size > self.disk_bytes:
            raise _no_room("disk")
        cached = _sizes(self.folder / CACHE)
        total = saved + sum(cached.values()) + size
        for path in sorted(cached, key=_last_used):
            if total <= self.disk_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            with self._lock:
                self._on_disk.pop(path.name.removesuffix(SUFFIX), None)
            total -= cached[path]
        self._disk_used, self._measured = total, now
        if total > self.disk_bytes:
            raise _no_room("disk")


def describe(kept: Kept, fingerprint: str) -> dict[str, Any]:
    """The `state` object of answers."""
    about = {
        name: getattr(kept, name)
        for name in ("id", "parent", "tokens", "messages", "role", "name", "saved", "created")
    }
    return _described(about, kept.nbytes, fingerprint)


def _described(about: dict[str, Any], nbytes: int, fingerprint: str) -> dict[str, Any]:
    names = ("id", "parent", "tokens", "messages", "role", "name", "saved", "created")
    return {
        "object": "state",
        **{name: about[name] for name in names},
        "bytes": nbytes,
        "fingerprint": fingerprint,
    }


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _name(digest: bytes) -> str:
    return f"st_{digest.hex()}"


def _unknown(state_id: str) -> RequestError:
    return RequestError(
        f"no state {state_id[:40]!r} here; it was deleted, evicted, or is another model's or key's",
        status=404,
        param="state",
        code="state_not_found",
    )


def _no_room(where: str) -> RequestError:
    return RequestError(
        f"no room on the {where} for one more saved state; delete some, or raise the budget",
        status=507,
        code="insufficient_storage",
    )


def _sizes(folder: Path) -> dict[Path, int]:
    found = {}
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            if entry.name.endswith(SUFFIX):
                found[Path(entry.path)] = entry.stat().st_size
    return found


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
