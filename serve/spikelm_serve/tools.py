"""Tools: what a client offers, and which of them an answer calls.

Templates that declare tools (those of Hermes, Qwen and many since) have the model write
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. What a model writes is data: it is read
as JSON, and whatever is not a call of an offered tool stays text.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spikelm.errors import RequestError
from spikelm.template import ChatTemplate
from spikelm_serve.strict_json import Json, parse_object

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALL = 64 * 1024
"""Characters of a call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function of the client's."""

    name: str
    description: str
    parameters: Json
    """A JSON schema of an object."""

    def as_json(self) -> Json:
        """As OpenAI writes it, and templates read it."""
        about = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": about}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What a request offers."""

    tools: tuple[Tool, ...]
    must: tuple[str, ...] = ()
    """One of these is called; else the model decides."""
    parallel: bool = True
    """An answer may call several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: str
    """JSON."""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_json(self) -> Json:
        """As OpenAI writes it."""
        about = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": about}

    def for_template(self) -> Json:
        """The same with the arguments as an object, if they are one."""
        with contextlib.suppress(RequestError):
            arguments = parse_object(self.arguments.encode("utf-8", "surrogatepass"))
            return {**self.as_json(), "function": {"name": self.name, "arguments": arguments}}
        return self.as_json()


def reads_calls(template: ChatTemplate) -> bool:
    """Whether conversations by that template may have tools."""
    return template.declares_tools and OPEN in template.source


def check_template(template: ChatTemplate) -> None:
    """Raises: RequestError for a template that declares no tools, or in another way."""
    if not template.declares_tools:
        raise RequestError("this model's chat template has no tools; leave them out", param="tools")
    if OPEN not in template.source:
        raise RequestError(
            f"this model's chat template has its own way to call tools; the server reads {OPEN}",
            param="tools",
        )


def schema_of(tools: Tools) -> Json:
    """Of the object that calls one of those that must be."""
    wanted = [tool for tool in tools.tools if tool.name in tools.must]
    places = [f"#/$defs/{number}" for number in range(len(wanted))]
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool, place in zip(wanted, places, strict=True)
        ],
        "$defs": {
            str(number): _moved(tool.parameters, places[number])
            for number, tool in enumerate(wanted)
        },
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema that is no longer the root: its references begin where it is."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = place + reference[1:]
    return found


class CallReader:
    """Takes the calls out of an answer that comes in pieces."""

    def __init__(self, tools: Tools) -> None:
        self._names = {tool.name for tool in tools.tools}
        self._parallel = tools.parallel
        self._held, self._behind_call = "", False
        self.calls: list[ToolCall] = []

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is no call for certain, and the calls that are complete."""
        self._held += text
        if self._behind_call:
            self._held = self._held.lstrip()
            self._behind_call = not self._held
        said = ""
        found: list[ToolCall] = []
        while True:
            before, opened, rest = self._held.partition(OPEN)
            if not opened:
                break
            inner, closed, rest = rest.partition(CLOSE)
            if len(inner) > MAX_CALL:
                # Wherever the pieces end, the same is text.
                said += before + OPEN + inner[:MAX_CALL]
                self._held = inner[MAX_CALL:] + closed + rest
                continue
            if not closed:
                said += before.rstrip()
                self._held = self._held[len(before.rstrip()) :]
                return said, found
            call = self._call(inner)
            if call is None:
                said += before + OPEN + inner + CLOSE
            else:
                said += before.rstrip()
                found.append(call)
                self.calls.append(call)
                rest = rest.lstrip()
                self._behind_call = not rest
            self._held = rest
        # The end may be the beginning of a call, or space in front of one.
        cut = next(n for n in range(len(OPEN), -1, -1) if self._held.endswith(OPEN[:n]))
        free = self._held[: len(self._held) - cut].rstrip()
        self._held = self._held[len(free) :]
        return said + free, found

    def end(self) -> str:
        """What was held back and is no call."""
        held, self._held = self._held, ""
        return "" if self.calls and not held.strip() else held

    def _call(self, text: str) -> ToolCall | None:
        try:
            given: dict[str, Any] = parse_object(text.strip().encode())
        except (RequestError, UnicodeEncodeError):
            return None
        name, arguments = given.get("name"), given.get("arguments", {})
        known = isinstance(name, str) and name in self._names
        if not known or not isinstance(arguments, dict) or (self.calls and not self._parallel):
            return None
        return ToolCall(name=str(name), arguments=json.dumps(arguments, ensure_ascii=False))


def read_answer(text: str, tools: Tools | None) -> tuple[str, Sequence[ToolCall]]:
    """The text of a whole answer, and its calls."""
    if tools is None:
        return text, ()
    reader = CallReader(tools)
    said, calls = reader.push(text)
    return said + reader.end(), calls
