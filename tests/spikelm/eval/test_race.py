"""spikelm.eval.race"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import BackendError, ConfigError, DataError
from spikelm.eval import race as module
from spikelm.eval.peers import InProcess, Reader, Seconds
from spikelm.eval.race import FolderReader, race
from spikelm.kernels import rows

TEXT = "What is read here matters for what is silent. " * 4


class Turns(InProcess):
    """Says who was asked."""

    asked: list[str]

    def decode_at(self, position: int, n: int) -> list[Seconds]:
        self.asked.append(self.name)
        return super().decode_at(position, n)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Contestants in this process; the order of their turns."""
    asked: list[str] = []

    def spawned(name: str, build: Callable[..., Reader], *arguments: Any) -> InProcess:
        contestant = Turns(name, build(*arguments))
        contestant.asked = asked
        return contestant

    monkeypatch.setattr(module, "Spawned", spawned)
    return asked


@pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")
def test_models_take_turns(coded_folder: Path, float_folder: Path, here: list[str]) -> None:
    models = {"a": coded_folder, "b": coded_folder, "float": float_folder}
    found = race(models, TEXT, rounds=3, tokens=4, position=5)
    assert here == ["a", "b", "b", "a", "a", "b"]
    assert found["missing"] == {
        "float": "this model does not decode natively: its weights are floats"
    }
    assert list(found["models"]) == ["a", "b"]
    for model in found["models"].values():
        assert len(model["ms"]) == len(model["cpu_ms"]) == 3
        assert min(model["ms"]) > 0
        assert 0 < model["silent_fraction"] < 1
    assert found["models"]["a"]["silent_fraction"] == found["models"]["b"]["silent_fraction"]


@pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")
def test_a_turn_reads_the_text_behind_its_position(coded_folder: Path) -> None:
    reader = FolderReader(str(coded_folder), TEXT, 1)
    reader.hold(5)
    reader.read(3)
    logits, _ = reader.engine.step(reader.ids[8][None], reader.state)
    expected, _ = reader.engine.prefill(reader.ids[:9].tolist())
    assert logits[0].tolist() == pytest.approx(expected[0].tolist(), abs=1e-3)
    with pytest.raises(DataError, match="too few; give a longer one"):
        reader.hold(10_000)


def test_what_cannot_be_measured_is_told(coded_folder: Path, float_folder: Path) -> None:
    with pytest.raises(ConfigError, match="rounds: 0 given"):
        race({"a": coded_folder}, TEXT, rounds=0)
    with pytest.raises(DataError, match="no text"):
        race({"a": coded_folder}, "")
    with pytest.raises(BackendError, match="its weights are floats"):
        FolderReader(str(float_folder), TEXT, 1)
