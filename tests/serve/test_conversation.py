"""The carried state equals a cold start, and only new tokens are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spikelm.generate import Engine, prompt_ids
from spikelm.sampling import SamplingParams
from spikelm.template import ChatTemplate
from spikelm_serve.conversation import Conversation

QUESTIONS = ["Hello", "What is a list?", "Na\u00efve?", "And then?"]


def read_text(conversation: Conversation) -> bytes:
    """What the newest kept state has read, and a check that the state really did."""
    engine = conversation.engine
    length, state = conversation._states[-1]
    seen = conversation._seen[:length]
    ids = [engine.tokenizer.eos_id, *engine.tokenizer.encode(seen)]
    cold, _ = engine.prefill([*ids, 10])
    carried, _ = engine.prefill([10], state)
    torch.testing.assert_close(carried, cold, rtol=0, atol=1e-4)
    return seen


def test_carried_state_equals_a_cold_one(tiny_engine: Engine) -> None:
    params = SamplingParams(max_tokens=16, seed=1)
    conversation = Conversation(tiny_engine, ChatTemplate(), params, ["q"])
    for question in QUESTIONS:
        answer = "".join(conversation.ask(question))
        assert conversation.messages[-2:] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rendered = ChatTemplate().render(conversation.messages[:-1]).encode()
        assert read_text(conversation).startswith(rendered)
    assert len(conversation.messages) == 2 * len(QUESTIONS)
    assert len(conversation._states) <= 16


@pytest.mark.parametrize(
    "said", [" Fine.", " Fine.\n\nUser: so I said", " Fine. \n \n", "", " Fi\n\nne.\n\nUser:"]
)
def test_only_new_tokens_are_read(make_engine: Any, said: str) -> None:
    engine = make_engine(said)
    params = SamplingParams(temperature=0, max_tokens=20)
    conversation = Conversation(engine, ChatTemplate(), params)
    shown = said.split("\nUser:")[0].strip()
    for question in QUESTIONS:
        assert "".join(conversation.ask(question)) == shown
    assert engine.prompts[0] == [256, *b"User: Hello\n\nAssistant:"]
    for question, prompt in zip(QUESTIONS[1:], engine.prompts[1:], strict=True):
        # The end of the answer may be read again, where it was trimmed.
        new = f"\n\nUser: {question}\n\nAssistant:".encode()
        assert bytes(prompt).endswith(new[7:])
        assert len(prompt) <= len(new) + 2
    assert conversation.meter.prompt_tokens == len(engine.prompts[-1])


def test_leaving_early_keeps_what_was_said(tiny_engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=1)
    conversation = Conversation(tiny_engine, ChatTemplate(), params)
    pieces = conversation.ask("Hello")
    said = "".join(next(pieces) for _ in range(5))
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    list(conversation.ask("Go on"))
    assert conversation.messages[1]["content"] == said
    read_text(conversation)


def test_reset_forgets(make_engine: Any) -> None:
    engine = make_engine("ok")
    conversation = Conversation(engine, ChatTemplate(), SamplingParams(temperature=0))
    list(conversation.ask("one"))
    conversation.reset()
    list(conversation.ask("two"))
    assert engine.prompts[1] == prompt_ids(engine.tokenizer, "User: two\n\nAssistant:")


def test_unstable_template_still_answers_right(make_engine: Any) -> None:
    """A template that rewrites the past costs time, not correctness."""
    engine = make_engine("ok")
    template = ChatTemplate("{{ messages | length }}{{ messages[-1].content }}:")
    conversation = Conversation(engine, template, SamplingParams(temperature=0))
    assert ["".join(conversation.ask(q)) for q in ("a", "b")] == ["ok", "ok"]
    assert engine.prompts == [[256, *b"1a:"], [256, *b"3b:"]]
