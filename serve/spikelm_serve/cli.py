"""`spikelm serve MODEL`: one model over the OpenAI API."""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

from spikelm.errors import ConfigError
from spikelm_serve.arguments import add_running, load_engine
from spikelm_serve.keys import Keys, make

MAX_HEADER_BYTES = 32 * 1024

GRACE_SECONDS = 5
"""For connections to close once their requests have ended."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm serve", description="Answer over the OpenAI API until Ctrl-C or SIGTERM."
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, float or spike-coded")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (%(default)s)"
    )
    parser.add_argument("--model-name", help="name that requests use (default: the folder's)")
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="lines NAME sha256:HEX, as `spikelm serve-key NAME` prints them; every route but "
        "/health, /ready and / then needs one of these keys",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="on loopback: a name that requests may be for, such as the one that a proxy in front "
        "has; may be repeated",
    )
    parser.add_argument(
        "--no-keys",
        action="store_true",
        help="let anybody in who reaches an address that is not this machine's own",
    )
    parser.add_argument(
        "--slots", type=_count, default=32, metavar="N", help="sequences at a time (%(default)s)"
    )
    parser.add_argument(
        "--max-waiting",
        type=_count,
        default=256,
        metavar="N",
        help="requests that may wait for a slot (%(default)s)",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="folder of conversation states, or a bucket (s3://NAME/PREFIX, gs://, az://), which "
        "servers of the model may share (memory alone)",
    )
    parser.add_argument(
        "--state-memory",
        type=_size,
        default="1GiB",
        metavar="BYTES",
        help="memory for states, such as 500MiB (%(default)s)",
    )
    parser.add_argument(
        "--state-disk",
        type=_size,
        default="10GiB",
        metavar="BYTES",
        help="room for states in --state-dir (%(default)s)",
    )
    parser.add_argument(
        "--allow-upload", action="store_true", help="take states from clients (POST /v1/states)"
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM or Ctrl-C (%(default)s)",
    )
    parser.add_argument(
        "--max-body-bytes",
        type=_size,
        default="2000000",
        metavar="BYTES",
        help="largest request body (%(default)s)",
    )
    add_running(parser)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _size(text: str) -> int:
    """Bytes, in the notation of --spike-budget."""
    match = re.fullmatch(r"(\d+) *([KMG]iB|B|)", text.strip())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: bytes, such as 500MiB or 2GiB")
    return int(match[1]) << {"KiB": 10, "MiB": 20, "GiB": 30}.get(match[2], 0)


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    keys = None if args.api_keys is None else Keys.read(args.api_keys)
    hosts = allowed_hosts(args.host)
    if hosts is not None:
        hosts |= set(args.allow_host)
    if hosts is None and keys is None and not args.no_keys:
        raise ConfigError(
            f"--host {args.host} can be reached from other machines: give --api-keys FILE (spikelm "
            "serve-key NAME makes one), or --no-keys to let anybody in"
        )
    # Before the model is loaded: a port in use is known at once.
    listener = listen(args.host, args.port)
    import uvicorn

    from spikelm.eval.inspect import describe_state
    from spikelm.template import ChatTemplate
    from spikelm_serve.app import create_app
    from spikelm_serve.shelf import open_shelf
    from spikelm_serve.states import StateStore

    engine, _ = load_engine(args)
    checkpoint = engine.checkpoint
    name = args.model_name or checkpoint.name
    store = StateStore(
        checkpoint.fingerprint,
        checkpoint.model.initial_state(1),
        checkpoint.tokenizer.vocab_size,
        memory_bytes=args.state_memory,
        shelf=None if args.state_dir is None else open_shelf(args.state_dir, args.state_disk),
    )
    template = ChatTemplate.load(checkpoint.path, checkpoint.tokenizer)
    changed = template.rewrites()
    if changed:
        print(
            f"the chat template of {name} rewrites the past, so conversations are read again "
            f"instead of gone on with: {changed}",
            file=sys.stderr,
        )
    app = create_app(
        engine,
        name,
        template=template,
        store=store,
        keys=keys,
        hosts=hosts,
        slots=args.slots,
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_bytes,
        allow_upload=args.allow_upload,
    )
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    state = describe_state(checkpoint.model)
    memory = f"{state['bytes']:,} bytes of state per conversation"
    if state["bytes_per_token"]:
        memory += f" and {state['bytes_per_token']:,} more per token"
    print(f"serving {name} at {url}, {memory}", flush=True)
    print(f"try: {example(url, name)}", flush=True)
    config = uvicorn.Config(
        app,
        # Below that it writes a line for every request that is no HTTP.
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http="h11",
    )
    # uvicorn ends by sending itself the signal again; both are a normal end here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    class Server(uvicorn.Server):
        draining = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Refuses new requests, lets those that run end, then goes; at once the second time."""
            if self.draining or not args.shutdown_timeout:
                app.state.stop()
                super().handle_exit(sig, frame)
                return
            self.draining = True

            def leave() -> None:
                app.state.drain(args.shutdown_timeout)
                self.should_exit = True

            threading.Thread(target=leave, name="spikelm-drain").start()

    Server(config).run(sockets=[listener])
    return 0


def main_key(argv: list[str]) -> int:
    """`spikelm serve-key NAME`: a new API key."""
    parser = argparse.ArgumentParser(
        prog="spikelm serve-key",
        description="Make an API key: it is printed once, its hash goes into a file for `spikelm "
        "serve --api-keys`.",
    )
    parser.add_argument("name", metavar="NAME", help="whose key it is; states belong to a name")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="append its line here (default: print it)"
    )
    args = parser.parse_args(argv)
    key, line = make(args.name)
    if args.keys is not None:
        if args.keys.exists() and any(
            known.split()[:1] == [args.name]
            for known in args.keys.read_text(encoding="utf-8").splitlines()
        ):
            raise ConfigError(f"{args.keys} has a key of {args.name} already; take another name")
        with args.keys.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        args.keys.chmod(0o600)
    else:
        print(f"line for --api-keys: {line}")
    print(f"key, shown this once: {key}")
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ConfigError if the address cannot be used."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port: {port} given; allowed: 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from None


def allowed_hosts(host: str) -> set[str] | None:
    """The Host headers to accept: on loopback its names, elsewhere any (None)."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return {host, "localhost", "127.0.0.1", "::1"} if is_loopback else None


def example(url: str, name: str) -> str:
    """A command that asks the server something."""
    messages = [{"role": "user", "content": "What does this module do?"}]
    body = json.dumps({"model": name, "messages": messages})
    quoted = body.replace("'", "'\\''")
    return f"curl {url}/chat/completions -H 'Content-Type: application/json' -d '{quoted}'"
