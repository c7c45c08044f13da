from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.eval.head import SEEDS, bench_head
from spikelm.kernels import rows

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


def test_greedy_draws_are_the_same_from_less(coded_folder: Path) -> None:
    report = bench_head(coded_folder, ["A text to read, one byte at a time."], tokens=24)
    greedy, warm = report["draws"]["greedy"], report["draws"]["temperature 1"]
    assert (report["tokens"], greedy["draws"]) == (24, 24 * SEEDS)
    assert greedy["draws_that_differ"] == 0
    assert greedy["exact_fraction"] < warm["exact_fraction"] <= 1
    assert greedy["weight_bytes"] < report["all_exact"]["weight_bytes"]


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
