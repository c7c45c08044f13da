"""`spikelm recall`: small models of every mixer learn to recall pairs."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spikelm.errors import ConfigError

T = TypeVar("T")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm recall",
        description="Multi-query associative recall (Zoology): models of two layers are trained "
        "from nothing to answer which value followed a key, and measured: accuracy against bytes "
        "of state. One run per combination of what is given with commas, one or two minutes "
        "each at the defaults.",
        epilog="Mixers: delta (channel decay, split gates: GDN-2), kda, gdn, deltanet, gla, rwkv7, "
        "wkv4, window, full; two different layers are joined by +. What a mixer does not have "
        "(spiking queries and keys anywhere but in delta layers, key channels in wkv4, window and "
        "full) is not varied for it.",
    )
    parser.add_argument("--mixer", default="delta", metavar="NAMES", help="(%(default)s)")
    parser.add_argument(
        "--spiking",
        default="1",
        metavar="SHARES",
        help="share of the channels of queries and keys that fire; 1 is dense (%(default)s)",
    )
    parser.add_argument(
        "--key-dim", default="64", metavar="NUMBERS", help="key channels per head (%(default)s)"
    )
    parser.add_argument(
        "--value-dim", metavar="NUMBERS", help="value channels per head (as many as key channels)"
    )
    parser.add_argument("--seeds", default="0", metavar="NUMBERS", help="(%(default)s)")
    parser.add_argument(
        "--lr", default="0.01", metavar="RATES", help="peak learning rates (%(default)s)"
    )
    parser.add_argument(
        "--bypass",
        default="0.65",
        metavar="SHARES",
        help="share of the run in which queries and keys can pass by their neurons, less and less "
        "(%(default)s)",
    )
    parser.add_argument(
        "--sizes",
        default="64:8,64:16,128:16,128:32",
        metavar="T:N,...",
        help="tokens and pairs to measure; training begins with the shortest (%(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the pairs that give a key its second value, up to 0.5 (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (%(default)s)")
    parser.add_argument("--vocab", type=int, default=256, help="tokens (%(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of the model (%(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="keep every finished run there as JSON; the same command again does the others",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from spikelm_train.recall.study import study
    from spikelm_train.recall.tables import recall_table

    report = {"runs": study(grid(args), args.out)}
    print(json.dumps(report, indent=2) if args.json else recall_table(report))
    return 0


def grid(args: argparse.Namespace) -> list[Any]:
    """The runs that the options ask for. Raises: ConfigError."""
    from spikelm_train.recall.study import Run
    from spikelm_train.recall.task import Size

    axes: dict[str, Sequence[Any]] = {
        "mixer": several("--mixer", args.mixer, str),
        "key_dim": several("--key-dim", args.key_dim, int),
        "value_dim": several("--value-dim", args.value_dim, int) if args.value_dim else [None],
        "spiking": several("--spiking", args.spiking, float),
        "bypass": several("--bypass", args.bypass, float),
        "lr": several("--lr", args.lr, float),
        "seed": several("--seeds", args.seeds, int),
    }
    runs = []
    for values in itertools.product(*axes.values()):
        varied = dict(zip(axes, values, strict=True))
        if varied["value_dim"] is None:
            varied["value_dim"] = varied["key_dim"]
        run = Run(
            **varied,
            steps=args.steps,
            batch_size=args.batch,
            sizes=tuple(several("--sizes", args.sizes, Size.parse)),
            overwritten=args.overwrite,
            vocab_size=args.vocab,
            width=args.width,
        )
        runs.append(run.reduced())
    return list(dict.fromkeys(runs))


def several(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """Values between commas. Raises: ConfigError."""
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} takes numbers between commas, got '{text}'") from None
