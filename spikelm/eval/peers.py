"""Contestants of a decode benchmark: other programs on models of the same shape, random weights.

Each lives in a process of its own that stays alive and reads tokens when told to, so that a
benchmark can let them take turns. Token ids are given: sampling is nobody's time. Only who needs
torch imports it, or it would count as llama.cpp's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, get_args

import numpy as np

from spikelm.config import ModelConfig
from spikelm.errors import BackendError, ConfigError, MissingExtraError
from spikelm.eval.gguf import kind_of
from spikelm.eval.process import memory_bytes

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float32", "bfloat16"]

WARM_UP_TOKENS = 3
"""Read before anything is timed: buffers, pages and just-in-time compilers settle."""
FILL_TOKENS = 128
"""Tokens whose keys and values llama.cpp computes; the rest of a long context are their copies."""
LOG_ERROR = 4
"""ggml's number of that level; the bindings do not name it."""


# --- weights of the rwkv package ------------------------------------------------------------------


def write_pth(path: str | Path, shape: ModelConfig, *, seed: int = 0) -> None:
    """A random RWKV-7 with the names and shapes of the released files, in bfloat16 as they are.

    Raises: ConfigError for another shape.
    """
    if kind_of(shape) != "rwkv7":
        raise ConfigError("the rwkv package reads shapes with rwkv7 layers")
    import torch

    D, F, N, c = shape.width, shape.ffn.hidden_dim, shape.vocab_size, shape.rwkv7
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, inputs: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.bfloat16)
        return drawn.mul_(inputs**-0.5)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": full(1.0, D), f"{name}.bias": full(0.0, D)}

    def full(value: float, *size: int) -> Tensor:
        return torch.full(size, value, dtype=torch.bfloat16)

    tensors = {
        "emb.weight": matrix(N, D, D),
        "head.weight": matrix(N, D, D),
        **norm("ln_out"),
        **norm("blocks.0.ln0"),
    }
    ranks = {"w": c.decay_rank, "a": c.rate_rank, "v": c.value_rank, "g": c.gate_rank}
    for block in (f"blocks.{i}" for i in range(shape.num_layers)):
        att, ffn = f"{block}.att", f"{block}.ffn"
        tensors |= {**norm(f"{block}.ln1"), **norm(f"{block}.ln2"), **norm(f"{att}.ln_x")}
        tensors |= {f"{att}.x_{x}": full(0.5, 1, 1, D) for x in "rwkvag"}
        for gate, rank in ranks.items():
            tensors[f"{att}.{gate}1"] = matrix(D, rank, D)
            tensors[f"{att}.{gate}2"] = matrix(rank, D, rank)
            if gate != "g":
                tensors[f"{att}.{gate}0"] = full(0.0, 1, 1, D)
        tensors |= {f"{att}.k_{x}": full(1.0, 1, 1, D) for x in "ka"}
        tensors[f"{att}.r_k"] = full(0.1, D // c.head_dim, c.head_dim)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{name}.weight"] = matrix(D, D, D)
        tensors[f"{ffn}.x_k"] = full(0.5, 1, 1, D)
        tensors[f"{ffn}.key.weight"] = matrix(F, D, D)
        tensors[f"{ffn}.value.weight"] = matrix(D, F, F)
    torch.save(tensors, path)


# --- contestants ----------------------------------------------------------------------------------


class Seconds(NamedTuple):
    """How long something took."""

    wall: float
    cpu: float
    """Of all threads of the contestant's process: what a busy machine changes less."""


class Contestant(Protocol):
    """What a decode benchmark asks of everyone who takes part."""

    name: str

    def decode(self, n: int) -> list[Seconds]:
        """Time of each of `n` tokens, read one at a time from the start of a sequence."""

    def decode_at(self, position: int, n: int) -> list[Seconds]:
        """The same behind `position` tokens. They are not read: the state or cache is made to hold
        as many, with whatever content.
        """

    def prefill(self, n: int) -> Seconds:
        """Time of `n` tokens that are all known, up to the logits of the last."""

    def resident_bytes(self) -> int:
        """Resident memory of the contestant's process."""

    def facts(self) -> dict[str, Any]:
        """What else its model says of itself, as JSON types."""

    def bandwidth(self, threads: int) -> dict[str, float]:
        """Of reading its weights, see `Reader`."""

    def close(self) -> None:
        """Ends it."""


class Reader(Protocol):
    """A model inside a contestant's process."""

    def hold(self, tokens: int) -> None:
        """Begins a sequence that counts `tokens` tokens already, without reading them."""

    def read(self, tokens: int) -> None:
        """Reads tokens in one call, up to the logits of the last."""

    def facts(self) -> dict[str, Any]:
        """What else there is to say of the model, as JSON types."""
        return {}

    def bandwidth(self, threads: int) -> dict[str, float]:
        """Bytes per second of reading the weights without arithmetic; empty if unknown."""
        return {}


class InProcess:
    """A contestant made of a Reader: what a process of its own runs, and what tests call."""

    def __init__(self, name: str, reader: Reader) -> None:
        self.name = name
        self._reader = reader
        reader.hold(0)
        for _ in range(WARM_UP_TOKENS):
            reader.read(1)

    def decode(self, n: int) -> list[Seconds]:
        return self.decode_at(0, n)

    def decode_at(self, position: int, n: int) -> list[Seconds]:
        self._reader.hold(position)
        # Another length than the one before: buffers grow now.
        self._reader.read(1)
        return [self._timed(1) for _ in range(n)]

    def prefill(self, n: int) -> Seconds:
        self._reader.hold(0)
        return self._timed(n)

    def resident_bytes(self) -> int:
        return memory_bytes("VmRSS")

    def facts(self) -> dict[str, Any]:
        return self._reader.facts()

    def bandwidth(self, threads: int) -> dict[str, float]:
        return self._reader.bandwidth(threads)

    def close(self) -> None:
        pass

    def _timed(self, tokens: int) -> Seconds:
        wall, cpu = perf_counter(), process_time()
        self._reader.read(tokens)
        return Seconds(perf_counter() - wall, process_time() - cpu)


class Spawned:
    """A contestant in a process of its own, which ends with this one.

    Such a process first imports the script that Python was started with: one that imports torch
    makes everybody's `resident_bytes` larger.

    Raises, in every method: BackendError with what went wrong over there.
    """

    def __init__(self, name: str, build: Callable[..., Reader], *arguments: object) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(theirs, name, build, arguments), daemon=True, name=name
        )
        with _environment():
            self._process.start()
        # Theirs is open over there alone, so a process that dies is the end of what can be read.
        theirs.close()
        try:
            self._receive()
        except BackendError:
            self.close()
            raise

    def decode(self, n: int) -> list[Seconds]:
        return self.decode_at(0, n)

    def decode_at(self, position: int, n: int) -> list[Seconds]:
        seconds: list[Seconds] = self._ask("decode_at", position, n)
        return seconds

    def prefill(self, n: int) -> Seconds:
        seconds: Seconds = self._ask("prefill", n)
        return seconds

    def resident_bytes(self) -> int:
        num_bytes: int = self._ask("resident_bytes")
        return num_bytes

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("facts")
        return found

    def bandwidth(self, threads: int) -> dict[str, float]:
        found: dict[str, float] = self._ask("bandwidth", threads)
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, method: str, *arguments: int) -> Any:
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise BackendError(f"{self.name} is closed; make another one") from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            error, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            raise BackendError(
                f"the process of {self.name} ended with status {status}; -9 is the system's way "
                "to say that memory ran out"
            ) from None
        if error is not None:
            raise BackendError(f"{self.name}: {error}")
        return result


def _run(
    pipe: Connection, name: str, build: Callable[..., Reader], arguments: tuple[object, ...]
) -> None:
    """The life of a contestant's process: what it is asked, until nobody is left to ask."""
    contestant: InProcess | None = None
    # Of other people's programs, which are not ours to mend.
    warnings.simplefilter("ignore")
    # The other end is closed: we are not needed any more.
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            error, result = None, None
            try:
                if contestant is None:
                    contestant = InProcess(name, build(*arguments))
                else:
                    method, numbers = pipe.recv()
                    result = getattr(contestant, method)(*numbers)
            except (EOFError, ConnectionError):
                raise
            except Exception as problem:  # noqa: BLE001 - told to the one who asked
                error = str(problem) or repr(problem)
            pipe.send((error, result))
            if contestant is None:
                return


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What a process started here sees: huge pages for what malloc hands out, from which every peer
    gains, and OpenMP's own way to wait instead of the one our command line prefers.
    """
    before = dict(os.environ)
    tunables = [before["GLIBC_TUNABLES"]] if "GLIBC_TUNABLES" in before else []
    os.environ["GLIBC_TUNABLES"] = ":".join([*tunables, "glibc.malloc.hugetlb=1"])
    os.environ.pop("GOMP_SPINCOUNT", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _token_ids(n: int, vocab_size: int, seen: int) -> list[int]:
    """Ids spread over the vocabulary, so that every token reads another row of the embedding."""
    return [(seen + i) * 7919 % vocab_size for i in range(n)]


def _check(threads: int, dtype: str = "float32") -> None:
    if threads < 1:
        raise ConfigError(f"threads: {threads} given; allowed: an integer >= 1")
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype: {dtype} given; allowed: {', '.join(get_args(Dtype))}")


def _require_package(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(package, "bench")


class LlamaCpp(Spawned):
    """llama.cpp on a GGUF file, weights copied to memory, through llama-cpp-python.

    `context` is the most tokens a sequence may have. Keys and values are float16, and attention is
    what llama.cpp prefers itself. `bytes_per_token` is for its facts: the library tells the size of
    a model, not what of it a token reads.

    Raises: MissingExtraError without llama-cpp-python; BackendError for a file it does not take.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int,
        *,
        context: int = 4096,
        bytes_per_token: float | None = None,
    ) -> None:
        _check(threads)
        _require_package("llama_cpp", "llama-cpp-python")
        name = f"llama.cpp {Path(path).stem}"
        super().__init__(name, LlamaReader, os.fspath(path), threads, context)
        self._bytes_per_token = bytes_per_token

    def facts(self) -> dict[str, Any]:
        known = self._bytes_per_token is not None
        return super().facts() | ({"bytes_per_token": self._bytes_per_token} if known else {})


class LlamaReader(Reader):
    """llama.cpp in this process."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        # Not typed, and installed for benchmarks only.
        self._api: Any = importlib.import_module("llama_cpp")
        self._complaints: list[str] = []
        # Kept: the library calls it for as long as it lives.
        self._log = self._api.llama_log_callback(self._on_log)
        self._api.llama_log_set(self._log, ctypes.c_void_p(0))
        self._api.llama_backend_init()
        model = self._api.llama_model_default_params()
        # A mapped file is read in small pages.
        model.load_mode = self._api.LLAMA_LOAD_MODE_NONE
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), model)
        if not self._model:
            raise BackendError(self._complaint(f"cannot load {path}"))
        settings = self._api.llama_context_default_params()
        # A copy may be cut only after it arrived.
        settings.n_ctx = context + FILL_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        # The second is where copies of keys and values arrive, see `hold`.
        settings.n_seq_max = 2
        settings.kv_unified = True
        self._context = self._api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise BackendError(self._complaint(f"cannot run {path}"))
        self._memory = self._api.llama_get_memory(self._context)
        self._vocab_size = self._api.llama_vocab_n_tokens(
            self._api.llama_model_get_vocab(self._model)
        )
        self._recurrent = self._api.llama_model_is_recurrent(self._model)
        self._max_tokens, self._batch = context, settings.n_batch
        self._seen = 0

    def hold(self, tokens: int) -> None:
        """Keys and values of a few tokens are computed, and copied until the cache holds `tokens`.
        Copies keep their positions: how long attention takes depends on none. A recurrent state has
        one size.
        """
        api = self._api
        api.llama_memory_clear(self._memory, False)
        self._seen = 0
        if tokens == 0 or self._recurrent:
            return
        self._check(tokens)
        self.read(min(FILL_TOKENS, tokens))
        size = api.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        api.llama_state_seq_get_data(self._context, state, size, 0)
        while self._seen < tokens:
            if not api.llama_state_seq_set_data(self._context, state, size, 1):
                raise BackendError(self._complaint("cannot copy keys and values"))
            # Of the last copy, the tokens that are one too many.
            api.llama_memory_seq_rm(self._memory, 1, tokens - self._seen, -1)
            api.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
            api.llama_memory_seq_rm(self._memory, 1, -1, -1)
            self._seen += min(FILL_TOKENS, tokens - self._seen)

    def read(self, tokens: int) -> None:
        self._check(self._seen + tokens)
        ids = _token_ids(tokens, self._vocab_size, self._seen)
        for start in range(0, tokens, self._batch):
            part = ids[start : start + self._batch]
            array = (self._api.llama_token * len(part))(*part)
            batch = self._api.llama_batch_get_one(array, len(part))
            if self._api.llama_decode(self._context, batch):
                raise BackendError(self._complaint("cannot read a token"))
        self._api.llama_synchronize(self._context)
        self._seen += tokens

    def logits(self) -> np.ndarray[Any, Any]:
        """Of the token read last [vocab_size]."""
        row = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self._vocab_size,)).copy()

    def _check(self, tokens: int) -> None:
        if tokens > self._max_tokens and not self._recurrent:
            raise ConfigError(
                f"a sequence of {tokens} tokens asked for; allowed: the context, {self._max_tokens}"
            )

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR:
            self._complaints.append(text.decode(errors="replace").strip())

    def _complaint(self, what: str) -> str:
        return ": ".join([what, *self._complaints[-1:]])


class Transformers(Spawned):
    """Qwen2 of `shape` by the package transformers, with its default cache.

    Raises: MissingExtraError without transformers; ConfigError for another shape.
    """

    def __init__(self, shape: ModelConfig, threads: int, *, dtype: Dtype = "float32") -> None:
        _check(threads, dtype)
        _require_package("transformers", "transformers")
        if kind_of(shape) != "qwen2":
            raise ConfigError("transformers has no RWKV-7; give the transformer_twin of the shape")
        super().__init__(f"transformers {dtype}", TransformersReader, shape, threads, dtype)


def qwen2_config(shape: ModelConfig) -> Any:
    """What transformers calls the shape of a Qwen2."""
    from transformers import Qwen2Config

    attention = shape.attention
    return Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.ffn.hidden_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
        max_position_embeddings=2**20,
    )


class TransformersReader(Reader):
    """transformers in this process."""

    def __init__(self, shape: ModelConfig, threads: int, dtype: Dtype) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        attention = shape.attention
        self._config = qwen2_config(shape)
        self._dtype = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_config(self._config, dtype=self._dtype)
        self._model = model.eval()
        self._kv_size = attention.num_kv_heads, attention.head_dim
        self.hold(0)

    def hold(self, tokens: int) -> None:
        import torch
        from transformers import DynamicCache

        config = self._config
        self._cache = DynamicCache(config=config)
        heads, channels = self._kv_size
        for layer in range(config.num_hidden_layers if tokens else 0):
            keys, values = torch.randn(2, 1, heads, tokens, channels).to(self._dtype)
            self._cache.update(keys, values, layer)

    def read(self, tokens: int) -> None:
        import torch

        ids = _token_ids(tokens, self._config.vocab_size, self._cache.get_seq_length())
        with torch.inference_mode():
            self._model(
                torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )

    def facts(self) -> dict[str, Any]:
        # Tied embeddings are one parameter, which the head reads.
        total = sum(p.nbytes for p in self._model.parameters())
        table = self._model.get_input_embeddings().weight
        if not self._config.tie_word_embeddings:
            total += table[0].nbytes - table.nbytes
        return {"bytes_per_token": float(total)}


class Rwkv(Spawned):
    """The package rwkv on an RWKV-7 file, such as `write_pth` makes, compiled as it comes.

    Raises: MissingExtraError without rwkv; BackendError for a file it does not take.
    """

    def __init__(self, path: str | Path, threads: int, *, dtype: Dtype = "float32") -> None:
        _check(threads, dtype)
        _require_package("rwkv", "rwkv")
        super().__init__(
            f"rwkv {Path(path).stem} {dtype}", RwkvReader, os.fspath(path), threads, dtype
        )


class RwkvReader(Reader):
    """The package rwkv; it reads its settings from the environment, once per process."""

    def __init__(self, path: str, threads: int, dtype: Dtype) -> None:
        import torch

        torch.set_num_threads(threads)
        os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
        strategy = {"float32": "cpu fp32", "bfloat16": "cpu bf16"}[dtype]
        # It prints what it loads.
        with contextlib.redirect_stdout(io.StringIO()):
            package: Any = importlib.import_module("rwkv.model")
            self._model = package.RWKV(path.removesuffix(".pth"), strategy)
        self._vocab_size = self._model.args.vocab_size
        self.hold(0)

    def hold(self, tokens: int) -> None:
        self._state, self._seen = None, tokens

    def read(self, tokens: int) -> None:
        import torch

        ids = _token_ids(tokens, self._vocab_size, self._seen)
        with torch.inference_mode():
            _, self._state = self._model.forward(ids, self._state)
        self._seen += tokens

    def facts(self) -> dict[str, Any]:
        tensors = dict(self._model.z)
        row = tensors.pop("emb.weight")[0]
        return {"bytes_per_token": float(row.nbytes + sum(t.nbytes for t in tensors.values()))}
