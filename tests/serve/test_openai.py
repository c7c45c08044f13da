"""The official client works, streaming and not, and sees our errors as its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

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
