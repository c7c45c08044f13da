"""Who is let in, what is counted, and how the server goes."""

from __future__ import annotations

import re
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.generate import Engine
from spikelm_serve import app as app_module
from spikelm_serve.keys import Keys, make
from spikelm_serve.transport import OPEN_PATHS

Serve = Callable[..., httpx.Client]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REASONS = ("stop", "length")
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def keyed(serve: Serve, make_engine: Any, tmp_path: Path) -> tuple[httpx.Client, str]:
    key, line = make("ann")
    (tmp_path / "keys").write_text(line + "\n")
    return serve(make_engine("ok"), keys=Keys.read(tmp_path / "keys")), key


def test_every_route_needs_a_key(keyed: tuple[httpx.Client, str], make_engine: Any) -> None:
    client, key = keyed
    app = app_module.create_app(make_engine("ok"), "tiny")
    asked = 0
    for route in app.routes:
        path = re.sub(r"\{.*?\}", "x", route.path)  # type: ignore[attr-defined]
        for method in route.methods or ():  # type: ignore[attr-defined]
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": key[:-1]}):
                response = client.request(method, path, headers=headers)
                asked += 1
                if path in OPEN_PATHS:
                    assert response.status_code == 200
                else:
                    assert response.status_code == 401, path
                    if method != "HEAD":
                        assert response.json()["error"]["code"] == "invalid_api_key"
    assert asked > 40
    app.state.stop()
    for headers in ({"Authorization": f"bearer {key}"}, {"X-Api-Key": key}):
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_key_is_compared_in_constant_time(tmp_path: Path) -> None:
    key, line = make("ann")
    (tmp_path / "keys").write_text(line + "\n")
    keys = Keys.read(tmp_path / "keys")
    for length in (8, 16, 32, len(key)):
        # Right up to a place, and wrong behind it.
        given = [key[:n] + "~" * (length - n) for n in range(0, length, length // 8)]
        times: dict[str, list[float]] = {guess: [] for guess in given}
        for _ in range(1000):
            for guess, found in times.items():
                began = time.perf_counter()
                assert keys.owner(guess) is None
                found.append(time.perf_counter() - began)
        # Medians: a busy machine has outliers of any size.
        one, *others = (statistics.median(found) for found in times.values())
        assert all(abs(one - other) < 0.2 * one for other in others)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys"),
        ("ann secret", "NAME sha256:HEX"),
        ("ann sha256:" + "0" * 63, "keys:1: a line is"),
        ("a/b sha256:" + "0" * 64, "NAME sha256:HEX"),
    ],
)
def test_files_of_keys(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Keys.read(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot read"):
        Keys.read(tmp_path / "none")


def test_making_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    assert main(["serve-key", "ann", "--keys", str(path)]) == 0
    key = capsys.readouterr().out.rpartition(" ")[2].strip()
    assert path.stat().st_mode & 0o077 == 0
    assert key not in path.read_text()
    assert Keys.read(path).owner(key) == "ann"
    assert main(["serve-key", "ann", "--keys", str(path)]) == 2
    assert "has a key of ann already" in capsys.readouterr().err
    assert main(["serve-key", "a b"]) == 2
    assert main(["serve-key", "bob"]) == 0
    assert "bob sha256:" in capsys.readouterr().out


def test_an_open_address_needs_keys(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_folder), "--host", "0.0.0.0"]) == 2
    assert "--api-keys FILE" in capsys.readouterr().err


def test_other_origins_are_refused(serve: Serve, make_engine: Any) -> None:
    client = serve(make_engine("ok"), hosts={"127.0.0.1"})
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{client.base_url.port}1"):
        response = client.post(CHAT, json=ASK, headers={"Origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
    own = str(client.base_url).rstrip("/")
    assert client.post(CHAT, json=ASK, headers={"Origin": own}).status_code == 200


def test_a_proxy_may_have_a_name(started: Any) -> None:
    _, url = started("--allow-host", "chat.example.org")
    for name, status in (("chat.example.org", 200), ("127.0.0.1", 200), ("evil.example", 403)):
        response = httpx.get(f"{url}/v1/models", headers={"Host": name}, trust_env=False)
        assert response.status_code == status


def counters(client: httpx.Client) -> dict[str, float]:
    text = client.get("/metrics").text
    found = re.findall(r"^(spikelm_\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_metrics_are_what_clients_counted(serve: Serve, coded_engine: Engine) -> None:
    client = serve(coded_engine)
    usage: dict[str, int] = {"prompt_tokens": 0, "completion_tokens": 0, "cached": 0}
    for i in range(20):
        ask = {"prompt": f"Number {i % 7}", "max_tokens": 3 + i % 5, "seed": i, "n": 1 + i % 2}
        found = client.post(COMPLETIONS, json=ask).json()["usage"]
        for name in ("prompt_tokens", "completion_tokens"):
            usage[name] += found[name]
        usage["cached"] += found["prompt_tokens_details"]["cached_tokens"]
    client.post(COMPLETIONS, json={"prompt": 3})
    after = counters(client)
    assert after["spikelm_prompt_tokens_total"] == usage["prompt_tokens"]
    assert after["spikelm_generation_tokens_total"] == usage["completion_tokens"]
    assert after["spikelm_prefix_cache_hits_total"] == usage["cached"]
    ended = {
        reason: f'spikelm_request_success_total{{finished_reason="{reason}"}}' for reason in REASONS
    }
    assert sum(after.get(name, 0) for name in ended.values()) == 20
    assert after[ended["length"]] > 0
    assert after['spikelm_requests_refused_total{status="400"}'] == 1
    assert after["spikelm_time_to_first_token_seconds_count"] == 20
    assert after["spikelm_num_requests_running"] == after["spikelm_num_requests_waiting"] == 0
    assert after["spikelm_state_pool_used_bytes"] > 0


def test_sigterm_lets_streams_end(started: Any) -> None:
    process, url = started("--shutdown-timeout", "30")
    text: list[str] = []
    ask = {**ASK, "max_tokens": 3000, "stream": True, "seed": 1}
    ask["logit_bias"] = {"256": -100}

    def read() -> None:
        with httpx.stream("POST", url + CHAT, json=ask, timeout=60, trust_env=False) as response:
            text.extend(response.iter_text())

    thread = threading.Thread(target=read)
    thread.start()
    while not text:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    with httpx.Client(base_url=url, trust_env=False) as client:
        while client.get("/ready").status_code == 200:
            time.sleep(0.001)
        refused = client.post(CHAT, json=ASK)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert client.get("/health").status_code == 200
    thread.join(60)
    whole = "".join(text)
    assert whole.endswith("data: [DONE]\n\n")
    assert '"finish_reason": "length"' in whole
    assert process.wait(20) == 0


def test_sigterm_without_grace_ends_streams_with_an_error(started: Any) -> None:
    process, url = started()
    ask = {**ASK, "max_tokens": 100_000, "stream": True, "logit_bias": {"256": -100}}
    with httpx.stream("POST", url + CHAT, json=ask, timeout=60, trust_env=False) as response:
        parts = response.iter_text()
        text = next(parts)
        process.send_signal(signal.SIGTERM)
        text += "".join(parts)
    assert '"code": "shutting_down"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert process.wait(20) == 0


def test_a_server_that_was_killed_goes_on(started: Any, tmp_path: Path) -> None:
    options = ("--state-dir", str(tmp_path / "states"))
    process, url = started(*options)
    ask = {**ASK, "seed": 0, "state": {"save": True}}
    first = httpx.post(url + CHAT, json=ask, trust_env=False).json()
    process.kill()
    process.wait()
    _, url = started(*options)
    more = [{"role": "user", "content": "more"}]
    body = {"messages": more, "state": {"from": first["state"]["id"]}, "max_tokens": 4}
    second = httpx.post(url + CHAT, json=body, trust_env=False).json()
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == first["state"]["tokens"]


def test_logs_have_no_prompts_and_no_keys(
    keyed: tuple[httpx.Client, str], caplog: pytest.LogCaptureFixture
) -> None:
    client, key = keyed
    secret = "hidden\n\x1b[31mwords"
    headers = {"Authorization": f"Bearer {key}"}
    with caplog.at_level("DEBUG", logger="spikelm_serve"):
        for body in (
            {"prompt": secret},
            {"prompt": secret, "temperature": secret},
            {"messages": [{"role": secret, "content": secret}]},
        ):
            for path in (COMPLETIONS, CHAT):
                client.post(path, json=body, headers=headers)
        client.get(f"/{secret.encode().hex()}", headers=headers)
    told = "".join(r.getMessage() for r in caplog.records if r.name.startswith("spikelm"))
    assert "hidden" not in told
    assert key not in told
