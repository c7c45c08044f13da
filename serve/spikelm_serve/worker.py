"""One thread for the model: generations queue up there, the event loop never waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from spikelm.errors import RequestError

T = TypeVar("T")


class Worker:
    """Runs iterators on one thread, one after the other, in the order they were asked for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "spikelm-worker")
        self._closing = threading.Event()

    async def stream(self, make: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """The items of `make()`; leaving this iterator early stops it before its next item.

        Raises: whatever the iterator raises.
        """
        loop = asyncio.get_running_loop()
        # One entry per item, then one without.
        items: asyncio.Queue[tuple[T, ...]] = asyncio.Queue()
        left = threading.Event()

        def work() -> None:
            try:
                for item in make():
                    if left.is_set():
                        return
                    if self._closing.is_set():
                        raise RequestError("the server is shutting down", status=503)
                    loop.call_soon_threadsafe(items.put_nowait, (item,))
            finally:
                loop.call_soon_threadsafe(items.put_nowait, ())

        future = self._executor.submit(work)
        try:
            while item := await items.get():
                yield item[0]
            await asyncio.wrap_future(future)
        finally:
            left.set()
            future.cancel()

    def stop(self) -> None:
        """Ends what runs before its next item, with an error its client is told."""
        self._closing.set()

    def close(self) -> None:
        """Stops what runs and forgets what waits."""
        self.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)
