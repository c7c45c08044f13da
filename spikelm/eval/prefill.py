"""Prompt speed on models of a preset's shape: ours at chosen silence, beside other programs.

The contestants and their turns are those of `spikelm.eval.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spikelm.eval.decode import contest


def bench_prefill(
    preset: str,
    *,
    silence: float = 0.8,
    hidden_silence: float | None = None,
    bits: int = 8,
    threads: int = 1,
    against: Sequence[str] = ("dense",),
    rounds: int = 4,
    prompt_tokens: int = 512,
    load: int = 0,
) -> dict[str, Any]:
    """Median times per token of a prompt, up to the logits of its last, and ratios to ours, as JSON
    types. Arguments and errors as for `bench_decode`.
    """
    found = contest(
        preset,
        lambda contestant: [contestant.prefill(prompt_tokens)],
        silence=silence,
        hidden_silence=hidden_silence,
        bits=bits,
        threads=threads,
        against=against,
        rounds=rounds,
        tokens=prompt_tokens,
        load=load,
        context=prompt_tokens,
        divisor=prompt_tokens,
    )
    for contestant in found["contestants"]:
        contestant["tokens_per_second"] = 1e3 / contestant["ms_per_token"]
    return found
