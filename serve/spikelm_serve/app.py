"""The web application: routes and their order of guards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from spikelm.generate import Engine
from spikelm.template import ChatTemplate
from spikelm_serve.api import Api
from spikelm_serve.keys import Keys
from spikelm_serve.page import page
from spikelm_serve.responses import Responses
from spikelm_serve.scheduler import MAX_WAITING, SLOTS, Scheduler
from spikelm_serve.states import StateStore
from spikelm_serve.states_api import StatesApi
from spikelm_serve.transport import Endpoint, Guard, guarded, http_error

MAX_BODY_BYTES = 2_000_000
MAX_STATE_BYTES = 1 << 30


def create_app(
    engine: Engine,
    model_name: str,
    *,
    template: ChatTemplate | None = None,
    store: StateStore | None = None,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    slots: int = SLOTS,
    max_waiting: int = MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_state_bytes: int = MAX_STATE_BYTES,
    allow_upload: bool = False,
) -> Starlette:
    """The server of one model.

    `hosts` are the names a request's Host header may give; None takes any. Without `keys` nobody
    needs one. `app.state.drain(seconds)` takes no more requests and lets those that run end,
    `app.state.stop()` ends them.
    """
    store = store or StateStore("")
    scheduler = Scheduler(engine, store, slots=slots, max_waiting=max_waiting)
    api = Api(engine, model_name, template or ChatTemplate(), store, scheduler, max_body_bytes)
    responses = Responses(api)
    states = StatesApi(api, allow_upload=allow_upload, max_state_bytes=max_state_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)
        await api.streams.close()
        await asyncio.to_thread(store.close)

    guard = partial(guarded, metrics=api.metrics)

    def route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        return Route(path, guard(endpoint), methods=[method])

    app = Starlette(
        routes=[
            route("/", page),
            route("/static/{name}", page),
            route("/health", api.health),
            route("/ready", api.ready),
            route("/metrics", api.show_metrics),
            route("/openapi.json", api.describe),
            route("/v1/models", api.models),
            route("/v1/models/{model:path}", api.model),
            route("/v1/completions", api.completions, "POST"),
            route("/v1/chat/completions", api.chat_completions, "POST"),
            route("/v1/responses", responses.create, "POST"),
            route("/v1/responses/{id}", responses.delete, "DELETE"),
            route("/v1/streams/{id}", api.streams.resume),
            route("/v1/streams/{id}", api.streams.cancel, "DELETE"),
            route("/tokenize", api.tokenize, "POST"),
            route("/detokenize", api.detokenize, "POST"),
            *states.routes(guard),
        ],
        middleware=[Middleware(Guard, hosts=hosts, keys=keys or Keys([]))],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.drain, app.state.stop = scheduler.drain, scheduler.stop
    return app
