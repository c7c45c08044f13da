"""spikelm.config, and every file in configs/"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spikelm import config
from spikelm.config import (
    TENSOR_CLASSES,
    AttentionConfig,
    ExpertsConfig,
    FFNConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    find_config,
    from_dict,
    load_model_config,
    load_yaml,
    override,
    save_yaml,
    to_dict,
)
from spikelm.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

SPIKING = ModelConfig(
    mixers=("delta", "window"),
    neurons=NeuronsConfig(ffn_hidden=NeuronConfig(kind="integer", unsigned=True, max_count=7)),
    attention=AttentionConfig(rope_theta=None, head_dim=33),
    norm_eps=1e-6,
)


def files(folder: str) -> list[Any]:
    return [pytest.param(p, id=p.stem) for p in sorted((CONFIGS / folder).glob("*.yaml"))]


@pytest.mark.parametrize("path", files("models"))
def test_every_model_preset_loads_by_name_and_is_complete(path: Path) -> None:
    loaded = load_model_config(path.stem)
    assert from_dict(ModelConfig, to_dict(loaded)) == loaded
    assert from_dict(ModelConfig, load_yaml(path)) == loaded


@pytest.mark.skipif(
    importlib.util.find_spec("spikelm_train.config") is None, reason="no training recipes yet"
)
@pytest.mark.parametrize("path", files("train"))
def test_every_training_recipe_loads(path: Path) -> None:
    from spikelm_train.config import TrainConfig, load_recipe

    given = load_yaml(path)
    # What begins with another run's model or text is given one here.
    first = "model" in given and "prepared" not in given["data"]
    alone = ["init=null", "model=spikelm-demo", "tokenizer={kind: bytes}", "data.prepared=null"]
    more = [] if first else [*alone, "data.sources=[text.jsonl]"]
    recipe = load_recipe(path.stem, more)
    assert recipe == load_recipe(str(path), more)
    assert from_dict(TrainConfig, to_dict(recipe)) == recipe


@pytest.mark.parametrize("original", [ModelConfig(), SPIKING])
def test_yaml_round_trip(original: ModelConfig, tmp_path: Path) -> None:
    save_yaml(original, tmp_path / "model.yaml")
    assert load_model_config(str(tmp_path / "model.yaml")) == original
    assert from_dict(ModelConfig, to_dict(original)) == original


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"widht": 3}, "unknown key 'widht'; did you mean 'width'?"),
        ({"delta": {"keydim": 3}}, "unknown key 'delta.keydim'; did you mean 'key_dim'?"),
        ({1: 2}, "unknown key '1'; allowed: attention, delta,"),
        ({"width": 3.0}, "width: expected int, got 3.0"),
        ({"width": True}, "width: expected int, got True"),
        ({"width": "3"}, "width: expected int, got '3'"),
        ({"width": None}, "width: expected int, got None"),
        ({"width": 0}, "width: 0 given; allowed: an integer >= 1"),
        ({"tie_embeddings": 1}, "tie_embeddings: expected bool, got 1"),
        ({"norm_eps": "tiny"}, "norm_eps: expected float, got 'tiny'"),
        ({"norm_eps": False}, "norm_eps: expected float, got False"),
        ({"mixers": []}, "mixers: [] given; allowed: at least one layer"),
        ({"mixers": "delta"}, "mixers: expected a list, got 'delta'"),
        ({"mixers": ["delta", "detla"]}, "mixers[1]: 'detla' given; allowed: delta, gla"),
        ({"attention": None}, "attention: expected keys and values, got None"),
        ([1], "configuration: expected keys and values, got [1]"),
        ({"attention": {"num_heads": 3, "num_kv_heads": 2}}, "attention: num_heads 3 is not a"),
        ({"attention": {"head_dim": 33}}, "attention.head_dim: 33 given; allowed: even when RoPE"),
        ({"attention": {"sinks": -1}}, "attention.sinks: -1 given; allowed: an integer >= 0"),
        ({"delta": {"decay_floor": 0.5}}, "delta.decay_floor: 0.5 given; allowed: -2 <= floor"),
        ({"ffn": {"hidden_dim": 0}}, "ffn.hidden_dim: 0 given; allowed: an integer >= 1"),
        ({"neurons": {"ffn_hidden": {"kind": "integr"}}}, "did you mean 'integer'?"),
        ({"neurons": {"ffn_hidden": {"k": 0}}}, "neurons.ffn_hidden.k: 0.0 given; allowed: a nu"),
        (
            {"neurons": {"ffn_hidden": {"max_count": 128}}},
            "max_count: 128 given; allowed: 1 to 127",
        ),
        ({"neurons": {"ffn_hidden": {"max_count": True}}}, "max_count: expected int, got True"),
        ({"neurons": {"ffn_hidden": {"tau": 0.5}}}, "tau: 0.5 given; allowed: a number >= 1"),
        (
            {"neurons": {"ffn_hidden": {"target_silence": 0.9}}},
            "target_silence needs kind: integer",
        ),
        ({"neurons": {"queries_keys": {"kind": "lif"}}}, "queries_keys takes kind: off, in"),
        ({"neurons": {"ffn_hidden": {"bypass": 0.2}}}, "ffn_hidden: bypass needs a kind that sp"),
        (
            {"neurons": {"ffn_hidden": {"kind": "integer", "bypass": 1.5}}},
            "ffn_hidden.bypass: 1.5 given; allowed: 0 to 1",
        ),
        ({"neurons": {"ffn_hidden": {"learn": "k"}}}, "neurons.ffn_hidden.learn: 'k' given; allow"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        from_dict(ModelConfig, data)
    assert "\n" not in str(raised.value)


def test_values_that_yaml_writes_in_several_ways() -> None:
    assert from_dict(ModelConfig, {"norm_eps": "3e-4"}).norm_eps == 3e-4
    assert from_dict(NeuronConfig, {"k": 2}).k == 2.0
    assert from_dict(NeuronConfig, {"max_count": None}).max_count is None
    assert from_dict(ModelConfig, {"mixers": ["full"]}).mixers == ("full",)


def test_a_missing_key_is_named() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Inner:
        size: int

    with pytest.raises(ConfigError, match=r"^missing key 'inner\.size'$"):
        from_dict(Inner, {}, "inner")


def test_load_yaml_names_the_file(tmp_path: Path) -> None:
    cases = {
        "list.yaml": b"- 1",
        "broken.yaml": b"a: [",
        "latin.yaml": b"a: \xe9",
        "empty.yaml": b"",
    }
    for name, text in cases.items():
        (tmp_path / name).write_bytes(text)
    for path in (*(tmp_path / name for name in cases), tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))) as raised:
            load_yaml(path)
        assert "\n" not in str(raised.value)


def test_load_yaml_runs_no_tags(tmp_path: Path) -> None:
    (tmp_path / "tag.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(tmp_path / "tag.yaml")


def test_find_config_suggests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "spikelm"
    for folder in (package / "configs" / "models", tmp_path / "configs" / "models"):
        folder.mkdir(parents=True)
    (tmp_path / "configs/models/tiny.yaml").write_text("width: 8")
    (tmp_path / "configs/models/both.yaml").write_text("width: 8")
    (package / "configs/models/both.yaml").write_text("width: 16")
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))
    assert find_config("models", "tiny") == tmp_path / "configs/models/tiny.yaml"
    assert load_model_config("both").width == 16
    assert find_config("models", str(tmp_path / "configs/models/tiny.yaml")).is_file()
    with pytest.raises(ConfigError, match=r"preset \(models\): 'tniy'; did you mean 'tiny'\?"):
        find_config("models", "tniy")


def test_override() -> None:
    data = {"a": {"b": 1}, "keep": [1]}
    result = override(data, ["a.b=3", "c.d=[1, 2]", "e=3e-4", "f=", "g=a=b"])
    assert result == {
        "a": {"b": 3},
        "keep": [1],
        "c": {"d": [1, 2]},
        "e": "3e-4",
        "f": None,
        "g": "a=b",
    }
    assert data == {"a": {"b": 1}, "keep": [1]}


@pytest.mark.parametrize("assignment", ["a", "=1", "keep.b=1", "a={"])
def test_override_refuses(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set"):
        override({"keep": 1}, [assignment])


def test_dense_twin_differs_in_its_neurons_only() -> None:
    twin = SPIKING.dense_twin()
    assert {getattr(twin.neurons, name).kind for name in TENSOR_CLASSES} == {"off"}
    assert dataclasses.replace(twin, neurons=SPIKING.neurons) == SPIKING
    assert twin.dense_twin() == twin


def test_there_is_a_neuron_for_every_tensor_class() -> None:
    assert tuple(f.name for f in dataclasses.fields(NeuronsConfig)) == TENSOR_CLASSES


def test_every_field_says_what_it_is() -> None:
    for name, cls in inspect.getmembers(config, dataclasses.is_dataclass):
        source = inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            described = rf"\n    {field.name}: [^\n]+\n    \"\"\"."
            assert re.search(described, source), f"{name}.{field.name}"


def test_yaml_is_written_in_the_order_of_the_fields(tmp_path: Path) -> None:
    save_yaml(ModelConfig(), tmp_path / "model.yaml")
    written = list(yaml.safe_load((tmp_path / "model.yaml").read_text()))
    assert written == [f.name for f in dataclasses.fields(ModelConfig)]


def test_a_field_may_map_names_to_values() -> None:
    @dataclasses.dataclass(frozen=True)
    class Named:
        numbers: dict[str, float]
        anything: dict[str, Any]

    hints = {"numbers": dict[str, float], "anything": dict[str, Any]}
    Named.__annotations__ = hints
    made = config.from_dict(Named, {"numbers": {"a": 1, 2: "1e-3"}, "anything": {"b": [None]}})
    assert made == Named({"a": 1.0, "2": 1e-3}, {"b": [None]})
    with pytest.raises(ConfigError, match=r"numbers\.a: expected float, got 'x'"):
        config.from_dict(Named, {"numbers": {"a": "x"}, "anything": {}})
    with pytest.raises(ConfigError, match=r"numbers: expected keys and values, got \[1\]"):
        config.from_dict(Named, {"numbers": [1], "anything": {}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_shift": True}, "token_shift is for swiglu and reglu; channel_mix always has one"),
        (
            {"kind": "swiglu", "token_shift": True, "experts": ExpertsConfig()},
            "token_shift: true needs experts: null; a routed token has no past",
        ),
        ({"kind": "reglu", "receptance": True}, "receptance: true needs kind: channel_mix"),
        ({"experts": ExpertsConfig()}, "experts need kind: swiglu or reglu"),
    ],
)
def test_feed_forward_layers_that_contradict_themselves(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        FFNConfig(**fields)
