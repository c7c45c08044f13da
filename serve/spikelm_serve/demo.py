"""`make demo`: train, convert, measure and serve a small spiking language model on this machine.

Runs the commands a user would type, and shows each one. Running it again continues where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

PROMPT = "The function returns"
QUESTION = "What does this module do?"
WEIGHTS = "model.safetensors"
START_SECONDS = 60


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m spikelm_serve.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to the training"
    )
    args = parser.parse_args(argv)
    started = time.monotonic()
    spiking, dense, spikes = (args.out / name for name in ("spiking", "dense", "spikes"))
    overrides = [word for assignment in args.set for word in ("--set", assignment)]
    try:
        title("Train the spiking model, then its dense twin of the same shape")
        spikelm("train", "demo", "--out", spiking, *overrides)
        spikelm("train", "demo-dense", "--out", dense, *overrides)
        title("Convert: integer weights, read only for the neurons that fired")
        if is_current(spikes / WEIGHTS, spiking / WEIGHTS):
            print(f"{spikes} is newer than {spiking}: kept")
        else:
            spikelm("convert", spiking, spikes)
        title("Measure all three on text that training has not seen")
        evaluate(args.out / "report.json", dense, spiking, spikes)
        title("Serve the spike-coded model and ask it with the openai client")
        with server(spikes) as url:
            ask(url, spikes.name)
        title("A longer sample")
        spikelm("generate", spikes, "--prompt", PROMPT, "--max-tokens", "120", "--seed", "0")
    except KeyboardInterrupt:
        print("\nstopped; run it again to continue", file=sys.stderr)
        return 130
    title(f"Done in {time.monotonic() - started:.0f} s. Next")
    print(f"  spikelm chat {spikes}")
    print(f"  spikelm serve {spikes}")
    print(f"  spikelm inspect {spikes}")
    print(f"  spikelm bench length {spikes} --lengths 256,1024,4096")
    print("  spikelm train demo --out runs/mine --data 'my/texts/*.txt'")
    return 0


def evaluate(report: Path, *models: Path) -> None:
    """Prints the table of the models; measures again only if one is newer than the report."""
    if not is_current(report, *(folder / WEIGHTS for folder in models)):
        first, *others = models
        twins = [word for twin in others for word in ("--twin", twin)]
        spikelm("eval", first, *twins, "--report", report)
        return
    from spikelm.eval.tables import evaluation_table

    print(f"{report} is newer than the models: kept")
    data = json.loads(report.read_text(encoding="utf-8"))
    print(
        evaluation_table({**data, "models": {folder.name: data[folder.name] for folder in models}})
    )


def ask(url: str, model: str) -> None:
    """One streamed chat and one completion, printed."""
    import openai

    # A proxy of the environment must not see what stays on this machine.
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="not needed", http_client=http) as client:
        print(f"chat: {QUESTION}")
        with client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=80,
            temperature=0.7,
            seed=0,
            stream=True,
        ) as chunks:
            for chunk in chunks:
                if chunk.choices:
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
        print(f"\n\ncompletion: {PROMPT}", end="")
        completion = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=60, temperature=0.7, seed=0
        )
        print(completion.choices[0].text)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """`spikelm serve` on a free port; yields its base URL when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = announced("serve", folder, "--port", str(port))
    with subprocess.Popen(command) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()
    print("the server has stopped")


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(url, timeout=5):
            return
        time.sleep(0.1)
    fail("the server did not start")


def spikelm(*arguments: str | Path) -> None:
    """Runs one command in this terminal. Raises: SystemExit if it fails."""
    # Ctrl-C reaches the command too; a training run then still has a checkpoint to write.
    interrupted = False
    with subprocess.Popen(announced(*arguments)) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode:
        fail(f"this command failed with status {process.returncode}")


def announced(*arguments: str | Path) -> list[str]:
    """Shows a command as a user would type it; returns it for this Python."""
    words = [str(argument) for argument in arguments]
    print(f"$ {shlex.join(['spikelm', *words])}", flush=True)
    return [sys.executable, "-m", "spikelm", *words]


def is_current(path: Path, *sources: Path) -> bool:
    """Whether `path` exists and is at least as new as what it was made from."""
    newest = max(source.stat().st_mtime_ns for source in sources)
    return path.exists() and path.stat().st_mtime_ns >= newest


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def fail(reason: str) -> NoReturn:
    print(
        f"demo: {reason}; its message is above. Mend that and run the demo again: it continues "
        "where it was. To start over, delete its folder.",
        file=sys.stderr,
    )
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
