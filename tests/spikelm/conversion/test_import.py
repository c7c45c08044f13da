"""`spikelm import`: every tensor accounted for, refusals by name, reports."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikelm import checkpoint
from spikelm.conversion.importing.cli import main
from spikelm.conversion.importing.read import read_pickle
from spikelm.conversion.importing.sources import KINDS, open_source
from spikelm.errors import CheckpointError, ConfigError, SpikelmError

Weights = dict[str, Tensor]
Released = dict[str, Callable[..., Any]]
BYTES = ["--tokenizer", "bytes"]

LLAMA = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write_pth(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path


def write_config(folder: Path, **values: Any) -> Path:
    """A folder whose configuration can be read and whose weights hold nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values}), encoding="utf-8")
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def refused(source: Path, tmp_path: Path, *options: str) -> str:
    """The message of an import that fails and writes nothing."""
    with pytest.raises(SpikelmError) as error:
        main([str(source), str(tmp_path / "out"), *BYTES, *options])
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_writes_a_model_folder(
    tmp_path: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = released["rwkv4"](head_qk=4)
    source = write_pth(tmp_path / "model.pth", tensors)
    assert main([str(source), str(tmp_path / "out"), "--kind", "rwkv4", *BYTES]) == 0
    used = [tensor for name, tensor in tensors.items() if name != "copy_mask"]
    printed = capsys.readouterr().out
    parameters = sum(tensor.numel() for tensor in used)
    assert f"rwkv4: {parameters:,} parameters from {len(used)} tensors" in printed
    assert "ignored 1: copy_mask" in printed
    model = checkpoint.load(tmp_path / "out").model
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    assert model.config.norm == "layer"
    with pytest.raises(ConfigError, match="is not empty"):
        main([str(source), str(tmp_path / "out"), "--kind", "rwkv4", *BYTES])


def test_first_layers_value_mix_of_rwkv7_is_ignored_by_name(
    tmp_path: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_pth(tmp_path / "model.pth", released["rwkv7"](width=64))
    assert main([str(source), str(tmp_path / "out"), *BYTES, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(report["ignored"]) == [f"blocks.0.att.v{n}" for n in range(3)]
    assert report["kind"] == "rwkv7"


def test_codes_outside_int8_are_clamped_and_counted(
    tmp_path: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = released["spikingbrain"](tmp_path / "w8", quantised=True)
    buffer = {"model.layers.1.attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **buffer}, tmp_path / "w8" / "model.safetensors")
    assert main([str(tmp_path / "w8"), str(tmp_path / "out"), *BYTES, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ignored"] == list(buffer)
    matrices = [n for n in tensors if n.endswith("_proj.weight")]
    assert report["codes"] == sum(tensors[name].numel() for name in matrices)
    outside = 0
    for name in matrices:
        scales = tensors[name.removesuffix("weight") + "weight_quantizer.scales"]
        codes = (tensors[name].unflatten(1, (-1, 16)) / scales).round()
        outside += int(((codes > 127) | (codes < -128)).sum())
    assert report["clamped"] == outside > 0
    model = checkpoint.load(tmp_path / "out").model
    down = "model.layers.1.mlp.down_proj.weight"
    scales = tensors["model.layers.1.mlp.down_proj.weight_quantizer.scales"]
    codes = model.layers[1].ffn.output.linear.weight.unflatten(1, (-1, 16)) / scales
    assert codes.max() <= 127.01
    assert (tensors[down].unflatten(1, (-1, 16)) / scales).abs().max() > 139
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    neurons = model.config.neurons
    assert {neurons.ffn_hidden.kind, neurons.attention_queries.kind} == {"integer"}
    assert neurons.head_input.kind == "off"
    assert (model.config.attention.kv_bits, model.config.gla.gate_rank) == (8, None)


def test_dtype_source_keeps_the_size_and_the_numbers(
    tmp_path: Path, released: Released, imported: Callable[..., Any]
) -> None:
    tensors = released["spikingbrain"](tmp_path / "7B")
    # One part of a joined matrix in a wider type, which the whole then takes.
    values = "model.layers.0.attn.v_proj.weight"
    tensors[values] = tensors[values].float() / 3
    save_file(tensors, tmp_path / "7B" / "model.safetensors")
    narrow = imported(tmp_path / "7B", "--dtype", "source")
    stored = load_file(tmp_path / "imported" / "7B" / "model.safetensors")
    joined = stored.pop("model.layers.0.mixer.input.linear.weight")
    assert joined.dtype == torch.float32
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    (tmp_path / "7B").rename(tmp_path / "again")
    wide = imported(tmp_path / "again").state_dict()
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, wide[name])


def test_names_all_that_is_missing_unknown_and_misshapen(
    tmp_path: Path, released: Released
) -> None:
    tensors = released["rwkv7"](width=64)
    tensors["blocks.1.att.s1"] = tensors.pop("blocks.1.att.w1")
    tensors["blocks.0.ffn.extra"] = torch.zeros(2)
    del tensors["ln_out.bias"]
    tensors["blocks.0.att.x_r"] = torch.zeros(1, 1, 65)
    tensors["blocks.1.att.g2"] = tensors["blocks.1.att.g2"].T.clone()
    message = refused(write_pth(tmp_path / "model.pth", tensors), tmp_path)
    assert "2 tensor(s) missing: blocks.1.att.w1, ln_out.bias" in message
    assert "2 tensor(s) unknown: blocks.1.att.s1, blocks.0.ffn.extra" in message
    assert "blocks.0.att.x_r [1, 1, 65] for [64]" in message
    assert "blocks.1.att.g2 [64, 32] for [32, 64]" in message


def test_names_the_parts_of_a_joined_matrix(tmp_path: Path, released: Released) -> None:
    tensors = released["spikingbrain"](tmp_path / "w8", quantised=True)
    q, k = (f"model.layers.1.attn.{x}_proj" for x in "qk")
    # As many rows together as are asked for, but not in the right parts.
    tensors[f"{q}.weight"], tensors[f"{k}.weight"] = torch.zeros(16, 32), torch.zeros(32, 32)
    tensors["model.layers.0.mlp.up_proj.weight_quantizer.scales"] = torch.ones(48, 3, 1)
    del tensors["model.layers.0.attn.gk_proj.weight_quantizer.scales"]
    save_file(tensors, tmp_path / "w8" / "model.safetensors")
    message = refused(tmp_path / "w8", tmp_path)
    assert f"{q}.weight [16, 32] for [32, 32]" in message
    assert f"{k}.weight [32, 32] for [16, 32]" in message
    assert "up_proj.weight_quantizer.scales [48, 3, 1] for a weight [48, 32]" in message
    assert "1 tensor(s) missing: model.layers.0.attn.gk_proj.weight_quantizer.scales" in message


def test_pth_files_that_cannot_be_read(tmp_path: Path, released: Released) -> None:
    path = tmp_path / "model.pth"
    assert "say which: --kind rwkv4 or --kind spikegpt" in refused(
        write_pth(path, released["rwkv4"]()), tmp_path
    )
    with_v5 = {**released["rwkv4"](), "blocks.0.att.ln_x.weight": torch.ones(16)}
    assert "RWKV-5 or RWKV-6" in refused(write_pth(path, with_v5), tmp_path)
    assert "is no RWKV or SpikeGPT" in refused(write_pth(path, {"w": torch.ones(1)}), tmp_path)
    assert "no flat dictionary" in refused(write_pth(path, {"model": {}}), tmp_path)
    # Code in a pickle is not run.
    assert "(UnpicklingError): it is damaged" in refused(
        write_pth(path, {"w": Path("/")}), tmp_path
    )
    path.write_bytes(b"neither zip nor pickle")
    assert "cannot be read as tensors alone" in refused(path, tmp_path)
    counted = {**released["rwkv4"](), "ln_out.bias": torch.ones(16, dtype=torch.int64)}
    write_pth(path, counted)
    assert "ln_out.bias is torch.int64" in refused(path, tmp_path, "--kind", "rwkv4")
    empty = write_pth(path, {"head.weight": torch.ones(1)})
    assert "emb.weight is missing" in refused(empty, tmp_path, "--kind", "rwkv4")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mistral"}, "holds a 'mistral' model; allowed: gla_swa, llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' (allowed: 'silu')"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "attention.rope_scaling.factor"),
        ({"num_attention_heads": None, "vocab_size": "x"}, "a whole number for vocab_size"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({}, "21 tensor(s) missing"),
    ],
)
def test_folders_that_cannot_be_represented(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    assert message in refused(write_config(tmp_path / "source", **values), tmp_path)


def test_configurations_before_layer_types(tmp_path: Path) -> None:
    old = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    folder = write_config(tmp_path / "a", model_type="qwen2", rope_theta=1e6, **old)
    config = open_source(folder).config
    assert config.mixers == ("full", "window")
    assert (config.attention.window, config.attention.sinks) == (16, 0)
    assert (config.attention.rope_theta, config.attention.qkv_bias) == (1e6, True)
    old["use_sliding_window"] = False
    assert open_source(write_config(tmp_path / "a", **old)).config.mixers == ("full", "full")


def test_folders_with_missing_files(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "source")
    (folder / "model.safetensors").write_bytes(b"\x01")
    assert "is damaged" in refused(folder, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "read from safetensors only" in refused(folder, tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part.safetensors"}}')
    assert "part.safetensors" in refused(folder, tmp_path)
    index.write_text("{}")
    assert "has no weight_map" in refused(folder, tmp_path)
    (folder / "config.json").write_text("[]")
    assert "expected a JSON object" in refused(folder, tmp_path)


def test_bad_options(tmp_path: Path, released: Released) -> None:
    source = write_pth(tmp_path / "model.pth", released["rwkv7"](width=64))
    folder = write_config(tmp_path / "source")
    assert "did you mean 'rwkv7'" in refused(source, tmp_path, "--kind", "rwkv77")
    assert "a llama checkpoint is a folder" in refused(source, tmp_path, "--kind", "llama")
    assert "a rwkv7 checkpoint is a .pth file" in refused(folder, tmp_path, "--kind", "rwkv7")
    assert "is for spikegpt" in refused(source, tmp_path, "--raw-embedding")
    assert "--eos is for" in refused(source, tmp_path, "--eos", "<end>")
    assert "no such file or folder" in refused(tmp_path / "none", tmp_path)
    with pytest.raises(ConfigError, match="give its file with --tokenizer"):
        main([str(source), str(tmp_path / "out")])
    short = released["rwkv7"](width=64)
    short["emb.weight"], short["head.weight"] = short["emb.weight"][:99], short["head.weight"][:99]
    write_pth(source, short)
    assert "257 tokens, the embedding 99 rows" in refused(source, tmp_path)
    assert set(KINDS) == {
        "spikegpt", "rwkv4", "rwkv7", "spikingbrain", "llama", "qwen2", "qwen3"
    }  # fmt: skip


def test_a_folder_brings_its_own_tokenizer(
    tmp_path: Path, released: Released, float_folder: Path
) -> None:
    released["spikingbrain"](tmp_path / "7B")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        main([str(tmp_path / "7B"), str(tmp_path / "out")])
    given = (float_folder / "tokenizer.json").read_text()
    (tmp_path / "7B" / "tokenizer.json").write_text(given)
    assert main([str(tmp_path / "7B"), str(tmp_path / "out")]) == 0
    assert checkpoint.load(tmp_path / "out").tokenizer.encode("ab") == [97, 98]


def test_no_damage_of_a_pth_gets_past_as_another_error(tmp_path: Path, released: Released) -> None:
    path = tmp_path / "model.pth"
    for zipped in (True, False):
        torch.save(released["rwkv4"](), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        generator = random.Random(0)
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(generator.choice((1, 3))):
                data[generator.randrange(0, 4000)] = generator.randrange(256)
            path.write_bytes(data[: generator.choice((len(data), len(data) // 2))])
            with contextlib.suppress(CheckpointError):
                read_pickle(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\(EOFError\): it is damaged, cut short or holds"):
        read_pickle(path)


def test_the_kind_that_was_asked_for_is_compared(tmp_path: Path, released: Released) -> None:
    path = write_pth(tmp_path / "model.pth", released["rwkv7"]())
    message = refused(path, tmp_path, "--kind", "rwkv4")
    assert "holds rwkv7, not rwkv4; give --kind rwkv7" in message


def test_broken_numbers_are_named(tmp_path: Path, released: Released) -> None:
    tensors = released["rwkv4"]()
    tensors["blocks.1.att.key.weight"][0, 0] = torch.nan
    path = write_pth(tmp_path / "model.pth", tensors)
    message = refused(path, tmp_path, "--kind", "rwkv4")
    assert "not finite, in layers.1.mixer.key.linear.weight" in message
