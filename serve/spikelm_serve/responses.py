"""POST /v1/responses: OpenAI's newer form of a chat, which goes on from an earlier response.

A response is the state behind its answer, under an id of its own: the id is told when the answer
begins, the state is known when it ends. Texts are not kept.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spikelm.errors import RequestError
from spikelm_serve import schema
from spikelm_serve.api import Api
from spikelm_serve.jobs import Done, Event, Failed, Job, Text
from spikelm_serve.outbox import Outbox, joined
from spikelm_serve.scheduler import incident
from spikelm_serve.states import describe
from spikelm_serve.tools import CallReader, ToolCall, Tools, read_answer
from spikelm_serve.transport import owner_of, read_body
from spikelm_serve.wire import Json, costs, error_body, usage


@dataclass(slots=True)
class Ask:
    """A request that is ready for the model, and what its answer says of itself."""

    request: schema.ResponseRequest
    job: Job
    body: Json
    message_id: str


class Responses:
    """The endpoint, on top of that of chats."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def create(self, request: Request) -> Response:
        body = await read_body(request, self._api.max_body_bytes)
        outbox = self._api.outbox()
        ask = await asyncio.to_thread(self._prepare, body, owner_of(request), outbox)
        self._api.scheduler.submit([ask.job])
        if ask.request.options.stream:
            stream = self._stream(ask, outbox)
            options = ask.request.options
            return self._api.streams.answer(ask.body["id"], request, stream, options)
        events = await self._api.collect(request, [ask.job], outbox)
        return JSONResponse(await self._whole(ask, [event for _, event in events]))

    async def delete(self, request: Request) -> Response:
        name = request.path_params["id"]
        await asyncio.to_thread(self._api.store.delete, _state_id(name), owner_of(request))
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    def _prepare(self, body: bytes, owner: str, outbox: Outbox) -> Ask:
        api = self._api
        request = schema.parse_response(body, api.tokenizer.vocab_size)
        options = request.options
        api.check_model(options.model)
        before = request.previous_response_id
        if before is not None:
            state = replace(options.state, start=_state_id(before))
            options = replace(options, state=state)
        if not request.store:
            options = replace(options, state=replace(options.state, no_cache=True))
        start, root = api.beginning(options, owner)
        messages, tools = schema.as_dicts(request.messages), request.tools
        prompt = api.prompts.chat(messages, start, root, tools)
        job = api.job(prompt, options, outbox, 0, owner, start, chat=True, tools=tools)
        offered = [] if tools is None else list(tools.tools)
        return Ask(
            request,
            job,
            {
                "id": f"resp_{uuid.uuid4().hex}",
                "object": "response",
                "created_at": int(time.time()),
                "model": api.name,
                "previous_response_id": before,
                "instructions": request.instructions,
                "temperature": options.params.temperature,
                "top_p": options.params.top_p,
                "max_output_tokens": options.params.max_tokens,
                "store": request.store,
                "metadata": request.metadata,
                "parallel_tool_calls": tools is not None and tools.parallel,
                "tool_choice": _choice(tools),
                "tools": [{"type": "function", **tool.as_json()["function"]} for tool in offered],
                "error": None,
                "incomplete_details": None,
            },
            f"msg_{uuid.uuid4().hex}",
        )

    async def _whole(self, ask: Ask, events: Sequence[Event]) -> Json:
        text = "".join(event.text for event in events if isinstance(event, Text))
        reasons = [event.finish_reason for event in events if isinstance(event, Text)]
        done = next(event for event in events if isinstance(event, Done))
        text, calls = read_answer(text, ask.request.tools)
        items = [_message(ask, text, "completed")] if text or not calls else []
        items += [_call(call, "completed") for call in calls]
        return await self._ended(ask, items, reasons[-1], done)

    async def _ended(self, ask: Ask, items: list[Json], reason: str | None, done: Done) -> Json:
        status = "incomplete" if reason == "length" else "completed"
        why = {"reason": "max_output_tokens"} if reason == "length" else None
        tokens = usage([done.totals])
        state = await asyncio.to_thread(self._keep, ask, done)
        return {
            **ask.body,
            "status": status,
            "incomplete_details": why,
            "output": [{**item, "status": status} for item in items],
            "usage": {
                "input_tokens": tokens["prompt_tokens"],
                "input_tokens_details": tokens["prompt_tokens_details"],
                "output_tokens": tokens["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens["total_tokens"],
            },
            **costs([done.totals]),
            "state": state,
        }

    def _keep(self, ask: Ask, done: Done) -> Json | None:
        """Gives the state behind the answer the response's id."""
        kept, store = done.kept[0], self._api.store
        if kept is None:
            return None
        if ask.request.store:
            own = _state_id(ask.body["id"])
            delta = np.zeros(0, np.int32)
            store.keep(replace(kept, id=own, parent=kept.id, delta=delta, saved=False))
        return describe(kept, store.fingerprint)

    async def _stream(self, ask: Ask, outbox: Outbox) -> AsyncGenerator[bytes, None]:
        told = _Teller()
        opening = {**ask.body, "status": "in_progress", "output": []}
        answer = _Output(ask, told)
        try:
            yield told("response.created", response=opening) + told(
                "response.in_progress", response=opening
            )
            reason, ended = None, False
            while not ended:
                events = joined(await outbox.take(ask.request.options.ping_seconds))
                data = b"" if events else b": ping\n\n"
                for _, event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Text):
                        reason = event.finish_reason
                        data += answer.push(event.text)
                    if isinstance(event, Done):
                        ended = True
                        data += answer.end()
                        whole = await self._ended(ask, answer.items, reason, event)
                        data += told(f"response.{whole['status']}", response=whole)
                if data:
                    yield data
        except RequestError as error:
            yield told("error", **error_body(error)["error"])
        except Exception as error:  # noqa: BLE001  (told to the client; the server goes on)
            yield told("error", **error_body(incident(error))["error"])
        finally:
            self._api.scheduler.cancel([ask.job])


class _Teller:
    """Events with their numbers."""

    def __init__(self) -> None:
        self._number = -1

    def __call__(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number, **fields}
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class _Output:
    """An answer as output items, told as they come: a message, and calls of tools."""

    def __init__(self, ask: Ask, told: _Teller) -> None:
        self.items: list[Json] = []
        """Those that are complete."""
        self._ask, self._told = ask, told
        self._reader = None if ask.request.tools is None else CallReader(ask.request.tools)
        self._text: str | None = None
        """Of a message that has begun."""

    def push(self, text: str) -> bytes:
        if self._reader is None:
            return self._say(text)
        text, calls = self._reader.push(text)
        return self._say(text) + b"".join(map(self._call, calls))

    def end(self) -> bytes:
        """What was held back, and the end of the message."""
        data = self._say(self._reader.end()) if self._reader else b""
        if self._text is None and not self.items:
            data += self._begin()
        return data + self._finish()

    def _place(self) -> Json:
        return {
            "item_id": self._ask.message_id,
            "output_index": len(self.items),
            "content_index": 0,
        }

    def _begin(self) -> bytes:
        self._text = ""
        item = {**_message(self._ask, "", "in_progress"), "content": []}
        opened = self._told("response.output_item.added", output_index=len(self.items), item=item)
        return opened + self._told("response.content_part.added", **self._place(), part=_part(""))

    def _say(self, text: str) -> bytes:
        if not text:
            return b""
        data = self._begin() if self._text is None else b""
        self._text = (self._text or "") + text
        return data + self._told("response.output_text.delta", **self._place(), delta=text)

    def _finish(self) -> bytes:
        if self._text is None:
            return b""
        text, place = self._text, self._place()
        item = _message(self._ask, text, "completed")
        data = self._told("response.output_text.done", **place, text=text)
        data += self._told("response.content_part.done", **place, part=_part(text))
        data += self._told("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        self._text = None
        return data

    def _call(self, call: ToolCall) -> bytes:
        data = self._finish()
        item, index = _call(call, "completed"), len(self.items)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        data += self._told("response.output_item.added", output_index=index, item=begun)
        for kind, name in (("delta", "delta"), ("done", "arguments")):
            more = {name: call.arguments}
            data += self._told(f"response.function_call_arguments.{kind}", **place, **more)
        data += self._told("response.output_item.done", output_index=index, item=item)
        self.items.append(item)
        return data


def _state_id(response_id: str) -> str:
    """The state of a response; a name that is none if the response has none."""
    return f"st_{response_id.removeprefix('resp_')}" if response_id.startswith("resp_") else ""


def _choice(tools: Tools | None) -> str:
    if tools is None:
        return "none"
    return "required" if tools.must else "auto"


def _call(call: ToolCall, status: str) -> Json:
    return {
        "id": f"fc_{call.id.removeprefix('call_')}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _message(ask: Ask, text: str, status: str) -> Json:
    return {
        "id": ask.message_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_part(text)],
    }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
