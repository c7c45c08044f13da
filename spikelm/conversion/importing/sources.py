"""Which checkpoint a path holds, and the configuration that represents it.

A `.pth` file has no configuration: everything follows from names and shapes. A folder has
config.json; what it asks for and we cannot represent is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikelm.config import ModelConfig, from_dict
from spikelm.conversion.importing import keys
from spikelm.conversion.importing.read import Tensors, read_json, read_pickle, read_safetensors
from spikelm.errors import CheckpointError, ConfigError, did_you_mean


@dataclass(frozen=True)
class Source:
    """A checkpoint of another project, recognised."""

    kind: str
    config: ModelConfig
    layout: keys.Layout
    tensors: Tensors


def open_source(path: Path, kind: str | None = None, *, binary_embedding: bool = True) -> Source:
    """Recognises the checkpoint at `path`, or takes it for one of `kind` (of `KINDS`).

    `binary_embedding` (spikegpt): the embedding's vector is thresholded, as in training.
    Raises: CheckpointError if it is none that can be represented, ConfigError for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--kind {kind} given; {did_you_mean(kind, KINDS)}")
    if kind is not None and path.is_dir() != (kind in _FOLDERS.values()):
        form = "folder" if kind in _FOLDERS.values() else ".pth file"
        raise CheckpointError(f"{path}: a {kind} checkpoint is a {form}")
    if path.is_dir():
        data = read_json(path / "config.json")
        kind = kind or _FOLDERS.get(str(data.get("model_type")))
        if kind is None:
            raise CheckpointError(
                f"{path} holds a '{data.get('model_type')}' model; allowed: {', '.join(_FOLDERS)}"
            )
        tensors = read_safetensors(path)
    else:
        data = {"binary_embedding": binary_embedding}
        tensors = read_pickle(path)
        kind = _kind_of(tensors, kind)
    try:
        config, layout = KINDS[kind](data, tensors)
        return Source(kind, from_dict(ModelConfig, config), layout, tensors)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be represented: {error}") from None


def _kind_of(tensors: Tensors, asked: str | None) -> str:
    names = tensors.shapes
    if "blocks.0.att.r_k" in names:
        if asked not in (None, "rwkv7"):
            raise CheckpointError(f"{tensors.path} holds rwkv7, not {asked}; give --kind rwkv7")
        return "rwkv7"
    if any(name.endswith((".ln_x.weight", ".time_maa_k")) for name in names):
        raise CheckpointError(
            f"{tensors.path} looks like RWKV-5 or RWKV-6; allowed: RWKV-4, RWKV-7"
        )
    if asked is not None:
        return asked
    if any(name.endswith(".att.time_decay") for name in names):
        raise CheckpointError(
            f"{tensors.path} has the tensors of RWKV-4, which are those of SpikeGPT too; "
            "say which: --kind rwkv4 or --kind spikegpt"
        )
    raise CheckpointError(
        f"{tensors.path} is no RWKV or SpikeGPT checkpoint; its first tensors are "
        f"{', '.join(list(names)[:3]) or 'none'}"
    )


# Plain data of a ModelConfig, and the table of names.
_Described = tuple[dict[str, Any], keys.Layout]


def _rwkv(tensors: Tensors) -> dict[str, Any]:
    """What RWKV-4 and RWKV-7 share."""
    vocab_size, width = _shape(tensors, "emb.weight", 2)
    return {
        "vocab_size": vocab_size,
        "width": width,
        "norm": "layer",
        "norm_eps": 1e-5,
        "embedding_norm": True,
        "ffn": {
            "kind": "channel_mix",
            "hidden_dim": _shape(tensors, "blocks.0.ffn.key.weight", 2)[0],
        },
    }


def _rwkv4(data: Mapping[str, Any], tensors: Tensors) -> _Described:
    config = _rwkv(tensors)
    mixers = ["wkv4"] * _num_blocks(tensors)
    if any(name.startswith("blocks.0.ffnPre.") for name in tensors.shapes):
        mixers[0] = "channel_mix"
    copy = {}
    if "head_q.weight" in tensors.shapes:
        copy = {"head_qk_dim": _shape(tensors, "head_q.weight", 2)[0]}
    config["ffn"]["receptance"] = True
    return {**config, "mixers": mixers, **copy}, keys.RWKV4


def _spikegpt(data: Mapping[str, Any], tensors: Tensors) -> _Described:
    config, layout = _rwkv4(data, tensors)
    lif = {"kind": "lif", "tau": 2.0, "v_threshold": 1.0, "surrogate": "arctan", "alpha": 2.0}
    neurons: dict[str, Any] = {"mixer_residual": lif, "ffn_residual": lif}
    if data["binary_embedding"]:
        neurons["embedding_output"] = {"kind": "step", "v_threshold": 0.0}
    return {**config, "neurons": neurons, "dropout": 0.03}, layout


def _rwkv7(data: Mapping[str, Any], tensors: Tensors) -> _Described:
    def rank(name: str, block: int = 0) -> int:
        return _shape(tensors, f"blocks.{block}.att.{name}", 2)[1]

    num_blocks = _num_blocks(tensors)
    shape = {
        "head_dim": _shape(tensors, "blocks.0.att.r_k", 2)[1],
        "decay_rank": rank("w1"),
        "rate_rank": rank("a1"),
        "gate_rank": rank("g1"),
    }
    if num_blocks > 1:
        shape["value_rank"] = rank("v1", 1)
    return {**_rwkv(tensors), "mixers": ["rwkv7"] * num_blocks, "rwkv7": shape}, keys.RWKV7


def _num_blocks(tensors: Tensors) -> int:
    found = (re.match(r"blocks\.(\d+)\.", name) for name in tensors.shapes)
    return max((int(match[1]) + 1 for match in found if match), default=1)


def _shape(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    shape = tensors.shapes.get(name)
    if shape is None or len(shape) != dims:
        raise CheckpointError(
            f"{tensors.path}: {name} is {'missing' if shape is None else f'of shape {list(shape)}'}"
            f"; the model's size is read from it, a tensor of {dims} dimensions"
        )
    return shape


def _spikingbrain(data: Mapping[str, Any], tensors: Tensors) -> _Described:
    """Even layers GLA, odd ones softmax attention over `sliding_window` tokens."""
    _refuse(data, tensors.path, hidden_act=("swish", "silu"), use_short_conv=(False,))
    width, layers, heads = _needed(
        data, tensors.path, "hidden_size", "num_hidden_layers", "num_attention_heads"
    )
    attended = data.get("attn_layers") or range(1, layers, 2)
    quantised = any(name.endswith(keys.SCALES) for name in tensors.shapes)
    grouped = {"num_heads": heads, "num_kv_heads": data.get("num_key_value_heads") or heads}
    channels = width // heads
    spikes = {"kind": "integer", "k": 3.0}
    spiking = ("mixer_input", "mixer_output", "ffn_input", "ffn_hidden", "attention_queries")
    return {
        **_shared(data, tensors.path),
        "mixers": ["window" if layer in attended else "gla" for layer in range(layers)],
        "norm_eps": data.get("norm_eps", 1e-6),
        "gla": {
            **grouped,
            "key_dim": channels,
            "value_dim": channels,
            "gate_rank": None if quantised else 16,
            "gate_temperature": 16.0,
            "feature_map": "relu",
            "qkv_bias": True,
        },
        "attention": {
            **grouped,
            "head_dim": channels,
            "window": data.get("sliding_window", 4096),
            "sinks": 0,
            "rope_theta": data.get("rope_theta", 1e6),
            "qkv_bias": True,
            "kv_bits": 8 if quantised else None,
        },
        "neurons": dict.fromkeys(spiking, spikes) if quantised else {},
    }, (keys.W8ASPIKE if quantised else keys.SPIKINGBRAIN)


def _transformers(data: Mapping[str, Any], tensors: Tensors, kind: str) -> _Described:
    scaled = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope = {"rope_theta": data.get("rope_theta", 10000.0), **scaled}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    shared = _shared(data, tensors.path)
    layers, heads = _needed(data, tensors.path, "num_hidden_layers", "num_attention_heads")
    types = data.get("layer_types") or _layer_types(data, layers)
    _refuse(
        {
            **data,
            "rope_type": rope_type,
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
            "layer_types": next((t for t in types if t not in _MIXERS), "full_attention"),
        },
        tensors.path,
        hidden_act=("silu",),
        mlp_bias=(False,),
        rope_type=("default", "llama3"),
        partial_rotary_factor=(1.0,),
        layer_types=tuple(_MIXERS),
    )
    scaling = None
    if rope_type == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = {name: rope.get(name) for name in names}
        scaling["original_positions"] = rope.get("original_max_position_embeddings")
    biased = bool(data.get("attention_bias", False))
    attention = {
        "num_heads": heads,
        "num_kv_heads": data.get("num_key_value_heads") or heads,
        "head_dim": data.get("head_dim") or shared["width"] // heads,
        "sinks": 0,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "qkv_bias": kind == "qwen2" or biased,
        "output_bias": kind != "qwen2" and biased,
        "qk_norm": kind == "qwen3",
    }
    if "sliding_attention" in types:
        attention["window"] = data.get("sliding_window")
    return {
        **shared,
        "mixers": [_MIXERS[t] for t in types],
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "attention": attention,
    }, keys.TRANSFORMERS


_MIXERS = {"full_attention": "full", "sliding_attention": "window"}


def _layer_types(data: Mapping[str, Any], layers: int) -> list[str]:
    """Configurations from before `layer_types`: the last layers may slide."""
    slides = data.get("use_sliding_window") and data.get("sliding_window") is not None
    first = data.get("max_window_layers", layers) if slides else layers
    return ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]


def _shared(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What every config.json says in the same words."""
    names = ("vocab_size", "hidden_size", "intermediate_size")
    vocab_size, width, hidden = _needed(data, path, *names)
    return {
        "vocab_size": vocab_size,
        "width": width,
        "tie_embeddings": data.get("tie_word_embeddings", False),
        "ffn": {"kind": "swiglu", "hidden_dim": hidden},
    }


def _needed(data: Mapping[str, Any], path: Path, *names: str) -> list[int]:
    wrong = [name for name in names if type(data.get(name)) is not int or data[name] < 1]
    if wrong:
        raise CheckpointError(f"{path}: config.json needs a whole number for {', '.join(wrong)}")
    return [data[name] for name in names]


def _refuse(data: Mapping[str, Any], path: Path, **allowed: tuple[Any, ...]) -> None:
    """Raises CheckpointError listing every value outside the allowed ones; absent is the first."""
    wrong = [
        f"{name} {data[name]!r} (allowed: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if data.get(name, values[0]) not in values
    ]
    if wrong:
        raise CheckpointError(f"{path} cannot be represented: {'; '.join(wrong)}")


KINDS: dict[str, Callable[[Mapping[str, Any], Tensors], _Described]] = {
    "spikegpt": _spikegpt,
    "rwkv4": _rwkv4,
    "rwkv7": _rwkv7,
    "spikingbrain": _spikingbrain,
    "llama": lambda data, tensors: _transformers(data, tensors, "llama"),
    "qwen2": lambda data, tensors: _transformers(data, tensors, "qwen2"),
    "qwen3": lambda data, tensors: _transformers(data, tensors, "qwen3"),
}
"""Kind -> the function that describes such a checkpoint."""

# model_type in config.json -> kind.
_FOLDERS = {"gla_swa": "spikingbrain", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
