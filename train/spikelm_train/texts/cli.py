"""`spikelm data`: text made ready to train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spikelm.errors import ConfigError
from spikelm_train.config import DataConfig, TokenizerConfig
from spikelm_train.texts.enwik8 import split_enwik8

SOURCES = (
    "files, globs (.txt .md .jsonl .parquet, packed or not) or Hugging Face dataset names; none is "
    "the built-in corpus"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikelm data", description="Text to train on.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{prepare,verify,tokenizer,enwik8}"
    )
    about = "tokenise text into shards that `data.prepared` of a recipe names"
    prepare = commands.add_parser("prepare", help=about, description=about.capitalize() + ".")
    _add_text(prepare, "folder of the shards; it is new or empty")
    prepare.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="KIND",
        help="bpe, learned from the text (the default), bytes, or a model folder, tokenizer.json, "
        "rwkv_vocab_*.txt or what `spikelm data tokenizer` wrote",
    )
    prepare.add_argument("--eos", help="the token of that file which separates documents")
    prepare.add_argument(
        "--workers", type=_count, metavar="N", help="processes that encode (as many as cores)"
    )
    prepare.add_argument(
        "--shard-tokens", type=_count, default=1 << 28, metavar="N", help="(%(default)s)"
    )
    about = "compare the files of a prepared folder with their hashes"
    verify = commands.add_parser("verify", help=about, description=about.capitalize() + ".")
    verify.add_argument("folder", metavar="DIR", type=Path)
    about = "learn a byte-level BPE vocabulary from text"
    tokenizer = commands.add_parser("tokenizer", help=about, description=about.capitalize() + ".")
    _add_text(tokenizer, "folder of the tokenizer; it is new or empty")
    about = "cut enwik8 into its published splits: 90, 5 and 5 million bytes"
    enwik8 = commands.add_parser("enwik8", help=about, description=about.capitalize() + ".")
    enwik8.add_argument("source", metavar="FILE", type=Path, help="enwik8, or enwik8.zip")
    enwik8.add_argument(
        "out", metavar="OUT", type=Path, help="folder for train.txt, validation.txt and test.txt"
    )
    return parser


def _add_text(parser: argparse.ArgumentParser, out: str) -> None:
    data, tokens = DataConfig(), TokenizerConfig()
    parser.add_argument("sources", nargs="*", metavar="SRC", help=SOURCES)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=out)
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help=f"entries of bpe ({tokens.vocab_size})"
    )
    parser.add_argument(
        "--train-bytes",
        type=int,
        metavar="N",
        help="about how much text bpe learns from, spread over it (all)",
    )
    parser.add_argument(
        "--text-key", default=data.text_key, metavar="KEY", help="text of a table (%(default)s)"
    )
    parser.add_argument(
        "--messages-key",
        metavar="KEY",
        help="conversations of a table, lists of role and content, instead of texts: their answers "
        "alone are learned",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="jinja template of conversations (the tokenizer's, else User: and Assistant: lines)",
    )
    parser.add_argument("--max-documents", type=int, metavar="N", help="read no more documents")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="read no more text")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation-fraction",
        type=float,
        default=data.validation_fraction,
        metavar="F",
        help="part of the text held out (%(default)s)",
    )
    held_out.add_argument(
        "--validation", nargs="+", default=[], metavar="SRC", help="held-out text of its own"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default=data.on_error,
        help="at unreadable files and rows stop, or count and leave them out (%(default)s)",
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.command == "enwik8":
        for split, size in split_enwik8(args.source, args.out).items():
            print(f"{args.out / split}.txt: {size:,} bytes")
    elif args.command == "verify":
        from spikelm_train.texts.shards import verify

        for name, size in verify(args.folder):
            print(f"{args.folder / name}: {size:,} bytes, unchanged")
    else:
        _make(args)
    return 0


def _make(args: argparse.Namespace) -> None:
    from spikelm.folders import check_out
    from spikelm_train.texts.prepare import Text, make_tokenizer, save_tokenizer, write_text
    from spikelm_train.texts.shards import SIDES

    check_out(args.out)
    text, config = Text(_data(args)), _tokenizer(args)
    tokenizer = make_tokenizer(config, [text])
    if args.command == "tokenizer":
        save_tokenizer(tokenizer, args.out)
        print(f"{args.out}: {tokenizer.vocab_size:,} entries")
        return
    meta = write_text(
        text, config, tokenizer, args.out, workers=args.workers, shard_tokens=args.shard_tokens
    )
    for side in SIDES:
        about = meta[side]
        print(
            f"{side}: {about['tokens']:,} tokens of {about['documents']:,} documents, "
            f"{about['bytes']:,} bytes, in {len(about['shards'])} shard(s)"
        )
    print(f"train on it with: --set data.prepared={args.out}")


def _data(args: argparse.Namespace) -> DataConfig:
    return DataConfig(
        sources=tuple(args.sources),
        text_key=args.text_key,
        messages_key=args.messages_key,
        max_documents=args.max_documents,
        max_bytes=args.max_bytes,
        validation_fraction=args.validation_fraction,
        validation_sources=tuple(args.validation),
        on_error=args.on_error,
    )


def _tokenizer(args: argparse.Namespace) -> TokenizerConfig:
    kind: Any = getattr(args, "tokenizer", "bpe")
    template = args.chat_template
    given: dict[str, Any] = {"train_bytes": args.train_bytes, "chat_template": template}
    if args.vocab_size is not None:
        given["vocab_size"] = args.vocab_size
    if kind in ("bpe", "bytes"):
        return TokenizerConfig(kind=kind, eos=getattr(args, "eos", None), **given)
    if args.vocab_size is not None:
        raise ConfigError(f"--vocab-size is for bpe; {kind} has its own entries")
    from spikelm.tokenizer import Tokenizer

    size = Tokenizer.from_file(Path(kind), eos=args.eos).vocab_size
    return TokenizerConfig(
        kind="file", path=kind, eos=args.eos, vocab_size=size, chat_template=template
    )
