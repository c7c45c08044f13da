from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikelm.errors import ConfigError, DataError
from spikelm_train.config import DataConfig, TrainConfig, load_recipe
from spikelm_train.data import _key, make_batch, make_sampler, prepare, validation_rows
from spikelm_train.samplers import (
    CarriedWindows,
    MixedLanes,
    Mixture,
    PackedDocuments,
    RandomWindows,
)
from spikelm_train.texts.prepare import Text
from spikelm_train.texts.shards import META, Joined, Split

EOS = 9999

Recipe = Callable[..., Path]


def documents(config: DataConfig) -> tuple[list[str], list[str]]:
    """Training and validation documents."""
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    for side, (text, begins, _) in Text(config).read("reading"):
        if begins:
            sides[side].append("")
        sides[side][-1] += text
    return sides["train"], sides["validation"]


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
def config(recipe: Recipe) -> TrainConfig:
    return load_recipe(str(recipe()))


def test_prepare_stores_documents_behind_separators(config: TrainConfig, tmp_path: Path) -> None:
    corpus = prepare(config, tmp_path / "data")
    train, validation = documents(config.data)
    for texts, split in ((train, corpus.train), (validation, corpus.validation)):
        parts = np.split(split.tokens[:], split.starts[1:])
        assert {part[0] for part in parts} == {corpus.tokenizer.eos_id}
        assert [corpus.tokenizer.decode(part[1:].tolist()) for part in parts] == texts
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_documents == len(texts)
    assert set(train).isdisjoint(validation)
    assert corpus.train.tokens[:1].dtype == np.uint16


def test_prepare_is_reused_until_something_changes(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(config, folder)
    written = (folder / META).stat().st_mtime_ns
    other_length = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sequence_length=16, sampling="packed")
    )
    again = prepare(other_length, folder)
    assert (folder / META).stat().st_mtime_ns == written
    fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, max_documents=20))
    assert prepare(fewer, folder).train.num_documents < again.train.num_documents


def test_the_key_is_that_of_before_there_were_options(config: TrainConfig, tmp_path: Path) -> None:
    tokenizer = prepare(config, tmp_path / "data").tokenizer
    data = {
        "sources": list(config.data.sources),
        "text_key": "text",
        "max_documents": None,
        "max_bytes": None,
        "validation_fraction": 0.1,
        "validation_sources": [],
    }
    parts = [data, {"kind": "bytes", "vocab_size": 1024}, tokenizer.fingerprint]
    text = json.dumps(parts, sort_keys=True)
    assert _key(config, tokenizer) == hashlib.sha256(text.encode()).hexdigest()
    skipping = dataclasses.replace(config.data, on_error="skip")
    assert _key(dataclasses.replace(config, data=skipping), tokenizer) != _key(config, tokenizer)


@pytest.mark.parametrize("damage", ["torn file", "no meta", "bad meta", "no tokenizer"])
def test_prepare_starts_over_from_damaged_files(
    config: TrainConfig, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "data"
    first = prepare(config, folder).train.tokens[:].copy()
    if damage == "torn file":
        (folder / "train-00000.bin").write_bytes(first[:-7].tobytes())
    elif damage == "no meta":
        (folder / META).unlink()
    elif damage == "bad meta":
        (folder / META).write_text("{")
    else:
        (folder / "tokenizer" / "tokenizer.json").unlink()
    assert np.array_equal(prepare(config, folder).train.tokens[:], first)
    assert json.loads((folder / META).read_text())["train"]["tokens"] == len(first)


def test_prepare_refuses_text_shorter_than_a_sequence(recipe: Recipe, tmp_path: Path) -> None:
    config = load_recipe(str(recipe()), ["data.sequence_length=100000"])
    with pytest.raises(DataError, match="lower data.sequence_length"):
        prepare(config, tmp_path / "data")


def test_prepare_names_the_vocabulary_the_text_fills(recipe: Recipe, tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match="a validation document is .* too, 'document 2 of the"):
        documents(config)


def test_the_hash_of_tokenised_text(tmp_path: Path, recipe: Recipe) -> None:
    config = load_recipe(str(recipe()))
    prepare(config, tmp_path / "data")
    meta = json.loads((tmp_path / "data" / META).read_text())
    digest = hashlib.sha256()
    for text in documents(config.data)[1]:
        digest.update(text.encode() + len(text.encode()).to_bytes(8, "little"))
    assert meta["validation"]["sha256"] == digest.hexdigest() != meta["train"]["sha256"]


def test_make_sampler_follows_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    kinds = {
        "packed": PackedDocuments,
        "random_window": RandomWindows,
        "carried": CarriedWindows,
    }
    for name, kind in kinds.items():
        config = load_recipe(str(recipe()), [f"data.sampling={name}"])
        corpus = prepare(config, tmp_path / "data")
        sampler = make_sampler(config, corpus, rows_per_step=4)
        assert type(sampler) is kind
        assert sampler.rows(0, 0, 4).shape == (4, 33)
        mixed = dataclasses.replace(corpus, sets=((1.0, corpus.train), (3.0, corpus.validation)))
        sampler = make_sampler(config, mixed, rows_per_step=4)
        assert type(sampler) is (MixedLanes if name == "carried" else Mixture)
        assert sampler.rows(0, 0, 4).shape == (4, 33)


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("\n\n".join(f"PARAGRAPH {i} IN CAPITALS, {i * i}." for i in range(300)))
    return path


def test_a_recipe_reads_a_prepared_text(
    recipe: Recipe, config: TrainConfig, tmp_path: Path
) -> None:
    direct = prepare(config, tmp_path / "prepared")
    data = {"sources": [], "prepared": str(tmp_path / "prepared"), "sequence_length": 32}
    path = recipe(data=data, tokenizer={})
    config = load_recipe(str(path))
    assert config.tokenizer.kind == "file"
    assert config.model.vocab_size == 257
    corpus = prepare(config, tmp_path / "run")
    assert np.array_equal(corpus.train.tokens[:], direct.train.tokens[:])
    assert not list((tmp_path / "run").glob("*.bin"))
    # The same tokenizer, said otherwise.
    padded = ["tokenizer.kind=bytes", "tokenizer.pad_to=64"]
    prepare(load_recipe(str(path), padded), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"another tokenizer \(257 entries\); leave tokenizer"):
        prepare(load_recipe(str(path), ["tokenizer.kind=bpe"]), tmp_path / "run")

    shard = tmp_path / "prepared" / "train-00000.bin"
    data_bytes = shard.read_bytes()
    shard.write_bytes(data_bytes[:-1])
    with pytest.raises(DataError, match=r"train-00000\.bin has \d+ bytes, meta\.json says \d+"):
        prepare(config, tmp_path / "run")
    shard.unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-00000\.bin: No such file"):
        prepare(config, tmp_path / "run")
    nothing = load_recipe(str(path), [f"data.prepared={tmp_path}", "tokenizer.kind=bytes"])
    with pytest.raises(DataError, match="holds no tokenised text .* spikelm data prepare"):
        prepare(nothing, tmp_path)

    # A run goes on with the text it began with.
    fewer = load_recipe(str(recipe()), ["data.max_documents=20"])
    prepare(fewer, tmp_path / "prepared")
    with pytest.raises(DataError, match="was prepared anew since the run began"):
        prepare(config, tmp_path / "run")
    assert prepare(config, tmp_path / "new run").train.num_documents < 20


def test_a_mixture_of_prepared_texts_and_sources(
    recipe: Recipe, tmp_path: Path, text: Path, other_text: Path
) -> None:
    prepare(load_recipe(str(recipe())), tmp_path / "prepared")
    mixture: list[dict[str, Any]] = [
        {"prepared": str(tmp_path / "prepared"), "weight": 3},
        {"sources": [str(other_text)], "weight": 1},
    ]
    data = {"sources": [], "mixture": mixture, "sequence_length": 32, "validation_fraction": 0.1}
    config = load_recipe(str(recipe(data=data, tokenizer={})))
    corpus = prepare(config, tmp_path / "run")
    sizes = [len(split.tokens) for _, split in corpus.sets]
    assert len(corpus.train.tokens) == sum(sizes)
    assert corpus.tokenizer.decode(corpus.train.tokens[sizes[0] + 1 :][:9].tolist()) == "PARAGRAPH"
    assert [weight for weight, _ in corpus.sets] == [3, 1]
    byte_weight = 3 * (1 - 1 / 110) + 1
    assert corpus.tokens_per_byte == pytest.approx(4 / byte_weight, rel=0.01)
    rows = make_sampler(config, corpus, 4)
    found = np.concatenate([rows.rows(step, 0, 4) for step in range(100)])
    capitals = sum(b"ARAG" in bytes(row[row < 256].astype(np.uint8)) for row in found)
    assert 60 < capitals < 140

    # Sets are tokenised once, for all weights; the tokenizer learns from all of them.
    changes = ["tokenizer.kind=bpe", "tokenizer.vocab_size=280"]
    data["mixture"] = [{"sources": [str(text)], "weight": 1}, mixture[1]]
    config = load_recipe(str(recipe(data=data, tokenizer={})), changes)
    tokens = prepare(config, tmp_path / "both").tokenizer
    assert len(tokens.encode("PARAGRAPH")) < 9 > len(tokens.encode("Document"))
    written = (tmp_path / "both" / "set-1" / META).stat().st_mtime_ns
    data["mixture"][0]["weight"] = 2
    prepare(load_recipe(str(recipe(data=data, tokenizer={})), changes), tmp_path / "both")
    assert (tmp_path / "both" / "set-1" / META).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prepared": "x"}, "give one of sources, prepared and mixture"),
        ({"mixture": [{"weight": 1}]}, "either prepared or sources"),
        ({"mixture": [{"sources": ["x"], "prepared": "y", "weight": 1}]}, "either prepared"),
        ({"mixture": [{"sources": ["x"], "weight": 0}]}, "weight: 0"),
        ({"mixture": [{"sources": ["x"]}]}, "missing key"),
        ({"sources": [], "prepared": "x", "validation_sources": ["y"]}, "hold out their own"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_bad_data_sections(recipe: Recipe, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe(data=data)))


def test_carried_states_must_not_grow(recipe: Recipe) -> None:
    path = str(recipe())
    with pytest.raises(ConfigError, match="the state of full layers grows"):
        load_recipe(path, ["data.sampling=carried", "model.mixers=[delta, full]"])
    with pytest.raises(ConfigError, match="a teacher sees one window"):
        load_recipe(path, ["data.sampling=carried", "distill.teacher=x"])


def test_joined_tokens_are_one_sequence() -> None:
    parts = [np.arange(0, 5), np.arange(5, 6), np.arange(6, 13)]
    joined = Joined(parts)
    whole = np.arange(13)
    assert len(joined) == 13
    for start in range(14):
        for stop in range(14):
            assert np.array_equal(joined[start:stop], whole[start:stop])
    assert np.array_equal(joined[:], whole)
    splits = [Split(part, np.array([0, len(part) - 1]), 10, len(part)) for part in parts]
    both = Split.join([splits[0], splits[2]])
    assert both.starts.tolist() == [0, 4, 5, 11]
    assert (both.num_documents, both.num_bytes) == (4, 20)
    assert math.isclose(len(both.tokens), 12)
