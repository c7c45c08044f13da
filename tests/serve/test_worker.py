"""The worker: order, errors, and leaving early."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from spikelm.errors import RequestError
from spikelm_serve.worker import Worker


def counted(seen: list[int], n: int = 10**6) -> Iterator[int]:
    for i in range(n):
        seen.append(i)
        time.sleep(0.001)
        yield i


def test_items_come_in_order_and_one_after_the_other() -> None:
    async def run() -> None:
        worker = Worker()
        seen: list[int] = []

        async def drain() -> list[int]:
            return [i async for i in worker.stream(lambda: counted(seen, 5))]

        assert list(await asyncio.gather(drain(), drain())) == [[0, 1, 2, 3, 4]] * 2
        assert seen == [0, 1, 2, 3, 4] * 2
        worker.close()

    asyncio.run(run())


def test_errors_reach_the_reader() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    async def run() -> None:
        worker = Worker()
        stream = worker.stream(fail)
        assert await anext(stream) == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(stream)
        assert [i async for i in worker.stream(lambda: iter([2]))] == [2]
        worker.close()

    asyncio.run(run())


def test_leaving_early_stops_the_iterator() -> None:
    async def run() -> None:
        worker = Worker()
        seen: list[int] = []
        async with contextlib.aclosing(worker.stream(lambda: counted(seen))) as stream:
            async for i in stream:
                if i == 3:
                    break
        assert [i async for i in worker.stream(lambda: iter([7]))] == [7]
        assert len(seen) < 50
        worker.close()

    asyncio.run(run())


def test_close_ends_what_runs() -> None:
    async def run() -> None:
        worker = Worker()
        stream = worker.stream(lambda: counted([]))
        assert await anext(stream) == 0
        threads = threading.active_count()
        worker.close()
        assert threading.active_count() == threads - 1
        rest = []
        with pytest.raises(RequestError, match="shutting down"):
            rest = [i async for i in stream]
        assert rest == []

    asyncio.run(run())
