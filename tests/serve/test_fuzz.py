"""Anything sent to any route: an answer, or a refusal that says what is wrong; never a 500."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("SPIKELM_FUZZ_CASES", "40"))
"""Per route: 2,000 in the long form, `make soak`."""

FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "penalty_decay",
    "sse_ping_interval",
    "return_spikes",
    "parallel_tool_calls",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
    "echo",
    "logprobs",
    "top_logprobs",
    "response_format",
    "structured_outputs",
    "state",
    "cache_salt",
    "priority",
    "deadline_ms",
    "return_progress",
    "tools",
    "tool_choice",
    "best_of",
    "suffix",
    "user",
    "name",
    "tokens",
    "to_message",
    "to_token",
    "parse_special",
    "content",
    "input",
    "instructions",
    "previous_response_id",
    "max_output_tokens",
    "text",
    "store",
    "metadata",
]
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 1e-320, 0.5]),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["\0", "\ud800", "<|endoftext|>", "user", "st_" + "0" * 32, "../x", "a" * 2000]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | TEXTS, inner, max_size=4)
    ),
    max_leaves=8,
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "max_completion_tokens": 2,
    },
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/states/x/fork": {},
    "/v1/states/x/save": {},
    "/v1/states/x/rewind": {"to_token": 1},
    "/v1/states/x/verify": {},
}


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"]
        assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", sorted(GOOD))
def test_any_fields(real: httpx.Client, path: str) -> None:
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize="SPIKELM_FUZZ_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.dictionaries(st.sampled_from(FIELDS) | TEXTS, VALUES, max_size=5), st.booleans())
    def send(fields: dict[str, Any], alone: bool) -> None:
        body = fields if alone else {**GOOD[path], **fields}
        # Python writes NaN and Infinity, which JSON has not.
        data = json.dumps(body).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": "application/json"}
        check(real.post(path, content=data, headers=headers))

    send()
    assert real.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 10_000,
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "' + b"a" * (1 << 20),
        b'{"prompt": [' + b"1," * 100_000 + b"1.5]}",
        b'{"prompt": "a", "stop": [' + b'"x",' * 40_000 + b'"x"]}',
        b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(2000)) + b"}}",
    ],
)
def test_any_bytes(real: httpx.Client, body: bytes) -> None:
    for path in GOOD:
        response = real.post(path, content=body, headers={"Content-Type": "application/json"})
        check(response)
        # Other routes have no such fields.
        if path == "/v1/completions":
            assert response.status_code == 400, response.text


def raw(client: httpx.Client, data: bytes, seconds: float = 5) -> bytes:
    port = client.base_url.port
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def test_headers_without_end(started: Callable[..., Any]) -> None:
    _, url = started()
    with httpx.Client(base_url=url, trust_env=False) as client:
        head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        for attack in (
            head + b"X: " + b"a" * 100_000,
            head + b"".join(b"X-%d: a\r\n" % i for i in range(20_000)),
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n",
        ):
            began = time.monotonic()
            try:
                found = raw(client, attack)
            except OSError:
                # It was cut off while it was sent.
                found = b"HTTP/1.1 400"
            assert found.startswith(b"HTTP/1.1 4")
            assert time.monotonic() - began < 2
        assert client.get("/health").status_code == 200


def test_slow_clients_hold_up_nobody(real: httpx.Client) -> None:
    ask = {"prompt": "a", "max_tokens": 2}

    def times() -> float:
        found = []
        for _ in range(15):
            began = time.perf_counter()
            assert real.post("/v1/completions", json=ask).status_code == 200
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    quiet = times()
    slow = []
    port = real.base_url.port
    try:
        for _ in range(200):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX")
            slow.append(connection)
        # Generous: the test machine has two cores and other work.
        assert times() < 3 * quiet + 0.02
    finally:
        for connection in slow:
            connection.close()
