"""Other servers, for `spikelm bench serve --against`: random Transformers of our model's size.

What they answer is noise; how long it takes does not depend on that. Each tokenises with our
model's tokenizer. No torch at import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spikelm.config import AttentionConfig, FFNConfig, Mixer, ModelConfig
from spikelm.errors import ConfigError, MissingExtraError, SpikelmError

FULL: Mixer = "full"
HEAD_DIM = 32
CONTEXT = 4096
"""Tokens a sequence of llama.cpp's may have."""
START_SECONDS = 180


def shape_like(folder: Path) -> ModelConfig:
    """A Qwen2 of the width, the depth and, nearly, the parameters of a model."""
    from spikelm.checkpoint import load
    from spikelm.eval.gguf import stored_tensors
    from spikelm.eval.traffic import num_parameters

    model = load(folder).model
    ours = model.config
    width = max(HEAD_DIM, round(ours.width / HEAD_DIM) * HEAD_DIM)
    heads = width // HEAD_DIM
    shape = ModelConfig(
        vocab_size=ours.vocab_size,
        width=width,
        mixers=(FULL,) * ours.num_layers,
        norm="rms",
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM, qkv_bias=True, rope_theta=1e6
        ),
        ffn=FFNConfig(kind="swiglu", hidden_dim=HEAD_DIM),
        tie_embeddings=ours.tie_embeddings,
    )
    least = sum(tensor.num_weights for tensor in stored_tensors(shape, "Q8_0").values())
    missing = num_parameters(model) - least
    more = max(0, round(missing / (3 * width * ours.num_layers) / HEAD_DIM)) * HEAD_DIM
    ffn = dataclasses.replace(shape.ffn, hidden_dim=HEAD_DIM + more)
    return dataclasses.replace(shape, ffn=ffn)


@contextlib.contextmanager
def llama_cpp(shape: ModelConfig, tokenizer: Path, folder: Path) -> Iterator[int]:
    """llama-cpp-python's server, weights in Q8_0; its port. It answers one request at a time."""
    for package in ("llama_cpp", "fastapi", "sse_starlette", "starlette_context"):
        _require(package, "llama-cpp-python[server]")
    from spikelm.eval.gguf import write_gguf

    file = folder / "rival.gguf"
    write_gguf(file, shape, vocabulary=_vocabulary(tokenizer))
    options = ["--model", str(file), "--n_ctx", str(CONTEXT), "--n_threads", str(threads())]
    options += ["--n_threads_batch", str(threads()), "--interrupt_requests", "False"]
    command = [sys.executable, "-m", "llama_cpp.server", "--verbose", "False", *options]
    with _started(lambda port: [*command, "--port", str(port)], "/v1/models") as port:
        yield port


@contextlib.contextmanager
def transformers(shape: ModelConfig, tokenizer: Path, folder: Path) -> Iterator[int]:
    """`transformers serve`, weights in float32; its port."""
    for package in ("transformers", "fastapi"):
        _require(package, "transformers[serving]")
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from spikelm.eval.peers import qwen2_config

    disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen2_config(shape))
    # Nothing but the number of tokens ends an answer.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    own = folder / "rival"
    model.save_pretrained(own)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, own)
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(own), "--device", "cpu"]
    with _started(lambda port: [*command, "--port", str(port)], "/health") as port:
        yield port


RIVALS = {"llama.cpp": llama_cpp, "transformers": transformers}


def threads() -> int:
    """Those that our server computes with too."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def _vocabulary(tokenizer: Path) -> tuple[Sequence[str], Sequence[str]]:
    """Tokens and merges of a byte-level BPE."""
    try:
        found = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        ids = dict(found["model"]["vocab"])
        ids |= {token["content"]: token["id"] for token in found.get("added_tokens", [])}
        merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--against llama.cpp needs a model with a byte-level BPE tokenizer; {tokenizer} has "
            "another"
        ) from None
    return sorted(ids, key=ids.__getitem__), merges


@contextlib.contextmanager
def _started(command: Callable[[int], list[str]], path: str) -> Iterator[int]:
    """A server of that command, once `path` answers; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = command(port)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            until = time.monotonic() + START_SECONDS
            while not _answers(port, path):
                if process.poll() is not None or time.monotonic() > until:
                    process.kill()
                    said = process.stderr.read() if process.stderr else ""
                    raise SpikelmError(f"{' '.join(given[:4])} did not start: {said[-500:]}")
                time.sleep(0.2)
            yield port
        finally:
            process.kill()
            process.wait()


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(extra, "bench")
