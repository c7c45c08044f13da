"""GGUF files of random models, for llama.cpp: made from a shape without ever holding the model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np

from spikelm.config import AttentionConfig, FFNConfig, Mixer, ModelConfig
from spikelm.errors import ConfigError

Kind = Literal["rwkv7", "qwen2"]
Quantisation = Literal["Q8_0", "Q4_0"]

ALIGNMENT = 32
BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""
CHUNK_WEIGHTS = 2**22
"""Weights drawn at a time."""
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
"""Types of GGUF metadata."""
NORMAL, CONTROL = 1, 3
"""Kinds of tokens."""
STORED = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
"""ggml's numbers of how tensors are stored."""
BITS = {"Q4_0": 4, "Q8_0": 8}


class Stored(NamedTuple):
    """A tensor of a GGUF file."""

    dims: tuple[int, ...]
    """ggml's order: inputs before outputs."""
    type: str
    fill: float | None = None
    """The constant it holds; None draws weights of variance 1 / inputs."""

    @property
    def num_weights(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        if self.type in BITS:
            return self.num_weights // BLOCK * (2 + BLOCK * BITS[self.type] // 8)
        return self.num_weights * (4 if self.type == "F32" else 2)


UNREAD = tuple(f"blk.0.time_mix_v{i}.weight" for i in range(3))


def write_gguf(
    path: str | Path,
    shape: ModelConfig,
    kind: Kind | None = None,
    quantisation: Quantisation = "Q8_0",
    *,
    seed: int = 0,
    vocabulary: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """A random model for llama.cpp: projections as asked for, the head in Q8_0.

    `kind` is by default what the mixers of `shape` are; qwen2 for the shape of an RWKV-7 writes its
    `transformer_twin`. The `vocabulary` is a byte-level BPE's, tokens by id and merges; without one
    token ids are all there is to read.

    Raises: ConfigError for a shape that is neither kind's.
    """
    if quantisation not in get_args(Quantisation):
        allowed = ", ".join(get_args(Quantisation))
        raise ConfigError(f"quantisation: {quantisation} given; allowed: {allowed}")
    own = kind_of(shape)
    kind = own if kind is None else kind
    if kind != own:
        if (kind, own) != ("qwen2", "rwkv7"):
            raise ConfigError(f"kind: {kind} given; allowed for this shape: {own}")
        shape = transformer_twin(shape)
    tensors = stored_tensors(shape, quantisation)
    metadata = {
        "general.architecture": kind,
        "general.quantization_version": 2,
        "general.alignment": ALIGNMENT,
        **_tokenizer(vocabulary, shape.vocab_size),
        **{f"{kind}.{key}": value for key, value in _METADATA[kind](shape).items()},
    }
    random = np.random.default_rng(seed)
    with Path(path).open("wb") as file:
        _write_header(file, metadata, tensors)
        for tensor in tensors.values():
            _align(file)
            for chunk in _chunks(tensor, random):
                file.write(chunk.tobytes())
        _align(file)


def _tokenizer(vocabulary: tuple[Sequence[str], Sequence[str]] | None, size: int) -> dict[str, Any]:
    if vocabulary is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    known, merges = vocabulary
    tokens = [*known, *(f"<unused {i}>" for i in range(len(known), size))]
    special = [token.startswith("<") and token.endswith(">") for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if each else NORMAL for each in special],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def kind_of(shape: ModelConfig) -> Kind:
    """Which of llama.cpp's architectures has these layers. Raises: ConfigError for neither."""
    attention, ffn = shape.attention, shape.ffn
    extras: list[object] = [shape.width % BLOCK, ffn.hidden_dim % BLOCK, ffn.experts]
    extras += [shape.head_qk_dim, shape.sink_embeddings, ffn.receptance, ffn.token_shift]
    layers = {*shape.mixers, ffn.kind, shape.norm}
    if layers == {"rwkv7", "channel_mix", "layer"}:
        extras += [shape.tie_embeddings, not shape.embedding_norm]
        if not any(extras):
            return "rwkv7"
    if layers == {"full", "swiglu", "rms"}:
        extras += [shape.embedding_norm, attention.qk_norm, attention.output_bias]
        extras += [attention.rope_scaling, attention.rope_theta is None]
        extras += [attention.output_gate != "none"]
        extras += [attention.num_heads * attention.head_dim != shape.width]
        if not any(extras):
            return "qwen2"
    raise ConfigError(
        "a peer's model is an RWKV-7 as the preset rwkv7-0.4b or a Qwen2 as qwen2.5-0.5b, of a "
        f"width and ffn.hidden_dim that are multiples of {BLOCK}; this shape is neither"
    )


def transformer_twin(shape: ModelConfig) -> ModelConfig:
    """A Qwen2 of an RWKV-7's width, depth and vocabulary, and as many parameters.

    Four query heads share keys and values where heads divide by four; the feed-forward layers take
    what attention saves.
    """
    if kind_of(shape) != "rwkv7":
        raise ConfigError("a transformer twin is made from a shape with rwkv7 layers")
    heads = shape.width // shape.rwkv7.head_dim
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads // 4 if heads % 4 == 0 else heads,
        head_dim=shape.rwkv7.head_dim,
        rope_theta=1e6,
        qkv_bias=True,
    )

    def twin(hidden: int) -> ModelConfig:
        ffn = FFNConfig(kind="swiglu", hidden_dim=hidden)
        layers: tuple[Mixer, ...] = tuple("full" for _ in shape.mixers)
        return dataclasses.replace(
            shape, mixers=layers, attention=attention, ffn=ffn, norm="rms", embedding_norm=False
        )

    rest = num_weights(shape) - num_weights(twin(BLOCK))
    per_block = 3 * shape.width * shape.num_layers * BLOCK
    return twin(BLOCK * max(1, 1 + round(rest / per_block)))


def num_weights(shape: ModelConfig) -> int:
    """Parameters as llama.cpp holds them."""
    return sum(tensor.num_weights for tensor in stored_tensors(shape, "Q8_0").values())


def stored_tensors(shape: ModelConfig, quantisation: Quantisation) -> dict[str, Stored]:
    """By llama.cpp's name, in the order of the file. Raises: ConfigError as `kind_of`."""
    kind = kind_of(shape)
    D = shape.width
    embedding: str = "Q8_0" if shape.tie_embeddings else quantisation
    tensors = {"token_embd.weight": Stored((D, shape.vocab_size), embedding)}
    if not shape.tie_embeddings:
        tensors["output.weight"] = Stored((D, shape.vocab_size), "Q8_0")
    biased = shape.norm == "layer"
    tensors |= _norm("output_norm", D, biased)
    if shape.embedding_norm:
        tensors |= _norm("token_embd_norm", D, biased)
    for i in range(shape.num_layers):
        layer = _TENSORS[kind](shape, quantisation, i)
        tensors |= {f"blk.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def bytes_read(shape: ModelConfig, quantisation: Quantisation) -> float:
    """Bytes of weights that decoding a token reads: all, but of an embedding of its own one row,
    and no value gate in the first layer of an RWKV-7, whose values it would mix with themselves.
    """
    tensors = stored_tensors(shape, quantisation)
    read = {n: t.num_bytes for n, t in tensors.items() if n not in UNREAD}
    total = float(sum(read.values()))
    if shape.tie_embeddings:
        return total
    embedding = read["token_embd.weight"]
    return total - embedding + embedding / shape.vocab_size


def _norm(name: str, width: int, biased: bool) -> dict[str, Stored]:
    weight, bias = Stored((width,), "F32", 1.0), Stored((width,), "F32", 0.0)
    return {f"{name}.weight": weight} | ({f"{name}.bias": bias} if biased else {})


def _rwkv7_tensors(shape: ModelConfig, quantisation: Quantisation, i: int) -> dict[str, Stored]:
    D, F, c = shape.width, shape.ffn.hidden_dim, shape.rwkv7
    # Nothing reads the value gate of the first layer; converters store the rate's in its place.
    ranks = {"w": c.decay_rank, "a": c.rate_rank, "g": c.gate_rank}
    ranks["v"] = c.value_rank if i else c.rate_rank
    tensors = {}
    for gate, rank in ranks.items():
        # Too small to be quantised, in released files too.
        tensors[f"time_mix_{gate}1.weight"] = Stored((D, rank), "F16")
        tensors[f"time_mix_{gate}2.weight"] = Stored((rank, D), "F16")
        if gate != "g":
            tensors[f"time_mix_{gate}0.weight"] = Stored((D,), "F32", 0.0)
    for name in ("receptance", "key", "value", "output"):
        tensors[f"time_mix_{name}.weight"] = Stored((D, D), quantisation)
    for name, value in {"k_k": 1.0, "k_a": 1.0, "r_k": 0.1}.items():
        tensors[f"time_mix_{name}.weight"] = Stored((D,), "F32", value)
    return {
        **_norm("attn_norm", D, True),
        **_norm("attn_norm_2", D, True),
        **_norm("time_mix_ln", D, True),
        **tensors,
        "time_mix_lerp_fused.weight": Stored((D, 1, 1, 6), "F32", 0.5),
        "channel_mix_lerp_k.weight": Stored((D, 1, 1), "F32", 0.5),
        "channel_mix_key.weight": Stored((D, F), quantisation),
        "channel_mix_value.weight": Stored((F, D), quantisation),
    }


def _qwen2_tensors(shape: ModelConfig, quantisation: Quantisation, i: int) -> dict[str, Stored]:
    D, F, a = shape.width, shape.ffn.hidden_dim, shape.attention
    keys = a.num_kv_heads * a.head_dim
    tensors = _norm("attn_norm", D, False) | _norm("ffn_norm", D, False)
    for name, size in {"q": D, "k": keys, "v": keys}.items():
        tensors[f"attn_{name}.weight"] = Stored((D, size), quantisation)
        if a.qkv_bias:
            tensors[f"attn_{name}.bias"] = Stored((size,), "F32", 0.0)
    tensors["attn_output.weight"] = Stored((D, D), quantisation)
    for name in ("gate", "up"):
        tensors[f"ffn_{name}.weight"] = Stored((D, F), quantisation)
    tensors["ffn_down.weight"] = Stored((F, D), quantisation)
    return tensors


_TENSORS: dict[Kind, Callable[[ModelConfig, Quantisation, int], dict[str, Stored]]] = {
    "rwkv7": _rwkv7_tensors,
    "qwen2": _qwen2_tensors,
}


def _common_metadata(shape: ModelConfig) -> dict[str, int | float | str]:
    return {
        "vocab_size": shape.vocab_size,
        # Of training: what is measured may be longer, and then llama.cpp would only warn.
        "context_length": 2**20,
        "embedding_length": shape.width,
        "block_count": shape.num_layers,
        "feed_forward_length": shape.ffn.hidden_dim,
    }


def _rwkv7_metadata(shape: ModelConfig) -> dict[str, int | float | str]:
    return {
        **_common_metadata(shape),
        "attention.head_count": 0,
        "attention.layer_norm_epsilon": shape.norm_eps,
        "attention.decay_lora_rank": shape.rwkv7.decay_rank,
        "attention.iclr_lora_rank": shape.rwkv7.rate_rank,
        "attention.value_residual_mix_lora_rank": shape.rwkv7.value_rank,
        "attention.gate_lora_rank": shape.rwkv7.gate_rank,
        "wkv.head_size": shape.rwkv7.head_dim,
        "token_shift_count": 2,
    }


def _qwen2_metadata(shape: ModelConfig) -> dict[str, int | float | str]:
    assert shape.attention.rope_theta is not None
    return {
        **_common_metadata(shape),
        "attention.head_count": shape.attention.num_heads,
        "attention.head_count_kv": shape.attention.num_kv_heads,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "rope.freq_base": shape.attention.rope_theta,
    }


_METADATA = {"rwkv7": _rwkv7_metadata, "qwen2": _qwen2_metadata}


def _write_header(file: BinaryIO, metadata: dict[str, Any], tensors: dict[str, Stored]) -> None:
    def string(text: str) -> bytes:
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        if isinstance(value, str):
            packed = struct.pack("<I", STRING) + string(value)
        elif isinstance(value, list):
            texts = isinstance(value[0], str) if value else True
            packed = struct.pack("<IIQ", ARRAY, STRING if texts else INT32, len(value))
            each = map(string, value) if texts else (struct.pack("<i", v) for v in value)
            packed += b"".join(each)
        elif isinstance(value, float):
            packed = struct.pack("<If", FLOAT32, value)
        else:
            packed = struct.pack("<II", UINT32, value)
        file.write(string(key) + packed)
    offset = 0
    for name, (dims, stored_type, _) in tensors.items():
        numbers = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        file.write(string(name) + numbers + struct.pack("<IQ", STORED[stored_type], offset))
        offset += -(-tensors[name].num_bytes // ALIGNMENT) * ALIGNMENT


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _chunks(tensor: Stored, random: np.random.Generator) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor's bytes, piece by piece."""
    deviation = tensor.dims[0] ** -0.5
    for start in range(0, tensor.num_weights, CHUNK_WEIGHTS):
        size = min(CHUNK_WEIGHTS, tensor.num_weights - start)
        if tensor.fill is not None:
            yield np.full(size, tensor.fill, "<f4")
        elif tensor.type == "F16":
            yield (deviation * random.standard_normal(size, np.float32)).astype("<f2")
        else:
            yield _quantised(size // BLOCK, BITS[tensor.type], deviation, random)


def _quantised(
    blocks: int, bits: int, deviation: float, random: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Blocks of random codes behind a constant scale.

    All codes are odd: Q8_0's and, as it stores code + 8, Q4_0's then lie symmetrically around 0,
    and no sum drifts. Odd numbers below 2^(bits - 1) have the mean square (4^(bits - 1) - 1) / 3.
    """
    size = BLOCK * bits // 8
    block = np.empty(blocks, np.dtype([("scale", "<f2"), ("codes", "u1", (size,))]))
    block["scale"] = deviation / math.sqrt((4 ** (bits - 1) - 1) / 3)
    codes = np.frombuffer(random.bytes(blocks * size), np.uint8).reshape(blocks, size)
    block["codes"] = codes | (0x01 if bits == 8 else 0x11)
    return block
