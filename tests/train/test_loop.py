from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikelm.errors import CheckpointError, ConfigError, SpikelmError
from spikelm_train import loop, parallel
from spikelm_train.checkpoints import find, kept_steps
from spikelm_train.config import TrainConfig, load_recipe
from spikelm_train.data import make_batch
from spikelm_train.parallel import make_accelerator, resolve_precision
from spikelm_train.report import read_metrics
from spikelm_train.resume import claim
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]

SIGNED = ("model.neurons.ffn_hidden={kind: integer, dead_zone: 0.1}",)


def train_steps(trainer: Trainer, count: int) -> list[float]:
    records = [trainer.advance(0.0) for _ in range(count)]
    return [record["loss"] for record in records if record is not None]


def assert_same(a: Trainer, b: Trainer) -> None:
    for (name, left), right in zip(
        a.module.state_dict().items(), b.module.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "settings",
    [
        ("data.sampling=random_window",),
        ("data.sampling=packed", "grad_accum_steps=2", "l1_hidden=1e-3"),
        ("optim.name=spam", "optim.spam_reset_every=4", "optim.spam_density=0.5"),
        ("model.tie_embeddings=true", "optim.schedule=wsd"),
        ("optim.name=muon", "optim.neuron_lr=0.5", "model.neurons.ffn_hidden.learn=true"),
        ("ema=0.9", "z_loss=1e-3", "loss_chunk=48", "activation_checkpointing=layers"),
        ("data.sampling=carried", "grad_accum_steps=2"),
    ],
)
def test_resume_is_exact(make: Make, settings: tuple[str, ...]) -> None:
    straight = make(*settings, out="straight")
    losses = train_steps(straight, 8)
    before = make(*settings, out="resumed")
    first = train_steps(before, 3)
    before.save(1.5)
    before.writer.finish()
    after = make(*settings, out="resumed")
    position = claim(after.out, after.config, fresh=False, num_processes=1)
    assert position is not None
    after.load(position)
    assert first + train_steps(after, 5) == losses
    assert_same(straight, after)
    left, right = straight.parallel.state()["optimizer"], after.parallel.state()["optimizer"]
    torch.testing.assert_close(left["state"], right["state"], rtol=0, atol=0)
    assert left["param_groups"] == right["param_groups"]
    assert straight.validate() == after.validate()


def test_accumulation_equals_a_large_batch(make: Make) -> None:
    large = make("micro_batch_size=8", "l1_hidden=1e-3")
    small = make("micro_batch_size=2", "grad_accum_steps=4", "l1_hidden=1e-3")
    np.testing.assert_allclose(train_steps(large, 4), train_steps(small, 4), rtol=1e-5)
    torch.testing.assert_close(
        large.module.state_dict(), small.module.state_dict(), rtol=1e-3, atol=1e-4
    )


def test_overfits_one_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("steps=150", "optim.lr=2e-2", "optim.schedule=constant")
    rows = trainer.sampler.rows(0, 0, 4)
    monkeypatch.setattr(trainer.sampler, "rows", lambda step, start, stop: rows)
    losses = train_steps(trainer, 150)
    assert losses[0] > 5
    assert losses[-1] < 0.3


def test_warm_up_and_decay_reach_the_optimizer(make: Make) -> None:
    trainer = make("optim.warmup_fraction=0.5", "optim.lr=1.0", "optim.schedule=constant")
    rates = []
    for _ in range(10):
        trainer.advance(0.0)
        rates.append(trainer.parallel.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1, 1])


def test_neurons_learn_at_their_factor_of_the_rate(make: Make) -> None:
    trainer = make("model.neurons.ffn_hidden.learn=true", "optim.neuron_lr=0.1")
    trainer.advance(0.0)
    rates = [group["lr"] for group in trainer.parallel.optimizer.param_groups]
    assert rates[:2] == [rates[0]] * 2
    assert rates[2] == pytest.approx(0.1 * rates[0])


def test_time_budget_drives_the_schedule(make: Make) -> None:
    trainer = make("steps=1000000", "max_seconds=10")
    record = trainer.advance(7.5)
    assert record is not None
    assert record["progress"] == 0.75
    assert record["lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 0.75)))


def test_silence_is_steered_while_training(make: Make) -> None:
    trainer = make("silence_rate=1.0", "log_every=60", "steps=1000")
    record = None
    for _ in range(60):
        record = trainer.advance(0.0)
    assert record is not None
    assert record["silent"]["ffn_hidden"] == pytest.approx(0.9, abs=0.05)
    assert record["silent"]["mixer_input"] == pytest.approx(0.5, abs=0.05)
    assert record["silent"]["mixer_output"] < 0.1
    assert 0 < record["silent_fraction"] < 1
    assert record["dead"].keys() == {"mixer_input", "ffn_hidden"}
    assert record["saturated"] == {}


def test_hidden_vectors_of_gated_layers_are_penalised(make: Make) -> None:
    def silent(weight: float) -> float:
        trainer = make(f"l1_hidden={weight}", "steps=30", "model.ffn.kind=reglu", *SIGNED)
        records = [trainer.advance(0.0) for _ in range(30)]
        assert records[-1] is not None
        return float(records[-1]["silent"]["ffn_hidden"])

    assert silent(0.1) > silent(0.0) + 0.1


def test_l1_makes_hidden_vectors_smaller(make: Make) -> None:
    def hidden(weight: float) -> float:
        trainer = make(f"l1_hidden={weight}", "steps=30", "model.neurons={}")
        train_steps(trainer, 30)
        trainer.silence.penalise = True
        batch = make_batch(trainer.sampler.rows(99, 0, 4), trainer.corpus.tokenizer.eos_id)
        trainer.module(batch.inputs, reset=batch.reset, probe=trainer.silence)
        return trainer.silence.take_l1().item()

    assert hidden(0.1) < 0.5 * hidden(0.0)


def test_non_finite_loss_stops_before_the_update(make: Make) -> None:
    trainer = make()
    train_steps(trainer, 2)
    trainer.save(0.0)
    trainer.writer.finish()
    with torch.no_grad():
        trainer.module.norm.weight[0] = math.nan
    before = trainer.module.embedding.weight.clone()
    with pytest.raises(SpikelmError, match=r"step 3: loss nan.*checkpoint of step 2.*optim.lr"):
        trainer.advance(0.0)
    assert torch.equal(trainer.module.embedding.weight, before)
    assert trainer.step == 2
    assert find(trainer.out) is not None


@pytest.mark.parametrize("name", ["state.pt", "rank-0.pt"])
@pytest.mark.parametrize("size", [0, 100, 1000])
def test_damaged_checkpoint_is_one_clear_line(make: Make, name: str, size: int) -> None:
    trainer = make()
    trainer.advance(0.0)
    trainer.save(0.0)
    trainer.writer.finish()
    found = find(trainer.out)
    assert found is not None
    damaged = found / name
    damaged.write_bytes(damaged.read_bytes()[:size])
    position = claim(trainer.out, trainer.config, fresh=False, num_processes=1)
    assert position is not None
    with pytest.raises(CheckpointError, match="damaged") as caught:
        make().load(position)
    assert "\n" not in str(caught.value)


def test_resolve_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bf16 in (False, True):
        flags = {"avx512_bf16": bf16, "amx": False}
        monkeypatch.setattr(parallel, "cpu_flags", lambda flags=flags: flags)
        assert resolve_precision("auto") == ("bf16" if bf16 else "fp32")
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("fp32") == "fp32"


def test_bf16_trains(make: Make) -> None:
    trainer = make("precision=bf16")
    assert trainer.accelerator.mixed_precision == "bf16"
    losses = train_steps(trainer, 10)
    assert losses[-1] < losses[0] - 0.5
    assert trainer.module.head.linear.weight.dtype == torch.float32


def test_ranks_that_do_not_see_each_other_are_refused(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alone:
        num_processes = 1

        def __init__(self, **settings: Any) -> None: ...

    monkeypatch.setattr("accelerate.accelerator.Accelerator", Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched but accelerate sees 1"):
        make_accelerator(load_recipe(str(recipe())))


def test_time_budget_ends_the_run(recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_recipe(str(recipe()), ["steps=1000000", "max_seconds=0.5"])
    stream = io.StringIO()
    assert loop.train(config, tmp_path / "run", fresh=False, stream=stream) == 0
    last = [r for r in read_metrics(tmp_path / "run") if "lr" in r][-1]
    assert last["seconds"] < 0.5
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert stream.getvalue().rstrip().endswith(f"the model is in {tmp_path / 'run'}")


def test_train_continues_after_an_interruption(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: TrainConfig = load_recipe(str(recipe()), ["steps=6"])
    whole, parts = io.StringIO(), io.StringIO()
    assert loop.train(config, tmp_path / "whole", fresh=False, stream=whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "agree", lambda self, signum: (0.0, 2 if self.step == 3 else 0))
        assert loop.train(config, tmp_path / "parts", fresh=False, stream=parts) == 130
    assert "stopped after step 3" in parts.getvalue()
    assert loop.train(config, tmp_path / "parts", fresh=False, stream=parts) == 0
    assert "continuing after step 3" in parts.getvalue()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_an_earlier_checkpoint_begins_another_way(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_recipe(str(recipe(save_every=2, keep_last=9)), ["steps=6"])
    out = tmp_path / "run"
    assert loop.train(config, out, fresh=False, stream=io.StringIO()) == 0
    expected = (out / "model.safetensors").read_bytes()
    left = out / "checkpoints" / "step-00000005.tmp"
    left.mkdir()
    seen: list[list[int]] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            seen.append(kept_steps(out))
            return super().write(text)

    stream = Stream()
    assert loop.train(config, out, fresh=False, stream=stream, step=2) == 0
    assert "continuing after step 2" in stream.getvalue()
    assert seen[0] == [2], "the later ones belong to another way"
    assert (out / "model.safetensors").read_bytes() == expected
    assert kept_steps(out) == [2, 4, 6]
    assert not left.exists()
