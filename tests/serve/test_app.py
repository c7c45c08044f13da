"""The server over real sockets: routes, answers, streams, errors and limits."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.sampling import SamplingParams
from spikelm.template import ChatTemplate

Serve = Callable[..., httpx.Client]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def events(response: httpx.Response) -> Iterator[Any]:
    """An SSE parser that accepts exactly what the format allows."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, end = response.read().decode().split("\n\n")
    assert end == ""
    assert blocks.pop() == "data: [DONE]"
    for block in blocks:
        assert block.startswith("data: ")
        assert "\n" not in block
        yield json.loads(block.removeprefix("data: "))


def text_of(choice: Any) -> str:
    found = choice.get("text", choice.get("message", choice.get("delta")))
    return found if isinstance(found, str) else found.get("content", "")


def test_health_and_models(noise: httpx.Client) -> None:
    assert noise.get("/health").json() == {"status": "ok"}
    listed = noise.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny", "model", "spikelm")
    assert noise.get("/v1/models/tiny").json() == card


def test_completion(serve: Serve, make_engine: Any) -> None:
    engine = make_engine("Hello, w\u00f6rld")
    body = serve(engine).post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 99}).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert abs(body["created"] - time.time()) < 60
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {"index": 0, "text": "Hello, w\u00f6rld", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 14,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["timings"]["predicted_per_second"] > 0
    assert body["timings"]["prompt_ms"] > 0
    assert body["state_bytes"] == 16
    # What comes after is read behind the answer, for whoever goes on from it.
    assert engine.prompts[0] == [256, 97, 98]


def test_chat(serve: Serve, make_engine: Any) -> None:
    engine = make_engine(" Good day.\n\nUser: and now?")
    body = serve(engine).post(CHAT, json=ASK).json()
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Good day.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    read = [token for part in engine.prompts for token in part]
    assert read == [256, *b"User: hi\n\nAssistant: Good day.\n\n"]


def test_finish_reason_length_and_echo(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine("abcdef"))
    ask = {"prompt": [120, 121], "max_tokens": 2, "echo": True}
    [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("xyab", "length")


def test_several_prompts_and_choices(noise: httpx.Client) -> None:
    ask = {"prompt": ["a", "b"], "n": 2, "seed": 1, "max_tokens": 12}
    body = noise.post(COMPLETIONS, json=ask).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 48
    alone = {"prompt": "b", "seed": 2, "max_tokens": 12}
    expected = noise.post(COMPLETIONS, json=alone).json()["choices"][0]["text"]
    assert body["choices"][3]["text"] == expected


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"seed": 2, "n": 3},
        {"seed": 3, "stop": ["th", "e", "\ufffd "]},
        {"temperature": 0, "frequency_penalty": 1.5},
        {"seed": 4, "top_k": 5, "min_p": 0.01, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
)
def test_stream_equals_whole(noise: httpx.Client, route: str, fields: Any) -> None:
    ask = {"prompt": "x", **ASK, "max_tokens": 60, **fields}
    whole = noise.post(route, json=ask).json()
    chunks = list(events(noise.post(route, json={**ask, "stream": True})))
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(map(text_of, mine)) == text_of(choice)
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "usage" not in chunks[-1]


def test_a_silent_stream_has_comments(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine("a", delay=2))
    for route, fields in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/completions", {"prompt": "x", "stream_options": {"resumable": True}}),
    ):
        ask = {**fields, "stream": True, "sse_ping_interval": 1}
        assert ": ping\n\n" in client.post(route, json=ask).text


def test_streamed_usage(noise: httpx.Client) -> None:
    ask = {**ASK, "max_tokens": 7, "seed": 1}
    whole = noise.post(CHAT, json=ask).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(noise.post(CHAT, json={**ask, **options}))
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert last["state_bytes"] == whole["state_bytes"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert chunks[0]["object"] == "chat.completion.chunk"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("STOP", "one two S ST STO "),
        (["nothing", "ST STO"], "one two S "),
        (["o", "one"], ""),
        ("\u00e9", "one two S ST STO STOP caf"),
        ("STOPX", "one two S ST STO STOP caf\u00e9 end"),
    ],
)
def test_stop_strings_over_chunk_borders(
    serve: Serve, make_engine: Any, stop: Any, text: str
) -> None:
    client = serve(make_engine("one two S ST STO STOP caf\u00e9 end"))
    ask = {"prompt": "", "max_tokens": 99, "stop": stop}
    [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    streamed = list(events(client.post(COMPLETIONS, json={**ask, "stream": True})))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text


def test_server_text_is_engine_text(serve: Serve, tiny_engine: Engine) -> None:
    client = serve(tiny_engine)
    params = SamplingParams(max_tokens=40, seed=3)
    ids = prompt_ids(tiny_engine.tokenizer, "import os")
    expected = "".join(chunk.text for chunk in stream_text(tiny_engine, ids, params))
    ask = {"prompt": "import os", "max_tokens": 40, "seed": 3}
    assert client.post(COMPLETIONS, json=ask).json()["choices"][0]["text"] == expected

    text = ChatTemplate().render(ASK["messages"])
    ids = prompt_ids(tiny_engine.tokenizer, text)
    expected = "".join(c.text for c in stream_text(tiny_engine, ids, params, ["\nUser:"]))
    body = client.post(CHAT, json={**ASK, "max_tokens": 40, "seed": 3}).json()
    assert body["choices"][0]["message"]["content"] == expected.strip()
    assert body["state_bytes"] == tiny_engine.model.zero_state(1).nbytes


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None) -> str:
    assert response.status_code == status
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "param", "code"),
    [
        ("POST", COMPLETIONS, "{}", 400, "prompt", None),
        ("POST", COMPLETIONS, '{"prompt": 1}', 400, "prompt", None),
        ("POST", COMPLETIONS, '{"prompt": [257]}', 400, "prompt", None),
        ("POST", COMPLETIONS, '{"prompt": "", "n": 17}', 400, "n", None),
        ("POST", COMPLETIONS, '{"prompt": "", "temperature": 9}', 400, "temperature", None),
        ("POST", COMPLETIONS, '{"prompt": "", "logprobs": 21}', 400, "logprobs", None),
        ("POST", COMPLETIONS, '{"prompt": "", "temperature": NaN}', 400, None, None),
        ("POST", COMPLETIONS, '{"prompt": "\\ud800"}', 400, None, None),
        ("POST", COMPLETIONS, "[" * 10**5, 400, None, None),
        ("POST", COMPLETIONS, "null", 400, None, None),
        ("POST", COMPLETIONS, '{"prompt": "", "model": "b"}', 404, "model", "model_not_found"),
        ("POST", CHAT, "{}", 400, "messages", None),
        ("POST", CHAT, '{"messages": [{"role": "x"}]}', 400, "messages[0].role", None),
        ("POST", CHAT, "nonsense", 400, None, None),
        ("GET", "/v1/models/other/one", "", 404, "model", "model_not_found"),
        ("GET", "/v1/nothing", "", 404, None, "not_found"),
        ("GET", "/static/other.js", "", 404, None, "not_found"),
        ("GET", COMPLETIONS, "", 405, None, None),
        ("POST", "/health", "", 405, None, None),
        ("DELETE", CHAT, "", 405, None, None),
    ],
)
def test_error_bodies(
    noise: httpx.Client,
    method: str,
    path: str,
    content: str,
    status: int,
    param: str | None,
    code: str | None,
) -> None:
    headers = {"Content-Type": "application/json"}
    response = noise.request(method, path, content=content.encode(), headers=headers)
    check_error(response, status, param, code)
    assert noise.get("/health").status_code == 200


def test_other_content_types_are_refused(noise: httpx.Client) -> None:
    for headers in ({}, {"Content-Type": "text/plain"}):
        response = noise.post(COMPLETIONS, content=b'{"prompt": ""}', headers=headers)
        assert "application/json" in check_error(response, 400, None, None)
    charset = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert noise.post(COMPLETIONS, content=b'{"prompt": ""}', headers=charset).is_success


def test_body_limit(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine("ok"), max_body_bytes=1000)
    prefix = b'{"prompt": "'
    fitting = prefix + b"x" * (1000 - len(prefix) - 2) + b'"}'
    headers = {"Content-Type": "application/json"}
    assert client.post(COMPLETIONS, content=fitting, headers=headers).is_success
    response = client.post(COMPLETIONS, content=fitting + b" ", headers=headers)
    assert "1000 bytes" in check_error(response, 413, None, "body_too_large")
    assert client.get("/health").is_success


def test_endless_body_is_cut_off(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine("ok"), max_body_bytes=100_000)
    host, port = client.base_url.host, client.base_url.port
    for head in (b"Content-Length: 99999999999", b"Transfer-Encoding: chunked"):
        with socket.create_connection((host, port or 0), 10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n" + head + b"\r\n\r\n"
            )
            if head.endswith(b"chunked"):
                # 16 KiB a piece; the server must hang up long before the last.
                piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
                with pytest.raises(ConnectionError):
                    connection.sendall(piece * 2000)
            else:
                assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert client.get("/health").is_success


def test_foreign_hosts_are_refused(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine("ok"), hosts={"localhost", "127.0.0.1", "::1"})
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000"):
        assert client.get("/health", headers={"Host": host}).is_success
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8000", "[::1"):
        response = client.get("/v1/models", headers={"Host": host})
        check_error(response, 403, None, "host_not_allowed")


def test_concurrent_requests_equal_sequential_ones(noise: httpx.Client) -> None:
    asks = [{"prompt": f"p{i}", "seed": i, "max_tokens": 20} for i in range(12)]

    def ask(fields: Any) -> str:
        return str(noise.post(COMPLETIONS, json=fields).json()["choices"][0]["text"])

    sequential = [ask(fields) for fields in asks]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asks)) == sequential


def test_health_answers_during_generation(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine(delay=0.02))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, COMPLETIONS, json={"prompt": "", "max_tokens": 30})
        checks = 0
        while not answer.done():
            start = time.perf_counter()
            assert client.get("/health").is_success
            assert time.perf_counter() - start < 0.5
            checks += 1
    assert answer.result().is_success
    assert checks > 5


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_engine(serve: Serve, make_engine: Any, stream: bool) -> None:
    engine = make_engine(delay=0.01)
    client = serve(engine)
    endless = {"max_tokens": 100_000, "logit_bias": {"256": -100}}
    ask = json.dumps({"prompt": "", "stream": stream, **endless}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(ask) + ask
        )
        while engine.steps < 5:
            time.sleep(0.01)
    start = time.perf_counter()
    assert client.post(COMPLETIONS, json={"prompt": "", "max_tokens": 2}).is_success
    assert time.perf_counter() - start < 2
    assert engine.steps < 200


@pytest.mark.parametrize("stream", [False, True])
def test_engine_failure_is_one_requests_failure(
    serve: Serve, make_engine: Any, stream: bool
) -> None:
    engine = make_engine()
    client = serve(engine)
    ask = {"prompt": "", "stream": stream, "temperature": 0}
    expected = client.post(COMPLETIONS, json={**ask, "stream": False}).json()["choices"]
    engine.error = ZeroDivisionError("the secret reason")
    response = client.post(COMPLETIONS, json=ask)
    if stream:
        error = list(events(response))[-1]["error"]
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
    else:
        message = check_error(response, 500, None, "internal_error")
        assert "err-" in message
    assert "secret" not in response.text
    engine.error = None
    assert client.post(COMPLETIONS, json={**ask, "stream": False}).json()["choices"] == expected


def test_template_errors_are_the_requests(serve: Serve, make_engine: Any) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    response = serve(make_engine("ok"), template=template).post(CHAT, json=ASK)
    assert "roles must alternate" in check_error(response, 400, "messages", None)


def test_shutdown_during_generation(make_engine: Any, serve: Serve) -> None:
    """The fixture fails if the server's thread outlives its grace time."""
    client = serve(make_engine(delay=0.01))
    ask = {"prompt": "", "max_tokens": 100_000, "stream": True, "logit_bias": {"256": -100}}
    stream = client.build_request("POST", COMPLETIONS, json=ask)
    response = client.send(stream, stream=True)
    assert next(response.iter_lines()).startswith("data: ")
