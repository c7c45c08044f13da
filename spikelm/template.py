"""Chat templates: messages -> the text a model continues, rendered as transformers does.

A template comes with the model's files, so it runs in jinja's sandbox and its output is bounded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spikelm.errors import CheckpointError, RequestError
from spikelm.tokenizer import BASE_CHAT_TEMPLATE, CHAT_TEMPLATE, EOS, Tokenizer

MAX_CHARACTERS = 8_000_000
MAX_BASE = 1000
_SAMPLES = (
    ("One.", "Two words", "3"),
    ("  with spaces \n", "line\n\nline", "\tx"),
    ("<think>why</think>\n\nso", "</think>", "<think>"),
    ("", "empty before"),
)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which a short expression makes no long text or number either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                sized = isinstance(repeated, str | list | tuple)
                if sized and isinstance(times, int) and len(repeated) * times > MAX_CHARACTERS:
                    _raise(f"more than {MAX_CHARACTERS} characters")
        elif abs(left) > MAX_BASE or abs(right) > MAX_BASE:
            _raise(f"a power of numbers above {MAX_BASE}")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template. Raises: CheckpointError if it is not valid jinja."""

    source: str
    declares_tools: bool
    """Whether it writes the tools that it is given."""
    stop: tuple[str, ...]
    """Strings that end an answer, besides the end-of-document token."""

    def __init__(self, source: str | None = None, tokenizer: Tokenizer | None = None) -> None:
        """Without `source` the tokenizer's template, or the default for base models."""
        if source is None:
            source = (tokenizer and tokenizer.chat_template) or BASE_CHAT_TEMPLATE
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # noqa: BLE001  (compiling one can raise anything)
            raise CheckpointError(f"the chat template is not valid: {error}") from None
        self.source, self.declares_tools = source, "tools" in names
        # Names that templates of other models test, as transformers gives them.
        self._names: dict[str, Any] = {"documents": None}
        own = {"bos_token": EOS, "eos_token": EOS}
        self._names |= own if tokenizer is None else tokenizer.special_tokens
        self._tokenizer = tokenizer
        # A base model knows no turns: left alone it would go on and write the user's next one.
        self.stop = ("\nUser:",) if source.strip() == BASE_CHAT_TEMPLATE.strip() else ()

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The folder's `chat_template.jinja`, else the tokenizer's or the default.

        With the folder's tokenizer, the special tokens are its own.
        """
        path = folder / CHAT_TEMPLATE
        try:
            return cls(path.read_text(encoding="utf-8"), tokenizer)
        except FileNotFoundError:
            return cls(tokenizer=tokenizer)
        except (OSError, UnicodeDecodeError, CheckpointError) as error:
            raise CheckpointError(f"cannot use {path}: {error}") from None

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, to be read by `Tokenizer.encode(special=True)`.

        Messages may have `tool_calls`, and `tools` be given, as OpenAI writes them. A special token
        in a message or a tool stays text: it is marked, see `Tokenizer.as_text`.
        Raises: RequestError if the template refuses the conversation.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=[self._marked(_with_old_role(message)) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=self._marked(tools),
                **self._names,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    _raise(f"more than {MAX_CHARACTERS} characters")
        except RequestError:
            raise
        except Exception as error:  # noqa: BLE001  (a template can raise anything)
            _raise(str(error))
        return "".join(pieces)

    def turns(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """The conversation up to its last answer, cut into parts, and whether each is an answer.

        An answer is what a model writes when it is its turn, up to what ends the turn: what the
        template puts behind its content, or `stop` where nothing follows but that. Joined, the
        parts are the text that `render` gives.

        Raises: RequestError if the template refuses the conversation, or writes something else at
        the beginning of a conversation once there is more of it.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        text = self.render(messages[: answers[-1] + 1], add_generation_prompt=False)
        parts, done = [], 0
        for i in answers:
            before = self.render(messages[:i])
            after = self.render(messages[: i + 1], add_generation_prompt=False)
            if not (text.startswith(after) and after.startswith(before) and len(before) >= done):
                _raise("it changes the beginning of a conversation when there is more of it")
            end = len(after)
            for stop in self.stop:
                at = text.find(stop, max(len(before), end - len(stop)), end + len(stop))
                end = max(end, at + len(stop)) if at >= 0 else end
            parts += [(text[done : len(before)], False), (text[len(before) : end], True)]
            done = end
        return parts

    def rewrites(self) -> str | None:
        """What it changes of a conversation's beginning when there is more of it, which then cannot
        be gone on from a state; None: nothing of what was tried, as far as it does not refuse.
        """
        for system, texts in itertools.product((False, True), _SAMPLES):
            messages = [{"role": "system", "content": texts[0]}] if system else []
            before = ""
            for number in range(len(messages) + 1, len(messages) + 7):
                role = "user" if (number - system) % 2 else "assistant"
                text = texts[number % len(texts)]
                messages.append({"role": role, "content": text})
                try:
                    prompt = self.render(messages) if role == "user" else ""
                    after = self.render(messages, add_generation_prompt=False)
                except RequestError:
                    break
                if not after.startswith(before):
                    return f"what it wrote of {number - 1} messages is changed by another one"
                if role == "user" and not prompt.startswith(after):
                    return f"what it wrote of {number} messages is changed in front of an answer"
                before = after
        return None

    def ends(self, answer: str) -> bool:
        """Whether a chat would stop within `answer`, one that `turns` gave."""
        tokenizer = self._tokenizer
        ids = set() if tokenizer is None else set(tokenizer.encode(answer, special=True))
        return bool(self.stop) or (tokenizer is not None and bool(ids & tokenizer.stop_ids))

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return value if self._tokenizer is None else self._tokenizer.as_text(value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item) for item in value]
        return value


def _with_old_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI renamed the role; templates know the old name."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _raise(message: str) -> NoReturn:
    raise RequestError(f"the chat template cannot render this: {message}", param="messages")


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
