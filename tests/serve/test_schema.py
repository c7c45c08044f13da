"""What is accepted, and that everything else is refused with the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikelm.errors import RequestError
from spikelm_serve.schema import (
    ChatRequest,
    Form,
    Message,
    StateOptions,
    parse_chat,
    parse_completion,
)

VOCAB = 257
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps({"prompt": "x", **fields}).encode(), VOCAB)


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({**CHAT, **fields}).encode(), VOCAB)


def test_defaults() -> None:
    request = completion()
    assert request.prompts == ("x",)
    assert not request.echo
    options = request.options
    assert (options.model, options.n, options.stream, options.stop) == (None, 1, False, ())
    assert (options.params.max_tokens, options.params.temperature) == (16, 1.0)
    assert chat().options.params.max_tokens == 256


def test_all_fields() -> None:
    options = completion(
        model="m",
        max_tokens=5,
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=2,
        seed=-4,
        stop="end",
        n=3,
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
        unheard_of={"a": [1]},
    ).options
    assert options.params.max_tokens == 7
    assert options.params.temperature == 0
    assert (options.params.top_k, options.params.seed) == (3, -4)
    assert (options.stop, options.n, options.stream, options.include_usage) == (
        ("end",),
        3,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ("",)),
        ([1, 2, 256], ((1, 2, 256),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts, "name": "me"},
    ]
    assert chat(messages=messages).messages == (
        Message(role="system", content="be brief"),
        Message(role="user", content="ab"),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"logprobs": False},
        {"logprobs": None},
        {"best_of": 1},
        {"tools": []},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"stop": None},
        {"stop": []},
        {"stream_options": None},
    ],
)
def test_values_that_ask_for_nothing(fields: Any) -> None:
    assert completion(**fields).options == completion().options


BAD_FIELDS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", 3),
    ("prompt", []),
    ("prompt", {}),
    ("prompt", [""] * 17),
    ("prompt", [1, "a"]),
    ("prompt", [-1]),
    ("prompt", [257]),
    ("prompt", [2**70]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", [[1], [257]]),
    ("prompt", [[]]),
    ("model", 3),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("max_tokens", 2**63),
    ("max_completion_tokens", 0),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", False),
    ("min_p", -1),
    ("typical_p", 2),
    ("penalty_decay", -0.5),
    ("sse_ping_interval", 0.5),
    ("sse_ping_interval", True),
    ("return_spikes", 1),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", []),
    ("seed", 2**63),
    ("seed", 0.5),
    ("stop", ""),
    ("stop", 1),
    ("stop", ["a"] * 17),
    ("stop", ["a", 1]),
    ("stop", "a" * 257),
    ("n", 0),
    ("n", 17),
    ("n", 2**64),
    ("n", 1.5),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("echo", 1),
    ("logprobs", True),
    ("logprobs", -1),
    ("logprobs", 21),
    ("best_of", 2),
    ("suffix", "tail"),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"257": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"\u0665": 1}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"5": None}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("logit_bias", [5]),
    ("priority", 1.5),
    ("priority", 2**64),
    ("deadline_ms", 0),
    ("deadline_ms", 2**40),
    ("cache_salt", 3),
    ("cache_salt", "a" * 201),
    ("return_progress", 1),
    ("state", "st_1"),
    ("state", {"form": "st_1"}),
    ("state.from", 3),
    ("state.save", 1),
    ("state.name", ["a"]),
    ("state.return", "file"),
    ("structured_outputs", {}),
    ("structured_outputs", {"json": {}, "regex": "a"}),
    ("structured_outputs", {"grammar": "a"}),
    ("structured_outputs.regex", ""),
    ("structured_outputs.regex", "a" * 10_001),
    ("structured_outputs.json", "{}"),
    ("structured_outputs.choice", []),
    ("structured_outputs.choice", ["a", 1]),
    ("tools", [{}]),
    ("functions", [{}]),
    ("tool_choice", "required"),
    ("response_format", {"type": "xml"}),
    ("response_format", "json"),
    ("response_format.json_schema", {"type": "json_schema"}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_fields_are_named(name: str, value: Any) -> None:
    field, _, part = name.partition(".")
    nested = {field: {part: value}} if part and field != "response_format" else {field: value}
    with pytest.raises(RequestError) as info:
        completion(**nested)
    assert info.value.status == 400
    assert info.value.param == name
    assert len(str(info.value)) < 300


def test_our_fields() -> None:
    options = completion(
        logprobs=0,
        logit_bias={"5": -100, "6": 0.5},
        structured_outputs={"choice": ["a", "b"]},
        state={"from": "st_x", "save": True, "name": "mine", "return": "url"},
        cache_salt="s",
        priority=-3,
        deadline_ms=50,
        return_progress=True,
    ).options
    assert options.num_top == 0
    assert options.params.logit_bias == {5: -100, 6: 0.5}
    assert options.form == Form(kind="choice", value=("a", "b"))
    wanted = StateOptions(start="st_x", save=True, name="mine", returns="url")
    assert (options.state, options.cache_salt) == (wanted, "s")
    assert (options.priority, options.deadline_ms, options.progress) == (-3, 50, True)
    assert chat(logprobs=True, top_logprobs=20).options.num_top == 20
    assert chat(response_format={"type": "json_object"}).options.form == Form(
        kind="json", value={"type": "object"}
    )
    for fields in ({"top_logprobs": 5}, {"logprobs": True, "top_logprobs": 21}):
        with pytest.raises(RequestError, match="top_logprobs"):
            chat(**fields)
    with pytest.raises(RequestError, match="no_cache"):
        completion(state={"no_cache": True, "save": True})


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user", "content": ""}] * 10_001, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role"),
        ([{"role": ["user"], "content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([*CHAT["messages"], {"role": "user", "content": 3}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
    ],
)
def test_bad_messages_are_named(messages: Any, param: str) -> None:
    with pytest.raises(RequestError) as info:
        chat(messages=messages)
    assert (info.value.status, info.value.param) == (400, param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted({name for name, _ in BAD_FIELDS} | {"messages", "user"}))


@given(fields=st.dictionaries(NAMES, JSON, max_size=4))
def test_any_fields_are_parsed_or_refused(fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "x", **CHAT, **fields}).encode()
    for parse in (parse_chat, parse_completion):
        refusal = None
        try:
            parse(body, VOCAB)
        except RequestError as error:
            refusal = error
        assert refusal is None or refusal.status == 400
        json.dumps(str(refusal), ensure_ascii=False).encode()
