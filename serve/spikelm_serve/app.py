"""The web application: routes, limits and errors; requests are plain data before they get here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
)
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from spikelm.errors import RequestError
from spikelm.generate import Engine, prompt_ids
from spikelm.template import ChatTemplate
from spikelm_serve import schema
from spikelm_serve.answer import Piece, Prompt, answer
from spikelm_serve.wire import Wire, error_body, event
from spikelm_serve.worker import Worker

MAX_BODY_BYTES = 2_000_000

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    model_name: str,
    *,
    template: ChatTemplate | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    hosts: Collection[str] | None = None,
) -> Starlette:
    """The server of one model.

    `hosts` are the names a request's Host header may give; None takes any.
    """
    api = Api(engine, model_name, template or ChatTemplate(), max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        api.worker.close()

    app = Starlette(
        routes=[
            Route("/health", _guarded(api.health)),
            Route("/v1/models", _guarded(api.models)),
            Route("/v1/models/{model:path}", _guarded(api.model)),
            Route("/v1/completions", _guarded(api.completions), methods=["POST"]),
            Route("/v1/chat/completions", _guarded(api.chat_completions), methods=["POST"]),
        ],
        middleware=[] if hosts is None else [Middleware(HostCheck, hosts=frozenset(hosts))],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.stop = api.worker.stop
    return app


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is ready for the model."""

    options: schema.Options
    prompts: tuple[Prompt, ...]
    stop: tuple[str, ...]
    chat: bool


class Api:
    """The endpoints, around one engine and its worker."""

    def __init__(
        self, engine: Engine, model_name: str, template: ChatTemplate, max_body_bytes: int
    ) -> None:
        self.worker = Worker()
        self._engine = engine
        self._template = template
        self._max_body_bytes = max_body_bytes
        self._name = model_name
        self._card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "spikelm",
        }

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card)

    async def completions(self, request: Request) -> Response:
        return await self._respond(request, self._completion_job)

    async def chat_completions(self, request: Request) -> Response:
        return await self._respond(request, self._chat_job)

    async def _respond(self, request: Request, prepare: Callable[[bytes], Job]) -> Response:
        body = await _read_body(request, self._max_body_bytes)
        # A long prompt takes long to parse and tokenise: off the event loop.
        job = await asyncio.to_thread(prepare, body)
        wire = Wire(self._name, chat=job.chat)
        if job.options.stream:
            events = self._events(job, wire)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
                background=BackgroundTask(events.aclose),
            )
        return JSONResponse(wire.whole(await _unless_gone(request, self._collect(job))))

    async def _events(self, job: Job, wire: Wire) -> AsyncGenerator[bytes, None]:
        include_usage = job.options.include_usage

        def make() -> Iterator[bytes]:
            return map(event, wire.chunks(self._pieces(job), include_usage=include_usage))

        try:
            async with contextlib.aclosing(self.worker.stream(make)) as events:
                async for item in events:
                    yield item
        except RequestError as error:
            yield event(error_body(error))
        except Exception:
            failure = _failure()
            logger.exception("%s", failure)
            yield event(error_body(failure))
        yield event("[DONE]")

    async def _collect(self, job: Job) -> list[Piece]:
        async with contextlib.aclosing(self.worker.stream(partial(self._pieces, job))) as pieces:
            return [piece async for piece in pieces]

    def _pieces(self, job: Job) -> Iterator[Piece]:
        options = job.options
        return answer(
            self._engine, job.prompts, options.params, job.stop, n=options.n, trim=job.chat
        )

    def _completion_job(self, body: bytes) -> Job:
        tokenizer = self._engine.tokenizer
        request = schema.parse_completion(body, tokenizer.vocab_size)
        self._check_model(request.options.model)
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                ids, text = tuple(prompt_ids(tokenizer, prompt)), prompt
            else:
                ids, text = prompt, tokenizer.decode(prompt)
            prompts.append(Prompt(ids=ids, echo=text if request.echo else ""))
        return Job(request.options, tuple(prompts), request.options.stop, chat=False)

    def _chat_job(self, body: bytes) -> Job:
        request = schema.parse_chat(body)
        self._check_model(request.options.model)
        text = self._template.render(
            [{"role": m.role, "content": m.content} for m in request.messages]
        )
        prompt = Prompt(ids=tuple(prompt_ids(self._engine.tokenizer, text, special=True)))
        stop = (*request.options.stop, *self._template.stop)
        return Job(request.options, (prompt,), stop, chat=True)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._name):
            raise RequestError(
                f"no model named '{name:.80}' here; use '{self._name}'",
                status=404,
                param="model",
                code="model_not_found",
            )


class HostCheck:
    """Refuses requests for other host names: a web page must not reach a local server by one."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and not self._is_allowed(dict(scope["headers"]).get(b"host")):
            allowed = ", ".join(sorted(self.hosts))
            message = f"this server answers only to the host names {allowed}"
            app = _error_response(RequestError(message, status=403, code="host_not_allowed"))
        await app(scope, receive, send)

    def _is_allowed(self, header: bytes | None) -> bool:
        try:
            name = urlsplit(f"//{(header or b'').decode('ascii')}").hostname
        except ValueError:
            return False
        return name in self.hosts


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Turns whatever an endpoint raises into a response; the server goes on."""

    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            return _error_response(error)
        except ClientDisconnect:
            # Nobody reads it; nginx counts these under the same number.
            return Response(status_code=499)
        except Exception:
            failure = _failure()
            logger.exception("%s", failure)
            return _error_response(failure)

    return respond


def _failure() -> RequestError:
    """What a client is told of an exception it could not cause: where to look for it."""
    incident = f"err-{uuid.uuid4().hex[:12]}"
    message = f"the server failed to answer; its log has the reason under {incident}"
    return RequestError(message, status=500, code="internal_error")


def _error_response(error: RequestError) -> Response:
    # What is left of a refused body is not read, so the connection cannot be used again.
    headers = {"Connection": "close"} if error.status == 413 else None
    return JSONResponse(error_body(error), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    messages = {
        404: f"no such route: {path}; there are /v1/models, /v1/completions, "
        "/v1/chat/completions and /health",
        405: f"{request.method} is not allowed for {path}",
    }
    message = messages.get(error.status_code, error.detail)
    code = "not_found" if error.status_code == 404 else None
    body = error_body(RequestError(message, status=error.status_code, code=code))
    return JSONResponse(body, error.status_code, error.headers)


async def _read_body(request: Request, limit: int) -> bytes:
    """The JSON body of at most `limit` bytes; more is refused without being kept."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps web pages out: browsers send other types across sites without asking.
        raise RequestError(f"Content-Type '{kind[:80]}' given; send application/json")
    too_large = RequestError(
        f"the request body is larger than {limit} bytes", status=413, code="body_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away.

    Raises: ClientDisconnect.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = answer_task, _ = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not answer_task.done():
            raise ClientDisconnect
        return answer_task.result()
    finally:
        for task in tasks:
            task.cancel()
