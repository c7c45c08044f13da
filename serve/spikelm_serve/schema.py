"""Requests as data: JSON in, frozen dataclasses out, before any model code sees them.

A field that is known and cannot be served is refused by name when it asks for something; a field
nobody knows is ignored, as OpenAI's clients expect. Every refusal is a RequestError.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NoReturn

from spikelm.corpus import ROLES
from spikelm.errors import RequestError
from spikelm.sampling import SamplingParams
from spikelm_serve.strict_json import Json, parse_object
from spikelm_serve.tools import Tool, ToolCall, Tools

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_MESSAGES = 10_000
MAX_TOKENS = 1_000_000
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_PRIORITY = 1_000_000
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_NAME = 200
MAX_PATTERN = 10_000
MAX_ALTERNATIVES = 1024
MAX_TOOLS = 64
MAX_PING_SECONDS = 3600

PING_SECONDS = 15.0

# OpenAI's own default for completions; a chat answer usually ends by itself.
COMPLETION_TOKENS = 16
CHAT_TOKENS = 256


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
)

# Fields of the OpenAI API that are not served, with the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "conversation": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include": ([],),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "truncation": ("disabled",),
    "verbosity": (),
    "web_search_options": (),
}
# The last one is for proxies; there is nothing to obfuscate.
_STREAM_OPTIONS = {"include_usage", "resumable", "include_obfuscation"}
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StateOptions:
    """Our extension: the state that a request begins with, and what becomes of its own."""

    start: str | None = None
    """Id of the state to go on from; null reads the whole prompt."""
    save: bool = False
    """Keeps the state after the answer until it is deleted."""
    name: str | None = None
    """A label for it."""
    returns: str = "none"
    """none, url or inline: where its file is, or the file in base64."""
    no_cache: bool = False
    """Reads everything, keeps nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """The form an answer must have."""

    kind: str
    """json, regex or choice."""
    value: Json | str | tuple[str, ...]
    """A JSON schema, a pattern, or the texts."""


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
    resumable: bool
    """The streamed answer goes on when its connection is lost."""
    num_top: int | None = None
    """Logprobs, with so many alternatives; None: none."""
    form: Form | None = None
    state: StateOptions = StateOptions()
    cache_salt: str = ""
    """Requests with another one share no states."""
    priority: int = 0
    """Lower comes first."""
    deadline_ms: int | None = None
    """Time after which the request ends with what it has."""
    progress: bool = False
    """Streamed chunks say how much of the prompt has been read."""
    spikes: bool = False
    """Streamed chunks say which neurons fired."""
    ping_seconds: float = PING_SECONDS
    """Between comments in a stream that is silent otherwise."""


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
    calls: tuple[ToolCall, ...] = ()
    """What an assistant asked for."""
    call_id: str | None = None
    """The call that a tool's message answers."""

    def as_json(self) -> Json:
        """As templates take it: arguments are objects to them."""
        found: Json = {"role": self.role, "content": self.content}
        if self.calls:
            found["tool_calls"] = [call.for_template() for call in self.calls]
        if self.call_id is not None:
            found["tool_call_id"] = self.call_id
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """POST /v1/chat/completions."""

    options: Options
    messages: tuple[Message, ...]
    tools: Tools | None
    """None: without any."""


def parse_completion(body: bytes, vocab_size: int) -> CompletionRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    for name in ("tools", "tool_choice"):
        if fields.get(name) not in (None, [], "none", "auto"):
            raise RequestError(f"{name} is for chats; leave it out", param=name)
    prompt = fields.get("prompt")
    options = _options(fields, COMPLETION_TOKENS, vocab_size, _completion_logprobs(fields))
    if prompt is None and options.state.start is None:
        raise RequestError("prompt is missing; send a string or token ids", param="prompt")
    return CompletionRequest(
        options=options,
        prompts=((),) if prompt is None else _prompts(prompt, vocab_size),
        echo=_flag(fields, "echo"),
    )


def parse_chat(body: bytes, vocab_size: int) -> ChatRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    if fields.get("echo") not in (None, False):
        raise RequestError("echo is for completions; leave it out", param="echo")
    return ChatRequest(
        options=_options(fields, CHAT_TOKENS, vocab_size, _chat_logprobs(fields)),
        messages=_messages(fields.get("messages")),
        tools=_tools(fields),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseRequest:
    """POST /v1/responses."""

    options: Options
    messages: tuple[Message, ...]
    tools: Tools | None
    instructions: str | None
    previous_response_id: str | None
    store: bool
    metadata: Json


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeRequest:
    """POST /tokenize."""

    text: str
    messages: tuple[Json, ...]
    special: bool
    """Special tokens in the text are read as such."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewindRequest:
    """POST /v1/states/{id}/rewind; one of the two is given."""

    to_message: int | None
    to_token: int | None


def parse_response(body: bytes, vocab_size: int) -> ResponseRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    # Chats and completions have them.
    for name, neutral in (
        ("prompt", ()),
        ("n", (1,)),
        ("top_logprobs", (0,)),
        ("max_tokens", ()),
        ("return_spikes", (False,)),
    ):
        if fields.get(name) is not None and fields[name] not in neutral:
            raise RequestError(f"{name} is not for responses; leave it out", param=name)
    instructions = fields.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        _refuse("instructions", instructions, "a string")
    metadata = fields.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        _refuse("metadata", metadata, "an object")
    given = fields.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_MESSAGES:
        _refuse("input", given, f"a string, or a list of 1 to {MAX_MESSAGES} messages")
    messages = tuple(_item(item, f"input[{i}]") for i, item in enumerate(given))
    if instructions:
        messages = (Message(role="system", content=instructions), *messages)
    # The names that chats have for the same.
    about = fields.get("text")
    if about is not None and not isinstance(about, dict):
        _refuse("text", about, "an object")
    form = (about or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    named = {
        "max_completion_tokens": fields.get("max_output_tokens"),
        "response_format": form,
    }
    return ResponseRequest(
        options=_options({**fields, **named}, CHAT_TOKENS, vocab_size, None),
        messages=messages,
        tools=_tools(fields, flat=True),
        instructions=instructions,
        previous_response_id=_text(fields, "previous_response_id", default="") or None,
        store=fields.get("store") is None or _flag(fields, "store"),
        metadata=metadata or {},
    )


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    text, messages = fields.get("prompt", fields.get("content")), fields.get("messages")
    if (text is None) == (messages is None):
        raise RequestError("send either prompt, a string, or messages", param="prompt")
    if messages is None and not isinstance(text, str):
        _refuse("prompt", text, "a string")
    return TokenizeRequest(
        text=text or "",
        messages=() if messages is None else tuple(as_dicts(_messages(messages))),
        special=_flag(fields, "parse_special"),
    )


def parse_detokenize(body: bytes, vocab_size: int) -> tuple[int, ...]:
    """Raises: RequestError naming the field."""
    ids = parse_object(body).get("tokens")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        _refuse("tokens", ids, f"a list of token ids from 0 to {vocab_size - 1}")
    return _token_ids(ids, vocab_size, "tokens") if ids else ()


def parse_name(body: bytes) -> str | None:
    """The label of a state. Raises: RequestError naming the field."""
    return _text(parse_object(body), "name", default="") or None


def parse_rewind(body: bytes) -> RewindRequest:
    """Raises: RequestError naming the field."""
    fields = parse_object(body)
    found = RewindRequest(
        to_message=_integer(fields, "to_message", 1, 2**53, default=0) or None,
        to_token=_integer(fields, "to_token", 1, 2**53, default=0) or None,
    )
    if (found.to_message is None) == (found.to_token is None):
        raise RequestError("send either to_message or to_token", param="to_message")
    return found


def as_dicts(messages: Iterable[Message]) -> list[Json]:
    """As templates take them."""
    return [message.as_json() for message in messages]


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        _refuse("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _options(fields: Json, default_tokens: int, vocab_size: int, num_top: int | None) -> Options:
    for name, neutral in _NOT_SERVED.items():
        value = fields.get(name)
        # The type counts: logprobs 0 asks for something, False does not.
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise RequestError(f"{name} is not supported; leave it out", param=name)
    return Options(
        model=_model(fields),
        params=_params(fields, default_tokens, vocab_size),
        stop=_stop(fields.get("stop")),
        n=_integer(fields, "n", 1, MAX_CHOICES, default=1),
        stream=_flag(fields, "stream"),
        include_usage=_stream_option(fields, "include_usage"),
        resumable=_stream_option(fields, "resumable"),
        num_top=num_top,
        form=_form(fields),
        state=_state(fields),
        cache_salt=_text(fields, "cache_salt", default=""),
        priority=_integer(fields, "priority", -MAX_PRIORITY, MAX_PRIORITY, default=0),
        deadline_ms=_integer(fields, "deadline_ms", 1, MAX_DEADLINE_MS, default=0) or None,
        progress=_flag(fields, "return_progress"),
        spikes=_flag(fields, "return_spikes"),
        ping_seconds=_ping(fields),
    )


def _ping(fields: Json) -> float:
    value = fields.get("sse_ping_interval")
    if value is None:
        return PING_SECONDS
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 <= value <= MAX_PING_SECONDS:
        _refuse("sse_ping_interval", value, f"seconds from 1 to {MAX_PING_SECONDS}")
    return float(value)


def _completion_logprobs(fields: Json) -> int | None:
    if fields.get("logprobs") is None or fields["logprobs"] is False:
        return None
    return _integer(fields, "logprobs", 0, MAX_TOP_LOGPROBS, default=0)


def _chat_logprobs(fields: Json) -> int | None:
    wanted = _flag(fields, "logprobs")
    number = _integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS, default=0)
    if number and not wanted:
        _refuse("top_logprobs", number, "only with logprobs: true")
    return number if wanted else None


def _form(fields: Json) -> Form | None:
    wanted, ours = fields.get("response_format"), fields.get("structured_outputs")
    if wanted is not None and ours is not None:
        _refuse("structured_outputs", ours, "not beside response_format")
    if ours is not None:
        return _our_form(ours)
    if wanted is None or wanted == {"type": "text"}:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_object", "json_schema"):
        _refuse("response_format", wanted, '{"type": "text", "json_object" or "json_schema"}')
    if wanted["type"] == "json_object":
        return Form(kind="json", value={"type": "object"})
    about = wanted.get("json_schema")
    schema = about.get("schema") if isinstance(about, dict) else None
    if not isinstance(schema, dict):
        _refuse("response_format.json_schema", about, 'an object with a "schema"')
    return Form(kind="json", value=schema)


def _our_form(given: object) -> Form:
    """As vLLM's: one of json, regex and choice."""
    kinds = ("json", "regex", "choice")
    if not isinstance(given, dict) or len(given) != 1 or not given.keys() <= set(kinds):
        _refuse("structured_outputs", given, f"an object with one of {', '.join(kinds)}")
    [(kind, value)] = given.items()
    where = f"structured_outputs.{kind}"
    if kind == "json":
        if not isinstance(value, dict):
            _refuse(where, value, "a JSON schema")
        return Form(kind=kind, value=value)
    if kind == "regex":
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_PATTERN:
            _refuse(where, value, f"a pattern of 1 to {MAX_PATTERN} characters")
        return Form(kind=kind, value=value)
    ok = isinstance(value, list) and 1 <= len(value) <= MAX_ALTERNATIVES
    if not ok or not all(isinstance(text, str) and text for text in value):
        _refuse(where, value, f"1 to {MAX_ALTERNATIVES} strings")
    return Form(kind=kind, value=tuple(value))


def _state(fields: Json) -> StateOptions:
    given = fields.get("state")
    if given is None:
        return StateOptions()
    known = {"from", "save", "name", "return", "no_cache"}
    if not isinstance(given, dict) or not given.keys() <= known:
        _refuse("state", given, f"an object with some of {', '.join(sorted(known))}")
    where = {f"state.{key}": value for key, value in given.items()}
    returns = _text(where, "state.return", default="none")
    if returns not in ("none", "url", "inline"):
        _refuse("state.return", returns, "none, url or inline")
    options = StateOptions(
        start=_text(where, "state.from", default="") or None,
        save=_flag(where, "state.save"),
        name=_text(where, "state.name", default="") or None,
        returns=returns,
        no_cache=_flag(where, "state.no_cache"),
    )
    if options.no_cache and (options.save or options.returns != "none"):
        _refuse("state.no_cache", True, "not with save or return")
    return options


def _biases(fields: Json, vocab_size: int) -> dict[int, float]:
    """-100 to 100 for token ids; `SamplingParams` checks the numbers."""
    given = fields.get("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        _refuse("logit_bias", given, f"an object with up to {MAX_BIASES} token ids")
    found = {}
    for token, value in given.items():
        ok = token.isascii() and token.isdecimal() and len(token) < 10
        if not ok or int(token) >= vocab_size:
            _refuse("logit_bias", token, f"token ids from 0 to {vocab_size - 1}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse("logit_bias", value, "numbers from -100 to 100")
        found[int(token)] = value
    return found


def _params(fields: Json, default_tokens: int, vocab_size: int) -> SamplingParams:
    names = (*_NUMBERS, "top_k", "seed")
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    # Clients of vLLM and llama.cpp switch top-k off with these.
    if type(given.get("top_k")) is int and given["top_k"] in (0, -1):
        del given["top_k"]
    newer = fields.get("max_completion_tokens") is not None
    name = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = _integer(fields, name, 1, MAX_TOKENS, default=default_tokens)
    return SamplingParams(max_tokens=max_tokens, logit_bias=_biases(fields, vocab_size), **given)


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


def _stream_option(fields: Json, name: str) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not _flag(fields, "stream"):
        _refuse("stream_options", options, "an object, and only with stream: true")
    if not options.keys() <= _STREAM_OPTIONS:
        _refuse("stream_options", options, f"some of {', '.join(sorted(_STREAM_OPTIONS))}")
    return _flag({f"stream_options.{name}": options.get(name)}, f"stream_options.{name}")


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


def _token_ids(ids: list[int], vocab_size: int, name: str = "prompt") -> tuple[int, ...]:
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            _refuse(name, token, f"token ids from 0 to {vocab_size - 1}")
    return tuple(ids)


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        _refuse(where, value, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        _refuse(f"{where}.role", role, ", ".join(ROLES))
    calls: tuple[ToolCall, ...] = ()
    if value.get("tool_calls"):
        if role != "assistant":
            _refuse(f"{where}.tool_calls", role, "only in an assistant's message")
        calls = _calls(value["tool_calls"], f"{where}.tool_calls")
        content = "" if content is None else content
    call_id = _text(value, "tool_call_id", default="") or None
    if isinstance(content, list):
        content = "".join(_part(p, f"{where}.content[{i}]") for i, p in enumerate(content))
    if not isinstance(content, str):
        _refuse(f"{where}.content", content, "a string or a list of text parts")
    return Message(role=role, content=content, calls=calls, call_id=call_id)


def _item(value: object, where: str) -> Message:
    """What /v1/responses takes for a message."""
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    kind = value.get("type")
    if kind == "function_call":
        calls = _calls([{"function": value, "id": value.get("call_id")}], where)
        return Message(role="assistant", content="", calls=calls)
    if kind == "function_call_output":
        value = {**value, "role": "tool", "content": value.get("output")}
        return replace(_message(value, where), call_id=_text(value, "call_id", default="") or None)
    return _message(value, where)


def _calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        _refuse(where, value, f"a list of up to {MAX_TOOLS} calls")
    found = []
    for i, item in enumerate(value):
        about = item.get("function") if isinstance(item, dict) else None
        if not isinstance(about, dict) or not isinstance(about.get("arguments"), str):
            _refuse(f"{where}[{i}]", item, "a function with name, and arguments in a string")
        call_id = _text(item, "id", default="")
        name = _tool_name(about.get("name"), f"{where}[{i}].function.name")
        found.append(ToolCall(name=name, arguments=about["arguments"], id=call_id))
    return tuple(found)


def _tools(fields: Json, *, flat: bool = False) -> Tools | None:
    """`flat`: without an object `function` around what is said of one."""
    given, choice = fields.get("tools"), fields.get("tool_choice")
    choice = "auto" if choice is None else choice
    if not given:
        if given not in (None, []):
            _refuse("tools", given, f"a list of up to {MAX_TOOLS} functions")
        if choice not in ("none", "auto"):
            _refuse("tool_choice", choice, "none or auto without tools")
        return None
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        _refuse("tools", given, f"a list of up to {MAX_TOOLS} functions")
    tools = tuple(_tool(item, f"tools[{i}]", flat=flat) for i, item in enumerate(given))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        _refuse("tools", names, "each name once")
    if choice == "none":
        return None
    must: tuple[str, ...] = tuple(names) if choice == "required" else ()
    if isinstance(choice, dict):
        about = choice if flat else choice.get("function")
        name = about.get("name") if isinstance(about, dict) else None
        must = (name,) if name in names else ()
    if choice != "auto" and not must:
        _refuse("tool_choice", choice, "none, auto, required, or a function that is in tools")
    if must and _form(fields) is not None:
        _refuse("tool_choice", choice, "none or auto beside a form of the answer")
    parallel = fields.get("parallel_tool_calls") is None or _flag(fields, "parallel_tool_calls")
    return Tools(tools=tools, must=must, parallel=parallel)


def _tool(item: object, where: str, *, flat: bool) -> Tool:
    about = item if flat or not isinstance(item, dict) else item.get("function")
    if not isinstance(item, dict) or item.get("type") != "function" or not isinstance(about, dict):
        _refuse(where, item, 'an object of type "function" with what the function is')
    parameters = about.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        _refuse(f"{where}.parameters", parameters, "a JSON schema")
    description = about.get("description")
    if description is not None and not isinstance(description, str):
        _refuse(f"{where}.description", description, "a string")
    return Tool(
        name=_tool_name(about.get("name"), f"{where}.name"),
        description=description or "",
        parameters=parameters or {"type": "object", "properties": {}},
    )


def _tool_name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _TOOL_NAME.fullmatch(value):
        _refuse(where, value, "1 to 64 letters, digits, _ and -")
    return value


def _part(part: object, where: str) -> str:
    kinds = ("text", "input_text", "output_text")
    if isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str):
        return str(part["text"])
    _refuse(where, part, '{"type": "text", "text": "..."}')


def _text(fields: Json, name: str, *, default: str) -> str:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or len(value) > MAX_NAME:
        _refuse(name, value, f"a string of up to {MAX_NAME} characters")
    return value


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
