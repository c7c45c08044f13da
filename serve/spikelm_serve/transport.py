"""HTTP around the endpoints: who may ask, bounded bodies, streams, errors as OpenAI writes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from spikelm.errors import RequestError
from spikelm_serve.keys import Keys
from spikelm_serve.page import KINDS
from spikelm_serve.scheduler import PATIENCE_SECONDS, incident
from spikelm_serve.wire import error_body

if TYPE_CHECKING:
    from spikelm_serve.metrics import Metrics

Endpoint = Callable[[Request], Awaitable[Response]]

OPEN_PATHS = frozenset({"/", "/health", "/ready", *(f"/static/{name}" for name in KINDS)})
"""What needs no key."""
RETRY_SECONDS = 1

log = logging.getLogger(__name__)


class Guard:
    """Lets in requests for the server's own names, from its own pages, with a key.

    A web page must not reach a local server by a name of its own (`hosts`; None takes any), nor
    from another origin.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, keys: Keys) -> None:
        self.app, self.hosts, self.keys = app, hosts, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            error = self._problem(scope, headers)
            if error is not None:
                app = error_response(error)
        await app(scope, receive, send)

    def _problem(self, scope: Scope, headers: dict[bytes, bytes]) -> RequestError | None:
        host = headers.get(b"host")
        if self.hosts is not None:
            allowed = ", ".join(sorted(self.hosts))
            if _name(host) not in self.hosts:
                return RequestError(
                    f"this server answers only to the host names {allowed}",
                    status=403,
                    code="host_not_allowed",
                )
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc.encode() != host:
            return RequestError(
                "requests from other origins are not allowed", status=403, code="origin_not_allowed"
            )
        if not self.keys or scope["path"] in OPEN_PATHS:
            return None
        owner = self.keys.owner(_key(headers))
        if owner is None:
            return RequestError(
                "a key is needed: Authorization: Bearer KEY, or X-Api-Key: KEY",
                status=401,
                code="invalid_api_key",
            )
        scope["spikelm.owner"] = owner
        return None


def _name(host: bytes | None) -> str | None:
    try:
        return urlsplit(f"//{(host or b'').decode('ascii')}").hostname
    except ValueError:
        return None


def _key(headers: dict[bytes, bytes]) -> str | None:
    kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    given = headers.get(b"x-api-key")
    return None if given is None else given.decode("latin-1")


def owner_of(request: Request) -> str:
    """The name of the key that a request came with, "" where none is needed."""
    owner: str = request.scope.get("spikelm.owner", "")
    return owner


def guarded(endpoint: Endpoint, metrics: Metrics) -> Endpoint:
    """Turns whatever an endpoint raises into a response; the server goes on."""

    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            found = error
        except ClientDisconnect:
            # Nobody reads it; nginx counts these under the same number.
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001
            found = incident(error)
        metrics.refused.labels(str(found.status)).inc()
        return error_response(found)

    return respond


def error_response(error: RequestError) -> Response:
    """OpenAI's error object."""
    headers = {}
    if error.status == 413:
        # What is left of a refused body is not read, so the connection cannot be used again.
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    return JSONResponse(error_body(error), error.status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    messages = {
        404: f"no such route: {path}; docs/serving.md lists them",
        405: f"{request.method} is not allowed for {path}",
    }
    message = messages.get(error.status_code, error.detail)
    code = "not_found" if error.status_code == 404 else None
    body = error_body(RequestError(message, status=error.status_code, code=code))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        # The framework names those of one route, and a path may have several.
        matching = [r for r in request.app.routes if r.matches(request.scope)[0] != Match.NONE]
        headers["Allow"] = ", ".join(sorted({name for r in matching for name in r.methods or ()}))
    return JSONResponse(body, error.status_code, headers)


async def read_body(request: Request, limit: int, kind: str = "application/json") -> bytes:
    """The body of at most `limit` bytes; more is refused without being kept."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        # Also keeps web pages out: browsers send other types across sites without asking.
        raise RequestError(f"Content-Type '{given[:80]}' given; send {kind}")
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


class EventStream(StreamingResponse):
    """Server-sent events, for a client that reads them: one that does not is cut off."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient(message: object) -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await send(message)  # type: ignore[arg-type]

        try:
            await super().__call__(scope, receive, patient)
        finally:
            await self._events.aclose()
