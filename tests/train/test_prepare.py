from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikelm.cli import main as spikelm
from spikelm.corpus import Piece
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm_train.config import DataConfig, TokenizerConfig
from spikelm_train.texts import prepare, shards
from spikelm_train.texts.prepare import Task, Text, encode, make_tokenizer, write_text

BYTES = TokenizerConfig(kind="bytes")


@pytest.fixture
def books(tmp_path: Path) -> list[str]:
    """Two long documents and many short ones; sources of both."""
    for name in ("one", "two"):
        paragraphs = (f"{name} has a paragraph {i}.\n\n  It is {i * i} long." for i in range(4000))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs))
    rows = (json.dumps({"text": f"Row {i}: caf\xe9 " + "x" * (i % 50)}) + "\n" for i in range(900))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return [str(tmp_path / "*.txt"), str(tmp_path / "rows.jsonl")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(sources: list[str], folder: Path, **options: Any) -> shards.Prepared:
    write_text(
        Text(DataConfig(sources=tuple(sources), validation_fraction=0.1)),
        BYTES,
        Tokenizer.bytes(),
        folder,
        **options,
    )
    return shards.open_prepared(folder)


def test_workers_and_shards_change_nothing(
    books: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "TASK_CHARACTERS", 20_000)
    write(books, tmp_path / "one", workers=1)
    write(books, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    whole = shards.open_prepared(tmp_path / "one")
    cut = write(books, tmp_path / "cut", workers=1, shard_tokens=9999)
    assert len(list((tmp_path / "cut").glob("train-*.bin"))) > 30
    for a, b in ((whole.train, cut.train), (whole.validation, cut.validation)):
        assert np.array_equal(a.tokens[:], b.tokens[:])
        assert np.array_equal(a.starts, b.starts)
    assert next(shards.verify(tmp_path / "cut")) == ("train-00000.bin", 2 * 9999)


def test_processes_take_the_tokenizer_along_and_may_not_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks: list[Task] = [("train", [Piece(f"text {i}", True)]) for i in range(9)]
    taken: list[int] = []

    def counted() -> Iterator[Task]:
        for index, task in enumerate(tasks):
            taken.append(index)
            yield task

    tokenizer = Tokenizer.train_bpe(["some text to learn from"] * 5, 280)
    tokenizer.save(tmp_path)
    found = encode(counted(), tokenizer, tmp_path, 2)
    _, ids, starts = next(found)
    assert ids.tolist() == [tokenizer.eos_id, *tokenizer.encode("text 0")]
    assert starts.tolist() == [0]
    assert len(taken) <= 6, "tasks wait on disk, not in memory"
    assert [tokenizer.decode(ids[1:]) for _, ids, _ in found] == [f"text {i}" for i in range(1, 9)]
    with pytest.raises(DataError, match="a process that encodes text has ended"):
        list(encode(iter(tasks), tokenizer, tmp_path / "nothing", 2))
    assert "no tokenizer" in capfd.readouterr().err


def test_long_documents_have_the_ids_of_the_whole(books: list[str], tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "held out"}\n')
    data = DataConfig(sources=(books[0],), validation_sources=(str(held),))
    config = TokenizerConfig(vocab_size=280)
    tokenizer = make_tokenizer(config, [Text(data)])
    write_text(Text(data), config, tokenizer, tmp_path / "out")
    train = shards.open_prepared(tmp_path / "out").train
    texts = [(tmp_path / f"{name}.txt").read_text() for name in ("one", "two")]
    assert min(map(len, texts)) > 2 * 64 * 1024
    expected = [i for text in texts for i in (tokenizer.eos_id, *tokenizer.encode(text))]
    assert train.tokens[:].tolist() == expected
    assert train.num_bytes == sum(len(text.encode()) for text in texts)


def test_a_document_longer_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    with path.open("w") as file:
        for i in range(300_000):
            file.write(f"Paragraph {i} of a document that is too long to be read at once. " * 2)
            file.write("\n\n")
    code = (
        "import resource, sys\n"
        "from spikelm_train.config import DataConfig\n"
        "from spikelm_train.texts.prepare import Text\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "text, before = Text(DataConfig(sources=(sys.argv[1],))), peak()\n"
        "size = sum(len(piece.text) for _, piece in text.read('reading'))\n"
        "print(size, peak() - before, 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    size, kibibytes, has_torch = run.stdout.split()
    assert int(size) == path.stat().st_size > 40e6
    # The tables of the division, 8 MiB each, and what is read at a time.
    assert int(kibibytes) < 30_000
    assert has_torch == "False", "the processes that encode would load it too"


def test_a_full_disk_leaves_what_was_there(books: list[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*out: .*; nothing was written"):
            write(books, out)
        assert not out.parent.exists()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        write(books[1:], out)
        kept = contents(out)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(DataError, match="nothing was written"):
            write(books, out)
        assert contents(out) == kept
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(books, out)
    assert {path.name for path in out.iterdir()} == {
        "meta.json",
        "tokenizer",
        "train-00000.bin",
        "train.starts",
        "validation-00000.bin",
        "validation.starts",
    }


def test_unreadable_rows_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.dumps({"text": f"row {i} of the text"}) for i in range(50)]
    path = tmp_path / "rows.jsonl"
    # Nine tenths are held out, most of those with a copy among them.
    copies = [json.dumps({"text": f"  row {i} of  the text"}) for i in range(9)]
    path.write_text("\n".join([*rows, "{", '{"text": " "}', *copies, ""]))
    data = DataConfig(sources=(str(path),), validation_fraction=0.9)
    with pytest.raises(DataError, match=r"rows\.jsonl:51: not JSON"):
        write([str(path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    skipping = Text(DataConfig(sources=data.sources, validation_fraction=0.9, on_error="skip"))
    meta = write_text(skipping, BYTES, Tokenizer.bytes(), tmp_path / "out")
    assert meta["unreadable"]["number"] == 1
    assert "rows.jsonl:51" in meta["unreadable"]["first"][0]
    assert meta["empty_documents"] == 1
    number = meta["train"]["documents"] + meta["validation"]["documents"]
    assert 0 < meta["held_out_copies"] == 59 - number
    assert "left out 1 unreadable, the first: " in caplog.text


@pytest.mark.parametrize("damage", ["changed", "missing", "short", "meta"])
def test_verify_names_what_is_damaged(books: list[str], tmp_path: Path, damage: str) -> None:
    write(books[1:], tmp_path / "out", shard_tokens=9999)
    path = tmp_path / "out" / "train-00001.bin"
    data = bytearray(path.read_bytes())
    name = r"train-00001\.bin"
    if damage == "changed":
        data[100] ^= 1
        path.write_bytes(data)
        # Sizes alone do not tell.
        shards.open_prepared(tmp_path / "out")
    elif damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:-2])
    else:
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        meta["train"]["tokens"] += 1
        (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
        name = r"meta\.json is damaged"
    with pytest.raises(DataError, match=name) as caught:
        list(shards.verify(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_bpe_learns_from_a_sample_of_bounded_size(books: list[str]) -> None:
    text = Text(DataConfig(sources=tuple(books), validation_fraction=0.1))
    assert (
        400_000
        < text.num_bytes
        == sum(len(piece.text.encode()) for _, piece in text.read("reading"))
    )
    whole, part = list(text.sample(None)), list(text.sample(20_000))
    assert set(part) < set(whole)
    assert 5_000 < len("".join(part)) < 100_000
    assert list(text.sample(10**9)) == whole
    assert len(list(text.sample(1))) == 1
    small = TokenizerConfig(vocab_size=270, train_bytes=20_000)
    first = make_tokenizer(small, [text])
    assert first.fingerprint == make_tokenizer(small, [text]).fingerprint
    assert first.fingerprint != make_tokenizer(TokenizerConfig(vocab_size=270), [text]).fingerprint


def test_the_commands(books: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, out = str(tmp_path / "tokens"), str(tmp_path / "out")
    assert spikelm(["data", "tokenizer", *books, "--out", tokens, "--vocab-size", "300"]) == 0
    assert "300 entries" in capsys.readouterr().out
    command = ["data", "prepare", books[1], "--out", out, "--tokenizer", tokens]
    command += ["--validation", books[0], "--shard-tokens", "5000", "--workers", "1"]
    assert spikelm(command) == 0
    shown = capsys.readouterr().out
    assert "of 900 documents" in shown
    assert f"--set data.prepared={out}" in shown
    assert shards.open_prepared(Path(out)).tokenizer.vocab_size == 300
    assert spikelm(["data", "verify", out]) == 0
    assert "train-00000.bin: 10,000 bytes, unchanged" in capsys.readouterr().out
    for arguments, message in (
        (command, "is not empty"),
        (["data", "prepare", "no.txt", "--out", tokens + "2"], "no such file: no.txt"),
        (["data", "prepare", *books, "--out", tokens + "2", "--vocab-size", "3"], "vocab_size: 3"),
        ([*command[:4], tokens + "2", *command[5:], "--vocab-size", "300"], "is for bpe"),
        (["data", "verify", tokens], "holds no tokenised text"),
    ):
        assert spikelm(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path(tokens + "2").exists()


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path)
    config = TokenizerConfig(kind="file", path=str(tmp_path), vocab_size=300)
    with pytest.raises(ConfigError, match="300 given, but the tokenizer has 257 entries"):
        make_tokenizer(config, [])
