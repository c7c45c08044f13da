"""Answers of a given form: JSON, a regular expression, one of several choices.

llguidance says which tokens may come next; its grammars are bounded in size and in work per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from spikelm.errors import RequestError
from spikelm.tokenizer import Tokenizer
from spikelm_serve.tools import CLOSE, OPEN, Tools, schema_of

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32


# A small model that may write white space anywhere writes nothing else.
_COMPACT: Any = {"whitespace_flexible": False}


class Forms:
    """The constraints of one tokenizer's answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stop_ids = sorted(tokenizer.stop_ids)
        words = _Words(tokenizer)
        wrapped = LLTokenizer(TokenizerWrapper(words), eos_token=self._stop_ids)
        self._tokenizer, self._num_tokens = wrapped, tokenizer.vocab_size
        self._limits = LLParserLimits(
            initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_grammar_size=100_000
        )

    def json(self, schema: Any) -> Callable[[], Form]:
        """Values that a JSON schema allows. Raises: RequestError for one that is not served."""
        text = _text(schema, "response_format")
        return self._form(
            lambda: LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT), "response_format"
        )

    def call(self, tools: Tools) -> Callable[[], Form]:
        """A call of one of the tools that must be. Raises: RequestError for a schema that is not
        served.
        """
        # The same, for the part of a grammar.
        schema = {**schema_of(tools), "x-guidance": _COMPACT}
        lark = f'start: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: %json {_text(schema, "tools")}'
        return self._form(lambda: LLMatcher.grammar_from_lark(lark), "tools")

    def regex(self, pattern: str) -> Callable[[], Form]:
        """Texts that match as a whole. Raises: RequestError for a pattern that is not served."""
        return self._form(lambda: LLMatcher.grammar_from_regex(pattern), "structured_outputs.regex")

    def choice(self, texts: Sequence[str]) -> Callable[[], Form]:
        """One of `texts`. Raises: RequestError for too many."""
        lark = "start: " + " | ".join(json.dumps(text) for text in texts)
        return self._form(lambda: LLMatcher.grammar_from_lark(lark), "structured_outputs.choice")

    def _form(self, grammar: Callable[[], str], param: str) -> Callable[[], Form]:
        try:
            first = LLMatcher(self._tokenizer, grammar(), log_level=0, limits=self._limits)
            problem = first.get_error() if first.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            line = " ".join(problem.split())[:300]
            raise RequestError(f"{param} is not served: {line}", param=param)
        return lambda: Form(first.deep_copy(), self._num_tokens, self._stop_ids)


class Form:
    """What one answer may still be (`jobs.Constraint`)."""

    def __init__(self, matcher: Any, num_tokens: int, stop_ids: Sequence[int]) -> None:
        self._matcher, self._num_tokens, self._stop_ids = matcher, num_tokens, stop_ids

    def allowed(self) -> Tensor:
        """[N], bool: the end alone once nothing can follow."""
        found = torch.zeros(self._num_tokens, dtype=torch.bool)
        if self._matcher.is_stopped():
            found[self._stop_ids] = True
            return found
        biases = bytearray(self._matcher.compute_logit_bias())
        found |= torch.frombuffer(biases, dtype=torch.uint8)[: self._num_tokens] > 0
        if self._matcher.is_error() or not bool(found.any()):
            reason = " ".join(str(self._matcher.get_error()).split())[:200]
            raise RequestError(f"the answer's form became too complex: {reason}")
        return found

    def push(self, token: int) -> None:
        """`token` was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class _Words:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        size = tokenizer.vocab_size
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(size)]
        self.special_token_ids = [
            token for token, text in enumerate(self.tokens) if not text or token in self.stops
        ]
        # A token without text must not look like the empty text.
        self.tokens = [text or b"\xff<%d>" % token for token, text in enumerate(self.tokens)]

    @property
    def stops(self) -> frozenset[int]:
        return self._tokenizer.stop_ids

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _text(schema: Any, param: str) -> str:
    text = json.dumps(schema)
    if len(text.encode()) > MAX_SCHEMA_BYTES or _depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(
            f"the schema is larger than {MAX_SCHEMA_BYTES} bytes or deeper than {MAX_SCHEMA_DEPTH}",
            param=param,
        )
    return text


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        deepest = max(deepest, depth)
        parts = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            waiting += [(part, depth + 1) for part in parts]
    return deepest
