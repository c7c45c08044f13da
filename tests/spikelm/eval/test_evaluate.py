"""spikelm.eval.evaluate and spikelm.eval.traffic"""

from __future__ import annotations

import itertools
import json
import lzma
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from spikelm import checkpoint
from spikelm.coding import CODES
from spikelm.coding.meter import Meter
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.eval import evaluate as module
from spikelm.eval.evaluate import (
    decode_speed,
    evaluate,
    score,
    slot_sparsity,
    token_stream,
    xz_bits_per_byte,
)
from spikelm.eval.traffic import num_parameters, weight_bytes, weight_traffic
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.state import State
from spikelm.tokenizer import Tokenizer

DOCUMENTS = [
    "Return the absolute value of x, as fabs() does for floats.",
    "h\u00e9llo",
    "a longer one that fills the window of sixteen tokens several times over, and more. " * 2,
]


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents span pieces and pieces span documents."""
    monkeypatch.setattr(module, "PIECE_TOKENS", 64)


def nats_by_hand(model: LanguageModel, documents: Sequence[str]) -> float:
    """One token at a time, every document from a state of its own."""
    tokenizer, nats = Tokenizer.bytes(), 0.0
    for document in documents:
        state: State | None = None
        ids = [tokenizer.eos_id, *tokenizer.encode(document), tokenizer.eos_id]
        for token, target in itertools.pairwise(ids):
            logits, state = model(torch.tensor([[token]]), state)
            nats -= float(logits[0, 0].log_softmax(-1)[target])
    return nats


@pytest.mark.usefixtures("short_pieces")
def test_score_is_the_sum_over_one_token_steps_per_document(float_folder: Path) -> None:
    model = checkpoint.load(float_folder).model.double()
    expected = nats_by_hand(model, DOCUMENTS)
    nats, state = score(model, token_stream(Tokenizer.bytes(), DOCUMENTS))
    assert nats == pytest.approx(expected, rel=1e-10)
    assert state.position.tolist() == [1 + len(DOCUMENTS[-1])]


@pytest.mark.usefixtures("short_pieces")
def test_quality_by_hand(float_folder: Path) -> None:
    expected = nats_by_hand(checkpoint.load(float_folder).model.double(), DOCUMENTS)
    found = evaluate(float_folder, DOCUMENTS, decode_tokens=2)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert (found["bytes"], found["tokens"]) == (size, size + len(DOCUMENTS))
    # A last-bit difference in float32 may move a spike, no more.
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) / size, rel=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(expected / found["tokens"]), rel=1e-2)
    assert (found["name"], found["path"]) == ("float", str(float_folder))
    assert (found["kind"], found["backend"]) == ("float", None)
    assert json.loads(json.dumps(found)) == found


class Recorder:
    """Counts and silence of every population over a run."""

    def __init__(self) -> None:
        self.counts: dict[str, list[Tensor]] = {}
        self.active: dict[str, int] = {}
        self.classes: dict[str, str] = {}

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        self.classes[neuron.name] = neuron.tensor_class
        active = int(spikes.values.count_nonzero())
        self.active[neuron.name] = self.active.get(neuron.name, 0) + active
        if spikes.counts is not None:
            self.counts.setdefault(neuron.name, []).append(spikes.counts.flatten())


def recorded(folder: Path, backend: str = "auto") -> tuple[Recorder, int]:
    """What every neuron emits on DOCUMENTS, and the number of tokens."""
    recorder = Recorder()
    stream = token_stream(Tokenizer.bytes(), DOCUMENTS)
    score(checkpoint.load(folder, backend=backend).model, stream, recorder)
    return recorder, stream.num_scored


def shapes(folder: Path) -> dict[str, tuple[list[int], int]]:
    """Shape and bytes of every tensor in the file."""
    with safe_open(folder / checkpoint.WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name.removeprefix("model."): (list(t.shape), t.nbytes) for name, t in tensors.items()}


def population(weight_name: str) -> str:
    """layers.0.mixer.input.linear.weight -> layers.0.mixer.input"""
    return weight_name.removesuffix(".linear.weight")


@pytest.mark.parametrize(
    ("backend", "out_bytes"),
    [
        ("embedding_bag_int8", lambda out: out + 8),
        ("embedding_bag_float", lambda out: 4 * out),
        ("matmul", lambda out: out),
    ],
)
def test_bytes_skipped_by_counting_spikes(
    coded_folder: Path, backend: str, out_bytes: Callable[[int], int]
) -> None:
    recorder, tokens = recorded(coded_folder, backend)
    total = read = 0
    for name, (shape, num_bytes) in shapes(coded_folder).items():
        if name.endswith("linear.weight"):
            row = out_bytes(shape[1])
            total += tokens * shape[0] * row
            read += row * sum(int(c.count_nonzero()) for c in recorder.counts[population(name)])
        else:
            always = num_bytes // shape[0] if name == "embedding.weight" else num_bytes
            total += tokens * always
            read += tokens * always
    found = evaluate(coded_folder, DOCUMENTS, backend=backend, decode_tokens=1)
    assert found["weight_bytes_per_token"] * tokens == total
    assert 0.1 < 1 - read / total < 0.9
    assert found["weight_bytes_skippable_fraction"] == pytest.approx(1 - read / total, rel=1e-12)
    skipped = 0.0 if backend == "matmul" else found["weight_bytes_skippable_fraction"]
    assert found["weight_bytes_skipped_fraction"] == skipped
    assert (found["kind"], found["backend"]) == ("spike-coded", backend)


def test_a_float_model_skips_nothing_whatever_its_silence(float_folder: Path) -> None:
    recorder, tokens = recorded(float_folder)
    sizes = shapes(float_folder)
    silent = 0.0
    for name, (shape, num_bytes) in sizes.items():
        if name.endswith("linear.weight"):
            active = recorder.active[population(name)]
            silent += num_bytes * (1 - active / (tokens * shape[1]))
    embedding, embedding_bytes = sizes["embedding.weight"]
    per_token = sum(size for _, size in sizes.values()) - embedding_bytes
    per_token += embedding_bytes // embedding[0]
    found = evaluate(float_folder, DOCUMENTS, decode_tokens=1)
    assert found["weight_bytes_per_token"] == per_token
    assert found["weight_bytes_skipped_fraction"] == 0.0
    assert found["weight_bytes_skippable_fraction"] == pytest.approx(silent / per_token, rel=1e-12)


def test_silence_and_slots_by_brute_force(coded_folder: Path) -> None:
    recorder, tokens = recorded(coded_folder)
    found = evaluate(coded_folder, DOCUMENTS, decode_tokens=1)
    entries = silent = 0
    for tensor_class, slots in found["slot_sparsity"].items():
        names = [n for n, c in recorder.classes.items() if c == tensor_class]
        counts = torch.cat([c for n in names for c in recorder.counts[n]]).long()
        code = CODES["bitwise" if tensor_class == "ffn_hidden" else "bitwise_signed"]
        train = code.encode(counts, slots["steps"])
        assert slots["steps"] == 7
        assert slots["value"] == pytest.approx(float((train.spikes == 0).double().mean()))
        zeros = int((counts == 0).sum())
        fraction = found["silent_fraction"][tensor_class]
        assert fraction == pytest.approx(zeros / counts.numel())
        if tensor_class != "queries_keys":
            entries += counts.numel()
            silent += zeros
    assert next(iter(found["silent_fraction"])) == "total"
    assert found["silent_fraction"]["total"] == pytest.approx(silent / entries)
    assert set(found["spiking_tensors"]) == set(recorder.counts)
    assert found["tensors"] == len(recorder.classes) == 12
    assert entries % tokens == 0


def test_unclipped_counts_have_the_steps_of_the_largest_of_their_class() -> None:
    meter = Meter()
    for name, counts in {"a": [0.0, 1.0, -3.0], "b": [8.0, 0.0, 0.0]}.items():
        neuron = Neuron("ffn_input", 3, NeuronConfig(kind="integer"))
        neuron.name = name
        values = torch.tensor([[counts]])
        meter(neuron, values, Spikes(values, values, torch.ones(1, 1, 1)))
    # 8 takes four bits; 1, 3 and 8 have four ones between them, in 2 x 3 x 4 slots.
    assert slot_sparsity(meter) == {"ffn_input": {"value": pytest.approx(1 - 4 / 24), "steps": 4}}


def test_dense_model_has_no_spikes_but_may_be_silent(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = LanguageModel(tiny_config().dense_twin()).initialise(0)
    checkpoint.save(tmp_path, model, Tokenizer.bytes())
    found = evaluate(tmp_path, DOCUMENTS, decode_tokens=1)
    assert (found["slot_sparsity"], found["spiking_tensors"]) == ({}, [])
    assert found["silent_fraction"]["ffn_input"] == 0.0
    assert 0.3 < found["silent_fraction"]["ffn_hidden"] < 0.7


def test_state_bytes_of_the_tiny_model(float_folder: Path) -> None:
    delta = 2 * 8 * (12 + 1) + 3 * (16 + 16 + 24)
    window = 2 * (16 + 2) * 2 * 8
    shifts = 2 * 32
    found = evaluate(float_folder, DOCUMENTS, decode_tokens=1)
    assert found["state_bytes"] == 4 * (delta + window + shifts) + 8
    assert found["state_grows"] is False
    assert evaluate(float_folder, ["ab"], decode_tokens=1)["state_bytes"] == found["state_bytes"]


def test_full_attention_is_said_to_grow(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = LanguageModel(tiny_config(mixers=("full",))).initialise(0)
    checkpoint.save(tmp_path, model, Tokenizer.bytes())
    found = evaluate(tmp_path, ["x" * 40], decode_tokens=1)
    assert found["state_grows"] is True
    assert found["state_bytes"] == 4 * (41 * 2 * 2 * 8 + 32) + 8


def test_default_text_is_the_built_in_test_split(
    float_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"test": ["held out"]}
    monkeypatch.setattr(module, "builtin_documents", splits.__getitem__)
    assert evaluate(float_folder, decode_tokens=1)["bytes"] == len("held out")


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text_is_an_error(float_folder: Path, documents: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        evaluate(float_folder, documents)


def test_no_decode_tokens_is_an_error(float_folder: Path) -> None:
    with pytest.raises(ConfigError, match="decode_tokens: 0 given"):
        evaluate(float_folder, DOCUMENTS, decode_tokens=0)


def test_broken_weights_are_an_error(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = LanguageModel(tiny_config()).initialise(0)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    checkpoint.save(tmp_path, model, Tokenizer.bytes())
    with pytest.raises(CheckpointError, match="nan nats a token"):
        evaluate(tmp_path, DOCUMENTS)


class FakeEngine:
    """Token t + 1 follows token t; the i-th step takes i-th of `seconds` on a fake clock."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = iter(seconds)
        self.now = 0.0
        self.seen: list[int] = []

    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, None]:
        return self._logits(ids[-1]), None

    def step(
        self, ids: Tensor, state: None, *, in_place: bool = False, within: float | None = None
    ) -> tuple[Tensor, None]:
        self.seen += ids.tolist()
        self.now += next(self.seconds)
        return self._logits(int(ids[0])), None

    def _logits(self, token: int) -> Tensor:
        return torch.eye(10)[token + 1 : token + 2]


def test_decode_speed_is_the_median_of_greedy_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = FakeEngine([9.0, 0.5, 0.25, 0.1, 0.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: engine.now)
    assert decode_speed(engine, [0, 2], 5) == pytest.approx(2.0)
    assert engine.seen == [3, 4, 5, 6, 7]


def test_xz_bits_per_byte() -> None:
    text = "".join(f"{n * n} is the square of {n}\n" for n in range(200))
    other = "nothing of the sort; " * 10
    packed = len(lzma.compress((text + other).encode(), preset=9 | lzma.PRESET_EXTREME))
    alone = xz_bits_per_byte([text, other])
    assert alone == 8 * packed / len(text + other)
    assert xz_bits_per_byte(["\u00e9"]) == 8 * len(lzma.compress(b"\xc3\xa9")) / 2
    assert xz_bits_per_byte([text, other], [text]) < alone / 4
    with pytest.raises(DataError):
        xz_bits_per_byte([""], [text])


def test_parameters_and_weight_bytes(float_folder: Path, coded_folder: Path) -> None:
    dense = checkpoint.load(float_folder).model
    # Its tables have 8 bytes per row beside the weights.
    coded = checkpoint.load(coded_folder, backend="embedding_bag_int8").model
    floats = sum(math.prod(shape) for shape, _ in shapes(float_folder).values())
    assert num_parameters(dense) == floats
    assert weight_bytes(dense) == 4 * floats
    sizes = shapes(coded_folder)
    scales = sum(math.prod(shape) for n, (shape, _) in sizes.items() if n.endswith("scale"))
    assert num_parameters(coded) == sum(math.prod(s) for s, _ in sizes.values()) - scales
    rows = sum(shape[0] for n, (shape, _) in sizes.items() if n.endswith("linear.weight"))
    assert weight_bytes(coded) == sum(size for _, size in sizes.values()) + 8 * rows


def test_a_tied_matrix_is_stored_once_and_read_by_the_head(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    apart, tied = (LanguageModel(tiny_config(tie_embeddings=tie)) for tie in (False, True))
    matrix = 4 * 257 * 32
    assert weight_bytes(tied) == weight_bytes(apart) - matrix
    assert num_parameters(tied) == num_parameters(apart) - matrix // 4
    assert weight_traffic(tied) == weight_traffic(apart)
    assert weight_traffic(tied).matrices["head"].num_bytes == matrix


def test_soft_spikes_have_no_slots(tiny_config: Callable[..., ModelConfig]) -> None:
    soft = NeuronsConfig(mixer_input=NeuronConfig(kind="lif", softness=0.2))
    meter = Meter()
    LanguageModel(tiny_config(neurons=soft)).initialise(0)(torch.arange(32)[None], probe=meter)
    assert slot_sparsity(meter) == {}
    assert meter.silent_fractions()["mixer_input"] == 0
