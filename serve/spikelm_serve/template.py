"""Chat templates: messages -> the text a model continues, rendered as transformers does.

A template comes with the model's files, so it runs in jinja's sandbox and its output is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spikelm.checkpoint import CHAT_TEMPLATE
from spikelm.errors import CheckpointError, RequestError
from spikelm.tokenizer import EOS

MAX_CHARACTERS = 8_000_000


class ChatTemplate:
    """A compiled template. Raises: CheckpointError if it is not valid jinja."""

    stop: tuple[str, ...]
    """Strings that end an answer, besides the end-of-document token."""

    def __init__(self, source: str = CHAT_TEMPLATE) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from None
        # A base model knows no turns: left alone it would go on and write the user's next one.
        self.stop = ("\nUser:",) if source.strip() == CHAT_TEMPLATE.strip() else ()

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The folder's `chat_template.jinja`, or the default for base models."""
        path = folder / "chat_template.jinja"
        try:
            return cls(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError, CheckpointError) as error:
            raise CheckpointError(f"cannot use {path}: {error}") from None

    def render(
        self, messages: Iterable[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Raises: RequestError if the template refuses it."""
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=EOS,
                eos_token=EOS,
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


def _raise(message: str) -> NoReturn:
    raise RequestError(f"the chat template cannot render this: {message}", param="messages")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
