from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spikelm.errors import ConfigError, DataError
from spikelm_train.config import DataConfig, TrainConfig, load_recipe
from spikelm_train.data import (
    META,
    PackedDocuments,
    RandomWindows,
    documents,
    make_batch,
    make_sampler,
    prepare,
    validation_rows,
)

EOS = 9999


def stream(lengths: list[int]) -> np.ndarray:
    """Documents of distinct tokens, each begun by the separator."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    tokens[np.cumsum([0, *lengths[:-1]])] = EOS
    return tokens


def test_random_windows_are_distinct_deterministic_and_rank_independent() -> None:
    tokens = np.arange(500, dtype=np.uint16)
    sampler = RandomWindows(tokens, 8, rows_per_step=64, seed=3)
    rows = sampler.rows(5, 0, 64)
    assert rows.shape == (64, 9)
    assert (np.diff(rows) == 1).all()
    assert len(set(rows[:, 0])) == 64
    parts = [RandomWindows(tokens, 8, 64, 3).rows(5, i, i + 16) for i in range(0, 64, 16)]
    assert np.array_equal(np.concatenate(parts), rows)
    assert not np.array_equal(sampler.rows(6, 0, 64), rows)
    assert not np.array_equal(RandomWindows(tokens, 8, 64, 4).rows(5, 0, 64), rows)


def test_random_windows_reach_both_ends_and_may_repeat_when_they_must() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    sampler = RandomWindows(tokens, 8, rows_per_step=6, seed=0)
    rows = np.concatenate([sampler.rows(step, 0, 6) for step in range(10)])
    assert set(rows[:, 0]) == {0, 1}
    assert rows.max() == 9


def test_packed_documents_use_every_token_once_per_epoch() -> None:
    tokens = stream([5, 1, 17, 3, 30, 4])
    sampler = PackedDocuments(tokens, EOS, 10, rows_per_step=3, seed=1)
    targets = np.concatenate([sampler.rows(step, 0, 3)[:, 1:].ravel() for step in range(2)])
    # The 60 targets of two steps are the epoch's tokens 1..59 and the next epoch's separator.
    assert sorted(targets) == sorted(tokens)
    assert targets[-1] == EOS


def test_packed_documents_stay_whole_and_are_reshuffled() -> None:
    lengths = [5, 1, 17, 3, 30, 4]
    tokens = stream(lengths)
    sampler = PackedDocuments(tokens, EOS, 6, rows_per_step=1, seed=1)
    rows = [sampler.rows(step, 0, 1)[0] for step in range(20)]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))
    whole = np.concatenate([row[:-1] for row in rows])
    expected = sorted(tuple(part) for part in np.split(tokens, np.cumsum(lengths)[:-1]))
    orders = []
    for epoch in (whole[:60], whole[60:]):
        found = [tuple(part) for part in np.split(epoch, np.flatnonzero(epoch == EOS)[1:])]
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]


def test_packed_documents_are_a_pure_function_of_the_row() -> None:
    tokens = stream([5, 1, 17, 3, 30, 4])
    whole = PackedDocuments(tokens, EOS, 7, rows_per_step=8, seed=1)
    rows = np.concatenate([whole.rows(step, 0, 8) for step in range(4)])
    fresh = PackedDocuments(tokens, EOS, 7, rows_per_step=8, seed=1)
    assert np.array_equal(fresh.rows(3, 2, 6), rows[26:30])
    longer = PackedDocuments(tokens, EOS, 200, rows_per_step=1, seed=1).rows(0, 0, 1)
    assert longer.shape == (1, 201)


def test_make_batch_resets_at_the_first_token_of_each_document() -> None:
    rows = np.array([[EOS, 1, 2, EOS, 4], [5, EOS, 7, 8, EOS]], dtype=np.int64)
    batch = make_batch(rows, EOS)
    assert batch.inputs.tolist() == [[EOS, 1, 2, EOS], [5, EOS, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, EOS, 4], [EOS, 7, 8, EOS]]
    assert batch.reset.tolist() == [[True, False, False, True], [False, True, False, False]]


def test_validation_rows_never_repeat_a_target() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    rows = validation_rows(tokens, 10, at_most=50)
    assert rows.shape == (5, 11)
    targets = rows[:, 1:].ravel()
    assert len(set(targets)) == len(targets)
    assert rows[-1, -1] == 100
    assert validation_rows(tokens, 10, at_most=10**9).shape == (10, 11)
    assert validation_rows(tokens[:4], 10, at_most=10**9).tolist() == [[0, 1, 2, 3]]


@pytest.fixture
def config(recipe: Callable[..., Path]) -> TrainConfig:
    return load_recipe(str(recipe()))


def test_prepare_stores_documents_behind_separators(config: TrainConfig, tmp_path: Path) -> None:
    corpus = prepare(config, tmp_path / "data")
    train, validation = documents(config.data)
    for texts, split in ((train, corpus.train), (validation, corpus.validation)):
        starts = np.flatnonzero(split.tokens == corpus.tokenizer.eos_id)
        parts = np.split(np.asarray(split.tokens), starts[1:])
        assert [corpus.tokenizer.decode(part[1:].tolist()) for part in parts] == texts
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_documents == len(texts)
    assert set(train).isdisjoint(validation)
    assert corpus.train.tokens.dtype == np.uint16


def test_prepare_is_reused_until_something_changes(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(config, folder)
    written = (folder / "train.bin").stat().st_mtime_ns
    other_length = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sequence_length=16, sampling="packed")
    )
    again = prepare(other_length, folder)
    assert (folder / "train.bin").stat().st_mtime_ns == written
    fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, max_documents=20))
    assert prepare(fewer, folder).train.num_documents < again.train.num_documents


@pytest.mark.parametrize("damage", ["torn file", "no meta", "bad meta", "no tokenizer"])
def test_prepare_starts_over_from_damaged_files(
    config: TrainConfig, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "data"
    first = np.array(prepare(config, folder).train.tokens)
    if damage == "torn file":
        (folder / "train.bin").write_bytes(first[:-7].tobytes())
    elif damage == "no meta":
        (folder / META).unlink()
    elif damage == "bad meta":
        (folder / META).write_text("{")
    else:
        (folder / "tokenizer" / "tokenizer.json").unlink()
    assert np.array_equal(prepare(config, folder).train.tokens, first)
    assert json.loads((folder / META).read_text())["train"]["tokens"] == len(first)


def test_prepare_refuses_text_shorter_than_a_sequence(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_recipe(str(recipe()), ["data.sequence_length=100000"])
    with pytest.raises(DataError, match="lower data.sequence_length"):
        prepare(config, tmp_path / "data")


def test_prepare_names_the_vocabulary_the_text_fills(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_recipe(str(recipe()), ["tokenizer.kind=bpe", "tokenizer.vocab_size=5000"])
    with pytest.raises(ConfigError, match=r"add --set tokenizer.vocab_size=\d+"):
        prepare(config, tmp_path / "data")


def test_documents_stop_at_the_limits(text: Path) -> None:
    def count(**limits: int) -> int:
        config = DataConfig(sources=(str(text),), validation_fraction=0.1, **limits)
        return sum(map(len, documents(config)))

    assert count() == 40
    assert count(max_documents=15) == 15
    assert count(max_bytes=1500) < 15


def test_make_sampler_follows_the_recipe(recipe: Callable[..., Path], tmp_path: Path) -> None:
    for name, kind in (("packed", PackedDocuments), ("random_window", RandomWindows)):
        config = load_recipe(str(recipe()), [f"data.sampling={name}"])
        sampler = make_sampler(config, prepare(config, tmp_path / "data"), rows_per_step=4)
        assert isinstance(sampler, kind)
        assert sampler.rows(0, 0, 4).shape == (4, 33)


def test_validation_text_of_its_own(tmp_path: Path) -> None:
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    texts = [f"document {i} of the training text" for i in range(5)]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held.write_text(json.dumps({"text": "something else"}) + "\n")
    config = DataConfig(sources=(str(train),), validation_sources=(str(held),), max_documents=4)
    assert documents(config) == (texts[:4], ["something else"])
    builtin, validation = documents(dataclasses.replace(config, sources=()))
    assert len(builtin) > 100
    assert validation == ["something else"]

    # White space does not hide a document.
    with held.open("a") as file:
        file.write(json.dumps({"text": f" {texts[2]}\n".replace(" ", "  ")}) + "\n")
    with pytest.raises(DataError, match="1 validation document.* 'document 2 of the"):
        documents(config)


def test_the_hash_of_tokenised_text(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    config = load_recipe(str(recipe()))
    prepare(config, tmp_path / "data")
    meta = json.loads((tmp_path / "data" / META).read_text())
    digest = hashlib.sha256()
    for text in documents(config.data)[1]:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert meta["validation"]["sha256"] == digest.hexdigest() != meta["train"]["sha256"]
