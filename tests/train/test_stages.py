"""spikelm_train.stages"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.errors import ConfigError
from spikelm.neurons import Neuron, Spikes
from spikelm_train import loop
from spikelm_train import trainer as trainer_module
from spikelm_train.config import load_recipe, staged
from spikelm_train.resume import claim
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]

TWO = (
    "stages=[{at: 0.4, tensor_class: ffn_hidden, max_count: 3, k: 2},"
    " {at: 0.7, tensor_class: ffn_hidden, max_count: 1},"
    " {at: 0.7, tensor_class: mixer_input, target_silence: 0.8}]"
)
LEARNED = "model.neurons.ffn_hidden.learn=true"


def losses(trainer: Trainer, count: int) -> list[float]:
    records = [trainer.advance(0.0) for _ in range(count)]
    return [record["loss"] for record in records if record is not None]


def hidden(trainer: Trainer) -> list[Neuron]:
    return [n for n in trainer.module.neurons() if n.tensor_class == "ffn_hidden"]


def largest_count(trainer: Trainer) -> int:
    found = 0

    def probe(neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        nonlocal found
        if neuron.tensor_class == "ffn_hidden" and spikes.counts is not None:
            found = max(found, int(spikes.counts.abs().max()))

    with torch.no_grad():
        trainer.module(torch.arange(32)[None], probe=probe)
    return found


def test_stages_begin_at_their_share_of_the_run(make: Make) -> None:
    trainer = make(TWO)
    seen = []
    for _ in range(10):
        trainer.advance(0.0)
        neuron = hidden(trainer)[0]
        seen.append((neuron.config.max_count, neuron.k.item(), largest_count(trainer) <= 3))
    assert seen == [(None, 3.0, False)] * 4 + [(3, 2.0, True)] * 3 + [(1, 2.0, True)] * 3
    assert largest_count(trainer) == 1
    assert trainer.module.config == staged(trainer.config.model, trainer.config.stages)
    assert all(n.config is trainer.module.config.neurons.ffn_hidden for n in hidden(trainer))


def test_a_time_budget_moves_the_stages(make: Make) -> None:
    trainer = make(TWO, "steps=1000000", "max_seconds=10")
    for seconds, begun in ((0.0, 0), (3.9, 0), (4.0, 1), (6.9, 1), (8.0, 3)):
        trainer.advance(seconds)
        assert trainer.stages.begun == begun


def test_silence_is_steered_to_the_stages_target(make: Make) -> None:
    stage = "stages=[{at: 0.1, tensor_class: mixer_input, target_silence: 0.8}]"
    trainer = make(stage, "silence_rate=1.0", "log_every=60", "steps=60")
    record = None
    for _ in range(60):
        record = trainer.advance(0.0)
    assert record is not None
    assert record["silent"]["mixer_input"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_resume_is_exact_in_every_stage(make: Make, stop: int) -> None:
    straight = make(TWO, LEARNED, out="straight")
    expected = losses(straight, 10)
    before = make(TWO, LEARNED, out="resumed")
    first = losses(before, stop)
    before.save(1.5)
    before.writer.finish()
    after = make(TWO, LEARNED, out="resumed")
    position = claim(after.out, after.config, fresh=False, num_processes=1)
    assert position is not None
    after.load(position)
    assert after.module.config == before.module.config
    assert first + losses(after, 10 - stop) == expected
    assert hidden(after)[0].k.item() not in (2.0, 3.0), "k is learned, not set again"
    states = straight.module.state_dict(), after.module.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_validation_and_samples_are_of_the_current_stage(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(TWO, "sample_tokens=4")
    before = trainer.validate()
    trainer.stages.enter(0.5)
    assert trainer.validate() != before
    used = []

    def sample(module: object, tokenizer: object, config: object, out: Path) -> str:
        used.append(config)
        return real(module, tokenizer, config, out)  # type: ignore[arg-type]

    real = trainer_module.sample_text
    monkeypatch.setattr(trainer_module, "sample_text", sample)
    assert trainer.sample()
    assert used[0].model.neurons.ffn_hidden.max_count == 3  # type: ignore[attr-defined]


def test_the_model_says_what_it_ends_with(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(str(recipe()), ["steps=6", TWO])
    whole, parts = io.StringIO(), io.StringIO()
    assert loop.train(config, tmp_path / "whole", fresh=False, stream=whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "agree", lambda self, signum: (0.0, 2 if self.step == 3 else 0))
        assert loop.train(config, tmp_path / "parts", fresh=False, stream=parts) == 130
    assert loop.train(config, tmp_path / "parts", fresh=False, stream=parts) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert "stage after step 2: ffn_hidden k 2, max_count 3" in whole.getvalue()
    assert parts.getvalue().count("stage after step") == 3
    neurons = json.loads((tmp_path / "whole" / "config.json").read_text())["neurons"]
    assert (neurons["ffn_hidden"]["k"], neurons["ffn_hidden"]["max_count"]) == (2.0, 1)
    assert neurons["mixer_input"]["target_silence"] == 0.8
    model = checkpoint.load(tmp_path / "whole").model
    found = [n.k.item() for n in model.neurons() if n.tensor_class == "ffn_hidden"]
    assert found == [2.0, 2.0]


def test_a_budget_that_ends_early_still_ends_with_the_last_stage(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    late = "stages=[{at: 0.999, tensor_class: ffn_hidden, max_count: 1}]"
    config = load_recipe(str(recipe()), ["steps=1", late])
    assert loop.train(config, tmp_path / "run", fresh=False, stream=io.StringIO()) == 0
    assert checkpoint.load(tmp_path / "run").model.config.neurons.ffn_hidden.max_count == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{at: 0.4, tensor_class: ffn_hiden, k: 1}]", "stages[0].tensor_class: 'ffn_hiden'"),
        ("[{at: 0.4, tensor_class: ffn_hidden}]", "stages[0]: the stage changes nothing"),
        ("[{at: 0.4, tensor_class: ffn_hidden, tau: 2}]", "unknown key 'stages[0].tau'"),
        ("[{tensor_class: ffn_hidden, k: 1}]", "missing key 'stages[0].at'"),
        ("[{at: 0, tensor_class: ffn_hidden, k: 1}]", "stages[0].at: 0.0 given"),
        ("[{at: 1, tensor_class: ffn_hidden, k: 1}]", "stages[0].at: 1.0 given"),
        ("[{at: 0.4, tensor_class: ffn_input, k: 1}]", "ffn_input at 0.4: its neuron is off"),
        ("[{at: 0.4, tensor_class: ffn_hidden, k: 0}]", "ffn_hidden at 0.4: k: 0.0 given"),
        ("[{at: 0.4, tensor_class: ffn_hidden, max_count: 200}]", "max_count: 200 given"),
        ("[{at: 0.4, tensor_class: mixer_output, target_silence: 0.5}]", "mixer_output.dead_zone"),
        ("[{at: 0.4, tensor_class: head_input, k: 1}]", "head_input at 0.4: a neuron of fixed"),
        (
            "[{at: 0.5, tensor_class: ffn_hidden, k: 2},"
            " {at: 0.4, tensor_class: ffn_hidden, k: 1}]",
            "stages: [0.5, 0.4] given; allowed: at in rising order",
        ),
    ],
)
def test_bad_stage_is_named(recipe: Callable[..., Path], stages: str, message: str) -> None:
    neurons = ["mixer_output={kind: integer}", "head_input={kind: integer, scale: fixed}"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe()), [f"stages={stages}", *(f"model.neurons.{n}" for n in neurons)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


RULES = (
    "model.neurons.mixer_input={kind: integer, dead_zone: 0.5, target_silence: 0.6,"
    " target_ramp: 0.5, learn: dead_zone, bypass: 0.6}",
    "model.neurons.mixer_output={kind: lif, bypass: 0.6}",
    "model.neurons.ffn_hidden.dead_zone=8",
    "optim.neuron_lr=3",
    "revive_after=2",
)


def test_a_bypass_closes_over_its_share_of_the_run(make: Make) -> None:
    trainer = make(*RULES)
    shares: dict[str, list[float]] = {}
    for _ in range(10):
        trainer.advance(0.0)
        for neuron in trainer.module.neurons():
            shares.setdefault(neuron.tensor_class, []).append(neuron.spiking)
    opening = [(i + 0.5) / 6 for i in range(6)]
    for name in ("mixer_input", "mixer_output"):
        assert shares[name][:12:2] == pytest.approx(opening)
        assert shares[name][12:] == [1.0] * 8
    assert set(shares["ffn_hidden"]) == {1.0}


def test_validation_and_saved_models_know_no_bypass(make: Make, tmp_path: Path) -> None:
    trainer = make(*RULES)
    trainer.advance(0.0)
    assert any(neuron.spiking < 1 for neuron in trainer.module.neurons())
    found = trainer.validate()
    assert trainer.module.training
    checkpoint.save(tmp_path / "model", trainer.module, trainer.corpus.tokenizer)
    for neuron in trainer.module.neurons():
        neuron.spiking = 1.0
    assert trainer.validate() == found
    trainer.parallel.evaluated = checkpoint.load(tmp_path / "model").model.eval()
    assert trainer.validate() == found


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resume_is_exact_with_every_rule(make: Make, stop: int) -> None:
    straight = make(*RULES, "log_every=2", out="straight")
    records = [trainer_record(straight) for _ in range(10)]
    before = make(*RULES, "log_every=2", out="resumed")
    first = [trainer_record(before) for _ in range(stop)]
    before.save(1.5)
    before.writer.finish()
    after = make(*RULES, "log_every=2", out="resumed")
    position = claim(after.out, after.config, fresh=False, num_processes=1)
    assert position is not None
    after.load(position)
    assert first + [trainer_record(after) for _ in range(10 - stop)] == records
    states = straight.module.state_dict(), after.module.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert after.silence.revived > 0


def trainer_record(trainer: Trainer) -> dict[str, object] | None:
    record = trainer.advance(0.0)
    assert record is None or record["dead"].keys() == {
        "mixer_input",
        "mixer_output",
        "ffn_hidden",
    }
    return record
