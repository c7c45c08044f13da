"""spikelm.eval.recompute"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from spikelm.config import load_model_config
from spikelm.errors import ConfigError
from spikelm.eval import recompute
from spikelm.eval.cli import main_bench
from spikelm.eval.recompute import FORMS, bench_recompute, measure
from spikelm.eval.tables import recompute_table


def test_a_step_takes_memory_for_its_logits() -> None:
    config = dataclasses.replace(load_model_config("spikelm-demo"), vocab_size=30_000)
    cost = measure(config, "nothing", 1, 128, 16, 1)
    assert cost["seconds"]
    assert cost["peak_bytes"]
    assert cost["peak_bytes"] > 2 * 4 * 128 * 30_000


def test_every_vocabulary_and_form_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scripted(config: Any, form: str, *rest: int) -> dict[str, float | None]:
        asked.append((config.vocab_size, form, *rest))
        if config.vocab_size == 2000 and form == "nothing":
            return {"seconds": None, "peak_bytes": None}
        return {"seconds": 1.0 + FORMS[form][1], "peak_bytes": 2**20}

    monkeypatch.setattr(recompute, "_in_fresh_process", scripted)
    report = bench_recompute("spikelm-demo", vocabularies=[1000, 2000], batch=3, tokens=5, chunk=7)
    assert asked == [(n, form, 3, 5, 7, 3) for n in (1000, 2000) for form in FORMS]
    lines = recompute_table(report).splitlines()
    assert lines[3].split() == ["1,000", "layers", "1.0", "MiB", "2.00", "s", "2.00", "x"]
    assert lines[5].split() == ["2,000", "nothing", "killed", "-", "-"]
    assert lines[6].split()[-1] == "-"


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--vocab", "300", "--batch", "1", "--tokens", "9", "--repeats", "1", "--json"]
    assert main_bench(["recompute", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["again"] for row in report["measurements"]] == list(FORMS)
    assert all(row["seconds"] > 0 for row in report["measurements"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab", "1k"], "--vocab takes integers like 256,1024, got '1k'"),
        (["--vocab", "0"], "vocabulary 0: 0 given"),
        (["--chunk", "0"], "chunk: 0 given; allowed: an integer >= 1"),
        (["nowhere"], "no such file or preset"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main_bench(["recompute", *arguments])
    assert message in str(caught.value)
