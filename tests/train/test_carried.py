from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spikelm.errors import CheckpointError
from spikelm_train.carried import CarriedState
from spikelm_train.data import make_batch
from spikelm_train.trainer import Trainer

Make = Callable[..., Trainer]
CARRIED = ("data.sampling=carried", "data.sequence_length=16", "grad_accum_steps=2")


def test_windows_see_what_an_unbroken_text_shows(make: Make) -> None:
    trainer = make(*CARRIED)
    model, carried = trainer.module.eval().double(), trainer.carried
    assert carried is not None
    rows, eos_id = range(8), trainer.corpus.tokenizer.eos_id
    windows, found = [], []
    with torch.no_grad():
        for step in range(6):
            windows.append(make_batch(trainer.sampler.rows(step, 0, 8), eos_id))
            logits, state = model(windows[-1].inputs, carried.take(rows), reset=windows[-1].reset)
            carried.put(rows, state)
            found.append(logits)
        inputs = torch.cat([window.inputs for window in windows], 1)
        assert (inputs == eos_id).any(), "documents begin within the windows"
        whole, _ = model(inputs, reset=inputs == eos_id)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-9)
    alone, _ = model(windows[-1].inputs, reset=windows[-1].reset)
    assert not torch.allclose(alone, found[-1])


def test_gradients_end_at_the_window(make: Make) -> None:
    trainer = make(*CARRIED)
    carried = trainer.carried
    assert carried is not None
    trainer.advance(0.0)
    state = carried.take(range(4, 8))
    assert state is not None
    assert state.batch_size == 4
    tensors = [state.position, *(t for layer in state.layers for t in layer.values())]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert carried.take(range(8, 12)) is None
    trainer.advance(0.0)


def test_states_go_to_other_processes_and_forwards(make: Make) -> None:
    trainer = make(*CARRIED)
    model = trainer.module
    tokens = torch.randint(0, 256, (4, 8))
    _, state = model(tokens)
    parts = [CarriedState(torch.device("cpu")) for _ in range(2)]
    for index, part in enumerate(parts):
        part.put(range(2 * index, 2 * index + 2), state.take([2 * index, 2 * index + 1]))
    everything = [row for part in parts for row in part.state_dict()["rows"]]
    # What either of two processes saves, with a gather that joins both.
    gathered = CarriedState(torch.device("cpu"), lambda mine: everything)
    gathered.put(range(2), state.take([0, 1]))
    one = CarriedState(torch.device("cpu"))
    assert one.take(range(4)) is None
    one.load_state_dict(gathered.state_dict())
    again = CarriedState(torch.device("cpu"))
    again.load_state_dict(one.state_dict())
    taken = again.take(range(1, 4))
    assert taken is not None
    assert torch.equal(taken.position, state.position[1:])
    for mine, theirs in zip(taken.layers, state.layers, strict=True):
        assert all(torch.equal(mine[name], theirs[name][1:]) for name in theirs)
    with pytest.raises(CheckpointError, match="no state for row 4 of a step"):
        one.take(range(2, 6))
