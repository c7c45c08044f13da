"""Answers as OpenAI's JSON: whole bodies, streamed chunks and error objects."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spikelm.errors import RequestError
from spikelm.sampling import Likelihood
from spikelm.tokenizer import Tokenizer
from spikelm_serve.jobs import Activity, Done, Event, Progress, Scored, Text, Totals
from spikelm_serve.tools import CallReader, ToolCall, Tools, read_answer

Json = dict[str, Any]


@dataclass(slots=True)
class Echo:
    """The prompt as the beginning of a completion."""

    text: str
    ids: tuple[int, ...]
    """Those that have likelihoods come last."""


@dataclass(slots=True)
class _Choice:
    text: str = ""
    reason: str | None = None
    logprobs: list[Json] = field(default_factory=list)


class Wire:
    """Builds the bodies of one answer of `num_jobs` prompts: its id, time and model stand in each
    of them.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        chat: bool,
        num_jobs: int = 1,
        n: int = 1,
        include_usage: bool = False,
        logprobs: bool = False,
        echoes: Sequence[Echo] = (),
        tools: Tools | None = None,
    ) -> None:
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._waiting = num_jobs
        self._n = n
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._echoes = echoes
        self._tools = tools
        self._readers: dict[int, CallReader] = {}
        self._scores: dict[int, Sequence[Likelihood]] = {}
        self._opened: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._totals: list[Totals] = []
        self._reasons: dict[int, Json] = {}

    def whole(self, events: Sequence[tuple[int, Event]], extra: Json | None = None) -> Json:
        """The body of an answer that is not streamed, from the events of its jobs."""
        found: dict[int, _Choice] = {}
        for job, event in events:
            if isinstance(event, Scored):
                self._scores[job] = event.likelihoods
            elif isinstance(event, Done):
                self._totals.append(event.totals)
            elif isinstance(event, Text):
                choice = found.setdefault(event.index, _Choice())
                opening = "" if choice.text or choice.logprobs else self._echo(event.index)
                choice.text += opening + event.text
                choice.reason = event.finish_reason
                if self._logprobs:
                    choice.logprobs.append(self._likelihoods(event))
        choices = []
        for index, choice in sorted(found.items()):
            text, calls = read_answer(choice.text, self._tools)
            message: Json = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                told = [call.as_json() for call in calls]
                message |= {"content": text or None, "tool_calls": told}
            content: Json = {"message": message} if self.chat else {"text": text}
            logprobs = _joined(choice.logprobs) if self._logprobs else None
            reason = _reason(choice.reason, calls)
            choices.append(_choice(index, content, reason, logprobs))
        return self._body(choices, "chat.completion") | self._account() | (extra or {})

    def chunks(self, job: int, event: Event, extra: Json | None = None) -> Iterator[Json]:
        """The chunks of a streamed answer that an event makes; the last of them has usage (if it
        was asked for), timings and the state, and what is `extra`.
        """
        if isinstance(event, Scored):
            self._scores[job] = event.likelihoods
        elif isinstance(event, Progress):
            yield self._chunk() | {
                "prompt_progress": {"processed": event.read, "total": event.total}
            }
        elif isinstance(event, Text):
            yield from self._text_chunks(event)
        elif isinstance(event, Done):
            self._totals.append(event.totals)
            self._waiting -= 1
            yield from self._last_chunks(job, extra or {})

    def _text_chunks(self, event: Text) -> Iterator[Json]:
        opening = ""
        if event.index not in self._opened:
            self._opened.add(event.index)
            opening = self._echo(event.index)
            if self.chat:
                first = {"delta": {"role": "assistant", "content": ""}}
                yield self._chunk(_choice(event.index, first, None, None))
        logprobs = self._likelihoods(event) if self._logprobs else None
        text, told = opening + event.text, 0
        calls: list[ToolCall] = []
        if self._tools is not None:
            reader = self._readers.setdefault(event.index, CallReader(self._tools))
            text, calls = reader.push(text)
            text += reader.end() if event.finish_reason is not None else ""
            told = len(reader.calls) - len(calls)
        if text or event.activity or (logprobs and any(logprobs.values())):
            content: Json = {"delta": {"content": text}} if self.chat else {"text": text}
            spikes = {"spikes": list(map(_spikes, event.activity))} if event.activity else {}
            yield self._chunk(_choice(event.index, content, None, logprobs) | spikes)
        for place, call in enumerate(calls):
            content = {"delta": {"tool_calls": [{"index": told + place, **call.as_json()}]}}
            yield self._chunk(_choice(event.index, content, None, None))
        if event.finish_reason is not None:
            content = {"delta": {}} if self.chat else {"text": ""}
            made = self._readers[event.index].calls if self._tools else ()
            reason = _reason(event.finish_reason, made)
            self._reasons[event.index] = _choice(event.index, content, reason, None)

    def _last_chunks(self, job: int, extra: Json) -> Iterator[Json]:
        """Those with finish reasons. With the last job's, or behind it if there is a chunk for the
        usage, comes what is known at the end: plain clients read choices[0] of each.
        """
        mine = [c for index, c in sorted(self._reasons.items()) if index // self._n == job]
        last = self._waiting == 0
        for place, choice in enumerate(mine, 1):
            end = last and place == len(mine) and not self._include_usage
            yield self._chunk(choice) | (costs(self._totals) | extra if end else {})
        if last and self._include_usage:
            yield self._chunk(usage=False) | self._account() | extra

    def _account(self) -> Json:
        return {"usage": usage(self._totals), **costs(self._totals)}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n].text if self._echoes else ""

    def _likelihoods(self, event: Text) -> Json:
        """In the form of completions or of chats, those of the prompt before the first."""
        if self.chat:
            content = [
                {
                    **self._token(each.token, each.logprob),
                    "top_logprobs": [self._token(*pair) for pair in each.top],
                }
                for each in event.likelihoods
            ]
            return {"content": content, "refusal": None}
        likelihoods: list[Likelihood | None] = list(event.likelihoods)
        tokens = [each.token for each in event.likelihoods]
        if event.index not in self._offsets and self._echoes:
            job = event.index // self._n
            echo, scores = self._echoes[job], self._scores.get(job, ())
            # A start of the document that was put before them makes the first one likely or not.
            known: list[Likelihood | None] = [None] * max(0, len(echo.ids) - len(scores))
            known += scores[max(0, len(scores) - len(echo.ids)) :]
            likelihoods, tokens = known + likelihoods, [*echo.ids, *tokens]
        offset = self._offsets.setdefault(event.index, 0)
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in zip(tokens, likelihoods, strict=True):
            name = self._name(token)
            found["tokens"].append(name)
            found["token_logprobs"].append(each.logprob if each else None)
            top = {self._name(t): value for t, value in each.top} if each else None
            if top is not None and each:
                # OpenAI's has the token that was chosen, also where it is none of them.
                top.setdefault(name, each.logprob)
            found["top_logprobs"].append(top)
            found["text_offset"].append(offset)
            offset += len(self._tokenizer.decode([token]))
        self._offsets[event.index] = offset
        return found

    def _token(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.decode_bytes([token])
        return {
            "token": data.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }

    def _name(self, token: int) -> str:
        """The text of a token; as OpenAI writes it where it is part of a character."""
        data = self._tokenizer.decode_bytes([token])
        try:
            return data.decode() if data else f"<{token}>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _chunk(self, *choices: Json, usage: bool = True) -> Json:
        # OpenAI: usage is null in every chunk but the last, if it was asked for.
        no_usage = {"usage": None} if self._include_usage and usage else {}
        return self._body(list(choices), "chat.completion.chunk") | no_usage

    def _body(self, choices: list[Json], chat_object: str) -> Json:
        return {
            "id": self.id,
            "object": chat_object if self.chat else "text_completion",
            "created": self.created,
            "model": self._model,
            "choices": choices,
        }


def usage(totals: Sequence[Totals]) -> Json:
    """OpenAI's account of tokens."""
    prompt = sum(each.prompt_tokens for each in totals)
    completion = sum(each.completion_tokens for each in totals)
    cached = sum(each.cached_tokens for each in totals)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def costs(totals: Sequence[Totals]) -> Json:
    """Our extension: where the time went, what was read before, and the memory of a sequence."""
    decoded = sum(each.decode_tokens for each in totals)
    seconds = sum(each.decode_seconds for each in totals)
    misses = [each.miss for each in totals if each.miss]
    silent, entries = (sum(getattr(t, name) for t in totals) for name in ("silent", "entries"))
    read = sum(each.weight_bytes for each in totals)
    return {
        "timings": {
            "queue_ms": _ms(max((each.queue_seconds for each in totals), default=0.0)),
            "prompt_ms": _ms(sum(each.prompt_seconds for each in totals)),
            "predicted_ms": _ms(seconds),
            "predicted_per_second": round(decoded / seconds, 3) if seconds else 0.0,
            "cache_n": sum(each.cached_tokens for each in totals),
        },
        "spikes": {
            "silent_fraction": round(silent / entries, 4) if entries else None,
            "weight_bytes_per_token": round(read / decoded) if read else None,
        },
        "cache_miss": misses[0] if misses else None,
        "state_bytes": max((each.state_bytes for each in totals), default=0),
    }


def _spikes(activity: Activity) -> Json:
    """Who fired: a bit for each neuron, the lowest bit of a byte first."""
    counts = activity.counts
    return {
        "silent_fraction": round(counts.silent / counts.total, 4) if counts.total else None,
        "weight_bytes": counts.weight_bytes or None,
        "fired": [
            {
                "neurons": name,
                "size": len(bits),
                "bits": base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode(),
            }
            for name, bits in activity.fired.items()
        ],
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _joined(parts: Sequence[Json]) -> Json:
    """The logprobs of several pieces of a choice as one."""
    found: Json = {}
    for part in parts:
        for key, value in part.items():
            found[key] = found.get(key, []) + value if isinstance(value, list) else value
    return found


def _reason(reason: str | None, calls: Sequence[ToolCall]) -> str | None:
    return "tool_calls" if calls and reason == "stop" else reason


def _choice(index: int, content: Json, reason: str | None, logprobs: Json | None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def error_body(error: RequestError) -> Json:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def event(data: Json | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
