"""A conversation with a server: each turn sends what is new and the name of the state before it."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

from spikelm.errors import ConfigError, SpikelmError
from spikelm.sampling import SamplingParams

KEY = "SPIKELM_API_KEY"
"""The environment variable with the key, if the server wants one."""
SECONDS = 120
"""Silence after which a server counts as gone; it sends comments sooner."""


class RemoteConversation:
    """As `conversation.Conversation`, with the model at a URL such as http://127.0.0.1:8000/v1."""

    def __init__(self, url: str, params: SamplingParams, stop: list[str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} given; allowed: a model folder, or http(s)://HOST:PORT/v1")
        self._is_secure, self._place = parts.scheme == "https", parts.netloc
        self._path = parts.path.rstrip("/") or "/v1"
        self._params = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "seed": params.seed,
            "stop": stop or None,
        }
        self.reset()
        self.name = str(self._call("GET", "/models")["data"][0]["id"])

    def reset(self) -> None:
        """Forgets everything; the server keeps its states for a while."""
        self.messages: list[dict[str, str]] = []
        self._state: str | None = None
        self._last: dict[str, Any] = {}

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yields the answer; what was yielded is its message, also when it is left early."""
        new = {"role": "user", "content": text}
        before, state = self.messages, self._state
        said, self._last = "", {}
        self.messages = [*before, new]
        # Until the answer is there whole, its state is not known.
        self._state = None
        try:
            chunks = self._stream([new] if state else self.messages, state)
            for chunk in chunks:
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content", "")
                    said += piece
                    yield piece
                self._last = chunk
            self._state = (self._last.get("state") or {}).get("id")
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def summary(self) -> str:
        """One line: speed, and what had been read before."""
        if "usage" not in self._last:
            return "[stopped]"
        usage, timings = self._last["usage"], self._last["timings"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        speed = timings["predicted_per_second"]
        return (
            f"[{usage['completion_tokens']} tokens, {speed:.1f} tokens/s, "
            f"{cached} of {usage['prompt_tokens']} known before, "
            f"{self._last['state_bytes']:,} bytes of state]"
        )

    def _stream(
        self, messages: list[dict[str, str]], state: str | None
    ) -> Iterator[dict[str, Any]]:
        body = {
            **{name: value for name, value in self._params.items() if value is not None},
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"state": {"from": state}} if state else {}),
        }
        connection = self._connect()
        try:
            response = self._send(connection, "POST", "/chat/completions", body)
            if response.status == 404 and state:
                # The state has gone: the whole conversation says the same.
                yield from self._stream(self.messages, None)
                return
            self._check(response)
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if not line.startswith(b"data: "):
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise SpikelmError(chunk["error"]["message"])
                yield chunk
        except (TimeoutError, http.client.HTTPException, OSError) as error:
            raise SpikelmError(f"the server has gone: {error}") from None
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        return kind(self._place, timeout=SECONDS)

    def _call(self, method: str, path: str) -> Any:
        connection = self._connect()
        try:
            response = self._send(connection, method, path, None)
            self._check(response)
            return json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ConfigError(f"no spikelm server answers there: {error}") from None
        finally:
            connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, self._path + path, data, headers)
        return connection.getresponse()

    def _check(self, response: http.client.HTTPResponse) -> None:
        if response.status == 401:
            raise ConfigError(f"the server wants a key; put it into the environment: {KEY}=...")
        if response.status >= 400:
            try:
                reason = json.loads(response.read())["error"]["message"]
            except (ValueError, KeyError, TypeError):
                reason = response.reason
            raise SpikelmError(f"the server answered {response.status}: {reason}")
