"""Logits -> next token: penalties, biases, temperature, top-k, top-p, min-p, in this order.

N is the vocabulary. Every request draws from a generator of its own, so its tokens depend on
its seed and its logits, not on what else runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikelm.errors import RequestError, SpikelmError

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
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of prompt and generated tokens, 0.1 to 10.
    Source: Keskar et al. 2019 (CTRL); prompt included as in transformers."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of generated tokens, -2 to 2 (OpenAI)."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence among the generated tokens, -2 to 2 (OpenAI)."""
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
        self._counts: Tensor | None = None  # [N] generated tokens
        self._seen: Tensor | None = None  # [N] prompt and generated tokens

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The next token for logits [N], of any float dtype and device; they are not changed.
        `allowed` [N], bool, are the tokens to choose from.

        Raises: SpikelmError if a logit is NaN or infinite.
        """
        assert logits.dim() == 1, f"logits of one token expected, got {tuple(logits.shape)}"
        scores = logits.detach().to("cpu", torch.float32)
        # One pass: NaN is the extreme of anything.
        if not bool(torch.isfinite(torch.stack(scores.aminmax())).all()):
            bad = int((~torch.isfinite(scores)).sum())
            raise SpikelmError(
                f"{bad} of {scores.numel()} logits are NaN or infinite; the model's weights or "
                "state are damaged, or its dtype overflows"
            )
        scores = self._penalise(scores)
        if self.params.logit_bias:
            ids, biases = zip(*self.params.logit_bias.items(), strict=True)
            scores = scores.index_add(0, torch.tensor(ids), torch.tensor(biases).float())
        if allowed is not None:
            scores = torch.where(allowed, scores, -torch.inf)
        greedy = self.params.temperature == 0
        token = int(torch.argmax(scores)) if greedy else self._draw(scores)
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True
        return token

    def _penalise(self, scores: Tensor) -> Tensor:
        params = self.params
        penalties = (params.presence_penalty, params.frequency_penalty)
        if params.repetition_penalty == 1 and penalties == (0, 0):
            return scores
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros_like(scores)
            self._seen = torch.zeros_like(scores, dtype=torch.bool)
            self._seen[self._prompt_ids] = True
        factor = params.repetition_penalty
        scaled = torch.where(scores > 0, scores / factor, scores * factor)
        scores = torch.where(self._seen, scaled, scores)
        scores = scores - params.frequency_penalty * self._counts
        return scores - params.presence_penalty * (self._counts > 0)

    def _draw(self, scores: Tensor) -> int:
        params, N = self.params, scores.numel()
        # Shifted, and never divided by a subnormal number: both keep exp() finite.
        largest, temperature = scores.max(), max(params.temperature, 1e-30)
        limit = N if params.top_k is None else min(params.top_k, N)
        total = torch.exp((scores - largest) / temperature).sum(dtype=torch.float64)
        filtered = params.top_p < 1 or params.min_p > 0
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        # Sorted, every filter is a shorter prefix. Sorting all would take longer than many models
        # take for the logits, so the prefix grows until the draw falls into it.
        size = limit if params.top_k is not None else min(limit, SORTED_AT_FIRST)
        while True:
            ordered, ids = _largest(scores, size)
            weights = torch.exp((ordered - largest) / temperature)
            cumulative = weights.double().cumsum(0)
            mass = cumulative[-1] if size == limit else total
            kept = limit
            if params.top_p < 1:
                kept = min(kept, int((cumulative < params.top_p * mass).sum()) + 1)
            if params.min_p > 0:
                enough = int((weights >= params.min_p).sum())
                kept = min(kept, limit if enough == size else enough)
            if kept <= size:
                mass = cumulative[kept - 1]
            place = int(torch.searchsorted(cumulative[:kept], uniform * mass, right=True))
            if size == limit or (place < size and (kept <= size or not filtered)):
                return int(ids[min(place, kept - 1)])
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
    logprobs = logits.detach().to("cpu", torch.float32).log_softmax(-1)
    values, ids = _largest(logprobs, num_top) if num_top else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Likelihood(token, float(logprobs[token]), top)


def _largest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest and their ids, in order; ties keep the order of their ids."""
    candidates = torch.arange(scores.numel())
    if n < scores.numel():
        floor = torch.topk(scores, n, sorted=False).values.min()
        candidates = (scores >= floor).nonzero()[:, 0]
    ordered, places = torch.sort(scores[candidates], descending=True, stable=True)
    return ordered[:n], candidates[places[:n]]
