from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm import corpus
from spikelm.corpus import builtin_documents, describe_builtin, read_documents
from spikelm.errors import DataError, MissingExtraError


def test_builtin_documents_are_a_few_megabytes_of_prose() -> None:
    report = describe_builtin()
    sizes = {split: report[split]["bytes"] for split in corpus.SPLITS}
    total = sum(sizes.values())
    assert 1_500_000 < total < 8_000_000
    assert sizes["test"] >= 80 * 1024
    assert sizes["validation"] >= 80 * 1024
    for split in ("test", "validation"):
        assert 0.035 < sizes[split] / total < 0.07
    for split in corpus.SPLITS:
        documents = builtin_documents(split)
        assert len(documents) == report[split]["documents"]
        assert sum(len(text.encode()) for text in documents) == sizes[split]
    text = "".join(builtin_documents("test"))
    assert sum(c.isascii() for c in text) > 0.99 * len(text)
    assert sum(c.isalpha() or c.isspace() for c in text) > 0.8 * len(text)


def test_builtin_documents_read_as_documentation() -> None:
    documents = {split: builtin_documents(split) for split in corpus.SPLITS}
    everything = [text for split in corpus.SPLITS for text in documents[split]]
    (heap,) = (text for text in everything if text.startswith("heapq module\n============\n"))
    assert heap.index("Heap queue algorithm") < heap.index("heappush()\n\nPush item onto heap")
    assert any(text.startswith('The "while" statement\n') for text in everything)
    assert not any(text.startswith(("test.", "encodings.")) for text in everything)


def test_builtin_splits_share_no_docstring_and_no_long_paragraph() -> None:
    first_seen: dict[str, int] = {}
    documents = [text for split in corpus.SPLITS for text in builtin_documents(split)]
    for number, text in enumerate(documents):
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= 80:
                assert first_seen.setdefault(key, number) == number, paragraph
    assert len(set(documents)) == len(documents)


def test_unseen_drops_what_was_there_before() -> None:
    long, seen = "word " * 20, set[str]()
    assert corpus._unseen("Return it.", seen) == "Return it."
    assert corpus._unseen("Return it.", seen) == ""
    assert corpus._unseen(f"Summary.\n\n{long}", seen) == f"Summary.\n\n{long}".strip()
    assert corpus._unseen(f"Other.\n\n{long}\n\nReturn it.", seen) == "Other.\n\nReturn it."
    assert corpus._unseen(f"Return it.\n\n{long}", seen) == ""


def test_builtin_is_the_same_in_another_process_and_quick() -> None:
    code = (
        "import time; start = time.process_time(); import sys, spikelm.corpus as c;"
        "print(c.describe_builtin()['sha256'], 'torch' in sys.modules,"
        "time.process_time() - start)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    sha256, has_torch, seconds = run.stdout.split()
    assert sha256 == describe_builtin()["sha256"]
    assert has_torch == "False"
    # Some 2 on a quiet machine.
    assert float(seconds) < 8
    start = time.perf_counter()
    builtin_documents("train").clear()
    assert builtin_documents("train")
    assert time.perf_counter() - start < 0.1


def test_builtin_without_sources_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"are not in .*; give your own text with --data"):
        corpus._builtin.__wrapped__()


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pack_zstd(data: bytes) -> bytes:
    """Two frames, as parallel packers write them."""
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    return b"".join(bytes(codec.compress(part)) for part in (data[:9], data[9:]))


PACKERS: dict[str, Any] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": _pack_zstd,
}


@pytest.mark.parametrize("packing", PACKERS)
def test_read_text_and_json_lines(packing: str, tmp_path: Path) -> None:
    pack = PACKERS[packing]
    book = tmp_path / f"book.txt{packing}"
    rows = tmp_path / f"rows.jsonl{packing}"
    book.write_bytes(pack("\ufeffOne caf\xe9.\r\n\nTwo.".encode()))
    rows.write_bytes(pack(b'{"text": "a"}\n\n{"text": null}\n{"text": " "}\n{"text": "b\\nc"}'))
    assert list(read_documents([str(rows), str(book)])) == ["a", "b\nc", "One caf\xe9.\r\n\nTwo."]


def test_read_globs_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("b.md", "a.txt", "sub/deep/c.TXT"):
        (tmp_path / name).write_text(name)
    assert list(read_documents([f"{tmp_path}/*.*"])) == ["a.txt", "b.md"]
    assert list(read_documents([f"{tmp_path}/**/*.[tT]*"])) == ["a.txt", "sub/deep/c.TXT"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert list(read_documents([f"{tmp_path}/odd[1].txt"])) == ["odd"]


def test_read_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["x", None, "y"], "id": [1, 2, 3]}), path)
    assert list(read_documents([str(path)], text_key="body")) == ["x", "y"]
    with pytest.raises(DataError, match="no key 'text'; keys present: body, id"):
        list(read_documents([str(path)]))
    with pytest.raises(DataError, match="'id' must be text, got int"):
        list(read_documents([str(path)], text_key="id"))
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet: "):
        list(read_documents([str(path)]))


@pytest.mark.parametrize("streaming", [True, False])
def test_read_dataset_folder(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    _write_rows(folder / "train.jsonl", [{"text": f"row {i}"} for i in range(3)])
    _write_rows(folder / "test.jsonl", [{"text": "held out"}])

    def read(source: str, **options: Any) -> list[str]:
        return list(read_documents([source], streaming=streaming, **options))

    assert read(str(folder)) == ["row 0", "row 1", "row 2"]
    assert read(f"{folder}::test") == ["held out"]
    assert read(f"{folder}:default:train") == ["row 0", "row 1", "row 2"]
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        read(f"{folder}::nowhere")
    with pytest.raises(DataError, match="no key 'body'; keys present: text"):
        read(str(folder), text_key="body")
    with pytest.raises(DataError, match="a dataset is name, name:config or name:config:split"):
        read("a:b:c:d")


def test_read_dataset_passes_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        if args[0] == "lost/set":
            raise ConnectionError("no\nroute")
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents(["org/set:english:test", "plain"])) == ["one", "one"]
    assert calls == [
        (("org/set", "english"), {"split": "test", "streaming": True}),
        (("plain", None), {"split": "train", "streaming": True}),
    ]
    with pytest.raises(DataError, match="neither a file nor a readable dataset: no route"):
        list(read_documents(["lost/set"]))


@pytest.mark.parametrize(
    "source", ["x.txt", "./name", "/no/such", "~/no/such", "no*e", "x.jsonl.xz"]
)
def test_what_looks_like_a_path_must_exist(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file: "):
        # Before anything is read: a later source must not fail hours into a run.
        read_documents([source])


def test_read_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "data.csv.gz").write_bytes(b"")
    (tmp_path / "data.parquet.xz").write_bytes(b"")
    for name in ("data.csv.gz", "data.parquet.xz"):
        with pytest.raises(DataError, match="its suffix must be one of"):
            read_documents([str(tmp_path / name)])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"is a folder; name its files, for example .*\*\.txt"):
        read_documents([str(tmp_path / "texts")])
    with pytest.raises(DataError, match="no text sources given"):
        read_documents([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON: "),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not JSON: "),
        ("a.jsonl", b'\n{"id": 1, "body": "x"}\n', r":2: no key 'text'; keys present: id, body"),
        ("a.jsonl", b'["x"]\n', r":1: expected an object with the key 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r":1: 'text' must be text, got int"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8: .* at byte 2"),
        ("a.txt", b" \n", r"no text in .*a\.txt"),
        ("a.txt.xz", b"not packed", r"cannot read .*a\.txt\.xz: "),
        ("a.txt.gz", gzip.compress(b"x" * 999)[:20], r"cannot read .*a\.txt\.gz: "),
        ("a.txt.bz2", b"BZh91AY&SY", r"cannot read .*a\.txt\.bz2: "),
        ("a.txt.zst", b"not packed", r"cannot read .*a\.txt\.zst: "),
        ("a.txt.zst", bytes.fromhex("28b52ffd2064"), r"cannot read .*a\.txt\.zst: Truncated"),
    ],
)
def test_read_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


def test_missing_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    for module, source in (("pyarrow", str(tmp_path / "a.txt.zst")), ("datasets", "some/set")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"'{module}'.*spikelm\[data\]"):
            list(read_documents([source]))


@settings(deadline=None, max_examples=20)
@given(
    pieces=st.lists(
        st.tuples(
            st.sampled_from(["word ", "\n\n", "line\n", "x", "\ud800", "\xe9"]),
            st.integers(1, 90_000),
        ),
        max_size=4,
    )
)
def test_parts_join_to_the_document(pieces: list[tuple[str, int]]) -> None:
    text = "".join(piece * count for piece, count in pieces)
    parts = list(corpus.cut([text]))
    assert "".join(parts) == text
    assert all(0 < len(part) <= corpus.BLOCK_CHARACTERS for part in parts)
    # Wherever the chunks end.
    chunks = [text[i : i + 50_000] for i in range(0, len(text), 50_000)]
    assert list(corpus.cut(chunks)) == parts


def test_a_text_is_cut_in_front_of_paragraphs_lines_and_words() -> None:
    def second(text: str) -> str:
        first, rest = corpus.cut([text], 20)
        assert 10 < len(first) <= 20
        return rest

    assert second("a line of text\n\n  then\nmore text") == "then\nmore text"
    assert second("a line of text\r\n\r\nmore text") == "more text"
    assert second("a line of text\n\tthen more text") == "then more text"
    assert second("a line of words, many words") == " many words"
    assert second("x" * 25) == "x" * 5


def test_read_pieces_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "".join(f"Paragraph {i} of a caf\xe9.\n\n" for i in range(90_000))
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert path.stat().st_size > 2 * corpus._CHUNK_BYTES
    (tmp_path / "small.txt").write_text("small")
    (tmp_path / "blank.txt").write_text(" \n" * 50_000)
    faults = corpus.Faults()
    found = list(corpus.read_pieces([f"{tmp_path}/*.txt"], faults=faults))
    assert [i for i, piece in enumerate(found) if piece.begins] == [0, len(found) - 1]
    assert "".join(piece.text for piece in found[:-1]) == text
    assert max(len(piece.text) for piece in found) <= corpus.BLOCK_CHARACTERS
    assert (faults.empty, faults.skipped) == (1, 0)
    assert list(read_documents([str(path)])) == [text]


def test_broken_utf8_is_named_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "\xe9" * corpus._CHUNK_BYTES
    for start in (corpus._CHUNK_BYTES - 1, corpus._CHUNK_BYTES + 4):
        data = bytearray(b"x" + text.encode())
        data[start : start + 2] = b"\xff\xff"
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.txt is not UTF-8: .* at byte (\d+)") as caught:
            list(read_documents([str(path)]))
        with pytest.raises(UnicodeDecodeError) as whole:
            bytes(data).decode()
        assert str(caught.value).endswith(f"at byte {whole.value.start}")


def test_unreadable_sources_can_be_skipped(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "1.txt").write_bytes(b"x" * corpus._CHUNK_BYTES + b"\xff")
    (tmp_path / "2.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": 1}\n{"tex\n{"text": "\xff"}\n\n{"text": ""}\n{"text": "two"}\n'
    )
    rows = b"".join(b'{"text": "packed %d"}\n' % i for i in range(30_000))
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "4.parquet")
    (tmp_path / "5.txt").write_text("last")
    sources = [f"{tmp_path}/*"]
    with pytest.raises(DataError, match=r"1\.txt is not UTF-8"):
        list(corpus.read_pieces(sources))
    faults = corpus.Faults(skip=True)
    texts = [piece.text for piece in corpus.read_pieces(sources, faults=faults)]
    assert texts[:2] == ["one", "two"]
    assert texts[-1] == "last"
    assert len(texts) > 20_000
    assert (faults.skipped, faults.empty) == (6, 1)
    for name, message in zip(
        ("1.txt", "2.jsonl:2", "2.jsonl:3", "2.jsonl:4", "3.jsonl.gz", "4.parquet"),
        faults.first,
        strict=True,
    ):
        assert name in message
    with pytest.raises(DataError, match="no such file"):
        corpus.read_pieces([f"{tmp_path}/6.txt"], faults=faults)


@pytest.mark.skipif("SPIKELM_DATA" not in os.environ, reason="SPIKELM_DATA names no data folder")
def test_read_shared_data() -> None:
    folder = os.environ["SPIKELM_DATA"]
    (text,) = read_documents([f"{folder}/wikitext-2/test.txt.xz"])
    assert len(text.encode()) == 1_256_449
    questions = read_documents([f"{folder}/gsm8k/*.jsonl.xz"], text_key="question")
    assert sum(1 for _ in questions) == 7_473 + 1_319
