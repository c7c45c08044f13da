"""One thread for the model: many generations at once, each as if it were alone.

A round reads a piece of a prompt, or several short ones, and then decodes one token of every
running sequence, so a long prompt delays the others by a piece per token and no more. Sequences
join and leave between rounds. Each owns its state; nothing is shared but the weights, and a request
that fails takes nothing with it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikelm.decoder import Watch
from spikelm.errors import RequestError
from spikelm.generate import PREFILL_TOKENS, Engine, TextStream
from spikelm.sampling import Likelihood, Sampler, SamplingParams, likelihood
from spikelm.state import State
from spikelm_serve.answer import Trimmer
from spikelm_serve.jobs import Activity, Constraint, Done, Failed, Job, Progress, Scored, Text
from spikelm_serve.states import Found, Kept, StateStore

SLOTS = 32
"""Sequences that run at a time."""
MAX_WAITING = 256
"""Requests that wait for a slot."""
PIECE = 256
"""Prompt tokens read between two rounds of decoding."""
PATIENCE_SECONDS = 60
"""How long a client may leave its answer unread."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Choice:
    """One choice that is being decoded."""

    job: Job
    index: int
    state: State
    sampler: Sampler
    text: TextStream
    trimmer: Trimmer
    constraint: Constraint | None
    tokens: list[int] = field(default_factory=list)
    said: str = ""
    unseen: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    activity: list[Activity] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Settling:
    """A finished choice of which the state at the end of its message is still to be reached."""

    job: Job
    index: int
    ids: Sequence[int]
    chain: Sequence[str]
    messages: int
    at: int
    state: State | None
    logits: Tensor | None = None


class Scheduler:
    """Runs jobs on a thread of its own.

    `slots` sequences decode at a time, `max_waiting` jobs wait; one more is refused.
    """

    def __init__(
        self,
        engine: Engine,
        store: StateStore,
        *,
        slots: int = SLOTS,
        max_waiting: int = MAX_WAITING,
        piece: int = PIECE,
    ) -> None:
        self.engine, self.store = engine, store
        self.slots, self.max_waiting, self.piece = slots, max_waiting, piece
        self.observe: Callable[[Job, str], None] = lambda job, outcome: None
        """Called with every job that has ended and how."""
        self.deliver: Callable[[], None] = lambda: None
        """Called when sinks have been given something."""
        self._numbers = itertools.count()
        self._new: list[Job] = []
        self._waiting: list[Job] = []
        self._reading: deque[Job] = deque()
        self._settling: deque[Settling] = deque()
        self._running: list[Choice] = []
        self._wake = threading.Condition()
        self._draining = self._closing = False
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._work, name="spikelm-model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._new) + len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._reading) + len(self._running) + len(self._settling)

    @property
    def accepts(self) -> bool:
        return not self._draining

    def submit(self, jobs: Sequence[Job]) -> None:
        """Lets the jobs of one request wait for their turn, all or none of them.

        Raises: RequestError, 503 if the server is shutting down, 429 if too many wait.
        """
        with self._wake:
            if self._draining:
                raise _shutting_down()
            if self.num_waiting + len(jobs) > self.max_waiting:
                raise RequestError(
                    f"{self.num_waiting} requests are waiting, {self.max_waiting} may; try again "
                    "later",
                    status=429,
                    code="queue_full",
                )
            for job in jobs:
                job.number = next(self._numbers)
            self._new += jobs
            self._idle.clear()
            self._wake.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends them before their next token or piece; nobody waits for their events any more."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more jobs and gives those that are there so long to end; the others are told."""
        with self._wake:
            self._draining = True
        self._idle.wait(seconds)
        self.stop()

    def stop(self) -> None:
        """Ends everything now; those who wait for it are told."""
        with self._wake:
            self._draining = self._closing = True
            self._wake.notify()

    def close(self) -> None:
        """Ends everything, and the thread."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._new or self._busy or self._closing):
                    self._idle.set()
                    self._wake.wait(timeout=1.0)
                self._waiting += self._new
                self._new = []
                if self._closing:
                    break
            try:
                self._round()
            except Exception as error:  # noqa: BLE001
                # Nothing may end this thread; what it was doing is unknown, so all of it ends.
                failure = incident(error)
                for job in self._jobs():
                    self._fail(job, failure)
                self._forget()
            self.deliver()
        for job in self._jobs():
            self._fail(job, _shutting_down())
        self._forget()
        self.deliver()
        self._idle.set()

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._reading or self._running or self._settling)

    def _jobs(self) -> list[Job]:
        begun = [c.job for c in self._running] + [s.job for s in self._settling]
        return list(dict.fromkeys([*self._waiting, *self._reading, *begun]))

    def _forget(self) -> None:
        self._waiting, self._running = [], []
        self._reading.clear()
        self._settling.clear()

    def _round(self) -> None:
        self._leave()
        self._admit()
        budget = self.piece
        while budget > 0 and (self._settling or self._reading):
            if self._settling:
                budget -= self._settle(self._settling.popleft(), budget)
            else:
                budget -= self._read(self._reading.popleft(), budget)
        if budget < self.piece:
            # First tokens do not wait for the others' next ones.
            self.deliver()
        ready = [s for s in self._running if not s.job.sink.full]
        if ready:
            self._decode(ready)
        elif self._running and not (self._reading or self._settling):
            # All wait for their clients.
            time.sleep(0.005)

    def _leave(self) -> None:
        """What was cancelled, is late or is not read by its client."""
        now = time.monotonic()
        for job in self._jobs():
            job.blocked_since = (job.blocked_since or now) if job.sink.full else None
            late = job.deadline is not None and now >= job.deadline
            slow = job.blocked_since is not None and now - job.blocked_since > PATIENCE_SECONDS
            if job.cancelled or slow:
                self._fail(job, RequestError("the client went away", status=499), "abort")
            elif late and not job.running:
                self._fail(
                    job,
                    RequestError(
                        "the deadline passed before there was an answer",
                        status=408,
                        code="deadline_exceeded",
                    ),
                    "deadline",
                )
            elif late:
                self._guarded(job, self._end_early)
        self._waiting = [job for job in self._waiting if not job.ended]
        self._reading = deque(job for job in self._reading if not job.ended)
        self._settling = deque(s for s in self._settling if not s.job.ended)
        self._running = [s for s in self._running if not s.job.ended]

    def _end_early(self, job: Job) -> None:
        """The answer as far as it has come."""
        for choice in [choice for choice in self._running if choice.job is job]:
            self._emit_text(choice, "", "length")
            self._end_choice(choice)

    def _admit(self) -> None:
        """The next jobs that wait, as far as slots are free: by priority, then those whose owner
        has the fewest, then the oldest.
        """
        while self._waiting:
            used = len(self._running) + sum(job.n for job in self._reading)
            owners = Counter(job.owner for job in [*self._reading, *(s.job for s in self._running)])
            job = min(self._waiting, key=lambda j: (j.priority, owners[j.owner], j.number))
            if used and used + job.n > self.slots:
                return
            self._waiting.remove(job)
            self._guarded(job, self._begin)

    def _begin(self, job: Job) -> None:
        job.begun = time.monotonic()
        job.totals.queue_seconds = job.begun - job.submitted
        found = Found(0, None, "disabled")
        if job.reuses and not job.scores:
            found = self.store.find(job.chain, job.owner)
        kept = found.kept or job.start
        before = job.start.tokens if job.start else 0
        job.totals.prompt_tokens = before + len(job.ids)
        job.totals.cached_tokens = before + found.tokens
        job.totals.miss = found.reason if not job.totals.cached_tokens else None
        job.position, job.last_kept = found.tokens, kept
        if kept is not None:
            job.state, job.logits = kept.state, kept.logits
        self._reading.append(job)

    def _read(self, job: Job, budget: int) -> int:
        """Reads up to `budget` tokens of a prompt; what it took of the budget, at least 1."""
        before = job.position
        if self._guarded(job, partial(self._read_piece, budget)):
            if job.position < len(job.ids):
                self._reading.append(job)
            else:
                self._guarded(job, self._start)
        return max(1, job.position - before)

    def _read_piece(self, budget: int, job: Job) -> None:
        """The next tokens of a prompt, up to where a state is kept."""
        if job.position < len(job.ids):
            stops = [len(job.ids)]
            if not job.scores:
                stops += [*job.borders, *_grid(len(job.ids))]
            end = min(s for s in stops if s > job.position)
            # Scores of a model in floats depend on how a text is cut: as `generate.run` cuts it.
            end = min(end, job.position + (PREFILL_TOKENS if job.scores else budget))
            part = job.ids[job.position : end]
            if job.scores:
                self._score(job, part)
            else:
                job.logits, job.state = self.engine.prefill(part, job.state)
            job.position = end
            if end in stops:
                self._keep_prompt(job)
        if job.progress:
            job.sink.put(Progress(job.position, len(job.ids)))

    def _score(self, job: Job, part: Sequence[int]) -> None:
        """Reads them for the logits after each."""
        logits, job.state = self.engine.read_each(part, job.state)
        before = [] if job.logits is None else [job.logits.view(-1)]
        rows = [*before, *logits]
        for row, token in zip(rows, part[len(part) - len(rows) + 1 :], strict=False):
            job.scored.append(likelihood(row, token, job.num_top or 0))
        job.logits = logits[-1:]

    def _keep_prompt(self, job: Job) -> None:
        messages, role = job.borders.get(job.position, (None, None))
        assert job.state is not None
        assert job.logits is not None
        if job.reuses:
            job.last_kept = self._keep(
                job, job.ids, job.chain, job.position, job.state, job.logits, messages, role
            )

    def _keep(self, job: Job, *what: Any) -> Kept:
        return self.store.keep(self._made(job, *what))

    def _made(
        self,
        job: Job,
        ids: Sequence[int],
        chain: Sequence[str],
        at: int,
        state: State,
        logits: Tensor,
        messages: int | None,
        role: str | None,
    ) -> Kept:
        before = job.start.tokens if job.start else 0
        parent = job.last_kept if job.last_kept is not None else job.start
        # The parent may lie on another branch, such as behind a prompt for the answer.
        begun = parent.tokens - before if parent is not None else 0
        if parent is not None and (begun > at or (begun > 0 and chain[begun - 1] != parent.id)):
            parent = job.start
            begun = 0
        return Kept(
            id=chain[at - 1],
            parent=parent.id if parent else None,
            tokens=before + at,
            owner=job.owner,
            delta=np.array(ids[begun:at], np.int32),
            state=state.clone(),
            logits=logits[0].float().clone(),
            messages=messages,
            role=role,
        )

    def _start(self, job: Job) -> None:
        """The prompt is read: the first token of every choice."""
        assert job.state is not None
        assert job.logits is not None
        logits = job.logits if job.logits.ndim == 2 else job.logits[None]
        now = time.monotonic()
        job.totals.prompt_seconds = now - (job.begun or now)
        job.begun = now
        if job.scores:
            job.sink.put(Scored(tuple(job.scored)))
        if job.reads_only:
            self._end_reading(job, job.state, logits)
            return
        job.finished = [None] * job.n
        job.running = job.n
        for offset in range(job.n):
            sequence = Choice(
                job,
                job.first + offset,
                job.state.clone(),
                Sampler(reseeded(job.params, offset), job.ids),
                TextStream(self.engine.tokenizer, job.stop),
                Trimmer(job.trim),
                job.constraint() if job.constraint else None,
            )
            self._running.append(sequence)
            self._choose(sequence, logits[0], job)
        job.state = job.logits = None

    def _end_reading(self, job: Job, state: State, logits: Tensor) -> None:
        kept = self._made(job, job.ids, job.chain, len(job.ids), state, logits, None, None)
        if job.reuses:
            kept = self.store.keep(kept)
        job.running, job.finished = 1, [kept]
        self._settled(job)

    def _decode(self, ready: Sequence[Choice]) -> None:
        """One token of each. What may be estimated depends on a sequence alone, so that its tokens
        do.
        """
        groups: dict[float | None, list[Choice]] = {}
        for sequence in ready:
            exact = sequence.job.num_top is not None or sequence.constraint is not None
            within = None if exact else sequence.sampler.params.logits_within
            groups.setdefault(within, []).append(sequence)
        began = time.monotonic()
        for within, group in groups.items():
            try:
                self._step(group, within)
            except Exception:  # noqa: BLE001  (whose it is comes out one by one)
                for sequence in group:
                    self._guarded(sequence.job, partial(self._step_again, sequence, within))
        seconds = time.monotonic() - began
        for job in dict.fromkeys(sequence.job for sequence in ready):
            job.totals.decode_seconds += seconds
        self._running = [s for s in self._running if not s.job.ended]

    def _step_again(self, sequence: Choice, within: float | None, job: Job) -> None:
        """A step alone, after one of many was broken off: which left the states half written."""
        start = job.start.state if job.start else None
        read = [*job.ids, *sequence.tokens[:-1]]
        if read:
            _, start = self.engine.prefill(read, start)
        assert start is not None
        sequence.state = start.clone()
        self._step([sequence], within)

    def _step(self, group: Sequence[Choice], within: float | None) -> None:
        tokens = torch.tensor([sequence.tokens[-1] for sequence in group])
        watch = Watch(bits=any(sequence.job.spikes for sequence in group))
        logits, states = self.engine.step_each(
            tokens, [s.state for s in group], within=within, watch=watch
        )
        for row, (sequence, state) in enumerate(zip(group, states, strict=True)):
            sequence.state = state
            totals = sequence.job.totals
            totals.decode_tokens += 1
            if watch.counts:
                counts = watch.counts[row]
                totals.silent += counts.silent
                totals.entries += counts.total
                totals.weight_bytes += counts.weight_bytes
                if sequence.job.spikes:
                    fired = {name: bits[row] for name, bits in watch.fired.items()}
                    sequence.activity.append(Activity(counts, fired))
            self._guarded(sequence.job, partial(self._choose, sequence, logits[row]))

    def _choose(self, sequence: Choice, logits: Tensor, job: Job) -> None:
        """The next token of a sequence, and its text."""
        if job.ended or sequence not in self._running:
            return
        allowed = sequence.constraint.allowed() if sequence.constraint else None
        token = sequence.sampler.sample(logits, allowed)
        if sequence.constraint:
            sequence.constraint.push(token)
        if job.num_top is not None:
            sequence.likelihoods.append(likelihood(logits, token, job.num_top))
        sequence.tokens.append(token)
        sequence.unseen.append(token)
        job.totals.completion_tokens += 1
        last = len(sequence.tokens) >= job.params.max_tokens
        text, reason = sequence.text.push(token, last=last)
        self._emit_text(sequence, sequence.trimmer.push(text), reason)
        if reason is not None:
            self._end_choice(sequence)

    def _emit_text(self, sequence: Choice, text: str, reason: str | None) -> None:
        sequence.said += text
        if reason == "length":
            sequence.job.reason = reason
        if text or reason is not None:
            sequence.job.sink.put(
                Text(
                    sequence.index,
                    text,
                    tuple(sequence.unseen),
                    tuple(sequence.likelihoods),
                    tuple(sequence.activity),
                    reason,
                )
            )
            sequence.unseen, sequence.likelihoods, sequence.activity = [], [], []

    def _end_choice(self, sequence: Choice) -> None:
        job = sequence.job
        self._running.remove(sequence)
        job.totals.state_bytes = sequence.state.nbytes
        settling = self._ending(sequence) if job.reuses else None
        if settling is None:
            self._settled(job)
        else:
            self._settling.append(settling)

    def _ending(self, sequence: Choice) -> Settling | None:
        """How to get to the state that the next request will begin with."""
        job = sequence.job
        fed = [*job.ids, *sequence.tokens[:-1]]
        ids: Sequence[int]
        if job.ending is None:
            # A text goes on behind its last token.
            stops = self.engine.tokenizer.stop_ids
            ids = [*job.ids, *(token for token in sequence.tokens if token not in stops)]
            # A prompt without tokens goes on from a state.
            last = job.chain[-1] if job.start is None or job.chain else job.start.id
            more = self.store.chain(last, ids[len(job.ids) :])
            chain: Sequence[str] = [*job.chain, *more]
            messages = None
        else:
            ids, chain, messages = job.ending(sequence.said)
        if not ids:
            return None
        # With nothing left to read there would be no logits to go on from: those that the last
        # token was drawn from may be estimates.
        if len(ids) > len(fed) and list(ids[: len(fed)]) == fed:
            return Settling(
                job, sequence.index, ids, chain, messages or 0, len(fed), sequence.state
            )
        found = self.store.find(chain, job.owner)
        kept = found.kept or job.start
        state, logits = (kept.state, kept.logits[None]) if kept else (None, None)
        return Settling(job, sequence.index, ids, chain, messages or 0, found.tokens, state, logits)

    def _settle(self, settling: Settling, budget: int) -> int:
        """As `_read`, of what is missing behind an answer."""
        before = settling.at
        work = partial(self._settle_piece, settling, budget)
        if self._guarded(settling.job, work) and settling.at < len(settling.ids):
            self._settling.append(settling)
        return max(1, settling.at - before)

    def _settle_piece(self, settling: Settling, budget: int, job: Job) -> None:
        end = min(settling.at + budget, len(settling.ids))
        if end > settling.at:
            part = settling.ids[settling.at : end]
            settling.logits, settling.state = self.engine.prefill(part, settling.state)
            settling.at = end
        if end < len(settling.ids):
            return
        kept = None
        if settling.state is not None and settling.logits is not None:
            role = "assistant" if settling.messages else None
            kept = self._keep(
                job,
                settling.ids,
                settling.chain,
                end,
                settling.state,
                settling.logits,
                settling.messages or None,
                role,
            )
        job.finished[settling.index - job.first] = kept
        self._settled(job)

    def _settled(self, job: Job) -> None:
        job.running -= 1
        if job.running == 0 and not job.ended:
            job.ended = True
            job.sink.put(Done(job.totals, tuple(job.finished)))
            self.observe(job, job.reason)

    def _guarded(self, job: Job, work: Callable[[Job], Any]) -> bool:
        """Whether `work` was done; if not, this job has failed and no other."""
        if job.ended:
            return False
        try:
            work(job)
        except RequestError as error:
            self._fail(job, error)
        except Exception as error:  # noqa: BLE001  (one request's, whatever it is)
            self._fail(job, incident(error))
        return not job.ended

    def _fail(self, job: Job, error: RequestError, outcome: str = "error") -> None:
        if not job.ended:
            job.ended = True
            job.state = job.logits = None
            job.sink.put(Failed(error))
            self.observe(job, outcome)


def _grid(tokens: int) -> list[int]:
    """Where states of a long prompt are kept: on the chunk grid, thinner towards its beginning."""
    found, back = [], PREFILL_TOKENS
    while (at := (tokens - back) // PREFILL_TOKENS * PREFILL_TOKENS) > 0:
        found.append(at)
        back *= 2
    return found


def reseeded(params: SamplingParams, offset: int) -> SamplingParams:
    """The parameters with seed + offset, wrapped to 64 bits; no seed stays no seed."""
    if params.seed is None:
        return params
    seed = (params.seed + offset + 2**63) % 2**64 - 2**63
    return replace(params, seed=seed)


def incident(error: BaseException) -> RequestError:
    """What a client is told of an exception it could not cause: where to look for it."""
    name = f"err-{uuid.uuid4().hex[:12]}"
    log.error("%s", name, exc_info=error)
    message = f"the server failed to answer; its log has the reason under {name}"
    return RequestError(message, status=500, code="internal_error")


def _shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")
