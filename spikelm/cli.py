"""The command line: `spikelm <command> ...`.

A command's module is imported when the command is asked for, so `spikelm --help` is instant and
an optional dependency is missed only by the command that needs it.

Exit status: 0 success, 1 the run failed, 2 bad input, 130 interrupted, 141 the reader of our
output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
import traceback

from spikelm import __version__
from spikelm.doctor import EXTRAS
from spikelm.errors import MissingExtraError, SpikelmError, did_you_mean

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("spikelm_train.cli:main", "train a model from a YAML recipe"),
    "export": ("spikelm_train.export:main", "the model of a run's checkpoint as a model folder"),
    "experiment": ("spikelm_train.experiments.cli:main", "run a study: variants, twins, seeds"),
    "recall": ("spikelm_train.recall.cli:main", "what small models of every mixer remember"),
    "data": ("spikelm_train.texts.cli:main", "text made ready to train on"),
    "import": ("spikelm.conversion.importing.cli:main", "read a checkpoint of another project"),
    "upcycle": (
        "spikelm.conversion.cli:main_upcycle",
        "turn a dense model into a mixture of experts",
    ),
    "average": ("spikelm.conversion.cli:main_average", "average the weights of several models"),
    "convert": ("spikelm.conversion.cli:main", "turn a trained model into a spike-coded one"),
    "generate": ("spikelm_serve.generate:main", "continue a prompt"),
    "chat": ("spikelm_serve.chat:main", "talk to a model in the terminal"),
    "serve": ("spikelm_serve.cli:main", "answer over the OpenAI API"),
    "serve-key": ("spikelm_serve.cli:main_key", "make an API key for the server"),
    "eval": ("spikelm.eval.cli:main_eval", "bits per byte, perplexity and silence"),
    "bench": ("spikelm.eval.cli:main_bench", "time, memory and state against length"),
    "inspect": ("spikelm.eval.cli:main_inspect", "where the spikes are, tensor by tensor"),
    "doctor": ("spikelm.doctor:main", "what this machine and installation can do"),
}


def build_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:12}{about}" for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="spikelm",
        usage="spikelm [--debug] COMMAND ...",
        description="Train, convert and serve spiking language models.",
        epilog=f"commands:\n{commands}\n\n`spikelm COMMAND --help` explains one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spikelm {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="log everything, and show where an error came from"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status; `--debug` may stand anywhere."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    options = next((i for i, a in enumerate(arguments) if not a.startswith("-")), len(arguments))
    parser = build_parser()
    parser.parse_args(arguments[:options])
    if options == len(arguments):
        parser.print_help(sys.stderr)
        return 2
    _configure_logging(debug)
    # Idle OpenMP threads spin for milliseconds by default: on a busy machine training then falls to
    # a fraction of its speed. A thousand turns cost nothing on a quiet one (docs/experiments.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return run(arguments[options], arguments[options + 1 :])
    except (SpikelmError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            return _reader_went_away()
        if debug:
            traceback.print_exc()
        print(f"spikelm: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpikelmError) else 1
    except KeyboardInterrupt:
        print("spikelm: interrupted", file=sys.stderr)
        return 130


def run(command: str, arguments: list[str]) -> int:
    """Imports a command's module and calls it.

    Raises: SpikelmError for an unknown command; MissingExtraError when an optional dependency of
    the command is not installed; whatever the command raises.
    """
    if command not in COMMANDS:
        raise SpikelmError(f"unknown command '{command}'; {did_you_mean(command, COMMANDS)}")
    module, _, function = COMMANDS[command][0].partition(":")
    try:
        status: int = getattr(importlib.import_module(module), function)(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtraError(package, EXTRAS[package]) from error
    sys.stdout.flush()
    return status


def reference() -> str:
    """docs/cli.md: the help of every command, as `make docs` writes it."""
    pages = [
        f"# Command line\n\nWritten by `make docs`.\n\n```\n{build_parser().format_help()}```\n"
    ]
    for command in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            run(command, ["--help"])
        pages.append(f"## spikelm {command}\n\n```\n{text.getvalue()}```\n")
    return "\n".join(pages)


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    for name in ("spikelm", "spikelm_train", "spikelm_serve"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)


def _reader_went_away() -> int:
    # `spikelm ... | head`: without this the interpreter's last flush complains.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
