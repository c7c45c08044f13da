"""Low-rank adaptation: what is trained, and that the merged model is the adapted one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.errors import ConfigError, MissingExtraError
from spikelm_train import cost
from spikelm_train.cli import main
from spikelm_train.config import load_recipe
from spikelm_train.export import export
from spikelm_train.resume import claim
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]
Recipe = Callable[..., Path]

pytest.importorskip("peft")

LORA = "lora={rank: 4, alpha: 8, targets: [layers.*, head]}"


@pytest.fixture
def base(make: Make, tmp_path: Path) -> Path:
    """A model after ten steps."""
    trainer = make(out="first")
    for _ in range(10):
        trainer.advance(0.0)
    trainer.export(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def stage(recipe: Recipe) -> Path:
    return recipe(model=None, tokenizer=None)


@pytest.mark.parametrize("more", [(), ("activation_checkpointing=layers",)])
def test_only_the_small_matrices_are_trained(
    base: Path, stage: Path, make: Make, tmp_path: Path, more: tuple[str, ...]
) -> None:
    trainer = make(f"init={base}", LORA, *more, path=stage)
    before = trainer.validate()[0]
    started = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    for _ in range(20):
        trainer.advance(0.0)
    changed = {
        name
        for name, tensor in trainer.module.state_dict().items()
        if not torch.equal(tensor, started[name])
    }
    assert changed
    assert all(".lora_" in name for name in changed)
    after = trainer.validate()[0]
    assert after < before - 0.1
    trainer.export(tmp_path / "adapted")
    whole = checkpoint.load(tmp_path / "adapted").model
    tokens = torch.randint(0, 256, (2, 20))
    ours, _ = trainer.module.eval()(tokens)
    torch.testing.assert_close(whole(tokens)[0], ours, rtol=1e-3, atol=1e-4)
    assert whole.state_dict().keys() == checkpoint.load(base).model.state_dict().keys()


def test_the_adapter_fits_the_base_model_in_transformers(
    base: Path, stage: Path, make: Make, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import spikelm.hf  # noqa: F401  (registers the model)

    trainer = make(f"init={base}", "lora.rank=4", path=stage)
    for _ in range(5):
        trainer.advance(0.0)
    trainer.export(tmp_path / "adapted")
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.randint(0, 256, (1, 12))
    with torch.no_grad():
        unchanged = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapted" / "adapter"))
        found = adapted(tokens).logits
        wanted, _ = checkpoint.load(tmp_path / "adapted").model(tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (found - unchanged).abs().max() > 0.01


def test_resume_is_exact(base: Path, stage: Path, make: Make) -> None:
    settings = (f"init={base}", LORA)
    straight = make(*settings, out="straight", path=stage)
    losses = [record["loss"] for _ in range(6) if (record := straight.advance(0.0))]
    before = make(*settings, out="resumed", path=stage)
    first = [record["loss"] for _ in range(3) if (record := before.advance(0.0))]
    before.save(0.0)
    before.writer.finish()
    after = make(*settings, out="resumed", path=stage)
    position = claim(after.out, after.config, fresh=False, num_processes=1)
    assert position is not None
    after.load(position)
    rest = [record["loss"] for _ in range(3) if (record := after.advance(0.0))]
    assert first + rest == losses


def test_a_run_and_its_export(base: Path, stage: Path, tmp_path: Path) -> None:
    command = [str(stage), "--out", str(tmp_path / "run")]
    more = ["--set", f"init={base}", "--set", "lora.rank=2", "--set", "steps=4"]
    assert main([*command, *more]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert export(tmp_path / "run", tmp_path / "exported") == 4
    left, right = (
        checkpoint.load(tmp_path / name).model.state_dict() for name in ("run", "exported")
    )
    torch.testing.assert_close(left, right)
    assert main([*command, *more, "--set", "lora.rank=3", "--fresh"]) == 0


def test_memory_is_that_of_what_is_trained(base: Path, stage: Path) -> None:
    whole = load_recipe(str(stage), [f"init={base}"])
    adapted = load_recipe(str(stage), [f"init={base}", "lora.rank=1", "lora.targets=[head]"])
    extra = 4 * (32 + 257)
    weights = sum(p.nbytes for p in cost.meta_model(whole.model).parameters())
    assert cost.least_bytes(adapted) == weights + 4 * extra < cost.least_bytes(whole)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lora.targets=[layers.9.*]", "'layers.9.*' matches no projection; the names are such as"),
        ("lora.targets=[]", "at least one pattern"),
        ("lora.rank=-1", "rank: -1 given"),
        ("ema=0.9", "ema averages whole weights"),
        ("model.weights.bits=8", "rounded in training cannot be adapted"),
        ("init=null", "name its folder in init"),
    ],
)
def test_what_cannot_be_adapted(
    assignment: str, message: str, base: Path, recipe: Recipe, make: Make
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(f"init={base}", "lora.rank=2", assignment)


def test_a_tied_head_is_not_adapted(make: Make, tmp_path: Path) -> None:
    tied = make("model.tie_embeddings=true", out="tied")
    tied.export(tmp_path / "tied")
    with pytest.raises(ConfigError, match="the head is the embedding too"):
        make(f"init={tmp_path / 'tied'}", "model.tie_embeddings=true", LORA)


def test_without_peft(base: Path, stage: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"spikelm\[lora\]"):
        make(f"init={base}", LORA, path=stage)
