"""The web page: a few files, and nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from spikelm.errors import RequestError

FOLDER = Path(__file__).parent / "static"
KINDS = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "base.js": "text/javascript",
    "server.js": "text/javascript",
    "spikes.js": "text/javascript",
    "tree.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    # Scripts and styles are files of this server; what the model says is never code.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """`/` and `/static/{name}`. Raises: RequestError (404) for another name."""
    name = request.path_params.get("name", "index.html")
    if name not in KINDS:
        raise RequestError(f"no such file: {name[:80]}", status=404, code="not_found")
    return Response((FOLDER / name).read_bytes(), media_type=KINDS[name], headers=HEADERS)
