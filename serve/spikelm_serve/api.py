"""The endpoints: requests into jobs, events into answers."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from spikelm.errors import RequestError
from spikelm.generate import Engine
from spikelm.template import ChatTemplate
from spikelm_serve import schema
from spikelm_serve.constraint import Forms
from spikelm_serve.jobs import Constraint, Done, Event, Failed, Job
from spikelm_serve.metrics import Metrics
from spikelm_serve.openapi import document
from spikelm_serve.outbox import Courier, Outbox, joined
from spikelm_serve.prompts import Prompt, Prompts
from spikelm_serve.scheduler import Scheduler, incident
from spikelm_serve.states import Kept, StateStore, describe
from spikelm_serve.streams import Streams
from spikelm_serve.tools import Tools, reads_calls
from spikelm_serve.transport import owner_of, read_body
from spikelm_serve.wire import Echo, Json, Wire, error_body, event

MAX_INLINE_BYTES = 16 << 20


@dataclass(slots=True)
class Ask:
    """A request that is ready for the model."""

    options: schema.Options
    jobs: list[Job]
    wire: Wire


class Api:
    """The endpoints, around one engine, its scheduler and its states."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        template: ChatTemplate,
        store: StateStore,
        scheduler: Scheduler,
        max_body_bytes: int,
    ) -> None:
        self.scheduler, self.store = scheduler, store
        self.metrics = Metrics(scheduler)
        self.tokenizer = engine.tokenizer
        self.template = template
        self.prompts = Prompts(engine.tokenizer, template, store)
        self.max_body_bytes = max_body_bytes
        self.name = model_name
        self._forms: Forms | None = None
        self._courier = Courier()
        self.streams = Streams()
        scheduler.deliver = self._courier.deliver
        self._card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "spikelm",
            "fingerprint": store.fingerprint,
            "batch_invariant": engine.is_batch_invariant,
            "tools": reads_calls(template),
        }

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether new requests are taken."""
        if self.scheduler.accepts:
            return JSONResponse({"status": "ready"})
        raise RequestError("the server is shutting down", status=503, code="shutting_down")

    async def show_metrics(self, request: Request) -> Response:
        page = await asyncio.to_thread(self.metrics.page)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def describe(self, request: Request) -> Response:
        return JSONResponse(document(self.tokenizer.vocab_size))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        self.check_model(request.path_params["model"])
        return JSONResponse(self._card)

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, self.max_body_bytes)

        def work() -> Json:
            fields = schema.parse_tokenize(body)
            if fields.messages:
                ids = list(self.prompts.chat(fields.messages, None, self.store.root("")).ids)
            else:
                ids = self.tokenizer.encode(fields.text, special=fields.special)
            return {"tokens": ids, "count": len(ids)}

        return JSONResponse(await asyncio.to_thread(work))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, self.max_body_bytes)

        def work() -> Json:
            ids = schema.parse_detokenize(body, self.tokenizer.vocab_size)
            return {"prompt": self.tokenizer.decode(ids)}

        return JSONResponse(await asyncio.to_thread(work))

    async def completions(self, request: Request) -> Response:
        return await self._respond(request, self._completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._respond(request, self._chat)

    async def _respond(
        self, request: Request, prepare: Callable[[bytes, str, Outbox], Ask]
    ) -> Response:
        body = await read_body(request, self.max_body_bytes)
        outbox = self.outbox()
        # A long prompt takes long to parse and tokenise: off the event loop.
        ask = await asyncio.to_thread(prepare, body, owner_of(request), outbox)
        self.scheduler.submit(ask.jobs)
        if ask.options.stream:
            events = self._stream(ask, outbox)
            return self.streams.answer(ask.wire.id, request, events, ask.options)
        found = await self.collect(request, ask.jobs, outbox)
        extra = await self._state_of(ask, [e for _, e in found])
        return JSONResponse(ask.wire.whole(found, extra))

    def outbox(self) -> Outbox:
        """For the events of a new request."""
        return Outbox(self._courier)

    async def collect(
        self, request: Request, jobs: Sequence[Job], outbox: Outbox
    ) -> list[tuple[int, Event]]:
        """All events of the jobs, which are cancelled if the client goes away.

        Raises: RequestError if one fails; ClientDisconnect.
        """
        gone = asyncio.create_task(_gone(request))
        found: list[tuple[int, Event]] = []
        waiting = len(jobs)
        try:
            while waiting:
                taking = asyncio.create_task(outbox.take())
                await asyncio.wait({taking, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    raise ClientDisconnect
                for job, item in taking.result():
                    if isinstance(item, Failed):
                        raise item.error
                    waiting -= isinstance(item, Done)
                    found.append((job, item))
        finally:
            gone.cancel()
            self.scheduler.cancel(jobs)
        return found

    async def _stream(self, ask: Ask, outbox: Outbox) -> AsyncGenerator[bytes, None]:
        """Server-sent events: all that have come in since the last were sent, at once."""
        waiting = len(ask.jobs)
        try:
            while waiting:
                items = await outbox.take(ask.options.ping_seconds)
                data = b"" if items else b": ping\n\n"
                for job, item in joined(items):
                    if isinstance(item, Failed):
                        raise item.error
                    waiting -= isinstance(item, Done)
                    extra = None if waiting else await self._state_of(ask, [item])
                    data += b"".join(map(event, ask.wire.chunks(job, item, extra)))
                if data:
                    yield data
        except RequestError as error:
            yield event(error_body(error))
        except Exception as error:  # noqa: BLE001  (told to the client; the server goes on)
            yield event(error_body(incident(error)))
        finally:
            self.scheduler.cancel(ask.jobs)
        yield event("[DONE]")

    async def _state_of(self, ask: Ask, events: Sequence[Event]) -> Json:
        """The `state` object of an answer: of its first choice, saved if that was asked for."""
        done = next((e for e in reversed(events) if isinstance(e, Done)), None)
        kept = done.kept[0] if done and done.kept else None
        options = ask.options.state
        if kept is None:
            return {"state": None}
        return {"state": await asyncio.to_thread(self.keep_as_asked, kept, options)}

    def keep_as_asked(self, kept: Kept, options: schema.StateOptions) -> Json:
        """Saves and shows a state. Raises: RequestError where no room is left."""
        if options.save or options.name:
            kept = self.store.save(kept.id, kept.owner, options.name)
        found = describe(kept, self.store.fingerprint)
        if options.returns == "url":
            found["url"] = f"/v1/states/{kept.id}/download"
        elif options.returns == "inline":
            data = kept.pack(self.store.fingerprint)
            if len(data) > MAX_INLINE_BYTES:
                raise RequestError(
                    f"the state has {len(data)} bytes, inline {MAX_INLINE_BYTES} may; use url",
                    param="state.return",
                )
            found["data"] = base64.b64encode(data).decode()
        return found

    def _completion(self, body: bytes, owner: str, outbox: Outbox) -> Ask:
        request = schema.parse_completion(body, self.tokenizer.vocab_size)
        options = request.options
        self.check_model(options.model)
        start, root = self.beginning(options, owner)
        prompts = [self.prompts.text(given, start, root) for given in request.prompts]
        echoes = []
        if request.echo:
            for given, prompt in zip(request.prompts, prompts, strict=True):
                if isinstance(given, str):
                    own = tuple(prompt.ids[len(self.tokenizer.prompt_prefix) :])
                    echoes.append(Echo(given, own if start is None else tuple(prompt.ids)))
                else:
                    echoes.append(Echo(self.tokenizer.decode(given), tuple(given)))
        wire = Wire(
            self.name,
            self.tokenizer,
            chat=False,
            num_jobs=len(prompts),
            n=options.n,
            include_usage=options.include_usage,
            logprobs=options.num_top is not None,
            echoes=echoes,
        )
        scores = request.echo and options.num_top is not None
        jobs = [
            self.job(prompt, options, outbox, number, owner, start, scores=scores)
            for number, prompt in enumerate(prompts)
        ]
        return Ask(options, jobs, wire)

    def _chat(self, body: bytes, owner: str, outbox: Outbox) -> Ask:
        request = schema.parse_chat(body, self.tokenizer.vocab_size)
        options = request.options
        self.check_model(options.model)
        start, root = self.beginning(options, owner)
        messages, tools = schema.as_dicts(request.messages), request.tools
        prompt = self.prompts.chat(messages, start, root, tools)
        wire = Wire(
            self.name,
            self.tokenizer,
            chat=True,
            n=options.n,
            include_usage=options.include_usage,
            logprobs=options.num_top is not None,
            tools=tools,
        )
        job = self.job(prompt, options, outbox, 0, owner, start, chat=True, tools=tools)
        return Ask(options, [job], wire)

    def beginning(self, options: schema.Options, owner: str) -> tuple[Kept | None, str]:
        """The state to go on from, and the id before the first token.

        Raises: RequestError (404) if there is no such state.
        """
        wanted = options.state.start
        start = self.store.get(wanted, owner) if wanted is not None else None
        return start, self.store.root(owner, options.cache_salt)

    def job(
        self,
        prompt: Prompt,
        options: schema.Options,
        outbox: Outbox,
        number: int,
        owner: str,
        start: Kept | None,
        *,
        chat: bool = False,
        scores: bool = False,
        tools: Tools | None = None,
    ) -> Job:
        """The work for one prompt of a request."""
        late = options.deadline_ms
        if self.store.shelf is not None and not options.state.no_cache:
            # What is on the shelf comes into memory here, before the model's thread asks for it.
            self.store.find(prompt.chain, owner, wait=True)
        return Job(
            ids=prompt.ids,
            chain=prompt.chain,
            params=options.params,
            sink=outbox.sink(number),
            owner=owner,
            start=start,
            stop=(*options.stop, *(self.template.stop if chat else ())),
            n=options.n,
            first=number * options.n,
            trim=chat and options.form is None,
            num_top=options.num_top,
            scores=scores,
            constraint=self._constraint(options.form, tools),
            borders=prompt.borders,
            ending=prompt.ending,
            reuses=not options.state.no_cache,
            priority=options.priority,
            deadline=None if late is None else time.monotonic() + late / 1000,
            progress=options.progress and options.stream,
            spikes=options.spikes and options.stream,
        )

    def _constraint(
        self, form: schema.Form | None, tools: Tools | None
    ) -> Callable[[], Constraint] | None:
        must = tools is not None and bool(tools.must)
        if form is None and not must:
            return None
        if self._forms is None:
            self._forms = Forms(self.tokenizer)
        if form is None:
            assert tools is not None
            return self._forms.call(tools)
        made: Any = getattr(self._forms, form.kind)(form.value)
        found: Callable[[], Constraint] = made
        return found

    def check_model(self, name: str | None) -> None:
        """Raises: RequestError (404) for another model than the one here."""
        if name not in (None, self.name):
            raise RequestError(
                f"no model named '{name:.80}' here; use '{self.name}'",
                status=404,
                param="model",
                code="model_not_found",
            )


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
