"""Text -> tokenised shards: read, divided, encoded by several processes, whole or not at all.

A document is stored as its separator followed by its tokens, so the separator is the first
token of every document: the state is forgotten before it, and the first word is predicted from
it, exactly as an empty prompt is.

The text is read two or three times, never held: to divide it (`division`), to train a tokenizer on,
and to encode it. The ids do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from spikelm.config import to_dict
from spikelm.corpus import (
    BLOCK_CHARACTERS,
    Faults,
    Piece,
    builtin_documents,
    in_pieces,
    read_conversations,
    read_pieces,
)
from spikelm.doctor import usable_cores
from spikelm.errors import ConfigError, DataError, MissingExtraError, RequestError
from spikelm.folders import staged
from spikelm.tokenizer import Tokenizer
from spikelm_train.config import DataConfig, TokenizerConfig
from spikelm_train.texts.division import Division, Held, digest, divide, shown, utf8_size
from spikelm_train.texts.shards import (
    SHARD_TOKENS,
    SIDES,
    TOKENIZER,
    Ids,
    Side,
    Writer,
    finish,
    remove,
    write_meta,
)

TASK_CHARACTERS = 1 << 20
"""Text that a process encodes at a time."""
PATIENCE = 8
"""Tasks before processes are started, which costs about as much."""

Task = tuple[Side, list[Piece]]
Encoded = tuple[Side, Ids, npt.NDArray[np.int64]]

log = logging.getLogger(__name__)


class Text:
    """The text of a recipe without mixture, to be read as often as needed."""

    faults: Faults
    """What the last reading left out."""
    held: Held
    """What the last reading held out."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.tokenizer: Tokenizer | None = None
        """Whose chat template conversations are written in, once it is known."""
        self._division: Division | None = None
        self._begin()

    def _begin(self) -> None:
        self.faults, self.held = Faults(skip=self.data.on_error == "skip"), Held()

    @property
    def num_bytes(self) -> int:
        """Bytes of the text, held-out text of its own not counted."""
        return self._divided().num_bytes

    def read(self, doing: str) -> Iterator[tuple[Side, Piece]]:
        """The pieces of its documents and their sides; a bar on the terminal says what is `doing`.

        Raises: DataError for sources that are missing, unreadable or without enough text, or if
        `validation_sources` have a block of the training text, white space aside.
        """
        data = self.data
        division = self._divided() if data.sources and not data.validation_sources else None
        self._begin()
        if division is not None:
            yield from division.split(self._train(doing, division.limit), self.held)
            return
        held_out = self._sources(data.validation_sources) if data.validation_sources else None
        for piece in _builtin("validation") if held_out is None else held_out:
            self.held.add(piece.text)
            yield "validation", piece
        for piece in self._train(doing):
            if piece.text in self.held:
                raise DataError(
                    f"a validation document is a training document too, {shown(piece.text)}; "
                    "take it out of one of the two"
                )
            yield "train", piece

    def sample(self, num_bytes: int | None) -> Iterator[str]:
        """Training text: all, or about `num_bytes` in blocks from all over it."""
        texts = (piece.text for side, piece in self.read("learning tokens") if side == "train")
        if num_bytes is None or num_bytes >= self.num_bytes:
            yield from texts
            return
        taken, bound = 0, 2**32 * num_bytes / self.num_bytes
        for text in texts:
            if taken == 0 or int.from_bytes(digest(text)[4:8], "big") < bound:
                yield text
                taken += utf8_size(text)
            if taken >= num_bytes:
                return

    def _divided(self) -> Division:
        if self._division is None:
            self._begin()
            data = self.data
            if data.sources and not data.validation_sources:
                self._division = divide(
                    lambda limit: self._train("dividing", limit), data.validation_fraction
                )
            else:
                num_bytes = sum(utf8_size(piece.text) for piece in self._train("counting"))
                self._division = Division(BLOCK_CHARACTERS, -1, num_bytes)
        return self._division

    def _train(self, doing: str, limit: int = BLOCK_CHARACTERS) -> Iterator[Piece]:
        data = self.data
        if not data.sources:
            return _builtin("train")
        total = None if self._division is None else self._division.num_bytes
        return _metered(_limited(self._sources(data.sources, limit), data), doing, total)

    def _sources(self, sources: tuple[str, ...], limit: int = BLOCK_CHARACTERS) -> Iterator[Piece]:
        if self.data.messages_key is not None:
            return self._conversations(sources, self.data.messages_key)
        return read_pieces(sources, text_key=self.data.text_key, limit=limit, faults=self.faults)

    def _conversations(self, sources: tuple[str, ...], key: str) -> Iterator[Piece]:
        """Each as one piece, as the answers in it would be cut from their questions."""
        try:
            from spikelm.template import ChatTemplate
        except ImportError:
            raise MissingExtraError("jinja2", "train") from None
        template = ChatTemplate(tokenizer=self.tokenizer)
        checks = self.tokenizer is not None
        for messages, where in read_conversations(sources, key=key, faults=self.faults):
            try:
                turns = tuple(template.turns(messages))
            except RequestError as error:
                self.faults.found(DataError(f"{where}: {error}"))
            else:
                answer = next(text for text, is_answer in turns if is_answer)
                if checks and not template.ends(answer):
                    log.warning(
                        "the chat template ends an answer with %r, where a chat does not stop; "
                        "take a template, or a tokenizer, with a token that ends answers",
                        answer[-20:],
                    )
                checks = False
                yield Piece("".join(text for text, _ in turns), True, turns)


def _builtin(side: Side) -> Iterator[Piece]:
    return (piece for text in builtin_documents(side) for piece in in_pieces([text]))


def _limited(pieces: Iterable[Piece], data: DataConfig) -> Iterator[Piece]:
    documents = taken = 0
    for piece in pieces:
        if piece.begins:
            enough = data.max_bytes is not None and taken >= data.max_bytes
            if enough or documents == data.max_documents:
                return
            documents += 1
        taken += utf8_size(piece.text)
        yield piece


def _metered(pieces: Iterable[Piece], doing: str, total: int | None) -> Iterator[Piece]:
    bar = tqdm(desc=doing, total=total, unit="B", unit_scale=True, leave=False, disable=None)
    with bar:
        for piece in pieces:
            yield piece
            bar.update(utf8_size(piece.text))


def make_tokenizer(config: TokenizerConfig, texts: Sequence[Text]) -> Tokenizer:
    """The recipe's tokenizer; a bpe one learns from the training text.

    Raises: ConfigError for a vocabulary that the text does not fill, or that differs from the
    file's; CheckpointError for a file that holds no tokenizer.
    """
    tokenizer, template = _vocabulary(config, texts), read_template(config)
    return tokenizer if template is None else tokenizer.with_chat_template(template)


def read_template(config: TokenizerConfig) -> str | None:
    """The recipe's chat template. Raises: ConfigError if there is no such file."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer.chat_template: cannot read it: {error}") from None


def _vocabulary(config: TokenizerConfig, texts: Sequence[Text]) -> Tokenizer:
    if config.kind == "bytes":
        return Tokenizer.bytes()
    if config.path is not None:
        tokenizer = Tokenizer.from_file(Path(config.path), eos=config.eos).separated()
        way_out = f"has {tokenizer.vocab_size} entries"
    else:
        share = None if config.train_bytes is None else -(-config.train_bytes // len(texts))
        sample = itertools.chain.from_iterable(text.sample(share) for text in texts)
        tokenizer = Tokenizer.train_bpe(sample, config.vocab_size)
        way_out = f"comes to {tokenizer.vocab_size} entries on this text"
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: {config.vocab_size} given, but the tokenizer {way_out}; "
            f"add --set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes it whole or not at all. Raises: DataError if it cannot be written."""
    with _written_whole(folder), staged(folder) as staging:
        tokenizer.save(staging)


@contextmanager
def _written_whole(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot write {folder}: {reason}; nothing was written") from None


def write_text(
    text: Text,
    config: TokenizerConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    key: str | None = None,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Encodes `text` into `folder`, in place of what an earlier preparation left there.

    Returns the content of meta.json, which has the `key` and how the text and the tokenizer were
    made. So many `workers` (processes) encode; None is one per core once a text turns out to be
    large.

    Raises: DataError as `Text.read` does, and if `folder` cannot be written; it is unchanged then.
    """
    size, signed = tokenizer.vocab_size, text.data.messages_key is not None
    text.tokenizer = tokenizer
    meters = {side: _Meter() for side in SIDES}
    with _written_whole(folder):
        with staged(folder) as staging, ExitStack() as stack:
            tokenizer.save(staging / TOKENIZER)
            writers = {
                side: stack.enter_context(
                    closing(Writer(staging, side, size, shard_tokens, signed=signed))
                )
                for side in SIDES
            }
            tasks = _tasks(meters[side].see(side, piece) for side, piece in text.read("encoding"))
            encoded = encode(tasks, tokenizer, staging / TOKENIZER, workers)
            for side, ids, starts in stack.enter_context(closing(encoded)):
                writers[side].add(ids, starts)
            meta: dict[str, Any] = {
                "key": key,
                "made": {"data": to_dict(text.data), "tokenizer": to_dict(config)},
                "vocab_size": size,
                "fingerprint": tokenizer.fingerprint,
                **{side: {**writers[side].finish(), **meters[side].about} for side in SIDES},
                "held_out_copies": text.held.duplicates,
                "empty_documents": text.faults.empty,
                "conversations_without_an_answer": text.faults.unanswered,
                "unreadable": {"number": text.faults.skipped, "first": text.faults.first},
            }
            write_meta(staging, meta)
            remove(folder)
        finish(folder)
    _say(meta)
    return meta


def _say(meta: Mapping[str, Any]) -> None:
    faults = meta["unreadable"]
    if faults["number"]:
        log.warning("left out %d unreadable, the first: %s", faults["number"], faults["first"][0])
    for name in ("held_out_copies", "empty_documents", "conversations_without_an_answer"):
        if meta[name]:
            log.info("left out %d %s", meta[name], name.replace("_", " "))


class _Meter:
    """Counts and hashes the text of one side."""

    def __init__(self) -> None:
        self._digest, self._size, self._total = hashlib.sha256(), 0, 0

    def see(self, side: Side, piece: Piece) -> tuple[Side, Piece]:
        if piece.begins:
            self._end()
        data = piece.text.encode("utf-8", "surrogatepass")
        self._digest.update(data)
        self._size += len(data)
        return side, piece

    def _end(self) -> None:
        # Without the lengths other documents could have the same hash.
        if self._size:
            self._digest.update(self._size.to_bytes(8, "little"))
        self._total, self._size = self._total + self._size, 0

    @property
    def about(self) -> dict[str, Any]:
        self._end()
        return {"bytes": self._total, "sha256": self._digest.hexdigest()}


def _tasks(pieces: Iterable[tuple[Side, Piece]]) -> Iterator[Task]:
    waiting: dict[Side, list[Piece]] = {side: [] for side in SIDES}
    sizes: dict[Side, int] = dict.fromkeys(SIDES, 0)
    for side, piece in pieces:
        waiting[side].append(piece)
        sizes[side] += len(piece.text)
        if sizes[side] >= TASK_CHARACTERS:
            yield side, waiting[side]
            waiting[side], sizes[side] = [], 0
    yield from ((side, rest) for side, rest in waiting.items() if rest)


def encode(
    tasks: Iterator[Task], tokenizer: Tokenizer, saved: Path, workers: int | None
) -> Generator[Encoded]:
    """The ids of each task and the indices at which documents start, in the order of the tasks.

    `tokenizer` is the one in the folder `saved`, which other processes load. Two tasks per process
    are in memory at a time. Raises: DataError if a process ends.
    """
    number = workers if workers is not None else usable_cores()
    alone = None if number == 1 else 0 if workers is not None else PATIENCE
    yield from (_encode(tokenizer, task) for task in itertools.islice(tasks, alone))
    more = next(tasks, None)
    if more is None:
        return
    # Not forked: a process that has used torch has threads, which a fork would leave locked.
    pool = ProcessPoolExecutor(number, get_context("spawn"), _start, (saved,))
    running: deque[Future[Encoded]] = deque()
    try:
        for task in itertools.chain([more], tasks):
            running.append(pool.submit(_run, task))
            if len(running) > 2 * number:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenExecutor:
        raise DataError(
            "a process that encodes text has ended, perhaps for want of memory; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizer: Tokenizer
"""Of a process that encodes."""


def _start(saved: Path) -> None:
    global _tokenizer
    # Ctrl-C reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tokenizer = Tokenizer.load(saved)


def _run(task: Task) -> Encoded:
    return _encode(_tokenizer, task)


def _encode(tokenizer: Tokenizer, task: Task) -> Encoded:
    side, pieces = task
    ids: list[int] = []
    starts: list[int] = []
    for text, begins, turns in pieces:
        if begins:
            starts.append(len(ids))
            ids.append(tokenizer.eos_id)
        if not turns:
            ids += tokenizer.encode(text, continues=not begins)
        for index, (part, answer) in enumerate(turns):
            found = tokenizer.encode(part, special=True, continues=index > 0)
            if tokenizer.eos_id in found:
                raise DataError(
                    "the chat template writes the token that separates documents into "
                    "conversations: a model forgets there what was before; give another "
                    "tokenizer.chat_template, or another tokenizer.eos"
                )
            ids += found if answer else [~token for token in found]
    return side, np.array(ids, np.int64), np.array(starts, np.int64)
