"""Model folders: config.json, model.safetensors and the tokenizer's files; never pickle.

The layout is the one of transformers, so `AutoModelForCausalLM` reads it too (`spikelm.hf`). A
spike-coded folder has the section `spike_coding` in config.json and a manifest, spikes.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spikelm.config import ModelConfig, from_dict, to_dict
from spikelm.errors import CheckpointError, ConfigError
from spikelm.folders import staged
from spikelm.kernels import event
from spikelm.models import coded
from spikelm.models.grid import LEVELS
from spikelm.models.layers import Linear
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import BASE_CHAT_TEMPLATE, CHAT_TEMPLATE, Tokenizer

MODEL_TYPE = "spikelm"
WEIGHTS = "model.safetensors"
MANIFEST = "spikes.json"
# transformers keeps the language model in the attribute `model` of its wrapper.
PREFIX = "model."


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model folder."""

    path: Path
    model: LanguageModel
    tokenizer: Tokenizer
    manifest: dict[str, Any] | None
    """Which tensors spike and how (spikes.json); None for a float model."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the weights and the tokenizer."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        with (self.path / WEIGHTS).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(self.tokenizer.fingerprint.encode())
        return digest.hexdigest()


def save(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Writes the model folder; its files appear complete or not at all.

    Raises: CheckpointError if it cannot be written.
    """
    try:
        with staged(folder) as staging:
            _write(staging, model, tokenizer, manifest)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the model to {folder}: {error}") from None


def _write(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer, manifest: dict[str, Any] | None
) -> None:
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["SpikelmForCausalLM"],
        "dtype": "float32",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "reset_token_id": tokenizer.reset_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **to_dict(model.config),
    }
    if manifest is not None:
        config["spike_coding"] = coded.coding(model)
        _write_json(folder / MANIFEST, manifest)
    tensors = {
        PREFIX + name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and manifest is None and name == "head.linear.weight")
    }
    _write_json(folder / "config.json", config)
    more = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    generation: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, *more] if more else tokenizer.eos_id,
    }
    padding = range(tokenizer.vocab_size, model.config.vocab_size)
    if padding:
        # Rows of the head without a token; `generate.Engine` leaves them out by itself.
        generation["suppress_tokens"] = [*padding]
    _write_json(folder / "generation_config.json", generation)
    tokenizer.save(folder)
    template = tokenizer.chat_template or BASE_CHAT_TEMPLATE
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    # safetensors makes the file readable by its owner alone; a model is for all who see the folder.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def load(path: str | Path, *, backend: str = "auto", device: str = "cpu") -> Checkpoint:
    """Reads a float or spike-coded model folder, ready to run on `device`.

    `backend` names the event-driven implementation of a spike-coded model (`kernels.event`).
    Raises: CheckpointError naming what is missing, damaged or does not fit; BackendError for a
    backend that is unknown or cannot run here.
    """
    folder = Path(path)
    config = read_config(folder)
    if backend != "auto":
        event.resolve(backend, device)
    model_config = model_config_of(config, folder)
    tokenizer = Tokenizer.load(folder)
    expected = config.get("tokenizer_fingerprint")
    if not tokenizer.fits(model_config.vocab_size) or (
        expected is not None and tokenizer.fingerprint != expected
    ):
        raise CheckpointError(
            f"the tokenizer in {folder} (vocabulary {tokenizer.vocab_size}, fingerprint "
            f"{tokenizer.fingerprint[:12]}) is not the model's (vocabulary "
            f"{model_config.vocab_size}, {str(expected)[:12]}); restore the folder's own "
            "tokenizer.json"
        )
    with torch.device("meta"):
        model = LanguageModel(model_config)
        spike_coded = use_coding(model, config, folder)
    manifest = _read_json(folder / MANIFEST) if spike_coded else None
    if spike_coded:
        coded.use_two_stages(model)
    _load_weights(model, folder / WEIGHTS, event.resolve(backend, device), device)
    return Checkpoint(folder, model.eval().requires_grad_(False), tokenizer, manifest)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a spikelm folder as plain data."""
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {folder}; give a folder that holds config.json")
    if (folder / "config.yaml").exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} is a training run that is not finished; continue it, or make a model of its "
            f"last checkpoint: spikelm export {folder} --out MODEL"
        )
    config = _read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} holds a '{config.get('model_type')}' model; expected '{MODEL_TYPE}'"
        )
    return config


def model_config_of(config: dict[str, Any], where: Path | str) -> ModelConfig:
    """The model configuration inside the plain data of a config.json."""
    fields = ModelConfig.__dataclass_fields__
    try:
        return from_dict(ModelConfig, {k: v for k, v in config.items() if k in fields})
    except ConfigError as error:
        raise CheckpointError(f"{where}: config.json: {error}") from None


def use_coding(model: LanguageModel, config: dict[str, Any], where: Path | str) -> bool:
    """Gives `model` the empty spike-coded linears that the plain data of a config.json asks for;
    returns whether it asks for any.
    """
    coding = config.get("spike_coding")
    if coding is None:
        return False
    names = {projection.neuron.name for projection in coded.projections(model)}
    given = coding if isinstance(coding, dict) else {}
    bits, group_size = given.get("bits"), given.get("group_size")
    by_output = given.get("by_output", [])
    if isinstance(bits, int):
        bits = dict.fromkeys(names, bits)
    if not (
        isinstance(bits, dict)
        and bits.keys() == names
        and all(type(own) is int and own in LEVELS for own in bits.values())
        and type(group_size) is int
        and group_size >= 1
        and isinstance(by_output, list)
        and all(isinstance(name, str) and name in names for name in by_output)
    ):
        shown = repr(coding)
        raise CheckpointError(
            f"{where}: config.json: spike_coding is "
            f"{shown if len(shown) < 100 else shown[:100] + ' ...'}; allowed: bits 4 or 8, once "
            "or for every projection by its name, group_size 1 or more, and by_output a list of "
            "projections in front of a ReLU"
        )
    coded.use_coded_linears(model, group_size, bits)
    allowed = coded.relu_projections(model)
    if not all(name in allowed for name in by_output):
        raise CheckpointError(
            f"{where}: config.json: spike_coding: by_output names {by_output}; allowed: 8-bit or "
            f"gated projections in front of a ReLU, {', '.join(allowed) or 'of which it has none'}"
        )
    coded.read_by_output(model, by_output)
    return True


def _load_weights(model: LanguageModel, path: Path, backend: str, device: str) -> None:
    """Fills a meta model on `device` from a safetensors file, accounting for every tensor.

    Spike-coded weights go one by one into the layout of `backend`, so that they are in memory once.
    What else is large stays a view of the file, of which the system reads what is used.
    """
    wanted = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    tied = model.config.tie_embeddings and isinstance(model.head.linear, Linear)
    if tied:
        wanted.pop(PREFIX + "head.linear.weight")
    linears = {
        f"{PREFIX}{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, coded.CodedLinear)
    }
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            _check_names(path, set(wanted), names)
            tensors = {
                name: _fitting(path, name, file.get_tensor(name), wanted[name])
                for name in sorted(names - linears.keys())
            }
        for name, linear in linears.items():
            # A file of its own for each, which is unmapped when its weights have been laid out.
            with safe_open(path, framework="pt") as file:
                weight = _fitting(path, name, file.get_tensor(name), wanted[name])
            linear.weight = weight.to(device)
            if not linear.padding_is_zero():
                raise CheckpointError(
                    f"{path} is damaged (the packed weights of {name} are not what spikelm "
                    "writes); copy or convert it again"
                )
            linear.pack(backend)
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}; the model folder is incomplete") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or convert it again") from None
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    # What was checked above is complete; packed weights are no longer there to be asked for.
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.to(device)


def _fitting(path: Path, name: str, tensor: Tensor, want: Tensor) -> Tensor:
    """The file's tensor as the model wants it. Raises: CheckpointError if it does not fit."""
    if tensor.shape != want.shape:
        raise CheckpointError(
            f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for "
            f"{list(want.shape)}; the two files belong to different models"
        )
    integral = not (tensor.is_floating_point() and want.is_floating_point())
    if integral and tensor.dtype != want.dtype:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected {want.dtype}")
    return tensor.to(want.dtype)


def _check_names(path: Path, wanted: set[str], found: set[str]) -> None:
    for problem, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"{path} {problem} {len(names)} tensor(s): {shown}; "
                "config.json and weights belong to different models"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}; the model folder is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
