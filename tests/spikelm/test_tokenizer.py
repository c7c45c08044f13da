from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
