from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spikelm_train.objective import Objective, cross_entropy
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]


@pytest.mark.parametrize("chunk", [0, 3])
def test_z_loss_is_the_mean_square_of_log_z(chunk: int) -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 5))
    objective = Objective(0.01, chunk)
    output = logits
    if chunk:
        parts = [slice(0, 2), slice(2, 5)]
        read = objective.options(targets)["read"]
        output = torch.cat([read(logits[:, part], part) for part in parts], 1)
    loss, terms = objective.terms(output, targets)
    expected = 0.01 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, cross_entropy(logits, targets).mean())
    torch.testing.assert_close(sum(terms), expected)
    torch.testing.assert_close(objective.measured()["z_loss"], expected.detach())
    total = loss + terms[0]
    (grad,) = torch.autograd.grad(total, logits)
    loss = cross_entropy(logits, targets).mean() + expected
    torch.testing.assert_close(grad, torch.autograd.grad(loss, logits)[0])


def test_z_loss_is_reported_apart_and_keeps_the_normaliser_small(make: Make) -> None:
    last = {}
    for weight in (0.0, 0.1):
        trainer = make(f"z_loss={weight}", "steps=30", "grad_accum_steps=2")
        first = trainer.advance(0.0)
        records = [trainer.advance(0.0) for _ in range(29)]
        assert first is not None
        assert records[-1] is not None
        assert ("z_loss" in first) == (weight > 0)
        if weight:  # the first logits have a mean square of some 1: log Z = log 257 + 1 / 2
            assert first["z_loss"] == pytest.approx(0.1 * 6.0**2, rel=0.1)
        logits, _ = trainer.module(torch.arange(64)[None])
        last[weight] = logits.logsumexp(-1).square().mean().item()
    assert last[0.1] < 0.5 * last[0.0]


def test_a_run_in_chunks_is_the_run(make: Make) -> None:
    whole, chunked = make(), make("loss_chunk=20", "activation_checkpointing=layers")
    for _ in range(3):
        a, b = whole.advance(0.0), chunked.advance(0.0)
        assert a is not None
        assert b is not None
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
        assert b["silent"] == pytest.approx(a["silent"], abs=1e-4)
    assert chunked.validate() == pytest.approx(whole.validate(), rel=1e-4)
    assert chunked.module.head.linear.weight.shape[0] == 257


def test_layers_computed_again_give_the_same_bits(make: Make) -> None:
    settings = ("l1_hidden=1e-3", "precision=bf16")
    plain, again = make(*settings), make(*settings, "activation_checkpointing=layers")
    assert again.module.recompute_layers
    for _ in range(4):
        a, b = plain.advance(0.0), again.advance(0.0)
        assert a == b
    for name, tensor in plain.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name
