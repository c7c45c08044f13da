"""States in a folder and in a bucket: the same, and what an object store's protocol makes of it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
import torch
from obstore.store import MemoryStore

from spikelm.errors import ConfigError, RequestError
from spikelm.generate import Engine
from spikelm.state import State
from spikelm_serve import shelf
from spikelm_serve.shelf import Bucket, Folder, Shelf, open_shelf
from spikelm_serve.states import Kept, StateStore

Open = Callable[[], Shelf]


@pytest.fixture(autouse=True)
def _looking_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LOOK_SECONDS", 0.0)


class FakeS3(BaseHTTPRequestHandler):
    """The part of S3's protocol that a shelf speaks, of one bucket."""

    objects: dict[str, bytes]
    written: dict[str, float]
    broken = False

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _time(self, key: str) -> str:
        return datetime.fromtimestamp(self.written[key], UTC).isoformat()

    def _handle(self) -> None:
        url = urlsplit(self.path)
        name = url.path.removeprefix("/bucket").strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.broken or "AKIA" not in self.headers.get("Authorization", ""):
            self._send(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
        elif self.command == "PUT":
            self.objects[name], self.written[name] = body, time.time()
            self._send(200, ETag='"x"')
        elif self.command == "POST":
            keys = re.findall("<Key>(.*?)</Key>", body.decode())
            gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            for key in keys:
                self.objects.pop(key, None)
            self._send(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        elif not name:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            found = "".join(
                f"<Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
                f"<LastModified>{self._time(key)}</LastModified></Contents>"
                for key, data in sorted(self.objects.items())
                if key.startswith(prefix)
            )
            self._send(200, f"<ListBucketResult>{found}</ListBucketResult>".encode())
        elif name not in self.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            data, given = self.objects[name], self.headers.get("Range")
            about = {"ETag": '"x"', "Last_Modified": formatdate(usegmt=True)}
            if given is None:
                self._send(200, data, **about)
            else:
                first, last = map(int, given.removeprefix("bytes=").split("-"))
                part = data[first : last + 1]
                span = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
                self._send(206, part, Content_Range=span, **about)

    do_GET = do_PUT = do_HEAD = do_POST = _handle  # noqa: N815


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeS3]]:
    class Bucketful(FakeS3):
        pass

    Bucketful.objects, Bucketful.written = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucketful)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "here",
    }.items():
        monkeypatch.setenv(name, value)
    yield Bucketful
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["folder", "memory", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens one and the same shelf."""
    if request.param == "folder":
        return lambda: Folder(tmp_path / "states")
    if request.param == "memory":
        store = MemoryStore()
        return lambda: Bucket(store)
    request.getfixturevalue("s3")
    return lambda: open_shelf("s3://bucket/some/where")


def state(value: float = 0.0) -> State:
    return State(({"S": torch.full((1, 2, 3, 4), value)},), torch.tensor([3]))


def opened(place: Open, **options: Any) -> StateStore:
    return StateStore("model", state(), 5, shelf=place(), **options)


def kept(store: StateStore, ids: list[int], owner: str = "") -> Kept:
    chain = store.chain(store.root(owner), ids)
    delta = np.array(ids, np.int32)
    return Kept(chain[-1], None, len(ids), owner, delta, state(float(ids[-1])), torch.zeros(5))


def found(store: StateStore, ids: list[int], owner: str = "") -> int:
    return store.find(store.chain(store.root(owner), ids), owner).tokens


def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it does not become true")


def test_a_restart_and_another_server(shared: Open) -> None:
    one = opened(shared)
    first = one.keep(kept(one, [1, 2]))
    one.keep(kept(one, [3], "me"))
    one.save(first.id, "", "mine")
    one.flush()
    other = opened(shared)
    assert found(other, [1, 2, 4]) == 2
    assert torch.equal(other.get(first.id, "").state.layers[0]["S"], first.state.layers[0]["S"])
    assert (other.get(first.id, "").saved, other.get(first.id, "").name) == (True, "mine")
    # What has been written since it looked.
    one.keep(kept(one, [1, 2, 4]))
    one.flush()
    assert other.get(kept(one, [1, 2, 4]).id, "").tokens == 3
    one.keep(kept(one, [1, 2, 4, 0]))
    one.flush()
    until(lambda: found(other, [1, 2, 4, 0]) == 4)
    third = opened(shared)
    assert [entry["tokens"] for entry in third.listed("")] == [4, 3, 2]
    assert [entry["name"] for entry in third.listed("")] == [None, None, "mine"]
    assert [entry["id"] for entry in third.listed("me")] == [kept(one, [3], "me").id]
    stranger = StateStore("stranger", state(), 5, shelf=shared())
    assert stranger.listed("") == []
    third.delete(first.id, "")
    again = opened(shared)
    with pytest.raises(RequestError, match="no state"):
        again.get(first.id, "")
    for store in (one, other, third, again, stranger):
        store.close()


def test_the_oldest_goes(shared: Open) -> None:
    store = opened(shared)
    size = len(kept(store, [1]).pack("model"))
    assert store.shelf is not None
    store.shelf.max_bytes = 3 * size + size // 2
    store.save(store.keep(kept(store, [1])).id, "")
    for i in (2, 3, 4):
        store.keep(kept(store, [i]))
        store.flush()
        time.sleep(0.02)
    store.save(store.keep(kept(store, [0])).id, "")
    store.save(kept(store, [4]).id, "")
    again = opened(shared)
    assert [found(again, [i]) for i in (1, 0, 4)] == [1, 1, 1]
    assert [found(again, [i]) for i in (2, 3)] == [0, 0]
    with pytest.raises(RequestError, match="no room on the disk") as refused:
        store.save(kept(store, [3]).id, "")
    assert refused.value.status == 507
    for each in (store, again):
        each.close()


def test_a_bucket_that_does_not_answer(s3: type[FakeS3]) -> None:
    store = opened(lambda: open_shelf("s3://bucket/some/where"))
    one = store.keep(kept(store, [1]))
    store.flush()
    assert [name.rpartition("/")[0] for name in s3.objects] == ["some/where/cache"]
    s3.broken = True
    other = store.keep(kept(store, [2]))
    store.flush()
    assert found(store, [2]) == 1
    with pytest.raises(RequestError, match="could not be saved") as failed:
        store.save(other.id, "")
    assert failed.value.status == 507
    with pytest.raises(RequestError, match="could not be deleted"):
        store.delete(one.id, "")
    store.close()
    with pytest.raises(ConfigError, match="cannot keep states in s3://bucket/some/where"):
        open_shelf("s3://bucket/some/where")


def test_damage_in_a_bucket(s3: type[FakeS3]) -> None:
    store = opened(lambda: open_shelf("s3://bucket"))
    one = store.keep(kept(store, [1]))
    store.flush()
    [name] = s3.objects
    for bad in (b"", s3.objects[name][:-1], b"\xff" * 100, s3.objects[name][:20]):
        s3.objects[name] = bad
        again = opened(lambda: open_shelf("s3://bucket"))
        assert found(again, [1]) == 0
        again.listed("")
        with pytest.raises(RequestError):
            again.get(one.id, "")
        again.close()
    store.close()


def test_places_that_are_none() -> None:
    with pytest.raises(ConfigError, match="ftp://x given; allowed: a folder, or s3://"):
        open_shelf("ftp://x")


def test_a_conversation_moves_between_servers(
    serve: Callable[..., httpx.Client], coded_engine: Engine, s3: type[FakeS3]
) -> None:
    like = coded_engine.model.initial_state(1)
    size = coded_engine.tokenizer.vocab_size
    one, other = (
        serve(coded_engine, store=StateStore("model", like, size, shelf=open_shelf("s3://bucket")))
        for _ in range(2)
    )
    talk: list[dict[str, str]] = []
    before = ""
    for turn in range(4):
        client = one if turn % 2 == 0 else other
        talk.append({"role": "user", "content": f"Message {turn}"})
        ask = {"messages": talk, "max_tokens": 8, "seed": turn, "state": {"save": True}}
        body = client.post("/v1/chat/completions", json=ask).json()
        if turn:
            ask = {"messages": talk[-1:], "max_tokens": 8, "seed": turn, "state": {"from": before}}
            again = client.post("/v1/chat/completions", json=ask).json()
            assert again["choices"] == body["choices"]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        before = body["state"]["id"]
        talk.append(body["choices"][0]["message"])
    assert s3.objects
