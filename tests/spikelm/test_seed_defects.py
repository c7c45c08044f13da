"""Defects known from the released code of SpikeGPT and SpikingBrain, each shown to be absent here.

What other files test sharply is not repeated: int8 clamping at import, two's complement and
bidirectional codes, `import spikelm` without torch, validation bits per byte.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

from spikelm import checkpoint
from spikelm.coding import CODES, Code, event_matmul
from spikelm.coding.meter import Meter
from spikelm.config import (
    AttentionConfig,
    FFNConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    load_model_config,
    presets,
    to_dict,
)
from spikelm.conversion.convert import convert
from spikelm.errors import CodingError
from spikelm.eval.evaluate import evaluate
from spikelm.generate import Engine, Generation, prompt_ids
from spikelm.kernels import event
from spikelm.models.coded import CodedLinear, quantise
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.sampling import SamplingParams
from spikelm.state import State
from spikelm.tokenizer import Tokenizer
from spikelm_serve.app import create_app

Make = Callable[..., ModelConfig]
EOS = Tokenizer.bytes().eos_id


def spikegpt(
    layers: int, name: str = "spikegpt-46m", *, width: int = 32, vocab_size: int = 257
) -> ModelConfig:
    """SpikeGPT with narrow layers, without dropout: one LIF after each sub-block."""
    config = load_model_config(name)
    return dataclasses.replace(
        config,
        vocab_size=vocab_size,
        width=width,
        mixers=config.mixers[:1] * layers,
        ffn=dataclasses.replace(config.ffn, hidden_dim=4 * width),
        dropout=0.0,
    )


def spikingbrain(window: int = 8) -> ModelConfig:
    """SpikingBrain-7B W8ASpike with two narrow layers."""
    config = load_model_config("spikingbrain-7b")
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
    return dataclasses.replace(
        config,
        vocab_size=257,
        width=32,
        mixers=config.mixers[:2],
        gla=dataclasses.replace(config.gla, **heads, key_dim=8, value_dim=8, gate_rank=4),
        attention=dataclasses.replace(config.attention, **heads, head_dim=8, window=window),
        ffn=dataclasses.replace(config.ffn, hidden_dim=48),
    )


def alive(config: ModelConfig, gain: float = 4.0, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose matrices are large enough to make every neuron fire now and then."""
    model = LanguageModel(config).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 1.0 if name.startswith("embedding") else gain * parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    with torch.no_grad():  # the end-of-document token of bytes never wins
        model.head.linear.get_parameter("weight")[EOS:] = 0
    return model.to(dtype).eval()


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


def characters(folder: Path, text: str) -> Tokenizer:
    """One token for each character of `text` and the line end."""
    table = {str(i): c for i, c in enumerate(["\n", *sorted(set(text))])}
    (folder / "vocab.json").write_text(json.dumps(table))
    return Tokenizer.from_file(folder / "vocab.json")


def in_pieces(model: Any, ids: Tensor, lengths: list[int]) -> tuple[Tensor, State]:
    assert sum(lengths) == ids.shape[1]
    outputs, state = [], None
    for piece in ids.split(lengths, 1):
        logits, state = model(piece, state)
        outputs.append(logits)
    assert state is not None
    return torch.cat(outputs, 1), state


def membranes(state: State) -> list[Tensor]:
    return [t for layer in state.layers for name, t in layer.items() if name.endswith(".v")]


def without_membranes(state: State) -> State:
    layers = tuple(
        {n: torch.zeros_like(t) if n.endswith(".v") else t for n, t in layer.items()}
        for layer in state.layers
    )
    return State(layers, state.position)


def assert_equal_states(a: State, b: State) -> None:
    assert torch.equal(a.position, b.position)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(x[name], y[name]), name


# --- SpikeGPT: the decoder is another model than the trained one ----------------------------------


def test_decoding_halves_nothing_every_six_layers(tmp_path: Path) -> None:
    """13 layers of spikes: one call, one call per token, and both after saving."""
    model = alive(spikegpt(13, width=16), dtype=torch.float64)
    ids = tokens(1, 24)
    fired: dict[str, list[Tensor]] = {}

    def record(neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        if neuron.config.kind == "lif":
            fired.setdefault(neuron.name, []).append(spikes.values)

    added: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, given, result: added.append(result[0] - given[0]))
    whole, _ = model(ids, probe=record)
    assert len(fired) == 26
    for name, spikes in fired.items():
        assert 0.01 < torch.cat(spikes, 1).mean() < 0.99, name
    recurrent, _ = in_pieces(model, ids, [1] * 24)
    torch.testing.assert_close(recurrent, whole, rtol=1e-8, atol=1e-8)
    # Each layer adds its two spikes to the stream as they are, the deepest one included.
    assert len(added) == 13 * 25
    counts = torch.cat([a.flatten() for a in added])
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-12)
    assert set(counts.round().tolist()) == {0, 1, 2}
    checkpoint.save(tmp_path, model.float(), Tokenizer.bytes())
    engine = Engine(checkpoint.load(tmp_path))
    assert torch.equal(engine.model(ids)[0], model(ids)[0])
    logits, state = engine.prefill(ids[0, :20].tolist())
    for t in range(20, 24):
        logits, state = engine.step(ids[:, t], state)
    torch.testing.assert_close(logits.double(), whole[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["spikegpt-46m", "spikegpt-216m"])
def test_decoding_reads_nothing_but_the_signs_of_the_embedding(name: str) -> None:
    """Raw embeddings would show as soon as their sizes change."""
    model = alive(spikegpt(2, name))
    ids = tokens(1, 20)

    def logits() -> list[Tensor]:
        _, state = model(ids[:, :12])
        step, state = model(ids[:, 12:13], state)
        return [model(ids)[0], step, model(ids[:, 13:], state)[0]]

    before = logits()
    weight = model.embedding.weight
    with torch.no_grad():
        weight *= 0.01 + 9 * torch.rand_like(weight)
    for first, second in zip(before, logits(), strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():
        weight[ids[0]] *= -1
    assert not torch.equal(before[0], logits()[0])


# --- SpikeGPT: membranes that outlive their conversation ------------------------------------------


@pytest.fixture(scope="module")
def lif_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """SpikeGPT with LIF neurons of long memory in front of its linears as well, on characters.

    Nothing but a fresh state separates its texts: no token of this vocabulary resets one.
    """
    lif = NeuronConfig(kind="lif", tau=30.0, v_threshold=0.1)
    folder = tmp_path_factory.mktemp("lif")
    tokenizer = characters(folder, "".join(map(chr, range(32, 127))))
    assert tokenizer.reset_id is None
    config = spikegpt(3, vocab_size=tokenizer.vocab_size)
    neurons = dataclasses.replace(config.neurons, mixer_input=lif, ffn_hidden=lif, head_input=lif)
    model = alive(dataclasses.replace(config, neurons=neurons))
    checkpoint.save(folder, model, tokenizer)
    return Engine(checkpoint.load(folder))


def test_a_second_trial_begins_with_the_membranes_of_the_first(lif_engine: Engine) -> None:
    _, state = lif_engine.prefill((tokens(1, 30)[0] % 96).tolist())
    assert len(membranes(state)) == 3 * 6 + 1
    assert all(v.any() for v in membranes(state))
    kept = state.clone()
    following = tokens(1, 12, seed=2)[0] % 96

    def trial(state: State) -> Tensor:
        outputs = []
        for token in following:
            logits, state = lif_engine.step(token[None], state)
            outputs.append(logits)
        return torch.cat(outputs)

    first = trial(state)
    assert_equal_states(state, kept)
    assert torch.equal(trial(state), first)
    assert not torch.equal(trial(without_membranes(state)), first), "membranes decide nothing"


def test_membranes_of_interleaved_generations_do_not_mix(lif_engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)

    def start(text: str) -> Iterator[Any]:
        return iter(Generation(lif_engine, prompt_ids(lif_engine.tokenizer, text), params))

    def ids(chunks: list[Any]) -> list[int]:
        return [token for chunk in chunks for token in chunk.token_ids]

    alone = {text: ids(list(start(text))) for text in ("Once", "A dog")}
    assert alone["Once"] != alone["A dog"]
    running = {text: start(text) for text in alone}
    found: dict[str, list[int]] = {text: [] for text in alone}
    while running:
        for text, generation in list(running.items()):
            chunk = next(generation, None)
            if chunk is None:
                del running[text]
            else:
                found[text] += chunk.token_ids
    assert found == alone


def test_membranes_do_not_leak_between_requests_to_the_server(lif_engine: Engine) -> None:
    prompts = ["O", "A dog", "O", "zzz", "O"]

    async def ask(client: httpx.AsyncClient, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 16, "seed": 0}
        answer = (await client.post("/v1/completions", json=body)).json()
        return str(answer["choices"][0]["text"])

    async def conversation() -> tuple[list[str], list[str]]:
        transport = httpx.ASGITransport(create_app(lif_engine, "model"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            one_by_one = [await ask(client, prompt) for prompt in prompts]
            return one_by_one, list(await asyncio.gather(*(ask(client, p) for p in prompts)))

    one_by_one, at_once = asyncio.run(conversation())
    assert one_by_one[0] == one_by_one[2] == one_by_one[4] != one_by_one[1]
    assert at_once == one_by_one


# --- SpikeGPT: an initialisation that silently does not run ---------------------------------------


def by_initialise(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    return model.initialise(0)


def by_transformers(config: ModelConfig) -> LanguageModel:
    pytest.importorskip("transformers")
    from spikelm.hf import SpikelmConfig, SpikelmForCausalLM

    model: LanguageModel = SpikelmForCausalLM(SpikelmConfig(**to_dict(config))).model
    return model


@pytest.mark.parametrize("make", [by_initialise, by_transformers])
@pytest.mark.parametrize("vocab_size", [80, 20])
def test_a_fresh_spikegpt_has_its_own_initialisation(
    make: Callable[[ModelConfig], LanguageModel], vocab_size: int
) -> None:
    L, C, V = 4, 24, vocab_size
    model = make(spikegpt(L, width=C, vocab_size=V))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    channel = torch.arange(C)

    def orthogonal(name: str, gain: float) -> None:
        weight = weights.pop(name).double()
        square = weight.T @ weight if len(weight) >= weight.shape[1] else weight @ weight.T
        expected = gain**2 * torch.eye(len(square)).double()
        torch.testing.assert_close(square, expected, rtol=0, atol=1e-4 * gain**2, msg=name)

    def vector(name: str, expected: Tensor) -> None:
        torch.testing.assert_close(weights.pop(name), expected, rtol=0, atol=1e-5, msg=name)

    orthogonal("embedding.weight", 1e-4 * math.sqrt(max(V, C)))
    orthogonal("head.linear.weight", 0.5 * math.sqrt(V / C) if V > C else 1.0)
    for i in range(L):
        mixer, ffn = f"layers.{i}.mixer.", f"layers.{i}.ffn."
        orthogonal(f"{mixer}value.linear.weight", 1.0)
        orthogonal(f"{ffn}input.linear.weight", 2.0)
        for name in ("key", "receptance", "output"):
            assert not weights.pop(f"{mixer}{name}.linear.weight").any()
        for name in ("receptance", "output"):
            assert not weights.pop(f"{ffn}{name}.linear.weight").any()
        rho, eta = i / (L - 1), 1 - i / L
        vector(f"{mixer}decay", -5 + 8 * (channel / (C - 1)) ** (0.7 + 1.3 * rho))
        zigzag = torch.tensor([0.0, 0.5, -0.5]).repeat(C // 3)
        vector(f"{mixer}bonus", math.log(0.3) + zigzag)
        # Ours are the shares of the previous token, RWKV-4's those of the current one.
        vector(f"{mixer}key_shift", 1 - (channel / C) ** eta)
        vector(f"{mixer}value_shift", 1 - ((channel / C) ** eta + 0.3 * rho))
        vector(f"{mixer}receptance_shift", 1 - (channel / C) ** (eta / 2))
        for name in ("shift", "receptance_shift"):
            vector(f"{ffn}{name}", 1 - (channel / C) ** eta)
    for name, weight in weights.items():
        assert "norm" in name
        assert (weight == (0 if name.endswith("bias") else 1)).all(), name


def small(name: str) -> ModelConfig:
    """A preset whose layers are narrow and few, one of each kind."""
    config = load_model_config(name)
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
    experts = config.ffn.experts
    if experts is not None:
        experts = dataclasses.replace(experts, num_experts=3, dense_layers=(0,))
    kinds = tuple(dict.fromkeys(config.mixers))
    replace = dataclasses.replace
    return replace(
        config,
        vocab_size=257,
        width=32,
        mixers=kinds if len(kinds) > 1 else kinds * 2,
        delta=replace(config.delta, num_heads=2, key_dim=8, value_dim=8, gate_rank=4),
        gla=replace(config.gla, **heads, key_dim=8, value_dim=8),
        attention=replace(
            config.attention, **heads, head_dim=8, window=8, sinks=min(2, config.attention.sinks)
        ),
        rwkv7=replace(
            config.rwkv7, head_dim=8, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4
        ),
        ffn=replace(config.ffn, hidden_dim=48, experts=experts),
        sink_embeddings=min(2, config.sink_embeddings),
    )


@pytest.mark.parametrize("name", presets())
def test_no_parameter_is_left_as_it_was_allocated(name: str) -> None:
    for parameter, tensor in by_initialise(small(name)).named_parameters():
        assert tensor.isfinite().all(), parameter


# --- SpikingBrain: windows off by one, caches beyond them -----------------------------------------


W, T = 8, 29
SPLITS = [
    [T],
    [1] * T,
    [W - 3, 5, *[1] * (T - W - 2)],  # the second chunk meets a ring that is not full
    [W - 1, W + 1, T - 2 * W],
    [W, 1, W, T - 2 * W - 1],
    [W + 1, W - 1, T - 2 * W],
    [1, T - 1],
]


def attention_model(kind: str, window: int = W, **fields: Any) -> Any:
    """One layer of softmax attention and nothing else that mixes tokens."""
    config = ModelConfig(
        vocab_size=257,
        width=32,
        mixers=(kind,),  # type: ignore[arg-type]
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, window=window, **{"sinks": 0, **fields}
        ),
        ffn=FFNConfig(kind="swiglu", hidden_dim=24),
    )
    return alive(config, 1.0, torch.float64)


@pytest.mark.parametrize("lengths", SPLITS, ids=str)
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("sinks", [0, 2])
@torch.inference_mode()
def test_a_window_of_w_sees_w_tokens_however_they_arrive(
    lengths: list[int], kv_bits: int | None, sinks: int
) -> None:
    """Row j differs from the last row in token j: what its logits differ in has seen token j."""
    model = attention_model("window", kv_bits=kv_bits, sinks=sinks)
    ids = tokens(1, T).repeat(T + 1, 1)
    ids[torch.arange(T), torch.arange(T)] += 1
    ids %= 256
    outputs, state = [], None
    for piece in ids.split(lengths, 1):
        logits, state = model(piece, state)
        outputs.append(logits)
        for name, tensor in state.layers[0].items():
            assert tensor.shape[1] == (sinks if "sink" in name else W), name
    logits = torch.cat(outputs, 1)
    saw = (logits[:-1] - logits[-1]).abs().amax(-1) > 1e-9
    order = torch.arange(T)
    distance = order - order[:, None]
    expected = (distance >= 0) & ((distance < W) | (order[:, None] < sinks))
    assert torch.equal(saw, expected)


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("lengths", [[T], [1] * T, [W - 3, 5, T - W - 2]], ids=str)
@torch.inference_mode()
def test_a_window_as_long_as_the_text_is_full_attention_and_one_less_is_not(
    lengths: list[int], kv_bits: int | None
) -> None:
    full, state = in_pieces(attention_model("full", kv_bits=kv_bits), tokens(2, T), lengths)
    assert state.layers[0]["mixer.k"].shape[1] == T
    whole, _ = in_pieces(attention_model("window", T, kv_bits=kv_bits), tokens(2, T), lengths)
    torch.testing.assert_close(whole, full, rtol=1e-10, atol=1e-10)
    less, _ = in_pieces(attention_model("window", T - 1, kv_bits=kv_bits), tokens(2, T), lengths)
    torch.testing.assert_close(less[:, :-1], full[:, :-1], rtol=1e-10, atol=1e-10)
    assert (less[:, -1] - full[:, -1]).abs().amax(-1).min() > 1e-6


# --- SpikingBrain: activations the encoder cannot take --------------------------------------------


VECTORS = {
    "all positive": torch.linspace(0.2, 4, 16),
    "all equal": torch.ones(16),
    "all negative": -torch.linspace(0.2, 4, 16),
    "all zero": torch.zeros(16),
    "one channel": torch.nn.functional.one_hot(torch.tensor(5), 16) * 3.0,
    "tiny": torch.linspace(-1, 1, 16) * 1e-30,
    "mixed": torch.linspace(-3, 3, 16),
}
NEURONS: dict[str, NeuronConfig] = {
    "adaptive": NeuronConfig(kind="integer"),
    "clipped": NeuronConfig(kind="integer", k=6.0, dead_zone=0.5, max_count=7),
    "unsigned": NeuronConfig(kind="integer", unsigned=True, max_count=127),
    "ternary": NeuronConfig(kind="integer", max_count=1),
    "fixed": NeuronConfig(kind="integer", scale="fixed", v_threshold=0.25, max_count=15),
    "fixed, unsigned": NeuronConfig(
        kind="integer", scale="fixed", v_threshold=0.25, max_count=15, unsigned=True
    ),
    "lif": NeuronConfig(kind="lif", v_threshold=0.3),
    "step": NeuronConfig(kind="step", v_threshold=0.5),
}


def emit(config: NeuronConfig, x: Tensor) -> Spikes:
    """The spikes of x [B, T, C]."""
    neuron = Neuron("ffn_hidden", x.shape[-1], config)
    neuron.reset_parameters()
    spikes: Spikes = neuron(x, neuron.zero_state(x.shape[0], x))[0]
    return spikes


@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("vector", VECTORS)
@torch.inference_mode()
def test_no_activation_is_too_positive_or_too_empty(vector: str, kind: str) -> None:
    """Neuron, every code and every product of a lone vector."""
    x = VECTORS[vector]
    spikes = emit(NEURONS[kind], x[None, None])
    assert spikes.counts is not None
    assert spikes.v_threshold is not None
    assert spikes.v_threshold.isfinite().all()
    assert torch.equal(spikes.values, spikes.counts * spikes.v_threshold)
    counts = spikes.counts[0, 0].long()
    assert torch.equal(counts, spikes.counts[0, 0])
    assert (counts * x >= 0).all()
    assert bool(counts.any()) == (
        vector not in ("all zero", "tiny") and not (vector == "all negative" and counts.min() == 0)
    )
    weight = torch.randint(-128, 128, (5, 16)).to(torch.int8)
    expected = weight.long() @ counts
    for code in CODES.values():
        if code.negative == "none" and counts.min() < 0:
            with pytest.raises(CodingError, match="outside 0 to"):
                code.encode(counts)
            continue
        train = code.encode(counts)
        assert torch.equal(code.decode(train), counts)
        assert torch.equal(event_matmul(train, weight), expected), code.name
    integers, scale = quantise(torch.randn(5, 16), 1)
    for backend, obstacle in event.available():
        if obstacle is not None:
            continue
        linear = CodedLinear(16, 5, 1)
        linear.weight, linear.scale = integers, scale
        linear.pack(backend)
        wanted = (integers.T.long() @ counts).double() * scale.double()
        y = linear(spikes)[0, 0].double()
        torch.testing.assert_close(y, wanted * spikes.v_threshold.item(), rtol=1e-5, atol=0)


# --- SpikingBrain: one request decides the steps of another ---------------------------------------


@pytest.mark.parametrize("code", CODES.values(), ids=list(CODES))
def test_a_burst_in_one_row_does_not_change_the_train_of_another(code: Code) -> None:
    """Counts come from a row's own mean, and low bits first: more steps only add silence."""
    calm = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    burst = torch.ones(1, 3, 16)
    burst[..., 0] = 1e3
    unsigned = code.negative == "none"
    neuron = NeuronConfig(kind="integer", unsigned=unsigned, max_count=40)
    alone, together = emit(neuron, calm), emit(neuron, torch.cat([burst, calm]))
    assert together.counts is not None
    assert alone.counts is not None
    assert alone.v_threshold is not None
    assert together.v_threshold is not None
    assert together.counts[0].max() == 40
    assert torch.equal(together.counts[1:], alone.counts)
    assert torch.equal(together.v_threshold[1:], alone.v_threshold)
    own, shared = code.encode(alone.counts), code.encode(together.counts)
    assert shared.steps > own.steps
    weight = torch.randint(-128, 128, (5, 16)).to(torch.int8)
    assert torch.equal(event_matmul(shared, weight)[1:], event_matmul(own, weight))
    if code.negative != "complement":  # whose sign is the last step
        assert torch.equal(shared.spikes[: own.steps, 1:], own.spikes)
        assert not shared.spikes[own.steps :, 1:].any()
    steps = shared.steps
    assert torch.equal(code.encode(alone.counts, steps).spikes, shared.spikes[:, 1:])


def test_reported_steps_and_counts_do_not_depend_on_the_batch(coded_folder: Path) -> None:
    model = checkpoint.load(coded_folder).model
    manifest = checkpoint.load(coded_folder).manifest
    assert manifest is not None
    seen: list[dict[str, Tensor]] = []
    meters = [Meter(), Meter()]
    with torch.inference_mode():
        _, state = model(tokens(4, 20))
        step = tokens(4, 1, seed=9)
        for meter, rows in zip(meters, ([2], [0, 1, 2, 3]), strict=True):
            counts: dict[str, Tensor] = {}

            def record(
                neuron: Neuron,
                x: Tensor,
                spikes: Spikes,
                *,
                meter: Meter = meter,
                counts: dict[str, Tensor] = counts,
                row: int = rows.index(2),
            ) -> None:
                assert spikes.counts is not None
                counts[neuron.name] = spikes.counts[row]
                meter(neuron, x, spikes)

            model(step[rows], state.take(rows), probe=record)
            seen.append(counts)
    for name, counts_alone in seen[0].items():
        assert torch.equal(seen[1][name], counts_alone), name
    steps = {entry["name"]: entry["steps"] for entry in manifest["neurons"]}
    for meter in meters:
        for name, tally in meter.tallies.items():
            assert tally.code is not None
            assert tally.code[1] == steps[name]


# --- SpikingBrain: the down projection that does not spike ----------------------------------------


def test_every_projection_of_spikingbrain_reads_spikes_the_down_projection_included(
    tmp_path: Path,
) -> None:
    model = alive(spikingbrain(), 1.0)
    ids = tokens(2, 20)
    checkpoint.save(tmp_path / "float", model, Tokenizer.bytes())
    convert(tmp_path / "float", tmp_path / "coded", ids)
    for folder in ("float", "coded"):
        model = checkpoint.load(tmp_path / folder, backend="matmul").model
        read: dict[str, tuple[Spikes, Tensor]] = {}
        inputs: dict[str, Tensor] = {}

        def record(
            neuron: Neuron, x: Tensor, spikes: Spikes, *, inputs: dict[str, Tensor] = inputs
        ) -> None:
            inputs[neuron.name] = x

        for name, module in model.named_modules():
            if name.endswith(".linear"):

                def keep(
                    module: nn.Module,
                    given: tuple[Spikes],
                    y: Tensor,
                    *,
                    read: dict[str, tuple[Spikes, Tensor]] = read,
                    name: str = name.removesuffix(".linear"),
                ) -> None:
                    read[name] = given[0], y

                module.register_forward_hook(keep)
        with torch.inference_mode():
            model(ids, probe=record)
        downs = [name for name in read if name.endswith("ffn.output")]
        assert len(downs) == 2
        head = {"head"} if folder == "float" else set()
        for name in read.keys() - head:
            spikes, y = read[name]
            assert spikes.counts is not None, name
            assert spikes.v_threshold is not None
            assert torch.equal(spikes.counts, spikes.counts.round())
            assert (spikes.counts.abs() > 1).any(), "counts, not a mask"
            assert not torch.allclose(spikes.values, inputs[name])
            linear = model.get_submodule(f"{name}.linear")
            weight = (
                linear.dequantised()
                if isinstance(linear, CodedLinear)
                else linear.get_parameter("weight")
            )
            expected = spikes.v_threshold * (spikes.counts @ weight.T)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, msg=name)


# --- SpikingBrain: asserts in training mode -------------------------------------------------------


TRAINED = {
    **NEURONS,
    "learned": NeuronConfig(kind="integer", k=4.0, dead_zone=0.3, max_count=15, learn=True),
    "learned step size": NeuronConfig(
        kind="integer", scale="fixed", v_threshold=0.25, max_count=15, learn=True
    ),
    "lif, learned": NeuronConfig(kind="lif", v_threshold=0.3, learn=True),
    "lif, soft": NeuronConfig(kind="lif", v_threshold=0.3, softness=0.2),
    "lif, detached": NeuronConfig(
        kind="lif", v_threshold=0.3, reset="subtract", detach_reset=True, detach_membrane=True
    ),
    "step, learned": NeuronConfig(kind="step", v_threshold=0.5, learn=True),
}
PLACES = ("embedding_output", "mixer_input", "mixer_output", "ffn_hidden", "ffn_residual")


@pytest.mark.parametrize("kind", TRAINED)
def test_every_kind_of_neuron_trains(kind: str) -> None:
    """In training mode, everything in front of a neuron and the neuron itself get gradients."""
    spiking = dict.fromkeys((*PLACES, "ffn_input", "head_input"), TRAINED[kind])
    config = dataclasses.replace(
        spikegpt(2), neurons=NeuronsConfig(**spiking), dropout=0.1, mixers=("wkv4", "window")
    )
    config = dataclasses.replace(
        config,
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, window=8, sinks=1, kv_bits=8
        ),
    )
    model = alive(config, 1.0).train()
    ids = tokens(2, 24)
    logits, _ = model(ids[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    # Keys and values of the window, 16 rows each behind 32 of queries, though kept as int8.
    _, keys, values = model.layers[1].mixer.input.linear.weight.grad.split([32, 16, 16])
    assert keys.any()
    assert values.any()


# --- Imports that need CUDA, write files or change torch ------------------------------------------


IMPORTS = """
import importlib, os, pkgutil, sys
cuda = ("cupy", "triton", "spikingjelly", "deepspeed", "fla", "flash_attn")
optional = ("transformers", "accelerate", "datasets", "pyarrow", "matplotlib", "tensorboard")
for name in (*cuda, *optional):
    sys.modules[name] = None
import torch
def settings():
    backends = torch.backends
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), backends.cuda.matmul.allow_tf32,
        backends.cudnn.benchmark, backends.cuda.flash_sdp_enabled(),
        torch.get_float32_matmul_precision(), torch.initial_seed(), os.getcwd(),
    )
before = settings()
import spikelm
names = [m.name for m in pkgutil.walk_packages(spikelm.__path__, "spikelm.")]
assert len(names) > 40, names
for name in names:
    if name.rpartition(".")[2] not in ("__main__", "_native", "triton_lif", "hf"):
        importlib.import_module(name)
assert not torch.cuda.is_initialized()
assert settings() == before, (before, settings())
from spikelm.config import ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.models.spikelm import LanguageModel
lif = NeuronConfig(kind="lif")
config = ModelConfig(
    width=24, mixers=("wkv4",), neurons=NeuronsConfig(ffn_hidden=lif, mixer_residual=lif)
)
LanguageModel(config).initialise(0)(torch.zeros(1, 9, dtype=torch.long))[0].sum().backward()
assert not torch.cuda.is_initialized()
"""


def test_importing_needs_no_accelerator_and_touches_nothing(tmp_path: Path) -> None:
    """Every module, without CUDA and its libraries; no file appears, no setting of torch moves."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


# --- Padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: spikegpt(2), spikingbrain], ids=["spikegpt", "brain"])
@torch.inference_mode()
def test_padding_on_either_side_corrupts_no_recurrent_state(
    make: Callable[[], ModelConfig],
) -> None:
    """Rows padded left, right and on both sides, and what follows their states."""
    pytest.importorskip("transformers")
    from spikelm.hf import SpikelmConfig, SpikelmForCausalLM

    config = make()
    model: Any = SpikelmForCausalLM(SpikelmConfig(**to_dict(config)))
    model.eval().model.load_state_dict(alive(config, 2.0).state_dict())
    ids, more = tokens(3, 14), tokens(3, 1, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 9:] = mask[2, :2] = mask[2, 11:] = 0
    padded = model(ids, attention_mask=mask, use_cache=True)
    state = padded.past_key_values.state.clone()
    following, _ = model.model(more, state)
    for row in range(3):
        real = mask[row].bool()
        alone, own = model.model(ids[row : row + 1, real])
        torch.testing.assert_close(padded.logits[row, real], alone[0])
        assert_equal_states(state.take([row]), own)
        torch.testing.assert_close(following[row], model.model(more[row : row + 1], own)[0][0])


# --- NaN ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_no_row_is_told_apart_by_nan() -> None:
    """A new row is exactly the initial state; a broken one is no new one and breaks no other."""
    for config in (spikegpt(2), spikingbrain()):
        model = alive(config, 2.0)
        initial = model.initial_state(1)
        assert not any(tensor.any() for layer in initial.layers for tensor in layer.values())
        _, state = model(tokens(3, 12))
        ids = tokens(3, 5, seed=3)
        expected, fresh = model(ids, state)[0], model(ids[1:2])[0][0]
        floats = [n for n, t in state.layers[0].items() if t.is_floating_point()]
        assert floats
        for name in floats:
            broken = state.clone()
            broken.layers[0][name][1] = math.nan
            logits, after = model(ids, broken)
            assert torch.equal(logits[[0, 2]], expected[[0, 2]])
            assert any(t[1].isnan().any() for layer in after.layers for t in layer.values()), name
            renewed = broken.put([1], initial)
            assert_equal_states(renewed.take([1]), initial)
            torch.testing.assert_close(model(ids, renewed)[0][1], fresh)


# --- State kept in modules ------------------------------------------------------------------------


ONE_OF_EACH = ("spikegpt-46m", "spikingbrain-7b", "spikingbrain-76b", "rwkv7-0.1b", "spikelm-demo")


def kept_in(model: nn.Module) -> dict[str, tuple[int, Any]]:
    """Everything the modules hold: tensors by identity and version, the rest by value."""
    found: dict[str, tuple[int, Any]] = {}
    for path, module in model.named_modules():
        own = {**vars(module), **module._parameters, **module._buffers}
        for name, value in own.items():
            content = value._version if isinstance(value, Tensor) else repr(value)
            found[f"{path}.{name}"] = (id(value) if isinstance(value, Tensor) else 0, content)
    return found


def globals_of_the_package() -> dict[str, str]:
    """The mutable module-level values of spikelm."""
    return {
        f"{module}.{name}": repr(value)
        for module, contents in list(sys.modules.items())
        if module.split(".")[0] == "spikelm" and contents is not None
        for name, value in list(vars(contents).items())
        if isinstance(value, (dict, list, set, Tensor, nn.Module)) and name != "__builtins__"
    }


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_nothing_is_remembered_outside_the_state(name: str) -> None:
    """Two models of one kind take turns, token by token: each gives what it gives alone."""
    config = small(name)
    first, second = alive(config, 1.0), alive(config, 2.0)
    before = kept_in(first), kept_in(second), globals_of_the_package()
    ids, others = tokens(1, 10), tokens(1, 10, seed=1)
    expected = [
        in_pieces(first, ids, [4, *[1] * 6])[0],
        in_pieces(second, others, [4, *[1] * 6])[0],
    ]
    states: list[State | None] = [None, None]
    outputs: list[list[Tensor]] = [[], []]
    for part in (slice(0, 4), *(slice(t, t + 1) for t in range(4, 10))):
        for i, (model, text) in enumerate(((first, ids), (second, others))):
            logits, states[i] = model(text[:, part], states[i])
            outputs[i].append(logits)
    for found, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(torch.cat(found, 1), wanted)
    assert (kept_in(first), kept_in(second), globals_of_the_package()) == before


# --- Lengths the kernel was compiled for ----------------------------------------------------------


def test_training_lengths_and_widths_have_no_compiled_limit() -> None:
    """SpikeGPT at 1,100 tokens and 10 channels; the gradient passes token 1,024."""
    model = alive(spikegpt(1, width=10), 2.0, torch.float64).train()
    ids = tokens(1, 1100)
    grads = []
    for lengths in ([1100], [1024, 76]):
        model.zero_grad()
        logits, _ = in_pieces(model, ids, lengths)
        (logits[:, 1030:] * torch.linspace(-1, 1, 257)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-7, atol=1e-9, msg=name)
    embedded = model.embedding.weight.grad
    early = sorted(set(ids[0, :1000].tolist()) - set(ids[0, 1000:].tolist()))
    assert early
    assert embedded[early].any(), "tokens before the boundary have a gradient"


# --- Bits per character ---------------------------------------------------------------------------


def test_bits_are_per_byte_even_if_tokens_are_characters(tmp_path: Path) -> None:
    """A model that knows nothing: log2 V bits per character, fewer per byte of the same text."""
    text = "na\u00efve \u4e16\u754c \U0001f600 caf\u00e9" * 3
    tokenizer = characters(tmp_path, text)
    V, num_bytes = tokenizer.vocab_size, len(text.encode())
    model = LanguageModel(spikegpt(1, vocab_size=V)).initialise(0)
    nn.init.zeros_(model.head.linear.get_parameter("weight"))
    checkpoint.save(tmp_path / "model", model, tokenizer)
    found = evaluate(tmp_path / "model", [text], decode_tokens=1)
    assert (found["tokens"], found["bytes"]) == (len(text), num_bytes)
    assert num_bytes > 1.3 * len(text)
    assert found["bits_per_byte"] == pytest.approx(len(text) * math.log2(V) / num_bytes)
    assert found["perplexity"] == pytest.approx(V)
