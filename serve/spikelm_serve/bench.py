"""`spikelm bench serve`: what a started server does under load. No torch at import.

load    tokens/s, time to the first token and between tokens at several numbers of streams, also of
        other servers with a model of as many parameters
turns   time to the first token of late turns of a chat beside early ones of another; the same after
        a restart
fork    time of a fork, and of the first token behind it
endless a conversation of very many tokens: memory, speed and first token along it

The server is a process of its own, the clients another: plain sockets, so that they cost little. Of
each number of streams as many requests are sent as the largest has; all rounds take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spikelm.errors import ConfigError, SpikelmError
from spikelm.eval.process import memory_bytes
from spikelm_serve.rivals import RIVALS, shape_like

PARTS = ("load", "turns", "fork", "endless")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, float or spike-coded")
    parser.add_argument(
        "--parts",
        default="load,turns,fork",
        metavar="PART,...",
        help=f"of {', '.join(PARTS)} (%(default)s)",
    )
    parser.add_argument(
        "--streams", default="1,4,16,64", metavar="N,...", help="at a time (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=200, help="of an answer (%(default)s)")
    parser.add_argument("--turns", type=int, default=200, help="of a chat (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of turns (%(default)s)")
    parser.add_argument(
        "--endless", type=int, default=1_000_000, metavar="N", help="tokens (%(default)s)"
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="NAME,...",
        help="other servers under the same load: llama.cpp, transformers",
    )


def run(args: argparse.Namespace) -> int:
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise ConfigError(f"--parts {args.parts} given; allowed: some of {', '.join(PARTS)}")
    against = [name for name in args.against.split(",") if name]
    if not set(against) <= set(RIVALS):
        raise ConfigError(f"--against {args.against} given; allowed: some of {', '.join(RIVALS)}")
    streams = [int(number) for number in args.streams.split(",")]
    report: dict[str, Any] = {"model": args.model, "tokens": args.tokens, "rounds": args.rounds}
    if "load" in parts:
        with contextlib.ExitStack() as stack:
            own = stack.enter_context(serving(args.model, "--slots", str(max(streams))))
            servers = {"spikelm": own.port}
            if against:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                shape = shape_like(Path(args.model))
                for name in against:
                    begun = RIVALS[name](shape, Path(args.model), folder)
                    servers[name] = stack.enter_context(begun)
            report["load"] = load(servers, streams, args.tokens, args.rounds)
    if "turns" in parts:
        report["turns"] = turns(args.model, args.turns)
    if "fork" in parts:
        with serving(args.model) as server:
            report["fork"] = forks(server.port)
    if "endless" in parts:
        report["endless"] = endless(args.model, args.endless)
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0


class Server(NamedTuple):
    """A started server."""

    port: int
    process: int


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    """A server of the model."""
    command = [sys.executable, "-m", "spikelm", "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line:
                raise SpikelmError("the server did not start; its message is above")
            port = int(line.partition(" at http://127.0.0.1:")[2].partition("/")[0])
            yield Server(port, process.pid)
        finally:
            process.terminate()
            process.wait()


@dataclass
class Heard:
    """What a client noticed of an answer."""

    first: float = 0.0
    """Seconds until the first text."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between pieces of text."""
    last: dict[str, Any] = field(default_factory=dict)
    """The last chunk."""


async def ask(port: int, path: str, body: dict[str, Any], timeout: float = 600) -> Heard:
    """A streamed answer."""
    began, heard, at = time.perf_counter(), Heard(), None
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_post(path, {**body, "stream": True}))
        tail = b""
        while piece := await reader.read(1 << 16):
            now = time.perf_counter()
            tail = (tail + piece)[-1 << 16 :]
            if b"data: {" not in piece:
                continue
            if at is None:
                heard.first = now - began
            else:
                heard.gaps.append(now - at)
            at = now
        writer.close()
    lines = [line for line in tail.split(b"\n") if line.startswith(b"data: {")]
    if not lines or b'"error"' in lines[-1]:
        raise SpikelmError(f"the server answered: {tail[-300:].decode(errors='replace')}")
    heard.last = json.loads(lines[-1][6:])
    return heard


def load(
    servers: dict[str, int], streams: Sequence[int], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians over rounds of what clients notice, by server and number of streams. The servers, by
    name with their ports, take turns.
    """
    runs = [(name, number) for name in servers for number in streams]
    measured: dict[tuple[str, int], list[dict[str, float]]] = {each: [] for each in runs}
    for turn in range(rounds):
        for name, number in runs:
            stops = _stop_ids(servers[name]) if name == "spikelm" else [0]
            burst = _burst(servers[name], number, max(streams), tokens, turn, stops)
            measured[name, number].append(asyncio.run(burst))
    found: list[dict[str, Any]] = []
    for (name, number), all_rounds in measured.items():
        names = all_rounds[0].keys()
        row = {key: statistics.median(each[key] for each in all_rounds) for key in names}
        first = next((r for r in found if r["server"] == name), row)
        row["over_one_stream"] = row["tokens_per_second"] / first["tokens_per_second"]
        found.append({"server": name, "streams": number, **row})
    return found


async def _burst(
    port: int, number: int, total: int, tokens: int, turn: int, stops: Sequence[int]
) -> dict[str, float]:
    heard: list[Heard] = []
    waiting = iter(range(total))

    async def client() -> None:
        for request in waiting:
            body = {
                "prompt": f"Round {turn}, streams {number}, request {request}: the function",
                "max_tokens": tokens,
                "seed": request,
                # Nothing but the number of tokens ends it.
                "logit_bias": {str(stop): -100 for stop in stops},
            }
            heard.append(await ask(port, "/v1/completions", body))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(number)))
    seconds = time.perf_counter() - began
    first = [each.first for each in heard]
    gaps = [gap for each in heard for gap in each.gaps]
    return {
        "tokens_per_second": total * tokens / seconds,
        "requests_per_second": total / seconds,
        **{f"first_token_ms_p{q}": 1000 * _quantile(first, q) for q in (50, 95, 99)},
        **{f"between_ms_p{q}": 1000 * _quantile(gaps, q) for q in (50, 95, 99)},
    }


def _stop_ids(port: int) -> list[int]:
    text = {"prompt": "<|endoftext|>", "parse_special": True}
    ids: list[int] = asyncio.run(_call(port, "/tokenize", text))["tokens"]
    return ids if len(ids) == 1 else []


async def _call(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post(path, body))
    answer = await reader.read()
    writer.close()
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


def _post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class _Chat:
    """A conversation whose client sends the new message alone."""

    def __init__(self, turn: int = 0) -> None:
        self.turn = turn
        """No two chats say the same: it would be known already."""
        self.state: str | None = None
        self.last: dict[str, Any] = {}

    def say(self, port: int) -> float:
        """The next turn; seconds until its first text."""
        heard = asyncio.run(ask(port, "/v1/chat/completions", _message(self.turn, self.state)))
        self.last, self.state = heard.last, heard.last["state"]["id"]
        self.turn += 1
        return heard.first


def turns(model: str, number: int) -> dict[str, Any]:
    """First-token times of the last ten turns of a chat beside those of turns 2 to 11 of another,
    which takes turns with it; the same behind a restart.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--state-dir", str(Path(folder)))
        long = _Chat()
        with serving(model, *options) as server:
            for _ in range(number - 10):
                long.say(server.port)
            late, early = _beside(server.port, long)
            asyncio.run(_call(server.port, f"/v1/states/{long.state}/save", {}))
        with serving(model, *options) as server:
            # It reads its state from the disk.
            first = long.say(server.port)
            again, fresh = _beside(server.port, long)
    return {
        "turns": number,
        "tokens": long.last["state"]["tokens"],
        "early_ms": 1000 * early,
        "late_ms": 1000 * late,
        "restarted_ms": 1000 * again,
        "first_behind_restart_ms": 1000 * first,
        "late_over_early": late / early,
        "restarted_over_early": again / fresh,
        "state_bytes": long.last["state_bytes"],
    }


def _beside(port: int, long: _Chat) -> tuple[float, float]:
    """Medians of the next ten turns of a chat, and of turns 2 to 11 of a new one."""
    new = _Chat(1000 + long.turn)
    new.say(port)
    times = [(long.say(port), new.say(port)) for _ in range(10)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def _message(turn: int, state: str | None) -> dict[str, Any]:
    content = f"This is message {turn:04} of many."
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "seed": turn,
        **({"state": {"from": state}} if state else {}),
    }


def forks(port: int, number: int = 64) -> dict[str, Any]:
    """Time of a fork of one state, and until the first token of what goes on from it."""
    heard = asyncio.run(ask(port, "/v1/chat/completions", _message(0, None)))
    state, took, first = heard.last["state"]["id"], [], []
    for turn in range(number):
        began = time.perf_counter()
        fork = asyncio.run(_call(port, f"/v1/states/{state}/fork", {}))
        took.append(time.perf_counter() - began)
        heard = asyncio.run(ask(port, "/v1/chat/completions", _message(turn, fork["id"])))
        first.append(heard.first)
    return {
        "forks": number,
        "fork_ms": 1000 * statistics.median(took),
        "first_token_ms": 1000 * statistics.median(first),
        "state_bytes": fork["bytes"],
    }


def endless(model: str, tokens: int) -> dict[str, Any]:
    """One conversation until it has so many tokens: what each tenth of it takes."""
    words = " ".join(f"word {i} of a long message," for i in range(200))
    tenths: list[dict[str, float]] = []
    state: str | None = None
    read, turn = 0, 0
    with serving(model, "--state-memory", "64MiB") as server:
        while read < tokens:
            times, begun, before = [], time.perf_counter(), read
            while read < tokens * (len(tenths) + 1) // 10:
                body = _message(turn, state)
                body["messages"][0]["content"] = f"{turn}: {words}"
                heard = asyncio.run(ask(server.port, "/v1/chat/completions", body))
                state, read = heard.last["state"]["id"], heard.last["state"]["tokens"]
                times.append(heard.first)
                turn += 1
            row = {
                "tokens": read,
                "tokens_per_second": (read - before) / (time.perf_counter() - begun),
                "first_token_ms": 1000 * statistics.median(times),
                "resident_bytes": memory_bytes("VmRSS", server.process),
                "state_bytes": heard.last["state_bytes"],
            }
            tenths.append(row)
    return {"turns": turn, "tenths": tenths}


def _quantile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


def describe(report: dict[str, Any]) -> str:
    """As text."""
    lines = []
    if "load" in report:
        head = ["server", "streams", "tokens/s", "x 1", "requests/s", "first p50", "p95", "p99"]
        head += ["between p50", "p95", "p99"]
        lines.append("  ".join(f"{name:>11}" for name in head))
        for row in report["load"]:
            values = (
                row["server"],
                f"{row['streams']}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['over_one_stream']:.2f}",
                f"{row['requests_per_second']:.1f}",
                *(f"{row[f'first_token_ms_p{q}']:.1f}" for q in (50, 95, 99)),
                *(f"{row[f'between_ms_p{q}']:.2f}" for q in (50, 95, 99)),
            )
            lines.append("  ".join(f"{value:>11}" for value in values))
        lines.append(f"ms; {report['tokens']} tokens each, medians of {report['rounds']} rounds\n")
    if "turns" in report:
        found = report["turns"]
        lines.append(
            f"turns 2 to 11 of a chat: first text after {found['early_ms']:.1f} ms; the last ten "
            f"of {found['turns']} of another, between them, {found['late_ms']:.1f} ms, "
            f"{found['late_over_early']:.2f} times; behind a restart {found['restarted_ms']:.1f} "
            f"ms, {found['restarted_over_early']:.2f} times turns 2 to 11 of a new one (the very "
            f"first {found['first_behind_restart_ms']:.1f} ms); {found['tokens']:,} tokens, a "
            f"state of {found['state_bytes']:,} bytes"
        )
    if "fork" in report:
        found = report["fork"]
        lines.append(
            f"a fork takes {found['fork_ms']:.1f} ms, the first text behind it "
            f"{found['first_token_ms']:.1f} ms; {found['state_bytes']:,} bytes"
        )
    if "endless" in report:
        lines.append(f"one conversation, {report['endless']['turns']} turns:")
        for row in report["endless"]["tenths"]:
            lines.append(
                f"{row['tokens']:>11,} tokens  {row['tokens_per_second']:>8,.0f} tokens/s  first "
                f"text {row['first_token_ms']:.1f} ms  {row['resident_bytes'] / 2**20:.1f} MiB "
                f"resident  state {row['state_bytes']:,} bytes"
            )
    return "\n".join(lines)
