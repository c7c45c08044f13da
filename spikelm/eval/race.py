"""Decode speed of model folders beside each other: real models on real text, in turns.

Every model lives in a process of its own, as in `spikelm.eval.decode`; in every round each reads
the same text, and the order of a round is the reverse of the one before.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikelm.errors import BackendError, ConfigError, DataError
from spikelm.eval.peers import Contestant, Reader, Spawned


def race(
    models: Mapping[str, str | Path],
    text: str,
    *,
    rounds: int = 9,
    tokens: int = 64,
    position: int = 128,
    threads: int = 1,
) -> dict[str, Any]:
    """Milliseconds per token of spike-coded folders decoded natively, as JSON types.

    A turn reads `position` tokens of `text`, then times the next `tokens` one at a time; its median
    counts. `ms` and `cpu_ms` are lists over the rounds, so ratios can be formed within a round. A
    model that has no native form is in `missing`, with the reason.

    Raises: ConfigError for numbers below 1; DataError if the text is too short for a turn.
    """
    numbers = {"rounds": rounds, "tokens": tokens, "position": position, "threads": threads}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} given; allowed: an integer >= 1")
    if not text:
        raise DataError("there is no text to decode; give a document")
    missing: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for label, folder in models.items():
            try:
                contestants[label] = Spawned(label, FolderReader, str(folder), text, threads)
            except BackendError as error:
                missing[label] = str(error)
                continue
            stack.callback(contestants[label].close)
            found[label] = {"ms": [], "cpu_ms": []}
        for number in range(rounds):
            for label in list(contestants)[:: -1 if number % 2 else 1]:
                seconds = contestants[label].decode_at(position, tokens)
                found[label]["ms"].append(1e3 * statistics.median(s.wall for s in seconds))
                found[label]["cpu_ms"].append(1e3 * statistics.median(s.cpu for s in seconds))
        for label, contestant in contestants.items():
            found[label] |= {"resident_bytes": contestant.resident_bytes(), **contestant.facts()}
    return {**numbers, "models": found, "missing": missing}


class FolderReader(Reader):
    """A model folder in a contestant's process, reading a text from its beginning."""

    def __init__(self, folder: str, text: str, threads: int) -> None:
        import torch

        from spikelm import checkpoint
        from spikelm.generate import Engine, prompt_ids

        torch.set_num_threads(threads)
        self.engine = Engine(checkpoint.load(folder))
        if self.engine.program is None:
            reason = self.engine.native_obstacle
            raise BackendError(f"this model does not decode natively: {reason}")
        ids = prompt_ids(self.engine.tokenizer, text)
        self.ids = torch.tensor(ids)

    def hold(self, tokens: int) -> None:
        self.seen = max(1, tokens)
        if self.seen >= len(self.ids):
            raise DataError(f"the text has {len(self.ids)} tokens, too few; give a longer one")
        _, state = self.engine.prefill(self.ids[: self.seen].tolist())
        self.state = state.clone()

    def read(self, tokens: int) -> None:
        for _ in range(tokens):
            ids = self.ids[self.seen % len(self.ids)][None]
            # As a greedy generation does.
            _, self.state = self.engine.step(ids, self.state, in_place=True, within=0.0)
            self.seen += 1

    def facts(self) -> dict[str, Any]:
        return {"silent_fraction": self.engine.silent_fraction}
