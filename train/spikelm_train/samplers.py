"""Which tokens are the rows of a step: a pure function of (seed, step, row).

So the position of a run in its data is its step alone, and any number of processes sees the same
data in the same order. L is the sequence length; a row has L + 1 tokens, inputs and targets
overlapping. R are the rows of a step, over all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from spikelm.errors import ConfigError
from spikelm_train.texts.shards import Ids, Tokens

Rows = npt.NDArray[np.int64]

CYCLE = 10_000
"""Rows in which a mixture has its weights exactly."""


class Sampler(Protocol):
    """The rows of a run."""

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        ...


class RandomWindows:
    """Windows that begin anywhere; the rows of a step, of all ranks, begin at distinct tokens."""

    def __init__(self, tokens: Tokens, sequence_length: int, rows_per_step: int, seed: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.rows_per_step = rows_per_step
        self.seed = seed

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        generator = np.random.default_rng([self.seed, step])
        choices = len(self.tokens) - self.sequence_length
        again = self.rows_per_step > choices
        begins = generator.choice(choices, self.rows_per_step, replace=again)[start:stop]
        windows = [self.tokens[int(b) : int(b) + self.sequence_length + 1] for b in begins]
        return np.stack(windows).astype(np.int64)


class PackedDocuments:
    """Every document once per epoch, in an order drawn per epoch, packed back to back.

    The epochs form one endless stream; row r of the training run covers its tokens r L to
    (r + 1) L, both ends included, so every token is the target of exactly one row.
    """

    def __init__(
        self,
        tokens: Tokens,
        starts: npt.NDArray[np.int64],
        sequence_length: int,
        rows_per_step: int,
        seed: int,
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.starts = starts
        # The rows of a step lie in two epochs at most.
        self._epoch = lru_cache(maxsize=2)(self._drawn)

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        return np.stack([self._window(self._place(step, row)) for row in range(start, stop)])

    def _place(self, step: int, row: int) -> int:
        """Where in the stream a row begins."""
        return (step * self.rows_per_step + row) * self.sequence_length

    def _window(self, place: int) -> Rows:
        epoch, at = divmod(place, len(self.tokens))
        pieces: list[Ids] = []
        missing = self.sequence_length + 1
        while missing:
            order, ends = self._epoch(epoch)
            index = int(np.searchsorted(ends, at, side="right"))
            while missing and index < len(order):
                end = self._end(int(order[index]))
                begin = end - (int(ends[index]) - at)
                pieces.append(self.tokens[begin : min(end, begin + missing)])
                missing -= len(pieces[-1])
                at += len(pieces[-1])
                index += 1
            epoch, at = epoch + 1, 0
        return np.concatenate(pieces).astype(np.int64)

    def _end(self, document: int) -> int:
        last = document + 1 == len(self.starts)
        return len(self.tokens) if last else int(self.starts[document + 1])

    def _drawn(self, epoch: int) -> tuple[Rows, Rows]:
        """The documents of an epoch in their order, and where in it each ends."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
        lengths = np.diff(self.starts, append=len(self.tokens))
        return order, np.cumsum(lengths[order])


class CarriedWindows(PackedDocuments):
    """Consecutive windows: row r of every step goes on where row r of the step before ended.

    The rows are R lanes that begin len(tokens) / R apart in the stream of `PackedDocuments`, for
    truncated backpropagation through time with the state carried along (`carried`).
    """

    def _place(self, step: int, row: int) -> int:
        return row * (len(self.tokens) // self.rows_per_step) + step * self.sequence_length


class Mixture:
    """Rows of several samplers by their weights, each sampler's rows in their own order.

    Every `CYCLE` rows of the run have each sampler by its weight, rounded, in an order drawn anew.
    """

    def __init__(
        self, samplers: Sequence[Sampler], weights: Sequence[float], rows_per_step: int, seed: int
    ) -> None:
        self.samplers = samplers
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.counts = shares(weights, CYCLE)
        self._cycle = lru_cache(maxsize=2)(self._drawn)

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        first = step * self.rows_per_step
        return np.concatenate([self._row(first + row) for row in range(start, stop)])

    def _row(self, row: int) -> Rows:
        cycle, at = divmod(row, CYCLE)
        order, earlier = self._cycle(cycle)
        which = int(order[at])
        own_step, own_row = divmod(
            cycle * self.counts[which] + int(earlier[at]), self.rows_per_step
        )
        return self.samplers[which].rows(own_step, own_row, own_row + 1)

    def _drawn(self, cycle: int) -> tuple[Rows, Rows]:
        """The sampler of each row of a cycle, and how many of its rows came before."""
        order = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng([self.seed, cycle]).shuffle(order)
        earlier = np.empty_like(order)
        for which, count in enumerate(self.counts):
            earlier[order == which] = np.arange(count)
        return order, earlier


class MixedLanes:
    """Lanes of several `CarriedWindows`, each of which has a share of the rows of every step."""

    def __init__(self, samplers: Sequence[CarriedWindows]) -> None:
        self.samplers = samplers
        self._ends = np.cumsum([sampler.rows_per_step for sampler in samplers])

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of the step's global batch [stop - start, L + 1]."""
        found = []
        for row in range(start, stop):
            which = int(np.searchsorted(self._ends, row, side="right"))
            own = row - int(self._ends[which]) + self.samplers[which].rows_per_step
            found.append(self.samplers[which].rows(step, own, own + 1))
        return np.concatenate(found)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by `weights`, rounded by largest remainders.

    Raises: ConfigError if nothing is left for one of them.
    """
    exact = total * np.array(weights) / sum(weights)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    found: list[int] = counts.tolist()
    if 0 in found:
        smallest = weights[found.index(0)]
        raise ConfigError(
            f"data.mixture: weight {smallest:g} of {sum(weights):g} is less than one of {total} "
            "rows; raise it"
        )
    return found
