from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from spikelm.config import load_model_config, load_yaml, presets, save_yaml
from spikelm.errors import ConfigError
from spikelm_train.config import differences, load_recipe


@pytest.mark.parametrize("name", ["demo", "demo-dense"])
def test_demo_recipes_load(name: str) -> None:
    config = load_recipe(name)
    assert config.model.vocab_size == config.tokenizer.size == 1024
    assert config.max_seconds is not None


def test_demo_twin_has_the_same_shapes() -> None:
    spiking, dense = load_recipe("demo"), load_recipe("demo-dense")
    assert spiking.model != dense.model
    assert spiking.model.dense_twin() == dense.model


def test_assignments_reach_inside_the_preset() -> None:
    config = load_recipe("demo", ["model.width=128", "optim.lr=3e-4", "tokenizer.vocab_size=300"])
    assert config.model.width == 128
    assert config.model.num_layers == 4
    assert config.optim.lr == 3e-4
    assert config.model.vocab_size == 300


def test_assignment_replaces_the_preset() -> None:
    config = load_recipe("demo", ["model.width=64", "model=spikelm-demo-dense"])
    assert config.model.neurons.ffn_hidden.kind == "off"
    assert config.model.width == 64


def test_sources_replace_those_of_the_recipe() -> None:
    assert load_recipe("demo", sources=["a.txt", "b.txt"]).data.sources == ("a.txt", "b.txt")


def test_bytes_have_257_entries() -> None:
    assert load_recipe("demo", ["tokenizer.kind=bytes"]).model.vocab_size == 257


@pytest.mark.parametrize("name", presets())
def test_a_preset_takes_the_vocabulary_of_the_tokenizer(name: str) -> None:
    model = load_recipe("demo", [f"model={name}"]).model
    assert model.vocab_size == 1024
    published = load_model_config(name)
    assert dataclasses.replace(published, vocab_size=1024) == model


def test_resolved_recipe_is_reloadable(tmp_path: Path) -> None:
    config = load_recipe("demo")
    save_yaml(config, tmp_path / "config.yaml")
    assert isinstance(load_yaml(tmp_path / "config.yaml")["model"], dict)
    assert load_recipe(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("step=3", "did you mean 'steps'"),
        ("steps=0", "steps: 0 given; allowed: an integer >= 1"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.schedule=cosin", "did you mean 'cosine'"),
        ("data.validation_fraction=1", "data.validation_fraction"),
        ("max_seconds=-1", "max_seconds"),
        ("revive_after=-1", "revive_after: -1 given; allowed: an integer >= 0"),
        ("optim.neuron_lr=-1", "neuron_lr: -1.0 given; allowed: a number >= 0"),
        ("optim.rates={'*.k': -1}", "rates.*.k: -1.0 given; allowed: a number >= 0"),
        ("optim.muon_momentum=1", "muon_momentum: 1.0 given"),
        ("loss_chunk=-1", "loss_chunk: -1 given; allowed: an integer >= 0"),
        ("z_loss=-1", "z_loss: -1.0 given"),
        ("ema=1", "ema: 1.0 given; allowed: 0 < decay < 1, or null"),
        ("activation_checkpointing=layer", "did you mean 'layers'"),
        ("model.vocab_size=999", "drop model.vocab_size"),
        ("model.neurons.ffn_hidden.dead_zone=0", "ffn_hidden.dead_zone"),
        ("model=spikelm-dmo", "did you mean 'spikelm-demo"),
        ("tokenizer.vocab_size=12", "vocab_size: 12 given"),
        ("data=3", "data"),
    ],
)
def test_bad_value_is_named(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_in_chunks_have_no_teacher() -> None:
    with pytest.raises(ConfigError, match="loss_chunk: 64 given; allowed: 0 with distill.teacher"):
        load_recipe("demo", ["loss_chunk=64", "distill.teacher=x"])


def test_wsd_fractions_may_not_overlap() -> None:
    with pytest.raises(ConfigError, match="exceed 1"):
        load_recipe("demo", ["optim.schedule=wsd", "optim.warmup_fraction=0.9"])


def test_recipe_without_model(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("steps: 3\n")
    with pytest.raises(ConfigError, match="names no model; add --set model=PRESET"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_progress_follows_what_ends_first(recipe: Callable[..., Path]) -> None:
    by_steps = load_recipe(str(recipe()), ["steps=10"])
    assert by_steps.progress(5, 1e9) == 0.5
    assert by_steps.progress(11, 0) == 1.0
    both = load_recipe(str(recipe()), ["steps=10", "max_seconds=100"])
    assert both.progress(5, 20) == 0.5
    assert both.progress(5, 80) == 0.8
    assert both.progress(0, 101) == 1.0


def test_differences_are_dotted() -> None:
    old = {"a": 1, "b": {"c": 2, "d": [1]}, "e": 0}
    assert differences(old, {"a": 1, "b": {"c": 3, "d": [2]}, "f": 0}) == ["b.c", "b.d", "e", "f"]
    assert differences(old, yaml.safe_load(yaml.safe_dump(old))) == []
