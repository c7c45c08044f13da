"""The routes of states: list, show, fork, rewind, verify, save, download, upload, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from spikelm.errors import RequestError
from spikelm.sampling import SamplingParams
from spikelm_serve import schema
from spikelm_serve.api import Api
from spikelm_serve.jobs import Done, Job
from spikelm_serve.states import Kept, describe
from spikelm_serve.transport import Endpoint, owner_of, read_body

FILE_TYPE = "application/octet-stream"


class StatesApi:
    """Those routes; uploads only if they are allowed."""

    def __init__(self, api: Api, *, allow_upload: bool, max_state_bytes: int) -> None:
        self._api, self._store = api, api.store
        self._allow_upload, self._max_state_bytes = allow_upload, max_state_bytes

    def routes(self, guarded: Callable[[Endpoint], Endpoint]) -> list[Route]:
        def route(path: str, endpoint: Endpoint, method: str = "POST") -> Route:
            return Route(path, guarded(endpoint), methods=[method])

        one = "/v1/states/{id}"
        return [
            route("/v1/states", self.listed, "GET"),
            route("/v1/states", self.upload),
            route(one, self.show, "GET"),
            route(one, self.delete, "DELETE"),
            route(f"{one}/fork", self.fork),
            route(f"{one}/save", self.save),
            route(f"{one}/rewind", self.rewind),
            route(f"{one}/verify", self.verify),
            route(f"{one}/download", self.download, "GET"),
        ]

    async def listed(self, request: Request) -> Response:
        found = await asyncio.to_thread(self._store.listed, owner_of(request))
        return JSONResponse({"object": "list", "data": found})

    async def show(self, request: Request) -> Response:
        return self._shown(await self._get(request))

    async def delete(self, request: Request) -> Response:
        name = request.path_params["id"]
        await asyncio.to_thread(self._store.delete, name, owner_of(request))
        return JSONResponse({"id": name, "object": "state.deleted", "deleted": True})

    async def fork(self, request: Request) -> Response:
        name = schema.parse_name(await self._body(request))
        kept = await asyncio.to_thread(
            self._store.fork, request.path_params["id"], owner_of(request), name
        )
        return self._shown(kept)

    async def save(self, request: Request) -> Response:
        name = schema.parse_name(await self._body(request))
        kept = await asyncio.to_thread(
            self._store.save, request.path_params["id"], owner_of(request), name
        )
        return self._shown(kept)

    async def download(self, request: Request) -> Response:
        kept = await self._get(request)
        data = await asyncio.to_thread(kept.pack, self._store.fingerprint)
        disposition = {"Content-Disposition": f'attachment; filename="{kept.id}.safetensors"'}
        return Response(data, media_type=FILE_TYPE, headers=disposition)

    async def upload(self, request: Request) -> Response:
        if not self._allow_upload:
            raise RequestError(
                "this server takes no states; it would with --allow-upload",
                status=403,
                code="upload_disabled",
            )
        data = await read_body(request, self._max_state_bytes, FILE_TYPE)
        kept = await asyncio.to_thread(self._store.take_in, data, owner_of(request))
        return self._shown(kept)

    async def rewind(self, request: Request) -> Response:
        """The conversation as it was after a message, or after a number of tokens."""
        target = schema.parse_rewind(await self._body(request))
        kept = await self._get(request)
        line = [kept, *await asyncio.to_thread(lambda: list(self._store.ancestors(kept)))]
        if target.to_message is not None:
            found = next((k for k in line if k.messages == target.to_message), None)
            if found is None:
                there = sorted({k.messages for k in line if k.messages is not None})
                raise RequestError(
                    f"to_message: {target.to_message} given; kept are the states after "
                    f"{', '.join(map(str, there)) or 'no'} messages",
                    param="to_message",
                    status=404,
                    code="state_not_found",
                )
            return self._shown(found)
        assert target.to_token is not None
        return self._shown(await self._at(request, line, target.to_token))

    async def verify(self, request: Request) -> Response:
        """Reads the tokens of a state again, from the beginning, and compares."""
        kept = await self._get(request)
        line = [kept, *await asyncio.to_thread(lambda: list(self._store.ancestors(kept)))]
        _check_whole(line)
        ids = [int(token) for each in reversed(line) for token in each.delta]
        done = await self._read(request, ids, None, keep=False)
        assert done is not None
        return JSONResponse(
            {
                "id": kept.id,
                "object": "state.verified",
                "tokens": len(ids),
                **_difference(kept, done),
            }
        )

    async def _at(self, request: Request, line: list[Kept], tokens: int) -> Kept:
        newest = line[0]
        if not 1 <= tokens <= newest.tokens:
            raise RequestError(
                f"to_token: {tokens} given; allowed: 1 to {newest.tokens}", param="to_token"
            )
        at = next((i for i, k in enumerate(line) if k.tokens <= tokens), len(line))
        if at < len(line) and line[at].tokens == tokens:
            return line[at]
        if at == len(line):
            _check_whole(line)
        start = line[at] if at < len(line) else None
        before = start.tokens if start else 0
        ids = [int(t) for t in line[at - 1].delta[: tokens - before]]
        found = await self._read(request, ids, start, keep=True)
        assert found is not None
        return found

    async def _read(
        self, request: Request, ids: list[int], start: Kept | None, *, keep: bool
    ) -> Kept | None:
        """The state after `ids`, read again; kept under its own name or not at all."""
        api, owner, outbox = self._api, owner_of(request), self._api.outbox()
        head = start.id if start else self._store.root(owner, "" if keep else "verify")
        job = Job(
            ids=ids,
            chain=self._store.chain(head, ids),
            params=SamplingParams(max_tokens=1, temperature=0),
            sink=outbox.sink(0),
            owner=owner,
            start=start,
            reads_only=True,
            reuses=keep,
        )
        api.scheduler.submit([job])
        events = await api.collect(request, [job], outbox)
        done = next(event for _, event in events if isinstance(event, Done))
        return done.kept[0]

    async def _get(self, request: Request) -> Kept:
        return await asyncio.to_thread(
            self._store.get, request.path_params["id"], owner_of(request)
        )

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._api.max_body_bytes)

    def _shown(self, kept: Kept) -> Response:
        return JSONResponse(describe(kept, self._store.fingerprint))


def _check_whole(line: list[Kept]) -> None:
    """Raises: RequestError (404) if the tokens of a state, given with those before it, are not all
    known: some are not there any more, or it came from elsewhere.
    """
    known = sum(len(kept.delta) for kept in line)
    if known != line[0].tokens:
        raise RequestError(
            f"of the {line[0].tokens} tokens only the last {known} are known here",
            status=404,
            code="state_not_found",
        )


def _difference(one: Kept, other: Kept) -> dict[str, Any]:
    """How far two states of the same tokens are apart."""
    pairs = [
        (a[name], b[name])
        for a, b in zip(one.state.layers, other.state.layers, strict=True)
        for name in a
    ]
    pairs.append((one.logits, other.logits))
    largest = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            # A cache that grows has more room in one of them.
            length = min(a.shape[1], b.shape[1])
            a, b = a[:, :length], b[:, :length]
        if a.numel():
            largest = max(largest, float((a.double() - b.double()).abs().max()))
    same = torch.equal(one.state.position, other.state.position)
    return {"equal": same and largest == 0.0, "largest_difference": largest}
