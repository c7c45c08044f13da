"""A run small enough to train in a test: 0.05 M parameters, bytes, two layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spikelm_train.config import load_recipe
from spikelm_train.data import prepare
from spikelm_train.parallel import make_accelerator
from spikelm_train.resume import claim
from spikelm_train.trainer import Trainer

RECIPE: dict[str, Any] = {
    "model": {
        "width": 32,
        "mixers": ["delta", "window"],
        "delta": {"num_heads": 2, "key_dim": 16, "value_dim": 16, "gate_rank": 8},
        "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "window": 16, "sinks": 1},
        "ffn": {"kind": "channel_mix", "hidden_dim": 64},
        "neurons": {
            "mixer_input": {"kind": "integer", "dead_zone": 0.5, "target_silence": 0.5},
            "ffn_hidden": {
                "kind": "integer",
                "unsigned": True,
                "dead_zone": 0.5,
                "target_silence": 0.9,
            },
        },
    },
    "tokenizer": {"kind": "bytes"},
    "data": {"sequence_length": 32, "validation_fraction": 0.1},
    "optim": {"lr": 1e-2, "warmup_fraction": 0.0},
    "micro_batch_size": 4,
    "steps": 10,
    "precision": "fp32",
    "log_every": 1,
    "eval_every": 0,
    "eval_tokens": 512,
    "save_every": 0,
    # Measuring it takes a quarter of a second.
    "peak_flops": 1e12,
}


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """One thread, since models this small gain nothing from two; undoes what a run changes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The tiny recipe."""
    return copy.deepcopy(RECIPE)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty different short documents."""
    path = tmp_path / "text.jsonl"
    rows = [
        {"text": f"Document {i} says that the cat number {i * i} sat on mat {i % 7}. " * 3}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, text: Path) -> Callable[..., Path]:
    """Writes the tiny recipe with top-level keys replaced, or left out (None); returns its path."""

    def write(**changes: Any) -> Path:
        data = {**RECIPE, **changes}
        data["data"] = {"sources": [str(text)], **data["data"]}
        path = tmp_path / "recipe.yaml"
        given = {key: value for key, value in data.items() if value is not None}
        path.write_text(yaml.safe_dump(given))
        return path

    return write


@pytest.fixture
def make(recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Trainer]:
    """Builds a trainer of the tiny recipe, or the one at `path`, with assignments, in
    `tmp_path`/<out>.
    """

    def build(*assignments: str, out: str = "out", path: Path | None = None) -> Trainer:
        config = load_recipe(str(path or recipe()), assignments)
        claim(tmp_path / out, config, fresh=False, num_processes=1)
        corpus = prepare(config, tmp_path / "data")
        return Trainer(config, tmp_path / out, corpus, make_accelerator(config), None)

    return build
