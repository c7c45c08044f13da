"""`spikelm chat MODEL`: a conversation in the terminal, with a model here or on a server."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from spikelm_serve.arguments import (
    add_running,
    add_sampling,
    load_engine,
    sampling_params,
    use_utf8,
)

if TYPE_CHECKING:
    from spikelm_serve.conversation import Conversation
    from spikelm_serve.remote import RemoteConversation

HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm chat",
        description="Talk to a model; lines piped to stdin are answered one by one.",
        epilog=HELP,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="model folder, float or spike-coded, or the URL of a server (its key, if it wants "
        "one, is in the environment: SPIKELM_API_KEY)",
    )
    add_sampling(parser)
    add_running(parser)
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from spikelm.template import ChatTemplate
    from spikelm_serve.conversation import Conversation

    params = sampling_params(args)
    use_utf8()
    if args.model.startswith(("http://", "https://")):
        from spikelm_serve.remote import RemoteConversation

        remote = RemoteConversation(args.model, params, args.stop)
        print(f"{remote.name}: {HELP}")
        return talk(remote)
    engine, _ = load_engine(args)
    checkpoint = engine.checkpoint
    template = ChatTemplate.load(checkpoint.path, checkpoint.tokenizer)
    print(f"{checkpoint.name}: {HELP}")
    return talk(Conversation(engine, template, params, args.stop))


def talk(conversation: Conversation | RemoteConversation) -> int:
    """Answers the lines of stdin until it ends."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and keeps a history)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            conversation.reset()
            print("[forgotten]")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            _answer(conversation, line)


def _answer(conversation: Conversation | RemoteConversation, line: str) -> None:
    try:
        with contextlib.closing(conversation.ask(line)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(f"\n{conversation.summary()}", flush=True)
