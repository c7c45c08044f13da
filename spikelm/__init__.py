"""Spiking language models: train, convert and serve them.

The names below are imported when first used, so that `import spikelm` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spikelm.config import ModelConfig
from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from spikelm.checkpoint import load
    from spikelm.generate import Engine
    from spikelm.models.spikelm import LanguageModel
    from spikelm.sampling import SamplingParams
    from spikelm.state import State

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "LanguageModel",
    "ModelConfig",
    "SamplingParams",
    "SpikelmError",
    "State",
    "load",
]

_LAZY = {
    "Engine": "spikelm.generate",
    "State": "spikelm.state",
    "LanguageModel": "spikelm.models.spikelm",
    "SamplingParams": "spikelm.sampling",
    "load": "spikelm.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'spikelm' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
