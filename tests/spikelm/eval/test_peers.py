from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikelm.config import ModelConfig, load_model_config
from spikelm.errors import BackendError, ConfigError, MissingExtraError
from spikelm.eval import gguf as files
from spikelm.eval import peers
from spikelm.eval.gguf import (
    bytes_read,
    kind_of,
    num_weights,
    stored_tensors,
    transformer_twin,
    write_gguf,
)
from spikelm.eval.peers import (
    InProcess,
    LlamaCpp,
    Rwkv,
    Seconds,
    Spawned,
    Transformers,
    write_pth,
)


def tiny(preset: str, width: int = 128) -> ModelConfig:
    """Two layers of a preset."""
    shape = load_model_config(preset)
    return dataclasses.replace(
        shape,
        width=width,
        vocab_size=300,
        mixers=shape.mixers[:2],
        ffn=dataclasses.replace(shape.ffn, hidden_dim=4 * width),
        attention=dataclasses.replace(
            shape.attention, num_heads=width // 32, num_kv_heads=2, head_dim=32
        ),
    )


RWKV7, QWEN2 = tiny("rwkv7-0.4b"), tiny("qwen2.5-0.5b")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_quantised_blocks_have_the_deviation_asked_for(kind: str, bits: int) -> None:
    blocks = files._quantised(2000, bits, 0.02, np.random.default_rng(0))
    codes = blocks["codes"]
    assert blocks.itemsize == {"Q8_0": 34, "Q4_0": 18}[kind]
    low, high = (codes & 15).astype(int) - 8, (codes >> 4).astype(int) - 8
    values = codes.view(np.int8) if bits == 8 else np.concatenate([low, high], 1)
    weights = values * blocks["scale"].astype(np.float64)[:, None]
    assert weights.shape == (2000, 32)
    assert weights.std() == pytest.approx(0.02, rel=0.01)
    assert abs(weights.mean()) < 0.02 * 5 / weights.size**0.5
    assert set(np.unique(np.abs(values))) == set(range(1, 2 ** (bits - 1), 2))


@pytest.mark.parametrize("shape", [RWKV7, QWEN2, tiny("rwkv7-0.4b", 64)])
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
def test_gguf_is_read_back(tmp_path: Path, shape: ModelConfig, quantisation: Any) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, shape, quantisation=quantisation)
    reader = gguf.GGUFReader(path)
    kind = kind_of(shape)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == kind
    assert fields[f"{kind}.embedding_length"] == shape.width
    assert fields[f"{kind}.block_count"] == 2
    assert fields[f"{kind}.feed_forward_length"] == 4 * shape.width
    eps = "layer_norm_epsilon" if kind == "rwkv7" else "layer_norm_rms_epsilon"
    assert fields[f"{kind}.attention.{eps}"] == pytest.approx(shape.norm_eps)
    expected = stored_tensors(shape, quantisation)
    assert [tensor.name for tensor in reader.tensors] == list(expected)
    for tensor in reader.tensors:
        dims, stored_type, fill = expected[tensor.name]
        assert tuple(tensor.shape) == dims
        assert tensor.tensor_type.name == stored_type
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if fill is None:
            assert weights.std() == pytest.approx(dims[0] ** -0.5, rel=0.1)
        else:
            assert (weights == np.float32(fill)).all()
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    head = "token_embd.weight" if shape.tie_embeddings else "output.weight"
    layer = "channel_mix_key" if kind == "rwkv7" else "ffn_down"
    assert (types[head], types[f"blk.1.{layer}.weight"]) == ("Q8_0", quantisation)


@pytest.mark.parametrize("shape", [RWKV7, QWEN2])
def test_gguf_is_the_same_for_the_same_seed(tmp_path: Path, shape: ModelConfig) -> None:
    files = [tmp_path / name for name in "abc"]
    for path, seed in zip(files, (0, 0, 1), strict=True):
        write_gguf(path, shape, seed=seed)
    first, second, other = (path.read_bytes() for path in files)
    assert first == second
    assert len(first) == len(other)
    assert first != other


def test_gguf_holds_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "whole", RWKV7)
    monkeypatch.setattr(files, "CHUNK_WEIGHTS", 1024)
    sizes = []
    quantised = files._quantised

    def counted(blocks: int, *arguments: Any) -> Any:
        sizes.append(32 * blocks)
        return quantised(blocks, *arguments)

    monkeypatch.setattr(files, "_quantised", counted)
    write_gguf(tmp_path / "parts", RWKV7)
    assert max(sizes) == 1024
    assert (tmp_path / "parts").stat().st_size == (tmp_path / "whole").stat().st_size


@pytest.mark.parametrize(
    ("preset", "quantisation", "megabytes"),
    [
        ("rwkv7-0.4b", "Q8_0", 494),
        ("rwkv7-0.4b", "Q4_0", 309),
        ("qwen2.5-0.5b", "Q8_0", 525),
        ("qwen2.5-0.5b", "Q4_0", 346),
    ],
)
def test_sizes_of_llama_cpps_own_files(preset: str, quantisation: Any, megabytes: int) -> None:
    tensors = stored_tensors(load_model_config(preset), quantisation).values()
    assert sum(tensor.num_bytes for tensor in tensors) / 1e6 == pytest.approx(megabytes, rel=0.01)


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
def test_a_token_reads_one_row_of_the_embedding(quantisation: Any) -> None:
    def read(shape: ModelConfig) -> float:
        return bytes_read(shape, quantisation)

    def file(shape: ModelConfig) -> int:
        return sum(tensor.num_bytes for tensor in stored_tensors(shape, quantisation).values())

    row = 128 // 32 * {"Q8_0": 34, "Q4_0": 18}[quantisation]
    # Two low-rank matrices in float16 and a vector in float32.
    first = 2 * (2 * 64 * 128) + 128 * 4
    assert read(RWKV7) == file(RWKV7) - 299 * row - first
    # Tied, the head reads the whole table.
    assert QWEN2.tie_embeddings
    assert read(QWEN2) == file(QWEN2)


def test_twin_has_as_many_parameters(tmp_path: Path) -> None:
    for shape in (load_model_config("rwkv7-0.4b"), load_model_config("rwkv7-1.5b")):
        twin = transformer_twin(shape)
        assert num_weights(twin) == pytest.approx(num_weights(shape), rel=0.01)
        assert (twin.width, twin.num_layers) == (shape.width, shape.num_layers)
    write_gguf(tmp_path / "asked", RWKV7, "qwen2")
    write_gguf(tmp_path / "twin", transformer_twin(RWKV7))
    assert (tmp_path / "asked").read_bytes() == (tmp_path / "twin").read_bytes()


def test_shapes_that_are_neither(tmp_path: Path) -> None:
    path = tmp_path / "none"
    for preset in ("qwen3-0.6b", "llama-3.2-1b", "spikelm-demo", "spikegpt-46m"):
        with pytest.raises(ConfigError, match="neither"):
            write_gguf(path, load_model_config(preset))
    with pytest.raises(ConfigError, match="neither"):
        kind_of(dataclasses.replace(RWKV7, tie_embeddings=True))
    with pytest.raises(ConfigError, match="kind: rwkv7 given"):
        write_gguf(path, QWEN2, "rwkv7")
    with pytest.raises(ConfigError, match="Q8_0, Q4_0"):
        write_gguf(path, QWEN2, quantisation="Q5_0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rwkv7 layers"):
        transformer_twin(QWEN2)
    with pytest.raises(ConfigError, match="rwkv7 layers"):
        write_pth(path, QWEN2)
    assert not path.exists()


# --- contestants ----------------------------------------------------------------------------------


class Diary:
    """A reader that keeps a diary, and breaks when it is told to read 13 or 31 tokens."""

    def __init__(self, complaint: str = "") -> None:
        if complaint:
            raise ValueError(complaint)
        self.calls: list[tuple[str, int]] = []

    def hold(self, tokens: int) -> None:
        self.calls.append(("hold", tokens))

    def read(self, tokens: int) -> None:
        self.calls.append(("read", tokens))
        if tokens == 13:
            raise ValueError(f"no luck: {os.environ['GLIBC_TUNABLES']}")
        if tokens == 31:
            os._exit(7)


@pytest.fixture
def spawned() -> Iterator[Spawned]:
    with Spawned("diary", Diary) as contestant:
        yield contestant


def test_what_is_timed() -> None:
    diary = Diary()
    contestant = InProcess("diary", diary)
    diary.calls.clear()
    assert len(contestant.decode_at(1000, 3)) == 3
    assert diary.calls == [("hold", 1000)] + 4 * [("read", 1)]
    diary.calls.clear()
    assert len(contestant.decode(2)) == 2
    assert diary.calls == [("hold", 0)] + 3 * [("read", 1)]
    diary.calls.clear()
    assert contestant.prefill(40).wall > 0
    assert diary.calls == [("hold", 0), ("read", 40)]


def test_a_process_of_its_own(spawned: Spawned, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = spawned.decode(3)
    assert len(seconds) == 3
    assert all(isinstance(s, Seconds) and s.wall > 0 for s in seconds)
    assert spawned.resident_bytes() > 10e6
    # It has huge pages, and we are as we were; it outlives what went wrong.
    before = os.environ.get("GLIBC_TUNABLES", "")
    assert "hugetlb" not in before
    with pytest.raises(BackendError, match=r"^diary: no luck: .*glibc\.malloc\.hugetlb=1$"):
        spawned.prefill(13)
    assert spawned.prefill(14).wall > 0
    with pytest.raises(BackendError, match="ended with status 7"):
        spawned.prefill(31)
    spawned.close()
    with pytest.raises(BackendError, match="closed"):
        spawned.decode(1)


def test_what_cannot_be_built() -> None:
    with pytest.raises(BackendError, match="broken: out of paper"):
        Spawned("broken", Diary, "out of paper")


def test_missing_packages_and_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="threads: 0"):
        LlamaCpp("model.gguf", 0)
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        Transformers(QWEN2, 1, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="transformer_twin"):
        Transformers(RWKV7, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"llama-cpp-python.*spikelm\[bench\]"):
        LlamaCpp("model.gguf", 1)
    with pytest.raises(MissingExtraError, match=r"rwkv.*spikelm\[bench\]"):
        Rwkv("model.pth", 1)


@pytest.mark.parametrize("shape", [RWKV7, QWEN2])
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
# llama_cpp leaves files open that it opens when it is imported.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_reads_what_is_written(
    tmp_path: Path, shape: ModelConfig, quantisation: Any
) -> None:
    pytest.importorskip("llama_cpp")
    path = tmp_path / "model.gguf"
    write_gguf(path, shape, quantisation=quantisation)
    reader = peers.LlamaReader(str(path), 1, 2000)

    def logits(*parts: int) -> np.ndarray[Any, Any]:
        reader.hold(0)
        for tokens in parts:
            reader.read(tokens)
        return reader.logits()

    found = logits(1)
    assert found.shape == (300,)
    # A normed vector times weights of variance 1 / inputs.
    assert 0.7 < found.std() < 1.4
    # The same tokens all at once and one by one, up to the rounding of activations to eight bits.
    whole, parts = logits(5), logits(1, 2, 1, 1)
    assert np.abs(whole - parts).max() < 0.1 < np.abs(whole - found).max()
    with pytest.raises(BackendError, match="cannot load"):
        peers.LlamaReader(str(tmp_path), 1, 100)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_holds_a_long_context(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    write_gguf(tmp_path / "model.gguf", QWEN2)
    reader = peers.LlamaReader(str(tmp_path / "model.gguf"), 1, 2000)

    def held(tokens: int) -> int:
        reader.hold(tokens)
        return int(reader._api.llama_state_seq_get_size(reader._context, 0))

    first = held(1)
    per_token = held(2) - first
    # Keys and values of two layers, two heads and 32 channels in float16, and a position.
    assert per_token >= 2 * 2 * 2 * 32 * 2
    for tokens in (128, 129, 1700, 1999, 700):
        assert held(tokens) - first == (tokens - 1) * per_token
    assert held(0) < first
    reader.hold(1999)
    reader.read(1)
    assert np.isfinite(reader.logits()).all()
    with pytest.raises(ConfigError, match="context, 2000"):
        reader.read(1)
    with pytest.raises(ConfigError, match="context, 2000"):
        reader.hold(2001)


def test_llama_cpp_in_a_process_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    write_gguf(tmp_path / "model.gguf", RWKV7)
    with LlamaCpp(tmp_path / "model.gguf", 1) as contestant:
        assert len(contestant.decode_at(100000, 2)) == 2
        assert contestant.prefill(600).cpu > 0
        assert contestant.facts() == {}
    with LlamaCpp(tmp_path / "model.gguf", 1, bytes_per_token=7.0) as contestant:
        assert contestant.facts() == {"bytes_per_token": 7.0}


def test_transformers() -> None:
    pytest.importorskip("transformers")
    import torch

    threads = torch.get_num_threads()
    try:
        reader = peers.TransformersReader(transformer_twin(RWKV7), 1, "bfloat16")
    finally:
        torch.set_num_threads(threads)
    config = reader._model.config
    assert sum(p.numel() for p in reader._model.parameters()) == pytest.approx(
        num_weights(transformer_twin(RWKV7))
    )
    assert (config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (2, 1e6)
    read = num_weights(transformer_twin(RWKV7)) - 299 * 128
    assert reader.facts() == {"bytes_per_token": 2.0 * read}
    contestant = InProcess("transformers", reader)
    assert len(contestant.decode_at(70, 2)) == 2
    assert reader._cache.get_seq_length() == 73
    contestant.prefill(20)
    assert reader._cache.get_seq_length() == 20


def test_rwkv(tmp_path: Path) -> None:
    pytest.importorskip("rwkv")
    write_pth(tmp_path / "model.pth", RWKV7)
    with Rwkv(tmp_path / "model.pth", 1) as contestant:
        assert len(contestant.decode(2)) == 2
        assert contestant.prefill(3).cpu > 0
        # All float32; the first layer's value gates are dropped at loading.
        expected = 4 * (num_weights(RWKV7) - 299 * 128 - 2 * 64 * 128 - 128)
        assert contestant.facts()["bytes_per_token"] == pytest.approx(expected, rel=1e-3)


def test_written_weights_are_an_rwkv7(tmp_path: Path) -> None:
    import torch

    from spikelm import checkpoint
    from spikelm.conversion.importing.cli import main

    # The byte tokenizer's.
    write_pth(tmp_path / "model.pth", dataclasses.replace(RWKV7, vocab_size=257))
    out = tmp_path / "imported"
    assert main([str(tmp_path / "model.pth"), str(out), "--tokenizer", "bytes"]) == 0
    model = checkpoint.load(out).model
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 257)
    assert 0.7 < logits.std() < 1.4
