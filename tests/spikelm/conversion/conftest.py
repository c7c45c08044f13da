"""Random checkpoints with the names and shapes of the released ones, small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

# The byte tokenizer's.
VOCAB = 257


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": 1 + 0.2 * torch.randn(width),
        f"{name}.bias": 0.2 * torch.randn(width),
    }


def _matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
    return gain * torch.randn(rows, columns) * columns**-0.5


def _rwkv(width: int, hidden: int, layers: int) -> dict[str, Tensor]:
    tensors = {
        "emb.weight": torch.randn(VOCAB, width),
        **_norm("blocks.0.ln0", width),
        **_norm("ln_out", width),
        "head.weight": _matrix(VOCAB, width),
    }
    for i in range(layers):
        tensors |= {**_norm(f"blocks.{i}.ln1", width), **_norm(f"blocks.{i}.ln2", width)}
        tensors |= {
            f"blocks.{i}.ffn.key.weight": _matrix(hidden, width),
            f"blocks.{i}.ffn.value.weight": _matrix(width, hidden),
        }
    return tensors


def rwkv4(
    width: int = 16, layers: int = 2, *, ffn_pre: bool = False, head_qk: int = 0, gain: float = 1.0
) -> dict[str, Tensor]:
    """RWKV-4's and SpikeGPT's tensors; `gain` scales what the sub-blocks give."""
    tensors = _rwkv(width, 4 * width, layers)
    for i in range(layers):
        ffn, att = f"blocks.{i}.ffn", f"blocks.{i}.att"
        tensors |= {f"{ffn}.time_mix_{x}": torch.rand(1, 1, width) for x in "kr"}
        tensors[f"{ffn}.receptance.weight"] = _matrix(width, width)
        tensors[f"{ffn}.value.weight"] *= gain
        if ffn_pre and i == 0:
            kinds = ("time_mix_k", "time_mix_r", "key.weight", "receptance.weight", "value.weight")
            for kind in kinds:
                theirs = tensors[f"{ffn}.{kind}"]
                tensors[f"blocks.0.ffnPre.{kind}"] = theirs[..., torch.randperm(theirs.shape[-1])]
            continue
        tensors |= {f"{att}.time_mix_{x}": torch.rand(1, 1, width) for x in "kvr"}
        tensors |= {
            f"{att}.time_decay": torch.linspace(-4, 2, width),
            f"{att}.time_first": torch.randn(width),
            f"{att}.key.weight": _matrix(width, width, 2.0),
            f"{att}.value.weight": _matrix(width, width),
            f"{att}.receptance.weight": _matrix(width, width),
            f"{att}.output.weight": _matrix(width, width, gain),
        }
    if head_qk:
        tensors |= {
            "head_q.weight": _matrix(head_qk, width, 3.0),
            "head_k.weight": _matrix(head_qk, width, 3.0),
            "copy_mask": torch.ones(32, 32).tril(),
        }
    return tensors


def rwkv7(width: int = 128, layers: int = 2) -> dict[str, Tensor]:
    """RWKV-7's tensors, heads of 64 as in every released model."""
    tensors = _rwkv(width, 4 * width, layers)
    ranks = {"w": 24, "a": 16, "v": 8, "g": 32}
    for i in range(layers):
        att = f"blocks.{i}.att"
        tensors |= {f"{att}.x_{x}": torch.rand(1, 1, width) for x in "rwkvag"}
        tensors[f"blocks.{i}.ffn.x_k"] = torch.rand(1, 1, width)
        for gate, rank in ranks.items():
            tensors[f"{att}.{gate}1"] = _matrix(width, rank)
            tensors[f"{att}.{gate}2"] = _matrix(rank, width)
            if gate != "g":
                tensors[f"{att}.{gate}0"] = torch.randn(1, 1, width)
        tensors |= {f"{att}.k_{x}": 1 + 0.2 * torch.randn(1, 1, width) for x in "ka"}
        tensors[f"{att}.r_k"] = torch.randn(width // 64, 64)
        for matrix in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{matrix}.weight"] = _matrix(width, width)
        tensors |= _norm(f"{att}.ln_x", width)
    return tensors


SPIKINGBRAIN = {
    "model_type": "gla_swa",
    "architectures": ["GLAswaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "swish",
    "sliding_window": 6,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}


def spikingbrain(folder: Path, *, quantised: bool = False) -> dict[str, Tensor]:
    """A SpikingBrain-7B folder in bfloat16, or its W8ASpike version; returns what it holds."""
    width, keys, hidden, rank = 32, 16, 48, 16
    tensors = {
        "model.embeddings.weight": torch.randn(VOCAB, width),
        "model.norm.weight": 1 + 0.2 * torch.randn(width),
        "lm_head.weight": _matrix(VOCAB, width),
    }
    for i in range(4):
        p = f"model.layers.{i}"
        sizes = {"q": width, "k": keys, "v": keys}
        tensors |= {f"{p}.attn.{x}_proj.weight": _matrix(n, width) for x, n in sizes.items()}
        tensors |= {f"{p}.attn.{x}_proj.bias": 0.2 * torch.randn(n) for x, n in sizes.items()}
        tensors |= {
            f"{p}.attn_norm.weight": 1 + 0.2 * torch.randn(width),
            f"{p}.mlp_norm.weight": 1 + 0.2 * torch.randn(width),
            f"{p}.attn.o_proj.weight": _matrix(width, width),
            f"{p}.mlp.gate_proj.weight": _matrix(hidden, width),
            f"{p}.mlp.up_proj.weight": _matrix(hidden, width),
            f"{p}.mlp.down_proj.weight": _matrix(width, hidden),
        }
        if i % 2 == 0:
            tensors[f"{p}.attn.g_norm.weight"] = 1 + 0.2 * torch.randn(8)
            gate = {"weight": _matrix(keys, width), "bias": torch.randn(keys)}
            if quantised:
                tensors |= {f"{p}.attn.gk_proj.{n}": x for n, x in gate.items()}
            else:
                tensors[f"{p}.attn.gk_proj.0.weight"] = _matrix(rank, width)
                tensors[f"{p}.attn.gk_proj.1.weight"] = _matrix(keys, rank)
                tensors[f"{p}.attn.gk_proj.1.bias"] = gate["bias"]
    if quantised:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            # Groups of 16 inputs (128 in the release); steps so small that some codes leave int8.
            weight = tensors[name].unflatten(1, (-1, 16))
            scales = weight.abs().amax(-1, keepdim=True) / 140
            tensors[name.removesuffix("weight") + "weight_quantizer.scales"] = scales
    else:
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SPIKINGBRAIN), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.fixture(scope="session")
def released() -> dict[str, Callable[..., dict[str, Tensor]]]:
    """Kind -> the function that makes its tensors (spikingbrain: and its folder)."""
    return {"rwkv4": rwkv4, "rwkv7": rwkv7, "spikingbrain": spikingbrain}


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., Any]:
    """Imports a path with the byte tokenizer and loads the result, in float64."""

    def run(source: Path, *options: str) -> Any:
        from spikelm import checkpoint
        from spikelm.conversion.importing.cli import main

        out = tmp_path / "imported" / source.name
        assert main([str(source), str(out), "--tokenizer", "bytes", *options]) == 0
        return checkpoint.load(out).model.double()

    return run
