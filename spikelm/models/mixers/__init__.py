"""Token mixers: modules around the kernels, each `(x, state, context) -> (y, state)`.

Every module of this package names the mixers it holds in `MIXERS`.
"""

from __future__ import annotations

import importlib
import pkgutil

from spikelm.config import ModelConfig
from spikelm.models.layers import MixerTable, Part

MIXERS: MixerTable = {
    kind: make
    for module in pkgutil.iter_modules(__path__)
    for kind, make in importlib.import_module(f"{__name__}.{module.name}").MIXERS.items()
}


def make_mixer(config: ModelConfig, layer: int) -> Part:
    """The mixer of layer `layer`."""
    return MIXERS[config.mixers[layer]](config, layer)
