"""A run of the recall study: a model of two layers, trained and measured from one seed.

B sequences, T tokens, Q queries, K key channels per head.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm.config import (
    AttentionConfig,
    DeltaConfig,
    FFNConfig,
    GLAConfig,
    Mixer,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    RWKV7Config,
)
from spikelm.errors import ConfigError, did_you_mean
from spikelm.eval.cli import write_json
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes
from spikelm.state import State
from spikelm_train.config import OptimConfig
from spikelm_train.optim import lr_factor, make_optimizer
from spikelm_train.recall.task import Batch, Size, draw, size_at
from spikelm_train.silence import Silence
from spikelm_train.stages import close_bypasses

HEADS = 2
SILENCE_RATE = 0.2
TRACE_EVERY = 50
EVAL_BATCH = 64
SIZES = (Size(64, 8), Size(64, 16), Size(128, 16), Size(128, 32))

MIXERS: dict[str, tuple[Mixer, dict[str, Any]]] = {
    "delta": ("delta", {}),
    "kda": ("delta", {"gates": "tied"}),
    "gdn": ("delta", {"decay": "scalar", "gates": "tied"}),
    "deltanet": ("delta", {"decay": "none", "gates": "tied"}),
    "gla": ("gla", {}),
    "rwkv7": ("rwkv7", {}),
    "wkv4": ("wkv4", {}),
    "window": ("window", {}),
    "full": ("full", {}),
}
"""Name in the study -> kind of layer and, for `delta`, its options: with channel decay and split
gates (GDN-2) or tied ones (KDA), with a scalar decay (Gated DeltaNet), with none (DeltaNet)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that fixes a run's numbers."""

    mixer: str = "delta"
    """A name of `MIXERS`, twice, or the two layers' names joined by +."""
    key_dim: int = 64
    """Key channels per head K."""
    value_dim: int = 64
    """Value channels per head; rwkv7's are its key channels."""
    spiking: float = 1.0
    """Share of a query's and of a key's channels that fire; 1 is dense."""
    bypass: float = 0.65
    """Share of the run in which queries and keys can pass by their neurons, less and less."""
    seed: int = 0
    """Of the weights and the data."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences per step."""
    lr: float = 1e-2
    """Peak learning rate of AdamW."""
    sizes: tuple[Size, ...] = SIZES
    """What is measured, and trained on after the first part of the run (`task.size_at`)."""
    overwritten: float = 0.0
    """Share of the pairs that give an earlier or later pair's key another value."""
    vocab_size: int = 256
    """Tokens; half of them keys, half values."""
    width: int = 64
    """Channels of the residual stream."""
    eval_sequences: int = 256
    """Sequences measured per size."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_sequences", "key_dim", "value_dim"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require(0 < self.spiking <= 1, "spiking", self.spiking, "0 < share <= 1")
        _require(0 <= self.bypass <= 1, "bypass", self.bypass, "0 to 1")
        _require(0 <= self.overwritten <= 0.5, "overwritten", self.overwritten, "0 to 0.5")
        _require(self.lr > 0, "lr", self.lr, "a number > 0")
        _require(self.width % HEADS == 0, "width", self.width, f"a multiple of {HEADS}")
        for name in self.layers:
            if name not in MIXERS:
                raise ConfigError(f"unknown mixer '{name}'; {did_you_mean(name, MIXERS)}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the two layers."""
        names = tuple(self.mixer.split("+"))
        return names * 2 if len(names) == 1 else names

    @property
    def name(self) -> str:
        """A file name: what varies most, and a digest of everything."""
        digest = hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:8]
        heads = f"{self.key_dim}x{self.value_dim}"
        return f"{self.mixer}-{heads}-spiking{self.spiking:g}-seed{self.seed}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "sizes": [str(size) for size in self.sizes]}

    def reduced(self) -> Run:
        """The same run with what its layers do not have at one value: key channels and spiking
        queries and keys.
        """
        kinds = {MIXERS[name][0] for name in self.layers}
        changes: dict[str, Any] = {}
        if not kinds & {"delta", "gla", "rwkv7"}:
            changes["key_dim"] = changes["value_dim"] = self.width // HEADS
        elif not kinds & {"delta", "gla"}:
            changes["value_dim"] = self.key_dim
        if "delta" not in kinds:
            changes["spiking"] = 1.0
        if changes.get("spiking", self.spiking) == 1:
            changes["bypass"] = 0.0
        return dataclasses.replace(self, **changes)


def _require(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: {given!r} given; allowed: {allowed}")


def model_config(run: Run) -> ModelConfig:
    """Two layers with a feed-forward layer of one neuron, the least there is (Zoology has none).

    Raises: ConfigError if the layers cannot have these shapes.
    """
    kinds = tuple(MIXERS[name][0] for name in run.layers)
    options = [MIXERS[name][1] for name in run.layers if MIXERS[name][0] == "delta"]
    if any(option != options[0] for option in options):
        raise ConfigError(f"{run.mixer}: a model has one kind of delta layers")
    heads: dict[str, Any] = {
        "num_heads": HEADS,
        "key_dim": run.key_dim,
        "value_dim": run.value_dim,
    }
    rank = max(1, run.width // 4)
    queries_keys = NeuronConfig()
    if run.spiking < 1:
        silent = 1 - run.spiking
        # Where normally distributed entries would be as silent as wanted: in units of mean |x|.
        edge = statistics.NormalDist().inv_cdf((1 + silent) / 2) / math.sqrt(2 / math.pi)
        queries_keys = NeuronConfig(
            kind="integer",
            dead_zone=edge,
            target_silence=silent,
            max_count=127,
            bypass=run.bypass,
        )
    return ModelConfig(
        vocab_size=run.vocab_size,
        width=run.width,
        mixers=kinds,
        neurons=NeuronsConfig(queries_keys=queries_keys),
        delta=DeltaConfig(**heads, gate_rank=rank, **(options[0] if options else {})),
        gla=GLAConfig(**heads, num_kv_heads=HEADS, gate_rank=rank),
        attention=AttentionConfig(
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=run.width // HEADS,
            window=16,
            sinks=0,
        ),
        rwkv7=RWKV7Config(
            # Checked against the width only where it is used.
            head_dim=run.key_dim,
            decay_rank=rank,
            rate_rank=rank,
            value_rank=rank,
            gate_rank=rank,
        ),
        ffn=FFNConfig(kind="reglu", hidden_dim=1),
    )


@dataclass
class Rows:
    """A probe: how many queries' and keys' channels fire, and how many fire in either."""

    entries: int = 0
    fired: dict[str, int] = field(default_factory=lambda: {"queries": 0, "keys": 0, "rows": 0})

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        if neuron.tensor_class != "queries_keys":
            return
        fired = spikes.values != 0
        role = neuron.name.rpartition(".")[-1]
        self.fired[role] += int(fired.sum())
        if role == "queries":
            self._queries = fired
        else:
            self.fired["rows"] += int((self._queries | fired).sum())
            self.entries += fired.numel()

    def fractions(self) -> dict[str, float]:
        """Of all channels; 1 where nothing can be silent."""
        return {n: count / self.entries if self.entries else 1.0 for n, count in self.fired.items()}


def perform(run: Run) -> dict[str, Any]:
    """Trains the model of `run` and measures it, on one thread; returns JSON types.

    Raises: ConfigError.
    """
    config = model_config(run)
    with _one_thread():
        model = LanguageModel(config).initialise(run.seed)
        began = perf_counter()
        trace = train(model, run)
        seconds = perf_counter() - began
        measured = measure(model, run)
    return {
        "run": run.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **measured,
        "trace": trace,
        "seconds": seconds,
        "torch": torch.__version__,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """So that sums do not depend on the machine. Denormals of strong decays are taken as zeros."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def train(model: LanguageModel, run: Run) -> list[dict[str, float]]:
    """All steps of a run; every `TRACE_EVERY` of them the mean loss (nats), accuracy and silence.

    A run whose loss stops being finite ends there, without the step that broke it.
    """
    # A rate of 3e-3 learned far more slowly in the prototype of this study.
    optim = OptimConfig(
        lr=run.lr,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        warmup_fraction=0.05,
        final_lr_fraction=0.05,
    )
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = make_optimizer(model.train(), optim)
    silence = Silence(model.neurons(), SILENCE_RATE)
    trace: list[dict[str, float]] = []
    recent: list[tuple[float, float]] = []
    for step in range(run.steps):
        progress = (step + 0.5) / run.steps
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_factor(optim, progress)
        close_bypasses(silence.neurons, progress)
        size = size_at(run.sizes, progress, generator)
        batch = draw(size, run.batch_size, run.vocab_size, generator, run.overwritten)
        silence.clear()
        logits, _ = answers(model, batch, silence)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
        if not math.isfinite(loss.item()):
            _log.warning("%s: the loss is not finite at step %d", run.name, step + 1)
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counts = silence.counts()
        silence.steer(counts)
        right = (logits.argmax(-1) == batch.answers).float().mean().item()
        recent.append((loss.item(), right))
        if (step + 1) % TRACE_EVERY == 0 or step + 1 == run.steps:
            loss_mean, accuracy = (statistics.fmean(column) for column in zip(*recent, strict=True))
            recent = []
            silent = silence.fractions(counts)[1].get("queries_keys", 0.0)
            trace.append(
                {"step": step + 1, "loss": loss_mean, "accuracy": accuracy, "silent": silent}
            )
            _log.info(
                "%s: step %d/%d, loss %.3f, accuracy %.1f %%, silent %.1f %%",
                run.name,
                step + 1,
                run.steps,
                loss_mean,
                100 * accuracy,
                100 * silent,
            )
    return trace


def answers(model: LanguageModel, batch: Batch, probe: Silence | Rows) -> tuple[Tensor, State]:
    """The logits where something is asked [B, Q, vocabulary], and the state at the end."""
    logits, state = model(batch.tokens, probe=probe)
    at = batch.queries[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, at), state


@torch.no_grad()
def measure(model: LanguageModel, run: Run) -> dict[str, Any]:
    """Accuracy per size, on sequences that depend on the seed alone; the state's bytes, and those
    a token touches: all but the rows of S that neither its query nor its key fires at.
    """
    model.eval()
    rows = Rows()
    accuracy = {}
    state_bytes = memory_bytes = 0
    for index, size in enumerate(run.sizes):
        generator = torch.Generator().manual_seed(1_000_003 * (run.seed + 1) + index)
        right = 0
        asked = 0
        for start in range(0, run.eval_sequences, EVAL_BATCH):
            count = min(EVAL_BATCH, run.eval_sequences - start)
            batch = draw(size, count, run.vocab_size, generator, run.overwritten)
            logits, state = answers(model, batch, rows)
            right += int((logits.argmax(-1) == batch.answers).sum())
            asked += batch.answers.numel()
        accuracy[str(size)] = right / asked
        # Only softmax attention's grows.
        state_bytes = max(state_bytes, state.nbytes // count)
        memory_bytes = sum(layer["mixer.S"].nbytes for layer in state.layers if "mixer.S" in layer)
        memory_bytes //= count
    fractions = rows.fractions()
    return {
        "accuracy": accuracy,
        "active": fractions,
        "state_bytes": state_bytes,
        "touched_bytes": round(state_bytes - (1 - fractions["rows"]) * memory_bytes),
    }


def study(runs: Sequence[Run], out: Path | None) -> list[dict[str, Any]]:
    """The results of `runs`; what is in the folder `out` already is read, the rest is put there.

    Raises: ConfigError, before anything runs, for a run that cannot be.
    """
    for run in runs:
        model_config(run)
    results = []
    for index, run in enumerate(runs):
        file = None if out is None else out / f"{run.name}.json"
        if file is not None and file.is_file():
            results.append(json.loads(file.read_text(encoding="utf-8")))
            continue
        _log.info("run %d/%d: %s", index + 1, len(runs), run.name)
        results.append(perform(run))
        if file is not None:
            write_json(file, results[-1])
    return results
