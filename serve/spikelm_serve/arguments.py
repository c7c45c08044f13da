"""Command-line options that several commands share."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from typing import TYPE_CHECKING, Any

from spikelm.errors import ConfigError
from spikelm.eval.cli import add_spike_budget, spike_budgets

if TYPE_CHECKING:
    from spikelm.generate import Engine
    from spikelm.sampling import SamplingParams

_log = logging.getLogger(__name__)


def add_running(parser: argparse.ArgumentParser) -> None:
    """What `load_engine` reads."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="event-driven implementation of spike-coded models (%(default)s; see doctor)",
    )
    add_spike_budget(parser)


def load_engine(args: argparse.Namespace) -> tuple[Engine, dict[str, Any] | None]:
    """The engine of the model, its thresholds raised if there is a budget: what that did is
    logged and returned.

    Raises: ConfigError for a bad budget; what `checkpoint.load` and `Throttle` raise.
    """
    from spikelm.checkpoint import load
    from spikelm.corpus import read_documents
    from spikelm.eval.budget import Throttle
    from spikelm.eval.tables import budget_line
    from spikelm.generate import Engine

    budgets = spike_budgets(args)
    if len(budgets) > 1:
        raise ConfigError(f"--spike-budget {args.spike_budget} given; allowed here: one budget")
    checkpoint = load(args.model, backend=args.backend)
    spent = None
    if budgets:
        documents = read_documents(args.budget_data) if args.budget_data else None
        spent = Throttle(checkpoint, documents).spend(budgets[0])
        _log.info(budget_line(spent))
    return Engine(checkpoint), spent


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="longest answer in tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (%(default)s)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    parser.add_argument("--min-p", type=float, default=0.0, help="least relative probability")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (%(default)s)"
    )
    parser.add_argument("--seed", type=int, help="makes the answer repeatable")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends the answer; may be repeated"
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises: RequestError for a value out of range."""
    from spikelm.sampling import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def use_utf8() -> None:
    """Text in and out is UTF-8, also through pipes and whatever the locale says."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
