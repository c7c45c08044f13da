"""Options and the line that generate and chat share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from spikelm.checkpoint import save
from spikelm.config import AttentionConfig, FFNConfig, ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.errors import ConfigError, RequestError
from spikelm.eval.budget import raisable
from spikelm.models.spikelm import LanguageModel
from spikelm.sampling import SamplingParams
from spikelm.tokenizer import Tokenizer
from spikelm_serve.answer import Meter, stats
from spikelm_serve.arguments import add_running, add_sampling, load_engine, sampling_params


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


def test_a_budget_raises_thresholds_before_the_engine_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spiking = NeuronConfig(kind="integer", k=6.0, max_count=127)
    neurons = NeuronsConfig(mixer_input=spiking, ffn_input=spiking)
    config = ModelConfig(
        vocab_size=257,
        width=32,
        mixers=("window",),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=16),
        neurons=neurons,
        ffn=FFNConfig(hidden_dim=64),
    )
    folder = tmp_path / "spiking"
    save(folder, LanguageModel(config).initialise(0), Tokenizer.bytes())
    text = tmp_path / "text.txt"
    text.write_text("Return the absolute value of x. " * 8)
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_running(parser)
    engine, spent = load_engine(parser.parse_args([str(folder)]))
    assert spent is None
    words = [str(folder), "--spike-budget", "80%", "--budget-data", str(text)]
    with caplog.at_level("INFO"):
        thrifty, spent = load_engine(parser.parse_args(words))
    assert spent is not None
    assert spent["bytes_reached"] <= spent["bytes_asked"] < spent["bytes_before"]
    assert "spike budget 80%: " in caplog.text
    raised = [
        bool((b.dead_zone > a.dead_zone).any())
        for a, b in zip(raisable(engine.model), raisable(thrifty.model), strict=True)
    ]
    assert all(raised)
    with pytest.raises(ConfigError, match="--spike-budget 'half' given"):
        load_engine(parser.parse_args(["nowhere", "--spike-budget", "half"]))
    with pytest.raises(ConfigError, match="allowed here: one budget"):
        load_engine(parser.parse_args(["nowhere", "--spike-budget", "80%,60%"]))
    with pytest.raises(ConfigError, match="give --spike-budget"):
        load_engine(parser.parse_args(["nowhere", "--budget-data", str(text)]))
