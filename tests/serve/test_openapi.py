"""The document says what the server does: Schemathesis asks everything that it allows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm_serve.app import create_app
from spikelm_serve.states import StateStore

Serve = Callable[..., httpx.Client]
SCHEMATHESIS = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
EXAMPLES = os.environ.get("SPIKELM_SCHEMATHESIS", "3")
"""For each route; 300 in `make soak`."""


def test_every_route_is_in_it(make_engine: Any, noise: httpx.Client) -> None:
    found = noise.get("/openapi.json").json()
    told = {(path, method) for path, about in found["paths"].items() for method in about}
    there = {
        (route.path.replace(":path", ""), method.lower())
        for route in create_app(make_engine(), "tiny").routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    }
    assert told == there


@pytest.mark.skipif(SCHEMATHESIS is None, reason="schemathesis is not installed")
def test_schemathesis_finds_nothing(serve: Serve, make_engine: Any, tmp_path: Path) -> None:
    client = serve(make_engine("Yes."), store=StateStore("model"), allow_upload=True)
    assert SCHEMATHESIS is not None
    command = [SCHEMATHESIS, "run", f"{client.base_url}/openapi.json", "--checks", "all"]
    # Fields that depend on each other, such as stream_options on stream, are described in words.
    command += ["--exclude-checks", "positive_data_acceptance", "--max-examples", EXAMPLES]
    command += ["--generation-deterministic", "--continue-on-failure", "--no-color"]
    command += ["--suppress-health-check", "all", "--warnings", "off"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    # All but the document itself.
    paths = client.get("/openapi.json").json()["paths"]
    number = sum(len(about) for about in paths.values()) - 1
    assert f"{number} selected / {number} total" in ran.stdout
