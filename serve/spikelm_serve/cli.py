"""`spikelm serve MODEL`: one model over the OpenAI API."""

from __future__ import annotations

import argparse
import ipaddress
import json
import signal
import socket
from types import FrameType

from spikelm.errors import ConfigError
from spikelm_serve.arguments import add_running, load_engine

GRACE_SECONDS = 5


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
        "--max-body-bytes",
        type=int,
        default=2_000_000,
        help="largest request body (%(default)s)",
    )
    add_running(parser)
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    # Before the model is loaded: a port in use is known at once.
    listener = listen(args.host, args.port)
    import uvicorn

    from spikelm.eval.inspect import describe_state
    from spikelm.template import ChatTemplate
    from spikelm_serve.app import create_app

    engine, _ = load_engine(args)
    checkpoint = engine.checkpoint
    name = args.model_name or checkpoint.name
    app = create_app(
        engine,
        name,
        template=ChatTemplate.load(checkpoint.path, checkpoint.tokenizer),
        max_body_bytes=args.max_body_bytes,
        hosts=allowed_hosts(args.host),
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
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
    )
    # uvicorn ends by sending itself the signal again; both are a normal end here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Streams end at once and say so, instead of being cut when the grace is over.
            app.state.stop()
            super().handle_exit(sig, frame)

    Server(config).run(sockets=[listener])
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
