"""GET /openapi.json: every route, what it takes and what it answers, with this server's limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version

from spikelm.corpus import ROLES
from spikelm_serve import schema
from spikelm_serve.shelf import STATE_ID
from spikelm_serve.strict_json import Json

STATUSES = {
    400: "The request is not valid; `error.param` names the field.",
    401: "A key is needed.",
    403: "Another host or origin than the server's, or uploads, which are off.",
    404: "No such model, state, stream or file.",
    408: "The request's deadline passed before there was an answer.",
    413: "The body is larger than the server takes.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "The request failed; nothing else did.",
    503: "The server is shutting down, or the store does not answer.",
    507: "No room for one more saved state.",
}
_STATE = {"type": "string", "pattern": f"^{STATE_ID.pattern}$"}
_INTEGERS = (-(2**63), 2**63 - 1)


def document(vocab_size: int) -> Json:
    """The document, as OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "spikelm",
            "version": version("spikelm"),
            "description": "A language model of spiking neurons, with conversation states.",
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(vocab_size),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _paths() -> Json:
    def asks(name: str, answer: str, about: str) -> Json:
        answers = {"application/json": answer, "text/event-stream": None}
        return _route(about, body=name, answers=answers, errors=(404, 408, 413, 429, 503, 507))

    state = [_parameter("id", _STATE)]
    any_id = [_parameter("id", {"type": "string"})]
    one = "/v1/states/{id}"
    stored = (404, 503)
    return {
        "/": {"get": _route("The chat page.", answers={"text/html": None}, open_to_all=True)},
        "/static/{name}": {
            "get": _route(
                "A file of the page.",
                parameters=[_parameter("name", {"type": "string"})],
                answers=dict.fromkeys(
                    ("text/css", "text/javascript", "text/html", "image/svg+xml")
                ),
                errors=(404,),
                open_to_all=True,
            )
        },
        "/health": {"get": _route("Whether it is alive.", "Status", open_to_all=True)},
        "/ready": {
            "get": _route("Whether it takes requests.", "Status", errors=(503,), open_to_all=True)
        },
        "/metrics": {"get": _route("For Prometheus.", answers={"text/plain": None})},
        "/openapi.json": {"get": _route("This document.", "Object")},
        "/v1/models": {"get": _route("The model.", "Models")},
        "/v1/models/{model}": {
            "get": _route(
                "The model.",
                "Model",
                parameters=[_parameter("model", {"type": "string"})],
                errors=(404,),
            )
        },
        "/v1/completions": {
            "post": asks("CompletionRequest", "Completion", "Goes on with a text.")
        },
        "/v1/chat/completions": {"post": asks("ChatRequest", "Chat", "Answers a conversation.")},
        "/v1/responses": {
            "post": asks("ResponseRequest", "Response", "A conversation that goes on by id.")
        },
        "/v1/responses/{id}": {
            "delete": _route(
                "Forgets a response.", "Deleted", parameters=any_id, errors=(400, *stored)
            )
        },
        "/v1/streams/{id}": {
            "get": _route(
                "A resumable stream, from an event on.",
                parameters=[
                    *any_id,
                    _parameter("after", {"type": "integer", "minimum": -1}, where="query"),
                    _parameter("Last-Event-ID", {"type": "integer", "minimum": -1}, where="header"),
                ],
                answers={"text/event-stream": None},
                empty="It has ended, and there is nothing after that event.",
                errors=(400, 404),
            ),
            "delete": _route("Ends it.", "Cancelled", parameters=any_id, errors=(404,)),
        },
        "/tokenize": {
            "post": _route("Text to ids.", "Tokens", body="TokenizeRequest", errors=(413,))
        },
        "/detokenize": {
            "post": _route("Ids to text.", "Prompt", body="DetokenizeRequest", errors=(413,))
        },
        "/v1/states": {
            "get": _route("States of this key.", "States"),
            "post": _route(
                "Takes a state in, if uploads are allowed.",
                "State",
                upload=True,
                errors=(400, 413, 507),
            ),
        },
        one: {
            "get": _route("A state.", "State", parameters=state, errors=(400, 404)),
            "delete": _route("Deletes it.", "Deleted", parameters=state, errors=(400, *stored)),
        },
        **{
            f"{one}/{verb}": {
                "post": _route(about, answer, body=body, parameters=state, errors=errors)
            }
            for verb, about, answer, body, errors in (
                ("fork", "The same state under another id.", "State", "NameRequest", (404, 413)),
                ("save", "Keeps it until it is deleted.", "State", "NameRequest", (404, 413, 507)),
                (
                    "rewind",
                    "An earlier state of the conversation.",
                    "State",
                    "RewindRequest",
                    (404, 413, 429, 503),
                ),
                (
                    "verify",
                    "Reads its tokens again, and compares.",
                    "Verified",
                    None,
                    (400, 404, 429, 503),
                ),
            )
        },
        f"{one}/download": {
            "get": _route(
                "Its file.",
                parameters=state,
                answers={"application/octet-stream": None},
                errors=(400, 404),
            )
        },
    }


def _route(
    about: str,
    answer: str | None = None,
    *,
    body: str | None = None,
    upload: bool = False,
    parameters: Sequence[Json] = (),
    answers: dict[str, str | None] | None = None,
    errors: Iterable[int] = (),
    empty: str | None = None,
    open_to_all: bool = False,
) -> Json:
    kinds = answers or {"application/json": answer}
    content = {kind: {"schema": _ref(name)} if name else {} for kind, name in kinds.items()}
    given = {400} if body or upload else set()
    codes = {*given, *errors, 403, 500, *([] if open_to_all else [401])}
    found: Json = {
        "summary": about,
        "responses": {
            "200": {"description": "Done.", "content": content},
            **{
                str(code): {
                    "description": STATUSES[code],
                    "content": {"application/json": {"schema": _ref("Error")}},
                }
                for code in sorted(codes)
            },
        },
    }
    if empty:
        found["responses"]["204"] = {"description": empty}
    if parameters:
        found["parameters"] = list(parameters)
    if body or upload:
        kind = "application/octet-stream" if upload else "application/json"
        found["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": _ref(body)} if body else {}},
        }
    if not open_to_all:
        # None is needed where the server has no keys.
        found["security"] = [{"key": []}, {"header": []}, {}]
    return found


def _parameter(name: str, about: Json, *, where: str = "path") -> Json:
    return {"name": name, "in": where, "required": where == "path", "schema": about}


def _ref(name: str | None) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(about: Json) -> Json:
    return {"anyOf": [about, {"type": "null"}]}


def _integer(low: int, high: int = _INTEGERS[1], *, default: int | None = None) -> Json:
    about: Json = {"type": "integer", "minimum": low, "maximum": high}
    return _or_null(about if default is None else {**about, "default": default})


def _number(low: float, high: float, default: float) -> Json:
    return _or_null({"type": "number", "minimum": low, "maximum": high, "default": default})


def _text(most: int = schema.MAX_NAME) -> Json:
    return _or_null({"type": "string", "maxLength": most})


def _list(of: Json, low: int, high: int | None = None) -> Json:
    return {"type": "array", "items": of, "minItems": low} | (
        {} if high is None else {"maxItems": high}
    )


def _object(properties: Json, required: Sequence[str] = (), *, closed: bool = False) -> Json:
    found: Json = {"type": "object", "properties": properties, "required": list(required)}
    return {**found, "additionalProperties": False} if closed else found


_FLAG: Json = {"type": ["boolean", "null"]}
_ANY: Json = {"type": "object"}
_COUNT: Json = {"type": "integer", "minimum": 0}


def _options(vocab_size: int) -> Json:
    """What completions, chats and responses have in common."""
    stop = {"type": "string", "minLength": 1, "maxLength": schema.MAX_STOP_BYTES}
    state = {
        "from": _text(),
        "save": _FLAG,
        "name": _text(),
        "return": {"enum": ["none", "url", "inline", None]},
        "no_cache": _FLAG,
    }
    return {
        "model": {"type": ["string", "null"]},
        "max_tokens": _integer(1, schema.MAX_TOKENS),
        "max_completion_tokens": _integer(1, schema.MAX_TOKENS),
        "temperature": _number(0, 2, 1),
        "top_p": _number(0, 1, 1),
        "top_k": _integer(-1),
        "min_p": _number(0, 1, 0),
        "typical_p": _number(0, 1, 1),
        "repetition_penalty": _number(0.1, 10, 1),
        "presence_penalty": _number(-2, 2, 0),
        "frequency_penalty": _number(-2, 2, 0),
        "penalty_decay": _number(0, 1, 1),
        "logit_bias": _or_null(
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "maxProperties": schema.MAX_BIASES,
                "description": f"Keys are token ids below {vocab_size}.",
            }
        ),
        "seed": _integer(_INTEGERS[0]),
        "stop": {"anyOf": [stop, _list(stop, 0, schema.MAX_STOPS), {"type": "null"}]},
        "n": _integer(1, schema.MAX_CHOICES, default=1),
        "stream": _FLAG,
        "stream_options": _or_null(_object({"include_usage": _FLAG, "resumable": _FLAG})),
        "response_format": _or_null(
            _object({"type": {"enum": ["text", "json_object", "json_schema"]}}, ["type"])
        ),
        "structured_outputs": _or_null(
            {
                **_object(
                    {
                        "json": _ANY,
                        "regex": {
                            "type": "string",
                            "minLength": 1,
                            "maxLength": schema.MAX_PATTERN,
                        },
                        "choice": _list(
                            {"type": "string", "minLength": 1}, 1, schema.MAX_ALTERNATIVES
                        ),
                    },
                    closed=True,
                ),
                "minProperties": 1,
                "maxProperties": 1,
            }
        ),
        "state": _or_null(_object(state, closed=True)),
        "cache_salt": _text(),
        "priority": _integer(-schema.MAX_PRIORITY, schema.MAX_PRIORITY, default=0),
        "deadline_ms": _integer(1, schema.MAX_DEADLINE_MS),
        "return_progress": _FLAG,
        "sse_ping_interval": _number(1, schema.MAX_PING_SECONDS, schema.PING_SECONDS),
        "return_spikes": _FLAG,
    }


def _requests(vocab_size: int) -> Json:
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    tokens = _list(token, 1)
    options = _options(vocab_size)
    part = _object(
        {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
        ["type", "text"],
    )
    content = {"anyOf": [{"type": "string"}, _list(part, 0)]}
    call = _object(
        {
            "id": _text(),
            "function": _object(
                {"name": _ref("ToolName"), "arguments": {"type": "string"}}, ["name", "arguments"]
            ),
        },
        ["function"],
    )
    message = _object({"role": {"enum": list(ROLES)}, "content": content}, ["role", "content"])
    calling = _object(
        {
            "role": {"const": "assistant"},
            "content": _or_null(content),
            "tool_calls": _list(call, 1, schema.MAX_TOOLS),
        },
        ["role", "tool_calls"],
    )
    function = {
        "name": _ref("ToolName"),
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
    }
    kind = {"type": {"const": "function"}}

    def tools(about: Json) -> Json:
        return {
            "tools": _or_null(_list(about, 0, schema.MAX_TOOLS)),
            "tool_choice": {
                "anyOf": [{"enum": ["none", "auto", "required", None]}, {"type": "object"}]
            },
            "parallel_tool_calls": _FLAG,
        }

    number_top = _integer(0, schema.MAX_TOP_LOGPROBS)
    prompts = {"anyOf": [{"type": "string"}, tokens]}
    given_prompt = {"anyOf": [{"type": "string"}, tokens, _list(prompts, 1, schema.MAX_PROMPTS)]}
    items = [
        _ref("Message"),
        _object(
            {
                "type": {"const": "function_call"},
                "call_id": _text(),
                "name": _ref("ToolName"),
                "arguments": {"type": "string"},
            },
            ["type", "name", "arguments"],
        ),
        _object(
            {"type": {"const": "function_call_output"}, "call_id": _text(), "output": content},
            ["type", "output"],
        ),
    ]
    return {
        "ToolName": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
        "Message": {"anyOf": [message, calling]},
        "CompletionRequest": _object(
            {
                **options,
                "prompt": given_prompt,
                "echo": _FLAG,
                "logprobs": {"anyOf": [number_top, {"const": False}]},
            },
            ["prompt"],
        ),
        "ChatRequest": _object(
            {
                **options,
                **tools(_object({**kind, "function": _object(function, ["name"])}, ["type"])),
                "messages": _list(_ref("Message"), 1, schema.MAX_MESSAGES),
                "logprobs": _FLAG,
                "top_logprobs": number_top,
            },
            ["messages"],
        ),
        "ResponseRequest": _object(
            {
                **options,
                **tools(_object({**kind, **function}, ["type", "name"])),
                "input": {
                    "anyOf": [
                        {"type": "string"},
                        _list({"anyOf": items}, 1, schema.MAX_MESSAGES),
                    ]
                },
                "instructions": {"type": ["string", "null"]},
                "max_output_tokens": _integer(1, schema.MAX_TOKENS),
                "metadata": {"type": ["object", "null"]},
                "previous_response_id": _text(),
                "store": _FLAG,
                "text": {"type": ["object", "null"]},
            },
            ["input"],
        ),
        "TokenizeRequest": {
            "anyOf": [
                _object({"prompt": {"type": "string"}, "parse_special": _FLAG}, ["prompt"]),
                _object({"messages": _list(_ref("Message"), 1, schema.MAX_MESSAGES)}, ["messages"]),
            ]
        },
        "DetokenizeRequest": _object({"tokens": _list(token, 0)}, ["tokens"]),
        "NameRequest": _object({"name": _text()}),
        "RewindRequest": {
            "anyOf": [
                _object({name: {"type": "integer", "minimum": 1, "maximum": 2**53}}, [name])
                for name in ("to_message", "to_token")
            ]
        },
    }


def _schemas(vocab_size: int) -> Json:
    name = {"type": ["string", "null"]}
    state = {
        "object": {"const": "state"},
        "id": _STATE,
        "parent": _or_null(_STATE),
        "tokens": _COUNT,
        "messages": _or_null(_COUNT),
        "role": name,
        "name": name,
        "saved": {"type": "boolean"},
        "created": _COUNT,
        "bytes": _COUNT,
        "fingerprint": {"type": "string"},
    }
    model = {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": {"type": "string"},
        "fingerprint": {"type": "string"},
        "batch_invariant": {"type": "boolean"},
        "tools": {"type": "boolean"},
    }
    error = {"message": {"type": "string"}, "type": {"type": "string"}, "param": name, "code": name}
    usage = {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}, ["cached_tokens"]),
    }
    costs = {
        "timings": _ANY,
        "spikes": _object(
            {
                "silent_fraction": {"type": ["number", "null"]},
                "weight_bytes_per_token": {"type": ["integer", "null"]},
            },
            ["silent_fraction", "weight_bytes_per_token"],
        ),
        "cache_miss": {"enum": ["no_prefix", "evicted", "disabled", None]},
        "state_bytes": _COUNT,
        "state": _or_null(_ref("State")),
    }

    def generated(kind: str, choice: Json) -> Json:
        choice = {
            "index": _COUNT,
            **choice,
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
        }
        about = {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": _COUNT,
            "model": {"type": "string"},
            "choices": _list(_object(choice, list(choice)), 1),
            "usage": _object(usage, list(usage)),
            **costs,
        }
        return _object(about, list(about))

    message = _object(
        {
            "role": {"const": "assistant"},
            "content": {"type": ["string", "null"]},
            "tool_calls": _list(_ANY, 1),
        },
        ["role", "content"],
    )
    response = {
        "id": {"type": "string"},
        "object": {"const": "response"},
        "created_at": _COUNT,
        "status": {"enum": ["completed", "incomplete"]},
        "model": {"type": "string"},
        "output": _list(_ANY, 1),
        "usage": _ANY,
        **costs,
    }
    deleted = {"id": {"type": "string"}, "object": {"type": "string"}, "deleted": {"const": True}}
    cancelled = {"id": {"type": "string"}, "object": {"const": "stream"}}
    return {
        **_requests(vocab_size),
        "Object": _ANY,
        "Error": _object({"error": _object(error, list(error))}, ["error"]),
        "Status": _object({"status": {"type": "string"}}, ["status"]),
        "Model": _object(model, list(model)),
        "Models": _object(
            {"object": {"const": "list"}, "data": _list(_ref("Model"), 1)}, ["object", "data"]
        ),
        "State": _object(state, list(state)),
        "States": _object(
            {"object": {"const": "list"}, "data": _list(_ref("State"), 0)}, ["object", "data"]
        ),
        "Completion": generated("text_completion", {"text": {"type": "string"}}),
        "Chat": generated("chat.completion", {"message": message}),
        "Response": _object(response, list(response)),
        "Deleted": _object(deleted, list(deleted)),
        "Cancelled": _object({**cancelled, "cancelled": {"type": "boolean"}}, [*cancelled]),
        "Tokens": _object({"tokens": _list(_COUNT, 0), "count": _COUNT}, ["tokens", "count"]),
        "Prompt": _object({"prompt": {"type": "string"}}, ["prompt"]),
        "Verified": _ANY,
    }
