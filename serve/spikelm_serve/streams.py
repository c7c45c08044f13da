"""Streamed answers that outlive their connection: numbered events, kept for a while and sent again.

An answer ends when its client goes away, unless it was asked for as `resumable`. Then its events
have ids, as EventSource wants them, and GET /v1/streams/{id} goes on behind the last one that came.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from spikelm.errors import RequestError
from spikelm_serve.schema import PING_SECONDS, Options
from spikelm_serve.transport import EventStream, owner_of
from spikelm_serve.wire import error_body, event

MAX_BYTES = 4 << 20
"""Of one stream, its last events."""
MAX_TOTAL_BYTES = 64 << 20
"""Of all; those that have ended first are forgotten first."""
ABANDONED_SECONDS = 60
"""So long an answer goes on that nobody reads."""
KEPT_SECONDS = 300
"""So long it can be read after its end."""
PING = b": ping\n\n"


class Stream:
    """One answer's events, and whoever reads them."""

    def __init__(
        self,
        owner: str,
        source: AsyncGenerator[bytes, None],
        ping_seconds: float = PING_SECONDS,
    ) -> None:
        self.owner, self.ping_seconds = owner, ping_seconds
        self.ended: float | None = None
        """time.monotonic() of its end."""
        self.nbytes = 0
        self._source = source
        self._events: list[bytes] = []
        self._dropped = 0
        self._readers = 0
        self._left = time.monotonic()
        self._more = asyncio.Event()
        self._task = asyncio.create_task(self._pump())

    async def read(self, number: int) -> AsyncGenerator[bytes, None]:
        """Its events from that number on, as they come."""
        self._readers += 1
        try:
            while True:
                if number < self._dropped:
                    yield event(error_body(_gone(self._dropped)))
                    return
                found = self._events[number - self._dropped :]
                number += len(found)
                if found:
                    yield b"".join(found)
                elif self.ended is not None:
                    return
                else:
                    try:
                        async with asyncio.timeout(self.ping_seconds):
                            await self._more.wait()
                    except TimeoutError:
                        yield PING
        finally:
            self._readers -= 1
            self._left = time.monotonic()

    def is_over(self, number: int) -> bool:
        """Whether there is nothing from event `number` on, and never will be."""
        return self.ended is not None and number == self._dropped + len(self._events)

    def check(self, number: int) -> None:
        """Raises: RequestError unless the events from `number` on are there."""
        if number < self._dropped:
            raise _gone(self._dropped)
        if number > self._dropped + len(self._events):
            raise RequestError(f"the stream has no event {number - 1} yet", param="after")

    async def stop(self) -> bool:
        """Ends the answer. Returns whether it was not at its end."""
        runs = self.ended is None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        return runs

    async def _pump(self) -> None:
        try:
            async for data in self._source:
                for part in data.split(b"\n\n")[:-1]:
                    if not part.startswith(b":"):
                        self._push(part)
                self._wake()
                alone = not self._readers and time.monotonic() - self._left > ABANDONED_SECONDS
                if alone:
                    self._cut("nobody read the stream")
                    break
        except asyncio.CancelledError:
            self._cut("the stream was ended")
            raise
        finally:
            self.ended = time.monotonic()
            self._wake()
            await self._source.aclose()

    def _cut(self, why: str) -> None:
        """Its last events, so that readers know that there is nothing more to wait for."""
        for last in (error_body(RequestError(why, status=499, code="cancelled")), "[DONE]"):
            self._push(event(last)[:-2])

    def _push(self, part: bytes) -> None:
        number = self._dropped + len(self._events)
        self._events.append(b"id: %d\n%b\n\n" % (number, part))
        self.nbytes += len(self._events[-1])
        while self.nbytes > MAX_BYTES:
            self.nbytes -= len(self._events.pop(0))
            self._dropped += 1

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


class Streams:
    """The resumable streams of a server."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}

    def answer(
        self, name: str, request: Request, events: AsyncGenerator[bytes, None], options: Options
    ) -> Response:
        """The response that streams `events`, those of the answer `name`."""
        if not options.resumable:
            return EventStream(events)
        self._forget()
        self._streams[name] = stream = Stream(owner_of(request), events, options.ping_seconds)
        return EventStream(stream.read(0))

    async def resume(self, request: Request) -> Response:
        """The events after the one whose number is in `Last-Event-ID` or `after`."""
        stream = self._find(request)
        last = request.headers.get("last-event-id", request.query_params.get("after", "-1"))
        if last != "-1" and not (last.isascii() and last.isdecimal() and len(last) < 16):
            raise RequestError(
                f"after: {last[:40]!r} given; allowed: the number of an event, or -1", param="after"
            )
        stream.check(int(last) + 1)
        if stream.is_over(int(last) + 1):
            # EventSource asks again until it gets that.
            return Response(status_code=204)
        return EventStream(stream.read(int(last) + 1))

    async def cancel(self, request: Request) -> Response:
        """Ends an answer, which its client's going away does not."""
        cancelled = await self._find(request).stop()
        name = request.path_params["id"]
        return JSONResponse({"id": name, "object": "stream", "cancelled": cancelled})

    async def close(self) -> None:
        for stream in self._streams.values():
            await stream.stop()

    def _find(self, request: Request) -> Stream:
        self._forget()
        name = request.path_params["id"]
        stream = self._streams.get(name)
        if stream is None or stream.owner != owner_of(request):
            raise RequestError(
                f"no stream {name[:80]!r} here; streams with stream_options.resumable are kept "
                f"{KEPT_SECONDS} s after their end",
                status=404,
                code="stream_not_found",
            )
        return stream

    def _forget(self) -> None:
        total, now = sum(stream.nbytes for stream in self._streams.values()), time.monotonic()
        for name, stream in list(self._streams.items()):
            if stream.ended is None:
                continue
            if total > MAX_TOTAL_BYTES or now - stream.ended > KEPT_SECONDS:
                total -= stream.nbytes
                del self._streams[name]


def _gone(first: int) -> RequestError:
    return RequestError(
        f"the events before number {first} are not kept any more", status=404, code="events_gone"
    )
