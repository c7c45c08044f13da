"""Text <-> token ids: byte-level BPE and plain bytes, both kept as a `tokenizer.json`.

Every byte has a token of its own, so any text and any bytes round-trip. The one special token,
`<|endoftext|>`, separates documents; it is only ever put in by its id, never by text.
"""

from __future__ import annotations

import builtins
import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from spikelm.errors import CheckpointError, ConfigError, DataError

EOS = "<|endoftext|>"

# Words with the space before them, single digits, punctuation, and line ends together with the
# indentation that follows: 2.63 bytes per token on the built-in corpus at 1024 tokens, where
# GPT-2's pattern has 2.48.
_PATTERN = (
    r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in kept else next(moved)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
_CHARACTER_BYTES = {character: byte for byte, character in enumerate(_BYTE_CHARACTERS)}
# What a foreign tokenizer.json is likely to lose: single bytes, layout, special-looking text.
_PROBE = bytes(range(256)) + f"  A\r\n\t{EOS} \u00e9\u0065\u0301\u4e16 12".encode()


class Tokenizer:
    """Text or bytes to ids 0..vocab_size-1 and back; build one with a class method.

    `eos_id` separates documents and starts an empty prompt; it stands for no text.
    """

    def __init__(self, backend: Backend) -> None:
        # Text that looks like the special token is text.
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = self._id_of(EOS)
        self._bytes = [self._token_bytes(token_id) for token_id in range(self.vocab_size)]
        self._byte_ids = [self._id_of(character) for character in _BYTE_CHARACTERS]

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE learned from `texts`; the same texts give the same tokenizer.

        The vocabulary is smaller than `vocab_size` if the texts run out of repeated pairs.

        Raises: ConfigError if `vocab_size` has no room for the 256 bytes and the special token.
        """
        if vocab_size < 257:
            raise ConfigError(f"vocab_size: {vocab_size} given; allowed: at least 257 for BPE")
        backend = _backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[EOS],
            initial_alphabet=sorted(_BYTE_CHARACTERS),
            show_progress=False,
        )
        valid = (text.encode(errors="replace").decode() for text in texts)
        backend.train_from_iterator(valid, trainer)
        return cls(backend)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token per byte, whose id is the byte; `eos_id` is 256."""
        backend = _backend(models.BPE(vocab={**_CHARACTER_BYTES, EOS: 256}, merges=[]))
        backend.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
        return cls(backend)

    def encode(self, text: str | builtins.bytes) -> list[int]:
        """The ids of `text`, without `eos_id`; bytes that are not UTF-8 get single-byte tokens."""
        if isinstance(text, str):
            if not _SURROGATE.search(text):
                return self._encode_valid(text)
            text = text.encode("utf-8", "surrogatepass")
        # Invalid bytes come out as single surrogates U+DC80..U+DCFF, valid text as itself.
        escaped = text.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        start = 0
        for match in _SURROGATE.finditer(escaped):
            ids += self._encode_valid(escaped[start : match.start()])
            ids.append(self._byte_ids[ord(match[0]) - 0xDC00])
            start = match.end()
        return ids + self._encode_valid(escaped[start:])

    def decode_bytes(self, ids: Iterable[int]) -> builtins.bytes:
        """The bytes the ids stand for. Raises: DataError for an id outside the vocabulary."""
        return b"".join(map(self._id_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text the ids stand for, invalid UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the vocabulary, with its ids, and the merges."""
        model = json.loads(self._backend.to_str())["model"]
        content = [sorted(self._backend.get_vocab().items()), model["merges"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, and the tokenizer_config.json that transformers reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        # In transformers a text gets its start-of-document token as `generate.prompt_ids` gives it.
        self._backend.post_processor = processors.TemplateProcessing(
            single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, self.eos_id)]
        )
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads the tokenizer.json of a model folder.

        Raises: CheckpointError if it is missing, corrupt or not a lossless byte-level tokenizer.
        """
        path = Path(folder) / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text)
        except FileNotFoundError:
            raise CheckpointError(f"no tokenizer.json in {folder}; is it a model folder?") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is corrupt: {_one_line(error)}") from None
        problem = _foreign(data)
        if problem is not None:
            raise CheckpointError(f"{path} is not a spikelm tokenizer: {problem}")
        try:
            tokenizer = cls(Backend.from_str(text))
            kept = tokenizer.decode_bytes(tokenizer.encode(_PROBE)) == _PROBE
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise CheckpointError(f"{path} is corrupt: {_one_line(error)}") from None
        if not kept:
            raise CheckpointError(f"{path} is not a spikelm tokenizer: it does not keep every byte")
        return tokenizer

    def _encode_valid(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _id_bytes(self, token_id: int) -> builtins.bytes:
        if not 0 <= token_id < self.vocab_size:
            raise DataError(f"token id {token_id} is outside 0..{self.vocab_size - 1}")
        return self._bytes[token_id]

    def _id_of(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"it has no token {token!r}")
        return token_id

    def _token_bytes(self, token_id: int) -> builtins.bytes:
        if token_id == self.eos_id:
            return b""
        token = self._backend.id_to_token(token_id)
        if token is None or not _CHARACTER_BYTES.keys() >= set(token):
            raise CheckpointError(f"token {token_id} is {token!r}, which does not stand for bytes")
        return bytes(_CHARACTER_BYTES[character] for character in token)


class StreamDecoder:
    """Text piece by piece: what has been pushed so far, up to the last whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, often none or several."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What an unfinished character at the end becomes; the decoder starts afresh."""
        return self._decoder.decode(b"", final=True)


def _backend(model: models.Model) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _foreign(data: Any) -> str | None:
    """Why a parsed tokenizer.json cannot be one of ours, or None."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        return "it has no model"
    if data["model"].get("type") != "BPE":
        return f"its model is {data['model'].get('type')!r}, not 'BPE'"
    items = data.get("added_tokens")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return "its special tokens are unreadable"
    added = [item.get("content") for item in items]
    if added != [EOS]:
        return f"its special tokens are {added}, not ['{EOS}']"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
