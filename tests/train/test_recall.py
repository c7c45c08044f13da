"""spikelm_train.recall"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.cli import main as spikelm
from spikelm.config import DeltaConfig
from spikelm.errors import ConfigError
from spikelm.models.spikelm import LanguageModel
from spikelm_train.recall import study
from spikelm_train.recall.cli import build_parser, grid
from spikelm_train.recall.study import MIXERS, Rows, Run, model_config, perform
from spikelm_train.recall.task import POWER, Size, draw, size_at

TINY = Run(
    key_dim=8,
    value_dim=8,
    steps=3,
    batch_size=2,
    sizes=(Size(16, 2), Size(16, 4)),
    vocab_size=32,
    width=16,
    eval_sequences=3,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("overwritten", [0.0, 0.25, 0.5])
def test_answers_are_the_last_values_of_their_keys(overwritten: float) -> None:
    N, T = 8, 48
    batch = draw(Size(T, N), 5, 40, generator(), overwritten)
    rows = zip(*(part.tolist() for part in batch), strict=True)
    asked = N - round(overwritten * N)
    for tokens, queries, answers in rows:
        keys, values = tokens[: 2 * N : 2], tokens[1 : 2 * N : 2]
        assert all(1 <= key < 20 for key in keys)
        assert all(20 <= value < 40 for value in values)
        assert (len(set(values)), len(set(keys))) == (N, asked)
        last = dict(zip(keys, values, strict=True))  # a later pair replaces an earlier one
        assert {tokens[at]: value for at, value in zip(queries, answers, strict=True)} == last
        assert len(set(queries)) == asked
        assert all(2 * N <= at < T and at % 2 == 0 for at in queries)
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 5
    again = draw(Size(T, N), 5, 40, generator(), overwritten)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_overwritten_values_come_before_or_after_any_other_pair() -> None:
    tokens, _, answers = draw(Size(16, 2), 64, 32, generator(), 0.5)
    assert (tokens[:, 0] == tokens[:, 2]).all()
    assert torch.equal(answers[:, 0], tokens[:, 3])
    tokens, queries, answers = draw(Size(16, 4), 200, 32, generator(), 0.25)
    first_key = tokens[:, :8:2] == tokens.gather(1, queries[:, :1])
    assert (first_key.sum(1) == 2).all()  # key 0 stands twice, in any two places
    assert len({tuple(row) for row in first_key.tolist()}) == 6


def test_slots_follow_the_power_law() -> None:
    queries = draw(Size(20, 1), 4000, 8, generator()).queries
    slots = torch.bincount((queries[:, 0] - 2) // 2, minlength=9) / 4000
    expected = torch.arange(1, 10, dtype=torch.float64) ** (POWER - 1)
    torch.testing.assert_close(slots.double(), expected / expected.sum(), atol=0.02, rtol=0)


@pytest.mark.parametrize("text", ["64", "64:0", "64:17", "a:b", "64:8:1"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: T:N"):
        Size.parse(text)


def test_a_small_vocabulary_is_refused() -> None:
    draw(Size(16, 4), 1, 10, generator())
    with pytest.raises(ConfigError, match="10 up"):
        draw(Size(16, 4), 1, 9, generator())


def test_training_begins_with_short_sequences() -> None:
    sizes, source = study.SIZES, generator()
    early = {size_at(sizes, 0.6, source) for _ in range(100)}
    late = {size_at(sizes, 0.7, source) for _ in range(100)}
    assert early == {Size(64, 4), Size(64, 8), Size(64, 16)}
    assert late == {Size(64, 16), Size(128, 16), Size(128, 32)}
    assert size_at(sizes[:1], 1.0, source) == sizes[0]


@pytest.mark.parametrize("mixer", [*MIXERS, "window+delta", "wkv4+kda"])
def test_every_mixer_runs_and_repeats(mixer: str) -> None:
    run = dataclasses.replace(TINY, mixer=mixer, spiking=0.25).reduced()
    first, second = perform(run), perform(run)
    assert min(first.pop("seconds"), second.pop("seconds")) > 0
    assert first == second == json.loads(json.dumps(first))
    assert first["accuracy"].keys() == {"16:2", "16:4"}
    spikes = "delta" in model_config(run).mixers
    assert (first["active"]["rows"] < 0.9) == spikes
    assert (first["touched_bytes"] < first["state_bytes"]) == spikes


def test_the_members_of_delta_differ() -> None:
    found = {
        name: model_config(dataclasses.replace(TINY, mixer=name)).delta
        for name in ("delta", "kda", "gdn", "deltanet")
    }
    assert {n: (c.decay, c.gates) for n, c in found.items()} == {
        "delta": (DeltaConfig().decay, DeltaConfig().gates),
        "kda": ("channel", "tied"),
        "gdn": ("scalar", "tied"),
        "deltanet": ("none", "tied"),
    }


def spiking_model() -> LanguageModel:
    return LanguageModel(model_config(dataclasses.replace(TINY, spiking=0.25))).initialise(0)


def test_rows_are_those_of_either() -> None:
    mixer, rows = spiking_model().layers[0].mixer, Rows()
    q, k = (torch.zeros(1, 1, 1, 8) for _ in range(2))
    q[..., :2], k[..., 1:4] = 9.0, 9.0
    mixer.queries(q, {}, None, rows)  # type: ignore[union-attr, operator]
    mixer.keys(k, {}, None, rows)  # type: ignore[union-attr, operator]
    assert rows.fractions() == {"queries": 2 / 8, "keys": 3 / 8, "rows": 4 / 8}
    assert Rows().fractions() == {"queries": 1.0, "keys": 1.0, "rows": 1.0}


def test_dead_zones_are_steered_and_a_run_learns() -> None:
    run = Run(
        key_dim=16,
        value_dim=16,
        spiking=0.25,
        steps=60,
        batch_size=16,
        sizes=(Size(8, 1), Size(8, 2)),
        vocab_size=16,
        width=32,
    )
    result = perform(run)
    assert result["accuracy"]["8:1"] > 0.5  # chance: 0.125
    assert result["active"]["queries"] == pytest.approx(0.25, abs=0.05)
    assert result["active"]["keys"] == pytest.approx(0.25, abs=0.05)
    assert [entry["step"] for entry in result["trace"]] == [50, 60]


def test_a_run_that_diverges_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(model_config(TINY)).initialise(0)
    with torch.no_grad():
        model.head.linear.weight.fill_(torch.inf)  # type: ignore[operator, union-attr]
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert study.train(model, TINY) == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_finished_runs_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [TINY, dataclasses.replace(TINY, seed=1)]
    first = study.study(runs[:1], tmp_path)
    trained = []

    def performed(run: Run) -> dict[str, Any]:
        trained.append(run)
        return perform(run)

    monkeypatch.setattr(study, "perform", performed)
    results = study.study(runs, tmp_path)
    assert trained == runs[1:]
    assert results[0] == first[0]
    assert results[1]["run"]["seed"] == 1
    assert {file.name for file in tmp_path.iterdir()} == {f"{run.name}.json" for run in runs}
    assert study.study(runs, tmp_path) == results
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "detla"}, "did you mean 'delta'"),
        ({"mixer": "gdn+kda"}, "one kind of delta"),
        ({"mixer": "rwkv7", "key_dim": 5}, "multiple of rwkv7.head_dim"),
        ({"spiking": 0.0}, "spiking"),
        ({"bypass": 2.0}, "bypass"),
        ({"overwritten": 0.6}, "overwritten"),
    ],
)
def test_bad_runs_are_refused_before_any_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study.study([TINY, dataclasses.replace(TINY, **changes)], None)


def test_what_a_mixer_does_not_have_is_not_varied() -> None:
    options = ["--mixer", "wkv4,gla,delta", "--spiking", "1,0.2", "--key-dim", "16,32"]
    runs = grid(build_parser().parse_args([*options, "--bypass", "0.4,0.6"]))
    found = {(r.mixer, r.key_dim, r.value_dim, r.spiking, r.bypass) for r in runs}
    assert len(found) == len(runs) == 1 + 2 + 2 * 3
    assert ("wkv4", 32, 32, 1.0, 0.0) in found
    assert ("gla", 16, 16, 1.0, 0.0) in found
    assert {entry for entry in found if entry[:3] == ("delta", 16, 16)} == {
        ("delta", 16, 16, 1.0, 0.0),
        ("delta", 16, 16, 0.2, 0.4),
        ("delta", 16, 16, 0.2, 0.6),
    }


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--key-dim", "8", "--sizes", "16:2,16:4", "--steps", "1", "--batch", "2"]
    options += ["--vocab", "32", "--width", "16", "--seeds", "0,1", "--overwrite", "0.5"]
    options += ["--mixer", "delta,wkv4", "--spiking", "0.25", "--out", str(tmp_path)]
    assert spikelm(["recall", *options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["mixer", "delta", "wkv4"]
    assert "±" in table[1]
    assert "50.0 % of the pairs overwrite" in table[4]
    assert spikelm(["recall", *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["runs"]) == 4
    assert report["runs"][0] == json.loads(
        (tmp_path / f"{Run(**_run(report['runs'][0])).name}.json").read_text()
    )
    assert spikelm(["recall", "--seeds", "a"]) == 2
    assert "--seeds takes numbers" in capsys.readouterr().err


def _run(result: dict[str, Any]) -> dict[str, Any]:
    sizes = tuple(Size.parse(text) for text in result["run"]["sizes"])
    return {**result["run"], "sizes": sizes}
