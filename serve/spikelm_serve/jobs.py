"""What the scheduler is given and what it gives: jobs in, events out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spikelm.decoder import Counts
from spikelm.errors import RequestError
from spikelm.sampling import Likelihood, SamplingParams
from spikelm.state import State
from spikelm_serve.answer import Meter
from spikelm_serve.states import Kept, Reason


class Constraint(Protocol):
    """Which tokens may come next."""

    def allowed(self) -> Tensor:
        """[N], bool."""

    def push(self, token: int) -> None:
        """`token` was chosen."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What reading a token took."""

    counts: Counts
    fired: dict[str, npt.NDArray[np.bool_]]
    """By the name of the neurons in front of a matrix: [n]."""


@dataclass(frozen=True, slots=True)
class Text:
    """The next text of a choice; tokens without text come with the text that they end in."""

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()
    activity: tuple[Activity, ...] = ()
    """Of the steps that made the tokens; the first token comes from the prompt."""
    finish_reason: str | None = None
    """"stop" or "length" on the last one of a choice."""

    def followed_by(self, other: Text) -> Text:
        """Both as one."""
        return Text(
            self.index,
            self.text + other.text,
            self.tokens + other.tokens,
            self.likelihoods + other.likelihoods,
            self.activity + other.activity,
            other.finish_reason,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of the prompt's tokens have been read."""

    read: int
    total: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The prompt's likelihoods, one for each token but the first."""

    likelihoods: tuple[Likelihood, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a request."""

    totals: Totals
    kept: tuple[Kept | None, ...]
    """The state after each choice."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that went wrong."""

    error: RequestError


Event = Text | Progress | Scored | Done | Failed


class Sink(Protocol):
    """Where events go; called on the scheduler's thread, it must not wait."""

    def put(self, event: Event) -> None: ...

    @property
    def full(self) -> bool:
        """Whether nobody takes them."""
        ...


@dataclass(slots=True)
class Totals(Meter):
    """Tokens, times and memory of a request, all of its choices."""

    cached_tokens: int = 0
    """Of the prompt's tokens, those that had been read before."""
    miss: Reason | None = None
    """Why there are none."""
    queue_seconds: float = 0.0
    silent: int = 0
    """Of `entries`, those that were 0 and whose weights were not read."""
    entries: int = 0
    """What entered matrices while tokens were decoded."""
    weight_bytes: int = 0
    """Read meanwhile, each sequence reading its own; 0: not known."""


@dataclass(slots=True, eq=False)
class Job:
    """One prompt and its choices."""

    ids: Sequence[int]
    """What is to be read behind `start`; at least one token, or a start."""
    chain: Sequence[str]
    """The state id after each of them."""
    params: SamplingParams
    sink: Sink
    owner: str = ""
    start: Kept | None = None
    """The state to go on from; None: the beginning."""
    stop: Sequence[str] = ()
    n: int = 1
    first: int = 0
    """Index of the first choice."""
    trim: bool = False
    """Drops white space around each choice."""
    num_top: int | None = None
    """Likelihoods are wanted, with so many alternatives."""
    scores: bool = False
    """Those of the prompt too."""
    constraint: Callable[[], Constraint] | None = None
    borders: dict[int, tuple[int | None, str | None]] = field(default_factory=dict)
    """Tokens of the prompt after which the state is kept: messages read by then, and the role."""
    ending: Callable[[str], tuple[Sequence[int], Sequence[str], int]] | None = None
    """What a conversation with this answer is: tokens behind `start`, their chain, messages."""
    reads_only: bool = False
    """Ends with the state after the prompt; nothing is generated."""
    reuses: bool = True
    """Whether states of earlier requests are used, and this one's kept."""
    priority: int = 0
    """Lower comes first."""
    deadline: float | None = None
    """time.monotonic() at which it ends, whatever it has."""
    progress: bool = False
    spikes: bool = False
    """Texts come with who fired."""
    # What the scheduler knows of it.
    totals: Totals = field(default_factory=Totals)
    submitted: float = field(default_factory=time.monotonic)
    number: int = 0
    cancelled: bool = False
    begun: float | None = None
    position: int = 0
    state: State | None = None
    logits: Tensor | None = None
    last_kept: Kept | None = None
    running: int = 0
    finished: list[Kept | None] = field(default_factory=list)
    scored: list[Likelihood] = field(default_factory=list)
    reason: str = "stop"
    """How its choices ended: "length" if one of them was cut."""
    blocked_since: float | None = None
    ended: bool = False
