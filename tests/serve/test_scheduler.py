"""Many generations at once are each as if they were alone; what fails, ends or waits takes nothing
with it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.decoder import Watch
from spikelm.errors import RequestError
from spikelm.generate import Engine, Generation
from spikelm.sampling import SamplingParams
from spikelm.state import State
from spikelm_serve import scheduler as module
from spikelm_serve.jobs import Done, Event, Failed, Job, Text
from spikelm_serve.scheduler import Scheduler, reseeded
from spikelm_serve.states import Kept, StateStore


class Events:
    """What comes out of one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.full = False
        self._end = threading.Event()

    def put(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self._end.set()

    def wait(self) -> None:
        assert self._end.wait(60)

    def end(self) -> Done:
        self.wait()
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Done)
        return last

    def tokens(self, index: int = 0) -> list[int]:
        self.end()
        texts = [e for e in self.events if isinstance(e, Text) and e.index == index]
        return [token for text in texts for token in text.tokens]


Start = Callable[..., Scheduler]


@pytest.fixture
def start() -> Iterator[Start]:
    begun: list[Scheduler] = []

    def make(engine: Any, **options: Any) -> Scheduler:
        begun.append(Scheduler(engine, StateStore("model"), **options))
        return begun[-1]

    yield make
    for scheduler in begun:
        scheduler.close()
        scheduler.store.close()


def job(scheduler: Scheduler, ids: Sequence[int], **options: Any) -> tuple[Job, Events]:
    events = Events()
    params = options.pop("params", None) or SamplingParams(temperature=0, max_tokens=8)
    begin = options.get("start")
    head = begin.id if begin else scheduler.store.root(options.get("owner", ""))
    chain = scheduler.store.chain(head, ids)
    return Job(ids=ids, chain=chain, params=params, sink=events, **options), events


def ask(scheduler: Scheduler, ids: Sequence[int], **options: Any) -> Events:
    work, events = job(scheduler, ids, **options)
    scheduler.submit([work])
    return events


def alone(engine: Engine, ids: Sequence[int], params: SamplingParams) -> list[int]:
    return [t for chunk in Generation(engine, ids, params) for t in chunk.token_ids]


def some_ids(seed: int, length: int) -> list[int]:
    drawn = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    return [256, *drawn.tolist()]


def same(a: State, b: State) -> bool:
    return torch.equal(a.position, b.position) and all(
        torch.equal(x[n], y[n]) for x, y in zip(a.layers, b.layers, strict=True) for n in x
    )


@pytest.fixture
def exact(coded_engine: Engine) -> Engine:
    if not coded_engine.is_batch_invariant:
        pytest.skip("native code is not there")
    return coded_engine


def test_a_request_is_the_same_alone_and_among_others(exact: Engine, start: Start) -> None:
    scheduler = start(exact, slots=7, piece=16)
    random.seed(1)
    asked = []
    for i in range(60):
        ids = some_ids(i, random.choice([1, 5, 17, 40]))
        temperature = random.choice([0.0, 0.7, 1.0])
        params = SamplingParams(
            temperature=temperature, seed=i, max_tokens=random.choice([1, 7, 30]), top_p=0.9
        )
        work, events = job(scheduler, ids, params=params)
        scheduler.submit([work])
        asked.append((ids, params, events))
        if i % 7 == 3:
            # Neighbours that leave in the middle.
            gone, _ = job(scheduler, ids, params=SamplingParams(max_tokens=500, seed=1))
            scheduler.submit([gone])
            time.sleep(0.003)
            scheduler.cancel([gone])
    for ids, params, events in asked:
        assert events.tokens() == alone(exact, ids, params)


def test_choices_share_the_prompt_and_differ_by_seed(exact: Engine, start: Start) -> None:
    scheduler = start(exact)
    params = SamplingParams(seed=5, max_tokens=12)
    events = ask(scheduler, some_ids(0, 9), params=params, n=3)
    done = events.end()
    found = [events.tokens(choice) for choice in range(3)]
    assert (done.totals.prompt_tokens, done.totals.completion_tokens) == (10, sum(map(len, found)))
    for choice in range(3):
        expected = alone(exact, some_ids(0, 9), reseeded(params, choice))
        assert events.tokens(choice) == expected


@pytest.mark.parametrize("known", [*range(1, 41, 3), 40, 41])
def test_a_prompt_begins_where_an_earlier_one_ended(
    exact: Engine, start: Start, known: int
) -> None:
    ids = some_ids(3, 40)
    params = SamplingParams(seed=1, max_tokens=9)
    cold = start(exact)
    expected = ask(cold, ids, params=params).end()
    warm = start(exact)
    ask(warm, ids[:known], params=SamplingParams(max_tokens=1)).end()
    events = ask(warm, ids, params=params)
    found = events.end()
    assert events.tokens() == alone(exact, ids, params)
    assert found.totals.cached_tokens >= known
    assert (expected.totals.cached_tokens, expected.totals.miss) == (0, "no_prefix")
    one, other = expected.kept[0], found.kept[0]
    assert one is not None
    assert other is not None
    assert one.id == other.id
    assert same(one.state, other.state)
    assert torch.equal(one.logits, other.logits)


def test_no_token_is_read_twice(exact: Engine, start: Start) -> None:
    scheduler, ids = start(exact), some_ids(4, 20)
    params = SamplingParams(seed=2, max_tokens=6)
    first = ask(scheduler, ids, params=params)
    kept = first.end().kept[0]
    assert kept is not None
    # The whole prompt is known: nothing is read again.
    again = ask(scheduler, ids, params=params)
    assert again.end().totals.cached_tokens == len(ids)
    assert again.tokens() == first.tokens()
    # Going on without anything new.
    more = ask(scheduler, [], start=kept, params=SamplingParams(temperature=0, max_tokens=5))
    text = [*ids, *first.tokens()]
    assert more.tokens() == alone(exact, text, SamplingParams(temperature=0, max_tokens=5))
    assert kept.tokens == len(text)
    last = more.end().kept[0]
    assert last is not None
    assert last.tokens == len(text) + 5
    assert last.parent == kept.id


def test_branches_are_as_if_each_were_the_only_one(exact: Engine, start: Start) -> None:
    scheduler, ids = start(exact), some_ids(5, 30)
    kept = ask(scheduler, ids, params=SamplingParams(temperature=0, max_tokens=4)).end().kept[0]
    assert kept is not None
    branches = []
    for i in range(64):
        fork = scheduler.store.fork(kept.id, "")
        more = some_ids(100 + i, 3)[1:]
        params = SamplingParams(seed=i, max_tokens=5)
        branches.append((more, params, ask(scheduler, more, start=fork, params=params)))
    read = [*ids, *alone(exact, ids, SamplingParams(temperature=0, max_tokens=4))]
    for more, params, events in branches:
        assert events.tokens() == alone(exact, [*read, *more], params)


def test_a_used_slot_remembers_nothing(exact: Engine, start: Start) -> None:
    scheduler, ids = start(exact, slots=2), some_ids(6, 12)
    params = SamplingParams(seed=3, max_tokens=5)
    expected = alone(exact, ids, params)
    canary = exact.model.initial_state(1).map(lambda t: torch.full_like(t, 7))
    kept = Kept(
        id="st_" + "0" * 32,
        parent=None,
        tokens=7,
        owner="",
        delta=torch.zeros(0, dtype=torch.int32).numpy(),
        state=canary,
        logits=torch.zeros(257),
    )
    for _ in range(30):
        ask(scheduler, [1, 2, 3], start=kept, params=params, reuses=False).wait()
        assert ask(scheduler, ids, params=params, reuses=False).tokens() == expected


def test_a_long_prompt_does_not_hold_up_the_others(exact: Engine, start: Start) -> None:
    scheduler = start(exact, piece=32)
    long, late = job(scheduler, some_ids(7, 30_000))
    scheduler.submit([long])
    while long.begun is None:
        time.sleep(0.001)
    for i in range(5):
        assert len(ask(scheduler, some_ids(i, 10)).tokens()) == 8
    assert not any(isinstance(e, Done) for e in late.events)
    scheduler.cancel([long])
    late.wait()
    assert isinstance(late.events[-1], Failed)


def test_priorities_then_owners_then_age(make_engine: Any, start: Start) -> None:
    engine = make_engine(delay=0.02)
    scheduler = start(engine, slots=1)
    blocking, running = job(scheduler, [1])
    scheduler.submit([blocking])
    while scheduler.num_waiting:
        time.sleep(0.001)
    order: list[int] = []
    scheduler.observe = lambda done, outcome: order.append(done.number)
    one = SamplingParams(max_tokens=1)
    for priority in (0, 5, -1, 0):
        scheduler.submit([job(scheduler, [2], params=one, priority=priority)[0]])
    running.end()
    while len(order) < 5:
        time.sleep(0.001)
    assert order == [0, 3, 1, 4, 2]


def test_too_many_are_refused_and_told_when_it_ends(make_engine: Any, start: Start) -> None:
    scheduler = start(make_engine(delay=0.05), slots=1, max_waiting=2)
    held = [ask(scheduler, [1])]
    while scheduler.num_waiting:
        time.sleep(0.001)
    held += [ask(scheduler, [2]), ask(scheduler, [3])]
    with pytest.raises(RequestError, match="requests are waiting") as refused:
        ask(scheduler, [4])
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    scheduler.stop()
    for events in held:
        with pytest.raises(RequestError, match="shutting down"):
            events.end()
    with pytest.raises(RequestError) as late:
        ask(scheduler, [5])
    assert late.value.status == 503


def test_draining_lets_requests_end(make_engine: Any, start: Start) -> None:
    scheduler = start(make_engine(delay=0.01))
    events = ask(scheduler, [1])
    thread = threading.Thread(target=scheduler.drain, args=(30,))
    thread.start()
    while scheduler.accepts:
        time.sleep(0.001)
    with pytest.raises(RequestError, match="shutting down"):
        ask(scheduler, [2])
    assert len(events.tokens()) == 8
    thread.join(10)
    assert not thread.is_alive()


def test_deadlines(make_engine: Any, start: Start) -> None:
    scheduler = start(make_engine(delay=0.02), slots=1)
    params = SamplingParams(max_tokens=1000, logit_bias={256: -100})
    events = ask(scheduler, [1], params=params, deadline=time.monotonic() + 0.6)
    waits = ask(scheduler, [2], deadline=time.monotonic() + 0.05)
    with pytest.raises(RequestError, match="deadline passed") as late:
        waits.end()
    assert late.value.status == 408
    assert 0 < len(events.tokens()) < 40
    assert [e.finish_reason for e in events.events if isinstance(e, Text)][-1] == "length"


def test_a_cancelled_request_is_gone_in_a_step(make_engine: Any, start: Start) -> None:
    scheduler = start(make_engine(delay=0.01))
    work, events = job(
        scheduler, [1], params=SamplingParams(max_tokens=100_000, logit_bias={256: -100})
    )
    scheduler.submit([work])
    while not events.events:
        time.sleep(0.001)
    scheduler.cancel([work])
    began = time.monotonic()
    events.wait()
    assert time.monotonic() - began < 0.25
    assert scheduler.num_running == 0


def test_a_reader_that_stops_holds_up_nobody(
    make_engine: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    scheduler = start(make_engine(delay=0.001))
    slow = ask(scheduler, [1], params=SamplingParams(max_tokens=100_000, logit_bias={256: -100}))
    while not slow.events:
        time.sleep(0.001)
    slow.full = True
    time.sleep(0.05)
    seen = len(slow.events)
    assert len(ask(scheduler, [2]).tokens()) == 8
    assert len(slow.events) == seen
    slow.wait()
    assert isinstance(slow.events[-1], Failed)


class Broken(Engine):
    """Fails while one of its sequences is at a certain token."""

    def step_each(
        self,
        ids: Tensor,
        states: Sequence[State],
        *,
        within: float | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, list[State]]:
        logits, states = super().step_each(ids, states, within=within, watch=watch)
        if bool((states[0].position > 10_000).any()) or any(
            int(state.position) in (25, 27) for state in states
        ):
            # As native code does: some states are written by then.
            raise ValueError("broken")
        return logits, list(states)


def test_one_that_breaks_takes_no_other_with_it(
    exact: Engine, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = start(Broken(exact.checkpoint))
    params = SamplingParams(temperature=0, max_tokens=10)
    # These end before the positions that break.
    good = [some_ids(i, 5) for i in range(6)]
    work = [job(scheduler, ids, params=params) for ids in [*good, some_ids(9, 20)]]
    scheduler.submit([each for each, _ in work])
    for ids, (_, events) in zip(good, work, strict=False):
        assert events.tokens() == alone(exact, ids, params)
    with pytest.raises(RequestError, match="err-") as failed:
        work[-1][1].end()
    assert failed.value.status == 500
    assert "broken" in caplog.text
    assert ask(scheduler, good[0], params=params).tokens() == alone(exact, good[0], params)


def test_a_round_that_breaks_is_told_to_all_and_the_next_one_works(
    make_engine: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start(make_engine())
    original = Scheduler._admit
    monkeypatch.setattr(Scheduler, "_admit", lambda self: 1 // 0)
    with pytest.raises(RequestError, match="err-"):
        ask(scheduler, [1]).end()
    monkeypatch.setattr(Scheduler, "_admit", original)
    assert len(ask(scheduler, [1]).tokens()) == 8


def test_a_float_model_answers_too(tiny_engine: Engine, start: Start) -> None:
    assert not tiny_engine.is_batch_invariant
    scheduler = start(tiny_engine)
    asked = [ask(scheduler, some_ids(i, 12 + i)) for i in range(5)]
    for i, events in enumerate(asked):
        expected = alone(
            tiny_engine, some_ids(i, 12 + i), SamplingParams(temperature=0, max_tokens=8)
        )
        assert events.tokens() == expected
