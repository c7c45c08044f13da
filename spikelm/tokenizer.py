"""Text <-> token ids: our own byte-level BPE and plain bytes, and the tokenizers of other models.

In ours every byte has a token of its own, so any text and any bytes round-trip. The one special
token, `<|endoftext|>`, separates documents; it is only ever put in by its id, never by text. Both
are kept as a `tokenizer.json`. What another model's tokenizer needs beside its vocabulary is in
the section `spikelm` of its tokenizer_config.json.
"""

from __future__ import annotations

import builtins
import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.vocabulary import (
    BPE,
    BYTE_CHARACTERS,
    CHARACTER_BYTES,
    Characters,
    Vocabulary,
    World,
    is_character_table,
)

V = TypeVar("V", bound=Vocabulary)

EOS = "<|endoftext|>"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
_KINDS: dict[str, type[BPE] | type[World] | type[Characters]] = {
    kind.kind: kind for kind in (BPE, World, Characters)
}
FILES = (*(kind.file for kind in _KINDS.values()), CONFIG, SPECIAL_TOKENS_MAP)
"""The files that `Tokenizer.save` may write, besides a chat template."""

BASE_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ message['content'] }}\n
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
"""What conversations with a model look like where nothing else says so."""

# Words with the space before them, single digits, punctuation, and line ends together with the
# indentation that follows: 2.63 bytes per token on the built-in corpus at 1024 tokens, where
# GPT-2's pattern has 2.48.
_PATTERN = (
    r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rules:
    """How the documents of an imported model begin and end, in its ids."""

    bos_id: int
    eos_id: int
    stop_ids: frozenset[int]
    prompt_prefix: tuple[int, ...]
    resets: bool = False
    """Whether a model forgets at `eos_id` what was before it."""


@dataclass(frozen=True)
class Companions:
    """What lies beside an imported vocabulary and is kept with it."""

    config: Mapping[str, Any]
    """tokenizer_config.json."""
    special_tokens_map: Mapping[str, Any]
    chat_template: str | None

    def token(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, ..., or None."""
        token = self.config.get(name, self.special_tokens_map.get(name))
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None


class Tokenizer:
    """Text or bytes to ids 0..vocab_size-1 and back; build one with a class method."""

    vocab_size: int
    bos_id: int
    """Begins a document and stands for an empty prompt; in ours it is `eos_id`."""
    eos_id: int
    """Ends a document; in ours it separates documents and stands for no text."""
    stop_ids: frozenset[int]
    """The ids that end an answer; `eos_id` is one of them if the model has such a token."""
    prompt_prefix: tuple[int, ...]
    """What goes before the ids of a prompt's text."""
    chat_template: str | None
    """The template (jinja) of conversations, where the model has one of its own."""
    special_tokens: Mapping[str, str]
    """`bos_token` and `eos_token` as chat templates write them, where they exist."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        rules: Rules | None = None,
        companions: Companions | None = None,
    ) -> None:
        """Without `rules` it is one of ours. Raises: CheckpointError if it then has no EOS."""
        self._vocabulary = vocabulary
        self._rules = rules
        self._companions = companions or Companions({}, {}, None)
        if rules is None:
            eos_id = vocabulary.id_of(EOS)
            if eos_id is None:
                raise CheckpointError(f"it has no token {EOS!r}")
            rules = Rules(eos_id, eos_id, frozenset({eos_id}), (eos_id,))
            self.special_tokens = {"bos_token": EOS, "eos_token": EOS}
        else:
            names = {name: self._companions.token(name) for name in ("bos_token", "eos_token")}
            self.special_tokens = {
                name: token
                for name, token in names.items()
                if token is not None and vocabulary.id_of(token) is not None
            }
        self.vocab_size = len(vocabulary.token_bytes)
        self.bos_id, self.eos_id = rules.bos_id, rules.eos_id
        self.stop_ids, self.prompt_prefix = rules.stop_ids, rules.prompt_prefix
        self.chat_template = self._companions.chat_template

    @property
    def imported(self) -> bool:
        """Whether it is another model's."""
        return self._rules is not None

    @property
    def lossless(self) -> bool:
        """Whether any text and any bytes round-trip, which ours do. A normalizer, a space put in
        front or characters without a token lose some: bits per byte then count other bytes.
        """
        return self._vocabulary.lossless

    @property
    def reset_id(self) -> int | None:
        """The id at which a model forgets what was before it: those trained here do at `eos_id`."""
        return self.eos_id if self._rules is None or self._rules.resets else None

    def fits(self, num_rows: int) -> bool:
        """Whether a model with so many embeddings can have it; many are padded."""
        return self.vocab_size <= num_rows

    def separated(self) -> Tokenizer:
        """The same vocabulary, to train a model on: as in ours, `eos_id` begins every document and
        every prompt, and what was before it is forgotten.

        Raises: ConfigError if that token stands for text.
        """
        if self._rules is None or self._rules.resets:
            return self
        if self.decode_bytes([self.eos_id]):
            raise ConfigError(
                f"the token that separates documents stands for {self.decode([self.eos_id])!r}; "
                "name one that no text has (tokenizer.eos)"
            )
        first = self.eos_id
        rules = Rules(first, first, self.stop_ids | {first}, (first,), resets=True)
        return Tokenizer(self._vocabulary, rules, self._companions)

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same ids, with `template` (jinja) for conversations."""
        companions = replace(self._companions, chat_template=template)
        return Tokenizer(self._vocabulary, self._rules, companions)

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
            initial_alphabet=sorted(BYTE_CHARACTERS),
            show_progress=False,
        )
        valid = (text.encode(errors="replace").decode() for text in texts)
        backend.train_from_iterator(valid, trainer)
        return cls(_own_vocabulary(backend))

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token per byte, whose id is the byte; `eos_id` is 256."""
        backend = _backend(models.BPE(vocab={**CHARACTER_BYTES, EOS: 256}, merges=[]))
        backend.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
        return cls(_own_vocabulary(backend))

    def encode(
        self, text: str | builtins.bytes, *, special: bool = False, continues: bool = False
    ) -> list[int]:
        """The ids of `text`, without `prompt_prefix`.

        Text that looks like a special token is text, unless `special`, which a chat template's
        text needs (see `as_text`). With `continues` the text goes on from another one: it gets no
        space in front, which sentencepiece vocabularies put there. Bytes that are not UTF-8 get
        single-byte tokens, or U+FFFD where an imported vocabulary has none.

        Raises: DataError for a character that has no token and none that stands for it.
        """
        return self._vocabulary.encode(text, special=special, continues=continues)

    def as_text(self, text: str) -> str:
        """`text` so marked that `encode(special=True)` reads special tokens in it as text.

        For what a user puts into a chat template. The marks, U+FDD0, leave no token.
        """
        return self._vocabulary.as_text(text)

    def decode_bytes(self, ids: Iterable[int]) -> builtins.bytes:
        """The bytes the ids stand for, those of a + b being those of a and then those of b.

        Ids beyond an imported vocabulary stand for nothing: its model has rows for them.
        Raises: DataError for an id outside the vocabulary.
        """
        return b"".join(map(self._id_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text the ids stand for, from its beginning; invalid UTF-8 becomes U+FFFD."""
        data = self.decode_bytes(ids)
        if self._vocabulary.leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time, of a text that goes on from another one."""
        return StreamDecoder(self)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides ids."""
        vocabulary = self._vocabulary
        content: list[object]
        if self._rules is None:
            assert isinstance(vocabulary, BPE)
            content = vocabulary.vocab_and_merges
        else:
            content = [vocabulary.content, self.bos_id, self.eos_id, self.prompt_prefix]
            content += [True] if self._rules.resets else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the vocabulary, and the tokenizer_config.json that transformers reads.

        transformers has the same ids, except for World and character vocabularies, which it does
        not know. An imported tokenizer keeps its own files and brings its chat template along.
        """
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary, companions = self._vocabulary, self._companions
        (folder / vocabulary.file).write_text(vocabulary.source, encoding="utf-8")
        _write_json(folder / CONFIG, self._config())
        if companions.special_tokens_map:
            _write_json(folder / SPECIAL_TOKENS_MAP, companions.special_tokens_map)
        if companions.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(companions.chat_template, encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        if self._rules is None:
            return {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": EOS,
                "eos_token": EOS,
                "pad_token": EOS,
                "padding_side": "left",
                "split_special_tokens": True,
                "clean_up_tokenization_spaces": False,
            }
        config = dict(self._companions.config)
        # Code that is not in the folder.
        config.pop("auto_map", None)
        if isinstance(self._vocabulary, BPE):
            # The class that takes tokenizer.json as it is; others build their own from its tokens.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("padding_side", "left")
        config["spikelm"] = {
            "vocabulary": self._vocabulary.kind,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "stop_ids": sorted(self.stop_ids),
            "prompt_prefix": list(self.prompt_prefix),
            "resets": self._rules.resets,
        }
        return config

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads the tokenizer of a model folder, ours or another model's.

        Raises: CheckpointError if there is none, or it is corrupt or of an unknown kind.
        """
        return cls._from_folder(Path(folder), None)

    @classmethod
    def from_file(cls, path: Path, *, eos: str | None = None) -> Tokenizer:
        """Reads a model folder, a tokenizer.json, rwkv_vocab_*.txt or a JSON of characters.

        `eos` is the token that ends a document, where the files beside it do not say so. Without
        both it is `<|endoftext|>`; in a JSON of characters none is, and line ends separate
        documents. Raises: CheckpointError as `load` does.
        """
        path = Path(path)
        if path.is_dir() or path.name == BPE.file:
            return cls._from_folder(path if path.is_dir() else path.parent, eos)
        if path.suffix == ".txt":
            return cls._from_vocabulary(_read(path, World), eos)
        if path.suffix != ".json":
            raise CheckpointError(
                f"{path} is no tokenizer; give a model folder, a tokenizer.json, "
                "rwkv_vocab_*.txt or a JSON of characters"
            )
        if is_character_table(_parsed(path)):
            return cls._from_vocabulary(_read(path, Characters), eos)
        return cls._from_json(path, {}, eos)

    @classmethod
    def _from_folder(cls, folder: Path, eos: str | None) -> Tokenizer:
        config = _optional(folder / CONFIG)
        kept = config.get("spikelm")
        if kept is not None:
            return cls._from_kept(folder, config, kept, eos)
        if (folder / BPE.file).exists():
            return cls._from_json(folder / BPE.file, config, eos)
        worlds = sorted(folder.glob("rwkv_vocab*.txt"))
        if len(worlds) == 1:
            return cls._from_vocabulary(_read(worlds[0], World), eos, _companions(folder, config))
        if (folder / "tokenizer.model").exists():
            raise CheckpointError(
                f"{folder} has a tokenizer.model but no tokenizer.json; let transformers write it: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise CheckpointError(f"no tokenizer.json in {folder}; is it a model folder?")

    @classmethod
    def _from_kept(
        cls, folder: Path, config: dict[str, Any], kept: Any, eos: str | None
    ) -> Tokenizer:
        """What `save` wrote of an imported tokenizer."""
        path = folder / CONFIG
        try:
            kind = _KINDS[kept["vocabulary"]]
            rules = Rules(
                bos_id=int(kept["bos_id"]),
                eos_id=int(kept["eos_id"]),
                stop_ids=frozenset(map(int, kept["stop_ids"])),
                prompt_prefix=tuple(map(int, kept["prompt_prefix"])),
                resets=bool(kept.get("resets", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: spikelm: {_one_line(error)}; import it again") from None
        vocabulary = _read(folder / kind.file, kind)
        if eos is not None:
            eos_id = _id_of(vocabulary, eos)
            rules = Rules(rules.bos_id, eos_id, rules.stop_ids | {eos_id}, rules.prompt_prefix)
        _check_ids(path, vocabulary, rules)
        return cls(vocabulary, rules, _companions(folder, config))

    @classmethod
    def _from_json(cls, path: Path, config: dict[str, Any], eos: str | None) -> Tokenizer:
        data = _parsed(path)
        if _is_ours(data):
            if eos not in (None, EOS):
                raise CheckpointError(f"{path} ends documents with {EOS!r}, not {eos!r}")
            return cls._own(path, data)
        vocabulary = _read(path, BPE)
        folder = path.parent if path.name == BPE.file else None
        companions = _companions(folder, config)
        rules = _imported_rules(vocabulary, companions, folder, eos)
        _check_ids(path, vocabulary, rules)
        return cls(vocabulary, rules, companions)

    @classmethod
    def _own(cls, path: Path, data: dict[str, Any]) -> Tokenizer:
        problem = _not_ours(data)
        if problem is not None:
            raise CheckpointError(f"{path} is not a spikelm tokenizer: {problem}")
        try:
            vocabulary = BPE(_text(path))
            _check_bytes(vocabulary)
            companions = Companions({}, {}, _template_in(path.parent))
            tokenizer, kept = cls(vocabulary, companions=companions), vocabulary.lossless
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise CheckpointError(f"{path} is corrupt: {_one_line(error)}") from None
        if not kept:
            raise CheckpointError(f"{path} is not a spikelm tokenizer: it does not keep every byte")
        return tokenizer

    @classmethod
    def _from_vocabulary(
        cls, vocabulary: Vocabulary, eos: str | None, companions: Companions | None = None
    ) -> Tokenizer:
        """A World or character vocabulary with the rules of the released models."""
        eos_id = None if eos is None else _id_of(vocabulary, eos)
        if isinstance(vocabulary, World):
            # Documents were separated by 0 in training, so a prompt begins with it.
            first, stops = 0, {0}
        else:
            # Nothing ends a text; prompts of the released models begin with a line end.
            first, stops = _id_of(vocabulary, "\n") if eos_id is None else eos_id, set()
        if eos_id is not None:
            stops = {eos_id}
        rules = Rules(first, first if eos_id is None else eos_id, frozenset(stops), (first,))
        return cls(vocabulary, rules, companions)

    def _id_bytes(self, token_id: int) -> builtins.bytes:
        if 0 <= token_id < self.vocab_size:
            return self._vocabulary.token_bytes[token_id]
        if token_id >= 0 and self.imported:
            return b""
        raise DataError(f"token id {token_id} is outside 0..{self.vocab_size - 1}")


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


def _own_vocabulary(backend: Backend) -> BPE:
    # In transformers a text gets its start-of-document token as `generate.prompt_ids` gives it.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A",
        pair=f"{EOS} $A {EOS} $B",
        special_tokens=[(EOS, backend.token_to_id(EOS))],
    )
    return BPE(backend.to_str(pretty=True))


def _is_ours(data: Any) -> bool:
    """Whether a parsed tokenizer.json puts our end-of-document token, alone, before a text."""
    post = data.get("post_processor") if isinstance(data, dict) else None
    return isinstance(post, dict) and post.get("single") == [
        {"SpecialToken": {"id": EOS, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]


def _not_ours(data: dict[str, Any]) -> str | None:
    """Why a parsed tokenizer.json that looks like one of ours is none, or None."""
    if not isinstance(data.get("model"), dict):
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


def _check_bytes(vocabulary: BPE) -> None:
    """Every byte has a token, and every token but the special one stands for bytes."""
    for character in BYTE_CHARACTERS:
        if vocabulary.id_of(character) is None:
            raise CheckpointError(f"it has no token {character!r}")
    for token_id, token in enumerate(vocabulary.tokens):
        if token != EOS and (token is None or not CHARACTER_BYTES.keys() >= set(token)):
            raise CheckpointError(f"token {token_id} is {token!r}, which does not stand for bytes")


def _imported_rules(
    vocabulary: BPE, companions: Companions, folder: Path | None, eos: str | None
) -> Rules:
    """The rules that a folder in the layout of transformers gives.

    An answer ends at the ids of generation_config.json, else config.json, and at the tokenizer's
    `eos_token`; the first of them ends a document. A document begins as tokenizer.json has it.
    """
    sources = [_optional(folder / f) for f in ("generation_config.json", "config.json") if folder]
    stops = next(filter(None, (_ids(source.get("eos_token_id")) for source in sources)), [])
    token = companions.token("eos_token") or (EOS if not stops else None)
    if token is not None and vocabulary.id_of(token) is not None:
        stops = [*stops, _id_of(vocabulary, token)]
    if eos is not None:
        stops = [_id_of(vocabulary, eos), *stops]
    if not stops:
        raise CheckpointError(
            "nothing says which token ends a document; give it by name (eos), or put "
            "generation_config.json or tokenizer_config.json beside tokenizer.json"
        )
    prefix = vocabulary.prefix
    bos = companions.token("bos_token")
    bos_id = vocabulary.id_of(bos) if bos is not None else None
    adds = companions.config.get("add_bos_token")
    if adds is not None:
        prefix = (bos_id,) if adds and bos_id is not None else ()
    begins = [*prefix, *([bos_id] if bos_id is not None else [])]
    begins += [i for source in sources for i in _ids(source.get("bos_token_id"))]
    return Rules((begins or stops)[0], stops[0], frozenset(stops), prefix)


def _ids(value: Any) -> list[int]:
    """The ids in an `eos_token_id`, which is an id, a list of them or nothing."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _id_of(vocabulary: Vocabulary, token: str) -> int:
    token_id = vocabulary.id_of(token)
    if token_id is None:
        raise CheckpointError(f"the vocabulary has no token {token!r}, which should end documents")
    return token_id


def _check_ids(path: Path, vocabulary: Vocabulary, rules: Rules) -> None:
    size = len(vocabulary.token_bytes)
    for token_id in (rules.bos_id, rules.eos_id, *rules.stop_ids, *rules.prompt_prefix):
        if not 0 <= token_id < size:
            raise CheckpointError(
                f"{path}: a document begins or ends with {token_id}, but the ids are 0..{size - 1}"
            )


def _companions(folder: Path | None, config: dict[str, Any]) -> Companions:
    if folder is None:
        return Companions(config, {}, None)
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several by name, as transformers wrote them before 5.
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    own = template if isinstance(template, str) else None
    return Companions(config, _optional(folder / SPECIAL_TOKENS_MAP), _template_in(folder) or own)


def _template_in(folder: Path) -> str | None:
    path = folder / CHAT_TEMPLATE
    return _text(path) if path.exists() else None


def _read(path: Path, kind: Callable[[str], V]) -> V:
    """Raises: CheckpointError that names the file."""
    text = _text(path)
    try:
        return kind(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a tokenizer spikelm can use: {error}") from None
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
        raise CheckpointError(f"{path} is corrupt: {_one_line(error)}") from None


def _text(path: Path) -> str:
    """The text of a file; JSON may be UTF-16, as SpikeGPT's tables of characters are."""
    try:
        data = path.read_bytes()
        return data.decode(json.detect_encoding(data) if path.suffix == ".json" else "utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is corrupt: {_one_line(error)}") from None


def _parsed(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is corrupt: {_one_line(error)}") from None


def _optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without the file."""
    if not path.exists():
        return {}
    data = _parsed(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
