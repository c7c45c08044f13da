"""Tools: offered to the model by its template, called in what it writes, answered by the client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikelm.generate import Engine
from spikelm.template import ChatTemplate
from spikelm_serve import tools
from spikelm_serve.states import StateStore
from spikelm_serve.tools import CallReader, Tool, Tools, read_answer

Serve = Callable[..., httpx.Client]
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TEMPLATE = """\
{%- if tools %}[tools]
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ "\\n" if m.content else "" }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "description": "What time it is."}},
]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
OFFERED = Tools(
    tools=tuple(Tool(name=name, description="", parameters={}) for name in ("weather", "time"))
)


@pytest.fixture
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE)


def ask(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "tools": TOOLS, "max_tokens": 400, **fields}


def official(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("said", "content", "names"),
    [
        (ROME, None, ["weather"]),
        (f"Let me see.\n{ROME}\n{TIME}", "Let me see.", ["weather", "time"]),
        (f"{TIME} That is all.", "That is all.", ["time"]),
        ("A plain <b>answer</b>", "A plain <b>answer</b>", []),
        (ROME[:-3], ROME[:-3], []),
        (ROME.replace("Rome", 'Ro"me'), ROME.replace("Rome", 'Ro"me'), []),
        (ROME.replace('"weather"', '"shell"'), ROME.replace('"weather"', '"shell"'), []),
        ('<tool_call>["time"]</tool_call>', '<tool_call>["time"]</tool_call>', []),
    ],
)
def test_calls_and_text(
    serve: Serve, make_engine: Any, template: ChatTemplate, said: str, content: Any, names: Any
) -> None:
    client = serve(make_engine(said), template=template)
    [choice] = client.post(CHAT, json=ask()).json()["choices"]
    message = choice["message"]
    assert message["content"] == content
    calls = message.get("tool_calls", [])
    assert [call["function"]["name"] for call in calls] == names
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    if "weather" in names:
        assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Rome", "days": 2}
    assert len({call["id"] for call in calls}) == len(calls)
    events = client.post(CHAT, json=ask(stream=True)).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
    told = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in told] == list(range(len(names)))
    assert [call["function"] for call in told] == [call["function"] for call in calls]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_one_call_where_only_one_is_wanted(
    serve: Serve, make_engine: Any, template: ChatTemplate
) -> None:
    client = serve(make_engine(f"{ROME}\n{TIME}"), template=template)
    body = client.post(CHAT, json=ask(parallel_tool_calls=False)).json()
    message = body["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]
    assert message["content"] == TIME


PIECES = [ROME, TIME, "<tool_call>", "</tool_call>", "<tool", "{}", " ", "\n", "word", "<"]


@given(st.lists(st.sampled_from(PIECES), max_size=6), st.lists(st.integers(0, 300), max_size=8))
def test_pieces_make_no_difference(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    said, calls = read_answer(text, OFFERED)
    reader, heard = CallReader(OFFERED), ""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for begin, end in itertools.pairwise(edges):
        more, _ = reader.push(text[begin:end])
        heard += more
    heard += reader.end()
    assert (heard, [call.name for call in reader.calls]) == (said, [call.name for call in calls])
    # Nothing but calls and the space around them is gone.
    if not calls:
        assert said == text


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_call_that_is_too_long_is_text(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(tools, "MAX_CALL", 50)
    long = ROME.replace("Rome", "R" * 60)
    text = f"a {long} b {TIME} c {ROME[:-5]}" + "x" * 60 + TIME
    reader = CallReader(OFFERED)
    said = "".join(reader.push(text[i : i + piece])[0] for i in range(0, len(text), piece))
    said += reader.end()
    assert [call.name for call in reader.calls] == ["time", "time"]
    assert said.startswith(f"a {long} b")
    assert "x" * 60 in said


def test_a_conversation_with_a_tool_goes_on(
    serve: Serve, make_engine: Any, template: ChatTemplate
) -> None:
    engine = make_engine(f"I look.\n{ROME}")
    client = serve(engine, template=template, store=StateStore("model"))
    assert client.get("/v1/models").json()["data"][0]["tools"]
    api = official(client)
    talk: list[Any] = [{"role": "user", "content": "Weather?"}]
    offered: Any = TOOLS
    first = api.chat.completions.create(model="tiny", messages=talk, tools=offered, max_tokens=200)
    answer = first.choices[0].message
    assert answer.tool_calls
    told = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "Sunny"}
    engine.prompts.clear()
    more = api.chat.completions.create(
        model="tiny", messages=[*talk, answer, told], tools=offered, max_tokens=4
    )
    # What the server wrote down is what the client sends: the new message alone is read.
    assert b"".join(map(bytes, engine.prompts)).startswith(b"[tool]Sunny[assistant]")
    assert more.usage is not None
    # The tools are part of what was read.
    engine.prompts.clear()
    client.post(CHAT, json={"messages": talk, "max_tokens": 1})
    assert bytes(engine.prompts[0][1:]).startswith(b"[user]")
    none = {"messages": talk, "tools": TOOLS, "tool_choice": "none"}
    usage = client.post(CHAT, json=none).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_streams_of_the_official_client(
    serve: Serve, make_engine: Any, template: ChatTemplate
) -> None:
    api = official(serve(make_engine(f"I look.\n{ROME}\n{TIME}"), template=template))
    with api.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": "Weather?"}],
        tools=TOOLS,  # type: ignore[arg-type]
        max_tokens=300,
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "I look."
    assert [call.function.name for call in message.tool_calls or []] == ["weather", "time"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_call_that_must_be(
    serve: Serve, coded_engine: Engine, template: ChatTemplate, choice: Any, names: set[str]
) -> None:
    client = serve(coded_engine, template=template)
    for seed in range(4):
        body = client.post(CHAT, json=ask(tool_choice=choice, seed=seed)).json()
        message = body["choices"][0]["message"]
        [call] = message["tool_calls"]
        assert message["content"] is None
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            assert arguments["city"] in ("Rome", "Oslo")
            assert arguments["days"] <= 9


def test_schemas_with_references(
    serve: Serve, coded_engine: Engine, template: ChatTemplate
) -> None:
    place = {"type": "object", "properties": {"at": {"enum": [1, 2]}}, "required": ["at"]}
    nested = {
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/Place"}, "to": {"$ref": "#/$defs/Place"}},
        "required": ["from", "to"],
        "additionalProperties": False,
        "$defs": {"Place": {**place, "additionalProperties": False}},
    }
    offered = [{"type": "function", "function": {"name": "go", "parameters": nested}}]
    body = ask(tools=offered, tool_choice="required", seed=1)
    client = serve(coded_engine, template=template)
    [call] = client.post(CHAT, json=body).json()["choices"][0]["message"]["tool_calls"]
    found = json.loads(call["function"]["arguments"])
    assert found["from"]["at"] in (1, 2)
    assert found["to"]["at"] in (1, 2)


@pytest.fixture
def noise_with_tools(serve: Serve, make_engine: Any, template: ChatTemplate) -> httpx.Client:
    return serve(make_engine(), template=template)


CALL = {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools", {"tools": {}}),
        ("tools", {"tools": 1}),
        ("tools", {"tools": TOOLS * 33}),
        ("tools", {"tools": TOOLS * 2}),
        ("tools[0]", {"tools": [1]}),
        ("tools[0]", {"tools": [{"type": "web_search"}]}),
        ("tools[0]", {"tools": [FLAT[0]]}),
        ("tools[0].name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools[0].name", {"tools": [{"type": "function", "function": {}}]}),
        (
            "tools[0].parameters",
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]},
        ),
        (
            "tools[0].description",
            {"tools": [{"type": "function", "function": {"name": "a", "description": 1}}]},
        ),
        (
            "tools",
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}
                ],
            },
        ),
        ("tool_choice", {"tool_choice": "any"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": []}}),
        ("tool_choice", {"tools": [], "tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "required", "response_format": {"type": "json_object"}}),
        ("parallel_tool_calls", {"parallel_tool_calls": 1}),
        ("messages[0].tool_calls", {"messages": [{"role": "user", "tool_calls": [CALL]}]}),
        ("messages[0].tool_calls", {"messages": [{"role": "assistant", "tool_calls": CALL}]}),
        ("messages[0].tool_calls[0]", {"messages": [{"role": "assistant", "tool_calls": [1]}]}),
        (
            "messages[0].tool_calls[0].function.name",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": ""}}]}]},
        ),
    ],
)
def test_what_is_refused(noise_with_tools: httpx.Client, param: str, fields: Any) -> None:
    refused = noise_with_tools.post(CHAT, json={**ask(), **fields})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "has no tools"),
        (TEMPLATE.replace("tool_call>", "function>"), "its own way to call tools"),
    ],
)
def test_templates_without(
    serve: Serve, make_engine: Any, source: str | None, message: str
) -> None:
    client = serve(make_engine("Yes."), template=ChatTemplate(source))
    refused = client.post(CHAT, json=ask())
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]
    assert client.post(CHAT, json=ask(tool_choice="none")).status_code == 200
    told = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]
    told.append({"role": "tool", "tool_call_id": "a", "content": "b"})
    refused = client.post(CHAT, json={"messages": told})
    assert message in refused.json()["error"]["message"]
    assert client.post(CHAT, json=ask(tools=[])).status_code == 200
    assert not client.get("/v1/models").json()["data"][0]["tools"]
    refused = client.post("/v1/completions", json={"prompt": "x", "tools": TOOLS})
    assert refused.json()["error"]["param"] == "tools"


def events_of(text: str) -> Iterator[dict[str, Any]]:
    for event in text.split("\n\n")[:-1]:
        yield json.loads(event.partition("data: ")[2])


def test_responses_with_tools(serve: Serve, make_engine: Any, template: ChatTemplate) -> None:
    engine = make_engine(f"I look.\n{ROME}\n{TIME}")
    client = serve(engine, template=template, store=StateStore("model"))
    fields = {"input": "Weather?", "tools": FLAT, "max_output_tokens": 300}
    body = client.post(RESPONSES, json=fields).json()
    assert [item["type"] for item in body["output"]] == [
        "message",
        "function_call",
        "function_call",
    ]
    assert body["output"][0]["content"][0]["text"] == "I look."
    assert [item["name"] for item in body["output"][1:]] == ["weather", "time"]
    assert [tool["name"] for tool in body["tools"]] == ["weather", "time"]
    assert body["tool_choice"] == "auto"
    # The rest of the conversation, with an answer of the tool's.
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "Sunny"}
        for item in body["output"][1:]
    ]
    engine.prompts.clear()
    more = {**fields, "input": results, "previous_response_id": body["id"]}
    assert client.post(RESPONSES, json=more).status_code == 200
    assert b"".join(map(bytes, engine.prompts)).startswith(b"[tool]Sunny[tool]Sunny[assistant]")
    # The same with everything sent again.
    engine.prompts.clear()
    first = {"role": "user", "content": "Weather?"}
    whole = {**fields, "input": [first, *body["output"], *results]}
    assert client.post(RESPONSES, json=whole).status_code == 200
    streamed = list(events_of(client.post(RESPONSES, json={**fields, "stream": True}).text))
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    done = [e["item"] for e in streamed if e["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["message", "function_call", "function_call"]
    assert streamed[-1]["response"]["output"] == done
    arguments = [
        e["arguments"] for e in streamed if e["type"] == "response.function_call_arguments.done"
    ]
    assert arguments == [item["arguments"] for item in body["output"][1:]]
    api = official(client)
    with api.responses.stream(model="tiny", input="Weather?", tools=FLAT) as stream:  # type: ignore[arg-type]
        final = stream.get_final_response()
    assert final.output[1].type == "function_call"


def test_responses_refuse_what_is_no_item(noise_with_tools: httpx.Client) -> None:
    for param, item in (
        ("input[0]", 1),
        ("input[0][0]", {"type": "function_call", "name": "a"}),
        ("input[0].content", {"type": "function_call_output", "output": 1}),
        ("input[0].role", {"type": "reasoning"}),
    ):
        refused = noise_with_tools.post(RESPONSES, json={"input": [item]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 2}),
        ("conversation", {"conversation": "c"}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("include", {"include": ["x"]}),
        ("reasoning", {"reasoning": {"effort": "low"}}),
        ("truncation", {"truncation": "auto"}),
        ("max_tokens", {"max_tokens": 3}),
        ("return_spikes", {"return_spikes": True}),
        ("stream_options", {"stream": True, "stream_options": {"resumeable": True}}),
    ],
)
def test_responses_refuse_what_they_do_not_serve(
    noise_with_tools: httpx.Client, param: str, fields: dict[str, Any]
) -> None:
    refused = noise_with_tools.post(RESPONSES, json={"input": "x", **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_what_is_not_to_be_stored_is_not_kept(
    serve: Serve, make_engine: Any, template: ChatTemplate
) -> None:
    store = StateStore("model")
    client = serve(make_engine("Yes."), template=template, store=store)
    body = client.post(RESPONSES, json={"input": "Hi", "store": False}).json()
    assert body["state"] is None
    assert store.num_kept == 0
    assert client.post(RESPONSES, json={"input": "Hi"}).json()["state"]
    assert store.num_kept
