"""What a head in two stages changes: the same text read with all logits exact, and with those alone
that matter to a draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm import checkpoint
from spikelm.corpus import builtin_documents
from spikelm.decoder import native_program
from spikelm.errors import BackendError, ConfigError
from spikelm.eval.evaluate import token_stream
from spikelm.kernels.outputs import Halves
from spikelm.models.coded import CodedLinear
from spikelm.sampling import Sampler, SamplingParams

DRAWS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top-k 50": SamplingParams(top_k=50),
}
SEEDS = 8
MEASURED_TOKENS = 512


def bench_head(
    path: str | Path, documents: Sequence[str] | None = None, *, tokens: int = MEASURED_TOKENS
) -> dict[str, Any]:
    """Reads the first `tokens` of `documents` (by default the built-in validation text) and draws
    the next token from both, with several seeds, as JSON types by kind of draw: the total variation
    between the two distributions (the most by which the probability of anything can differ), how
    many draws of the same seed differ, which share of the logits was exact, and time and weight
    bytes per token. Estimates that change the order of two unlikely tokens change a draw, but
    hardly a probability.

    Raises: ConfigError for fewer than 2 tokens or a model whose head cannot be read in two stages;
    BackendError where it does not decode natively.
    """
    if tokens < 2:
        raise ConfigError(f"--tokens {tokens} given; allowed: 2 or more")
    loaded = checkpoint.load(path)
    linear = loaded.model.head.linear
    if not isinstance(linear, CodedLinear) or linear.bits != 8:
        raise ConfigError(f"{path} has no head of 8-bit weights; convert the model first")
    if linear.table is not None and not isinstance(linear.table, torch.Tensor | Halves):
        linear.table = Halves(linear.table.dense)
    program, obstacle = native_program(loaded.model)
    if program is None:
        raise BackendError(f"this model does not decode natively: {obstacle}")
    texts = builtin_documents("validation") if documents is None else documents
    ids = token_stream(loaded.tokenizer, texts).first(tokens).ids
    results: dict[str, Any] = {}
    rows: dict[str, list[tuple[float, int, float, int, float]]] = {name: [] for name in DRAWS}
    whole: list[tuple[float, int]] = []
    state = loaded.model.initial_state(1).clone()
    for position, token in enumerate(map(torch.tensor, ids)):
        # One of the draws goes on with the text, the others read beside it.
        copies = {name: state.clone() for name in DRAWS}
        began = perf_counter()
        logits, counts = program.run(token[None], state)
        whole.append((perf_counter() - began, counts.weight_bytes))
        for name, params in DRAWS.items():
            began = perf_counter()
            partly, counts = program.run(token[None], copies[name], params.logits_within)
            seconds = perf_counter() - began
            differ = 0
            for seed in range(SEEDS):
                own = SamplingParams(
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    seed=position * SEEDS + seed,
                )
                differ += Sampler(own).sample(logits[0]) != Sampler(own).sample(partly[0])
            exact = float((partly == logits).float().mean())
            p, q = (probabilities(scores[0], params) for scores in (logits, partly))
            variation = float((p - q).abs().sum()) / 2
            rows[name].append((seconds, counts.weight_bytes, exact, differ, variation))
    for name, found in rows.items():
        seconds_each, read, exact_each, differing, variations = zip(*found, strict=True)
        results[name] = {
            "ms_per_token": 1e3 * statistics.median(seconds_each),
            "weight_bytes": statistics.mean(read),
            "exact_fraction": statistics.mean(exact_each),
            "total_variation": statistics.mean(variations),
            "draws": SEEDS * len(found),
            "draws_that_differ": sum(differing),
        }
    return {
        "name": loaded.name,
        "path": str(path),
        "tokens": len(whole),
        "vocabulary": linear.out_features,
        "all_exact": {
            "ms_per_token": 1e3 * statistics.median(seconds for seconds, _ in whole),
            "weight_bytes": statistics.mean(read for _, read in whole),
        },
        "draws": results,
    }


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """What logits [N] are drawn with [N], float64: temperature, then top-k, then top-p."""
    if params.temperature == 0:
        return F.one_hot(logits.argmax(), logits.numel()).double()
    p, ids = (logits.double() / params.temperature).softmax(-1).sort(descending=True, stable=True)
    if params.top_k is not None:
        p[params.top_k :] = 0
        p /= p.sum()
    p[1:] *= p.cumsum(0)[:-1] < params.top_p
    return torch.zeros_like(p).index_put((ids,), p / p.sum())
