"""Requests as jobs: tokens, where states are kept in them, and what a conversation becomes.

A conversation is tokenised whole. A request that goes on from a state reads the new messages alone:
what the template makes of them behind others, which for a template that never changes what it
wrote is the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from spikelm.errors import RequestError
from spikelm.generate import prompt_ids
from spikelm.template import ChatTemplate
from spikelm.tokenizer import Tokenizer
from spikelm_serve.states import Kept, StateStore
from spikelm_serve.strict_json import Json
from spikelm_serve.tools import Tools, check_template, read_answer

BORDERS = 4
"""Message borders of a prompt at which the state is kept, the last ones."""

Messages = Sequence[Mapping[str, Any]]
Ending = Callable[[str], tuple[Sequence[int], Sequence[str], int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be read behind a state, or from the beginning."""

    ids: Sequence[int]
    chain: Sequence[str]
    """The state id after each token."""
    borders: dict[int, tuple[int | None, str | None]]
    ending: Ending | None


class Prompts:
    """Makes prompts of one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, store: StateStore) -> None:
        self._tokenizer, self._template, self._store = tokenizer, template, store

    def text(self, given: str | Sequence[int], start: Kept | None, root: str) -> Prompt:
        """Of a text, or of token ids."""
        if not isinstance(given, str):
            ids = list(given)
        elif start is not None:
            ids = self._tokenizer.encode(given, continues=True)
        else:
            ids = prompt_ids(self._tokenizer, given)
        if not ids and start is None:
            ids = [*self._tokenizer.prompt_prefix] or [self._tokenizer.bos_id]
        return Prompt(ids, self._store.chain(start.id if start else root, ids), {}, None)

    def chat(
        self, messages: Messages, start: Kept | None, root: str, tools: Tools | None = None
    ) -> Prompt:
        """Of a conversation, or of more messages of one.

        Raises: RequestError if the template refuses it, or `start` is not the end of a message.
        """
        offered = None
        if tools is not None or any(m.keys() & {"tool_calls", "tool_call_id"} for m in messages):
            check_template(self._template)
        if tools is not None:
            offered = [tool.as_json() for tool in tools.tools]
        render = partial(self._template.render, tools=offered)
        before = _before(start) if start is not None else []
        known = render(before, add_generation_prompt=False) if before else ""
        whole = render([*before, *messages])
        if not whole.startswith(known):
            raise RequestError(
                "this model's chat template changes what came before when a message is added; "
                "send the whole conversation without state.from",
                param="state.from",
            )
        text = whole[len(known) :]
        if start is None:
            ids = prompt_ids(self._tokenizer, text, special=True)
        else:
            ids = self._encode(text)
        head = start.id if start else root
        chain = self._store.chain(head, ids)
        count = start.messages or 0 if start else 0
        borders: dict[int, tuple[int | None, str | None]] = {}
        for number in range(len(messages), max(0, len(messages) - BORDERS), -1):
            part = _before_prompt(render, [*before, *messages[:number]])
            behind = self._encode(whole[len(part) :]) if part and whole.startswith(part) else None
            if behind is None or list(ids[len(ids) - len(behind) :]) != behind:
                break
            at = len(ids) - len(behind)
            borders[at] = (count + number, messages[number - 1]["role"])

        def ending(said: str) -> tuple[Sequence[int], Sequence[str], int]:
            text, calls = read_answer(said, tools)
            answer: Json = {"role": "assistant", "content": text}
            if calls:
                answer["tool_calls"] = [call.for_template() for call in calls]
            after = _before_prompt(render, [*before, *messages, answer])
            if not after.startswith(whole):
                return (), (), 0
            more = self._encode(after[len(whole) :])
            last = chain[-1] if chain else head
            added = self._store.chain(last, more)
            return [*ids, *more], [*chain, *added], count + len(messages) + 1

        return Prompt(ids, chain, borders, ending)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=True, continues=True) if text else []


def _before_prompt(render: Callable[..., str], messages: Messages) -> str:
    """The conversation as it is kept, "" if the template refuses it: some want a user's turn at the
    end of what they write, and the answer must not fail for it.
    """
    try:
        return render(messages, add_generation_prompt=False)
    except RequestError:
        return ""


def _before(start: Kept) -> Messages:
    """Messages that a state could have read: what the template writes behind them is the same.

    Raises: RequestError for a state within a message, or of plain text.
    """
    if start.role is None:
        raise RequestError(
            f"state {start.id} is not the end of a message; go on from it with /v1/completions",
            param="state.from",
        )
    asked = {"role": "user", "content": "x"}
    if start.role == "assistant":
        return [asked, {"role": "assistant", "content": "x"}]
    return [{"role": start.role, "content": "x"}]
