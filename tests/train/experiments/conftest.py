"""A study of two variants, one of them also with weights of 4 bits, that trains in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Write = Callable[..., Path]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of five small "books", named by the variable STUDY_TEXTS."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(("one", "two", "three", "held", "last")):
        rows = [
            {"text": f"{name} {i}: the cat number {i * i + number} sat on mat {i % 7}. " * 3}
            for i in range(30)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    monkeypatch.setenv("STUDY_TEXTS", str(folder))
    return folder


@pytest.fixture
def study(tmp_path: Path, recipe: Callable[..., Path], texts: Path) -> Write:
    """Writes the study, with top-level keys replaced, and returns its path."""

    def write(**changes: Any) -> Path:
        data: dict[str, Any] = {
            "about": "Does it run?",
            "base": str(recipe(steps=4, data={"sequence_length": 32})),
            "data": {
                "train": ["$STUDY_TEXTS/*.jsonl"],
                "validation": ["$STUDY_TEXTS/held.jsonl"],
                "test": ["$STUDY_TEXTS/last.jsonl"],
            },
            "variants": {"dense": {"set": {"model.neurons": {}}}, "spiking": {}},
            "twins": ["dense"],
            "sweeps": {"dense": {"bits": [8, 4]}},
            "measure": {
                "max_bytes": 2000,
                "calibration_tokens": 1024,
                "decode_rounds": 2,
                "decode_tokens": 3,
                "decode_position": 4,
            },
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write
