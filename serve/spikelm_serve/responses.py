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
from spikelm_serve.transport import PING_SECONDS, owner_of, read_body
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
        start, root = api.beginning(options, owner)
        prompt = api.prompts.chat(schema.as_dicts(request.messages), start, root)
        job = api.job(prompt, options, outbox, 0, owner, start, chat=True)
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
                "parallel_tool_calls": False,
                "tool_choice": "none",
                "tools": [],
                "error": None,
                "incomplete_details": None,
            },
            f"msg_{uuid.uuid4().hex}",
        )

    async def _whole(self, ask: Ask, events: Sequence[Event]) -> Json:
        text = "".join(event.text for event in events if isinstance(event, Text))
        reasons = [event.finish_reason for event in events if isinstance(event, Text)]
        done = next(event for event in events if isinstance(event, Done))
        return await self._ended(ask, text, reasons[-1], done)

    async def _ended(self, ask: Ask, text: str, reason: str | None, done: Done) -> Json:
        status = "incomplete" if reason == "length" else "completed"
        why = {"reason": "max_output_tokens"} if reason == "length" else None
        tokens = usage([done.totals])
        state = await asyncio.to_thread(self._keep, ask, done)
        return {
            **ask.body,
            "status": status,
            "incomplete_details": why,
            "output": [_message(ask, text, status)],
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
        numbers = iter(range(1 << 62))

        def told(kind: str, **fields: Any) -> bytes:
            data = {"type": kind, "sequence_number": next(numbers), **fields}
            return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

        place = {"item_id": ask.message_id, "output_index": 0, "content_index": 0}
        opening = {**ask.body, "status": "in_progress", "output": []}
        item = {**_message(ask, "", "in_progress"), "content": []}
        text, reason = "", None
        try:
            yield b"".join(
                (
                    told("response.created", response=opening),
                    told("response.in_progress", response=opening),
                    told("response.output_item.added", output_index=0, item=item),
                    told("response.content_part.added", **place, part=_part("")),
                )
            )
            ended = False
            while not ended:
                events = joined(await outbox.take(PING_SECONDS))
                data = b"" if events else b": ping\n\n"
                for _, event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Text):
                        text, reason = text + event.text, event.finish_reason
                        if event.text:
                            data += told("response.output_text.delta", **place, delta=event.text)
                    if isinstance(event, Done):
                        ended = True
                        whole = await self._ended(ask, text, reason, event)
                        data += told("response.output_text.done", **place, text=text)
                        data += told("response.content_part.done", **place, part=_part(text))
                        [output] = whole["output"]
                        data += told("response.output_item.done", output_index=0, item=output)
                        data += told(f"response.{whole['status']}", response=whole)
                if data:
                    yield data
        except RequestError as error:
            yield told("error", **error_body(error)["error"])
        except Exception as error:  # noqa: BLE001  (told to the client; the server goes on)
            yield told("error", **error_body(incident(error))["error"])
        finally:
            self._api.scheduler.cancel([ask.job])


def _state_id(response_id: str) -> str:
    """The state of a response; a name that is none if the response has none."""
    return f"st_{response_id.removeprefix('resp_')}" if response_id.startswith("resp_") else ""


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
