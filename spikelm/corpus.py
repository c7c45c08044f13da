"""Text in: the built-in corpus of Python's own documentation, local files, Hugging Face datasets.

A document is one string: a module's docstrings, a documentation topic, a text file, the text of
one row of a table. Nothing here reaches a network unless a dataset name is asked for.
"""

from __future__ import annotations

import ast
import bz2
import glob
import gzip
import hashlib
import importlib
import inspect
import io
import json
import lzma
import math
import os
import platform
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

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
    if not sources:
        raise DataError("no text sources given; name a file, a glob or a dataset")
    found = [(source, _find_files(source)) for source in sources]
    return _read_all(found, text_key, streaming)


def _read_all(
    found: list[tuple[str, list[Path] | None]], text_key: str, streaming: bool
) -> Iterator[str]:
    empty = True
    for source, paths in found:
        if paths is None:
            documents = _read_dataset(source, text_key, streaming)
        else:
            documents = (text for path in paths for text in _read_file(path, text_key))
        for text in documents:
            if text.strip():
                empty = False
                yield text
    if empty:
        raise DataError(f"no text in {', '.join(source for source, _ in found)}")


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


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    kind = _format(path)
    try:
        if kind in TABLE_SUFFIXES:
            yield from _read_parquet(path, text_key)
            return
        with _open(path) as stream:
            if kind in TEXT_SUFFIXES:
                yield stream.read().decode("utf-8-sig")
            else:
                yield from _read_json_lines(stream, path, text_key)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {_one_line(error)}") from None


def _open(path: Path) -> BinaryIO:
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
    suffix = path.suffix.lower()
    if suffix != ".zst":
        return cast(BinaryIO, openers.get(suffix, open)(path, "rb"))
    # pyarrow reads all frames and notices truncation; the zstandard package does neither.
    raw = _import("pyarrow").input_stream(str(path), compression="zstd")
    return cast(BinaryIO, io.BufferedReader(raw))


def _read_json_lines(stream: BinaryIO, path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {_one_line(error)}") from None
        yield _text_of(row, text_key, f"{path}:{number}")


def _text_of(row: object, text_key: str, where: str) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with the key '{text_key}', got {row!r:.60}")
    if text_key not in row:
        raise DataError(f"{where}: no key '{text_key}'; keys present: {', '.join(map(str, row))}")
    text = row[text_key]
    # Tables have empty cells; they are documents without text.
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: '{text_key}' must be text, got {type(text).__name__}")
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    parquet = _import("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            _text_of(dict.fromkeys(names), text_key, str(path))
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for row in batch.to_pylist():
                    yield _text_of(row, text_key, str(path))
    except _import("pyarrow").ArrowException as error:
        raise DataError(f"cannot read {path}: {_one_line(error)}") from None


def _read_dataset(source: str, text_key: str, streaming: bool) -> Iterator[str]:
    datasets = _import("datasets")
    name, config, split, *rest = [*source.split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f"'{source}' given; a dataset is name, name:config or name:config:split")
    try:
        rows = datasets.load_dataset(
            os.path.expanduser(name), config or None, split=split or "train", streaming=streaming
        )
        for row in rows:
            yield _text_of(row, text_key, f"dataset {source}")
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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


def split_documents(
    documents: Iterable[str], validation_fraction: float
) -> tuple[list[str], list[str]]:
    """(train, validation): at least `validation_fraction` of the characters are held out.

    Documents over 64 Ki characters are first cut into blocks at paragraph borders, so that a
    single book has a held-out part; where that is not enough, the text is cut into twenty. The
    side of a block depends on the hash of its text alone and the fraction; equal texts are on the
    same side. Order is kept.

    Raises: DataError if either side would be empty.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation fraction: {validation_fraction} given; allowed: 0 < f < 1")
    texts = list(documents)
    total = sum(map(len, texts))
    for limit in (BLOCK_CHARACTERS, max(256, total // 20)):
        blocks = [block for text in texts for block in _blocks(text, limit)]
        held_out = _held_out(blocks, validation_fraction * total)
        train = [block for block in blocks if block not in held_out]
        if train and held_out:
            return train, [block for block in blocks if block in held_out]
    raise DataError(
        f"{total} characters in {len(texts)} document(s) cannot be split into training and "
        "validation text; give more text"
    )


def _held_out(blocks: Sequence[str], goal: float) -> set[str]:
    """Texts of at least `goal` characters, in the order of their hashes."""
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block] = counts.get(block, 0) + 1
    chosen: set[str] = set()
    held = 0
    for block in sorted(counts, key=_digest):
        if held >= goal:
            break
        chosen.add(block)
        held += len(block) * counts[block]
    return chosen


def _blocks(text: str, limit: int) -> Iterator[str]:
    size = math.ceil(len(text) / max(1, math.ceil(len(text) / limit)))
    start = 0
    while len(text) - start > limit:
        stop = start + size
        for border in ("\n\n", "\n", " "):
            cut = text.rfind(border, start + size // 2, stop)
            if cut >= 0:
                stop = cut + len(border)
                break
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
