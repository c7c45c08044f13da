"""Conversations over the API: found again, gone on from, forked, rewound, moved, compared."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load as load_tensors

from spikelm.generate import Engine
from spikelm_serve.keys import Keys, make
from spikelm_serve.shelf import Folder
from spikelm_serve.states import StateStore

Serve = Callable[..., httpx.Client]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def open_store(coded_engine: Engine, tmp_path: Path) -> Callable[..., StateStore]:
    def store(**options: Any) -> StateStore:
        like = coded_engine.model.initial_state(1)
        return StateStore("model", like, shelf=Folder(tmp_path / "states"), **options)

    return store


@pytest.fixture
def client(
    serve: Serve, coded_engine: Engine, open_store: Callable[..., StateStore]
) -> httpx.Client:
    return serve(coded_engine, store=open_store(), allow_upload=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def say(client: httpx.Client, messages: list[dict[str, str]], **fields: Any) -> Any:
    ask = {"messages": messages, "seed": 1, "max_tokens": 12, **fields}
    response = client.post(CHAT, json=ask)
    assert response.status_code == 200, response.text
    return response.json()


def answer(body: Any) -> dict[str, str]:
    content = body["choices"][0]["message"]["content"]
    return {"role": "assistant", "content": content}


def cached(body: Any) -> int:
    found: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_the_next_turn_reads_what_is_new(client: httpx.Client) -> None:
    first = say(client, [user("Hello there")])
    state = first["state"]
    assert (cached(first), first["cache_miss"]) == (0, "no_prefix")
    assert (state["messages"], state["role"], state["parent"] is not None) == (2, "assistant", True)
    assert state["bytes"] > 1000
    talk = [user("Hello there"), answer(first), user("And then?")]
    second = say(client, talk)
    assert cached(second) == state["tokens"]
    new = second["usage"]["prompt_tokens"] - cached(second)
    assert new == len("User: And then?\n\nAssistant:")
    # The same by name, with the new message alone.
    named = say(client, [user("And then?")], state={"from": state["id"]})
    assert named["choices"] == second["choices"]
    assert named["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]
    assert named["state"]["id"] == second["state"]["id"]
    # And without any state.
    cold = say(client, talk, state={"no_cache": True})
    assert cold["choices"] == second["choices"]
    assert (cached(cold), cold["cache_miss"], cold["state"]) == (0, "disabled", None)


def test_a_conversation_survives_a_restart(
    serve: Serve, coded_engine: Engine, open_store: Callable[..., StateStore]
) -> None:
    store = open_store()
    one = serve(coded_engine, store=store)
    first = say(one, [user("Hello there")])
    store.flush()
    talk = [user("Hello there"), answer(first), user("And then?")]
    expected = say(one, talk, state={"no_cache": True})
    other = serve(coded_engine, store=open_store())
    found = say(other, talk)
    assert cached(found) == first["state"]["tokens"]
    assert found["choices"] == expected["choices"]
    # Another model's states are not seen.
    stranger = StateStore("other", coded_engine.model.initial_state(1), shelf=store.shelf)
    third = serve(coded_engine, store=stranger)
    assert cached(say(third, talk)) == 0
    refused = third.post(
        CHAT, json={"messages": [user("x")], "state": {"from": first["state"]["id"]}}
    )
    assert refused.status_code == 400
    assert "belongs to model" in refused.json()["error"]["message"]


def test_rewinding_and_branching(client: httpx.Client) -> None:
    talk: list[dict[str, str]] = []
    states = []
    for i in range(6):
        talk.append(user(f"Message {i}"))
        body = say(client, talk)
        talk.append(answer(body))
        states.append(body["state"])
    newest = states[-1]["id"]
    for i in (5, 0, 3, 1):
        path = f"/v1/states/{newest}/rewind"
        back = client.post(path, json={"to_message": 2 * i + 2}).json()
        assert back == states[i]
        branch = say(client, [user("Otherwise")], state={"from": back["id"]}, seed=i)
        cold = [*talk[: 2 * i + 2], user("Otherwise")]
        expected = say(client, cold, state={"no_cache": True}, seed=i)
        assert branch["choices"] == expected["choices"]
    # After the question, before its answer: regenerate.
    asked = client.post(f"/v1/states/{newest}/rewind", json={"to_message": 9}).json()
    assert asked["role"] == "user"
    none = client.post(f"/v1/states/{newest}/rewind", json={"to_message": 99})
    assert none.status_code == 404
    assert none.json()["error"]["param"] == "to_message"


def test_rewinding_to_any_token(client: httpx.Client) -> None:
    ids = [256, *b"The quick brown fox jumps over the lazy dog"]
    body = client.post(COMPLETIONS, json={"prompt": ids, "max_tokens": 4, "seed": 0}).json()
    newest = body["state"]
    for tokens in (1, 5, len(ids), newest["tokens"] - 1, newest["tokens"]):
        back = client.post(f"/v1/states/{newest['id']}/rewind", json={"to_token": tokens})
        assert back.status_code == 200, back.text
        assert back.json()["tokens"] == tokens
        if tokens <= len(ids):
            ask = {"prompt": ids[tokens:], "max_tokens": 5, "seed": 3}
            ask = {k: v for k, v in ask.items() if v != []}
            branch = client.post(COMPLETIONS, json={**ask, "state": {"from": back.json()["id"]}})
            cold = {"prompt": ids, "max_tokens": 5, "seed": 3, "state": {"no_cache": True}}
            expected = client.post(COMPLETIONS, json=cold).json()
            assert branch.json()["choices"] == expected["choices"]
    for wrong in (0, -1, 10**6, "3", None):
        path = f"/v1/states/{newest['id']}/rewind"
        assert client.post(path, json={"to_token": wrong}).status_code == 400


def test_verifying(client: httpx.Client, coded_engine: Engine) -> None:
    first = say(client, [user("Hello there")])
    second = say(client, [user("More")], state={"from": first["state"]["id"]})
    found = client.post(f"/v1/states/{second['state']['id']}/verify", json={}).json()
    assert found["tokens"] == second["state"]["tokens"]
    if coded_engine.is_batch_invariant:
        assert (found["equal"], found["largest_difference"]) == (True, 0)
    else:
        assert found["largest_difference"] < 1e-3


def test_forks_names_and_deleting(client: httpx.Client) -> None:
    state = say(client, [user("Hello")], state={"save": True, "name": "start"})["state"]
    assert (state["saved"], state["name"]) == (True, "start")
    fork = client.post(f"/v1/states/{state['id']}/fork", json={"name": "branch"}).json()
    assert (fork["parent"], fork["name"], fork["saved"]) == (state["id"], "branch", False)
    names = {entry["name"] for entry in client.get("/v1/states").json()["data"]}
    assert {"start", "branch"} <= names
    one = say(client, [user("More")], state={"from": fork["id"]})
    other = say(client, [user("More")], state={"from": state["id"]})
    assert one["choices"] == other["choices"]
    assert one["state"]["id"] != other["state"]["id"]
    assert client.delete(f"/v1/states/{state['id']}").json()["deleted"]
    assert client.get(f"/v1/states/{state['id']}").status_code == 404
    assert client.get(f"/v1/states/{fork['id']}").json() == fork
    gone = client.post(CHAT, json={"messages": [user("x")], "state": {"from": state["id"]}})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "state_not_found")


def test_a_state_moves_to_another_server(
    client: httpx.Client, serve: Serve, coded_engine: Engine
) -> None:
    body = say(client, [user("Hello")], state={"return": "url"})
    data = client.get(body["state"]["url"])
    assert data.headers["content-type"] == "application/octet-stream"
    inline = say(client, [user("Hello")], state={"return": "inline"})["state"]
    assert (
        load_tensors(base64.b64decode(inline["data"])).keys() == load_tensors(data.content).keys()
    )
    like = coded_engine.model.initial_state(1)
    kind = {"Content-Type": "application/octet-stream"}
    closed = serve(coded_engine, store=StateStore("model", like))
    assert closed.post("/v1/states", content=data.content, headers=kind).status_code == 403
    other = serve(coded_engine, store=StateStore("model", like), allow_upload=True)
    taken = other.post("/v1/states", content=data.content, headers=kind)
    assert taken.status_code == 200, taken.text
    one = say(client, [user("More")], state={"from": body["state"]["id"]})
    two = say(other, [user("More")], state={"from": taken.json()["id"]})
    assert one["choices"] == two["choices"]
    # What was read before the last state is not in the file.
    for path, ask in (("rewind", {"to_token": 1}), ("verify", {})):
        unknown = other.post(f"/v1/states/{taken.json()['id']}/{path}", json=ask)
        assert unknown.status_code == 404, unknown.text
        assert "only the last" in unknown.json()["error"]["message"]
    bad = other.post("/v1/states", content=data.content[:-1], headers=kind)
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "state_refused")
    assert say(other, [user("More")], state={"from": taken.json()["id"]})["choices"]


def test_keys_own_their_states(serve: Serve, coded_engine: Engine, tmp_path: Path) -> None:
    made = {name: make(name) for name in ("ann", "bob")}
    path = tmp_path / "keys"
    path.write_text("# keys\n" + "\n".join(line for _, line in made.values()) + "\n")
    client = serve(coded_engine, keys=Keys.read(path), store=StateStore("model"))
    headers = {name: {"Authorization": f"Bearer {key}"} for name, (key, _) in made.items()}
    ask = {"messages": [user("Hello")], "max_tokens": 4, "seed": 0}
    first = client.post(CHAT, json=ask, headers=headers["ann"]).json()
    again = client.post(CHAT, json=ask, headers=headers["ann"]).json()
    other = client.post(CHAT, json=ask, headers=headers["bob"]).json()
    assert cached(again) > 0
    # Timing would tell what others asked.
    assert cached(other) == 0
    assert other["state"]["id"] != first["state"]["id"]
    mine = f"/v1/states/{first['state']['id']}"
    assert client.get(mine, headers=headers["ann"]).status_code == 200
    assert client.get(mine, headers=headers["bob"]).status_code == 404
    listed = client.get("/v1/states", headers=headers["bob"]).json()["data"]
    assert first["state"]["id"] not in {entry["id"] for entry in listed}
    salted = client.post(CHAT, json={**ask, "cache_salt": "x"}, headers=headers["ann"]).json()
    assert cached(salted) == 0


def test_a_template_that_rewrites_the_past_is_told(serve: Serve, coded_engine: Engine) -> None:
    from spikelm.template import ChatTemplate

    source = "{{ messages | length }}{% for m in messages %}{{ m.content }};{% endfor %}"
    client = serve(coded_engine, template=ChatTemplate(source), store=StateStore("model"))
    first = say(client, [user("Hello")])
    assert first["state"] is None
    kept = say(client, [user("Hello")])
    assert cached(kept) > 0
    talk = [user("Hello"), answer(first), user("More")]
    assert cached(say(client, talk)) == 0


def test_a_template_that_wants_the_user_last_answers(serve: Serve, coded_engine: Engine) -> None:
    from spikelm.template import ChatTemplate

    source = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('user comes last') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    client = serve(coded_engine, template=ChatTemplate(source), store=StateStore("model"))
    first = say(client, [user("Hello")])
    assert first["state"] is None
    talk = [user("Hello"), answer(first), user("More")]
    assert say(client, talk)["choices"]


def test_streamed_answers_end_with_their_state(client: httpx.Client) -> None:
    ask = {"messages": [user("Hello")], "max_tokens": 6, "seed": 1}
    whole = client.post(CHAT, json=ask).json()
    for options in (None, {"include_usage": True}):
        body = {**ask, "stream": True, "stream_options": options, "return_progress": True}
        text = client.post(CHAT, json=body).text
        *events, end = [e.removeprefix("data: ") for e in text.split("\n\n") if e]
        assert end == "[DONE]"
        last = json.loads(events[-1])
        assert last["state"] == whole["state"]
        assert last["timings"]["cache_n"] > 0
        progress = [json.loads(e).get("prompt_progress") for e in events]
        assert progress[0]["processed"] == progress[0]["total"]
