"""Requests as data: JSON in, frozen dataclasses out, before any model code sees them.

A field that is known and cannot be served is refused by name when it asks for something; a field
nobody knows is ignored, as OpenAI's clients expect. Every refusal is a RequestError.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import NoReturn

from spikelm.corpus import ROLES
from spikelm.errors import RequestError
from spikelm.sampling import SamplingParams
from spikelm_serve.strict_json import Json, parse_object

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_MESSAGES = 10_000
MAX_TOKENS = 1_000_000

# OpenAI's own default for completions; a chat answer usually ends by itself.
COMPLETION_TOKENS = 16
CHAT_TOKENS = 256


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

# Fields of the OpenAI API that are not served, with the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What completions and chats have in common."""

    model: str | None
    """None takes the model the server has."""
    params: SamplingParams
    stop: tuple[str, ...]
    n: int
    """Choices per prompt; choice i draws with seed + i."""
    stream: bool
    include_usage: bool
    """A last streamed chunk with the usage and no choices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """POST /v1/completions."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts, or token ids inside the vocabulary."""
    echo: bool
    """The answer's text starts with the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """POST /v1/chat/completions."""

    options: Options
    messages: tuple[Message, ...]


def parse_completion(body: bytes, vocab_size: int) -> CompletionRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    prompt = fields.get("prompt")
    if prompt is None:
        raise RequestError("prompt is missing; send a string or token ids", param="prompt")
    return CompletionRequest(
        options=_options(fields, COMPLETION_TOKENS),
        prompts=_prompts(prompt, vocab_size),
        echo=_flag(fields, "echo"),
    )


def parse_chat(body: bytes) -> ChatRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        _refuse("messages", messages, f"a list of 1 to {MAX_MESSAGES} messages")
    return ChatRequest(
        options=_options(fields, CHAT_TOKENS),
        messages=tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages)),
    )


def _options(fields: Json, default_tokens: int) -> Options:
    for name, neutral in _NOT_SERVED.items():
        value = fields.get(name)
        # The type counts: logprobs 0 asks for something, False does not.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise RequestError(f"{name} is not supported; leave it out", param=name)
    stream = _flag(fields, "stream")
    return Options(
        model=_model(fields),
        params=_params(fields, default_tokens),
        stop=_stop(fields.get("stop")),
        n=_integer(fields, "n", 1, MAX_CHOICES, default=1),
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def _params(fields: Json, default_tokens: int) -> SamplingParams:
    names = (*_NUMBERS, "top_k", "seed")
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    # Clients of vLLM and llama.cpp switch top-k off with these.
    if type(given.get("top_k")) is int and given["top_k"] in (0, -1):
        del given["top_k"]
    newer = fields.get("max_completion_tokens") is not None
    name = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = _integer(fields, name, 1, MAX_TOKENS, default=default_tokens)
    return SamplingParams(max_tokens=max_tokens, **given)


def _model(fields: Json) -> str | None:
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        _refuse("model", model, "the name of a model")
    return model


def _stop(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    allowed = f"a string or up to {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes"
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        _refuse("stop", value, allowed)
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            _refuse("stop", stop, allowed)
    return tuple(stops)


def _include_usage(fields: Json, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        _refuse("stream_options", options, "an object, and only with stream: true")
    return _flag(options, "include_usage")


def _prompts(value: object, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """A text or a list of token ids is one prompt; a list of either is several."""
    allowed = f"a string, token ids from 0 to {vocab_size - 1}, or a list of 1 to {MAX_PROMPTS}"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        _refuse("prompt", value, allowed)
    if all(type(item) is int for item in value):
        return (_token_ids(value, vocab_size),)
    if len(value) > MAX_PROMPTS:
        _refuse("prompt", value, allowed)
    prompts: list[str | tuple[int, ...]] = []
    for item in value:
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list) and item and all(type(i) is int for i in item):
            prompts.append(_token_ids(item, vocab_size))
        else:
            _refuse("prompt", item, allowed)
    return tuple(prompts)


def _token_ids(ids: list[int], vocab_size: int) -> tuple[int, ...]:
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            _refuse("prompt", token, f"token ids from 0 to {vocab_size - 1}")
    return tuple(ids)


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        _refuse(where, value, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        _refuse(f"{where}.role", role, ", ".join(ROLES))
    if value.get("tool_calls"):
        raise RequestError(f"{where}.tool_calls is not supported", param=f"{where}.tool_calls")
    if isinstance(content, list):
        content = "".join(_part(p, f"{where}.content[{i}]") for i, p in enumerate(content))
    if not isinstance(content, str):
        _refuse(f"{where}.content", content, "a string or a list of text parts")
    return Message(role=role, content=content)


def _part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    _refuse(where, part, '{"type": "text", "text": "..."}')


def _flag(fields: Json, name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return bool(value)


def _integer(fields: Json, name: str, low: int, high: int, *, default: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        _refuse(name, value, f"an integer from {low} to {high}")
    return value


def _refuse(name: str, given: object, allowed: str) -> NoReturn:
    raise RequestError(f"{name}: {reprlib.repr(given)} given; allowed: {allowed}", param=name)
