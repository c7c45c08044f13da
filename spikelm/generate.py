"""Decoding: the prompt at once, then one token at a time with constant state.

One engine for float and spike-coded checkpoints. N vocabulary, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spikelm.checkpoint import Checkpoint
from spikelm.config import WEIGHTLESS_CLASSES
from spikelm.decoder import Counts, Program, Watch, native_program
from spikelm.errors import DataError
from spikelm.models.spikelm import LanguageModel, shared_losses
from spikelm.neurons import Neuron, Spikes
from spikelm.sampling import Sampler, SamplingParams
from spikelm.state import State
from spikelm.tokenizer import Tokenizer

# Long prompts run in pieces of this many tokens, so prefill memory does not grow. A multiple of the
# delta rule's chunk, so that its rounding is that of one piece.
PREFILL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of generated text."""

    text: str
    token_ids: tuple[int, ...]
    """The tokens sampled since the last chunk (their text may be held back)."""
    finish_reason: str | None
    """"stop" or "length" on the last chunk, else None."""


class Engine:
    """Token ids in, logits out; knows no text. Conversations live in the caller's `State`.

    N are the tokenizer's ids; a head that was padded to more rows has no logits for the others.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.model: LanguageModel = checkpoint.model
        self.program, self.native_obstacle = native_program(self.model)
        self._silent = torch.zeros((), dtype=torch.int64, device=self.model.device)
        self._total = 0

    @property
    def silent_fraction(self) -> float | None:
        """Exact zeros over all entries that entered a projection in `step`s so far."""
        return int(self._silent) / self._total if self._total else None

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
        """Reads a prompt of at least one token: logits [1, N] after it, and the state."""
        if not ids:
            raise DataError("prefill needs at least one token")
        vocabulary = self.tokenizer.vocab_size
        if not all(0 <= token < vocabulary for token in ids):
            raise DataError(f"token ids {min(ids)}..{max(ids)} given; allowed: 0..{vocabulary - 1}")
        tokens = torch.tensor(list(ids), device=self.model.device)
        reset_id = self.tokenizer.reset_id
        logits, state = read_prompt(self.model, self.program, tokens, state, reset_id=reset_id)
        return logits[:, :vocabulary], state

    @torch.inference_mode()
    def read_each(self, ids: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
        """Reads T >= 1 tokens as `prefill` does: the logits after each of them [T, N], and the
        state.
        """
        vocabulary, tokens = self.tokenizer.vocab_size, torch.tensor(ids, device=self.model.device)
        if self.program is None:
            reset_id = self.tokenizer.reset_id
            logits, state = run(self.model, tokens[None], state, reset_id=reset_id, last_only=False)
            return logits[0, :, :vocabulary], state
        found = []
        for token in tokens:
            logits, state = self.prefill([int(token)], state)
            found.append(logits)
        assert state is not None
        return torch.cat(found), state

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        state: State,
        *,
        in_place: bool = False,
        within: float | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, State]:
        """One token for each of B sequences: ids [B] -> logits [B, N], and the state.

        `within` says which logits matter: those so far below the largest. Others may be estimates,
        where exact ones would have to read the whole head.

        `in_place` lets native code write into `state`, which whoever owns it may: copying a large
        state takes longer than updating it. `watch` gets what each sequence did, in torch
        only if it asks for `bits`.
        """
        vocabulary = self.tokenizer.vocab_size
        if self.program is None:
            ids = ids.to(self.model.device)
            probe = partial(self._count, watch=watch)
            logits, state = self.model(ids[:, None], state, probe=probe)
            return logits[:, -1, :vocabulary], state
        state = state if in_place else state.clone()
        logits, counts = self.program.run(ids, state, within, watch)
        self._silent += counts.silent
        self._total += counts.total
        return logits[:, :vocabulary], state

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a sequence's logits are the same bits alone, in any batch, and however its tokens
        were read: integers summed in any order are exact, and all else is done row by row.
        """
        return self.program is not None and self.program.reads_prompts

    @torch.inference_mode()
    def step_each(
        self,
        ids: Tensor,
        states: Sequence[State],
        *,
        within: float | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, list[State]]:
        """One token for each of B states of one sequence, which may be written into: ids [B] ->
        logits [B, N], and the states. `watch` gets what each did.
        """
        if self.program is not None:
            logits, counts = self.program.run(ids, states, within, watch)
            self._silent += counts.silent
            self._total += counts.total
            return logits[:, : self.tokenizer.vocab_size], list(states)
        logits, state = self.step(ids, State.merge(states), within=within, watch=watch)
        return logits, [state.take([row]) for row in range(len(states))]

    def _count(
        self, neuron: Neuron, x: Tensor, spikes: Spikes, *, watch: Watch | None = None
    ) -> None:
        if neuron.tensor_class in WEIGHTLESS_CLASSES:
            return
        self._silent += (spikes.values == 0).sum()
        self._total += spikes.values.numel()
        # To count them by sequence takes a transfer from the device.
        if watch is None or not watch.bits:
            return
        watch.fired[neuron.name] = fired = (spikes.values != 0).flatten(1).cpu().numpy()
        before = watch.counts or [Counts()] * len(fired)
        watch.counts = [
            Counts(counts.silent + int(silent), counts.total + fired.shape[1])
            for counts, silent in zip(before, (~fired).sum(1), strict=True)
        ]


def read_prompt(
    model: LanguageModel,
    program: Program | None,
    tokens: Tensor,
    state: State | None,
    *,
    reset_id: int | None = None,
) -> tuple[Tensor, State]:
    """Logits [1, N] after tokens [T] that are known, and the state; natively if that is fast."""
    if program is None or not program.reads_prompts:
        logits, state = run(model, tokens[None], state, reset_id=reset_id)
        return logits[:, -1], state
    if reset_id is not None and bool((tokens == reset_id).any()):
        # What came before the last document is forgotten.
        tokens, state = tokens[int((tokens == reset_id).nonzero()[-1]) :], None
    state = (model.initial_state(1) if state is None else state).clone()
    logits, _ = program.read(tokens, state)
    return logits, state


def run(
    model: LanguageModel,
    tokens: Tensor,
    state: State | None,
    *,
    reset_id: int | None,
    last_only: bool = True,
    losses: list[Tensor] | None = None,
) -> tuple[Tensor, State]:
    """The forward over tokens [B, T] in pieces of bounded memory; logits [B, 1 or T, N].

    `reset_id` begins a document, as in training: the state before it is forgotten.
    """
    outputs = []
    for piece in tokens.split(PREFILL_TOKENS, dim=1):
        share = piece.shape[1] / tokens.shape[1]
        begins = None if reset_id is None else piece == reset_id
        reset = begins if begins is not None and bool(begins.any()) else None
        with shared_losses(losses, share) as terms:
            logits, state = model(piece, state, reset=reset, losses=terms, last_only=last_only)
        outputs.append(logits)
    assert state is not None
    return (outputs[-1] if last_only else torch.cat(outputs, 1)), state


def prompt_ids(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """The tokens of a prompt: start of document, then the text.

    `special` reads special tokens in the text (chat templates write them); one that writes the
    start of document itself gets no second one.
    """
    ids, prefix = tokenizer.encode(text, special=special), list(tokenizer.prompt_prefix)
    return ids if special and ids[: len(prefix)] == prefix else [*prefix, *ids]


def stream_text(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    stop: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Generates text after the prompt's tokens, piece by piece.

    A piece never ends inside a character and never holds the start of a stop string that may
    still complete. The end-of-document token and a stop string end the text without being part
    of it. An empty prompt starts a document. The last chunk, and only it, has a finish reason.
    """
    yield from Generation(engine, prompt, params, stop)


class Generation:
    """One running generation; after the last chunk `state` holds the whole conversation.

    `state` has seen the prompt and every token whose text was yielded or ended the text early,
    except the last sampled one, which is in `pending`. While the generation runs it may be written
    to: clone it to keep it.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        params: SamplingParams,
        stop: Sequence[str] = (),
        state: State | None = None,
    ) -> None:
        self.engine = engine
        self.params = params
        self.prompt = list(prompt) or [*engine.tokenizer.prompt_prefix] or [engine.tokenizer.bos_id]
        self.stop = [s for s in stop if s]
        self.state = state
        self.pending: int | None = None

    def __iter__(self) -> Iterator[Chunk]:
        tokenizer = self.engine.tokenizer
        text, sampler = TextStream(tokenizer, self.stop), Sampler(self.params, self.prompt)
        within = self.params.logits_within
        logits, state = self.engine.prefill(self.prompt, self.state)
        self.state = state = state.clone()
        unseen: list[int] = []
        for count in range(1, self.params.max_tokens + 1):
            token = self.pending = sampler.sample(logits[0])
            unseen.append(token)
            ready, reason = text.push(token, last=count == self.params.max_tokens)
            if ready or reason is not None:
                yield Chunk(ready, tuple(unseen), reason)
                unseen = []
            if reason is not None:
                return
            logits, state = self.engine.step(
                torch.tensor([token]), state, in_place=True, within=within
            )
            self.state = state


class TextStream:
    """Sampled tokens as text, held back while a character, or what may become a stop string, is
    not complete. The end-of-document token and a stop string end the text without being part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._stop_ids = tokenizer.stop_ids
        self._stop = [s for s in stop if s]
        self._held = ""

    def push(self, token: int, *, last: bool = False) -> tuple[str, str | None]:
        """The text that is ready, and the reason if it ends here; the `last` token ends it."""
        ended = token in self._stop_ids
        held = self._held + ("" if ended else self._decoder.push(token))
        if ended or last:
            held += self._decoder.flush()
        cut = _find_stop(held, self._stop)
        if cut is not None or ended or last:
            return held[:cut], "stop" if ended or cut is not None else "length"
        keep = _partial_stop(held, self._stop)
        ready, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return ready, None


def _find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found) if found else None


def _partial_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that may become a stop string."""
    longest = max((min(len(s) - 1, len(text)) for s in stop), default=0)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
