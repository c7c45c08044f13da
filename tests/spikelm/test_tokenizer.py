from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spikelm import corpus
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.tokenizer import EOS, Tokenizer

TEXTS = [
    'def read(path):\n    """Return the text of the file."""\n    return path.read_text()\n',
    "The file object is returned; the text of the file is read.\n\n  * a list item, 2024\n",
] * 4

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(TEXTS, 300)
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
# Pieces of characters, so that valid, cut and invalid sequences all come up often.
fragments = st.sampled_from(
    [b"\xc3", b"\xa9", b"\xe4\xb8", b"\x96", b"\xf0\x9f", b"\x98\x80", b"\xed\xa0\x80", b"\xff"]
    + [b"the file", b"\n    ", EOS.encode()]
)
any_bytes = st.one_of(st.binary(max_size=40), st.lists(fragments, max_size=12).map(b"".join))


@both
@settings(deadline=None)
@given(data=any_bytes)
def test_encode_any_bytes_round_trip(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == data.decode(errors="replace")


@both
@settings(deadline=None)
@given(text=st.text(st.characters(), max_size=60))
def test_encode_any_text_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode("utf-8", "surrogatepass")


@both
@settings(deadline=None)
@given(data=st.data())
def test_stream_equals_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40),
            any_bytes.map(tokenizer.encode),
        )
    )
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_stream_waits_for_the_whole_character() -> None:
    stream = BYTES.stream()
    assert [stream.push(b) for b in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.push(0xE2) == ""
    assert stream.push(ord("x")) == "\ufffdx"
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"


@both
def test_special_looking_text_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOS}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{EOS}b"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"


@both
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {token_id} is outside 0"):
            tokenizer.decode([token_id])


def test_bytes_ids_are_the_bytes() -> None:
    assert BYTES.encode(bytes(range(256))) == list(range(256))
    assert (BYTES.eos_id, BYTES.vocab_size) == (256, 257)


def test_train_bpe_learns_words_and_layout() -> None:
    assert 257 < BPE.vocab_size <= 300
    assert len(BPE.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])
    assert len(BPE.encode("\n    return")) <= 3
    assert len(BPE.encode("2024")) == 4
    with pytest.raises(ConfigError, match="256 given; allowed: at least 257"):
        Tokenizer.train_bpe(TEXTS, 256)
    assert Tokenizer.train_bpe([], 300).vocab_size == 257
    assert Tokenizer.train_bpe(["lone \ud800 surrogate"], 300).vocab_size == 257


def test_train_bpe_is_deterministic_between_processes() -> None:
    code = (
        "from spikelm.tokenizer import Tokenizer; import sys;"
        f"print(Tokenizer.train_bpe({TEXTS!r}, 300).fingerprint, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [BPE.fingerprint, "False"]
    assert Tokenizer.train_bpe(TEXTS, 290).fingerprint != BPE.fingerprint


@both
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "model")
    loaded = Tokenizer.load(tmp_path / "model")
    text = TEXTS[0] + EOS + "\u4e16 \xe9"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


@both
def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, f"a {EOS} b", "  two  spaces .\r\n\n\tx ?", "\u4e16\u754c e\u0301"):
        ids = tokenizer.encode(text)
        assert other(text).input_ids == [tokenizer.eos_id, *ids]
        assert other.decode(ids) == text
    assert other.eos_token_id == other.bos_token_id == other.pad_token_id == tokenizer.eos_id
    assert len(other) == tokenizer.vocab_size


def _drop_byte(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["a"]


def _other_model(data: dict[str, Any]) -> None:
    data["model"] = {"type": "WordLevel", "vocab": {EOS: 0}, "unk_token": EOS}


def _other_special(data: dict[str, Any]) -> None:
    data["added_tokens"][0]["content"] = "</s>"


def _strange_special(data: dict[str, Any]) -> None:
    data["added_tokens"] = ["</s>", 3]


def _lowercase(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Lowercase"}


def _strange_token(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["a b"] = 257


def _no_model(data: dict[str, Any]) -> None:
    data["model"] = None


def _bad_merge(data: dict[str, Any]) -> None:
    data["model"]["merges"] = [["zz", "y"]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_byte, "corrupt"),
        (_other_model, "its model is 'WordLevel', not 'BPE'"),
        (_other_special, r"its special tokens are \['</s>'\]"),
        (_strange_special, "its special tokens are unreadable"),
        (_lowercase, "does not keep every byte"),
        (_strange_token, "'a b', which does not stand for bytes"),
        (_no_model, "it has no model"),
        (_bad_merge, "corrupt"),
    ],
)
def test_load_refuses_foreign_files(
    damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    BYTES.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    damage(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_load_refuses_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer.json in"):
        Tokenizer.load(tmp_path / "nowhere")
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_bytes()
    for damaged in (b"", text[: len(text) // 2], b"\xff\xfe" + text, b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is"):
            Tokenizer.load(tmp_path)


# Other models' tokenizers, small, in exactly the structure of the released files.

SPEECH = [
    "The quick brown fox isn't slow; it's 2024 and we've 12 foxes.\n\n  The fox's den.\r\n",
    "def read(path):\n    return path.read_text()  # d\u00e9j\u00e0 vu, \u4e16\u754c\n\t",
] * 4
SAMPLES = [
    *SPEECH[:2],
    "the fox",
    " leading and trailing ",
    "a  b   c     d\n\n\n    e",
    "e\u0301 \u00e9 \U0001f600 \u4e16\u754c \u0e01",
    "12345 <|im_end|> <|endoftext|> </s><s> [INST] <think>hm</think>",
    "it's 'quoted' \u2581 <0x41>",
]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace("{1,3}", "")
Json = dict[str, Any]


def _added(content: str, token_id: int, *, special: bool = True, normalized: bool = False) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "id": token_id,
        "content": content,
        **flags,
        "normalized": normalized,
        "special": special,
    }


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": merges,
        **options,
    }


def _file(added: list[Json], model: Json, **parts: Any) -> Json:
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": added,
        **{name: parts.get(name) for name in names},
        "model": model,
    }


def _split(pattern: str) -> Json:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _byte_level(*, use_regex: bool = True) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _trained(pre_tokenizer: Any, alphabet: list[str], first: list[str]) -> tuple[Any, Any]:
    """Vocabulary and merges learned from SPEECH; the tokens `first` have the ids 0, 1, ..."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(first) + 400,
        min_frequency=2,
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(SPEECH, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], model["merges"]


def _trained_bytes(first: list[str], pattern: str, alphabet: list[str]) -> tuple[Any, Any]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _trained(tokenizers.pre_tokenizers.Sequence([split, byte_level]), alphabet, first)


ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _begin_with(token: str, token_id: int) -> Json:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def llama3() -> dict[str, Json]:
    vocab, merges = _trained_bytes([], _LLAMA3, ALPHABET)
    n = len(vocab)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    added = [_added(f"<|{name}|>", n + i) for i, name in enumerate(names)]
    post = [_byte_level(), _begin_with("<|begin_of_text|>", n)]
    return {
        "tokenizer.json": _file(
            added,
            _bpe(vocab, merges, ignore_merges=True),
            pre_tokenizer=_split(_LLAMA3),
            post_processor={"type": "Sequence", "processors": post},
            decoder=_byte_level(),
        ),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": True,
            "chat_template": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
            "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
            "{% endif %}",
        },
        "special_tokens_map.json": {"bos_token": {"content": "<|begin_of_text|>"}},
        "generation_config.json": {"bos_token_id": n, "eos_token_id": [n + 1, n + 4]},
    }


def qwen2() -> dict[str, Json]:
    vocab, merges = _trained_bytes([], _QWEN, ALPHABET)
    n = len(vocab)
    added = [_added(f"<|{t}|>", n + i) for i, t in enumerate(("endoftext", "im_start", "im_end"))]
    added += [_added(t, n + 3 + i, special=False) for i, t in enumerate(("<think>", "</think>"))]
    return {
        "tokenizer.json": _file(
            added,
            _bpe(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""),
            normalizer={"type": "NFC"},
            pre_tokenizer=_split(_QWEN),
            post_processor=_byte_level(use_regex=False),
            decoder=_byte_level(use_regex=False),
        ),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "chat_template": "{% if tools %}tools{% endif %}{% for m in messages %}<|im_start|>"
            "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        },
        "config.json": {"model_type": "qwen2", "bos_token_id": n, "eos_token_id": n + 2},
        "generation_config.json": {"bos_token_id": n, "eos_token_id": [n + 2, n]},
    }


def neox() -> dict[str, Json]:
    # As in the file of GPT-NeoX 20B, bytes that are in no UTF-8 text have no token.
    alphabet = [c for c in ALPHABET if c not in "\u00c0\u00c1\u00f5\u00f6\u00f7\u00f8\u00f9\u00fa"]
    vocab, merges = _trained_bytes([EOS, "<|padding|>"], _GPT2, alphabet)
    n = len(vocab)
    spaces = [_added(" " * k, n + 8 - k, special=False, normalized=True) for k in range(8, 1, -1)]
    return {
        "tokenizer.json": _file(
            [_added(EOS, 0), _added("<|padding|>", 1), *spaces],
            _bpe(vocab, [" ".join(merge) for merge in merges]),
            normalizer={"type": "NFC"},
            pre_tokenizer=_byte_level(),
            post_processor=_byte_level(),
            decoder=_byte_level(),
        )
    }


def llama2(*, legacy: bool = True) -> dict[str, Json]:
    """BPE over characters with byte fallback, as converted from sentencepiece."""
    specials = ["<unk>", "<s>", "</s>"]
    first = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    vocab, merges = _trained(words, ["\u2581"], first)
    for token in ("\n", "\r", "\t"):
        # sentencepiece keeps these as bytes.
        kept = {t: i for t, i in vocab.items() if token not in t}
        vocab = {t: i for i, t in enumerate(sorted(kept, key=kept.__getitem__))}
        merges = [merge for merge in merges if token not in "".join(merge)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
    normalizer["normalizers"].append(replace)
    metaspace = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    return {
        "tokenizer.json": _file(
            [_added(token, i) for i, token in enumerate(specials)],
            _bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
            normalizer=normalizer if legacy else None,
            pre_tokenizer=None if legacy else metaspace,
            post_processor=_begin_with("<s>", 1),
            decoder={"type": "Sequence", "decoders": steps},
        ),
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
        },
        "config.json": {"bos_token_id": 1, "eos_token_id": 2},
    }


FOREIGN: dict[str, dict[str, Json]] = {
    "llama3": llama3(),
    "qwen2": qwen2(),
    "neox": neox(),
    "llama2": llama2(),
    "llama2-metaspace": llama2(legacy=False),
}
every_foreign = pytest.mark.parametrize("name", FOREIGN)


def write(folder: Path, files: dict[str, Json]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def backend_of(files: dict[str, Json]) -> Any:
    """What the tokenizers library itself makes of the file, without its truncation."""
    data = {**files["tokenizer.json"], "truncation": None}
    return tokenizers.Tokenizer.from_str(json.dumps(data))


@every_foreign
def test_foreign_ids_and_text_equal_the_library(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, FOREIGN[name]))
    other = backend_of(FOREIGN[name])
    assert tokenizer.imported
    assert tokenizer.vocab_size == other.get_vocab_size()
    for text in SAMPLES:
        other.encode_special_tokens = True
        ids = other.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokenizer.encode(text.encode()) == ids
        assert tokenizer.decode(ids) == other.decode(ids)
        other.encode_special_tokens = False
        parsed = other.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == parsed
        assert tokenizer.decode(parsed) == other.decode(parsed)
        # What was marked is text again, whatever the special tokens are.
        assert tokenizer.encode(tokenizer.as_text(text), special=True) == ids
        prompt = other.encode(text).ids
        assert [*tokenizer.prompt_prefix, *parsed] == prompt


@every_foreign
def test_foreign_stream_and_bytes(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, FOREIGN[name]))
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        for cut in range(0, len(ids), 3):
            stream = tokenizer.stream()
            pieces = [stream.push(token_id) for token_id in ids[cut:]]
            whole = tokenizer.decode_bytes(ids[cut:]).decode(errors="replace")
            assert "".join(pieces) + stream.flush() == whole
    assert tokenizer.encode(b"") == tokenizer.encode("", special=True) == []
    broken = b"caf\xc3 \x80 fox \xed\xa0\x80."
    assert tokenizer.decode_bytes(tokenizer.encode(broken, continues=True)) == broken
    assert tokenizer.encode("a\ud800 fox") == tokenizer.encode(b"a\xed\xa0\x80 fox")
    beyond = [tokenizer.vocab_size, 10**6]
    assert tokenizer.decode([*beyond, *tokenizer.encode("a fox"), *beyond]) == "a fox"
    with pytest.raises(DataError, match="token id -1 is outside"):
        tokenizer.decode([-1])


def test_a_byte_without_a_token_becomes_the_replacement_character(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, FOREIGN["neox"]))
    assert tokenizer.decode_bytes(tokenizer.encode(b"a\xf5b")) == "a\ufffdb".encode()


@pytest.mark.parametrize("name", ["llama2", "llama2-metaspace"])
def test_a_text_that_continues_gets_no_space(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, FOREIGN[name]))
    assert tokenizer.decode_bytes(tokenizer.encode("fox")) == b" fox"
    for text in ("fox", " fox", "\nfox", "", "\u4e16 fox"):
        ids = tokenizer.encode(text, continues=True)
        assert tokenizer.decode_bytes(ids) == text.encode()
    # Nor does what comes after a byte that is no text.
    assert tokenizer.decode_bytes(tokenizer.encode(b"fox\xfffox")) == b" fox\xfffox"
    joined = [*tokenizer.encode("The quick"), *tokenizer.encode(" brown fox", continues=True)]
    assert joined == tokenizer.encode("The quick brown fox")


def test_marks_hold_for_normalized_special_tokens(tmp_path: Path) -> None:
    """As in older files of Llama 2."""
    data = FOREIGN["llama2"]["tokenizer.json"]
    added = [{**token, "normalized": True} for token in data["added_tokens"]]
    files = {**FOREIGN["llama2"], "tokenizer.json": {**data, "added_tokens": added}}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    text = "The fox</s>"
    assert tokenizer.encode(text, special=True) == [*tokenizer.encode("The fox"), 2]
    assert tokenizer.encode(tokenizer.as_text(text), special=True) == tokenizer.encode(text)


def test_marks_hold_for_overlapping_special_tokens(tmp_path: Path) -> None:
    data = FOREIGN["qwen2"]["tokenizer.json"]
    n = max(token["id"] for token in data["added_tokens"]) + 1
    added = [*data["added_tokens"], _added("xyx", n), _added("xyxz", n + 1)]
    files = {**FOREIGN["qwen2"], "tokenizer.json": {**data, "added_tokens": added}}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    for text in ("xyxyx", "xyxyxz", "<|im_<|im_end|>end|>"):
        marked = tokenizer.encode(tokenizer.as_text(text), special=True)
        assert marked == tokenizer.encode(text) != tokenizer.encode(text, special=True)


def test_rules_of_foreign_folders(tmp_path: Path) -> None:
    def rules(name: str) -> tuple[str | None, list[str | None], list[str | None], list[str | None]]:
        tokenizer = Tokenizer.load(write(tmp_path / name, FOREIGN[name]))
        text = backend_of(FOREIGN[name]).id_to_token
        assert tokenizer.eos_id in tokenizer.stop_ids
        assert tokenizer.reset_id is None
        assert tokenizer.decode([tokenizer.eos_id]) == ""
        return (
            text(tokenizer.bos_id),
            text(tokenizer.eos_id),
            sorted(map(text, tokenizer.stop_ids)),
            [*map(text, tokenizer.prompt_prefix)],
        )

    begin, end, eot = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    assert rules("llama3") == (begin, end, [end, eot], [begin])
    assert rules("qwen2") == (EOS, "<|im_end|>", [EOS, "<|im_end|>"], [])
    assert rules("neox") == (EOS, EOS, [EOS], [])
    assert rules("llama2") == ("<s>", "</s>", ["</s>"], ["<s>"])


def test_add_bos_token_and_eos_decide(tmp_path: Path) -> None:
    files = FOREIGN["llama2"]
    config = {**files["tokenizer_config.json"], "add_bos_token": False}
    folder = write(tmp_path, {**files, "tokenizer_config.json": config})
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", eos="<unk>")
    assert (tokenizer.prompt_prefix, tokenizer.bos_id) == ((), 1)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (0, {0, 2})
    tokenizer.save(tmp_path / "kept")
    assert Tokenizer.from_file(tmp_path / "kept", eos="<s>").eos_id == 1
    with pytest.raises(CheckpointError, match="no token '<nowhere>', which should end"):
        Tokenizer.from_file(folder, eos="<nowhere>")
    folder = write(tmp_path / "alone", {"tokenizer.json": files["tokenizer.json"]})
    with pytest.raises(CheckpointError, match="nothing says which token ends a document"):
        Tokenizer.load(folder)
    assert Tokenizer.from_file(folder, eos="</s>").prompt_prefix == (1,)
    (folder / "config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(CheckpointError, match=r"ends with 99999, but the ids are 0\.\."):
        Tokenizer.load(folder)


def test_lossless(tmp_path: Path) -> None:
    found = {n: Tokenizer.load(write(tmp_path / n, FOREIGN[n])).lossless for n in FOREIGN}
    assert found == {n: n == "llama3" for n in FOREIGN}
    data = FOREIGN["llama3"]["tokenizer.json"]
    n = max(token["id"] for token in data["added_tokens"]) + 1
    added = [*data["added_tokens"], {**_added("<tool>", n, special=False), "rstrip": True}]
    files = {**FOREIGN["llama3"], "tokenizer.json": {**data, "added_tokens": added}}
    assert not Tokenizer.load(write(tmp_path, files)).lossless
    assert BYTES.lossless
    assert not BYTES.imported


def test_fits() -> None:
    assert BYTES.fits(257)
    assert BYTES.fits(320)
    assert not BYTES.fits(256)
    assert WORLD.fits(WORLD.vocab_size + 6)
    assert not WORLD.fits(WORLD.vocab_size - 1)


@every_foreign
def test_separated_for_training(name: str, tmp_path: Path) -> None:
    source = Tokenizer.load(write(tmp_path / "source", FOREIGN[name]))
    tokenizer = source.separated()
    first = source.eos_id
    assert tokenizer.encode(SAMPLES[0]) == source.encode(SAMPLES[0])
    assert tokenizer.fingerprint != source.fingerprint
    assert tokenizer.stop_ids == source.stop_ids
    tokenizer.save(tmp_path / "model")
    for found in (tokenizer, Tokenizer.load(tmp_path / "model"), tokenizer.separated()):
        assert (found.bos_id, found.eos_id, found.reset_id) == (first, first, first)
        assert found.prompt_prefix == (first,)
        assert found.fingerprint == tokenizer.fingerprint


def test_separators_stand_for_no_text(tmp_path: Path) -> None:
    assert BPE.separated() is BPE
    assert WORLD.separated().reset_id == 0
    path = tmp_path / "characters.json"
    path.write_text(json.dumps({str(i): c for i, c in enumerate("\n abc")}))
    with pytest.raises(ConfigError, match=r"stands for '\\n'; name one that no text has"):
        Tokenizer.from_file(path).separated()


@settings(max_examples=40)
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                "word",
                " word",
                "\n",
                "\n\n",
                "\r\n",
                "  ",
                "\t",
                " .",
                "...",
                "12",
                "\xe9",
                "\u0301",
                "\u3000",
            ]
        ),
        min_size=1,
        max_size=200,
    ),
    limit=st.integers(8, 60),
)
def test_parts_of_a_text_have_the_ids_of_the_whole(pieces: list[str], limit: int) -> None:
    # Without long words, which are cut anywhere.
    text = " ".join(pieces)
    parts = list(corpus.cut([text], limit))
    long_words = any(len(word) > limit // 2 - 2 for word in text.split())
    long_spaces = re.search(rf"\s{{{limit // 2 - 2}}}", text) is not None
    assume(not long_words and not long_spaces)
    for tokenizer in (BPE, BYTES):
        ids = [i for n, part in enumerate(parts) for i in tokenizer.encode(part, continues=n > 0)]
        assert ids == tokenizer.encode(text)


@every_foreign
def test_parts_of_foreign_text_differ_at_borders_alone(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, FOREIGN[name]))
    text = "\n\n".join(SPEECH * 40)
    parts = list(corpus.cut([text], 500))
    ids = [i for n, part in enumerate(parts) for i in tokenizer.encode(part, continues=n > 0)]
    whole = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == tokenizer.decode_bytes(whole)
    assert abs(len(ids) - len(whole)) <= len(parts)


@every_foreign
def test_foreign_save_and_load(name: str, tmp_path: Path) -> None:
    files = FOREIGN[name]
    tokenizer = Tokenizer.load(write(tmp_path / "source", files))
    tokenizer.save(tmp_path / "model")
    # A model folder has a configuration of its own, which decides nothing here.
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 7, "bos_token_id": 7}')
    loaded = Tokenizer.load(tmp_path / "model")
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == tokenizer.fingerprint
    for kept in ("bos_id", "eos_id", "stop_ids", "prompt_prefix", "special_tokens", "fingerprint"):
        assert getattr(loaded, kept) == getattr(tokenizer, kept), kept
    assert loaded.chat_template == files.get("tokenizer_config.json", {}).get("chat_template")
    source = (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == source
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    for key, value in files.get("tokenizer_config.json", {}).items():
        assert config[key] == value or key == "tokenizer_class"
    if "special_tokens_map.json" in files:
        kept = json.loads((tmp_path / "again" / "special_tokens_map.json").read_text())
        assert kept == files["special_tokens_map.json"]


@every_foreign
def test_transformers_reads_a_saved_foreign_tokenizer(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(write(tmp_path / "source", FOREIGN[name]))
    tokenizer.save(tmp_path / "model")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in SAMPLES:
        ids = tokenizer.encode(text, special=True)
        assert other(text, truncation=False).input_ids == [*tokenizer.prompt_prefix, *ids]
        decoded = other.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decoded == tokenizer.decode(ids)
    other.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert (again.eos_id, again.stop_ids) == (tokenizer.eos_id, tokenizer.stop_ids)
    assert again.encode(SAMPLES[0]) == tokenizer.encode(SAMPLES[0])


@pytest.mark.parametrize("name", ["llama3", "qwen2", "llama2-metaspace"])
def test_transformers_reads_the_source_alike(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(write(tmp_path, FOREIGN[name]))
    (tmp_path / "config.json").unlink(missing_ok=True)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        ids = [*tokenizer.prompt_prefix, *tokenizer.encode(text, special=True)]
        assert other(text, truncation=False).input_ids == ids


def test_a_saved_config_leads_transformers_to_the_same_ids(tmp_path: Path) -> None:
    """What would name code that is not there, or take the start token away."""
    transformers = pytest.importorskip("transformers")
    files = FOREIGN["llama2"]
    config = {**files["tokenizer_config.json"], "auto_map": {"AutoTokenizer": ["code.T", None]}}
    del config["add_bos_token"]
    folder = write(tmp_path / "source", {**files, "tokenizer_config.json": config})
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "model")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = other("The fox", truncation=False).input_ids
    assert ids == [1, *tokenizer.encode("The fox")]
    assert "auto_map" not in json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())


def test_fingerprint_covers_what_decides_ids(tmp_path: Path) -> None:
    files = FOREIGN["qwen2"]
    first = Tokenizer.load(write(tmp_path / "a", files)).fingerprint
    data = {**files["tokenizer.json"], "normalizer": None}
    changed = Tokenizer.load(write(tmp_path / "b", {**files, "tokenizer.json": data}))
    config = {**files["tokenizer_config.json"], "add_bos_token": True, "bos_token": EOS}
    prefixed = Tokenizer.load(write(tmp_path / "c", {**files, "tokenizer_config.json": config}))
    assert prefixed.prompt_prefix == (prefixed.bos_id,)
    assert len({first, changed.fingerprint, prefixed.fingerprint}) == 3


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("decoder", None, "its decoder is None"),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "its decoder is Word"),
        ("added_tokens", [{"id": 1}], "its special tokens are unreadable"),
        ("model", {"type": "Unigram", "vocab": []}, "its model is 'Unigram', not 'BPE'"),
        ("model", _bpe({"a": 0}, [], dropout=0.1), "its model has dropout 0.1"),
        ("model", _bpe({"a": 0}, [["b", "c"]]), "is corrupt"),
        ("model", _bpe({"b": 0}, []), "it reads 'a' as b''"),
        ("pre_tokenizer", {**_byte_level(), "add_prefix_space": True}, "it reads 'a' as b' a'"),
    ],
)
def test_load_refuses_other_foreign_files(
    part: str, value: Any, message: str, tmp_path: Path
) -> None:
    data = {**FOREIGN["neox"]["tokenizer.json"], part: value}
    write(tmp_path, {"tokenizer.json": data})
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_load_refuses_damaged_rules(tmp_path: Path) -> None:
    WORLD.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    kept = json.loads(path.read_text())["spikelm"]
    for damage in ({"vocabulary": "other"}, {"eos_id": None}, {"stop_ids": 3}, {"bos_id": -1}):
        path.write_text(json.dumps({"spikelm": {**kept, **damage}}))
        with pytest.raises(CheckpointError, match="tokenizer_config.json: "):
            Tokenizer.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        Tokenizer.load(tmp_path)


def test_from_file_names_what_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "20B_tokenizer.json"
    path.write_text(json.dumps(FOREIGN["neox"]["tokenizer.json"]))
    assert Tokenizer.from_file(path).eos_id == 0
    BYTES.save(tmp_path / "ours")
    ours = Tokenizer.from_file(tmp_path / "ours" / "tokenizer.json", eos=EOS)
    assert ours.fingerprint == BYTES.fingerprint
    with pytest.raises(CheckpointError, match="ends documents with '<|endoftext|>', not 'a'"):
        Tokenizer.from_file(tmp_path / "ours", eos="a")
    for name, message in (
        ("spiece.model", "give a model folder, a tokenizer.json, rwkv_vocab"),
        ("absent.json", "no such file"),
        ("absent.txt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_file(tmp_path / name)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no tokenizer.json; let transformers write it"):
        Tokenizer.load(tmp_path)


# RWKV's World vocabulary: every byte, then longer tokens.


def _world_file() -> str:
    words = [" the", "the", "the ", "th", "\n\n", "    ", "  ", "\u4e16\u754c", "\u4e16", "a" * 9]
    tokens = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in words)]
    tokens += [b"\xe4\xb8", b"\xff\xfe\xfd"]
    lines = []
    for index, token in enumerate(tokens, 1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{index} {literal} {len(token)}\n")
    return "".join(lines)


def _world(tmp: Path) -> Tokenizer:
    path = tmp / "rwkv_vocab_v20230424.txt"
    path.write_text(_world_file(), encoding="utf-8")
    return Tokenizer.from_file(path)


with tempfile.TemporaryDirectory() as _folder:
    WORLD = _world(Path(_folder))
pieces_of_world = st.sampled_from(
    [b" the", b"th", b"  ", b"\n", "\u4e16\u754c".encode(), b"\xe4", b"\xff\xfe", b"a" * 4, b"e"]
)


@given(data=st.lists(pieces_of_world, max_size=12).map(b"".join))
def test_world_takes_the_longest_token(data: bytes) -> None:
    tokens = [WORLD.decode_bytes([token_id]) for token_id in range(WORLD.vocab_size)]
    expected, rest = [], data
    while rest:
        longest = max((t for t in tokens if t and rest.startswith(t)), key=len)
        expected.append(tokens.index(longest))
        rest = rest[len(longest) :]
    assert WORLD.encode(data) == expected
    assert WORLD.decode_bytes(expected) == data
    stream = WORLD.stream()
    pieces = [stream.push(token_id) for token_id in expected]
    assert "".join(pieces) + stream.flush() == data.decode(errors="replace")


def test_world_rules_and_folder(tmp_path: Path) -> None:
    assert (WORLD.bos_id, WORLD.eos_id, WORLD.stop_ids) == (0, 0, {0})
    assert (WORLD.prompt_prefix, WORLD.vocab_size) == ((0,), 269)
    assert (WORLD.lossless, WORLD.imported, WORLD.decode([0])) == (True, True, "")
    assert WORLD.encode(" the the\ud800") == [257, 257, 0xED + 1, 0xA0 + 1, 0x80 + 1]
    assert WORLD.encode(EOS, special=True) == [byte + 1 for byte in EOS.encode()]
    WORLD.save(tmp_path / "model")
    loaded = Tokenizer.load(tmp_path / "model")
    assert loaded.encode("the \u4e16\u754c") == WORLD.encode("the \u4e16\u754c")
    assert loaded.fingerprint == WORLD.fingerprint
    assert loaded.prompt_prefix == (0,)
    ended = Tokenizer.from_file(tmp_path / "model" / "rwkv_vocab.txt", eos="\n\n")
    assert (ended.eos_id, ended.stop_ids, ended.prompt_prefix) == (261, {261}, (0,))
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "rwkv_vocab_v20230424.txt").write_text(_world_file(), encoding="utf-8")
    (raw / "tokenizer_config.json").write_text('{"chat_template": "hello", "bos_token": "<s>"}')
    found = Tokenizer.load(raw)
    assert (found.fingerprint, found.chat_template) == (WORLD.fingerprint, "hello")
    assert found.special_tokens == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("257 ' the' 4", "257 ' the' 5", "line 257 is \"257 ' the' 5\""),
        ("257 ' the' 4", "257 open('x') 4", "line 257 is"),
        ("257 ' the' 4", "257 ' the 4", "line 257 is"),
        ("257 ' the' 4", "0 ' the' 4", "line 257 is"),
        ("257 ' the' 4", "", "line 257 is ''"),
        ("258 'the' 3", "258 ' the' 4", "line 258: b' the' is there twice"),
        ("258 'the' 3", "257 'the' 3", "id 257 has two tokens"),
        ("2 '\\x01' 1", "2 '\\x01\\x01' 2", "no token for the byte 1"),
    ],
)
def test_world_refuses_damaged_lines(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = _world_file()
    assert text.count(f"{old}\n") == 1
    path = tmp_path / "vocab.txt"
    path.write_text(text.replace(f"{old}\n", f"{new}\n"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Tokenizer.from_file(path)


# One token per character.

TABLE = {str(index): c for index, c in enumerate("\n abc\u4e16\U0001f600\ue083")}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_characters(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(json.dumps(TABLE, ensure_ascii=False).encode(encoding))
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.encode("ab\u4e16 \U0001f600\nz") == [2, 3, 5, 1, 6, 0, 7]
    assert tokenizer.encode(b"a\xffb") == [2, 7, 3]
    assert tokenizer.decode([2, 5, 0, 6]) == "a\u4e16\n\U0001f600"
    assert (tokenizer.vocab_size, tokenizer.lossless, tokenizer.special_tokens) == (8, False, {})
    # A line end begins a text, as in the released models, but ends none.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prompt_prefix) == (0, 0, (0,))
    assert tokenizer.stop_ids == frozenset()
    tokenizer.save(tmp_path / "model")
    loaded = Tokenizer.load(tmp_path / "model")
    assert loaded.encode("ab\u4e16 \U0001f600\nz") == [2, 3, 5, 1, 6, 0, 7]
    assert (loaded.fingerprint, loaded.stop_ids) == (tokenizer.fingerprint, frozenset())
    ended = Tokenizer.from_file(path, eos="c")
    assert (ended.eos_id, ended.stop_ids) == (4, {4})


def test_unknown_characters(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_text('{"0": "\\n", "1": " ", "2": "a"}')
    assert Tokenizer.from_file(path).encode("a?a") == [2, 1, 2]
    path.write_text('{"0": "\\n", "1": "a"}')
    with pytest.raises(DataError, match=r"the character '\?' is not in the vocabulary"):
        Tokenizer.from_file(path).encode("a?a")
    for table, message in (
        ({"0": "a", "1": "b"}, r"no token '\\n', which should end documents"),
        ({"0": "\n", "1": "\n"}, "a character has two ids"),
        ({"0": "\n", "2": "a"}, "it has no model"),
        ({"0": "\n", "1": "ab"}, "it has no model"),
    ):
        path.write_text(json.dumps(table))
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_file(path)
