"""Memory over a long text: state and process, while one sequence grows."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from spikelm import checkpoint
from spikelm.errors import ConfigError
from spikelm.eval.process import memory_bytes
from spikelm.generate import Engine
from spikelm.sampling import Sampler, SamplingParams

FIRST = 10


def bench_memory(path: str | Path, tokens: int, *, backend: str = "auto") -> dict[str, Any]:
    """Decodes `tokens` sampled tokens and reads state bytes, resident memory and time per token
    after 10, 100, 1000, ... tokens and after every tenth of the run, as JSON types.

    Raises: ConfigError for fewer than 10 tokens; CheckpointError.
    """
    if tokens < FIRST:
        raise ConfigError(f"--tokens {tokens} given; allowed: {FIRST} or more")
    engine = Engine(checkpoint.load(path, backend=backend))
    eos = engine.tokenizer.bos_id
    sampler = Sampler(SamplingParams(seed=0, max_tokens=tokens), [eos])
    powers = {FIRST**n for n in range(1, 12) if FIRST**n <= tokens}
    stops = powers | {tokens * tenth // 10 for tenth in range(1, 11)} - set(range(FIRST))
    rows: list[dict[str, Any]] = []
    token, state = eos, engine.model.initial_state(1).clone()
    began, before = perf_counter(), 0
    for seen in range(1, tokens + 1):
        logits, state = engine.step(torch.tensor([token]), state, in_place=True)
        token = sampler.sample(logits[0])
        if seen in stops:
            now = perf_counter()
            rows.append(
                {
                    "tokens": seen,
                    "state_bytes": state.nbytes,
                    "resident_bytes": memory_bytes("VmRSS"),
                    "ms_per_token": 1e3 * (now - began) / (seen - before),
                }
            )
            began, before = now, seen
    return {"name": engine.checkpoint.name, "path": str(path), "measurements": rows}
