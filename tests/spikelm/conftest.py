"""Tiny seeded models, and folders of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm import checkpoint
from spikelm.config import (
    AttentionConfig,
    DeltaConfig,
    FFNConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
)
from spikelm.conversion.convert import convert
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer

INTEGER = NeuronConfig(kind="integer", k=6.0, dead_zone=0.5, max_count=127)
SPIKING = NeuronsConfig(
    mixer_input=INTEGER,
    mixer_output=INTEGER,
    queries_keys=INTEGER,
    ffn_hidden=NeuronConfig(kind="integer", k=6.0, dead_zone=0.5, max_count=127, unsigned=True),
)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """A configuration of two small layers; keyword arguments replace its fields."""

    def make(**fields: Any) -> ModelConfig:
        defaults: dict[str, Any] = {
            "vocab_size": Tokenizer.bytes().vocab_size,
            "width": 32,
            "mixers": ("delta", "window"),
            "neurons": SPIKING,
            "delta": DeltaConfig(num_heads=2, key_dim=8, value_dim=12, gate_rank=8),
            "attention": AttentionConfig(
                num_heads=4, num_kv_heads=2, head_dim=8, window=16, sinks=2
            ),
            "ffn": FFNConfig(hidden_dim=64),
        }
        return ModelConfig(**(defaults | fields))

    return make


@pytest.fixture(scope="session")
def float_folder(tiny_config: Callable[..., ModelConfig], tmp_path_factory: Any) -> Path:
    """A spiking float checkpoint with a byte tokenizer."""
    folder: Path = tmp_path_factory.mktemp("models") / "float"
    checkpoint.save(folder, LanguageModel(tiny_config()).initialise(0), Tokenizer.bytes())
    return folder


@pytest.fixture(scope="session")
def coded_folder(float_folder: Path) -> Path:
    """Its spike-coded conversion."""
    folder = float_folder.parent / "coded"
    generator = torch.Generator().manual_seed(0)
    convert(float_folder, folder, torch.randint(0, 257, (4, 48), generator=generator))
    return folder
