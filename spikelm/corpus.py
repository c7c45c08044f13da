"""Text in: the built-in corpus of Python's own documentation, local files, Hugging Face datasets.

A document is one string: a module's docstrings, a documentation topic, a text file, the text of
one row of a table. Text files also come in pieces, so that one may be larger than memory. A table
may hold conversations instead. Nothing here reaches a network unless a dataset name is asked for.
"""

from __future__ import annotations

import ast
import bz2
import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib
import inspect
import io
import json
import lzma
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from spikelm.errors import DataError, MissingExtraError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json-lines", ".ndjson")
TABLE_SUFFIXES = (".parquet",)
PACKED_SUFFIXES = (".xz", ".gz", ".bz2", ".zst")
# What makes a folder one that the datasets library reads row by row.
FOLDER_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")

BLOCK_CHARACTERS = 64 * 1024
"""Longest piece of a document."""
_CHUNK_BYTES = 1 << 20
_FAULTS_SHOWN = 10

# Where a text is cut, best first: before a paragraph, a line, a space. No token of our own BPE goes
# over such a place: line ends take the indentation behind them, words the space in front.
_BORDERS = tuple(
    map(re.compile, (r"(?:\r?\n){2,}[ \t]*(?=\S)", r"\n[ \t]*(?=\S)", r"(?<=\S)(?= \S)"))
)

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
# Shorter paragraphs ("Returns None.") repeat by nature; longer ones would leak between splits.
_UNIQUE_PARAGRAPH_CHARACTERS = 80
_HELD_OUT_FRACTION = 0.04
_HELD_OUT_MIN_BYTES = 90_000
# One long document must not be a whole held-out split.
_HELD_OUT_MAX_DOCUMENT_BYTES = 32_000


def builtin_documents(split: Split) -> list[str]:
    """English documentation of the running Python's standard library: topics and docstrings.

    Roughly 92 / 4 / 4 % of the bytes, divided by module, the same for a Python version. No
    docstring, and no paragraph of 80 characters or more, occurs twice in the whole corpus.

    Raises: DataError if the library's sources are not installed.
    """
    return list(_builtin()[split])


def describe_builtin() -> dict[str, Any]:
    """The built-in corpus in numbers: source, sha256, and documents and bytes per split."""
    digest = hashlib.sha256()
    report: dict[str, Any] = {"source": f"Python {platform.python_version()} standard library"}
    for split in SPLITS:
        texts = [text.encode() for text in _builtin()[split]]
        report[split] = {"documents": len(texts), "bytes": sum(map(len, texts))}
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text)
    return {**report, "sha256": digest.hexdigest()}


@cache
def _builtin() -> dict[Split, tuple[str, ...]]:
    named = dict(_library_documents())
    sizes = {name: len(text.encode()) for name, text in named.items()}
    quota = max(_HELD_OUT_MIN_BYTES, int(_HELD_OUT_FRACTION * sum(sizes.values())))
    if sum(sizes.values()) < 10 * quota:
        raise DataError(
            f"the sources of Python's standard library are not in {sysconfig.get_path('stdlib')}; "
            "give your own text with --data"
        )
    split_of: dict[str, Split] = dict.fromkeys(named, "train")
    candidates = iter(sorted(named, key=_digest))
    for split in ("test", "validation"):
        taken = 0
        while taken < quota:
            name = next(candidates)
            if sizes[name] <= _HELD_OUT_MAX_DOCUMENT_BYTES:
                split_of[name] = split
                taken += sizes[name]
    return {s: tuple(named[name] for name in named if split_of[name] == s) for s in SPLITS}


def _library_documents() -> Iterator[tuple[str, str]]:
    """(name, document) of every module and topic, in the order of their names."""
    seen: set[str] = set()
    for name, parts in sorted(_docstrings().items()):
        blocks = [
            f"{heading}\n\n{text}"
            for heading, original in parts
            if _is_prose(original) and (text := _unseen(original, seen))
        ]
        if blocks:
            title = f"{name} module"
            yield name, f"{title}\n{'=' * len(title)}\n\n" + "\n\n".join(blocks).strip() + "\n"
    for name, original in sorted(_topics().items()):
        text = _unseen(original.strip(), seen)
        if len(text) >= _UNIQUE_PARAGRAPH_CHARACTERS:
            yield f"topic {name}", text + "\n"


def _docstrings() -> dict[str, list[tuple[str, str]]]:
    """Module name -> (heading, docstring) in source order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[tuple[str, str]]] = {}
    with warnings.catch_warnings():
        # An invalid escape in a library file must not depend on the caller's warning filters.
        warnings.simplefilter("ignore")
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if _SKIPPED_FOLDERS.intersection(parts):
                continue
            name = ".".join(parts).removesuffix(".__init__")
            try:
                found[name] = list(_walk(ast.parse(path.read_bytes()), ""))
            except (OSError, SyntaxError, ValueError):
                continue
    return found


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            heading = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}()"
            yield heading if name else "", inspect.cleandoc(docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}" if name else child.name)


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return cast(Mapping[str, str], topics)


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return text.count(" ") >= 2 and letters >= 0.6 * len(text)


def _unseen(text: str, seen: set[str]) -> str:
    """`text` without the long paragraphs in `seen`, or "" if it was there already; updates it."""
    if text in seen:
        return ""
    seen.add(text)
    paragraphs = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) < _UNIQUE_PARAGRAPH_CHARACTERS or key not in seen:
            paragraphs.append(paragraph)
            seen.add(key)
    rest = "\n\n".join(paragraphs).strip()
    if rest != text and rest in seen:
        return ""
    seen.add(rest)
    return rest


class Piece(NamedTuple):
    """Part of a document, which is the pieces from one that begins to the next."""

    text: str
    begins: bool
    turns: tuple[tuple[str, bool], ...] = ()
    """Of a conversation the parts that `text` consists of, and whether each is an answer."""


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who speaks in a conversation."""

Messages = list[dict[str, str]]
"""A conversation: `role` and `content` of its messages."""


class Cell(NamedTuple):
    """One row's entry in the column that is read."""

    value: Any
    where: str


@dataclass
class Faults:
    """What of the sources cannot be used: an error, or counted and passed over."""

    skip: bool = False
    """Count what is unreadable instead of raising."""
    skipped: int = 0
    """Files, or rows of tables, that were unreadable."""
    empty: int = 0
    """Documents without text."""
    unanswered: int = 0
    """Conversations without an answer."""
    first: list[str] = field(default_factory=list)
    """What was wrong with the first ones that were skipped."""

    def found(self, error: DataError) -> None:
        """Raises: `error`, unless it is to be skipped."""
        if not self.skip:
            raise error
        self.skipped += 1
        if len(self.first) < _FAULTS_SHOWN:
            self.first.append(str(error))


def read_documents(
    sources: Sequence[str], *, text_key: str = "text", streaming: bool = True
) -> Iterator[str]:
    """The documents of files, globs and Hugging Face datasets, in the order given.

    A source is a file or glob (`**` included) of .txt, .md, .jsonl or .parquet, all but .parquet
    optionally packed as .xz, .gz, .bz2 or .zst; or a dataset `name`, `name:config` or
    `name:config:split` (split `train` unless given; the name may be a local dataset folder).
    A text file is one document; a table has one per row, in `text_key`. Empty ones are left out.

    Raises: DataError for a missing, unreadable or malformed source, at once if its name is
    enough to tell, and for a corpus without any text; MissingExtraError if a source needs one.
    """
    return _joined(read_pieces(sources, text_key=text_key, streaming=streaming))


def read_pieces(
    sources: Sequence[str],
    *,
    text_key: str = "text",
    streaming: bool = True,
    limit: int = BLOCK_CHARACTERS,
    faults: Faults | None = None,
) -> Iterator[Piece]:
    """The documents of `read_documents` in pieces of at most `limit` characters, cut by `cut`.

    Of a text file only some are in memory at a time, of a table one row (.jsonl) or 256 (.parquet).
    `faults` counts what is left out; where it skips, a text file that is not UTF-8 is read twice
    and left out whole, a table without its unreadable rows and what lies behind damage.

    Raises: as `read_documents`.
    """
    if not sources:
        raise DataError("no text sources given; name a file, a glob or a dataset")
    found = [(source, _find_files(source)) for source in sources]
    return _read_all(found, text_key, streaming, limit, faults or Faults())


def read_conversations(
    sources: Sequence[str], *, key: str, faults: Faults | None = None
) -> Iterator[tuple[Messages, str]]:
    """The conversations in the field `key` of the sources' rows, and where each one is.

    A source is what `read_documents` takes, but no text file. A conversation is a list of objects
    with a `role`, one of ROLES, and a `content`; other fields are passed over. Those in which
    nobody answers are left out and counted in `faults`.

    Raises: as `read_documents`.
    """
    faults = faults or Faults()
    found = [(source, _find_files(source)) for source in sources]
    for file in (file for _, paths in found for file in paths or ()):
        if _format(file) in TEXT_SUFFIXES:
            raise DataError(f"{file} is a text file; conversations are rows of .jsonl or .parquet")
    empty = True
    for source, paths in found:
        for path in _each(paths):
            for value, where in _cells(source, path, key, True, faults):
                try:
                    messages = _messages(value, f"{where}: '{key}'")
                except DataError as error:
                    faults.found(error)
                    continue
                if any(message["role"] == "assistant" for message in messages):
                    empty = False
                    yield messages, where
                else:
                    faults.unanswered += 1
    if empty:
        raise DataError(f"no answers of an assistant in {', '.join(name for name, _ in found)}")


def _messages(value: object, what: str) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{what} must be a list of messages, got {type(value).__name__}")
    return [_message(message, what) for message in value]


def _message(message: object, what: str) -> dict[str, str]:
    given = message if isinstance(message, Mapping) else {}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{what} needs messages with a role and a content, got {message!r:.60}")
    if role not in ROLES:
        raise DataError(f"{what}: role {role!r:.60} given; allowed: {', '.join(ROLES)}")
    return {"role": role, "content": content}


def _read_all(
    found: list[tuple[str, list[Path] | None]],
    text_key: str,
    streaming: bool,
    limit: int,
    faults: Faults,
) -> Iterator[Piece]:
    empty = True
    for source, paths in found:
        for chunks in _documents(source, paths, text_key, streaming, faults):
            for piece in in_pieces(chunks, limit, faults):
                empty = False
                yield piece
    if empty:
        raise DataError(f"no text in {', '.join(source for source, _ in found)}")


def _documents(
    source: str, paths: list[Path] | None, text_key: str, streaming: bool, faults: Faults
) -> Iterator[Iterable[str]]:
    """Each document in chunks."""
    for path in _each(paths):
        if path is not None and _format(path) in TEXT_SUFFIXES:
            yield from _read_text(path, faults)
            continue
        for value, where in _cells(source, path, text_key, streaming, faults):
            try:
                text = _text_in(value, f"{where}: '{text_key}'")
            except DataError as error:
                faults.found(error)
            else:
                yield (text,)


def _each(paths: list[Path] | None) -> Sequence[Path | None]:
    """The files of a source; None is the dataset that it names."""
    return [None] if paths is None else paths


def in_pieces(
    chunks: Iterable[str], limit: int = BLOCK_CHARACTERS, faults: Faults | None = None
) -> Iterator[Piece]:
    """The pieces of one document; none if it is without text."""
    begins, held = True, list[str]()
    for text in cut(chunks, limit):
        held.append(text)
        if begins and not text.strip():
            continue
        for part in held:
            yield Piece(part, begins)
            begins = False
        held.clear()
    if begins and faults is not None:
        faults.empty += 1


def cut(chunks: Iterable[str], limit: int = BLOCK_CHARACTERS) -> Iterator[str]:
    """The joined `chunks` in parts of at most `limit` characters, wherever the chunks end.

    Cut is, in the second half of a part, before the last paragraph, else the last line, else the
    last word: our own tokenizers give the parts the ids of the whole. A half without white space
    is cut at its end.
    """
    held = ""
    for chunk in chunks:
        held, start = held + chunk, 0
        while len(held) - start > limit:
            stop = _border(held, start + limit // 2, start + limit)
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def _border(text: str, low: int, high: int) -> int:
    for border in _BORDERS:
        # One more, which the patterns look at.
        stops = [match.end() for match in border.finditer(text, low, high + 1)]
        if stops:
            return stops[-1]
    return high


def _joined(pieces: Iterator[Piece]) -> Iterator[str]:
    held: list[str] = []
    for piece in pieces:
        if piece.begins and held:
            yield "".join(held)
            held.clear()
        held.append(piece.text)
    if held:
        yield "".join(held)


def _find_files(source: str) -> list[Path] | None:
    """The files a source names, or None for a dataset."""
    path = Path(source).expanduser()
    has_glob = any(c in source for c in "*?[")
    if path.is_file():
        paths = [path]
    elif _is_dataset_folder(source):
        return None
    elif has_glob:
        matches = glob.glob(str(path), recursive=True)
        paths = [match for match in map(Path, sorted(matches)) if match.is_file()]
    else:
        paths = []
    if not paths and (has_glob or source.startswith((".", "/", "~")) or _format(path) is not None):
        raise DataError(f"no such file: {source}")
    for item in paths:
        if _format(item) is None:
            allowed = ", ".join(TEXT_SUFFIXES + JSON_SUFFIXES + TABLE_SUFFIXES)
            raise DataError(
                f"cannot read {item}: its suffix must be one of {allowed}, "
                f"packed or not as {', '.join(PACKED_SUFFIXES)} (not .parquet)"
            )
    return paths or None


def _is_dataset_folder(source: str) -> bool:
    """Whether a dataset source names a local folder. Raises: DataError if it has no tables."""
    name = source.split(":")[0]
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        return False
    if not any(path.suffix in FOLDER_SUFFIXES for path in folder.rglob("*")):
        raise DataError(f"{folder} is a folder; name its files, for example '{folder}/**/*.txt'")
    return True


def _format(path: Path) -> str | None:
    """The suffix that says how to read the file, without packing; None if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] and suffixes[-1] in PACKED_SUFFIXES
    suffix = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    allowed = TEXT_SUFFIXES + JSON_SUFFIXES + (() if packed else TABLE_SUFFIXES)
    return suffix[0] if suffix[0] in allowed else None


def _read_text(path: Path, faults: Faults) -> Iterator[Iterable[str]]:
    try:
        if faults.skip:
            for _ in _decoded(path):
                pass
    except DataError as error:
        faults.found(error)
    else:
        yield _decoded(path)


def _cells(
    source: str, path: Path | None, key: str, streaming: bool, faults: Faults
) -> Iterator[Cell]:
    """The column `key` of a table, or of the dataset `source`."""
    if path is None:
        yield from _read_dataset(source, key, streaming, faults)
        return
    read = _read_parquet if _format(path) in TABLE_SUFFIXES else _read_json_lines
    try:
        yield from read(path, key, faults)
    except DataError as error:
        faults.found(error)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {_one_line(error)}") from None


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with _reading(path), _open(path) as stream:
        data = b"-"
        while data:
            data = stream.read(_CHUNK_BYTES)
            begun = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - begun + error.start
                raise DataError(f"{path} is not UTF-8: {error.reason} at byte {place}") from None
            yield text if position else text.removeprefix("\ufeff")
            position += len(data)


def _open(path: Path) -> BinaryIO:
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
    suffix = path.suffix.lower()
    if suffix != ".zst":
        return cast(BinaryIO, openers.get(suffix, open)(path, "rb"))
    # pyarrow reads all frames and notices truncation; the zstandard package does neither.
    raw = _import("pyarrow").input_stream(str(path), compression="zstd")
    return cast(BinaryIO, io.BufferedReader(raw))


def _read_json_lines(path: Path, key: str, faults: Faults) -> Iterator[Cell]:
    with _reading(path), _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                cell = _cell(json.loads(line), key, f"{path}:{number}")
            except DataError as error:
                faults.found(error)
            except (ValueError, RecursionError) as error:
                faults.found(DataError(f"{path}:{number}: not JSON: {_one_line(error)}"))
            else:
                yield cell


def _cell(row: object, key: str, where: str) -> Cell:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with the key '{key}', got {row!r:.60}")
    if key not in row:
        raise DataError(f"{where}: no key '{key}'; keys present: {', '.join(map(str, row))}")
    return Cell(row[key], where)


def _text_in(value: object, what: str) -> str:
    # Tables have empty cells; they are documents without text.
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, got {type(value).__name__}")
    return value


def _read_parquet(path: Path, key: str, faults: Faults) -> Iterator[Cell]:
    parquet = _import("pyarrow.parquet")
    try:
        with _reading(path), parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            _cell(dict.fromkeys(names), key, str(path))
            for batch in table.iter_batches(batch_size=256, columns=[key]):
                for row in batch.to_pylist():
                    yield _cell(row, key, str(path))
    except _import("pyarrow").ArrowException as error:
        raise DataError(f"cannot read {path}: {_one_line(error)}") from None


def _read_dataset(source: str, key: str, streaming: bool, faults: Faults) -> Iterator[Cell]:
    datasets = _import("datasets")
    name, config, split, *rest = [*source.split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f"'{source}' given; a dataset is name, name:config or name:config:split")
    number = 0
    try:
        rows = datasets.load_dataset(
            os.path.expanduser(name), config or None, split=split or "train", streaming=streaming
        )
        for number, row in enumerate(rows, 1):
            try:
                cell = _cell(row, key, f"dataset {source}, row {number}")
            except DataError as error:
                faults.found(error)
            else:
                yield cell
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if number:
            message = f"cannot read '{source}' behind row {number}: {_one_line(error)}"
            return faults.found(DataError(message))
        raise DataError(
            f"cannot read '{source}', neither a file nor a readable dataset: {_one_line(error)}"
        ) from None


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise MissingExtraError(module.split(".")[0], "data") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
