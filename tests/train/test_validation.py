from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from spikelm_train.objective import cross_entropy
from spikelm_train.trainer import Trainer
from spikelm_train.validation import validation_sums

Make = Callable[..., Trainer]


def test_validate_of_a_uniform_model(make: Make) -> None:
    trainer = make()
    torch.nn.init.zeros_(trainer.module.head.linear.weight)
    loss, bits = trainer.validate()
    # One byte per token, and separators are not counted.
    assert loss == pytest.approx(math.log(257))
    assert bits == pytest.approx(math.log2(257))


def test_validate_divides_by_the_bytes_of_its_targets(make: Make) -> None:
    trainer = make("tokenizer.kind=bpe", "tokenizer.vocab_size=280", "eval_tokens=100000")
    torch.nn.init.zeros_(trainer.module.head.linear.weight)
    _, bits = trainer.validate()
    tokenizer, tokens = trainer.corpus.tokenizer, trainer.corpus.validation.tokens
    length = trainer.config.data.sequence_length
    targets = [int(t) for t in tokens[1 : (len(tokens) - 1) // length * length + 1]]
    text = [t for t in targets if t != tokenizer.eos_id]
    expected = len(text) * math.log2(280) / len(tokenizer.decode_bytes(text))
    assert bits == pytest.approx(expected)


def test_sample_continues_the_prompt_and_leaves_training_alone(make: Make) -> None:
    settings = ("sample_prompt=The cat", "sample_tokens=8")
    trainer, other = make(*settings, out="a"), make(*settings, out="b")
    state = torch.get_rng_state()
    text = trainer.sample()
    assert text.startswith("The cat")
    assert text == trainer.sample()
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(3):
        assert trainer.advance(0.0) == other.advance(0.0)


def test_ranks_share_the_validation_text(make: Make) -> None:
    trainer = make("micro_batch_size=2")
    parts = [trainer.module, trainer.corpus, trainer.config, trainer.accelerator.device]
    whole = validation_sums(*parts, 0, 1)
    shares = [validation_sums(*parts, rank, 3) for rank in range(3)]
    assert all(share[1] > 0 for share in shares)
    torch.testing.assert_close(torch.stack(shares).sum(0), whole, rtol=1e-6, atol=0)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    nats = cross_entropy(logits, torch.tensor([[1, 0]]))
    assert nats.tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
