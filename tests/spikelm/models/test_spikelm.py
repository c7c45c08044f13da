from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikelm.config import GLAConfig, ModelConfig, NeuronConfig, NeuronsConfig, RWKV7Config
from spikelm.models import copying
from spikelm.models.layers import Context
from spikelm.models.spikelm import LanguageModel
from spikelm.state import State

Make = Callable[..., ModelConfig]
LIF = NeuronConfig(kind="lif", v_threshold=0.3)
VARIANTS: dict[str, dict[str, object]] = {
    "flagship": {},
    "dense": {"neurons": NeuronsConfig()},
    "full": {"mixers": ("full", "delta")},
    "lif": {"neurons": NeuronsConfig(mixer_input=LIF, ffn_hidden=LIF, head_input=LIF)},
    "recurrent": {"mixers": ("wkv4", "gla")},
    "sinks": {"sink_embeddings": 2},
}


def build(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config).initialise(0).double().eval()


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 257, (B, T), generator=torch.Generator().manual_seed(seed))


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


def assert_same_state(a: State, b: State) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            n = min(x[name].shape[1], y[name].shape[1])  # caches of `full` may be over-allocated
            torch.testing.assert_close(x[name][:, :n], y[name][:, :n], rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), data=st.data())
def test_any_split_of_packed_documents(
    lengths: list[int], data: st.DataObject, tiny_config: Make
) -> None:
    model = build(tiny_config(**VARIANTS[data.draw(st.sampled_from(sorted(VARIANTS)))]))
    ids = tokens(2, sum(lengths))
    reset = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    whole, state = model(ids, reset=reset)
    pieces, after = in_pieces(model, ids, lengths, reset)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    assert_same_state(after, state)


@pytest.mark.parametrize(
    "neurons",
    [
        NeuronsConfig(mixer_input=NeuronConfig(kind="lif", v_threshold=50.0)),
        NeuronsConfig(queries_keys=NeuronConfig(kind="integer", dead_zone=9.0)),
    ],
)
def test_gradients_stay_finite_where_all_is_silent(
    neurons: NeuronsConfig, tiny_config: Make
) -> None:
    model = LanguageModel(tiny_config(neurons=neurons)).initialise(0)
    model(tokens(2, 64))[0].square().mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm < 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype, tiny_config: Make) -> None:
    for variant in ("dense", "flagship", "full"):
        model = LanguageModel(tiny_config(**VARIANTS[variant])).initialise(0).eval()
        expected, _ = model(tokens(1, 20))
        logits, state = model.to(dtype)(tokens(1, 20))
        assert logits.dtype == dtype
        assert state.layers[0].get("S", torch.zeros(1)).dtype == torch.float32
        if variant != "flagship":  # whose spikes may differ
            assert (logits.float() - expected).norm() < 0.2 * expected.norm()


def test_tied_embeddings_are_one_tensor(tiny_config: Make) -> None:
    model = LanguageModel(tiny_config(tie_embeddings=True))
    assert model.head.linear.weight is model.embedding.weight


def test_learned_thresholds_get_gradients(tiny_config: Make) -> None:
    learned = NeuronConfig(kind="integer", k=2.0, dead_zone=0.4, max_count=7, learn=True)
    config = tiny_config(neurons=NeuronsConfig(ffn_input=learned))
    model = LanguageModel(config).initialise(0)
    logits, _ = model(tokens(2, 30))
    logits.square().sum().backward()
    for neuron in model.neurons():
        if neuron.config.kind == "integer":
            assert neuron.k.grad is not None
            assert neuron.k.grad.abs() > 0
            assert neuron.dead_zone.grad is not None
            assert neuron.dead_zone.grad.abs().sum() > 0


def test_seeds_decide_the_weights(tiny_config: Make) -> None:
    config = dataclasses.replace(tiny_config())
    first, again, other = (LanguageModel(config).initialise(s) for s in (1, 1, 2))
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_states_keep_no_activations_alive(tiny_config: Make) -> None:
    """A view into what a long prefill computed would hold all of it."""
    small = {"num_heads": 2, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8}
    rwkv7 = RWKV7Config(head_dim=8, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4)
    model = LanguageModel(
        tiny_config(
            mixers=("delta", "gla", "wkv4", "rwkv7", "window", "full"),
            gla=GLAConfig(**small, gate_rank=4),  # type: ignore[arg-type]
            rwkv7=rwkv7,
            neurons=NeuronsConfig(mixer_input=LIF, ffn_hidden=LIF, head_input=LIF),
            head_qk_dim=4,
        )
    ).initialise(0)
    with torch.inference_mode():
        _, state = model(tokens(1, 600))
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in state.layers
        for t in layer.values()
    }
    assert sum(held.values()) < 1.1 * state.nbytes


def test_copies_of_a_long_text(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head-QK beside its definition, over several chunks and documents."""
    monkeypatch.setattr(copying, "CHUNK", 7)
    model = build(tiny_config(head_qk_dim=6))
    assert model.head_qk is not None
    for projection in (model.head_qk.queries, model.head_qk.keys):
        torch.nn.init.normal_(projection.linear.get_parameter("weight"))
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    ids, segment = tokens(2, 24) % 5, torch.zeros(2, 24, dtype=torch.int64)
    segment[0, 9:], segment[1, 21:] = 1, 1
    state = model.head_qk.zero_state(2, x)
    state["copies"] = torch.randn_like(state["copies"])
    context = Context(torch.zeros_like(ids), segment)
    found, after = model.head_qk(x, ids, state, context)
    last, after_last = model.head_qk(x, ids, state, context, last_only=True)
    q = x @ model.head_qk.queries.linear.get_parameter("weight").T / 6
    k = x @ model.head_qk.keys.linear.get_parameter("weight").T
    for row in range(2):
        copies = state["copies"][row].clone()
        for t in range(24):
            if t and segment[row, t] != segment[row, t - 1]:
                copies.zero_()
            copies[:, ids[row, t]] += k[row, t]
            torch.testing.assert_close(found[row, t], q[row, t] @ copies)
        torch.testing.assert_close(after["copies"][row], copies)
    torch.testing.assert_close(last, found[:, -1:])
    torch.testing.assert_close(after_last["copies"], after["copies"])


def test_only_rwkv7_layers_behind_another_mix_values(tiny_config: Make) -> None:
    rwkv7 = RWKV7Config(head_dim=8, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4)
    model = LanguageModel(tiny_config(mixers=("delta", "rwkv7", "delta", "rwkv7"), rwkv7=rwkv7))
    mixing = {name.split(".")[1] for name, _ in model.named_parameters() if "value_up" in name}
    assert mixing == {"3"}


def test_the_state_of_sink_embeddings_is_saved_for_several_rows(
    tiny_config: Make, tmp_path: Path
) -> None:
    state = build(tiny_config(sink_embeddings=2)).initial_state(2)
    state.save(tmp_path / "state", "model")
    assert State.load(tmp_path / "state", "model").position.tolist() == [2, 2]
