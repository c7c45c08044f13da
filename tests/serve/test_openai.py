"""The official client works, streaming and not, and sees our errors as its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from spikelm.generate import Engine

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def connect(serve: Callable[..., httpx.Client]) -> Iterator[Callable[[Any], openai.OpenAI]]:
    clients: list[openai.OpenAI] = []

    def start(engine: Any) -> openai.OpenAI:
        url = f"{serve(engine).base_url}/v1"
        http_client = openai.DefaultHttpxClient(trust_env=False)
        clients.append(
            openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http_client)
        )
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_models(connect: Any, make_engine: Any) -> None:
    client = connect(make_engine("ok"))
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "spikelm"


def test_completion(connect: Any, make_engine: Any) -> None:
    client = connect(make_engine("four words and more"))
    whole = client.completions.create(model="tiny", prompt="x", max_tokens=10)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("four words", "length")
    assert whole.usage.completion_tokens == 10
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    with client.completions.create(model="tiny", prompt="x", max_tokens=10, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "four words"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat(connect: Any, make_engine: Any) -> None:
    client = connect(make_engine(" caf\u00e9 \u4e16\u754c"))
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert whole.choices[0].message.content == "caf\u00e9 \u4e16\u754c"
    assert whole.choices[0].message.role == "assistant"
    assert whole.model_extra["state_bytes"] > 0
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "caf\u00e9 \u4e16\u754c"
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens
    assert last.model_extra["timings"].keys() == whole.model_extra["timings"].keys()


def test_errors(connect: Any, make_engine: Any) -> None:
    engine = make_engine("ok")
    client = connect(engine)
    with pytest.raises(openai.NotFoundError) as info:
        client.completions.create(model="other", prompt="x")
    assert (info.value.code, info.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="tools") as bad:
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert bad.value.param == "tools"
    engine.error = RuntimeError("broken")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x")
    with (
        client.completions.create(model="tiny", prompt="x", stream=True) as stream,
        pytest.raises(openai.APIError, match="err-"),
    ):
        list(stream)


def test_responses_go_on_from_each_other(
    serve: Callable[..., httpx.Client], coded_engine: Engine
) -> None:
    url = f"{serve(coded_engine).base_url}/v1"
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="none", http_client=http_client) as client:
        # No seed in this form: greedy is repeatable.
        plain: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 20}
        first = client.responses.create(input="Hello", instructions="Be brief.", **plain)
        assert first.output_text == first.output[0].content[0].text  # type: ignore[union-attr]
        assert first.status in ("completed", "incomplete")
        second = client.responses.create(
            input="And then?", previous_response_id=first.id, store=False, **plain
        )
        assert second.previous_response_id == first.id
        assert second.usage is not None
        state = (first.model_extra or {})["state"]
        assert second.usage.input_tokens_details.cached_tokens == state["tokens"]
        messages: Any = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And then?"},
        ]
        whole = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=20
        )
        assert whole.choices[0].message.content == second.output_text
        asked = [{"role": "user", "content": [{"type": "input_text", "text": "And then?"}]}]
        with client.responses.create(
            input=asked,  # type: ignore[arg-type]
            previous_response_id=first.id,
            stream=True,
            **plain,
        ) as stream:
            events = list(stream)
        assert events[0].type == "response.created"
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == second.output_text
        last = events[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert last.response.output_text == second.output_text
        assert last.response.id == events[0].response.id
        with pytest.raises(openai.NotFoundError):
            # It was not to be stored.
            client.responses.create(input="x", previous_response_id=second.id, **plain)
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(input="x", previous_response_id=first.id, **plain)
        found = client.responses.create(
            input="x",
            model="tiny",
            text={
                "format": {
                    "type": "json_schema",
                    "name": "x",
                    "schema": {
                        "type": "object",
                        "properties": {"a": {"enum": [1, 2]}},
                        "required": ["a"],
                        "additionalProperties": False,
                    },
                }
            },
        )
        assert json.loads(found.output_text)["a"] in (1, 2)
