from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from spikelm.config import (
    FFNConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    load_model_config,
)
from spikelm.errors import ConfigError
from spikelm.models.spikelm import LanguageModel
from spikelm_train.config import OptimConfig
from spikelm_train.optim import (
    SPAM,
    MuonAdamW,
    adamw_over,
    lr_factor,
    make_optimizer,
    parameter_groups,
    reset_scale,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("cosine", {0: 0, 0.05: 0.5, 0.1: 1, 0.55: 0.55, 1: 0.1}),
        ("wsd", {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.8: 1, 0.9: 0.55, 1: 0.1}),
        ("constant", {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 1: 1}),
    ],
)
def test_schedule_corners(schedule: Any, points: dict[float, float]) -> None:
    config = OptimConfig(schedule=schedule, warmup_fraction=0.1, final_lr_fraction=0.1)
    for progress, factor in points.items():
        assert lr_factor(config, progress) == pytest.approx(factor), progress


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_schedule_is_defined_everywhere(schedule: Any, warmup: float, decay: float) -> None:
    config = OptimConfig(
        schedule=schedule, warmup_fraction=warmup, wsd_decay_fraction=decay, final_lr_fraction=0.2
    )
    factors = [lr_factor(config, i / 100) for i in range(101)]
    assert all(0 <= factor <= 1 for factor in factors)
    peak = max(range(101), key=factors.__getitem__)
    assert factors[peak] == pytest.approx(1)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def tiny_model(**changes: Any) -> LanguageModel:
    neurons = NeuronsConfig(ffn_hidden=NeuronConfig(kind="integer", learn=True, dead_zone=0.5))
    config = ModelConfig(
        vocab_size=20,
        width=16,
        mixers=("delta",),
        ffn=FFNConfig(hidden_dim=8),
        neurons=neurons,
        **changes,
    )
    return LanguageModel(config).initialise(0)


def test_parameter_groups_decay_projections_only() -> None:
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = parameter_groups(model, OptimConfig())
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    with_decay = {names[id(p)] for p in decayed["params"]}
    without = {names[id(p)] for p in others["params"]}
    assert "head.linear.weight" in with_decay
    assert {"embedding.weight", "norm.weight"} <= without
    assert any(name.endswith("mixer.conv") for name in without)
    assert any(name.endswith("dead_zone") for name in without)
    assert any(name.endswith(".k") for name in without)
    assert with_decay.isdisjoint(without)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_decay | without == trainable


def test_neurons_have_a_learning_rate_of_their_own() -> None:
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    *_, neurons = parameter_groups(model, OptimConfig(neuron_lr=0.1))
    assert {names[id(p)].rpartition(".")[2] for p in neurons["params"]} == {"k", "dead_zone"}
    assert (neurons["weight_decay"], neurons["lr_factor"]) == (0.0, 0.1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = make_optimizer(model, OptimConfig(neuron_lr=0.1)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def test_parameter_groups_treat_a_tied_head_as_the_embedding() -> None:
    model = tiny_model(tie_embeddings=True)
    decayed, others = parameter_groups(model, OptimConfig())
    assert sum(p is model.embedding.weight for p in others["params"]) == 1
    assert all(p is not model.embedding.weight for p in decayed["params"])


def test_make_optimizer_uses_the_recipe() -> None:
    adamw = make_optimizer(tiny_model(), OptimConfig(lr=0.5, betas=(0.1, 0.2)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["betas"]) == (0.5, (0.1, 0.2))
    spam = make_optimizer(tiny_model(), OptimConfig(name="spam", spam_reset_every=7))
    assert isinstance(spam, SPAM)
    assert spam.defaults["reset_every"] == 7


def test_rates_and_decays_go_by_name() -> None:
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    config = OptimConfig(
        neuron_lr=0.1,
        rates={"*.dead_zone": 3.0, "*.ffn.*": 2.0},
        decays={"embedding.weight": 0.3, "*.mixer.output.*": 0.0},
    )
    found = {
        names[id(p)]: (group["weight_decay"], group["lr_factor"])
        for group in parameter_groups(model, config)
        for p in group["params"]
    }
    assert found["embedding.weight"] == (0.3, 1.0)
    assert found["layers.0.mixer.output.linear.weight"] == (0.0, 1.0)
    assert found["layers.0.ffn.output.linear.weight"] == (0.1, 2.0)
    assert found["layers.0.ffn.output.neuron.dead_zone"] == (0.0, 3.0)  # the first pattern
    assert found["layers.0.ffn.output.neuron.k"] == (0.0, 2.0)
    assert found["layers.0.mixer.conv"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": {"embeding.weight": 2.0}}, "did you mean 'embedding.weight'?"),
        ({"decays": {"*.time_decay": 0.0}}, "optim.decays: '*.time_decay' matches no trained"),
    ],
)
def test_a_pattern_without_match_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_optimizer(tiny_model(), OptimConfig(**settings))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        ("rwkv7-0.1b", {"*.mixer.decay_bias": 2.0}),
        ("spikegpt-46m", {"*.mixer.decay": 2.0, "*.mixer.bonus": 3.0}),
    ],
)
def test_the_authors_rates_of_rwkv_find_their_parameters(
    preset: str, rates: dict[str, float]
) -> None:
    config = load_model_config(preset)
    with torch.device("meta"):
        groups = parameter_groups(LanguageModel(config), OptimConfig(rates=rates))
    faster = [p for group in groups if group["lr_factor"] != 1 for p in group["params"]]
    assert len(faster) == len(rates) * config.num_layers
    assert {p.numel() for p in faster} == {config.width}


def test_the_authors_decays_of_rwkv7_find_their_parameters() -> None:
    decays = {"embedding.weight": 0.1, "*_down.linear.weight": 0.0, "*_up.linear.weight": 0.0}
    with torch.device("meta"):
        model = LanguageModel(load_model_config("rwkv7-0.1b"))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(decays=decays))
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert "embedding.weight" in decayed
    layer = {n for n in decayed if n.startswith("layers.1.")}
    assert {n.split(".")[3] for n in layer} == {
        *("receptance", "key", "value", "output"),  # of the mixer
        "input",  # of the channel mix, beside its output
    }


def test_muon_is_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.5, muon_lr=0.1))
    assert isinstance(optimizer, MuonAdamW)
    muon = {names[id(p)] for g in optimizer.muon.param_groups for p in g["params"]}
    adamw = {names[id(p)] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert "layers.0.ffn.input.linear.weight" in muon
    assert all(name.endswith("linear.weight") for name in muon)
    assert {"head.linear.weight", "embedding.weight", "norm.weight"} <= adamw
    assert muon.isdisjoint(adamw)
    assert muon | adamw == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {g["lr_factor"] for g in optimizer.muon.param_groups} == {0.1}
    optimizer.param_groups[0]["lr"] = 7.0
    assert optimizer.muon.param_groups[0]["lr"] == 7.0


def test_muon_does_what_its_parts_do_alone() -> None:
    torch.manual_seed(0)
    start = {"matrix": torch.randn(6, 4), "vector": torch.randn(4), "added": torch.randn(3)}
    ours = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    alone = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    rest = adamw_over([{"params": [ours["vector"]], "weight_decay": 0.0}], CPU, lr=0.1)
    matrices = [{"params": [ours["matrix"]], "weight_decay": 0.3, "matrices": True}]
    optimizer = MuonAdamW(matrices, rest, lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [ours["added"]], "weight_decay": 0.2})
    parts = [
        torch.optim.Muon(
            [alone["matrix"]],
            lr=0.1,
            momentum=0.9,
            weight_decay=0.3,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([alone["vector"]], lr=0.1, weight_decay=0.0, fused=True),
        torch.optim.AdamW([alone["added"]], lr=0.1, weight_decay=0.2, fused=True),
    ]
    for step in range(6):
        if step == 3:  # a reload in between
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name in start:
            grad = torch.randn(start[name].shape)
            ours[name].grad, alone[name].grad = grad.clone(), grad.clone()
        optimizer.step()
        for part in parts:
            part.step()
        for name in start:
            assert torch.equal(ours[name], alone[name]), (step, name)


def test_updates_of_muon_are_as_large_as_adamws() -> None:
    matrix = nn.Parameter(torch.zeros(64, 256))
    matrices = [{"params": [matrix], "weight_decay": 0.0, "matrices": True}]
    vector = adamw_over([{"params": [nn.Parameter(torch.zeros(2))]}], CPU, lr=0.1)
    drive(MuonAdamW(matrices, vector, lr=0.1, momentum=0.95), matrix, [torch.randn(64, 256)])
    # AdamW's measured root mean square is 0.2 to 0.4 of the rate (Liu et al. 2025).
    assert 0.1 * 0.15 < matrix.detach().square().mean().sqrt().item() < 0.1 * 0.25


def test_adamw_is_fused_where_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    fused = make_optimizer(tiny_model(), OptimConfig())
    assert fused.defaults["fused"] is True
    assert not caplog.records
    plain = make_optimizer(tiny_model(), OptimConfig(), torch.device("privateuseone"))
    assert plain.defaults["fused"] is False
    assert "no fused AdamW for privateuseone" in caplog.text


def drive(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[Any]) -> list[float]:
    trace = []
    for grad in grads:
        p.grad = torch.as_tensor(grad, dtype=p.dtype).expand_as(p).clone()
        optimizer.step()
        trace.append(p.flatten()[0].item())
    return trace


def test_spam_is_adamw_before_the_first_reset() -> None:
    start = torch.randn(3, 4, dtype=torch.float64)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
    grads = [torch.randn(3, 4, dtype=torch.float64) for _ in range(40)]
    drive(SPAM([a], **settings), a, grads)
    drive(torch.optim.AdamW([b], **settings), b, grads)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_spam_by_hand() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM(
        [p],
        lr=0.1,
        betas=(0.5, 0.5),
        eps=1e-300,
        threshold=4.0,
        clip_after=1,
        reset_every=3,
        warmup_steps=2,
    )
    trace = drive(optimizer, p, [1.0, -10.0, 1.0, 2.0, 2.0])
    # m, v of each step; the bias corrections are 1 - 0.5^1, 1 - 0.5^2, ... through the reset.
    root2 = math.sqrt(2.0)
    moments = [
        (0.5, 0.5),
        (0.25 - 0.5 * root2, 0.25 + 0.5 * 2.0),  # 100 > 4 * 0.5: -10 becomes -sqrt(2)
        (0.125 - 0.25 * root2 + 0.5, 0.625 + 0.5),
        (1.0, 2.0),  # both moments were zeroed
        (1.5, 3.0),
    ]
    scales = [1.0, 1.0, 1.0, 0.01, 0.505]
    expected, at = [], 0.0
    for t, ((m, v), scale) in enumerate(zip(moments, scales, strict=True), 1):
        correction = 1 - 0.5**t
        at -= 0.1 * scale * (m / correction) / math.sqrt(v / correction)
        expected.append(at)
    assert trace == pytest.approx(expected, rel=1e-12)


def test_spam_does_not_clip_right_after_the_start() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([p], betas=(0.0, 0.5), threshold=4.0, clip_after=2)
    drive(optimizer, p, [1.0, 10.0])
    assert optimizer.state[p]["exp_avg"].item() == 10.0
    drive(optimizer, p, [1000.0])
    limit = math.sqrt(4.0 * (0.25 * 0.5 * 2 + 50.0))
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(limit, rel=1e-2)


def test_reset_scale_rises_from_one_hundredth() -> None:
    assert reset_scale(0, 150) == pytest.approx(0.01)
    assert reset_scale(75, 150) == pytest.approx(0.505)
    assert reset_scale(150, 150) == reset_scale(400, 150) == 1.0


def test_spam_density_updates_part_of_a_matrix_and_survives_a_reload() -> None:
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = SPAM([p], lr=0.1, density=0.25, reset_every=3)
    drive(optimizer, p, [1.0, 1.0])
    moved = p != 0
    assert 0.2 < moved.float().mean().item() < 0.3
    assert optimizer.state[p]["exp_avg"].numel() == int(moved.sum())
    q = nn.Parameter(p.detach().clone())
    other = SPAM([q], lr=0.1, density=0.25, reset_every=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[q]["mask"].dtype == torch.bool
    drive(optimizer, p, [1.0, -1.0])
    drive(other, q, [1.0, -1.0])
    assert torch.equal(p, q)
    assert not torch.equal(p != 0, moved)  # a reset drew other entries
