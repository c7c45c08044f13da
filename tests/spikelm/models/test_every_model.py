"""What must hold for every mixer, neuron and preset: one test each, all models as its parameters.

A new mixer adds one line to `MIXERS`; a new preset (scaled down) is found by itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm import checkpoint
from spikelm.config import (
    AttentionConfig,
    DeltaConfig,
    ExpertsConfig,
    FFNConfig,
    GLAConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    RWKV7Config,
    load_model_config,
)
from spikelm.conversion.convert import convert
from spikelm.eval.inspect import inspect
from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.kernels import native
from spikelm.kernels.lazy import settled
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.sampling import SamplingParams
from spikelm.state import LayerState, State
from spikelm.tokenizer import Tokenizer
from spikelm_serve.app import create_app

PRESETS = sorted(
    path.stem for path in (Path(__file__).parents[3] / "configs" / "models").glob("*.yaml")
)
LIF = NeuronConfig(kind="lif", v_threshold=0.3)
INTEGER = NeuronConfig(kind="integer", k=4.0, dead_zone=0.3)
SMALL = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8}
TIED = GLAConfig(**SMALL, decay="tied", feature_map="sigmoid")  # type: ignore[arg-type]
RWKV7 = RWKV7Config(head_dim=8, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4)
GATED = FFNConfig(kind="swiglu", hidden_dim=24)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 16, "sinks": 2}


def gla(**fields: Any) -> dict[str, Any]:
    return {"mixers": ("gla", "gla"), "gla": GLAConfig(**(SMALL | {"gate_rank": 4} | fields))}


def delta(**fields: Any) -> dict[str, Any]:
    return {"delta": DeltaConfig(num_heads=2, key_dim=8, value_dim=12, gate_rank=8, **fields)}


def attention(kind: str, **fields: Any) -> dict[str, Any]:
    return {"mixers": (kind, "delta"), "attention": AttentionConfig(**HEADS, **fields)}


MIXERS: dict[str, dict[str, Any]] = {
    "delta": {},
    "deltanet": delta(decay="none", gates="tied"),
    "gated deltanet": delta(decay="scalar", gates="tied"),
    "kda": delta(decay="channel", gates="tied"),
    "gla": gla(),
    "gla, full gate": gla(gate_rank=None, qkv_bias=True, output_gate="elementwise"),
    "simple gla": gla(decay="scalar", output_gate="headwise"),
    "tied gla": {"mixers": ("gla", "delta"), "gla": TIED},
    "lightning": gla(decay="lightning", feature_map="silu"),
    "retnet": gla(decay="retnet", feature_map="identity"),
    "wkv4": {"mixers": ("wkv4", "wkv4")},
    "rwkv7": {"mixers": ("rwkv7", "rwkv7"), "rwkv7": RWKV7},
    "window": attention("window", output_gate="headwise", kv_bits=8),
    "full": attention("full", qkv_bias=True, output_bias=True, qk_norm=True),
    "full, gated, int8": attention("full", output_gate="elementwise", kv_bits=8),
    "parallel": {"mixers": ("parallel", "delta"), "gla": TIED},
    "parallel_full": {"mixers": ("parallel_full", "parallel"), "gla": TIED},
    "channel_mix": {
        "mixers": ("channel_mix", "wkv4"),
        "ffn": FFNConfig(hidden_dim=40, receptance=True),
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"neurons": NeuronsConfig()},
    "lif": {"neurons": NeuronsConfig(mixer_input=LIF, ffn_hidden=LIF, head_input=LIF)},
    "lif before the linears of rwkv7": {
        "mixers": ("rwkv7", "wkv4"),
        "rwkv7": RWKV7,
        "neurons": NeuronsConfig(mixer_input=LIF, mixer_output=LIF, gate_input=LIF, ffn_input=LIF),
    },
    "integer rwkv7": {
        "mixers": ("rwkv7", "rwkv7"),
        "rwkv7": RWKV7,
        "neurons": NeuronsConfig(mixer_input=INTEGER, mixer_output=INTEGER, gate_input=INTEGER),
    },
    "expanding neurons": {
        "neurons": NeuronsConfig(
            mixer_input=dataclasses.replace(INTEGER, power=1.5),
            mixer_output=dataclasses.replace(INTEGER, power=2.0),
            ffn_hidden=dataclasses.replace(INTEGER, power=1.25, unsigned=True),
            queries_keys=dataclasses.replace(INTEGER, power=1.5),
            attention_queries=dataclasses.replace(INTEGER, power=1.5),
        )
    },
    "swiglu": {"ffn": GATED},
    "swiglu with a token shift": {"ffn": dataclasses.replace(GATED, token_shift=True)},
    "reglu": {"ffn": FFNConfig(kind="reglu", hidden_dim=24)},
    "experts": {
        "ffn": dataclasses.replace(
            GATED, experts=ExpertsConfig(num_experts=3, top_k=2, dense_layers=(1,))
        )
    },
    "sigmoid router": {
        "ffn": dataclasses.replace(
            GATED, experts=ExpertsConfig(num_experts=3, num_shared=0, router="sigmoid")
        )
    },
    "sink embeddings": {"sink_embeddings": 2},
    "layer norm, copies": {"norm": "layer", "embedding_norm": True, "head_qk_dim": 6},
    "spiking embedding and residuals": {
        "neurons": NeuronsConfig(
            embedding_output=NeuronConfig(kind="step", v_threshold=0.0),
            mixer_residual=LIF,
            ffn_residual=LIF,
        )
    },
}
MODELS = [*MIXERS, *OPTIONS, *PRESETS]


def scaled_down(config: ModelConfig) -> ModelConfig:
    """The same system with small matrices and one layer of each kind, two at least."""
    replace = dataclasses.replace
    kinds = tuple(dict.fromkeys(config.mixers))
    att, ffn = config.attention, config.ffn
    grouped = {"num_heads": 4, "num_kv_heads": 4 if att.num_heads == att.num_kv_heads else 2}
    experts = ffn.experts
    if experts is not None:
        experts = replace(experts, num_experts=4, dense_layers=(0,))
    return replace(
        config,
        vocab_size=Tokenizer.bytes().vocab_size,
        width=32,
        mixers=kinds if len(kinds) > 1 else kinds * 2,
        delta=replace(config.delta, num_heads=2, key_dim=8, value_dim=12, gate_rank=8),
        gla=replace(
            config.gla, **grouped, key_dim=8, value_dim=8, gate_rank=config.gla.gate_rank and 4
        ),
        attention=replace(att, **grouped, head_dim=8, window=16, sinks=min(att.sinks, 2)),
        rwkv7=RWKV7,
        ffn=replace(ffn, hidden_dim=24, experts=experts),
        sink_embeddings=min(config.sink_embeddings, 2),
    )


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest, tiny_config: Callable[..., ModelConfig]) -> ModelConfig:
    if request.param in PRESETS:
        return scaled_down(load_model_config(request.param))
    return tiny_config(**(MIXERS | OPTIONS)[request.param])


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model in which everything is alive: no matrix is zero, so that all neurons get input."""
    model = LanguageModel(config).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = 3.0 if name.startswith("embedding") else 2.0 * parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=scale, generator=generator)
    with torch.no_grad():  # the end-of-document token never wins
        model.head.linear.get_parameter("weight")[Tokenizer.bytes().eos_id] = 0
    return model.to(dtype).eval()


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


def in_pieces(
    model: LanguageModel, ids: Tensor, lengths: list[int], reset: Tensor | None = None
) -> tuple[Tensor, State]:
    state, outputs, start = None, [], 0
    for length in lengths:
        part = slice(start, start + length)
        piece_reset = None if reset is None else reset[:, part]
        logits, state = model(ids[:, part], state, reset=piece_reset)
        outputs.append(logits)
        start += length
    assert state is not None
    return torch.cat(outputs, 1), state


def with_settled_decays(layer: LayerState) -> LayerState:
    """The layer's state as it stands: how much of a decay is pending depends on the calls."""
    layer = dict(layer)
    for name in [name for name in layer if name.endswith("pending")]:
        rows = name.removesuffix("pending") + "S"
        layer[rows] = settled(layer[rows], layer[name])
        layer[name] = torch.zeros_like(layer[name])
    return layer


def assert_same_state(a: State, b: State) -> None:
    assert torch.equal(a.position, b.position)
    for left_layer, right_layer in zip(a.layers, b.layers, strict=True):
        assert left_layer.keys() == right_layer.keys()
        x, y = with_settled_decays(left_layer), with_settled_decays(right_layer)
        for name in x:
            n = min(x[name].shape[1], y[name].shape[1])  # caches of `full` may be over-allocated
            left, right = x[name][:, :n], y[name][:, :n]
            if left.dtype == torch.int8:  # codes, then the bytes of their scale
                assert torch.equal(left[..., :-4], right[..., :-4]), name
            else:
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9, msg=name)


def test_parallel_chunked_and_recurrent_agree(config: ModelConfig) -> None:
    """One call, calls of odd lengths and one call per token; documents packed in two rows."""
    model = build(config)
    ids = tokens(2, 65)
    reset = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.06
    reset[:, 0] = False
    assert reset.any()
    for starts in (None, reset):
        whole, state = model(ids, reset=starts)
        assert whole.isfinite().all()
        for lengths in ([1] * 65, [7, 1, 40, 17]):
            pieces, after = in_pieces(model, ids, lengths, starts)
            torch.testing.assert_close(pieces, whole, rtol=1e-8, atol=1e-8)
            assert_same_state(after, state)


def test_packed_documents_equal_separate_ones(config: ModelConfig) -> None:
    model = build(config)
    ids, reset = tokens(1, 50), torch.zeros(1, 50, dtype=torch.bool)
    reset[0, [0, 13, 14]] = True
    packed, state = model(ids, reset=reset)
    alone = [model(part)[0] for part in ids.split([13, 1, 36], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-8, atol=1e-8)
    assert state.position.item() == 36 + config.sink_embeddings


def test_gradients_flow_through_a_carried_state(config: ModelConfig) -> None:
    """Two pieces with the state between them give the gradients of one."""
    if config.attention.kv_bits is not None and {"delta"} != set(config.mixers):
        pytest.skip("integers pass no gradient: int8 keys and values end it at the call")
    model = build(config)
    ids = tokens(1, 40)
    weights = torch.randn(1, 40, 257, dtype=torch.float64)
    grads = []
    for lengths in ([40], [17, 23]):
        logits, _ = in_pieces(model, ids, lengths)
        model.zero_grad()
        (logits * weights).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # An expert may see no token, and the first rwkv7 layer has no earlier values to mix with.
    assert {n for n in trained - set(grads[0]) if ".experts." not in n} == set()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-8, msg=name)


class Counter:
    """A probe that counts its calls and adds a term to the loss, as training's does."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.term = torch.zeros(())

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        self.calls[neuron.name] = self.calls.get(neuron.name, 0) + 1
        self.term = self.term + spikes.values.abs().sum()

    def repeat(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        spikes.values.abs().sum()


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def test_layers_that_are_computed_again_change_nothing(config: ModelConfig) -> None:
    model = build(dataclasses.replace(config, dropout=0.1), torch.float32).train()
    ids, reset = tokens(2, 21), torch.zeros(2, 21, dtype=torch.bool)
    reset[0, 9] = True
    found = []
    for again in (False, True):
        model.recompute_layers = again
        torch.manual_seed(0)
        probe, terms = Counter(), list[Tensor]()
        logits, _ = model(ids, reset=reset, probe=probe, losses=terms)
        loss = logits.square().mean() + 0.01 * probe.term + sum(terms, start=torch.zeros(()))
        loss.backward()
        found.append((loss, gradients(model), probe.calls, len(terms)))
    (loss, grads, *counts), (loss_again, grads_again, *counts_again) = found
    assert torch.equal(loss, loss_again)
    assert counts == counts_again
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


def test_logits_read_in_chunks_are_the_whole(config: ModelConfig) -> None:
    """The same losses, gradients and state, and every neuron called for every token once."""
    model = build(config)
    ids, targets = tokens(2, 23), tokens(2, 23, seed=1)
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, 9] = True

    def read(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits.mT, targets[:, part], reduction="none")

    seen: dict[str, int] = {}

    def probe(neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        seen[neuron.name] = seen.get(neuron.name, 0) + x[..., 0].numel()

    logits, state = model(ids, reset=reset, probe=probe)
    whole = read(logits, slice(0, 23))
    whole.mean().backward()
    expected, expected_seen = gradients(model), dict(seen)
    for read_tokens in (1, 10, 1000):
        seen.clear()
        nats, after = model(ids, reset=reset, probe=probe, read=read, read_tokens=read_tokens)
        nats.mean().backward()
        assert seen == expected_seen
        torch.testing.assert_close(nats, whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-8, atol=1e-10)
        assert_same_state(after, state)


def test_rows_are_independent(config: ModelConfig) -> None:
    """A row alone, in a batch, forked, and after another row's end: nothing leaks between them."""
    model = build(config)
    ids = tokens(3, 20)
    logits, state = model(ids)
    alone, kept = model(ids[1:2])
    torch.testing.assert_close(logits[1:2], alone, rtol=1e-9, atol=1e-9)
    assert_same_state(state.take([1]), kept)
    more = tokens(1, 9, seed=5)
    expected, _ = model(more, kept.clone())
    merged = State.merge([model(tokens(1, 33, seed=7))[1], kept])
    again, _ = model(more.expand(2, -1), merged)
    torch.testing.assert_close(again[1:], expected, rtol=1e-9, atol=1e-9)
    replaced = state.put([2], model.initial_state(1))
    fresh, _ = model(more.expand(3, -1), replaced)
    torch.testing.assert_close(fresh[2:], model(more)[0], rtol=1e-9, atol=1e-9)


def test_later_tokens_never_change_earlier_logits(config: ModelConfig) -> None:
    model = build(config)
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 256
    first, second = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(first[:, :25], second[:, :25], rtol=1e-11, atol=1e-11)
    assert (first[:, 25:] - second[:, 25:]).abs().max() > 1e-3


def test_last_only_is_the_last_row(config: ModelConfig) -> None:
    model = build(config)
    logits, state = model(tokens(2, 20))
    last, after = model(tokens(2, 20), last_only=True)
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-9, atol=1e-9)
    assert_same_state(after, state)


def test_the_state_grows_only_where_it_says_so(config: ModelConfig) -> None:
    model = build(config, torch.float32)
    _, ten = model(tokens(1, 10))
    _, more = model(tokens(1, 300), ten)
    if {"full", "parallel_full"} & set(config.mixers):
        assert more.nbytes > ten.nbytes
    else:
        assert more.nbytes == ten.nbytes == model.zero_state(1).nbytes


def test_the_dense_twin_has_no_spikes_and_the_same_matrices(config: ModelConfig) -> None:
    spiking, dense = LanguageModel(config), LanguageModel(config.dense_twin())
    extra = set(spiking.state_dict()) - set(dense.state_dict())
    assert {name.rsplit(".", 1)[1] for name in extra} <= {"k", "dead_zone"}
    assert all(neuron.config.kind == "off" for neuron in dense.neurons())
    names = [neuron.name for neuron in spiking.neurons()]
    assert len(set(names)) == len(names)


def greedy(model: LanguageModel, prompt: list[int], num_tokens: int) -> list[int]:
    """By the plainest use of the model there is."""
    logits, state = model(torch.tensor([prompt]))
    found = []
    for _ in range(num_tokens):
        found.append(int(logits[0, -1].argmax()))
        logits, state = model(torch.tensor([found[-1:]]), state)
    return found


def complete(engine: Engine, prompt: str, num_tokens: int) -> str:
    """What the server answers."""

    async def ask() -> str:
        transport = httpx.ASGITransport(create_app(engine, "model"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
            answer = (await client.post("/v1/completions", json=body)).json()
            text: str = answer["choices"][0]["text"]
            return text

    return asyncio.run(ask())


def test_save_convert_inspect_generate_and_serve(config: ModelConfig, tmp_path: Path) -> None:
    """One folder through every door: all give the tokens of the plain loop."""
    model = build(config, torch.float32)
    folder, coded = tmp_path / "float", tmp_path / "coded"
    checkpoint.save(folder, model, Tokenizer.bytes())
    loaded = checkpoint.load(folder)
    ids = tokens(1, 24)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids)[0], model(ids)[0])

    manifest = convert(folder, coded, tokens(4, 48))
    spiking = checkpoint.load(coded)
    assert [e["name"] for e in manifest["neurons"]] == [n.name for n in spiking.model.neurons()]
    report = inspect(coded, ["some text to measure silence on"])
    assert [row["name"] for row in report["populations"]] == [
        entry["name"] for entry in manifest["neurons"]
    ]
    assert 0 < report["weight_bytes_read_per_token"] < report["weight_bytes_per_token"]
    assert inspect(folder, ["some text"])["parameters"] == sum(
        parameter.numel() for parameter in model.parameters()
    )

    for opened in (loaded, spiking):
        engine = Engine(opened)
        prompt = prompt_ids(opened.tokenizer, "Once upon")
        with torch.inference_mode():
            expected = greedy(opened.model, prompt, 8)
        assert opened.tokenizer.eos_id not in expected
        params = SamplingParams(temperature=0, max_tokens=8)
        chunks = list(stream_text(engine, prompt, params))
        assert [token for chunk in chunks for token in chunk.token_ids] == expected
        text = opened.tokenizer.decode(expected)
        assert "".join(chunk.text for chunk in chunks) == text
        assert complete(engine, "Once upon", 8) == text


def test_spike_coded_backends_and_batches_agree_to_the_bit(
    config: ModelConfig, tmp_path: Path
) -> None:
    """Decoding a row alone or in a batch, by gathering rows or by a dense integer product."""
    checkpoint.save(tmp_path / "float", build(config, torch.float32), Tokenizer.bytes())
    convert(tmp_path / "float", tmp_path / "coded", tokens(2, 32))
    results = []
    for backend in ("auto", "matmul"):
        model = checkpoint.load(tmp_path / "coded", backend=backend).model
        with torch.inference_mode():
            _, state = model(tokens(3, 12))
            step = tokens(3, 1, seed=3)
            together, _ = model(step, state)
            alone, _ = model(step[1:2], state.take([1]))
        if not {"full", "parallel_full"} & set(config.mixers):
            assert torch.equal(together[1:2], alone)
        torch.testing.assert_close(together[1:2], alone)
        results.append(together)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.unavailable() is not None, reason="no native library")
def test_native_decoding_is_the_models_own_step(config: ModelConfig, tmp_path: Path) -> None:
    """Against torch over many tokens, alone and in a batch, in place and not."""
    checkpoint.save(tmp_path / "float", build(config, torch.float32), Tokenizer.bytes())
    convert(tmp_path / "float", tmp_path / "coded", tokens(2, 32))
    engine = Engine(checkpoint.load(tmp_path / "coded", backend="native"))
    assert engine.native_obstacle == (
        "there is no native form of head-QK" if config.head_qk_dim else None
    )
    with torch.inference_mode():
        _, state = engine.model(tokens(3, 21))
    alone, flips = state.take([1]), 0
    for token in tokens(3, 24, seed=5).T:
        before = state.clone()
        with torch.inference_mode():
            wanted, expected = engine.model(token[:, None], before)
        logits, after = engine.step(token, state)
        assert_same_bits(before, state)
        single, alone = engine.step(token[1:2], alone, in_place=True)
        assert torch.equal(single, logits[1:2])
        # Sums of another order may round a count to the next integer.
        same = torch.isclose(logits, wanted[:, -1, : logits.shape[1]], rtol=1e-3, atol=1e-3).all(1)
        flips += int((~same).sum())
        if same.all():
            assert_near(after, expected)
        state = after
    assert flips <= 2
    assert_same_bits(state.take([1]), alone)


def assert_near(a: State, b: State) -> None:
    assert torch.equal(a.position, b.position)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            n = min(x[name].shape[1], y[name].shape[1])
            left, right = x[name][:, :n].float(), y[name][:, :n].float()
            if x[name].dtype == torch.int8:  # codes, then the bytes of their scale
                assert not ((left - right)[..., :-4].abs() > 1).any(), name
            else:
                torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3, msg=name)


def assert_same_bits(a: State, b: State) -> None:
    assert torch.equal(a.position, b.position)
    for x, y in zip(a.layers, b.layers, strict=True):
        for name in x:
            n = min(x[name].shape[1], y[name].shape[1])
            assert torch.equal(x[name][:, :n], y[name][:, :n]), name


def test_training_lowers_the_loss(config: ModelConfig) -> None:
    """A batch learned by heart, experts' balance loss included."""
    torch.manual_seed(0)
    model = LanguageModel(config).initialise(0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ids = tokens(2, 24) % 8
    values = []
    for _ in range(12):
        losses: list[Tensor] = []
        logits, _ = model(ids[:, :-1], losses=losses)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert bool(losses) == (config.ffn.experts is not None)
        optimizer.zero_grad()
        sum(losses, start=loss).backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
