"""`spikelm import SOURCE OUT`."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from spikelm.errors import CheckpointError, ConfigError
from spikelm.folders import check_out


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm import",
        description="Read a checkpoint of another project into a model folder: SpikeGPT, RWKV-4 "
        "and RWKV-7 (.pth), SpikingBrain-7B (with or without W8ASpike) and transformers' llama, "
        "qwen2 and qwen3 (safetensors folders).",
    )
    parser.add_argument("source", metavar="SOURCE", help="a .pth file or a folder")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument(
        "--kind",
        metavar="KIND",
        help="spikegpt, rwkv4, rwkv7, spikingbrain, llama, qwen2 or qwen3 (default: recognised; "
        "spikegpt and rwkv4 have the same tensors and must be told apart)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, rwkv_vocab_*.txt or a JSON of characters, or 'bytes' "
        "(default: the source folder's own)",
    )
    parser.add_argument("--eos", metavar="TOKEN", help="the token that separates documents")
    parser.add_argument(
        "--raw-embedding",
        action="store_true",
        help="spikegpt: feed the embedding's numbers, as the released 216M decodes, "
        "not its signs as in training",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "source"),
        default="float32",
        help="how weights are stored; 'source' keeps a bfloat16 file at its size "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    source, out = Path(arguments.source), Path(arguments.out)
    check_out(out)
    if not source.exists():
        raise CheckpointError(f"no such file or folder: {source}")

    from spikelm import checkpoint
    from spikelm.conversion.importing.build import build
    from spikelm.conversion.importing.sources import open_source
    from spikelm.tokenizer import Tokenizer

    opened = open_source(source, arguments.kind, binary_embedding=not arguments.raw_embedding)
    if arguments.raw_embedding and opened.kind != "spikegpt":
        raise ConfigError(f"--raw-embedding is for spikegpt; {source} is {opened.kind}")
    if arguments.tokenizer == "bytes":
        if arguments.eos is not None:
            raise ConfigError("--eos is for tokenizer files; bytes have their own")
        tokenizer = Tokenizer.bytes()
    elif arguments.tokenizer is None and source.is_file():
        raise ConfigError(
            f"{source} has no tokenizer; give its file with --tokenizer, or --tokenizer bytes"
        )
    else:
        tokenizer = Tokenizer.from_file(Path(arguments.tokenizer or source), eos=arguments.eos)
    if not tokenizer.fits(opened.config.vocab_size):
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding "
            f"{opened.config.vocab_size} rows; give the model's own with --tokenizer"
        )
    model, report = build(opened, keep_dtype=arguments.dtype == "source")
    checkpoint.save(out, model, tokenizer)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    print(f"{report.kind}: {report.parameters:,} parameters from {report.read} tensors")
    if report.ignored:
        print(f"ignored {len(report.ignored)}: {', '.join(report.ignored)}")
    if report.codes:
        share = report.clamped / report.codes
        print(f"clamped {report.clamped:,} of {report.codes:,} int8 codes ({share:.2%})")
    print(f"model in {out}; try: spikelm generate {shlex.quote(str(out))} --prompt Once")
    return 0
