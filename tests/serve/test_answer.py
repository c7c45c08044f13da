"""Trimmed text and the meter."""

from __future__ import annotations

from typing import Any

import pytest

from spikelm.generate import Chunk, Generation
from spikelm.sampling import SamplingParams
from spikelm_serve.answer import Meter, trimmed


def chunks(*texts: str) -> list[Chunk]:
    return [
        Chunk(text, (i,), "stop" if i == len(texts) - 1 else None) for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((" a", " b", " "), "a b"),
        (("\n", " \n", "a\n\n", "b", "\n", "\n"), "a\n\nb"),
        ((" ", "\n"), ""),
        (("", ""), ""),
    ],
)
def test_trimmed(texts: tuple[str, ...], expected: str) -> None:
    pieces = list(trimmed(chunks(*texts)))
    assert "".join(piece.text for piece in pieces) == expected
    assert [piece.token_ids for piece in pieces] == [(i,) for i in range(len(texts))]
    assert pieces[-1].finish_reason == "stop"


def test_meter_counts_every_token(make_engine: Any) -> None:
    engine = make_engine("h\u00e9!", delay=0.002)
    meter = Meter()
    list(meter.measure(Generation(engine, [1], SamplingParams(temperature=0))))
    # h, two bytes of e acute, !, end
    assert meter.completion_tokens == 5
    assert meter.decode_tokens == 4
    assert 0 < meter.tokens_per_second < 500
    assert Meter().tokens_per_second == 0
