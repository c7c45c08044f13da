"""Would fewer events pay? Two methods from vision, measured on a language model before it has them.

Delta activation (Yousefzadeh and Sifalakis 2021, "Training for temporal sparsity"): a projection
keeps its product and adds W d_t, where d_t = c_t - c_(t-1) are the changes of the counts. What
changes little from token to token is silent. Counts of an adaptive threshold do not telescope, so
c_t is what the neuron emits in units of one step per population: its mean threshold over the text.

Dynamic confidence (Li, Jones and Furber 2023): the product with the head is summed bit plane by bit
plane of the counts, high bit first, and stops when the softmax is sure of a token.

T tokens, C channels, E thresholds of change, P bit planes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm import checkpoint
from spikelm.corpus import builtin_documents
from spikelm.errors import ConfigError, DataError
from spikelm.eval.evaluate import Stream, score, token_stream
from spikelm.eval.traffic import Traffic, weight_traffic
from spikelm.kernels.precision import widen
from spikelm.models.layers import Projection
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron, Spikes

CHANGES = (1, 2, 4)
"""By how many counts a channel must have moved since its last event; 1 loses nothing."""
CONFIDENCES = (0.3, 0.5, 0.7, 0.9, 0.99)
MEASURED_TOKENS = 4096
LEVELS = 4096
"""Sizes of counts that are told apart."""
HEAD_TOKENS = 256
"""Tokens whose logits are held at a time."""


def bench_steps(
    path: str | Path,
    documents: Sequence[str] | None = None,
    *,
    tokens: int = MEASURED_TOKENS,
    backend: str = "auto",
) -> dict[str, Any]:
    """What both methods read and cost on the first `tokens` of `documents` (by default the built-in
    validation text), as JSON types.

    `delta` is by tensor class; its bytes are weight bytes per token of the whole model.
    `confidence` is of the head alone, or null with the reason in `confidence_missing`.

    Raises: ConfigError for fewer than 2 tokens or a model without spikes; DataError for no text.
    """
    if tokens < 2:
        raise ConfigError(f"--tokens {tokens} given; allowed: 2 or more")
    texts = builtin_documents("validation") if documents is None else documents
    if not any(texts):
        raise DataError("there is no text to measure on; give documents that are not empty")
    loaded = checkpoint.load(path, backend=backend)
    model = loaded.model
    stream = token_stream(loaded.tokenizer, texts).first(tokens + 1)
    traffic = weight_traffic(model)
    thresholds = MeanThresholds()
    score(model, stream, thresholds)
    # The tokens that a routed expert sees are no neighbours.
    together = {name for name, matrix in traffic.matrices.items() if matrix.share == 1}
    steps = {name: mean for name, mean in thresholds.means().items() if name in together}
    if not steps:
        raise ConfigError(f"no projection of {path} reads spikes; convert the model first")
    deltas, head = Deltas(steps, stream.begins), Inputs(model.head.neuron)

    def both(neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        deltas(neuron, x, spikes)
        head(neuron, x, spikes)

    score(model, stream, both)
    missing = _obstacle(model, head)
    return {
        "name": loaded.name,
        "path": str(path),
        "tokens": len(stream.ids) - 1,
        "delta": delta_report(deltas, traffic),
        "confidence": confidence(model.head, head, stream) if missing is None else None,
        "confidence_missing": missing,
    }


class MeanThresholds:
    """Probe: the mean threshold of every population that spikes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        if spikes.v_threshold is not None:
            v, (total, entries) = spikes.v_threshold, self._sums.get(neuron.name, (0.0, 0))
            self._sums[neuron.name] = total + float(v.double().sum()), entries + v.numel()

    def means(self) -> dict[str, float]:
        return {name: total / entries for name, (total, entries) in self._sums.items()}


class Deltas:
    """Probe: counts on a fixed step per population, and their changes from token to token.

    `steps` are the populations' fixed steps; `begins` says which of all tokens begin a document,
    at which every count is a change from 0.
    """

    def __init__(self, steps: Mapping[str, float], begins: Sequence[bool]) -> None:
        self.steps, self.begins = steps, begins
        self.classes: dict[str, str] = {}
        """Tensor class of every population."""
        self.sums: dict[str, dict[str, Tensor]] = {}
        """By population: `entries`; those not 0 with adaptive (`active`) and with fixed thresholds
        (`fixed`); by |c| [LEVELS], how many (`sizes`); by threshold of change
        [E]: `events`, and `error`, the squared distance of c from what was sent of it.
        """
        self._sent: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        name = neuron.name
        if name not in self.steps:
            return
        assert spikes.counts is not None
        counts = (spikes.values[0].float() / self.steps[name]).round()
        first = self._seen.get(name, 0)
        self._seen[name] = first + len(counts)
        begins = self.begins[first : self._seen[name]]
        before = self._sent.get(name, counts.new_zeros(len(CHANGES), counts.shape[1]))
        sent = send(counts, begins, before)
        past = torch.cat([before[None], sent[:-1]]) * ~torch.tensor(begins)[:, None, None]
        self._sent[name] = sent[-1]
        found = {
            "entries": torch.tensor(counts.numel()),
            "active": spikes.counts.count_nonzero(),
            "fixed": counts.count_nonzero(),
            "sizes": counts.abs().int().clamp(max=LEVELS - 1).flatten().bincount(minlength=LEVELS),
            "events": (sent != past).sum((0, 2)),
            "error": (sent - counts[:, None]).square().sum((0, 2), dtype=torch.float64),
        }
        self.classes[name] = neuron.tensor_class
        self.sums[name] = _total([self.sums[name], found]) if name in self.sums else found


def send(counts: Tensor, begins: Sequence[bool], sent: Tensor) -> Tensor:
    """What receivers hold of each channel [T, E, C] if changes of at least `CHANGES` are sent.

    counts [T, C]; begins [T]; sent [E, C] is what they held before. An event sends the whole change
    since the last one; a document begins at 0.
    """
    least = torch.tensor(CHANGES)[:, None]
    held = []
    for row, starts in zip(counts, begins, strict=True):
        if starts:
            sent = torch.zeros_like(sent)
        sent = torch.where((row - sent).abs() >= least, row, sent)
        held.append(sent)
    return torch.stack(held)


def delta_report(deltas: Deltas, traffic: Traffic) -> dict[str, Any]:
    """Silence by tensor class, and weight bytes per token of the whole model."""
    classes = {}
    for tensor_class in dict.fromkeys(deltas.classes.values()):
        names = [name for name, found in deltas.classes.items() if found == tensor_class]
        total = _total([deltas.sums[name] for name in names])
        squares = dropped_squares(total["sizes"], 0)
        classes[tensor_class] = {
            "silent": 1 - float(total["active"] / total["entries"]),
            "silent_fixed_step": 1 - float(total["fixed"] / total["entries"]),
            "silent_changes": (1 - total["events"] / total["entries"]).tolist(),
            "error": [float(error) / squares for error in total["error"]],
            "error_dead_zone": [
                dropped_squares(total["sizes"], int(kept)) / squares for kept in total["events"]
            ],
        }

    def read(active: Mapping[str, Tensor]) -> float:
        silence = {n: 1 - float(active[n] / s["entries"]) for n, s in deltas.sums.items()}
        return traffic.num_bytes * (1 - traffic.skippable_fraction(silence))

    events = {name: sums["events"] for name, sums in deltas.sums.items()}
    matrices = [traffic.matrices[name] for name in deltas.sums]
    return {
        "classes": classes,
        "changes": list(CHANGES),
        "bytes_without_silence": traffic.num_bytes,
        "bytes": read({name: sums["active"] for name, sums in deltas.sums.items()}),
        "bytes_fixed_step": read({name: sums["fixed"] for name, sums in deltas.sums.items()}),
        "bytes_changes": [read({n: e[i] for n, e in events.items()}) for i in range(len(CHANGES))],
        # Last counts and last products of every projection, four bytes each.
        "state_bytes": sum(4 * (m.in_features + m.out_features) for m in matrices),
    }


def dropped_squares(sizes: Tensor, kept: int) -> float:
    """sum c^2 of all but the `kept` largest |c|; `sizes` [LEVELS] says how many there are of each.

    At least 1, so that shares of it exist where nothing fires.
    """
    later = sizes.flip(0).cumsum(0).flip(0) - sizes
    stay = torch.minimum((kept - later).clamp(min=0), sizes)
    return max(1.0, float(((sizes - stay) * torch.arange(len(sizes)).square()).sum()))


def _total(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([found[key] for found in sums]).sum(0) for key in sums[0]}


class Inputs:
    """Probe: everything that one population got and emitted."""

    def __init__(self, neuron: Neuron) -> None:
        self.neuron = neuron
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, neuron: Neuron, x: Tensor, spikes: Spikes) -> None:
        if neuron is self.neuron and spikes.counts is not None and spikes.v_threshold is not None:
            size = widen(neuron.expanded(x[0])).abs()
            ratio = size / size.mean(-1, keepdim=True).clamp(min=1e-12)
            self._parts.append((ratio, spikes.counts[0].int(), spikes.v_threshold[0]))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def joined(self) -> list[Tensor]:
        """|x| / mean|x| [T, C], counts [T, C] and v_threshold [T, 1]."""
        return [torch.cat(parts) for parts in zip(*self._parts, strict=True)]


def _obstacle(model: LanguageModel, head: Inputs) -> str | None:
    """Why the head has no bit planes to stop at."""
    if not head:
        return "the head reads floats"
    if model.head_qk is not None:
        return "head-QK adds logits that are not the head's"
    if int(head.joined()[1].abs().max()) < 2:
        return "the head's counts have one bit plane"
    return None


class Verdict(NamedTuple):
    """What the head makes of every token's counts [T]."""

    confidence: Tensor
    """The softmax of the likeliest token."""
    token: Tensor
    """The likeliest token."""
    bits: Tensor
    """-log2 of the softmax of the token that came, float64."""


def judge(head: Projection, counts: Tensor, v_threshold: Tensor, targets: Tensor) -> Verdict:
    """counts [T, C], v_threshold [T, 1], targets [T]."""
    found = []
    parts = (tensor.split(HEAD_TOKENS) for tensor in (counts, v_threshold, targets))
    for c, v, target in zip(*parts, strict=True):
        c = c[None].to(v.dtype)
        logits = widen(head.linear(Spikes(c * v, c, v[None])))[0]
        best = logits.softmax(-1).max(-1)
        nats = F.cross_entropy(logits, target, reduction="none").double()
        found.append((best.values, best.indices, nats / math.log(2)))
    return Verdict(*(torch.cat(part) for part in zip(*found, strict=True)))


@torch.inference_mode()
def confidence(head: Projection, inputs: Inputs, stream: Stream) -> dict[str, Any]:
    """Early stop on the bit planes of the head's input, beside a dead zone of as many rows.

    Shares are of the rows that the plain event product reads, each once. A plane reads the rows of
    its own spikes, so a neuron that fires in several has its row read as often: `rows`. If a row
    that was read once cost nothing again, it were `rows_once`; the dead zone keeps as many entries,
    those of the largest |x| / mean|x|.
    """
    scored = torch.tensor(stream.begins[1:]).logical_not() | stream.ends_are_scored
    targets = torch.tensor(stream.ids[1:])[scored]
    ratio, counts, v = (tensor[scored] for tensor in inputs.joined())
    magnitude = counts.abs()
    planes = range(int(magnitude.max()).bit_length() - 1, -1, -1)
    known = [counts.sign() * (magnitude >> p << p) for p in planes]
    judged = [judge(head, c, v, targets) for c in known]
    verdicts = Verdict(*(torch.stack(parts) for parts in zip(*judged, strict=True)))
    spikes = torch.stack([(magnitude >> p & 1).sum(-1) for p in planes]).cumsum(0)
    once = torch.stack([c.count_nonzero(-1) for c in known])
    plain, full = int(once[-1].sum()), verdicts.token[-1]
    ratios = ratio[counts != 0].sort(descending=True).values

    def outcome(token: Tensor, bits: Tensor) -> dict[str, float]:
        return {
            "same_token": float((token == full).double().mean()),
            "bits_per_token": float(bits.mean()),
        }

    stops = []
    for threshold in CONFIDENCES:
        sure = verdicts.confidence >= threshold
        sure[-1] = True
        last = sure.int().argmax(0)[None]
        kept = int(once.gather(0, last).sum())
        zone = float(ratios[kept]) if kept < plain else 0.0
        zoned = judge(head, counts * (ratio > zone), v, targets)
        stops.append(
            {
                "confidence": threshold,
                "planes": float(last.double().mean()) + 1,
                "rows": int(spikes.gather(0, last).sum()) / plain,
                "rows_once": kept / plain,
                **outcome(verdicts.token.gather(0, last)[0], verdicts.bits.gather(0, last)[0]),
                "dead_zone": {"ratio": zone, **outcome(zoned.token, zoned.bits)},
            }
        )
    return {
        "planes": len(planes),
        "rows": int(spikes[-1].sum()) / plain,
        "bits_per_token": float(verdicts.bits[-1].mean()),
        "stops": stops,
    }
