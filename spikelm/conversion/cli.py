"""`spikelm convert RUN OUT`, `spikelm upcycle MODEL OUT` and `spikelm average MODEL ... OUT`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from spikelm.config import ExpertsConfig
from spikelm.corpus import builtin_documents, read_documents
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.folders import check_out

if TYPE_CHECKING:
    from torch import Tensor

    from spikelm.tokenizer import Tokenizer

WINDOW_TOKENS = 512


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm convert",
        description="Turn a trained model folder into a spike-coded one: integer weights that only "
        "the spikes' rows are read of, trained or calibrated thresholds, and a manifest.",
    )
    parser.add_argument("source", metavar="RUN", help="folder of the trained (float) model")
    parser.add_argument("out", metavar="OUT", help="folder to write; replaced if it is a model")
    parser.add_argument(
        "--data", nargs="+", metavar="SRC", help="calibration text (default: built-in corpus)"
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="tokens to calibrate and measure on (default: %(default)s)",
    )
    parser.add_argument(
        "--silence",
        action="append",
        default=[],
        metavar="CLASS=FRACTION",
        help="dead zones for projections trained without a neuron, e.g. mixer_input=0.4",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="outputs that share one scale (default: as trained, else 1)",
    )
    parser.add_argument(
        "--bits",
        action="append",
        default=[],
        metavar="[CLASS=]BITS",
        help="bits per weight, 8 or 4 (default: as trained, else 8); of a tensor class, or of one "
        "projection by the name of its neurons, with CLASS=, e.g. --bits 4 --bits head=8",
    )
    parser.add_argument(
        "--rounding",
        choices=("nearest", "compensated"),
        help="round to nearest, or make up for each error in the weights still to be rounded, on "
        "the calibration text (default: compensated for 4 bits, nearest for 8; weights that were "
        "rounded in training stay as they are)",
    )
    parser.add_argument(
        "--by-output-weights",
        type=int,
        metavar="N",
        help="lay projections in front of a ReLU out to be read by output, where that is less to "
        "read, from so many weights on; smaller ones are faster as they are (default: 1048576)",
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    source, out = Path(arguments.source), Path(arguments.out)
    silence = dict(_silence(text) for text in arguments.silence)
    bits = dict(_bits(text) for text in arguments.bits)
    if out.resolve() == source.resolve():
        raise ConfigError(f"OUT is RUN itself ({out}); give another folder")
    check_out(out, replace="spikes.json")
    least = arguments.by_output_weights
    if least is not None and least < 0:
        raise ConfigError(f"--by-output-weights {least} given; allowed: 0 or more")
    if arguments.calibration_tokens < WINDOW_TOKENS:
        raise ConfigError(
            f"--calibration-tokens {arguments.calibration_tokens} given; "
            f"allowed: {WINDOW_TOKENS} or more"
        )

    from spikelm.conversion.convert import convert
    from spikelm.tokenizer import Tokenizer

    if not source.is_dir():
        raise CheckpointError(f"no model folder at {source}; give the --out of `spikelm train`")
    tokenizer = Tokenizer.load(source)
    # Thresholds are fitted to training text, never to what is evaluated.
    documents = read_documents(arguments.data) if arguments.data else builtin_documents("train")
    windows = calibration_windows(tokenizer, documents, arguments.calibration_tokens)
    manifest = convert(
        source,
        out,
        windows,
        silence=silence,
        group_size=arguments.group_size,
        bits=bits.pop("", None),
        bits_of=bits,
        rounding=arguments.rounding,
        by_output_weights=least,
    )
    _report(manifest, out)
    return 0


def calibration_windows(tokenizer: Tokenizer, documents: Iterable[str], tokens: int) -> Tensor:
    """The first `tokens` of `documents`, at most, as windows [B, T].

    Raises: DataError for a text shorter than a window.
    """
    import torch

    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_id, *tokenizer.encode(document)]
        if len(ids) >= tokens:
            break
    if len(ids) < WINDOW_TOKENS:
        raise DataError(
            f"the calibration text has {len(ids)} tokens; at least {WINDOW_TOKENS} are needed"
        )
    rows = min(len(ids), tokens) // WINDOW_TOKENS
    return torch.tensor(ids[: rows * WINDOW_TOKENS]).view(rows, WINDOW_TOKENS)


def build_upcycle_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm upcycle",
        description="Turn the gated feed-forward layers of a float model into mixtures of experts, "
        "to be trained on.",
    )
    parser.add_argument("source", metavar="MODEL", help="float model folder")
    parser.add_argument("out", metavar="OUT", help="folder for the mixture")
    parser.add_argument("--experts", type=int, default=16, metavar="N", help="routed experts (16)")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="used per token (1)")
    parser.add_argument("--shared", type=int, default=1, metavar="S", help="shared experts (1)")
    parser.add_argument(
        "--dense-layers",
        type=int,
        nargs="*",
        default=[],
        metavar="LAYER",
        help="layers, from 0, that stay dense",
    )
    return parser


def main_upcycle(argv: list[str]) -> int:
    args = build_upcycle_parser().parse_args(argv)
    experts = ExpertsConfig(
        num_experts=args.experts,
        top_k=args.top_k,
        num_shared=args.shared,
        dense_layers=tuple(args.dense_layers),
    )
    out = Path(args.out)
    check_out(out)

    from spikelm import checkpoint
    from spikelm.conversion.upcycle import expert_scale, upcycle

    loaded = checkpoint.load(args.source)
    if loaded.manifest is not None:
        raise ConfigError(f"{args.source} is spike-coded; give the float folder it came from")
    mixture = upcycle(loaded.model, experts)
    checkpoint.save(out, mixture, loaded.tokenizer)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (loaded.model, mixture))
    print(
        f"{out}: {before:,} -> {after:,} parameters, experts scaled by {expert_scale(experts):.4f}"
    )
    return 0


def build_average_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm average",
        description="Average the weights of float models of one shape, such as the last ones of a "
        "run.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="float model folders")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for the average")
    return parser


def main_average(argv: list[str]) -> int:
    args = build_average_parser().parse_args(argv)
    out = Path(args.out)
    check_out(out)

    from spikelm import checkpoint
    from spikelm.conversion.average import average

    mean = average([Path(model) for model in args.models])
    checkpoint.save(out, mean.model, mean.tokenizer)
    print(f"{out}: the mean of {len(args.models)} models")
    return 0


def _report(manifest: dict[str, object], out: Path) -> None:
    fractions = manifest["silent_fraction"]
    assert isinstance(fractions, dict)
    classes = "  ".join(f"{n} {x:.0%}" for n, x in fractions.items() if n != "total")
    print(f"silent {fractions['total']:.1%} of all projection inputs ({classes})")
    print(f"spike-coded model in {out}; try: spikelm inspect {shlex.quote(str(out))}")


def _silence(text: str) -> tuple[str, float]:
    name, _, fraction = text.partition("=")
    try:
        return name, float(fraction)
    except ValueError:
        raise ConfigError(f"--silence takes CLASS=FRACTION, got '{text}'") from None


def _bits(text: str) -> tuple[str, int]:
    """("ffn_hidden", 4) of "ffn_hidden=4"; ("", 4) of "4"."""
    name, equals, number = text.rpartition("=")
    try:
        if name or not equals:
            return name, int(number)
        raise ValueError
    except ValueError:
        raise ConfigError(f"--bits takes BITS or CLASS=BITS, got '{text}'") from None
