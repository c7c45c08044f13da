"""spikelm_train.quantised"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.errors import ConfigError
from spikelm.models.coded import projections
from spikelm.models.grid import RoundedLinear, choose_scale
from spikelm_train import loop
from spikelm_train.config import load_recipe
from spikelm_train.resume import claim
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]

FOUR = ("model.weights={bits: 4, bits_of: {head: 8}}", "quantise_at=0.4")


def losses(trainer: Trainer, count: int) -> list[float]:
    records = [trainer.advance(0.0) for _ in range(count)]
    return [record["loss"] for record in records if record is not None]


def linears(trainer: Trainer) -> list[RoundedLinear]:
    return [m for m in trainer.module.modules() if isinstance(m, RoundedLinear)]


def test_weights_are_floats_until_their_share_of_the_run(make: Make) -> None:
    plain, trainer = make(out="plain"), make(*FOUR)
    assert losses(plain, 4) == losses(trainer, 4)
    assert not any(linear.begun for linear in linears(trainer))
    before = [choose_scale(x.weight, 1, x.bits) for x in linears(trainer)]
    assert losses(trainer, 1) != losses(plain, 1)
    assert [x.bits for x in linears(trainer)].count(8) == 1
    for linear, scale in zip(linears(trainer), before, strict=True):
        assert torch.equal(linear.step, scale)
    losses(trainer, 5)
    for linear, scale in zip(linears(trainer), before, strict=True):
        assert torch.equal(linear.step, scale), "chosen once"
        assert linear.stretch is not None
        assert 0 < linear.stretch.abs().max() < 0.1


def test_rounded_training_learns(make: Make) -> None:
    trainer = make(*FOUR, "steps=60", "optim.schedule=constant")
    found = losses(trainer, 60)
    assert max(found[24:27]) < found[0] - 1
    assert min(found[50:]) < min(found[:24])


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_resume_is_exact(make: Make, stop: int) -> None:
    straight = make(*FOUR, out="straight")
    expected = losses(straight, 10)
    before = make(*FOUR, out="resumed")
    first = losses(before, stop)
    before.save(1.5)
    before.writer.finish()
    after = make(*FOUR, out="resumed")
    position = claim(after.out, after.config, fresh=False, num_processes=1)
    assert position is not None
    after.load(position)
    assert first + losses(after, 10 - stop) == expected
    states = straight.module.state_dict(), after.module.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_budget_that_ends_early_still_rounds(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_recipe(str(recipe()), ["steps=1", *FOUR, "quantise_at=0.999"])
    stream = io.StringIO()
    assert loop.train(config, tmp_path / "run", fresh=False, stream=stream) == 0
    assert "weights are rounded after step 1\n" in stream.getvalue()
    loaded = checkpoint.load(tmp_path / "run").model
    grids = [p.linear for p in projections(loaded)]
    assert all(isinstance(g, RoundedLinear) and g.begun for g in grids)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("quantise_at=0", "quantise_at: 0.0 given; allowed: 0 < at < 1"),
        ("model.weights.bits=3", "model.weights.bits: '3' given; allowed: 8, 4"),
        ("model.weights={bits_of: {head: 5}}", "model.weights.bits_of.head: '5' given"),
    ],
)
def test_bad_values_are_named(recipe: Callable[..., Path], assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe()), [assignment])
    assert message in str(caught.value)
