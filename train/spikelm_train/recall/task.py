"""Multi-query associative recall: pairs of a key and a value, then every key once more.

    k1 v1 k2 v2 k3 v3  .  .  k2  .  .  .  k3  .  k1  .        answers: v2, v3, v1

A key is asked for in one of the slots of two tokens behind the pairs, slot g >= 1 drawn without
replacement with a probability proportional to g^(a - 1); dots are random tokens. Keys come from the
lower half of the vocabulary, values from the upper one, each once in a sequence.
Source: Arora et al. 2023 (Zoology), with its a = 0.01. Overwritten keys are ours.

B sequences, T tokens, N pairs, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spikelm.errors import ConfigError

POWER = 0.01
# The share of a run with short sequences alone: models that begin with the long ones learn nothing.
EASY_SHARE = 0.65
# Tokens per pair of the short sequences.
EASY = (16, 8, 4)


@dataclass(frozen=True, order=True, slots=True)
class Size:
    """A task's size: tokens per sequence T and pairs N in it, written T:N."""

    tokens: int
    pairs: int

    def __post_init__(self) -> None:
        if not 4 <= 4 * self.pairs <= self.tokens:
            raise ConfigError(f"size {self} given; allowed: T:N with N >= 1 pairs and T >= 4 N")

    def __str__(self) -> str:
        return f"{self.tokens}:{self.pairs}"

    @staticmethod
    def parse(text: str) -> Size:
        """`128:32` -> 128 tokens, 32 pairs. Raises: ConfigError."""
        tokens, _, pairs = text.partition(":")
        try:
            return Size(int(tokens), int(pairs))
        except ValueError:
            raise ConfigError(f"size {text!r} given; allowed: T:N such as 128:32") from None


class Batch(NamedTuple):
    """Sequences and what is asked in them."""

    tokens: Tensor
    """[B, T]."""
    queries: Tensor
    """Positions of the keys asked for [B, Q]."""
    answers: Tensor
    """Their values, the tokens wanted there [B, Q]."""


def draw(
    size: Size,
    batch_size: int,
    vocab_size: int,
    generator: torch.Generator,
    overwritten: float = 0.0,
) -> Batch:
    """Fresh sequences. `overwritten` (0 to 1/2) is the share of the pairs that give a key of
    another pair its second value, anywhere in the list; the answer is the later one.

    Raises: ConfigError if the vocabulary is too small for distinct keys and values.
    """
    T, N = size.tokens, size.pairs
    again = round(overwritten * N)
    half, Q = vocab_size // 2, N - again
    if vocab_size < 2 * N + 2:
        raise ConfigError(f"vocabulary: {vocab_size} given; allowed for {N} pairs: {2 * N + 2} up")

    def distinct(choices: int, count: int) -> Tensor:
        return torch.rand(batch_size, choices, generator=generator).topk(count).indices

    keys, values = 1 + distinct(half - 1, Q), half + distinct(vocab_size - half, N)
    # Which key each pair is about, and of each key the last pair.
    which = torch.cat([torch.arange(Q), torch.arange(again)])[distinct(N, N)]
    order = torch.arange(1, N + 1)
    last = ((which[:, None] == torch.arange(Q)[:, None]) * order).argmax(-1)
    slots = torch.arange(1, (T - 2 * N) // 2 + 1, dtype=torch.float64) ** (POWER - 1)
    slot = torch.multinomial(slots.expand(batch_size, -1), Q, generator=generator)
    queries = 2 * N + 2 * slot
    tokens = torch.randint(vocab_size, (batch_size, T), generator=generator)
    tokens[:, : 2 * N] = torch.stack([keys.gather(1, which), values], -1).flatten(1)
    return Batch(tokens.scatter(1, queries, keys), queries, values.gather(1, last))


def size_at(sizes: Sequence[Size], progress: float, generator: torch.Generator) -> Size:
    """The size of the training step at `progress` (0 to 1): first the shortest length with few to
    many pairs, then all sizes but the first (if there are others).
    """
    if progress < EASY_SHARE:
        shortest = min(sizes).tokens
        choices = [Size(shortest, max(1, shortest // tokens)) for tokens in EASY]
    else:
        choices = [*sizes[1:]] or [*sizes]
    return choices[int(torch.randint(len(choices), (), generator=generator))]
