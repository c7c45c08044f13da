"""Text -> token files -> batches. A batch is a pure function of (seed, step, row).

A document is stored as its separator followed by its tokens, so the separator is the first
token of every document: the state is forgotten before it, and the first word is predicted from
it, exactly as an empty prompt is. L is the sequence length; a row has L + 1 tokens, inputs and
targets overlapping.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spikelm.config import to_dict
from spikelm.corpus import builtin_documents, read_documents, split_documents
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm_train.config import DataConfig, TokenizerConfig, TrainConfig

Tokens = npt.NDArray[np.unsignedinteger[Any]]

META = "meta.json"


@dataclass(frozen=True, slots=True)
class Split:
    """One side of the corpus as a memory-mapped file of ids."""

    tokens: Tokens
    """All documents back to back, each begun by the separator."""
    num_bytes: int
    """Bytes of the text."""
    num_documents: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenizer and the text it was trained on."""

    tokenizer: Tokenizer
    train: Split
    validation: Split


class Batch(NamedTuple):
    """Sequences, all [B, L]."""

    inputs: Tensor
    """int64"""
    targets: Tensor
    """int64: the inputs' next tokens"""
    reset: Tensor
    """bool: tokens before which the state is forgotten"""


def make_batch(rows: npt.NDArray[np.int64], eos_id: int) -> Batch:
    """Rows of tokens [B, L + 1] as inputs, targets and document starts."""
    tokens = torch.from_numpy(rows)
    inputs = tokens[:, :-1]
    return Batch(inputs, tokens[:, 1:], inputs == eos_id)


class RandomWindows:
    """Windows that begin anywhere; the rows of a step, of all ranks, begin at distinct tokens."""

    def __init__(self, tokens: Tokens, sequence_length: int, rows_per_step: int, seed: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.rows_per_step = rows_per_step
        self.seed = seed

    def rows(self, step: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        generator = np.random.default_rng([self.seed, step])
        choices = len(self.tokens) - self.sequence_length
        again = self.rows_per_step > choices
        begins = generator.choice(choices, self.rows_per_step, replace=again)[start:stop]
        windows = [self.tokens[b : b + self.sequence_length + 1] for b in begins]
        return np.stack(windows).astype(np.int64)


class PackedDocuments:
    """Every document once per epoch, in an order drawn per epoch, packed back to back.

    The epochs form one endless stream; row r of the training run covers its tokens r L to
    (r + 1) L, both ends included, so every token is the target of exactly one row.
    """

    def __init__(
        self, tokens: Tokens, eos_id: int, sequence_length: int, rows_per_step: int, seed: int
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.begins = np.flatnonzero(tokens == eos_id)
        self.lengths = np.diff(self.begins, append=len(tokens))
        self._epoch = -1

    def rows(self, step: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        first = step * self.rows_per_step
        return np.stack([self._row(first + row) for row in range(start, stop)])

    def _row(self, row: int) -> npt.NDArray[np.int64]:
        epoch, at = divmod(row * self.sequence_length, len(self.tokens))
        pieces: list[Tokens] = []
        missing = self.sequence_length + 1
        while missing:
            self._shuffle(epoch)
            index = int(np.searchsorted(self._ends, at, side="right"))
            while missing and index < len(self._order):
                document = self._order[index]
                end = self.begins[document] + self.lengths[document]
                begin = end - (self._ends[index] - at)
                pieces.append(self.tokens[begin : min(end, begin + missing)])
                missing -= len(pieces[-1])
                at += len(pieces[-1])
                index += 1
            epoch, at = epoch + 1, 0
        return np.concatenate(pieces).astype(np.int64)

    def _shuffle(self, epoch: int) -> None:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = generator.permutation(len(self.begins))
            self._ends = np.cumsum(self.lengths[self._order])
            self._epoch = epoch


def make_sampler(
    config: TrainConfig, corpus: Corpus, rows_per_step: int
) -> RandomWindows | PackedDocuments:
    """The sampler of a recipe over the training tokens."""
    length, tokens = config.data.sequence_length, corpus.train.tokens
    if config.data.sampling == "packed":
        eos_id = corpus.tokenizer.eos_id
        return PackedDocuments(tokens, eos_id, length, rows_per_step, config.seed)
    return RandomWindows(tokens, length, rows_per_step, config.seed)


def validation_rows(tokens: Tokens, sequence_length: int, at_most: int) -> npt.NDArray[np.int64]:
    """Windows of `tokens` [n, L + 1], evenly spread, no target twice; n L <= about `at_most`.

    A text shorter than one window is a single, shorter row.
    """
    length = min(sequence_length, len(tokens) - 1)
    available = (len(tokens) - 1) // length
    count = max(1, min(available, at_most // length))
    begins = length * np.linspace(0, available - 1, count).astype(np.int64)
    return np.stack([tokens[b : b + length + 1] for b in begins]).astype(np.int64)


def prepare(config: TrainConfig, folder: Path) -> Corpus:
    """Tokenises the recipe's text into `folder`, or finds there what an earlier run left.

    Raises: DataError for sources without enough text; ConfigError for a vocabulary the text
    cannot fill.
    """
    corpus = _reopen(config, folder)
    if corpus is None:
        train, validation = documents(config.data)
        tokenizer = _train_tokenizer(config.tokenizer, train)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META).unlink(missing_ok=True)
        tokenizer.save(folder / "tokenizer")
        meta = {
            "key": _key(config, tokenizer),
            "train": _write(folder / "train.bin", train, tokenizer),
            "validation": _write(folder / "validation.bin", validation, tokenizer),
        }
        # Written last: its presence says that the rest is complete.
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        corpus = _reopen(config, folder)
    assert corpus is not None
    length, found = config.data.sequence_length, len(corpus.train.tokens)
    if found < length + 1:
        raise DataError(
            f"the training text has {found} tokens, fewer than one sequence of {length + 1}; "
            "give more text or lower data.sequence_length"
        )
    return corpus


def documents(config: DataConfig) -> tuple[list[str], list[str]]:
    """Training and validation documents of the recipe's sources.

    Raises: DataError for sources that are missing, unreadable or without enough text.
    """
    own = config.validation_sources
    if not config.sources and not own:
        return builtin_documents("train"), builtin_documents("validation")
    found: Iterable[str] = builtin_documents("train")
    if config.sources:
        found = _limited(read_documents(config.sources, text_key=config.text_key), config)
    if not own:
        return split_documents(found, config.validation_fraction)
    train, validation = list(found), list(read_documents(own, text_key=config.text_key))
    check_disjoint(train, validation, "validation")
    return train, validation


def check_disjoint(train: Iterable[str], held_out: Iterable[str], name: str) -> None:
    """Raises: DataError if a held-out document is a training document, white space aside."""
    seen = {_document_hash(text) for text in train}
    leaked = [text for text in held_out if _document_hash(text) in seen]
    if leaked:
        raise DataError(
            f"{len(leaked)} {name} document(s) are training documents too, the first one "
            f"{' '.join(leaked[0].split())[:60]!r}; take them out of one of the two"
        )


def _document_hash(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def _limited(found: Iterable[str], config: DataConfig) -> Iterator[str]:
    taken = 0
    for index, text in enumerate(found):
        if index == config.max_documents:
            return
        taken += len(text.encode("utf-8", "surrogatepass"))
        yield text
        if config.max_bytes is not None and taken >= config.max_bytes:
            return


def _train_tokenizer(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    if config.kind == "bytes":
        return Tokenizer.bytes()
    tokenizer = Tokenizer.train_bpe(texts, config.vocab_size)
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size: {config.vocab_size} given, but the training text fills only "
            f"{tokenizer.vocab_size}; add --set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _write(path: Path, texts: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    total = num_bytes = 0
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for text in texts:
            ids = np.array([tokenizer.eos_id, *tokenizer.encode(text)], dtype)
            ids.tofile(file)
            total += len(ids)
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
            num_bytes += len(data)
    return {
        "dtype": dtype.str,
        "tokens": total,
        "bytes": num_bytes,
        "documents": len(texts),
        "sha256": digest.hexdigest(),
    }


def _reopen(config: TrainConfig, folder: Path) -> Corpus | None:
    """The corpus in `folder` if it is complete and was made for this recipe, else None."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        tokenizer = Tokenizer.load(folder / "tokenizer")
        if meta["key"] != _key(config, tokenizer):
            return None
        train, validation = (_open(folder, meta, name) for name in ("train", "validation"))
    except (OSError, ValueError, KeyError, CheckpointError):
        return None
    return Corpus(tokenizer, train, validation)


def _open(folder: Path, meta: dict[str, Any], name: str) -> Split:
    about = meta[name]
    tokens = np.memmap(folder / f"{name}.bin", dtype=np.dtype(about["dtype"]), mode="r")
    if len(tokens) != about["tokens"]:
        raise ValueError(f"{name}.bin holds {len(tokens)} tokens, expected {about['tokens']}")
    return Split(tokens, about["bytes"], about["documents"])


def _key(config: TrainConfig, tokenizer: Tokenizer) -> str:
    """What the token files depend on."""
    data = to_dict(config.data)
    for name in ("sampling", "sequence_length"):
        del data[name]
    parts = [data, to_dict(config.tokenizer), tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
