"""Logits -> next token: penalties, biases, temperature, typical-p, top-k, top-p, min-p, in this
order.

N is the vocabulary. Every request draws from a generator of its own, so its tokens depend on
its seed and its logits, not on what else runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spikelm.errors import RequestError, SpikelmError

Scores = npt.NDArray[np.float32]

MATTERS = 9.0
"""Logits so far below the largest, in units of the temperature, may be estimates: a token with less
than e^-9 of the highest probability."""

SORTED_AT_FIRST = 512
"""Tokens among which a draw is looked for first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the defaults draw from the model's distribution as it is.

    Raises: RequestError, with `param` the field's name, for a value out of range.
    """

    temperature: float = 1.0
    """Divides the logits, 0 to 2; 0 takes the most likely token."""
    top_k: int | None = None
    """Keeps the k most likely tokens, at least 1; None keeps all."""
    top_p: float = 1.0
    """Keeps the fewest most likely tokens whose probabilities reach this sum, 0 to 1."""
    min_p: float = 0.0
    """Keeps tokens of at least this fraction of the highest probability, 0 to 1."""
    typical_p: float = 1.0
    """Keeps the tokens whose surprise is nearest to the expected one, until their probabilities
    reach this sum, 0 to 1. Source: Meister et al. 2023 (locally typical sampling)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of prompt and generated tokens, 0.1 to 10.
    Source: Keskar et al. 2019 (CTRL); prompt included as in transformers."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of generated tokens, -2 to 2 (OpenAI)."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence among the generated tokens, -2 to 2 (OpenAI)."""
    penalty_decay: float = 1.0
    """What each token that follows leaves of an occurrence, 0 to 1 (RWKV's alpha_decay)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, -100 to 100 (OpenAI: -100 bans a token)."""
    seed: int | None = None
    """Fixes the draws, a signed 64-bit integer; None is a new seed each time."""
    max_tokens: int = 256
    """Generated tokens at most, at least 1."""

    def __post_init__(self) -> None:
        self._check_number("temperature", 0, 2)
        self._check_number("top_p", 0, 1)
        self._check_number("min_p", 0, 1)
        self._check_number("typical_p", 0, 1)
        self._check_number("penalty_decay", 0, 1)
        self._check_number("repetition_penalty", 0.1, 10)
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_integer("top_k", 1, optional=True)
        self._check_integer("seed", -(2**63), optional=True)
        self._check_integer("max_tokens", 1)
        for value in self.logit_bias.values():
            if not isinstance(value, (int, float)) or not -100 <= value <= 100:
                raise RequestError(
                    f"logit_bias: {value!r:.60} given; allowed: numbers from -100 to 100",
                    param="logit_bias",
                )

    @property
    def logits_within(self) -> float | None:
        """How far below the largest a logit still matters to the draw; None if all do."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        if self.repetition_penalty != 1 or penalties != (0, 0) or self.logit_bias:
            return None
        if self.typical_p < 1:
            # The expected surprise is all tokens'.
            return None
        return self.temperature * MATTERS

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN fails the comparison too.
        if not number or not low <= value <= high:
            self._refuse(name, f"a number from {low} to {high}")

    def _check_integer(self, name: str, low: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        integer = isinstance(value, int) and not isinstance(value, bool)
        if not integer or not low <= value < 2**63:
            span = f"a 64-bit integer >= {low}"
            self._refuse(name, span + (", or null" if optional else ""))

    def _refuse(self, name: str, allowed: str) -> None:
        given = f"{getattr(self, name)!r:.60}"
        raise RequestError(f"{name}: {given} given; allowed: {allowed}", param=name)


class Sampler:
    """Chooses the tokens of one request and remembers those that penalties need."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self.params = params
        self._prompt_ids = list(prompt_ids)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._counts: Scores | None = None  # [N] generated tokens
        self._seen: npt.NDArray[np.bool_] | None = None  # [N] prompt and generated tokens

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The next token for logits [N], of any float dtype and device; they are not changed.
        `allowed` [N], bool, are the tokens to choose from.

        Raises: SpikelmError if a logit is NaN or infinite.
        """
        assert logits.dim() == 1, f"logits of one token expected, got {tuple(logits.shape)}"
        scores = logits.detach().to("cpu", torch.float32).numpy()
        # NaN is the largest of anything.
        if not (np.isfinite(scores.max()) and np.isfinite(scores.min())):
            bad = int((~np.isfinite(scores)).sum())
            raise SpikelmError(
                f"{bad} of {scores.size} logits are NaN or infinite; the model's weights or "
                "state are damaged, or its dtype overflows"
            )
        scores = self._penalise(scores)
        if self.params.logit_bias:
            scores = scores.copy()
            for biased, value in self.params.logit_bias.items():
                scores[biased] += value
        if allowed is not None:
            scores = np.where(allowed.numpy(), scores, np.float32(-np.inf))
        greedy = self.params.temperature == 0
        token = int(scores.argmax()) if greedy else self._draw(scores)
        if self._counts is not None and self._seen is not None:
            self._counts *= np.float32(self.params.penalty_decay)
            self._counts[token] += 1
            self._seen[token] = True
        return token

    def _penalise(self, scores: Scores) -> Scores:
        params = self.params
        penalties = (params.presence_penalty, params.frequency_penalty)
        if params.repetition_penalty == 1 and penalties == (0, 0):
            return scores
        if self._counts is None or self._seen is None:
            self._counts = np.zeros_like(scores)
            self._seen = np.zeros(scores.shape, bool)
            self._seen[self._prompt_ids] = True
        factor = np.float32(params.repetition_penalty)
        scaled = np.where(scores > 0, scores / factor, scores * factor)
        scores = np.where(self._seen, scaled, scores)
        scores = scores - np.float32(params.frequency_penalty) * self._counts
        once: Scores = (self._counts > 0).astype(np.float32)
        return scores - np.float32(params.presence_penalty) * once

    def _draw(self, scores: Scores) -> int:
        params, N = self.params, scores.size
        temperature = np.float32(max(params.temperature, 1e-30))
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        if params.typical_p < 1:
            scores = _typical(scores, temperature, params.typical_p)
        # Shifted, and never divided by a subnormal number: both keep exp() finite.
        largest = scores.max()
        with np.errstate(over="ignore", under="ignore"):
            weights: Scores = np.exp((scores - largest) / temperature)
        limit = N if params.top_k is None else min(params.top_k, N)
        if limit == N and params.top_p == 1 and params.min_p == 0:
            return _place(np.cumsum(weights, dtype=np.float64), uniform)
        total = weights.sum(dtype=np.float64)
        # Sorted, every filter is a shorter prefix. Sorting all would take longer than many models
        # take for the logits, so the prefix grows until it has all that the filters keep.
        size = limit if params.top_k is not None else min(limit, SORTED_AT_FIRST)
        while True:
            ids = _largest(scores, size)
            ordered = weights[ids]
            cumulative = np.cumsum(ordered, dtype=np.float64)
            mass = cumulative[-1] if size == limit else total
            kept = limit
            if params.top_p < 1:
                kept = min(kept, int((cumulative < params.top_p * mass).sum()) + 1)
            if params.min_p > 0:
                enough = int((ordered >= params.min_p).sum())
                kept = min(kept, limit if enough == size else enough)
            if kept <= size:
                return int(ids[_place(cumulative[:kept], uniform)])
            size = min(limit, size * 16)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a token was, in nats, under the logits as the model gave them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, in order."""


def likelihood(logits: Tensor, token: int, num_top: int) -> Likelihood:
    """Of `token` under logits [N], beside the `num_top` most likely ones."""
    scores = logits.detach().to("cpu", torch.float32)
    logprobs = scores.log_softmax(-1).numpy()
    ids = _largest(logprobs, num_top).tolist() if num_top else []
    top = tuple((i, float(logprobs[i])) for i in ids)
    return Likelihood(token, float(logprobs[token]), top)


def _typical(scores: Scores, temperature: np.float32, mass: float) -> Scores:
    """-inf for tokens that are not among the most typical ones."""
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        shifted = (scores.astype(np.float64) - scores.max()) / temperature
        weights = np.exp(shifted)
        surprise = np.log(weights.sum()) - shifted
        probabilities = np.exp(-surprise)
        expected = np.where(probabilities > 0, probabilities * surprise, 0).sum()
    order = np.argsort(np.abs(surprise - expected), kind="stable")
    kept = int((np.cumsum(probabilities[order]) < mass).sum()) + 1
    found = np.full_like(scores, -np.inf)
    found[order[:kept]] = scores[order[:kept]]
    return found


def _place(cumulative: npt.NDArray[np.float64], uniform: float) -> int:
    """Where a draw falls, `uniform` in [0, 1)."""
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(place, cumulative.size - 1)


def _largest(scores: Scores, n: int) -> npt.NDArray[np.intp]:
    """The ids of the n largest, in order; ties keep the order of their ids."""
    candidates = np.arange(scores.size)
    if n < scores.size:
        floor = np.partition(scores, scores.size - n)[scores.size - n]
        candidates = np.flatnonzero(scores >= floor)
    order = np.argsort(-scores[candidates], kind="stable")
    found: npt.NDArray[np.intp] = candidates[order[:n]]
    return found
