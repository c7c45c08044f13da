from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.errors import ConfigError, SpikelmError
from spikelm_train.checkpoints import find, kept_steps, read_position
from spikelm_train.config import GuardConfig, load_recipe
from spikelm_train.guard import WARMUP, Guard
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]


def broken(trainer: Trainer, *rows: Any, factor: float = math.nan) -> None:
    """The logits of these batches (of a step of data each) are multiplied by `factor`."""
    forward = trainer.parallel.model

    def model(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, state = forward(tokens, *args, **kwargs)
        bad = any(torch.equal(tokens, torch.tensor(r[:, :-1])) for r in rows)
        return output * factor if bad else output, state

    trainer.parallel.model = model  # type: ignore[misc]


def test_a_leap_is_many_deviations_above_the_mean() -> None:
    guard = Guard(GuardConfig(spike="skip", spike_deviations=4.0))
    generator = torch.Generator().manual_seed(0)
    for loss in (5 + 0.1 * torch.randn(WARMUP + 50, generator=generator)).tolist():
        assert not guard.leaps(loss)
        guard.watch(loss)
    assert not guard.leaps(5.3)
    assert guard.leaps(5.6)
    assert not guard.leaps(1.0)
    again = Guard(guard.config)
    assert not again.leaps(5.6), "it knows no deviation yet"
    again.load_state_dict(guard.state_dict())
    assert again.leaps(5.6)


def test_skipping_leaves_the_step_out(make: Make) -> None:
    trainer = make("guard.non_finite=skip", "guard.lower_lr=0.5")
    broken(trainer, trainer.sampler.rows(2, 0, 4))
    trainer.advance(0.0), trainer.advance(0.0)
    before = {n: t.clone() for n, t in trainer.module.state_dict().items()}
    assert trainer.advance(0.0) is None
    assert trainer.step == 3
    for name, tensor in trainer.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    record = trainer.advance(0.0)
    assert record is not None
    assert math.isfinite(record["loss"])
    assert record["lr"] < 0.5 * trainer.config.optim.lr


def test_rewinding_goes_past_the_data(make: Make) -> None:
    """Back at the checkpoint the run reads what comes behind the broken batch."""
    trainer = make("guard.non_finite=rewind", "keep_last=3", "guard.rewind_steps=2")
    after = trainer.sampler.rows(5, 0, 4)
    broken(trainer, trainer.sampler.rows(4, 0, 4))
    kept = {}
    for _ in range(4):
        trainer.advance(0.0)
        trainer.save(7.0)
        trainer.writer.finish()
        kept[trainer.step] = trainer.module.embedding.weight.clone()
    assert trainer.advance(0.0) is None
    # Step 5 broke; the newest checkpoint two steps before it is that of step 3.
    assert trainer.step == 3
    assert torch.equal(trainer.module.embedding.weight, kept[3])
    assert kept_steps(trainer.out) == [2, 3], "what lies ahead is not that run's any more"
    seen: list[Any] = []
    rows = trainer.sampler.rows
    trainer.sampler.rows = lambda *args: seen.append(rows(*args)) or rows(*args)  # type: ignore
    assert trainer.advance(0.0) is not None
    assert (seen[0] == after).all()
    again = make("guard.non_finite=rewind", "keep_last=3", "guard.rewind_steps=2")
    trainer.save(0.0)
    trainer.writer.finish()
    again.load(read_position(find(again.out) or Path()))
    assert again.guard.state_dict() == trainer.guard.state_dict()
    assert again.advance(0.0) == trainer.advance(0.0)


def test_a_leap_is_left_out_before_the_update(make: Make) -> None:
    trainer = make("guard.spike=skip", "steps=500")
    for loss in (6.0, 6.6) * 60:
        trainer.guard.watch(loss)
    broken(trainer, trainer.sampler.rows(1, 0, 4), factor=1000.0)
    trainer.advance(0.0)
    before = trainer.module.embedding.weight.clone()
    assert trainer.advance(0.0) is None
    assert torch.equal(trainer.module.embedding.weight, before)
    assert trainer.guard.interventions == 1
    assert trainer.advance(0.0) is not None


def test_it_stops_after_so_many_times(make: Make) -> None:
    trainer = make("guard.non_finite=skip", "guard.at_most=2")
    with torch.no_grad():
        trainer.module.norm.weight[0] = math.nan
    assert trainer.advance(0.0) is None
    assert trainer.advance(0.0) is None
    with pytest.raises(SpikelmError, match="step 3: loss nan"):
        trainer.advance(0.0)


def test_rewinding_without_a_checkpoint_stops(make: Make) -> None:
    trainer = make("guard.non_finite=rewind")
    broken(trainer, trainer.sampler.rows(0, 0, 4))
    with pytest.raises(SpikelmError, match="no checkpoint was written yet"):
        trainer.advance(0.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("guard.spike_deviations=0", "spike_deviations: 0"),
        ("guard.lower_lr=0", "lower_lr: 0"),
        ("guard.at_most=0", "at_most: 0"),
        ("guard.rewind_steps=0", "rewind_steps: 0"),
    ],
)
def test_bad_input(recipe: Callable[..., Path], setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe()), [setting])
