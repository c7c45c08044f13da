"""JSON bodies that the server's tests do not pin down."""

from __future__ import annotations

from spikelm.errors import RequestError
from spikelm_serve.answer import Meter, Piece
from spikelm_serve.wire import Wire, error_body, event


def pieces() -> list[Piece]:
    meter = Meter(
        prompt_tokens=3,
        completion_tokens=5,
        prompt_seconds=0.25,
        decode_tokens=4,
        decode_seconds=0.5,
        state_bytes=64,
    )
    return [
        Piece(0, "a"),
        Piece(0, "", "length"),
        Piece(1, "b"),
        Piece(1, "c", "stop", meter),
    ]


def test_whole() -> None:
    body = Wire("m", chat=False).whole(pieces())
    assert [choice["text"] for choice in body["choices"]] == ["a", "bc"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop"]
    assert body["timings"] == {
        "prompt_ms": 250.0,
        "predicted_ms": 500.0,
        "predicted_per_second": 8.0,
    }
    assert body["state_bytes"] == 64
    assert body["usage"]["total_tokens"] == 8


def test_chunks_of_a_chat_open_every_choice() -> None:
    chunks = list(Wire("m", chat=True).chunks(pieces(), include_usage=False))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    opening = {"role": "assistant", "content": ""}
    assert deltas == [opening, {"content": "a"}, {}, opening, {"content": "b"}, {"content": "c"}]


def test_event_is_one_line_of_utf8() -> None:
    assert event({"text": "caf\u00e9\n"}) == b'data: {"text": "caf\xc3\xa9\\n"}\n\n'
    assert event("[DONE]") == b"data: [DONE]\n\n"


def test_error_body() -> None:
    error = RequestError("no", status=503, param="p", code="c")
    assert error_body(error) == {
        "error": {"message": "no", "type": "server_error", "param": "p", "code": "c"}
    }
