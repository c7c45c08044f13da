"""spikelm_train.experiments.study"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.config import configs, to_dict
from spikelm.errors import ConfigError, DataError
from spikelm_train.config import load_recipe
from spikelm_train.experiments import study as module
from spikelm_train.experiments.study import (
    DataFiles,
    MeasureConfig,
    Run,
    changes,
    load_study,
    plan,
    same_recipe,
)

Write = Callable[..., Path]


def runs(path: Path, **options: Any) -> list[Run]:
    _, study = load_study(str(path))
    return plan(study, study.data.resolve(), **options)


def names(found: list[Run]) -> list[str]:
    return [str(run) for run in found]


def test_every_variant_and_point_with_every_seed(study: Write) -> None:
    sweeps = {"spiking": {"optim.lr": [1e-2, 2e-2], "l1_hidden": [0, 1e-3]}}
    found = runs(study(sweeps=sweeps, seeds=[3, 5]))
    # The recipe's own values are the variant itself.
    points = ["lr=0.01,l1_hidden=0.001", "lr=0.02,l1_hidden=0", "lr=0.02,l1_hidden=0.001"]
    variants = ["dense", "spiking", *(f"spiking,{point}" for point in points)]
    assert names(found) == [f"{variant} seed {seed}" for seed in (3, 5) for variant in variants]
    last = found[-1]
    assert (last.config.optim.lr, last.config.l1_hidden, last.config.seed) == (2e-2, 1e-3, 5)
    assert last.family == "spiking"
    assert found[0].config.model == last.config.model.dense_twin()
    assert len({run.train_key for run in found}) == len({run.key for run in found}) == 10
    assert len({run.corpus_key for run in found}) == 1


def test_only_and_seeds_choose(study: Write) -> None:
    path = study(seeds=[0, 1])
    assert names(runs(path, only=["dense"])) == [
        f"dense{point} seed {seed}" for seed in (0, 1) for point in ("", ",bits=4")
    ]
    assert names(runs(path, only=["dense,bits=4"], seeds=[7])) == ["dense,bits=4 seed 7"]
    with pytest.raises(ConfigError, match="did you mean 'spiking'"):
        runs(path, only=["spikin"])


def test_conversion_shares_what_was_trained(study: Write) -> None:
    dense, four, spiking = runs(study())
    assert dense.train_key == four.train_key != spiking.train_key
    assert dense.key != four.key
    assert four.conversion == {"bits": 4, "bits_of": {}, "silence": {}}


def test_what_is_held_out_is_not_trained_on(study: Write, texts: Path) -> None:
    data = runs(study())[0].config.data
    assert [Path(file).stem for file in data.sources] == ["one", "three", "two"]
    assert data.validation_sources == (str(texts / "held.jsonl"),)


def test_keys_follow_the_text_and_not_its_place(
    study: Write, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study()
    before = runs(path)
    texts.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("STUDY_TEXTS", str(tmp_path / "elsewhere"))
    assert [run.key for run in runs(path)] == [run.key for run in before]
    with (tmp_path / "elsewhere" / "one.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    after = runs(path)
    assert not {run.train_key for run in after} & {run.train_key for run in before}


def test_options_at_their_defaults_change_no_key(study: Write) -> None:
    config = runs(study())[0].config
    assert "num_layers" not in changes(config)
    assert "spam_threshold" not in changes(config)["optim"]
    assert changes(config)["optim"]["lr"] == 1e-2
    recorded = to_dict(config)
    del recorded["optim"]["spam_threshold"]
    recorded["data"]["sources"] = ["/elsewhere"]
    assert same_recipe(recorded, config)
    assert not same_recipe(recorded, dataclasses.replace(config, steps=9))
    measure = MeasureConfig(max_bytes=7)
    keys = [
        dataclasses.replace(runs(study())[0], measure=m).key
        for m in (
            measure,
            dataclasses.replace(measure, decode_rounds=1),
            dataclasses.replace(measure, by_output_weights=0),
        )
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variant": {}}, "unknown key 'variant'; did you mean 'variants'"),
        ({"variants": {}}, "one variant and one seed at least"),
        (
            {"variants": {"dense": {"teacher": "spiking"}, "spiking": {}}},
            "variant dense: teacher 'spiking' given; allowed: a variant before it; it comes later",
        ),
        (
            {"variants": {"dense": {}, "spiking": {"teacher": "dens"}}},
            "allowed: a variant before it; did you mean 'dense'",
        ),
        ({"variants": {"a/b": {}}, "twins": [], "sweeps": {}}, "names are file names"),
        ({"variants": ["dense"]}, "variants: expected keys and values"),
        ({"variants": {"dense": {"bit": 4}}}, "unknown key 'variants.dense.bit'"),
        ({"variants": {"dense": {"set": {"model.widht": 1}}}}, "variant dense: unknown key"),
        ({"twins": ["dens"]}, "twins: no variant 'dens'; did you mean 'dense'"),
        ({"sweeps": {"x": {"seed": [1]}}}, "sweeps: no variant 'x'"),
        ({"data": {"train": ["a"]}}, "train and validation are given both"),
    ],
)
def test_mistakes_are_told(study: Write, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runs(study(**{"sweeps": {}, "twins": [], **changed}))


def test_missing_text_is_told(study: Write, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = study()
    (texts / "held.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file matches .*/held\.jsonl"):
        runs(path)
    monkeypatch.delenv("STUDY_TEXTS")
    with pytest.raises(DataError, match="STUDY_TEXTS is not set; set it to that folder"):
        runs(path)


def test_a_file_is_held_out_once(texts: Path) -> None:
    one, two = (str(texts / f"{name}.jsonl") for name in ("one", "two"))
    with pytest.raises(ConfigError, match="in validation and in test"):
        DataFiles(train=(two,), validation=(one,), test=(one,)).resolve()
    with pytest.raises(DataError, match="every file is held out"):
        DataFiles(train=(one,), validation=(one,)).resolve()


def test_the_studies_of_the_project_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without their text: all files of the same content, in place of the real ones."""
    monkeypatch.setenv("SPIKELM_DATA", str(tmp_path))
    monkeypatch.setattr(module, "describe_builtin", lambda: {"sha256": "0"})
    assert "demo-ablation" in configs("experiments")
    for name in configs("experiments"):
        _, study = load_study(name)
        assert study.twins
        for patterns in (study.data.train, study.data.validation, study.data.test):
            for pattern in patterns:
                file = Path(pattern.replace("$SPIKELM_DATA", str(tmp_path)).replace("*", "x"))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(name)
        for run in plan(study, study.data.resolve()):
            assert run.config.max_seconds is None, "a result must not depend on the machine's speed"
            assert load_recipe(study.base).model.num_layers >= run.config.model.num_layers
