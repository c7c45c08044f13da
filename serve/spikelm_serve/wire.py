"""Answers as OpenAI's JSON: whole bodies, streamed chunks and error objects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from spikelm.errors import RequestError
from spikelm_serve.answer import Meter, Piece

Json = dict[str, Any]


class Wire:
    """Builds the bodies of one answer: its id, time and model stand in each of them."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, pieces: Iterable[Piece]) -> Json:
        """The body of an answer that is not streamed."""
        texts: dict[int, str] = {}
        reasons: dict[int, str | None] = {}
        totals: Json = {}
        for piece in pieces:
            texts[piece.index] = texts.get(piece.index, "") + piece.text
            reasons[piece.index] = piece.finish_reason
            if piece.totals is not None:
                totals = {"usage": usage(piece.totals), **costs(piece.totals)}
        choices = []
        for index, text in texts.items():
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.chat else {"text": text}
            choices.append(_choice(index, content, reasons[index]))
        return self._body(choices, "chat.completion") | totals

    def chunks(self, pieces: Iterable[Piece], *, include_usage: bool) -> Iterator[Json]:
        """The chunks of a streamed answer; the last of them carries timings and state size."""
        # OpenAI: usage is null in every chunk but the last, if it was asked for.
        no_usage = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        for piece in pieces:
            if self.chat and piece.index not in opened:
                opened.add(piece.index)
                opening = {"delta": {"role": "assistant", "content": ""}}
                yield self._chunk(_choice(piece.index, opening, None)) | no_usage
            delta = {"content": piece.text} if piece.text else {}
            content = {"delta": delta} if self.chat else {"text": piece.text}
            chunk = self._chunk(_choice(piece.index, content, piece.finish_reason)) | no_usage
            if piece.totals is None:
                yield chunk
            elif include_usage:
                yield chunk
                yield self._chunk() | {"usage": usage(piece.totals)} | costs(piece.totals)
            else:
                # Not one more chunk, without choices: plain clients read choices[0] of each.
                yield chunk | costs(piece.totals)

    def _chunk(self, *choices: Json) -> Json:
        return self._body(list(choices), "chat.completion.chunk")

    def _body(self, choices: list[Json], chat_object: str) -> Json:
        return {
            "id": self._id,
            "object": chat_object if self.chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def _choice(index: int, content: Json, reason: str | None) -> Json:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def usage(meter: Meter) -> Json:
    return {
        "prompt_tokens": meter.prompt_tokens,
        "completion_tokens": meter.completion_tokens,
        "total_tokens": meter.prompt_tokens + meter.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def costs(meter: Meter) -> Json:
    """Our extension: where the time went, and the memory of the conversation."""
    return {
        "timings": {
            "prompt_ms": round(meter.prompt_seconds * 1000, 3),
            "predicted_ms": round(meter.decode_seconds * 1000, 3),
            "predicted_per_second": round(meter.tokens_per_second, 3),
        },
        "state_bytes": meter.state_bytes,
    }


def error_body(error: RequestError) -> Json:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def event(data: Json | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
