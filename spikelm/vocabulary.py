"""Vocabularies: the tokens of a model, and how text becomes their ids.

Three kinds: `tokenizer.json` files of the tokenizers library (byte-level BPE as in GPT-2, and
sentencepiece-style BPE with byte fallback as in Llama 2), RWKV's World vocabulary, and one token
per character. What begins and ends a document is not known here: `spikelm.tokenizer`.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from tokenizers import Tokenizer as Backend

from spikelm.errors import CheckpointError, DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
# Keeps a special token's text apart (`as_text`). A noncharacter: it stands for nothing in text.
_GUARD = "\ufdd0"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# What stands for a space in sentencepiece vocabularies.
_SPACE = "\u2581"


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in kept else next(moved)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
# What a vocabulary is likely to lose: single bytes, layout, special-looking text, decomposition.
_PROBE = bytes(range(256)) + "  A\r\n\t<|endoftext|> \u00e9\u0065\u0301\u4e16 12".encode()


class Vocabulary(ABC):
    """The tokens 0..size-1 and the ids of a text."""

    kind: ClassVar[str]
    file: ClassVar[str]
    """What `save` writes."""
    token_bytes: list[bytes]
    """What each id stands for; nothing for special tokens and for ids without a token."""
    special: frozenset[str] = frozenset()
    """The text of the special tokens."""
    leading_space = False
    """Whether a text gets a space put in front (sentencepiece's dummy prefix)."""
    prefix: tuple[int, ...] = ()
    """The special ids that the vocabulary's own file puts before a text."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token written as text, or None."""

    @property
    @abstractmethod
    def content(self) -> object:
        """All that decides the ids of a text, as JSON types."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The text of `file`."""

    @abstractmethod
    def _encode(self, text: str, special: bool, continues: bool) -> list[int]:
        """The ids of text without surrogates."""

    @abstractmethod
    def _encode_byte(self, byte: int) -> list[int]:
        """The ids of a byte that is no part of a character."""

    def encode(self, text: str | bytes, *, special: bool, continues: bool) -> list[int]:
        """The ids of `text`; see `Tokenizer.encode`."""
        if isinstance(text, str):
            if not _SURROGATE.search(text):
                return self._encode(text, special, continues)
            text = text.encode("utf-8", "surrogatepass")
        # Invalid bytes come out as single surrogates U+DC80..U+DCFF, valid text as itself.
        escaped = text.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        start = 0
        for match in _SURROGATE.finditer(escaped):
            ids += self._encode(escaped[start : match.start()], special, continues or start > 0)
            ids += self._encode_byte(ord(match[0]) - 0xDC00)
            start = match.end()
        return ids + self._encode(escaped[start:], special, continues or start > 0)

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Whether every text and all bytes come back as they were."""

    def as_text(self, text: str) -> str:
        """`text` in a form of which `encode(special=True)` reads special tokens as text, too."""
        if not self.special:
            return text
        return self._special_starts.sub(lambda match: match[0] + _GUARD, text)

    @cached_property
    def _special_starts(self) -> re.Pattern[str]:
        # Only the first character is consumed, so that overlapping occurrences are found.
        starts = (f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in sorted(self.special))
        return re.compile("|".join(starts))


class BPE(Vocabulary):
    """A tokenizer.json whose model is BPE over bytes, or over characters with byte fallback.

    Raises: CheckpointError naming what in it is not understood.
    """

    kind = "bpe"
    file = "tokenizer.json"

    def __init__(self, source: str) -> None:
        data = json.loads(source)
        problem = _unreadable(data)
        if problem is not None:
            raise CheckpointError(problem)
        self._source = source
        self._backend = _plain(Backend.from_str(source))
        # Text that looks like a special token is text.
        self._backend.encode_special_tokens = True
        self._ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.special = frozenset(t["content"] for t in data["added_tokens"] if t.get("special"))
        bytes_of, is_byte_level = _decoder(data.get("decoder"))
        self.tokens: list[str | None] = [None] * (max(self._ids.values()) + 1)
        for token, token_id in self._ids.items():
            self.tokens[token_id] = token
        self.token_bytes = [
            b"" if token is None or token in self.special else bytes_of(token)
            for token in self.tokens
        ]
        names = BYTE_CHARACTERS if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        self._byte_ids = [self._ids.get(name) for name in names]
        encoding = self._backend.encode("a")
        mask: list[int] = encoding.special_tokens_mask
        self.prefix = tuple(encoding.ids[: mask.index(0)] if 0 in mask else ())
        self._set_leading_space(is_byte_level)
        self._is_exact = data.get("normalizer") is None and not any(
            token.get("lstrip") or token.get("rstrip")
            for token in data["added_tokens"]
            if not token.get("special")
        )

    def _set_leading_space(self, is_byte_level: bool) -> None:
        read = b"".join(self.token_bytes[i] for i in self._encode("a", False, False))
        self.leading_space = read == b" a"
        # A text that goes on from another one is read after this, which no token joins with it.
        self._anchor = len(self._encode("\n", False, False)) if self.leading_space else 0
        stable = (
            not is_byte_level
            and self._byte_ids[0x0A] is not None
            and self._encode("\n", False, False)[-1:] == [self._byte_ids[0x0A]]
        )
        if read != b"a" and not (self.leading_space and stable):
            raise CheckpointError(f"it reads 'a' as {read!r}")

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    @property
    def content(self) -> object:
        data = json.loads(self._backend.to_str())
        return {key: data[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}

    @property
    def source(self) -> str:
        return self._source

    @cached_property
    def lossless(self) -> bool:
        ids = self.encode(_PROBE, special=False, continues=False)
        return self._is_exact and b"".join(self.token_bytes[i] for i in ids) == _PROBE

    @property
    def vocab_and_merges(self) -> list[Any]:
        """The sorted (token, id) pairs and the merges."""
        merges = json.loads(self._backend.to_str())["model"]["merges"]
        return [sorted(self._ids.items()), merges]

    def _encode(self, text: str, special: bool, continues: bool) -> list[int]:
        if not text:
            return []
        backend = self._parsing if special else self._backend
        anchored = continues and self.leading_space
        ids: list[int] = backend.encode(
            "\n" + text if anchored else text, add_special_tokens=False
        ).ids
        return ids[self._anchor :] if anchored else ids

    def _encode_byte(self, byte: int) -> list[int]:
        token_id = self._byte_ids[byte]
        return [token_id] if token_id is not None else self._encode("\ufffd", False, True)

    @cached_property
    def _parsing(self) -> Backend:
        """Reads special tokens, but not those that `as_text` has taken apart."""
        data = json.loads(self._source)
        for token in data["added_tokens"]:
            # Looked for in the text as given: the normalizer puts what was taken apart together.
            token["normalized"] = token.get("normalized", True) and not token.get("special")
        joins = {"type": "Replace", "pattern": {"String": _GUARD}, "content": ""}
        normalizers = [joins] + ([data["normalizer"]] if data.get("normalizer") else [])
        data["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        return _plain(Backend.from_str(json.dumps(data)))


class World(Vocabulary):
    """RWKV's World vocabulary: at each place the longest token that fits, over bytes.

    `source` has a line `id literal length` per token, the literal a Python str or bytes, as in
    rwkv_vocab_v20230424.txt. Id 0 is no line: it ends a document.

    Raises: CheckpointError naming the first line that cannot be read.
    """

    kind = "world"
    file = "rwkv_vocab.txt"

    def __init__(self, source: str) -> None:
        self._source = source
        self._ids: dict[bytes, int] = {}
        for number, line in enumerate(source.rstrip("\n").split("\n"), 1):
            token_id, token = _world_line(line, number)
            if token in self._ids:
                raise CheckpointError(f"line {number}: {token!r} is there twice")
            self._ids[token] = token_id
        self.token_bytes = [b""] * (max(self._ids.values()) + 1)
        for token, token_id in self._ids.items():
            if self.token_bytes[token_id]:
                raise CheckpointError(f"id {token_id} has two tokens")
            self.token_bytes[token_id] = token
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        if missing:
            raise CheckpointError(f"it has no token for the byte {missing[0]}")
        # The lengths of the tokens that begin with these two bytes, longest first.
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) > 1:
                lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {pair: sorted(found, reverse=True) for pair, found in lengths.items()}

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token.encode())

    @property
    def lossless(self) -> bool:
        return True

    @property
    def content(self) -> object:
        return [token.hex() for token in self.token_bytes]

    @property
    def source(self) -> str:
        return self._source

    def encode(self, text: str | bytes, *, special: bool, continues: bool) -> list[int]:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        ids, start = [], 0
        while start < len(data):
            for length in self._lengths.get(data[start : start + 2], ()):
                token_id = self._ids.get(data[start : start + length])
                if token_id is not None:
                    break
            else:
                token_id = self._ids[data[start : start + 1]]
            ids.append(token_id)
            start += len(self.token_bytes[token_id])
        return ids

    def _encode(self, text: str, special: bool, continues: bool) -> list[int]:
        return self.encode(text, special=special, continues=continues)

    def _encode_byte(self, byte: int) -> list[int]:
        return [self._ids[bytes([byte])]]


class Characters(Vocabulary):
    """One token per character; `source` is JSON, {"0": "\\n", "1": " ", ...}.

    A character that is not there becomes U+E083, or else a space, as in SpikeGPT's and RWKV's
    character models. Raises: CheckpointError if `source` is something else.
    """

    kind = "characters"
    file = "characters.json"

    def __init__(self, source: str) -> None:
        table = json.loads(source)
        if not is_character_table(table):
            raise CheckpointError('it is no table of characters {"0": "a", "1": "b", ...}')
        characters = [table[str(index)] for index in range(len(table))]
        self._ids = {character: index for index, character in enumerate(characters)}
        if len(self._ids) < len(characters):
            raise CheckpointError("a character has two ids")
        self.token_bytes = [c.encode("utf-8", "surrogatepass") for c in characters]
        self._unknown = self._ids.get("\ue083", self._ids.get(" "))

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    @property
    def lossless(self) -> bool:
        return False

    @property
    def content(self) -> object:
        return list(self._ids)

    @property
    def source(self) -> str:
        return json.dumps({str(index): c for c, index in self._ids.items()}, indent=0) + "\n"

    def _encode(self, text: str, special: bool, continues: bool) -> list[int]:
        return [self._id(character) for character in text]

    def _encode_byte(self, byte: int) -> list[int]:
        return [self._id("\ufffd")]

    def _id(self, character: str) -> int:
        token_id = self._ids.get(character, self._unknown)
        if token_id is None:
            raise DataError(
                f"the character {character!r} is not in the vocabulary, nor is a space, which "
                "would stand for it; remove it from the text"
            )
        return token_id


def is_character_table(data: Any) -> bool:
    """Whether parsed JSON is {"0": a character, "1": a character, ...}."""
    return (
        isinstance(data, dict)
        and len(data) > 0
        and data.keys() == {str(index) for index in range(len(data))}
        and all(isinstance(c, str) and len(c) == 1 for c in data.values())
    )


def _plain(backend: Backend) -> Backend:
    """The tokenizer without what only batches for training need."""
    backend.no_truncation()
    backend.no_padding()
    return backend


def _unreadable(data: Any) -> str | None:
    """Why a parsed tokenizer.json is not read here, or None."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        return "it has no model"
    model = data["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')!r}, not 'BPE'"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"its model has {name} {model[name]!r}, which is not supported"
    added = data.get("added_tokens")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]
        for token in added
    ):
        return "its special tokens are unreadable"
    return None


def _decoder(decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """What turns a token into bytes, and whether the vocabulary is byte-level."""
    steps = decoder if isinstance(decoder, dict) else {}
    found = steps.get("decoders", []) if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in found]
    if kinds == ["ByteLevel"]:
        return _byte_level, True
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    if replace in found and set(kinds) - {"Strip"} == {"Replace", "ByteFallback", "Fuse"}:
        return _sentencepiece, False
    shown = ", ".join(map(str, kinds))
    raise CheckpointError(
        f"its decoder is {shown}; supported: ByteLevel, and Replace, ByteFallback, Fuse, Strip"
    )


def _byte_level(token: str) -> bytes:
    try:
        return bytes(CHARACTER_BYTES[character] for character in token)
    except KeyError:
        # An added token is written as it is.
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte:
        return bytes.fromhex(byte[1])
    return token.replace(_SPACE, " ").encode()


def _world_line(line: str, number: int) -> tuple[int, bytes]:
    try:
        index, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
        if isinstance(token, bytes) and len(token) == int(length) > 0 < int(index):
            return int(index), token
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    raise CheckpointError(f"line {number} is {line[:40]!r}, not an id, a literal and its length")
