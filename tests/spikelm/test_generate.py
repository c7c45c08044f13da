from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.errors import BackendError
from spikelm.generate import Engine, Generation, prompt_ids, run, stream_text
from spikelm.sampling import SamplingParams
from spikelm.state import State

PROMPTS = ["Hello", "A longer prompt, about nothing in particular. " * 3, "x"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module", params=["float_folder", "coded_folder"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(checkpoint.load(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def coded(coded_folder: Path) -> Engine:
    return Engine(checkpoint.load(coded_folder))


def generated(engine: Engine, prompt: str, params: SamplingParams = GREEDY) -> list[int]:
    chunks = stream_text(engine, prompt_ids(engine.tokenizer, prompt), params)
    return [token for chunk in chunks for token in chunk.token_ids]


def test_generation_is_prefill_then_steps(engine: Engine) -> None:
    ids = prompt_ids(engine.tokenizer, PROMPTS[1])
    expected = []
    with torch.inference_mode():
        logits, state = engine.model(torch.tensor([ids]))
        for _ in range(24):
            expected.append(int(logits[0, -1].argmax()))
            logits, state = engine.model(torch.tensor([[expected[-1]]]), state)
    assert generated(engine, PROMPTS[1]) == expected


def test_a_batch_gives_each_row_what_it_gets_alone(coded: Engine) -> None:
    """Bit for bit: integer products are exact and float sums stay within a row."""
    alone, states = [], []
    for prompt in PROMPTS:
        logits, state = coded.prefill(prompt_ids(coded.tokenizer, prompt))
        alone.append(generated(coded, prompt))
        states.append(state)
    state = State.merge(states)
    tokens = torch.tensor([row[0] for row in alone])
    for step in range(1, 24):
        logits, state = coded.step(tokens, state)
        single, states[0] = coded.step(tokens[:1], states[0])
        assert torch.equal(logits[:1], single)
        tokens = logits.argmax(-1)
        assert tokens.tolist() == [row[step] for row in alone]


def test_many_rows_cross_to_the_dense_product(coded: Engine) -> None:
    """Batches beyond the gather limit run as one integer GEMM with the same results."""
    logits, state = coded.prefill(prompt_ids(coded.tokenizer, "Hello"))
    token = logits.argmax(-1)
    single, _ = coded.step(token, state)
    many, _ = coded.step(token.repeat(20), state.take([0] * 20))
    assert torch.equal(many, single.expand(20, -1))


@pytest.mark.parametrize("backend", ["embedding_bag_float", "matmul"])
def test_every_backend_gives_the_same_logits(
    coded: Engine, coded_folder: Path, backend: str
) -> None:
    other = Engine(checkpoint.load(coded_folder, backend=backend))
    ids = prompt_ids(coded.tokenizer, PROMPTS[1])
    (a, s), (b, t) = coded.prefill(ids), other.prefill(ids)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert torch.equal(coded.step(torch.tensor([65]), s)[0], other.step(torch.tensor([65]), t)[0])


def test_long_prompts_run_in_pieces(engine: Engine) -> None:
    ids = torch.randint(0, 256, (1, 2500), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = engine.model
        pieces, state = run(model, ids, None, reset_id=256, last_only=False)
        assert pieces.shape == (1, 2500, 257)
        last, again = run(model, ids, None, reset_id=256)
        whole, _ = model(ids)
    torch.testing.assert_close(last[:, 0], pieces[:, -1])
    assert state.position.item() == again.position.item() == 2500
    # Rounding may flip a spike and change what follows; most tokens must agree.
    agree = (pieces - whole).abs().amax(-1) < 1e-3
    assert agree[:, :1024].all()
    assert agree.float().mean() > 0.9


def test_the_separator_begins_a_document(engine: Engine) -> None:
    eos = engine.tokenizer.eos_id
    logits, state = engine.prefill([65, 66, eos, 67, 68])
    alone, fresh = engine.prefill([eos, 67, 68])
    torch.testing.assert_close(logits, alone)
    assert state.position.item() == fresh.position.item() == 3


def test_stop_strings_never_leak(engine: Engine) -> None:
    ids = prompt_ids(engine.tokenizer, "Hello")
    full = "".join(chunk.text for chunk in stream_text(engine, ids, GREEDY))
    stop = full[5:9]
    chunks = list(stream_text(engine, ids, GREEDY, [stop, "never there"]))
    assert "".join(chunk.text for chunk in chunks) == full[: full.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_seeds_decide_sampled_text(engine: Engine) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(seed=seed, max_tokens=24)

    assert generated(engine, "a", params(1)) == generated(engine, "a", params(1))
    assert generated(engine, "a", params(1)) != generated(engine, "a", params(2))


def test_the_length_limit_is_kept(engine: Engine) -> None:
    chunks = list(stream_text(engine, [], SamplingParams(temperature=0.0, max_tokens=3)))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 3
    assert chunks[-1].finish_reason == "length"


def test_a_conversation_can_go_on_from_its_state(coded: Engine) -> None:
    """The state after a generation, plus its pending token, is that of the whole text."""
    first = Generation(coded, prompt_ids(coded.tokenizer, "Hello"), GREEDY)
    tokens = [token for chunk in first for token in chunk.token_ids]
    assert first.pending == tokens[-1]
    more = coded.tokenizer.encode(" and then")
    logits, _ = coded.prefill([first.pending, *more], first.state)
    whole, _ = coded.prefill([*first.prompt, *tokens, *more])
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)


def test_silence_is_counted_while_decoding(coded_folder: Path) -> None:
    engine = Engine(checkpoint.load(coded_folder))
    assert engine.silent_fraction is None
    generated(engine, "Hello")
    assert engine.silent_fraction is not None
    assert 0.1 < engine.silent_fraction < 0.9


def test_memory_does_not_grow(coded: Engine) -> None:
    _, ten = coded.prefill(list(range(10)))
    _, thousand = coded.prefill(list(range(200)) * 5)
    assert ten.nbytes == thousand.nbytes


def test_a_copied_folder_generates_the_same(
    coded: Engine, coded_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(coded_folder, tmp_path / "copy")
    assert generated(Engine(checkpoint.load(copy)), "Hello") == generated(coded, "Hello")


def test_rows_that_pad_the_head_are_never_sampled(engine: Engine) -> None:
    """Imported embeddings may have more rows than the tokenizer has ids."""
    tokenizer = copy.copy(engine.tokenizer)
    tokenizer.vocab_size = 200
    padded = Engine(dataclasses.replace(engine.checkpoint, tokenizer=tokenizer))
    logits, state = padded.prefill([1, 2, 3])
    whole, _ = engine.prefill([1, 2, 3])
    assert torch.equal(logits, whole[:, :200])
    assert padded.step(torch.tensor([5]), state)[0].shape == (1, 200)


def test_an_unknown_backend_is_no_float_models_either(float_folder: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'foo'"):
        checkpoint.load(float_folder, backend="foo")
