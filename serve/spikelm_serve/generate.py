"""`spikelm generate MODEL --prompt TEXT`: continues a text."""

from __future__ import annotations

import argparse
import json
import sys

from spikelm_serve.arguments import (
    add_running,
    add_sampling,
    load_engine,
    sampling_params,
    use_utf8,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm generate",
        description="Continue a prompt: the text goes to stdout, speed and silence to stderr.",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, float or spike-coded")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads stdin")
    add_sampling(parser)
    add_running(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from spikelm.generate import Generation, prompt_ids
    from spikelm_serve.answer import Meter, stats

    params = sampling_params(args)
    use_utf8()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    engine, spent = load_engine(args)
    ids = prompt_ids(engine.tokenizer, prompt)
    meter = Meter(prompt_tokens=len(ids))
    pieces: list[str] = []
    tokens: list[int] = []
    reason = None
    for chunk in meter.measure(Generation(engine, ids, params, args.stop)):
        pieces.append(chunk.text)
        tokens += chunk.token_ids
        reason = chunk.finish_reason
        if not args.json:
            print(chunk.text, end="", flush=True)
    if args.json:
        report = {
            "model": args.model,
            "prompt": prompt,
            "text": "".join(pieces),
            "token_ids": tokens,
            "finish_reason": reason,
            "prompt_tokens": meter.prompt_tokens,
            "completion_tokens": meter.completion_tokens,
            "tokens_per_second": meter.tokens_per_second,
            "silent_fraction": engine.silent_fraction,
            "state_bytes": meter.state_bytes,
            "spike_budget": spent,
        }
        print(json.dumps(report))
    else:
        print(flush=True)
        print(stats(meter, engine), file=sys.stderr)
    return 0
