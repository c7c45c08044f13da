"""Low-rank adaptation: W + (alpha / rank) B A with W fixed (Hu et al. 2021, arXiv 2106.09685).

`peft` puts A [rank, in] and B [out, rank] beside the weights of projections; B begins at zero. The
sum is what the event-driven product reads, so a merged model costs nothing extra.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spikelm.errors import ConfigError, MissingExtraError
from spikelm.models.layers import Projection
from spikelm.models.spikelm import LanguageModel
from spikelm_train.config import LoraConfig

FOLDER = "adapter"
_NAME = "default"
_PART = re.compile(rf"(.*)\.(base_layer|lora_A\.{_NAME}|lora_B\.{_NAME})\.weight")


def adapted(model: LanguageModel, config: LoraConfig) -> dict[str, Projection]:
    """The projections that the patterns of `config` name.

    Raises: ConfigError for a pattern that names none, or a head that is the embedding too.
    """
    named = {name: m for name, m in model.named_modules() if isinstance(m, Projection)}
    found: dict[str, Projection] = {}
    for pattern in config.targets:
        names = fnmatch.filter(named, pattern)
        if not names:
            raise ConfigError(
                f"lora.targets: '{pattern}' matches no projection; the names are such as "
                f"{next(iter(named))} and head"
            )
        found |= {name: named[name] for name in names}
    if "head" in found and model.config.tie_embeddings:
        raise ConfigError("lora.targets: the head is the embedding too (tie_embeddings); leave it")
    return found


def num_trained(model: LanguageModel, config: LoraConfig) -> int:
    """Entries of all A and B."""
    weights = (p.linear.get_parameter("weight") for p in adapted(model, config).values())
    return sum(config.rank * sum(weight.shape) for weight in weights)


def adapt(model: LanguageModel, config: LoraConfig) -> None:
    """Puts A and B beside the projections' weights, and lets nothing else be trained.

    Raises: MissingExtraError; ConfigError as `adapted` does.
    """
    _import().inject_adapter_in_model(_settings(model, config), model, adapter_name=_NAME)


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state of an adapted model as that of an ordinary one; any other state as it is."""
    parts: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = _PART.fullmatch(name)
        if match is None:
            found[name] = tensor
        else:
            parts.setdefault(match[1], {})[match[2].partition(".")[0]] = tensor
    for path, part in parts.items():
        change = part["lora_B"].float() @ part["lora_A"].float()
        found[f"{path}.weight"] = part["base_layer"] + config.alpha / config.rank * change
    return found


def save_adapter(model: LanguageModel, config: LoraConfig, base: str, folder: Path) -> None:
    """Writes A and B as `peft` does, for `PeftModel.from_pretrained` on the `base` model that
    transformers has loaded.
    """
    from safetensors.torch import save_file

    peft = _import()
    # transformers keeps the language model in the attribute `model`, peft its model in another one.
    tensors = {
        f"base_model.model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in peft.get_peft_model_state_dict(model, adapter_name=_NAME).items()
    }
    settings = _settings(model, config, prefix="model.")
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _settings(model: LanguageModel, config: LoraConfig, prefix: str = "") -> Any:
    return _import().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[],
        # By their weights, as peft knows no linear that takes spikes.
        target_parameters=[f"{prefix}{name}.linear.weight" for name in adapted(model, config)],
    )


def _import() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "lora") from None
    return peft
