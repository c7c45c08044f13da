from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spikelm import checkpoint
from spikelm_train import checkpoints
from spikelm_train.average import Average
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]


def test_average_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, 0.5, torch.device("cpu"))
    expected = None
    for n, value in enumerate([1.0, 3.0, -2.0, 4.0, 0.0, 7.0, 7.0, 7.0, 9.0, 2.0]):
        model.weight.data.fill_(value)
        average.update()
        # (1 + n) / (10 + n) reaches 0.5 at n = 8.
        d = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else d * expected + (1 - d) * value
        with average.applied():
            assert model.weight.item() == pytest.approx(expected, rel=1e-6)
        assert model.weight.item() == value
    average.restart()
    with average.applied():
        assert model.weight.item() == 2.0


def test_without_decay_nothing_is_averaged() -> None:
    model = torch.nn.Linear(1, 1)
    average = Average(model, None, torch.device("cpu"))
    average.update()
    average.restart()
    weight = model.weight.data
    with average.applied():
        assert model.weight.data is weight or torch.equal(model.weight.data, weight)
    assert average.averaged is None


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_averaged_weights_are_validated_and_written(make: Make, tied: str) -> None:
    settings = (f"model.tie_embeddings={tied}", "steps=12")
    plain, averaged = make(*settings, out="plain"), make(*settings, "ema=0.9", out="averaged")
    means: dict[str, torch.Tensor] = {}
    for n in range(12):
        a, b = plain.advance(0.0), averaged.advance(0.0)
        assert a == b  # training itself is the same
        d = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        for name, tensor in plain.module.state_dict().items():
            means[name] = d * means.get(name, tensor) + (1 - d) * tensor
    assert averaged.validate() != plain.validate()
    averaged.export(averaged.out)
    averaged.save(0.0)
    averaged.writer.finish()
    written = checkpoint.load(averaged.out).model
    for name, tensor in written.state_dict().items():
        torch.testing.assert_close(tensor, means[name], rtol=1e-4, atol=1e-6)
    assert (written.head.linear.weight is written.embedding.weight) == (tied == "true")
    # The checkpoint to continue from has both.
    for name, tensor in plain.module.state_dict().items():
        assert torch.equal(averaged.module.state_dict()[name], tensor), name
    found = checkpoints.find(averaged.out)
    assert found is not None
    assert "average" in checkpoints.load(found, 0)[0]


def test_the_average_begins_anew_with_a_stage(make: Make) -> None:
    stage = "stages=[{at: 0.5, tensor_class: mixer_input, k: 1.0}]"
    trainer = make(stage, "ema=0.99", "steps=4")
    for _ in range(3):
        trainer.advance(0.0)
    with trainer.average.applied():
        k = {float(n.k) for n in trainer.module.neurons() if n.tensor_class == "mixer_input"}
    assert k == {1.0}
