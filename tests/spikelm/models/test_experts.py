"""Mixtures of experts: routing, load balance, and experts that no token reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.config import ExpertsConfig, FFNConfig, ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.conversion.convert import convert
from spikelm.eval.evaluate import evaluate
from spikelm.eval.inspect import inspect
from spikelm.eval.traffic import weight_traffic
from spikelm.models.ffn import ExpertsFFN
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer
from spikelm_train.silence import Silence

INTEGER = NeuronConfig(kind="integer", dead_zone=0.3, target_silence=0.5)


@pytest.fixture
def make(tiny_config: Callable[..., ModelConfig]) -> Callable[..., LanguageModel]:
    """A function that makes a model of four experts, of which a router of one row picks one."""

    def make(*, unreached: bool = False, **fields: object) -> LanguageModel:
        experts = ExpertsConfig(num_experts=4, balance=1.0)
        ffn = FFNConfig(kind="swiglu", hidden_dim=24, experts=experts)
        model = LanguageModel(tiny_config(ffn=ffn, **fields)).initialise(0).eval()
        generator = torch.Generator().manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, ExpertsFFN) and not unreached:
                layer.router.weight.data.normal_(generator=generator)
        return model

    return make


def tokens(B: int, T: int) -> Tensor:
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(0))


def balance(model: LanguageModel, ids: Tensor, reset: Tensor | None = None) -> float:
    losses: list[Tensor] = []
    with torch.no_grad():
        model(ids, reset=reset, losses=losses)
    return float(sum(losses))


def test_balance_is_1_per_layer_where_all_experts_are_equally_likely(
    make: Callable[..., LanguageModel],
) -> None:
    # The router's zeros send every token to one expert, but each is as likely as the others.
    assert balance(make(unreached=True), tokens(1, 8)) == pytest.approx(2.0)


def test_balance_does_not_depend_on_how_a_text_is_cut(
    make: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents behind sink embeddings, long texts in transformers, and padding."""
    sinks = make(sink_embeddings=2)
    reset = torch.zeros(1, 64, dtype=torch.bool)
    reset[0, ::8] = True
    alone = [balance(sinks, part) for part in tokens(1, 64).split(8, 1)]
    assert balance(sinks, tokens(1, 64), reset) == pytest.approx(sum(alone) / 8, rel=1e-5)

    from spikelm import generate
    from spikelm.hf import SpikelmForCausalLM

    model = make()
    checkpoint.save(tmp_path / "model", model, Tokenizer.bytes())
    wrapper = SpikelmForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokens(1, 60)

    def term(**arguments: Tensor) -> float:
        losses = []
        for training in (True, False):
            wrapper.train(training)
            losses.append(float(wrapper(**arguments).loss.detach()))
        return losses[0] - losses[1]

    whole = term(input_ids=ids, labels=ids)
    assert whole == pytest.approx(balance(model, ids), rel=1e-3)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 30)
    halves = term(input_ids=ids, labels=ids)
    assert halves == pytest.approx(whole, rel=0.25)
    padded = torch.cat([ids.new_zeros(1, 4), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    found = term(input_ids=padded, attention_mask=mask, labels=padded)
    assert found == pytest.approx(halves, rel=1e-3)


@pytest.mark.parametrize("width", [32, 512])
def test_routing_of_a_row_does_not_depend_on_its_batch(
    width: int, make: Callable[..., LanguageModel]
) -> None:
    layer = make(width=width).layers[0].ffn
    assert isinstance(layer, ExpertsFFN)
    x = torch.randn(33, width)
    with torch.inference_mode():
        weights, chosen = layer._route(x, _context(), decode=True)
        for row in (0, 7, 32):
            alone = layer._route(x[row : row + 1], _context(), decode=True)
            assert torch.equal(alone[0][0], weights[row])
            assert torch.equal(alone[1][0], chosen[row])
        together = layer._route(x, _context(), decode=False)
    torch.testing.assert_close(together[0], weights)


def _context() -> object:
    from spikelm.models.layers import Context

    return Context(torch.zeros(1, 1, dtype=torch.int64), None)


def test_in_training_every_expert_has_a_gradient_and_is_counted(
    make: Callable[..., LanguageModel],
) -> None:
    """Processes see different tokens and must still agree on what they reduce."""
    neurons = NeuronsConfig(ffn_input=INTEGER, ffn_hidden=dataclasses.replace(INTEGER, learn=True))
    model = make(neurons=neurons, unreached=True).train()
    silence = Silence(model.neurons(), rate=0.2)
    silence.penalise = True
    logits, _ = model(tokens(1, 6), probe=silence)
    (logits.square().mean() + silence.take_l1()).backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    counts = silence.counts()
    assert counts.shape[1] == 2 * (2 * 5)  # layers, classes, experts
    assert (counts[1] == 0).sum() == 2 * 2 * 3
    silence.steer(counts)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_expert_that_no_token_reaches_is_converted_and_measured(
    make: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    checkpoint.save(
        tmp_path / "float", make(neurons=NeuronsConfig(), unreached=True), Tokenizer.bytes()
    )
    convert(tmp_path / "float", tmp_path / "coded", tokens(2, 32), silence={"ffn_hidden": 0.5})
    neurons = {n.name: n for n in checkpoint.load(tmp_path / "coded").model.neurons()}
    zones = [neurons[f"layers.0.ffn.experts.{e}.output"].dead_zone[0].item() for e in range(4)]
    assert len(set(zones)) <= 2
    assert min(zones) > 0
    report = evaluate(tmp_path / "coded", ["some text"], decode_tokens=1)
    assert 0 < report["weight_bytes_skippable_fraction"] < 1
    names = {row["name"] for row in inspect(tmp_path / "coded", ["some text"])["populations"]}
    assert names == set(neurons)


def test_routed_experts_count_with_their_share(make: Callable[..., LanguageModel]) -> None:
    model = make(sink_embeddings=2)
    traffic = weight_traffic(model)
    matrices = sum(matrix.num_bytes for matrix in traffic.matrices.values())
    routed = [m for n, m in traffic.matrices.items() if ".experts." in n]
    assert {matrix.share for matrix in routed} == {1 / 4}
    layer = model.layers[0].ffn
    assert isinstance(layer, ExpertsFFN)
    expert = sum(p.nbytes for p in layer.experts[0].parameters())
    everything = sum(p.nbytes for p in model.parameters())
    unread = 2 * 3 * expert + model.embedding.weight.nbytes - model.embedding.weight[0].nbytes
    assert model.sink_embeddings is not None
    unread += model.sink_embeddings.nbytes
    assert matrices + traffic.other_bytes == pytest.approx(everything - unread)
