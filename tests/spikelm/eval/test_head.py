from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.eval.head import SEEDS, bench_head, probabilities
from spikelm.kernels import rows
from spikelm.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


def test_greedy_draws_are_the_same_from_less(coded_folder: Path) -> None:
    report = bench_head(coded_folder, ["A text to read, one byte at a time."], tokens=24)
    greedy, warm = report["draws"]["greedy"], report["draws"]["temperature 1"]
    assert (report["tokens"], greedy["draws"]) == (24, 24 * SEEDS)
    assert greedy["draws_that_differ"] == greedy["total_variation"] == 0
    assert 0 <= warm["total_variation"] < 0.01
    assert greedy["exact_fraction"] < warm["exact_fraction"] <= 1
    assert greedy["weight_bytes"] < report["all_exact"]["weight_bytes"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=0), [0, 1, 0, 0]),
        (SamplingParams(), [0.2, 0.5, 0.2, 0.1]),
        (SamplingParams(temperature=0.5), [4 / 34, 25 / 34, 4 / 34, 1 / 34]),
        (SamplingParams(top_k=2), [2 / 7, 5 / 7, 0, 0]),
        (SamplingParams(top_p=0.45), [0, 1, 0, 0]),
        (SamplingParams(top_p=0.85), [2 / 9, 5 / 9, 2 / 9, 0]),
        (SamplingParams(top_k=3, top_p=0.7), [2 / 7, 5 / 7, 0, 0]),
    ],
)
def test_probabilities_are_those_of_draws(params: SamplingParams, expected: list[float]) -> None:
    logits = torch.tensor([0.2, 0.5, 0.2, 0.1]).log()
    found = probabilities(logits, params)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    sampler = Sampler(dataclasses.replace(params, seed=0))
    drawn = torch.tensor([sampler.sample(logits) for _ in range(2000)]).bincount(minlength=4)
    # Five standard deviations.
    assert (drawn / 2000 - found).abs().max() < 5 * (0.25 / 2000) ** 0.5
    assert not drawn[found == 0].any()


def test_command(
    coded_folder: Path, float_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "head", str(coded_folder), "--tokens", "3"]) == 0
    assert "draws that differ" in capsys.readouterr().out
    assert main(["bench", "head", str(coded_folder), "--tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3
    with pytest.raises(ConfigError, match="allowed: 2 or more"):
        bench_head(coded_folder, tokens=1)
    with pytest.raises(ConfigError, match="no head of 8-bit weights"):
        bench_head(float_folder)
