"""spikelm_train.distill"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.cli import main as spikelm
from spikelm.errors import ConfigError
from spikelm_train import loop
from spikelm_train.config import load_recipe
from spikelm_train.data import make_batch
from spikelm_train.distill import divergence, feature_error
from spikelm_train.report import read_metrics
from spikelm_train.resume import claim
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]
Teach = Callable[..., str]


@pytest.fixture
def teach(recipe: Callable[..., Path], tmp_path: Path) -> Teach:
    """Trains a dense twin with assignments; its folder."""

    def train(*assignments: str, out: str = "teacher") -> str:
        config = load_recipe(str(recipe()), ["steps=12", "model.neurons={}", *assignments])
        assert loop.train(config, tmp_path / out, fresh=False, stream=io.StringIO()) == 0
        return str(tmp_path / out)

    return train


def losses(trainer: Trainer, count: int, name: str = "loss") -> list[float]:
    records = [trainer.advance(0.0) for _ in range(count)]
    return [record[name] for record in records if record is not None]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(reverse: float, temperature: float) -> None:
    ours, theirs = torch.randn(2, 5, 7, requires_grad=True), 2 * torch.randn(2, 5, 7)
    found = divergence(ours, theirs, reverse, temperature).mean()
    a, b = ours / temperature, theirs / temperature
    wanted = temperature**2 * ((1 - reverse) * kl(b, a) + reverse * kl(a, b)) / 10
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(x, ours, retain_graph=True)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert not divergence(theirs, theirs, reverse, temperature).any()


def test_feature_error_is_relative() -> None:
    y = [torch.randn(2, 3, 4), 100 * torch.randn(2, 3, 4)]
    assert feature_error([1.1 * t for t in y], y).item() == pytest.approx(0.01, rel=1e-4)


def test_features_are_the_residual_stream_in_front_of_the_norms(make: Make, teach: Teach) -> None:
    trainer = make(f"distill={{teacher: {teach()}, features: 1.0}}")
    taught = trainer.distillation
    assert taught is not None
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, args, out: seen.__setitem__(name, out)

    model = trainer.module
    hooks = [model.embedding.register_forward_hook(watch("embedding"))]
    hooks += [
        part.register_forward_hook(watch(f"{i}.{kind}"))
        for i, layer in enumerate(model.layers)
        for kind, part in (("mixer", layer.mixer), ("ffn", layer.ffn))
    ]
    with taught.watching():
        model(torch.arange(12)[None])
    for hook in hooks:
        hook.remove()
    stream = seen["embedding"]
    expected = [stream]
    for i in range(len(model.layers)):
        for kind in ("mixer", "ffn"):
            stream = stream + seen[f"{i}.{kind}"][0]
            expected.append(stream)
    assert len(taught._ours) == len(expected) == 5
    for a, b in zip(taught._ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(make: Make, teach: Teach) -> None:
    settings = f"{{weight: 1.0, features: 2.0, reverse: 0.4, teacher: {teach()}}}"
    packed = "data.sampling=packed", "data.sequence_length=200"
    trainer = make(f"distill={settings}", "model.neurons={}", *packed)
    taught = trainer.distillation
    assert taught is not None
    assert not taught.teacher.training
    assert not any(p.requires_grad for p in taught.teacher.parameters())
    trainer.module.load_state_dict(taught.teacher.state_dict())
    rows = trainer.sampler.rows(0, 0, 4)
    batch = make_batch(rows, trainer.corpus.tokenizer.eos_id)
    assert batch.reset[:, 1:].any(), "the teacher forgets at the same places"
    with taught.watching():
        logits, _ = trainer.module(batch.inputs, reset=batch.reset)
    objective = taught.objective(torch.tensor(5.0), logits, batch)
    assert objective.item() == pytest.approx(0, abs=1e-6)
    objective.backward()
    gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]
    assert all(g.abs().max() < 1e-6 for g in gradients)


def test_a_distilled_student_comes_nearer_to_its_teacher(make: Make, teach: Teach) -> None:
    folder = teach("steps=60")
    apart = {}
    for weight, features in ((0.0, 1e-9), (1.0, 1.0)):
        settings = f"distill={{teacher: {folder}, weight: {weight}, features: {features}}}"
        trainer = make(settings, "steps=40", out=f"student{weight}")
        found = [trainer.advance(0.0) for _ in range(40)][-1]
        assert found is not None
        apart[weight] = found["divergence"], found["feature_error"]
    assert apart[1.0][0] < 0.9 * apart[0.0][0]
    assert apart[1.0][1] < 0.5 * apart[0.0][1]


def test_weight_zero_changes_nothing(make: Make, teach: Teach) -> None:
    plain = make(out="plain")
    taught = make(f"distill={{teacher: {teach()}, weight: 0.0}}")
    assert losses(plain, 3) == losses(taught, 3)


WIDER = "model.width=48"


@pytest.mark.parametrize("wider", [False, True])
def test_resume_is_exact(make: Make, teach: Teach, wider: bool) -> None:
    folder = teach(*[WIDER] * wider)
    settings = f"distill={{teacher: {folder}, features: 0.5, reverse: 0.5}}", "grad_accum_steps=2"
    straight = make(*settings, out="straight")
    expected = losses(straight, 6)
    before = make(*settings, out="resumed")
    assert before.distillation is not None
    assert (before.distillation.map is not None) == wider
    before.distillation.record(before.out / "teacher.json")
    first = losses(before, 3)
    before.save(1.5)
    before.writer.finish()
    after = make(*settings, out="resumed")
    position = claim(after.out, after.config, fresh=False, num_processes=1)
    assert position is not None
    after.load(position)
    assert first + losses(after, 3) == expected
    for part in ("module", "parallel.optimizer", "distillation.map"):
        a, b = straight, after
        for name in part.split("."):
            a, b = getattr(a, name), getattr(b, name)
        if a is not None:
            torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def test_accumulation_equals_a_large_batch(make: Make, teach: Teach) -> None:
    # Without spikes: a count on an edge would turn rounding into more.
    settings = f"distill={{teacher: {teach()}, weight: 0.7}}", "model.neurons={}"
    large = make(*settings, "micro_batch_size=8")
    small = make(*settings, "micro_batch_size=2", "grad_accum_steps=4")
    for name in ("loss", "divergence"):
        np.testing.assert_allclose(losses(large, 2, name), losses(small, 2, name), rtol=1e-4)


def test_the_map_is_trained(make: Make, teach: Teach) -> None:
    trainer = make(f"distill={{teacher: {teach(WIDER)}, features: 1.0}}", "steps=40")
    assert trainer.distillation is not None
    assert trainer.distillation.map is not None
    assert trainer.distillation.map.weight.shape == (48, 32)
    found = losses(trainer, 40, "feature_error")
    assert found[-1] < 0.6 * found[0]


def test_the_run_says_and_keeps_who_taught_it(
    recipe: Callable[..., Path],
    tmp_path: Path,
    teach: Teach,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = teach()
    path, out = str(recipe()), tmp_path / "run"
    config = load_recipe(path, [f"distill.teacher={folder}"])
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "agree", lambda self, signum: (0.0, 2 if self.step == 3 else 0))
        assert loop.train(config, out, fresh=False, stream=stream) == 130
    known = json.loads((out / "teacher.json").read_text())
    assert known["teacher"] == folder
    line = next(x for x in stream.getvalue().splitlines() if x.startswith("teacher "))
    for part in (folder, known["fingerprint"][:12], "parameters", " MB", "ms per forward"):
        assert part in line
    keep = shutil.copytree(folder, tmp_path / "keep")
    shutil.rmtree(folder)
    teach("steps=3")
    with pytest.raises(ConfigError, match="not the one this run began with.*--fresh"):
        loop.train(config, out, fresh=False, stream=stream)
    shutil.rmtree(folder)
    shutil.copytree(keep, folder)
    assert loop.train(config, out, fresh=False, stream=stream) == 0
    assert all("divergence" in r for r in read_metrics(out) if "loss" in r)
    assert spikelm(["train", path, "--out", str(out), "--fresh", "--set", "steps=1"]) == 0
    assert not (out / "teacher.json").exists()


def test_a_teacher_that_does_not_fit(
    recipe: Callable[..., Path], teach: Teach, tmp_path: Path, make: Make
) -> None:
    shallow = teach("model.mixers=[delta]")
    with pytest.raises(ConfigError, match="has 1 layers and 0 sink embeddings; distill.features"):
        make(f"distill={{teacher: {shallow}, features: 0.1}}")
    make(f"distill={{teacher: {shallow}}}")
    other = teach("tokenizer={kind: bpe, vocab_size: 260}", out="other")
    with pytest.raises(ConfigError, match="another tokenizer .vocabulary 260, fingerprint"):
        make(f"distill.teacher={other}")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("distill.weight=0.3", "distill: weight needs a teacher"),
        ("distill={teacher: x, weight: 1.5}", "distill.weight: 1.5 given; allowed: 0 to 1"),
        ("distill={teacher: x, reverse: -1}", "distill.reverse: -1.0 given"),
        ("distill={teacher: x, temperature: 0}", "distill.temperature: 0.0 given"),
        ("distill={teacher: x, features: -1}", "distill.features: -1.0 given"),
    ],
)
def test_bad_values_are_named(recipe: Callable[..., Path], assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe()), [assignment])
    assert message in str(caught.value)


def test_a_missing_teacher_is_one_clear_line(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe()), "--out", str(tmp_path / "run")]
    assert spikelm([*command, "--set", f"distill.teacher={tmp_path}/none"]) == 2
    error = capsys.readouterr().err
    assert "no model folder at" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_memory_of_the_teacher_is_counted(recipe: Callable[..., Path], teach: Teach) -> None:
    from spikelm_train.cost import layer_costs, memory_by_category

    plain = load_recipe(str(recipe()))
    taught = load_recipe(str(recipe()), [f"distill.teacher={teach()}"])
    device = torch.device("cpu")
    layers = layer_costs(plain.model, 32, device, "fp32")
    without, beside = (memory_by_category(c, layers, device)["teacher"] for c in (plain, taught))
    assert without == 0
    assert beside > 100_000
