"""JSON from strangers: one object, finite numbers, each key once, bounded depth, valid Unicode."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from spikelm.errors import RequestError

MAX_DEPTH = 32

Json = dict[str, Any]


def parse_object(body: bytes) -> Json:
    """The object that `body` holds. Raises: RequestError saying what is wrong with it."""
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except RequestError:
        raise
    except RecursionError:
        raise RequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    _check_tree(value)
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> Json:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RequestError(f"the key {reprlib.repr(twice)} appears twice in one JSON object")
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RequestError(f"the number {text[:20]} is too large")
    # Some clients have no integers: 5.0 is 5.
    return int(value) if value.is_integer() else value


def _constant(text: str) -> NoReturn:
    raise RequestError(f"{text} is not valid JSON")


def _check_tree(root: object) -> None:
    """Without recursion, so that no input can exhaust the stack."""
    pending = [(root, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise RequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            pending += ((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list):
            pending += ((item, depth + 1) for item in value)
        elif isinstance(value, str) and not _is_unicode(value):
            raise RequestError("the JSON has a lone surrogate, which is not valid Unicode")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
