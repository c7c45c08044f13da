"""What json.loads would let through."""

from __future__ import annotations

import pytest

from spikelm.errors import RequestError
from spikelm_serve.strict_json import parse_object


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "a\nb"}', "not valid JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "'prompt' appears twice"),
        (b'{"prompt": "x", "z": {"a": 1, "a": 1}}', "'a' appears twice"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not valid JSON"),
        (b'{"prompt": "x", "z": -Infinity}', "-Infinity is not valid JSON"),
        (b'{"prompt": "x", "temperature": 1e400}', "too large"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "x", "\\udfff": 1}', "lone surrogate"),
        (b'{"prompt": "x", "z": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b'{"prompt": "x", "z": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested deeper"),
        (b'{"prompt": "x", "z": ' + b'{"a":' * 10**4 + b"1" + b"}" * 10**4 + b"}", "nested"),
    ],
)
def test_bad_json(body: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as info:
        parse_object(body)
    assert info.value.status == 400


def test_escaped_pairs_are_text() -> None:
    body = b'{"prompt": "\\ud83d\\ude00 \\u0000"}'
    assert parse_object(body) == {"prompt": "\U0001f600 \0"}
