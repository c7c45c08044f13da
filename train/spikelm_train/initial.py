"""Beginning with the weights of a trained model: the next stage of its training."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from spikelm import checkpoint
from spikelm.errors import ConfigError
from spikelm.models.grid import RoundedLinear
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron


def begin_with(module: LanguageModel, folder: Path) -> None:
    """Gives `module` the weights of the float model in `folder`.

    What neurons and integer grids learn (k, dead zones, time constants, steps) is taken from there
    if it is there, else it begins as configured.

    Raises: CheckpointError for a folder that is no model; ConfigError for a spike-coded one, and
    for weights that are missing there, left over, or of another shape.
    """
    found = checkpoint.load(folder)
    if found.manifest is not None:
        raise ConfigError(
            f"init: {folder} is spike-coded, its weights are integers; give the float model that "
            "it was converted from"
        )
    theirs, ours = found.model.state_dict(), module.state_dict()
    optional = _of_neurons(module) | _of_neurons(found.model)
    for name in sorted((ours.keys() ^ theirs.keys()) - optional):
        which = "lacks" if name in ours else "has, but this recipe's model lacks,"
        raise ConfigError(f"init: the model in {folder} {which} {name}; {_WAY_OUT}")
    taken = {name: tensor for name, tensor in theirs.items() if name in ours}
    for name, tensor in taken.items():
        if tensor.shape != ours[name].shape:
            raise ConfigError(
                f"init: {name} is {list(tensor.shape)} in {folder} and {list(ours[name].shape)} in "
                f"this recipe's model; {_WAY_OUT}"
            )
    module.load_state_dict(ours | taken)


_WAY_OUT = "leave model out of the recipe, or change only its neurons and what has no weights"


def _of_neurons(model: nn.Module) -> set[str]:
    """Names in the state of `model` that another recipe for its weights may not have."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Neuron | RoundedLinear)
        for name in module.state_dict()
        if not (isinstance(module, RoundedLinear) and name == "weight")
    }
