"""`spikelm experiment`: run a named study, or show what it has found so far."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from spikelm.config import configs
from spikelm.errors import ConfigError
from spikelm_train.experiments.study import load_study, plan


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm experiment",
        description="Run a study: train every variant with every seed, convert and measure it on "
        "validation text, time all decoders in turns, and compare with the twins. The same command "
        "again continues; what is finished is not run again. Several at once share the work.",
        epilog="Text: a study names its files, often under an environment variable such as "
        "SPIKELM_DATA.",
    )
    parser.add_argument(
        "study", nargs="?", help="a YAML file, or the name of one in configs/experiments/"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the study (runs/experiments/STUDY)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="VARIANT",
        help="run this one, with all points of its sweep; may be repeated",
    )
    parser.add_argument("--seeds", metavar="S,...", help="run these seeds (the study's)")
    show = parser.add_mutually_exclusive_group()
    show.add_argument(
        "--list", action="store_true", help="show the studies, or the runs of STUDY; run nothing"
    )
    show.add_argument("--table", action="store_true", help="show what is finished; run nothing")
    show.add_argument(
        "--test",
        action="store_true",
        help="measure what is finished on the test text, once; that it was read is recorded",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.study is None:
        if not args.list:
            raise ConfigError("no study given; --list shows those in configs/experiments/")
        studies = {name: load_study(name)[1].about for name in configs("experiments")}
        lines = [f"{name:20}{' '.join(about.split())}" for name, about in studies.items()]
        print(json.dumps(studies, indent=2) if args.json else "\n".join(lines))
        return 0
    seeds = _seeds(args.seeds)
    name, study = load_study(args.study)
    data = study.data.resolve()
    chosen = plan(study, data, only=args.only, seeds=seeds)
    counted = plan(study, data, seeds=sorted({*study.seeds, *seeds}))
    out = args.out or Path("runs") / "experiments" / name

    from spikelm.eval.length import require_matplotlib
    from spikelm_train.experiments.report import summarise, table, write_report
    from spikelm_train.experiments.runner import Interrupted, Runner

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    runner = Runner(name, study, data, counted, out.absolute(), say)
    if args.list:
        listed = [{**runner.describe(run), "state": runner.state(run)} for run in chosen]
        lines = [
            f"{run['run']:50}{run['parameters'] / 1e6:6.2f} M  {run['tokens'] / 1e6:8.2f} M tokens"
            f"  {run['state']}"
            for run in listed
        ]
        print(json.dumps(listed, indent=2) if args.json else "\n".join(lines))
        return 0
    # Missed now rather than after hours.
    require_matplotlib()
    failed = 0
    try:
        if args.test:
            runner.test(chosen)
        elif not args.table:
            failed = runner.execute(chosen)
            runner.time_decoding()
    except Interrupted as interruption:
        say("interrupted; run the same command again to continue")
        return 128 + interruption.signum
    summary = summarise(runner)
    if summary["finished"]:
        write_report(summary, out)
    print(json.dumps(summary, indent=2) if args.json else table(summary))
    if not args.json:
        print(f"in {os.path.relpath(out)}: table.md, summary.json, plots, results/")
    return 1 if failed else 0


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--seeds takes numbers like 0,1,2, got '{text}'") from None
