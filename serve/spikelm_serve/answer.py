"""Answers: what one request's generations yield, with the time and memory they took."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from spikelm.generate import Chunk, Engine, Generation
from spikelm.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What one or more choices continue."""

    ids: tuple[int, ...]
    echo: str = ""
    """Text that the answer starts with."""


@dataclass(slots=True)
class Meter:
    """Tokens, times and state size of the generations that passed through `measure`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    """Until the first text: reading the prompt and sampling."""
    decode_tokens: int = 0
    """Tokens that came after the first text."""
    decode_seconds: float = 0.0
    state_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, the prompt's time left out."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def measure(self, generation: Generation) -> Iterator[Chunk]:
        start = time.perf_counter()
        first = True
        for chunk in generation:
            now = time.perf_counter()
            self.completion_tokens += len(chunk.token_ids)
            if first:
                self.prompt_seconds += now - start
            else:
                self.decode_seconds += now - start
                self.decode_tokens += len(chunk.token_ids)
            if generation.state is not None:
                self.state_bytes = generation.state.nbytes
            yield chunk
            start, first = time.perf_counter(), False


@dataclass(frozen=True, slots=True)
class Piece:
    """The next text of one choice."""

    index: int
    text: str
    finish_reason: str | None = None
    """"stop" or "length" on the last piece of a choice."""
    totals: Meter | None = None
    """On the last piece of the whole answer."""


def answer(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    stop: Sequence[str] = (),
    *,
    n: int = 1,
    trim: bool = False,
) -> Iterator[Piece]:
    """The pieces of n choices per prompt, one choice after the other.

    Choice i of a prompt draws with seed + i. `trim` drops the white space around each choice.
    """
    meter = Meter(prompt_tokens=sum(len(prompt.ids) for prompt in prompts))
    last = len(prompts) * n - 1
    for index in range(last + 1):
        prompt, offset = prompts[index // n], index % n
        if prompt.echo:
            yield Piece(index, prompt.echo)
        generation = Generation(engine, prompt.ids, reseeded(params, offset), stop)
        chunks = meter.measure(generation)
        for chunk in trimmed(chunks) if trim else chunks:
            ended = chunk.finish_reason is not None
            if chunk.text or ended:
                totals = meter if ended and index == last else None
                yield Piece(index, chunk.text, chunk.finish_reason, totals)


def trimmed(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same tokens without the text's leading and trailing white space."""
    started, held = False, ""
    for chunk in chunks:
        text = held + chunk.text if started else chunk.text.lstrip()
        body = text.rstrip()
        started = started or bool(body)
        held = text[len(body) :]
        yield dataclasses.replace(chunk, text=body)


def reseeded(params: SamplingParams, offset: int) -> SamplingParams:
    """The parameters with seed + offset, wrapped to 64 bits; no seed stays no seed."""
    if params.seed is None:
        return params
    seed = (params.seed + offset + 2**63) % 2**64 - 2**63
    return dataclasses.replace(params, seed=seed)
