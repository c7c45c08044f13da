"""The mean of several models' weights, such as those of the last checkpoints of a run.

Models that lie in one basin of the loss average to one that is usually better than each (Izmailov
et al. 2018, arXiv 1803.05407); those of different runs do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from spikelm import checkpoint
from spikelm.checkpoint import Checkpoint
from spikelm.config import to_dict
from spikelm.errors import ConfigError


@torch.no_grad()
def average(folders: Sequence[Path]) -> Checkpoint:
    """A model whose every weight is the mean over the float models in `folders`, summed in float64.

    Raises: ConfigError for fewer than two folders, spike-coded models, or models that differ in
    configuration or tokenizer; CheckpointError.
    """
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} model folder given; give two or more to average")
    # Weights are views of their files: one model is in memory.
    loaded = [checkpoint.load(folder) for folder in folders]
    for other in loaded:
        _check(loaded[0], other)
    states = [one.model.state_dict() for one in loaded]
    mean = {}
    for name, first in states[0].items():
        total = first.double()
        for state in states[1:]:
            total += state[name]
        mean[name] = (total / len(states)).to(first.dtype)
    loaded[0].model.load_state_dict(mean, assign=True)
    loaded[0].model.tie_weights()
    return loaded[0]


def _check(first: Checkpoint, other: Checkpoint) -> None:
    if other.manifest is not None:
        raise ConfigError(
            f"{other.path} is spike-coded; average the float models, then `spikelm convert`"
        )
    ours, theirs = to_dict(first.model.config), to_dict(other.model.config)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        raise ConfigError(
            f"{first.path} and {other.path} are different models ({', '.join(different)}); give "
            "checkpoints of one run"
        )
    if first.tokenizer.fingerprint != other.tokenizer.fingerprint:
        raise ConfigError(
            f"{first.path} and {other.path} have different tokenizers; give checkpoints of one run"
        )
