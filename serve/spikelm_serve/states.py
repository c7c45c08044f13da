"""Conversation states, kept by name: prefix cache, fork tree and saved sessions are one structure.

The id of a state is the hash of the id before it and of the next token, from a root that belongs to
one model and one owner: equal beginnings have equal ids, and nobody can name another's. A state is
never changed once it is kept. Memory and shelf have budgets; what was used longest ago goes first,
saved states stay.

A state of n tokens costs as much as one of any other length; hashing costs a microsecond per token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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

from spikelm.errors import CheckpointError, RequestError
from spikelm.state import State, opened
from spikelm_serve.shelf import STATE_ID, Shelf, as_file, no_room

Reason = Literal["no_prefix", "evicted", "disabled"]
"""Why nothing of a prompt was found."""

MEMORY_BYTES = 1 << 30
REMEMBERED = 20_000
"""Ids of evicted states that are remembered as such."""
MAX_WRITING = 64
"""States that wait to be written, at most: a cache may do without one."""


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
            about = _about(file.metadata() or {}, where)
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


def _about(metadata: dict[str, str], where: str) -> dict[str, Any]:
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
        about = json.loads(metadata["conversation"])
        fits = about.keys() == kinds.keys() and all(
            isinstance(about[name], kind) for name, kind in kinds.items()
        )
    except (KeyError, ValueError, AttributeError, RecursionError):
        fits = False
    if not fits or not STATE_ID.fullmatch(about["id"]) or about["tokens"] < 0:
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
    """States in memory, and on a shelf that several servers of the model may share.

    `like` is a state of the model and `vocab_size` its tokens, with which files are compared.
    """

    def __init__(
        self,
        fingerprint: str,
        like: State | None = None,
        vocab_size: int | None = None,
        *,
        memory_bytes: int = MEMORY_BYTES,
        shelf: Shelf | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.memory_bytes = memory_bytes
        self.shelf = shelf
        self.used = 0
        """Bytes in memory."""
        self.restored = 0
        """States read from the shelf so far."""
        self.evictions = 0
        self._expected = (fingerprint, like, vocab_size)
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._evicted: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.RLock()
        self._writer = ThreadPoolExecutor(1, "spikelm-states")
        self._writing: set[Future[None]] = set()

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

    def find(self, chain: Sequence[str], owner: str, *, wait: bool = False) -> Found:
        """The longest beginning of `chain` of which a state is kept; with `wait`, also by another
        server a moment ago.
        """
        if self.shelf is not None:
            self.shelf.look(wait=wait)
        for at in range(len(chain), 0, -1):
            key = chain[at - 1]
            if key in self._kept or self._on_shelf(key):
                kept = self._get(key)
                if kept is not None and kept.owner == owner:
                    return Found(at, kept, None)
        with self._lock:
            evicted = any(key in self._evicted for key in chain)
        return Found(0, None, "evicted" if evicted else "no_prefix")

    def keep(self, kept: Kept) -> Kept:
        """Keeps it in memory, and begins to write it to the shelf, unless the same state is there
        already. Returns the one that is there.
        """
        known = self._get(kept.id) if kept.id in self._kept or self._on_shelf(kept.id) else None
        if known is not None and (known.saved or not kept.saved):
            return known
        with self._lock:
            self._put(kept)
            # As many wait only if the shelf is slower than the model.
            late = len(self._writing) >= MAX_WRITING
            if self.shelf is not None and kept.id not in self.shelf and not late:
                self._later(lambda: self._write(kept))
        return kept

    def save(self, state_id: str, owner: str, name: str | None = None) -> Kept:
        """Keeps a state until it is deleted; when this returns it is on the shelf, if there is one.

        Raises: RequestError without such a state, or where no room is left.
        """
        kept = replace(self.get(state_id, owner), saved=True)
        kept = kept if name is None else replace(kept, name=name)
        if self.shelf is None:
            with self._lock:
                saved = sum(other.nbytes for other in self._kept.values() if other.saved)
                if saved + kept.nbytes > self.memory_bytes:
                    raise no_room("memory")
                self._put(kept)
            return kept
        self._write(kept)
        with self._lock:
            self._put(kept)
        return kept

    def get(self, state_id: str, owner: str) -> Kept:
        """Raises: RequestError (404) if `owner` has no such state, (400) for a damaged file."""
        if not STATE_ID.fullmatch(state_id):
            raise _unknown(state_id)
        kept = self._get(state_id, strict=True)
        if kept is None or kept.owner != owner:
            raise _unknown(state_id)
        return kept

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """What there is of `owner`'s, the newest first."""
        if self.shelf is not None:
            self.shelf.look()
        with self._lock:
            kept = list(self._kept.values())
        found = {k.id: describe(k, self.fingerprint) for k in kept if k.owner == owner}
        if self.shelf is not None:
            ours = {k.id for k in kept}
            for head, size in self.shelf.heads(key for key in self.shelf if key not in ours):
                with contextlib.suppress(CheckpointError):
                    about = _about(_metadata(head, self.fingerprint), "it")
                    if about["owner"] == owner:
                        found[about["id"]] = _described(about, size, self.fingerprint)
        return sorted(found.values(), key=lambda entry: (-entry["created"], -entry["tokens"]))

    def delete(self, state_id: str, owner: str) -> None:
        """Raises: RequestError without such a state."""
        self.get(state_id, owner)
        self.flush()
        with self._lock:
            self._drop(state_id)
        if self.shelf is not None:
            try:
                self.shelf.remove(state_id)
            except OSError as error:
                raise RequestError(
                    f"the state could not be deleted: {error}", status=503, code="storage_error"
                ) from None

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
            found = self._get(kept.parent)
            if found is None or found.owner != kept.owner:
                return
            kept = found
            yield kept

    def take_in(self, data: bytes, owner: str) -> Kept:
        """A state from a file's content, under an id of its own; it keeps its name.

        Raises: RequestError (400) that says what does not fit.
        """
        try:
            with as_file(data) as path:
                found = Kept.read(path, *self._expected)
        except CheckpointError as error:
            message = str(error).replace(str(path), "the file").replace(path.name, "the file")
            raise RequestError(message, code="state_refused") from None
        own = _name(_digest(f"{owner}\n".encode() + data))
        return self.keep(replace(found, id=own, parent=None, owner=owner, saved=False))

    def flush(self) -> None:
        """Waits until everything that is to be written has been."""
        for future in list(self._writing):
            with contextlib.suppress(Exception):
                future.result()

    def close(self) -> None:
        self.flush()
        self._writer.shutdown()
        if self.shelf is not None:
            self.shelf.close()

    def _get(self, key: str, *, strict: bool = False) -> Kept | None:
        """From memory or shelf; a damaged file is an error if `strict`, else as good as none."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        if self.shelf is None:
            return None
        # Other requests do not wait for the shelf.
        try:
            with self.shelf.fetch(key) as (path, saved):
                found = Kept.read(path, *self._expected)
            if found.id != key:
                raise CheckpointError(f"the file of {key} holds {found.id}")
        except FileNotFoundError:
            return None
        except (CheckpointError, OSError) as error:
            if strict:
                raise RequestError(str(error), code="state_damaged") from None
            return None
        found = replace(found, saved=saved)
        with self._lock:
            self.restored += 1
            self._put(found)
        return found

    def _put(self, kept: Kept) -> None:
        known = self._kept.pop(kept.id, None)
        self.used += kept.nbytes - (known.nbytes if known else 0)
        self._kept[kept.id] = kept
        for key in list(self._kept):
            if self.used <= self.memory_bytes:
                break
            # What is saved can be read again if it is on the shelf.
            if key != kept.id and (not self._kept[key].saved or self._on_shelf(key)):
                self._drop(key)
                self.evictions += 1
                if not self._on_shelf(key):
                    self._evicted[key] = None
                    while len(self._evicted) > REMEMBERED:
                        self._evicted.popitem(last=False)

    def _drop(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        self.used -= kept.nbytes if kept else 0

    def _on_shelf(self, key: str) -> bool:
        return self.shelf is not None and key in self.shelf

    def _later(self, work: Callable[[], None]) -> None:
        def safely() -> None:
            # A cache that cannot be written is a cache that is not there.
            with contextlib.suppress(OSError, RequestError):
                work()

        future = self._writer.submit(safely)
        self._writing.add(future)
        future.add_done_callback(self._writing.discard)

    def _write(self, kept: Kept) -> None:
        """Raises: RequestError (507) without room for it."""
        assert self.shelf is not None
        try:
            self.shelf.write(kept.id, kept.pack(self.fingerprint), saved=kept.saved)
        except OSError as error:
            raise RequestError(
                f"the state could not be saved: {error.strerror or error}",
                status=507,
                code="insufficient_storage",
            ) from None


def _metadata(head: bytes, fingerprint: str) -> dict[str, str]:
    """Of a safetensors file of this model that begins so. Raises: CheckpointError."""
    size = int.from_bytes(head[:8], "little")
    try:
        found: dict[str, str] = json.loads(head[8 : 8 + size])["__metadata__"]
        ours = found["fingerprint"] == fingerprint
    except (KeyError, TypeError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise CheckpointError("it is not a state of this model")
    return found


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
