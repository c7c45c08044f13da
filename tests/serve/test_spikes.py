"""Who fired, told with a stream, and what an answer has read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from spikelm.decoder import Watch
from spikelm.generate import Engine, prompt_ids

Serve = Callable[..., httpx.Client]
ASK = {"prompt": "Some text", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def chunks(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    ask = {**ASK, "stream": True, "return_spikes": True, **fields}
    events = client.post("/v1/completions", json=ask).text.split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def spikes_of(found: list[dict[str, Any]], index: int = 0) -> list[Any]:
    choices = [choice for chunk in found for choice in chunk["choices"]]
    return [s for c in choices if c["index"] == index for s in c.get("spikes", [])]


def test_every_step_is_told(serve: Serve, coded_engine: Engine) -> None:
    client = serve(coded_engine)
    found = chunks(client)
    told = spikes_of(found)
    tokens = found[-1]["timings"]
    body = client.post("/v1/completions", json=ASK).json()
    assert len(told) == body["usage"]["completion_tokens"] - 1
    assert tokens["cache_n"] == 0
    # The same as the engine says of the same tokens.
    logits, state = coded_engine.prefill(prompt_ids(coded_engine.tokenizer, "Some text"))
    for entry in told:
        watch = Watch(bits=True)
        token = logits.argmax(-1)
        logits, [state] = coded_engine.step_each(token, [state.clone()], watch=watch)
        [counts] = watch.counts
        assert entry["silent_fraction"] == pytest.approx(counts.silent / counts.total, abs=1e-4)
        assert [part["neurons"] for part in entry["fired"]] == list(watch.fired)
        for part in entry["fired"]:
            bits = np.frombuffer(base64.b64decode(part["bits"]), np.uint8)
            fired = np.unpackbits(bits, bitorder="little")[: part["size"]].astype(bool)
            assert (fired == watch.fired[part["neurons"]][0]).all()
    assert body["spikes"] == found[-1]["spikes"]
    assert 0 < body["spikes"]["silent_fraction"] < 1
    if coded_engine.program is not None:
        read = [entry["weight_bytes"] for entry in told]
        assert body["spikes"]["weight_bytes_per_token"] == round(sum(read) / len(read))


def test_choices_have_their_own(serve: Serve, coded_engine: Engine) -> None:
    found = chunks(serve(coded_engine), n=3, temperature=2, seed=1)
    per_choice = [spikes_of(found, index) for index in range(3)]
    assert all(per_choice)
    assert per_choice[0] != per_choice[1]


def test_only_who_asks_is_told(serve: Serve, coded_engine: Engine) -> None:
    client = serve(coded_engine)
    assert not spikes_of(chunks(client, return_spikes=False))
    refused = client.post("/v1/completions", json={**ASK, "return_spikes": 1})
    assert refused.json()["error"]["param"] == "return_spikes"


def test_a_model_that_does_not_say(noise: httpx.Client) -> None:
    found = chunks(noise)
    assert found[-1]["spikes"] == {"silent_fraction": None, "weight_bytes_per_token": None}
    assert not spikes_of(found)


def test_a_model_that_runs_in_torch_says_who_fired(serve: Serve, tiny_engine: Engine) -> None:
    found = chunks(serve(tiny_engine))
    assert found[-1]["spikes"]["weight_bytes_per_token"] is None
    for entry in spikes_of(found):
        assert entry["weight_bytes"] is None
        sizes = {part["neurons"]: part["size"] for part in entry["fired"]}
        assert sum(sizes.values()) > 0
    assert torch.is_inference_mode_enabled() is False
