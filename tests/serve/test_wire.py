"""JSON bodies that the server's tests do not pin down."""

from __future__ import annotations

from typing import Any

from spikelm.errors import RequestError
from spikelm.tokenizer import Tokenizer
from spikelm_serve.jobs import Done, Event, Text, Totals
from spikelm_serve.wire import Wire, error_body, event


def events() -> list[tuple[int, Event]]:
    totals = Totals(
        prompt_tokens=3,
        cached_tokens=2,
        completion_tokens=5,
        queue_seconds=0.125,
        prompt_seconds=0.25,
        decode_tokens=4,
        decode_seconds=0.5,
        state_bytes=64,
    )
    return [
        (0, Text(0, "a")),
        (0, Text(0, "", finish_reason="length")),
        (0, Text(1, "b")),
        (0, Text(1, "c", finish_reason="stop")),
        (0, Done(totals, (None, None))),
    ]


def wire(**options: Any) -> Wire:
    return Wire("m", Tokenizer.bytes(), n=2, **options)


def test_whole() -> None:
    body = wire(chat=False).whole(events())
    assert [choice["text"] for choice in body["choices"]] == ["a", "bc"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop"]
    assert body["timings"] == {
        "queue_ms": 125.0,
        "prompt_ms": 250.0,
        "predicted_ms": 500.0,
        "predicted_per_second": 8.0,
        "cache_n": 2,
    }
    assert body["state_bytes"] == 64
    assert body["usage"]["total_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_chunks_of_a_chat_open_and_end_every_choice() -> None:
    told = wire(chat=True)
    chunks = [chunk for job, event in events() for chunk in told.chunks(job, event)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    opening = {"role": "assistant", "content": ""}
    texts = [{"content": text} for text in "abc"]
    assert deltas == [opening, texts[0], opening, texts[1], texts[2], {}, {}]
    ends = [(c["choices"][0]["index"], c["choices"][0]["finish_reason"]) for c in chunks[-2:]]
    assert ends == [(0, "length"), (1, "stop")]
    assert ["timings" in chunk for chunk in chunks] == [False] * 6 + [True]


def test_usage_is_a_chunk_of_its_own() -> None:
    told = wire(chat=True, include_usage=True)
    *chunks, last = [chunk for job, event in events() for chunk in told.chunks(job, event)]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert "timings" in last


def test_event_is_one_line_of_utf8() -> None:
    assert event({"text": "caf\u00e9\n"}) == b'data: {"text": "caf\xc3\xa9\\n"}\n\n'
    assert event("[DONE]") == b"data: [DONE]\n\n"


def test_error_body() -> None:
    error = RequestError("no", status=503, param="p", code="c")
    assert error_body(error) == {
        "error": {"message": "no", "type": "server_error", "param": "p", "code": "c"}
    }
