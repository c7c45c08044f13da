"""The text of a run: tokenised, or found prepared; and its batches."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spikelm.config import to_dict
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm_train.config import DataConfig, SetConfig, TrainConfig
from spikelm_train.objective import IGNORED
from spikelm_train.samplers import (
    CarriedWindows,
    MixedLanes,
    Mixture,
    PackedDocuments,
    RandomWindows,
    Sampler,
    shares,
)
from spikelm_train.texts.prepare import Text, make_tokenizer, read_template, write_text
from spikelm_train.texts.shards import TOKENIZER, Prepared, Split, Tokens, open_prepared

SEEN = "prepared.json"
"""What the prepared texts of a run were when it began."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenizer and the text it is for."""

    tokenizer: Tokenizer
    train: Split
    """All of it; of a mixture, one text behind the other."""
    validation: Split
    sets: tuple[tuple[float, Split], ...] = ()
    """The training texts of a mixture and their weights."""

    @property
    def has_conversations(self) -> bool:
        """Whether some of its tokens are read but not learned."""
        return self.train.num_learned < len(self.train.tokens)

    @property
    def tokens_per_byte(self) -> float:
        """Of the training text, as it is sampled."""
        if not self.sets:
            return len(self.train.tokens) / self.train.num_bytes
        weights = sum(weight for weight, _ in self.sets)
        return weights / sum(w * s.num_bytes / len(s.tokens) for w, s in self.sets)


class Batch(NamedTuple):
    """Sequences, all [B, L]."""

    inputs: Tensor
    """int64"""
    targets: Tensor
    """int64: the inputs' next tokens, IGNORED where they are not learned"""
    reset: Tensor
    """bool: tokens before which the state is forgotten"""


def make_batch(rows: npt.NDArray[np.int64], eos_id: int) -> Batch:
    """Rows of tokens [B, L + 1] (`texts.shards`) as inputs, targets and document starts."""
    stored = torch.from_numpy(rows)
    tokens = torch.where(stored < 0, ~stored, stored)
    targets = torch.where(stored < 0, IGNORED, stored)
    inputs = tokens[:, :-1]
    return Batch(inputs, targets[:, 1:], inputs == eos_id)


def make_sampler(config: TrainConfig, corpus: Corpus, rows_per_step: int) -> Sampler:
    """The sampler of a recipe over the training tokens.

    Raises: ConfigError for a mixture of which a text gets no row.
    """
    if not corpus.sets:
        return _sampler(config, corpus.train, rows_per_step)
    weights, splits = zip(*corpus.sets, strict=True)
    if config.data.sampling == "carried":
        lanes = shares(weights, rows_per_step)
        parts = (_sampler(config, s, n) for s, n in zip(splits, lanes, strict=True))
        return MixedLanes([part for part in parts if isinstance(part, CarriedWindows)])
    samplers = [_sampler(config, split, rows_per_step) for split in splits]
    return Mixture(samplers, weights, rows_per_step, config.seed)


def _sampler(config: TrainConfig, split: Split, rows_per_step: int) -> Sampler:
    length, seed = config.data.sequence_length, config.seed
    if config.data.sampling == "random_window":
        return RandomWindows(split.tokens, length, rows_per_step, seed)
    kind = CarriedWindows if config.data.sampling == "carried" else PackedDocuments
    return kind(split.tokens, split.starts, length, rows_per_step, seed)


def validation_rows(tokens: Tokens, sequence_length: int, at_most: int) -> npt.NDArray[np.int64]:
    """Windows of `tokens` [n, L + 1], evenly spread, no target twice; n L <= about `at_most`.

    A text shorter than one window is a single, shorter row.
    """
    length = min(sequence_length, len(tokens) - 1)
    available = (len(tokens) - 1) // length
    count = max(1, min(available, at_most // length))
    begins = length * np.linspace(0, available - 1, count).astype(np.int64)
    return np.stack([tokens[int(b) : int(b) + length + 1] for b in begins]).astype(np.int64)


def prepare(config: TrainConfig, folder: Path) -> Corpus:
    """Opens the recipe's prepared texts, and tokenises its sources into `folder`, or finds there
    what an earlier run left.

    Raises: DataError for sources without enough text, and for prepared texts that are damaged or
    were changed since the run began; ConfigError for a vocabulary the text cannot fill, and for
    prepared texts of another tokenizer.
    """
    data = config.data
    sets: Sequence[DataConfig | SetConfig] = data.mixture or (data,)
    own = [folder / f"set-{i}" if data.mixture else folder for i in range(len(sets))]
    folders: list[Path] = []
    parts: dict[Path, Prepared] = {}
    texts: dict[Path, Text] = {}
    for part, path in zip(sets, own, strict=True):
        if part.prepared is not None:
            folders.append(Path(part.prepared))
            parts[folders[-1]] = open_prepared(folders[-1])
        else:
            folders.append(path)
            own_key = part.messages_key
            texts[path] = Text(
                replace(data, sources=part.sources, mixture=(), messages_key=own_key)
            )
    _check_unchanged(folder, parts)
    _check_conversations(config, parts)
    tokenizer = _known_tokenizer(config, parts)
    cached = _reopen(config, list(texts), tokenizer)
    if cached is None:
        tokenizer = tokenizer or make_tokenizer(config.tokenizer, list(texts.values()))
        for path, text in texts.items():
            write_text(text, config.tokenizer, tokenizer, path, key=_key(config, tokenizer))
        cached = _reopen(config, list(texts), tokenizer)
    assert cached is not None
    found = [(cached | parts)[path] for path in folders]
    _check_length(found, data.sequence_length)
    weights = (s.weight for s in data.mixture)
    return Corpus(
        _with_template(config, found),
        Split.join([part.train for part in found]),
        Split.join([part.validation for part in found]),
        tuple((weight, part.train) for weight, part in zip(weights, found, strict=False)),
    )


def _with_template(config: TrainConfig, parts: Sequence[Prepared]) -> Tokenizer:
    """The tokenizer of `parts` with the chat template that their conversations are written in.

    Raises: ConfigError if there are two.
    """
    template = read_template(config.tokenizer)
    talks = [part.tokenizer for part in parts if _has_conversations(part)]
    if len({tokenizer.chat_template for tokenizer in talks}) > 1:
        raise ConfigError(
            "data.mixture: its conversations were prepared with different chat templates; prepare "
            "them with one"
        )
    tokenizer = (talks or [parts[0].tokenizer])[0]
    return tokenizer if template is None else tokenizer.with_chat_template(template)


def _has_conversations(part: Prepared) -> bool:
    return part.train.num_learned < len(part.train.tokens)


def _check_length(parts: Sequence[Prepared], sequence_length: int) -> None:
    shortest = min(len(part.train.tokens) for part in parts)
    if shortest < sequence_length + 1:
        raise DataError(
            f"the training text has {shortest} tokens, fewer than one sequence of "
            f"{sequence_length + 1}; give more text or lower data.sequence_length"
        )


def _check_conversations(config: TrainConfig, prepared: Mapping[Path, Prepared]) -> None:
    """Raises: ConfigError for a prepared text that should have conversations and has none, or in
    another chat template than the recipe's.
    """
    template = read_template(config.tokenizer)
    for folder, part in prepared.items():
        if config.data.messages_key is not None and not _has_conversations(part):
            raise ConfigError(
                f"data.messages_key: {config.data.messages_key} given, but {folder} was prepared "
                "as text; prepare it with --messages-key"
            )
        if _has_conversations(part) and template not in (None, part.tokenizer.chat_template):
            raise ConfigError(
                f"tokenizer.chat_template: {folder} was prepared with another one; prepare it "
                f"again with --chat-template {config.tokenizer.chat_template}"
            )


def _known_tokenizer(config: TrainConfig, prepared: Mapping[Path, Prepared]) -> Tokenizer | None:
    """The recipe's tokenizer if it is not to be learned from its text.

    Raises: ConfigError if a prepared text has another one.
    """
    kind = config.tokenizer
    own = None if kind.kind == "bpe" else make_tokenizer(kind, [])
    for folder, part in prepared.items():
        made = part.meta["made"]["tokenizer"]
        learned = kind.kind == "bpe" and (made["kind"], made["vocab_size"]) == ("bpe", kind.size)
        own = own or (part.tokenizer if learned else None)
        if own is None or own.fingerprint != part.tokenizer.fingerprint:
            entries = f"{part.tokenizer.vocab_size} entries"
            if config.init is not None:
                raise ConfigError(
                    f"{folder} was prepared with another tokenizer ({entries}) than that of "
                    f"{config.init}; prepare it with --tokenizer {config.init}"
                )
            raise ConfigError(
                f"{folder} was prepared with another tokenizer ({entries}); leave tokenizer.kind "
                "out of the recipe, or add "
                f"--set 'tokenizer={{kind: file, path: {folder / TOKENIZER}}}'"
            )
    return own


def _check_unchanged(folder: Path, prepared: Mapping[Path, Prepared]) -> None:
    """Raises: DataError if a prepared text is not what it was when the run in `folder` began."""
    seen: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        seen = json.loads((folder / SEEN).read_text(encoding="utf-8"))
    found = {str(path): _digest(part.meta) for path, part in prepared.items()}
    changed = [path for path, digest in found.items() if seen.get(path, digest) != digest]
    if changed:
        raise DataError(
            f"{changed[0]} was prepared anew since the run began; restore it, or start over with "
            "--fresh"
        )
    if found.keys() - seen.keys():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SEEN).write_text(json.dumps(seen | found, indent=2) + "\n", encoding="utf-8")


def _reopen(
    config: TrainConfig, folders: Sequence[Path], tokenizer: Tokenizer | None
) -> dict[Path, Prepared] | None:
    """The texts in `folders` if all are complete and were made for this recipe, else None."""
    found = {}
    for folder in folders:
        try:
            part = open_prepared(folder)
        except DataError:
            return None
        tokenizer = tokenizer or part.tokenizer
        same = part.tokenizer.fingerprint == tokenizer.fingerprint
        if not same or part.meta.get("key") != _key(config, tokenizer):
            return None
        found[folder] = part
    return found


def _key(config: TrainConfig, tokenizer: Tokenizer) -> str:
    """What the token files depend on."""
    data, kind = to_dict(config.data), to_dict(config.tokenizer)
    sets = [
        (part["prepared"], part["sources"], *filter(None, [part["messages_key"]]))
        for part in data.pop("mixture")
    ]
    for name in ("sampling", "sequence_length", "prepared"):
        del data[name]
    for name in ("path", "eos", "pad_to"):
        del kind[name]
    # Where an option is off, the key is the one from before there was the option.
    if data["on_error"] == "stop":
        del data["on_error"]
    if kind["train_bytes"] is None:
        del kind["train_bytes"]
    kind["chat_template"] = tokenizer.chat_template
    if data["messages_key"] is None:
        del data["messages_key"]
        if all(part.messages_key is None for part in config.data.mixture):
            del kind["chat_template"]
    return _digest([data, kind, tokenizer.fingerprint, *sets])


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
