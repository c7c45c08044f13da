"""A fake engine with a byte tokenizer, a tiny real model, and servers on loopback ports."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from torch import Tensor

from spikelm.checkpoint import load, save
from spikelm.config import AttentionConfig, DeltaConfig, FFNConfig, ModelConfig
from spikelm.conversion.convert import convert
from spikelm.decoder import Watch
from spikelm.generate import Engine
from spikelm.models.spikelm import LanguageModel
from spikelm.state import State
from spikelm.tokenizer import Tokenizer
from spikelm_serve.app import create_app


class FakeEngine:
    """Says `script`, then ends; without one, noise that depends on the last two tokens."""

    silent_fraction = 0.25
    is_batch_invariant = True

    def __init__(self, script: str | bytes | None = None, *, delay: float = 0.0) -> None:
        self.tokenizer = Tokenizer.bytes()
        self.delay = delay
        self.error: Exception | None = None
        self.steps = 0
        self.prompts: list[list[int]] = []
        self._script = script.encode() if isinstance(script, str) else script
        table = torch.randn(64, 257, generator=torch.Generator().manual_seed(1))
        # Letters and spaces mostly; byte 195 starts characters that stay incomplete.
        table[:, [*range(97, 123), 32, 195]] += 4
        self._table = table

    def prefill(self, ids: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
        self.prompts.append(list(ids))
        before = [0.0] if state is None else state.layers[0]["last"][0].tolist()
        last = torch.tensor([[*before, *map(float, ids)][-2:]])
        return self._logits(last, 0), State(({"last": last},), torch.tensor([0]))

    def step(
        self, ids: Tensor, state: State, *, in_place: bool = False, within: float | None = None
    ) -> tuple[Tensor, State]:
        if self.error is not None:
            raise self.error
        time.sleep(self.delay)
        self.steps += 1
        last = torch.stack([state.layers[0]["last"][:, 1], ids.float()], 1)
        position = state.position + 1
        return self._logits(last, int(position)), State(({"last": last},), position)

    def step_each(
        self,
        ids: Tensor,
        states: Sequence[State],
        *,
        within: float | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, list[State]]:
        found = [self.step(ids[i : i + 1], state) for i, state in enumerate(states)]
        return torch.cat([logits for logits, _ in found]), [state for _, state in found]

    def _logits(self, last: Tensor, position: int) -> Tensor:
        if self._script is None:
            row = int(last[0, 0] * 7 + last[0, 1]) % 64
            return self._table[row][None]
        logits = torch.zeros(1, 257)
        ended = position >= len(self._script)
        logits[0, self.tokenizer.eos_id if ended else self._script[position]] = 100.0
        return logits


@contextlib.contextmanager
def serving(engine: Any, **options: Any) -> Iterator[str]:
    """Runs a real server in a thread; yields its base URL."""
    app = create_app(engine, "tiny", **options)
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small only waits for a second thread, long if the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def serve() -> Iterator[Callable[..., httpx.Client]]:
    """Starts a server and returns a client of it."""
    logging.getLogger("spikelm_serve.scheduler").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:

        def start(engine: Any, **options: Any) -> httpx.Client:
            url = stack.enter_context(serving(engine, **options))
            return stack.enter_context(httpx.Client(base_url=url, timeout=20, trust_env=False))

        yield start
    logging.getLogger("spikelm_serve.scheduler").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def noise() -> Iterator[httpx.Client]:
    """A client of a server whose model says noise; shared, so leave the engine alone."""
    with serving(FakeEngine()) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: one layer of each kind, random weights, byte tokenizer."""
    config = ModelConfig(
        vocab_size=257,
        width=32,
        mixers=("delta", "window"),
        delta=DeltaConfig(num_heads=2, key_dim=8, value_dim=8, gate_rank=8),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=16, sinks=2),
        ffn=FFNConfig(hidden_dim=64),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, LanguageModel(config).initialise(0), Tokenizer.bytes())
    return folder


@pytest.fixture(scope="session")
def coded_folder(tiny_folder: Path) -> Path:
    """The same model, spike-coded."""
    folder = tiny_folder.parent / "coded"
    convert(tiny_folder, folder, torch.arange(96).view(2, 48))
    return folder


@pytest.fixture(scope="session")
def coded_engine(coded_folder: Path) -> Engine:
    """An engine whose sequences do not depend on their batch, if native code is there."""
    return Engine(load(coded_folder))


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Path) -> Engine:
    return Engine(load(tiny_folder))


@pytest.fixture(scope="module")
def real(coded_engine: Engine) -> Iterator[httpx.Client]:
    """A client of a server of the coded model; shared."""
    with (
        serving(coded_engine) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield client


@pytest.fixture
def started(coded_folder: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "spikelm", "serve", str(coded_folder), "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, text=True, env=environment
        )
        running.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().partition(" at ")[2].partition("/v1")[0]
        return process, url

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
