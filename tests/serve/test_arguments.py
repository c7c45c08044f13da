"""Options and the line that generate and chat share."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from spikelm.errors import RequestError
from spikelm.sampling import SamplingParams
from spikelm_serve.answer import Meter
from spikelm_serve.arguments import add_sampling, sampling_params, stats


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling(parser)
    return parser.parse_args(words)


def test_every_option_reaches_the_sampler() -> None:
    words = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed -2"
    args = parsed(*words.split(), "--repetition-penalty", "1.1", "--stop", "a", "--stop", "b")
    assert sampling_params(args) == SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        seed=-2,
    )
    assert args.stop == ["a", "b"]
    assert parsed().stop == []


def test_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p"):
        sampling_params(parsed("--top-p", "1.5"))


def test_stats(make_engine: Any) -> None:
    engine = make_engine("x")
    meter = Meter(completion_tokens=9, decode_tokens=8, decode_seconds=0.5, state_bytes=4096)
    expected = "[9 tokens, 16.0 tokens/s, 25.0% silent, 4,096 bytes of state]"
    assert stats(meter, engine) == expected
    engine.silent_fraction = None
    assert stats(meter, engine) == expected.replace(", 25.0% silent", "")
