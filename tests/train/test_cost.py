from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spikelm.config import ModelConfig, from_dict, load_model_config
from spikelm.models.spikelm import LanguageModel
from spikelm_train.config import load_recipe
from spikelm_train.cost import (
    LayerCost,
    forward_flops,
    layer_costs,
    least_bytes,
    memory_by_category,
    meta_model,
    parameters_by_kind,
    state_bytes,
    training_flops,
)

CPU = torch.device("cpu")
SHAPES = {
    "delta": {"delta": {"num_heads": 2, "key_dim": 16, "value_dim": 16, "gate_rank": 8}},
    "window": {"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "window": 16}},
    "full": {"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}},
    "gla": {"gla": {"num_heads": 2, "num_kv_heads": 2, "key_dim": 16, "value_dim": 16}},
    "rwkv7": {"rwkv7": {"head_dim": 16}},
    "wkv4": {},
}


def shape(*mixers: str) -> ModelConfig:
    parts = {name: part for mixer in mixers for name, part in SHAPES[mixer].items()}
    data = {"width": 32, "vocab_size": 300, "mixers": list(mixers), **parts}
    return from_dict(ModelConfig, {**data, "ffn": {"kind": "channel_mix", "hidden_dim": 64}})


def counted(config: ModelConfig, tokens: int, *, backward: bool = False) -> int:
    """What torch counts in the whole model, triangular solves left out."""
    model = LanguageModel(config).initialise(0)
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(torch.zeros(1, tokens, dtype=torch.int64))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mixer", ["window", "full", "gla", "rwkv7", "wkv4"])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_flops_are_those_of_the_whole_model(mixer: str, tokens: int) -> None:
    config = shape("gla", mixer)
    layers = layer_costs(config, tokens, CPU, "fp32")
    found = forward_flops(config, layers) * tokens
    # C (K + V) per token and head of the triangular solves, which torch leaves out.
    solves = 64 * (16 + 16) * 2 * tokens if mixer == "rwkv7" else 0
    assert found == pytest.approx(counted(config, tokens) + solves, rel=1e-3)


def test_projections_alone_take_two_flops_per_weight() -> None:
    config = shape("wkv4", "wkv4")
    weights = sum(
        p.numel() for n, p in meta_model(config).named_parameters() if n.endswith("linear.weight")
    )
    assert forward_flops(config, layer_costs(config, 96, CPU, "fp32")) == 2 * weights


def test_the_triangular_solve_is_counted() -> None:
    config = shape("delta")
    found = forward_flops(config, layer_costs(config, 64, CPU, "fp32"))
    # C (K + V) per token and head.
    assert found - counted(config, 64) / 64 == 64 * (16 + 16) * 2


def test_training_takes_three_times_the_forward_pass() -> None:
    config = shape("delta", "window")
    layers = layer_costs(config, 128, CPU, "fp32")
    assert training_flops(config, layers) == 3 * forward_flops(config, layers)
    ratio = counted(config, 128, backward=True) / counted(config, 128)
    assert ratio == pytest.approx(3, rel=0.03)


def test_attention_to_everything_costs_more_per_token_of_a_longer_text() -> None:
    costs = {
        kind: [layer_costs(shape(kind), n, CPU, "fp32")[kind] for n in (1024, 4096)]
        for kind in ("full", "window")
    }
    short, long = costs["full"]
    assert long.flops > 1.5 * short.flops
    assert long.saved_bytes > 1.5 * short.saved_bytes
    short, long = costs["window"]
    assert long.flops == short.flops
    assert long.saved_bytes == short.saved_bytes


def test_a_layer_is_run_without_touching_the_random_numbers_of_the_run() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    layer_costs(shape("delta"), 32, CPU, "fp32")
    assert torch.equal(torch.rand(4), expected)


def test_parameters_by_kind_add_up() -> None:
    for name in ("spikelm-demo", "rwkv7-0.1b", "llama-3.2-1b"):
        model = meta_model(load_model_config(name))
        found = parameters_by_kind(model)
        assert sum(found.values()) == sum(p.numel() for p in model.parameters())
        assert all(found[kind] > 0 for kind in ("embedding", "mixers", "ffn"))
    assert found["head"] == 0  # tied
    demo = parameters_by_kind(meta_model(load_model_config("spikelm-demo")))
    assert demo["embedding"] == demo["head"] == 1024 * 192
    # A k and a dead zone per channel of every spiking population.
    assert 0 < demo["neurons"] < 10_000


def test_memory_categories(recipe: Callable[..., Path]) -> None:
    config = load_recipe(str(recipe()))
    layers = layer_costs(config.model, 32, CPU, "fp32")
    found = memory_by_category(config, layers, CPU)
    model = meta_model(config.model)
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found["gradients"], found["moments"]) == (trained, 2 * trained)
    assert least_bytes(config) == found["weights"] + 3 * trained
    assert found["logits"] == 12 * 4 * 32 * 257
    larger = dataclasses.replace(config, micro_batch_size=40)
    assert memory_by_category(larger, layers, CPU)["activations"] == 10 * found["activations"]
    fixed = {kind: LayerCost(0.0, 0.0, 1000.0) for kind in layers}
    assert memory_by_category(larger, fixed, CPU)["activations"] == 2000


def test_activations_are_what_autograd_keeps() -> None:
    config = shape("gla", "wkv4")
    layers = layer_costs(config, 1024, CPU, "fp32")
    model = LanguageModel(config).initialise(0)
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        tokens = torch.zeros(3, 1024, dtype=torch.int64)
        logits, _ = model(tokens, reset=tokens == 1)
    assert logits.requires_grad
    found = sum(storage.nbytes() for at, storage in kept.items() if at not in own)
    expected = sum(3 * 1024 * cost.saved_bytes + cost.fixed_bytes for cost in layers.values())
    # The last norm and the head keep something too.
    assert expected == pytest.approx(found, rel=0.06)


def test_state_bytes_of_growing_and_constant_memories() -> None:
    assert state_bytes(shape("gla"))["bytes_per_token"] == 0
    # A key and a value of one head.
    assert state_bytes(shape("full"))["bytes_per_token"] == 4 * 2 * 16
