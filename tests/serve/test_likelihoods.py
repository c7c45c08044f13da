"""Logprobs, echo, biases and answers of a given form, against the model asked directly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from spikelm.generate import Engine
from spikelm.sampling import SamplingParams
from spikelm.tokenizer import Tokenizer
from spikelm_serve.constraint import Forms

Serve = Callable[..., httpx.Client]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}


@pytest.fixture
def client(serve: Serve, coded_engine: Engine) -> httpx.Client:
    return serve(coded_engine)


def complete(client: httpx.Client, **fields: Any) -> Any:
    response = client.post(COMPLETIONS, json={"max_tokens": 5, "seed": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def scored(engine: Engine, ids: list[int]) -> list[float]:
    """The logprob of each token but the first."""
    logits, state = engine.prefill(ids[:1])
    found = []
    for token in ids[1:]:
        found.append(float(logits[0].log_softmax(-1)[token]))
        logits, state = engine.step(torch.tensor([token]), state)
    return found


def test_echo_scores_the_prompt(client: httpx.Client, coded_engine: Engine) -> None:
    ids = [256, *b"Hello wor"]
    choice = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    found = choice["logprobs"]
    assert {len(values) for values in found.values()} == {len(ids) + 1}
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    expected = scored(coded_engine, ids)
    assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    assert found["tokens"][1:4] == ["H", "e", "l"]
    assert found["text_offset"][-3:] == [7, 8, 9]
    # The last one was chosen: it is the likeliest.
    assert max(found["top_logprobs"][-1].values()) == found["token_logprobs"][-1]
    # A text has a beginning that is no part of it.
    text = complete(client, prompt="Hello wor", echo=True, logprobs=0, max_tokens=1, temperature=0)
    assert text["text"].startswith("Hello wor")
    assert text["logprobs"]["token_logprobs"][:-1] == pytest.approx(expected, abs=1e-4)
    assert text["logprobs"]["text_offset"][0] == 0


def test_scores_do_not_depend_on_what_is_kept(client: httpx.Client) -> None:
    ask = {"prompt": "Once upon a time", "echo": True, "logprobs": 2, "temperature": 0}
    first = complete(client, **ask)
    complete(client, prompt="Once upon")
    assert complete(client, **ask) == first


def test_logprobs_of_answers(client: httpx.Client) -> None:
    plain = complete(client, prompt="Hello", logprobs=3)
    assert len(plain["logprobs"]["tokens"]) == 5
    assert "".join(t for t in plain["logprobs"]["tokens"] if not t.startswith("bytes:")) in (
        plain["text"].replace("\ufffd", "")
    )
    for logprob, top in zip(
        plain["logprobs"]["token_logprobs"], plain["logprobs"]["top_logprobs"], strict=True
    ):
        assert logprob in top.values()
        assert 3 <= len(top) <= 4
    body = client.post(CHAT, json={**ASK, "logprobs": True, "top_logprobs": 2}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"]
    for each in content:
        assert len(each["top_logprobs"]) == 2
        assert each["logprob"] <= each["top_logprobs"][0]["logprob"] <= 0
        assert bytes(each["bytes"]).decode(errors="replace") == each["token"]
    stream = client.post(CHAT, json={**ASK, "logprobs": True, "top_logprobs": 2, "stream": True})
    chunks = [
        json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")
    ]
    streamed = [
        each
        for chunk in chunks
        if chunk["choices"] and chunk["choices"][0]["logprobs"]
        for each in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


def test_biases(client: httpx.Client) -> None:
    choice = complete(client, prompt="Hello", logit_bias={"97": 100}, temperature=0)
    assert choice["text"] == "aaaaa"
    plain = complete(client, prompt="Hello", temperature=0, max_tokens=1, logprobs=0)
    banned = {str(t): -100 for t in range(256) if chr(t) not in "xy"}
    other = complete(client, prompt="Hello", logit_bias=banned, max_tokens=20)
    assert set(other["text"]) <= {"x", "y"}
    assert plain["logprobs"]["tokens"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_of_a_given_form(client: httpx.Client) -> None:
    long = {"max_tokens": 200, "temperature": 0.9}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(3):
        fields = {**ASK, **long, "seed": seed, "response_format": wanted}
        choice = client.post(CHAT, json=fields).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        text = choice["message"]["content"]
        found = json.loads(text)
        assert json.dumps(found, separators=(",", ":"), ensure_ascii=False) == text
        assert found.keys() == {"name", "age"}
        assert 0 <= found["age"] <= 150
    pattern = r"[a-c]{3}-[0-9]{2,4}"
    text = complete(client, prompt="x", structured_outputs={"regex": pattern}, **long)["text"]
    assert re.fullmatch(pattern, text)
    texts = ["yes", "no", 'say "caf\u00e9"\n']
    found_texts = {
        complete(client, prompt="x", structured_outputs={"choice": texts}, **{**long, "seed": i})[
            "text"
        ]
        for i in range(12)
    }
    assert found_texts <= set(texts)
    assert len(found_texts) > 1


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a"},
        {"regex": "(" * 500 + "a" + "){50}" * 500},
        {"json": {"type": "no such type"}},
        {"json": {"$ref": "https://example.com/x"}},
        {"json": {"type": "string", "pattern": "(a" * 50}},
    ],
)
def test_forms_that_are_not_served(client: httpx.Client, form: Any) -> None:
    ask = {"prompt": "x", "max_tokens": 4, "structured_outputs": form}
    response = client.post(COMPLETIONS, json=ask)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"]
    assert client.get("/health").status_code == 200


def test_a_form_ends_where_nothing_can_follow() -> None:
    tokenizer = Tokenizer.train_bpe(["yes no yes no maybe"] * 20, 280)
    form = Forms(tokenizer).choice(["yes"])()
    said = b""
    for _ in range(10):
        allowed = form.allowed().nonzero()[:, 0].tolist()
        if allowed == [tokenizer.eos_id]:
            break
        token = allowed[-1]
        said += tokenizer.decode_bytes([token])
        form.push(token)
    assert said == b"yes"


def test_biased_parameters_are_checked() -> None:
    with pytest.raises(Exception, match="logit_bias"):
        SamplingParams(logit_bias={3: 101.0})


def test_tokenize_and_back(client: httpx.Client) -> None:
    text = "caf\u00e9 <|endoftext|>"
    found = client.post("/tokenize", json={"prompt": text}).json()
    assert found == {"tokens": list(text.encode()), "count": len(text.encode())}
    special = client.post("/tokenize", json={"prompt": text, "parse_special": True}).json()
    assert special["tokens"][-1] == 256
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": ASK["messages"]}).json()
    assert chat["tokens"] == [256, *b"User: hi\n\nAssistant:"]
    for path, bad in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/detokenize", {"tokens": [257]}),
        ("/detokenize", {"tokens": "a"}),
    ):
        assert client.post(path, json=bad).status_code == 400
