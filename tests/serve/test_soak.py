"""Many requests, many of them broken off: nothing is left behind. `make soak` is the long form."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import httpx

from spikelm_serve.bench import ask

REQUESTS = int(os.environ.get("SPIKELM_SOAK_REQUESTS", "240"))
STREAMS = 32

log = logging.getLogger(__name__)

ASK = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 7, "temperature": 0.9}


def counters(client: httpx.Client) -> dict[str, float]:
    found = re.findall(r"^(spikelm_\S+) (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def leave(port: int, body: dict[str, Any], after: str) -> None:
    """Sends a request and goes away: at once, or when the answer has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({**body, "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    await writer.drain()
    if after == "text":
        await reader.readuntil(b"data: ")
    writer.transport.abort()


async def many(port: int, number: int) -> int:
    """So many requests, by `STREAMS` clients; how many were heard to the end."""
    draw, waiting, heard = random.Random(0), iter(range(number)), 0

    async def client() -> None:
        nonlocal heard
        for index in waiting:
            way = draw.random()
            body = {
                "prompt": f"Request {index % 50} of many, " * draw.choice([1, 1, 1, 60]),
                "max_tokens": draw.choice([1, 8, 40]),
                "seed": index,
                "n": draw.choice([1, 1, 2]),
            }
            if way < 0.05:
                await leave(port, {**body, "prompt": "long " * 3000}, "nothing")
            elif way < 0.25:
                await leave(port, {**body, "max_tokens": 5000}, "text")
            else:
                await ask(port, "/v1/completions", body)
                heard += 1

    await asyncio.gather(*(client() for _ in range(STREAMS)))
    return heard


def test_nothing_is_left_behind(started: Any, tmp_path: Path) -> None:
    room = ("--state-memory", "20MiB", "--state-disk", "20MiB")
    process, url = started(*room, "--state-dir", str(tmp_path / "states"))
    port = int(url.rpartition(":")[2])

    def resident() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) << 10

    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        first = client.post("/v1/completions", json=ASK).json()["choices"]
        heard = asyncio.run(many(port, REQUESTS // 4))
        before = resident()
        heard += asyncio.run(many(port, REQUESTS - REQUESTS // 4))
        after = resident()
        end = time.monotonic() + 30
        while (found := counters(client))["spikelm_num_requests_running"] and (
            time.monotonic() < end
        ):
            time.sleep(0.05)
        assert found["spikelm_num_requests_running"] == found["spikelm_num_requests_waiting"] == 0
        assert found["spikelm_state_pool_used_bytes"] <= 20 << 20
        ended = found['spikelm_request_success_total{finished_reason="stop"}']
        left = found.get('spikelm_request_success_total{finished_reason="abort"}', 0)
        assert ended + left <= REQUESTS + 1
        assert ended >= heard
        assert left > 0.1 * REQUESTS
        assert not [name for name in found if 'finished_reason="error"' in name]
        again = client.post("/v1/completions", json={**ASK, "state": {"no_cache": True}}).json()
        assert again["choices"] == first
    # Allocators keep some; what leaks with every request is more.
    assert after - before < 40 << 20
    more = (after - before) >> 10
    log.info("%d requests: %d heard, %d left; %d KiB more", REQUESTS, heard, left, more)
