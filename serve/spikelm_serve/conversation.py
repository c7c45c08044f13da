"""A conversation whose state is carried on: each turn reads only what is new.

The template renders the whole conversation each turn; the longest part of it that a kept state
has already seen is skipped. A prefix-stable template makes that everything but the new message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence

from spikelm.generate import Chunk, Engine, Generation, prompt_ids
from spikelm.sampling import SamplingParams
from spikelm.state import State
from spikelm.template import ChatTemplate
from spikelm_serve.answer import Meter, stats, trimmed

# An answer's end is trimmed: the state to go on from is a few tokens before the last one.
KEPT_STATES = 16


class Conversation:
    """Messages, and states that have read them."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        params: SamplingParams,
        stop: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = []
        self.meter = Meter()
        """Of the latest answer; `prompt_tokens` are those that had to be read."""
        self._template = template
        self._params = params
        self._stop = (*stop, *template.stop)
        self._seen = b""
        # States that have read the first so many bytes of `_seen`, in order.
        self._states: deque[tuple[int, State]] = deque(maxlen=KEPT_STATES)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yields the answer; what was yielded is its message, also when it is left early."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, state = self._resume(self._template.render(messages).encode())
        self.messages = messages
        self.meter = Meter(prompt_tokens=len(prompt))
        generation = Generation(self.engine, prompt, self._params, self._stop, state)
        said = ""
        try:
            for chunk in trimmed(self._remember(generation)):
                said += chunk.text
                yield chunk.text
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def summary(self) -> str:
        """One line: speed, silence and memory of the latest answer."""
        return stats(self.meter, self.engine)

    def reset(self) -> None:
        """Forgets everything."""
        self.messages = []
        self._states.clear()

    def _resume(self, text: bytes) -> tuple[list[int], State | None]:
        """The tokens of `text` that the best kept state has not seen, and that state."""
        tokenizer = self.engine.tokenizer
        while self._states:
            length, state = self._states[-1]
            if length < len(text) and self._seen[:length] == text[:length]:
                self._seen = text
                return tokenizer.encode(text[length:], special=True, continues=True), state
            self._states.pop()
        self._seen = text
        return prompt_ids(tokenizer, text.decode(), special=True), None

    def _remember(self, generation: Generation) -> Iterator[Chunk]:
        """Passes the chunks on and keeps the states between them."""
        unread: tuple[int, ...] = ()
        for chunk in self.meter.measure(generation):
            # The state has read every sampled token but the last.
            tokens = unread + chunk.token_ids
            self._seen += self.engine.tokenizer.decode_bytes(tokens[:-1])
            unread = tokens[-1:]
            assert generation.state is not None
            self._states.append((len(self._seen), generation.state))
            yield chunk
