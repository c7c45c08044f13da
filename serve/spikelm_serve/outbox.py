"""Events from the model's thread to the event loop, and back-pressure the other way."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from spikelm_serve.jobs import Event, Text

MAX_EVENTS = 256
"""Events that may wait for a client before its sequences stop."""


class Courier:
    """Wakes the event loop once for all that a round of the scheduler has put into outboxes: each
    call costs a system call, and the model's thread the interpreter.
    """

    def __init__(self) -> None:
        self._touched: list[Outbox] = []

    def note(self, outbox: Outbox) -> None:
        self._touched.append(outbox)

    def deliver(self) -> None:
        """Tells the outboxes' loop what they have, from the scheduler's thread."""
        if self._touched:
            touched, self._touched = self._touched, []
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
                touched[0].loop.call_soon_threadsafe(_tell, touched)


def _tell(outboxes: Sequence[Outbox]) -> None:
    for outbox in outboxes:
        # Before it is looked into: what comes now is told again.
        outbox.noted = False
        outbox.ready.set()


class Outbox:
    """The events of one request's jobs, in the order they came."""

    def __init__(self, courier: Courier) -> None:
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.noted = False
        self._courier = courier
        self._items: deque[tuple[int, Event]] = deque()

    def sink(self, job: int) -> JobSink:
        """Where the events of the job of that number go."""
        return JobSink(self, job)

    @property
    def full(self) -> bool:
        return len(self._items) >= MAX_EVENTS

    def put(self, job: int, event: Event) -> None:
        """From the scheduler's thread."""
        self._items.append((job, event))
        if not self.noted:
            self.noted = True
            self._courier.note(self)

    async def take(self, seconds: float | None = None) -> list[tuple[int, Event]]:
        """All events that are there, at least one; none if there is none for so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds if not self._items else None):
                while not self._items:
                    # What is told may have been taken already.
                    self.ready.clear()
                    if not self._items:
                        await self.ready.wait()
        found = []
        while self._items:
            found.append(self._items.popleft())
        return found


def joined(items: Sequence[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """The same with the texts that follow each other in a choice as one."""
    found: list[tuple[int, Event]] = []
    last: dict[int, int] = {}
    for job, event in items:
        if not isinstance(event, Text):
            last.clear()
        elif event.index in last:
            before = found[last[event.index]][1]
            assert isinstance(before, Text)
            found[last[event.index]] = (job, before.followed_by(event))
            continue
        else:
            last[event.index] = len(found)
        found.append((job, event))
    return found


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
