"""Streams that outlive their connection: the same bytes, whenever they are read."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm_serve import streams
from spikelm_serve.keys import Keys, make

Serve = Callable[..., httpx.Client]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def asked(**fields: Any) -> dict[str, Any]:
    options = {"include_usage": True, "resumable": True}
    return {"prompt": "x", "stream": True, "stream_options": options, "seed": 3, **fields}


def name_of(first: str) -> str:
    name: str = json.loads(first.partition("data: ")[2].partition("\n\n")[0])["id"]
    return name


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it does not become true")


def running(client: httpx.Client) -> int:
    page = client.get("/metrics").text
    [line] = [li for li in page.splitlines() if li.startswith("spikelm_num_requests_running ")]
    return int(float(line.split()[1]))


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (COMPLETIONS, {"max_tokens": 40}),
        (CHAT, {"prompt": None, "messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"prompt": None, "input": "Hi", "stream_options": {"resumable": True}}),
    ],
)
def test_read_again_from_every_event(
    serve: Serve, make_engine: Any, route: str, fields: dict[str, Any]
) -> None:
    client = serve(make_engine("Some words, and then it ends."))
    whole = client.post(route, json=asked(**fields)).text
    events = [event + "\n\n" for event in whole.split("\n\n")[:-1]]
    assert [event.split("\n")[0] for event in events] == [f"id: {i}" for i in range(len(events))]
    data = json.loads(events[0].partition("data: ")[2])
    stream = f"/v1/streams/{data['response']['id'] if 'response' in data else data['id']}"
    assert client.get(stream).text == whole
    for i in range(len(events)):
        rest = "".join(events[i + 1 :])
        assert client.get(stream, params={"after": i}).text == rest
        assert client.get(stream, headers={"Last-Event-ID": str(i)}).text == rest
    plain = client.post(route, json=asked(**{**fields, "stream_options": {}})).text
    assert plain.startswith(("data: ", "event: "))


def test_a_lost_connection(serve: Serve, make_engine: Any) -> None:
    engine = make_engine("word " * 20, delay=0.005)
    client = serve(engine)
    ask = asked(max_tokens=200)
    seen = ""
    with client.stream("POST", COMPLETIONS, json=ask) as response:
        for piece in response.iter_text():
            seen += piece
            if seen.count("\n\n") >= 3:
                break
    seen = seen[: seen.rindex("\n\n") + 2]
    last = seen.count("\n\n") - 1
    rest = client.get(f"/v1/streams/{name_of(seen)}", params={"after": last}).text
    text = "".join(
        json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        for line in (seen + rest).splitlines()
        if line.startswith("data: {") and '"choices": []' not in line
    )
    assert text == "word " * 20
    assert rest.endswith("data: [DONE]\n\n")
    assert engine.steps < 110
    # One that is not resumable ends with its connection.
    with client.stream("POST", COMPLETIONS, json={**ask, "stream_options": {}}) as response:
        next(response.iter_text())
    until(lambda: running(client) == 0)


def test_ended_by_hand_or_when_nobody_reads(
    serve: Serve, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(make_engine(delay=0.002))
    ask = asked(max_tokens=100_000)

    def begun() -> str:
        with client.stream("POST", COMPLETIONS, json=ask) as response:
            return name_of(next(response.iter_text()))

    stream = f"/v1/streams/{begun()}"
    time.sleep(0.1)
    assert running(client) == 1
    assert client.delete(stream).json()["cancelled"]
    until(lambda: running(client) == 0)
    said = client.get(stream).text
    assert said.startswith("id: 0\n")
    assert '"code": "cancelled"' in said
    assert said.endswith("data: [DONE]\n\n")
    assert not client.delete(stream).json()["cancelled"]
    # EventSource comes again until it hears that.
    assert client.get(stream, params={"after": said.count("\n\n") - 1}).status_code == 204
    monkeypatch.setattr(streams, "ABANDONED_SECONDS", 0.2)
    begun()
    until(lambda: running(client) == 0)


def test_what_is_kept_is_bounded(
    serve: Serve, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(make_engine("A sentence of some length."))
    monkeypatch.setattr(streams, "MAX_BYTES", 1500)
    whole = client.post(COMPLETIONS, json=asked(max_tokens=60)).text
    name = name_of(whole)
    gone = client.get(f"/v1/streams/{name}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "events_gone")
    rest = client.get(f"/v1/streams/{name}", params={"after": whole.count("\n\n") - 3}).text
    assert whole.endswith(rest)
    assert rest.count("\n\n") == 2
    monkeypatch.setattr(streams, "KEPT_SECONDS", 0)
    assert client.get(f"/v1/streams/{name}").json()["error"]["code"] == "stream_not_found"
    monkeypatch.setattr(streams, "KEPT_SECONDS", 300)
    monkeypatch.setattr(streams, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(streams, "MAX_TOTAL_BYTES", 10_000)
    names = [name_of(client.post(COMPLETIONS, json=asked()).text) for _ in range(4)]
    kept = [client.get(f"/v1/streams/{n}").status_code for n in names]
    assert kept[0] == 404
    assert kept[-1] == 200


def test_a_reader_that_falls_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_BYTES", 100)

    async def work() -> list[bytes]:
        stalled = asyncio.Event()

        async def source() -> AsyncGenerator[bytes, None]:
            yield b"data: first\n\n"
            await stalled.wait()
            for i in range(100):
                yield b"data: %d\n\n" % i

        stream = streams.Stream("", source())
        slow = stream.read(0)
        found = [await anext(slow)]
        stalled.set()
        while stream.ended is None:
            await asyncio.sleep(0.001)
        return found + [data async for data in slow]

    first, told = asyncio.run(work())
    assert first == b"id: 0\ndata: first\n\n"
    assert b"are not kept any more" in told


def test_streams_belong_to_keys_and_have_numbers(
    serve: Serve, make_engine: Any, tmp_path: Path
) -> None:
    lines, headers = [], {}
    for name in ("ann", "bob"):
        key, line = make(name)
        lines.append(line)
        headers[name] = {"Authorization": f"Bearer {key}"}
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    client = serve(make_engine("Yes."), keys=Keys.read(path))
    name = name_of(client.post(COMPLETIONS, json=asked(), headers=headers["ann"]).text)
    stream = f"/v1/streams/{name}"
    assert client.get(stream, headers=headers["ann"]).status_code == 200
    for method in ("GET", "DELETE"):
        refused = client.request(method, stream, headers=headers["bob"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "stream_not_found")
    for bad in ("-2", "x", "", "1" * 30, "٣"):
        refused = client.get(stream, params={"after": bad}, headers=headers["ann"])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after"), bad
    refused = client.get(stream, params={"after": 9999}, headers=headers["ann"])
    assert "has no event 9999 yet" in refused.json()["error"]["message"]


def test_only_for_streams(noise: httpx.Client) -> None:
    ask = {"prompt": "x", "stream_options": {"resumable": True}}
    refused = noise.post(COMPLETIONS, json=ask)
    assert refused.json()["error"]["param"] == "stream_options"
    ask = {"prompt": "x", "stream": True, "stream_options": {"resumable": 1}}
    assert noise.post(COMPLETIONS, json=ask).json()["error"]["param"] == "stream_options.resumable"
