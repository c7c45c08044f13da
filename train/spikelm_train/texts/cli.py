"""`spikelm data`: text made ready to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

from spikelm_train.texts.enwik8 import split_enwik8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikelm data", description="Text to train on.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{enwik8}")
    about = "cut enwik8 into its published splits: 90, 5 and 5 million bytes"
    enwik8 = commands.add_parser("enwik8", help=about, description=about.capitalize() + ".")
    enwik8.add_argument("source", metavar="FILE", type=Path, help="enwik8, or enwik8.zip")
    enwik8.add_argument(
        "out", metavar="OUT", type=Path, help="folder for train.txt, validation.txt and test.txt"
    )
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    for split, size in split_enwik8(args.source, args.out).items():
        print(f"{args.out / split}.txt: {size:,} bytes")
    return 0
