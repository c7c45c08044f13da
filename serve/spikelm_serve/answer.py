"""An answer as it comes: its text trimmed, and the time and memory that it took."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from spikelm.generate import Chunk, Engine, Generation


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


class Trimmer:
    """The same text without leading and trailing white space, piece by piece."""

    def __init__(self, active: bool = True) -> None:
        self._active, self._started, self._held = active, False, ""

    def push(self, text: str) -> str:
        if not self._active:
            return text
        text = self._held + text if self._started else text.lstrip()
        body = text.rstrip()
        self._started = self._started or bool(body)
        self._held = text[len(body) :]
        return body


def trimmed(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same tokens without the text's leading and trailing white space."""
    trimmer = Trimmer()
    for chunk in chunks:
        yield dataclasses.replace(chunk, text=trimmer.push(chunk.text))


def stats(meter: Meter, engine: Engine) -> str:
    """One line: speed, silence and memory."""
    silent = engine.silent_fraction
    parts = [
        f"{meter.completion_tokens} tokens",
        f"{meter.tokens_per_second:.1f} tokens/s",
        *([] if silent is None else [f"{silent:.1%} silent"]),
        f"{meter.state_bytes:,} bytes of state",
    ]
    return f"[{', '.join(parts)}]"
