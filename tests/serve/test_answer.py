"""Pieces of several choices, trimmed text and the meter."""

from __future__ import annotations

from typing import Any

import pytest

from spikelm.generate import Chunk, Generation
from spikelm.sampling import SamplingParams
from spikelm_serve.answer import Meter, Prompt, answer, reseeded, trimmed


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


def test_choices_are_reseeded_and_totals_come_last(make_engine: Any) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=8, seed=5)
    prompts = [Prompt(ids=(1, 2)), Prompt(ids=(3,), echo="say: ")]
    pieces = list(answer(engine, prompts, params, n=2))
    texts = ["".join(p.text for p in pieces if p.index == i) for i in range(4)]

    alone = list(answer(engine, prompts[:1], SamplingParams(max_tokens=8, seed=6)))
    assert "".join(piece.text for piece in alone) == texts[1]
    assert texts[2].startswith("say: ")
    assert texts[3].startswith("say: ")
    assert sum(piece.finish_reason is not None for piece in pieces) == 4
    assert [piece.totals for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    totals = pieces[-1].totals
    assert totals is not None
    assert (totals.prompt_tokens, totals.completion_tokens) == (3, 32)
    assert totals.state_bytes == 2 * 4 + 8


def test_meter_counts_every_token(make_engine: Any) -> None:
    engine = make_engine("h\u00e9!", delay=0.002)
    meter = Meter()
    list(meter.measure(Generation(engine, [1], SamplingParams(temperature=0))))
    # h, two bytes of e acute, !, end
    assert meter.completion_tokens == 5
    assert meter.decode_tokens == 4
    assert 0 < meter.tokens_per_second < 500
    assert Meter().tokens_per_second == 0


def test_reseeded_wraps() -> None:
    assert reseeded(SamplingParams(seed=2**63 - 1), 1).seed == -(2**63)
    assert reseeded(SamplingParams(), 3).seed is None
