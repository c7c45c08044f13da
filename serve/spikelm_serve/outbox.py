"""Events from the model's thread to the event loop, and back-pressure the other way."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass

from spikelm_serve.jobs import Event

MAX_EVENTS = 256
"""Events that may wait for a client before its sequences stop."""


class Outbox:
    """The events of one request's jobs, in the order they came."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()
        self._told = False

    def sink(self, job: int) -> JobSink:
        """Where the events of the job of that number go."""
        return JobSink(self, job)

    @property
    def full(self) -> bool:
        return len(self._items) >= MAX_EVENTS

    def put(self, job: int, event: Event) -> None:
        """From any thread."""
        self._items.append((job, event))
        # One call for all that comes before the loop looks.
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = False
        self._ready.set()

    async def get(self) -> tuple[int, Event]:
        """The next event."""
        while not self._items:
            self._ready.clear()
            if not self._items:
                await self._ready.wait()
        return self._items.popleft()


@dataclass(frozen=True, slots=True)
class JobSink:
    """One job's way into an outbox (`jobs.Sink`)."""

    outbox: Outbox
    job: int

    def put(self, event: Event) -> None:
        self.outbox.put(self.job, event)

    @property
    def full(self) -> bool:
        return self.outbox.full
