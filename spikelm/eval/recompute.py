"""What a training step saves in memory, and pays in time, by computing parts of it twice.

Every case is measured in a process of its own, so that its peak memory is its own.
B sequences, T tokens, N vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.config import ModelConfig, load_model_config
from spikelm.errors import ConfigError
from spikelm.eval.process import memory_bytes, reset_peak
from spikelm.models.spikelm import LanguageModel

FORMS: dict[str, tuple[bool, bool]] = {
    "nothing": (False, False),
    "logits": (True, False),
    "layers": (False, True),
    "logits and layers": (True, True),
}
"""What is computed again -> (logits, layers)."""

_log = logging.getLogger(__name__)


def bench_recompute(
    model: str,
    *,
    vocabularies: Sequence[int],
    batch: int = 4,
    tokens: int = 512,
    chunk: int = 256,
    repeats: int = 3,
) -> dict[str, Any]:
    """Forward, cross-entropy and backward on the CPU for every vocabulary and form, as JSON types.

    `chunk` tokens' logits are in memory at a time where they are computed again. Seconds are CPU
    time, medians of `repeats`; bytes are the peak above the model and its gradients. Both are None
    where a process was killed, which is what running out of memory looks like.

    Raises: ConfigError for an unknown model or a number that is not positive.
    """
    numbers = {"batch": batch, "tokens": tokens, "chunk": chunk, "repeats": repeats}
    numbers |= {f"vocabulary {n}": n for n in vocabularies}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} given; allowed: an integer >= 1")
    shape = load_model_config(model)
    rows = []
    for size in vocabularies:
        config = dataclasses.replace(shape, vocab_size=size)
        for form in FORMS:
            cost = _in_fresh_process(config, form, batch, tokens, chunk, repeats)
            _log.info("%d entries, %s: %s", size, form, cost)
            rows.append({"vocabulary": size, "again": form, **cost})
    return {
        "model": model,
        "width": shape.width,
        "layers": shape.num_layers,
        "batch": batch,
        "tokens": tokens,
        "chunk": chunk,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "measurements": rows,
    }


def _in_fresh_process(*arguments: Any) -> dict[str, float | None]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:
            return {"seconds": None, "peak_bytes": None}


def measure(
    config: ModelConfig, form: str, batch: int, tokens: int, chunk: int, repeats: int
) -> dict[str, float | None]:
    """CPU seconds of a step, and its peak of memory in bytes beyond the model and its gradients."""
    model = LanguageModel(config).initialise(0).train()
    logits_again, model.recompute_layers = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, tokens + 1), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def losses(logits: Tensor, part: slice) -> Tensor:
        wanted = targets[:, part]
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return nats.view_as(wanted)

    def step() -> float:
        began = process_time()
        if logits_again:
            nats, _ = model(inputs, read=losses, read_tokens=chunk)
        else:
            nats = losses(model(inputs)[0], slice(0, tokens))
        nats.mean().backward()
        return process_time() - began

    # Makes the gradients, and loads what is loaded once.
    step()
    reset_peak()
    before = memory_bytes("VmRSS")
    seconds = statistics.median(step() for _ in range(repeats))
    return {"seconds": seconds, "peak_bytes": memory_bytes("VmHWM") - before}
