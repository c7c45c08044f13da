"""Quality and silence of a model on a text: bits per byte, perplexity and the four numbers.

The four are never mixed: (a) `silent_fraction`, exact zeros in the vectors entering projections;
(b) `slot_sparsity`, empty slots of the spike trains, with their steps S; (c)
`weight_bytes_skipped_fraction`, of the whole model per token; (d) `spiking_tensors`.
"""

from __future__ import annotations

import logging
import lzma
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm import checkpoint
from spikelm.checkpoint import Checkpoint
from spikelm.coding.meter import Meter, code_of
from spikelm.corpus import builtin_documents
from spikelm.errors import CheckpointError, ConfigError, DataError
from spikelm.eval.traffic import num_parameters, weight_traffic
from spikelm.generate import Engine
from spikelm.kernels.precision import widen
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Probe
from spikelm.state import State
from spikelm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

PIECE_TOKENS = 1024
PROMPT_TOKENS = 16


def evaluate(
    source: str | Path | Checkpoint,
    documents: Sequence[str] | None = None,
    *,
    backend: str = "auto",
    decode_tokens: int = 64,
) -> dict[str, Any]:
    """Everything measured about the model folder `source`, as JSON types; a loaded one is taken
    as it is, and `backend` does not apply.

    `documents` are held-out texts (the built-in corpus' test split by default). Bits per byte
    count all nats, those of the end of every document included, over the texts' UTF-8 bytes.
    `state_bytes` are one sequence's after the text; `tokens_per_second` is the median speed of
    greedy decoding, one sequence, over `decode_tokens` steps.

    Raises: DataError for documents without text; CheckpointError for a folder that cannot be
    loaded or whose logits are broken.
    """
    if decode_tokens < 1:
        raise ConfigError(f"decode_tokens: {decode_tokens} given; allowed: 1 or more")
    texts = builtin_documents("test") if documents is None else documents
    size = len(_utf8(texts))
    loaded = source if isinstance(source, Checkpoint) else checkpoint.load(source, backend=backend)
    model, meter = loaded.model, Meter()
    stream = token_stream(loaded.tokenizer, texts)
    nats, state = score(model, stream, meter)
    tokens = stream.num_scored
    if not loaded.tokenizer.lossless:
        _log.warning(
            "this tokenizer does not keep every byte: bits per byte compare with other models "
            "only roughly, as lost bytes cost nothing"
        )
    # A perplexity beyond a float's range is a broken model's as well; NaN fails too.
    if not nats / tokens < 700:
        raise CheckpointError(
            f"{loaded.path} spends {nats / tokens:.3g} nats a token on this text; "
            "its weights are broken, train or convert it again"
        )
    traffic = weight_traffic(model)
    silence = traffic.silence(meter.tallies)
    return {
        "name": loaded.name,
        "path": str(loaded.path),
        "kind": "float" if loaded.manifest is None else "spike-coded",
        "backend": next(matrix.backend for matrix in traffic.matrices.values()),
        "parameters": num_parameters(model),
        "tokens": tokens,
        "bytes": size,
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / tokens),
        "silent_fraction": _total_first(meter.silent_fractions()),
        "slot_sparsity": slot_sparsity(meter),
        "weight_bytes_per_token": traffic.num_bytes,
        "spike_bytes_per_token": traffic.spike_bytes(silence),
        "weight_bytes_skipped_fraction": traffic.skipped_fraction(silence),
        "weight_bytes_skippable_fraction": traffic.skippable_fraction(silence),
        "spiking_tensors": [n.name for n in model.neurons() if n.config.kind != "off"],
        "tensors": len(silence),
        "state_bytes": state.nbytes,
        "state_grows": bool({"full", "parallel_full"} & set(model.config.mixers)),
        "tokens_per_second": decode_speed(
            Engine(loaded), stream.ids[:PROMPT_TOKENS], decode_tokens
        ),
    }


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents as one row of tokens, each begun by a token of its own."""

    ids: list[int]
    begins: list[bool]
    """Which tokens begin a document: the state is forgotten before them."""
    ends_are_scored: bool
    """Whether the token that begins a document also ends the one before, and is predicted."""

    @property
    def num_scored(self) -> int:
        """Tokens that are predicted: all but the first, or all that begin no document."""
        return len(self.ids) - 1 if self.ends_are_scored else self.begins.count(False)

    def first(self, count: int) -> Stream:
        """The stream cut after `count` tokens."""
        return Stream(self.ids[:count], self.begins[:count], self.ends_are_scored)


def token_stream(
    tokenizer: Tokenizer, documents: Iterable[str], enough: float = math.inf
) -> Stream:
    """bos document bos document ..., closed by eos where that is the same token.

    No further document is read behind `enough` tokens.
    """
    ids: list[int] = []
    begins: list[bool] = []
    for document in documents:
        text = tokenizer.encode(document)
        ids += [tokenizer.bos_id, *text]
        begins += [True, *[False] * len(text)]
        if len(ids) >= enough:
            break
    closed = not tokenizer.imported
    if closed:
        ids.append(tokenizer.eos_id)
        begins.append(True)
    return Stream(ids, begins, closed)


@torch.inference_mode()
def score(model: LanguageModel, stream: Stream, probe: Probe | None = None) -> tuple[float, State]:
    """Nats of predicting the scored tokens of `stream`, and the state after all but the last."""
    ids, begins = torch.tensor(stream.ids), torch.tensor(stream.begins)
    nats = 0.0
    state: State | None = None
    scored = torch.ones_like(begins) if stream.ends_are_scored else ~begins
    rows = (ids[:-1], begins[:-1], ids[1:], scored[1:])
    for inputs, opens, targets, counts in zip(*(r.split(PIECE_TOKENS) for r in rows), strict=True):
        logits, state = model(inputs[None], state, reset=opens[None], probe=probe)
        losses = F.cross_entropy(widen(logits[0]), targets, reduction="none").double()
        nats += float((losses * counts).sum())
    assert state is not None
    return nats, state


def slot_sparsity(meter: Meter) -> dict[str, dict[str, float]]:
    """Per spiking tensor class: share of empty slots in its spike trains, and their steps S."""
    classes = dict.fromkeys(t.neuron.tensor_class for t in meter.tallies.values())
    found = {}
    for name in classes:
        tallies = [t for t in meter.tallies.values() if t.neuron.tensor_class == name]
        code = code_of(tallies[0].neuron.config, max(t.largest for t in tallies))
        if code is not None:
            slots = code[1] * sum(t.entries for t in tallies)
            found[name] = {"value": 1 - sum(t.spikes for t in tallies) / slots, "steps": code[1]}
    return found


def decode_speed(engine: Engine, prompt: Sequence[int], steps: int) -> float:
    """Median tokens per second of greedy decoding after `prompt`."""
    seconds, _ = timed_decode(engine, *engine.prefill(prompt), steps)
    return 1 / statistics.median(seconds)


def timed_decode(
    engine: Engine, logits: Tensor, state: State, steps: int
) -> tuple[list[float], State]:
    """The seconds of `steps` greedy steps of one sequence from logits [1, N], and its state."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        logits, state = engine.step(logits.argmax(-1), state, in_place=True, within=0.0)
        seconds.append(time.perf_counter() - start)
    return seconds, state


def xz_bits_per_byte(documents: Sequence[str], training: Sequence[str] | None = None) -> float:
    """What `xz -9e` needs for the joined documents; with `training`, what they add to it."""
    held_out = _utf8(documents)
    before = b"" if training is None else _utf8(training)
    size = _packed_bytes(before + held_out) - (_packed_bytes(before) if before else 0)
    return 8 * size / len(held_out)


def _packed_bytes(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _utf8(documents: Sequence[str]) -> bytes:
    """All documents joined. Raises: DataError if there is nothing in them."""
    data = "".join(documents).encode("utf-8", "surrogatepass")
    if not data:
        raise DataError("there is no text to evaluate on; give documents that are not empty")
    return data


def _total_first(fractions: dict[str, float]) -> dict[str, float]:
    return {"total": fractions["total"], **fractions}
