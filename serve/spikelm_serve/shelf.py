"""Where states are kept beyond memory: a folder, or a bucket of an object store.

Several servers of a model may share one. It has two parts: what is saved stays until it is deleted;
what is cached goes, the oldest first, where the budget needs the room.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spikelm.errors import ConfigError, MissingExtraError, RequestError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

DISK_BYTES = 10 << 30
LOOK_SECONDS = 1.0
"""Between looks for what other servers have written."""
MEASURE_SECONDS = 10.0
"""Between measurements of what other servers may write to."""
STALE_SECONDS = 3600
"""Age of a temporary file that nobody is writing any more."""
HEAD_BYTES = 64 * 1024
"""The beginning of a file, which tells what is in it."""
PATIENCE_SECONDS = 2
"""For a list of what is in a bucket; without one it is what it was."""
AT_ONCE = 16
"""Questions to an object store at a time."""
SAVED, CACHE = "saved", "cache"
SUFFIX = ".safetensors"
SCHEMES = ("s3", "gs", "az")
STATE_ID = re.compile(r"st_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file."""

    nbytes: int
    used: float
    """Time of its last use, or as near to it as is known."""


class Shelf(ABC):
    """Files by the ids of states, within `max_bytes`.

    A kind of shelf lists, writes, removes and reads; failing to is an OSError.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._parts: dict[str, str] = {}
        self._looked = -LOOK_SECONDS
        self._used, self._measured = 0, -MEASURE_SECONDS

    def __contains__(self, key: str) -> bool:
        """Whether it is there, as far as is known."""
        return key in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._parts))

    def look(self, *, wait: bool = True) -> None:
        """Learns what is there, also from other servers, from time to time; what takes long is not
        waited for unless `wait`.
        """
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._refresh(wait=wait)

    def _refresh(self, *, wait: bool) -> None:
        self._parts = {key: part for part in (CACHE, SAVED) for key in self._keys(part)}

    @contextlib.contextmanager
    def fetch(self, key: str) -> Iterator[tuple[Path, bool]]:
        """Its file, and whether it is a saved one. Raises: OSError if there is none."""
        known = self._parts.get(key)
        # Another server may have written it since the last look, or have saved what was cached.
        for part in (known, *(p for p in (SAVED, CACHE) if p != known)):
            if part is None:
                continue
            with contextlib.ExitStack() as stack:
                try:
                    path = stack.enter_context(self._open(part, key))
                except FileNotFoundError:
                    continue
                yield path, part == SAVED
                return
        self._parts.pop(key, None)
        raise FileNotFoundError(key)

    def heads(self, keys: Iterable[str]) -> Iterator[tuple[bytes, int]]:
        """The beginnings of the files that are there, and the sizes of the whole."""
        for found in self._map(self._head, [(self._parts.get(key, SAVED), key) for key in keys]):
            if found is not None:
                yield found

    def _map(self, work: Callable[[str, str], T], places: Sequence[tuple[str, str]]) -> Iterator[T]:
        return (work(*place) for place in places)

    def write(self, key: str, data: bytes, *, saved: bool) -> None:
        """Puts a file in its place, whole; if it is to be `saved`, it is there for good when this
        returns.

        Raises: OSError; RequestError (507) without room for it.
        """
        self._make_room(len(data), saved)
        part = SAVED if saved else CACHE
        self._put(part, key, data)
        self._parts[key] = part
        if saved:
            with contextlib.suppress(OSError):
                self._remove(CACHE, key)

    def remove(self, key: str) -> None:
        """Takes a file away, if it is there. Raises: OSError."""
        self._parts.pop(key, None)
        for part in (SAVED, CACHE):
            self._remove(part, key)

    def close(self) -> None:  # noqa: B027  (most have nothing to end)
        """Ends what runs in the background."""

    def _make_room(self, size: int, for_good: bool) -> None:
        now = time.monotonic()
        soon = now - self._measured < MEASURE_SECONDS
        if soon and not for_good and self._used + size <= self.max_bytes:
            self._used += size
            return
        saved = sum(entry.nbytes for entry in self._list(SAVED).values())
        if for_good and saved + size > self.max_bytes:
            raise no_room("disk")
        cached = self._list(CACHE)
        total = saved + sum(entry.nbytes for entry in cached.values()) + size
        for key, entry in sorted(cached.items(), key=lambda item: item[1].used):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                self._remove(CACHE, key)
            self._parts.pop(key, None)
            total -= entry.nbytes
        self._used, self._measured = total, now
        if total > self.max_bytes:
            raise no_room("disk")

    def _keys(self, part: str) -> Iterable[str]:
        return self._list(part)

    @abstractmethod
    def _list(self, part: str) -> dict[str, Entry]: ...

    @abstractmethod
    def _put(self, part: str, key: str, data: bytes) -> None: ...

    @abstractmethod
    def _remove(self, part: str, key: str) -> None: ...

    @abstractmethod
    def _open(self, part: str, key: str) -> AbstractContextManager[Path]: ...

    @abstractmethod
    def _head(self, part: str, key: str) -> tuple[bytes, int] | None: ...


class Folder(Shelf):
    """A folder of this machine, or one that it mounts. What is read counts as used."""

    def __init__(self, folder: Path, max_bytes: int = DISK_BYTES) -> None:
        """Raises: ConfigError for a folder that cannot be used."""
        super().__init__(max_bytes)
        self.folder = folder
        try:
            for part in (SAVED, CACHE):
                (folder / part).mkdir(parents=True, exist_ok=True)
                for path in (folder / part).glob("*.tmp"):
                    # Perhaps another server's, which is writing it.
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot keep states in {folder}: {error.strerror}") from None

    def _path(self, part: str, key: str) -> Path:
        return self.folder / part / f"{key}{SUFFIX}"

    def _keys(self, part: str) -> Iterable[str]:
        # Without asking for the size of each, which takes much longer.
        return filter(None, map(_key, os.listdir(self.folder / part)))

    def _list(self, part: str) -> dict[str, Entry]:
        found = {}
        for item in os.scandir(self.folder / part):
            key = _key(item.name)
            if key is not None:
                with contextlib.suppress(OSError):
                    about = item.stat(follow_symlinks=False)
                    found[key] = Entry(about.st_size, about.st_mtime)
        return found

    def _put(self, part: str, key: str, data: bytes) -> None:
        temporary = self.folder / part / f"{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                if part == SAVED:
                    os.fsync(file.fileno())
            temporary.replace(self._path(part, key))
            if part == SAVED:
                _sync(self.folder / part)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _remove(self, part: str, key: str) -> None:
        self._path(part, key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _open(self, part: str, key: str) -> Iterator[Path]:
        path = self._path(part, key)
        if path.is_symlink():
            raise FileNotFoundError(key)
        os.utime(path)
        yield path

    def _head(self, part: str, key: str) -> tuple[bytes, int] | None:
        path = self._path(part, key)
        with contextlib.suppress(OSError):
            if not path.is_symlink():
                with path.open("rb") as file:
                    return file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size
        return None


class Bucket(Shelf):
    """A bucket that speaks S3's, Google's or Azure's protocol, by obstore.

    The time of use is that of writing.
    """

    def __init__(self, store: ObjectStore, max_bytes: int = DISK_BYTES) -> None:
        """Raises: OSError for a bucket that cannot be read."""
        super().__init__(max_bytes)
        self._store = store
        self._looker = ThreadPoolExecutor(1, "spikelm-bucket")
        self._looking: Future[None] | None = None
        super()._refresh(wait=True)

    @staticmethod
    def at(url: str, max_bytes: int = DISK_BYTES) -> Bucket:
        """That of `s3://bucket/prefix`, `gs://...` or `az://...`; who we are and where it is, its
        environment variables say (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

        Raises: ConfigError; MissingExtraError.
        """
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise MissingExtraError("obstore", "bucket") from None
        try:
            retries: Any = {"max_retries": 2}
            return Bucket(from_url(url, retry_config=retries), max_bytes)
        except (BaseError, OSError, ValueError) as error:
            raise ConfigError(f"cannot keep states in {url}: {_line(error)}") from None

    def _refresh(self, *, wait: bool) -> None:
        def work() -> None:
            with contextlib.suppress(OSError):
                Shelf._refresh(self, wait=True)

        if self._looking is None or self._looking.done():
            self._looking = self._looker.submit(work)
        if wait:
            with contextlib.suppress(TimeoutError):
                self._looking.result(PATIENCE_SECONDS)

    def close(self) -> None:
        self._looker.shutdown(cancel_futures=True)

    def _list(self, part: str) -> dict[str, Entry]:
        found = {}
        for page in _asked(lambda: list(self._store.list(part))):
            for item in page:
                key = _key(item["path"].rpartition("/")[2])
                if key is not None:
                    found[key] = Entry(item["size"], item["last_modified"].timestamp())
        return found

    def _put(self, part: str, key: str, data: bytes) -> None:
        _asked(lambda: self._store.put(_object(part, key), data))

    def _remove(self, part: str, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _asked(lambda: self._store.delete(_object(part, key)))

    @contextlib.contextmanager
    def _open(self, part: str, key: str) -> Iterator[Path]:
        data = _asked(lambda: self._store.get(_object(part, key)).bytes())
        with as_file(data) as path:
            yield path

    def _head(self, part: str, key: str) -> tuple[bytes, int] | None:
        options: Any = {"range": (0, HEAD_BYTES)}
        with contextlib.suppress(OSError):
            found = _asked(lambda: self._store.get(_object(part, key), options=options))
            return bytes(found.bytes()), found.meta["size"]
        return None

    def _map(self, work: Callable[[str, str], T], places: Sequence[tuple[str, str]]) -> Iterator[T]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(lambda place: work(*place), places)


def open_shelf(place: str, max_bytes: int = DISK_BYTES) -> Shelf:
    """The bucket of a URL, or a folder. Raises: ConfigError."""
    scheme, separator, _ = place.partition("://")
    if not separator:
        return Folder(Path(place), max_bytes)
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"--state-dir: {place} given; allowed: a folder, or {allowed}...")
    return Bucket.at(place, max_bytes)


@contextlib.contextmanager
def as_file(data: Any) -> Iterator[Path]:
    """A temporary file of that content: the library compares the sizes that a file declares with
    its length.
    """
    with tempfile.TemporaryDirectory(prefix="spikelm-") as folder:
        path = Path(folder) / f"state{SUFFIX}"
        path.write_bytes(data)
        yield path


def no_room(where: str) -> RequestError:
    return RequestError(
        f"no room on the {where} for one more saved state; delete some, or raise the budget",
        status=507,
        code="insufficient_storage",
    )


def _object(part: str, key: str) -> str:
    return f"{part}/{key}{SUFFIX}"


def _key(name: str) -> str | None:
    key = name.removesuffix(SUFFIX)
    return key if name.endswith(SUFFIX) and STATE_ID.fullmatch(key) else None


def _asked(work: Callable[[], Any]) -> Any:
    """What the object store answers. Raises: OSError."""
    from obstore.exceptions import BaseError

    try:
        return work()
    except BaseError as error:
        raise OSError(_line(error)) from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
