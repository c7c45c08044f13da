"""Decode speed on models of a preset's shape: ours at chosen silence, beside other programs.

Weights are random, as time does not depend on them, and thresholds are calibrated until the
silence is what was asked for. Every contestant lives in a process of its own; they take turns in
rounds, and ratios are formed within a round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any

from spikelm.config import (
    TENSOR_CLASSES,
    WEIGHTLESS_CLASSES,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
)
from spikelm.errors import ConfigError, did_you_mean
from spikelm.eval.gguf import (
    Quantisation,
    bytes_read,
    kind_of,
    transformer_twin,
    write_gguf,
)
from spikelm.eval.kernel import random_counts, shape_of, spread
from spikelm.eval.load import busy
from spikelm.eval.peers import (
    Contestant,
    LlamaCpp,
    Reader,
    Rwkv,
    Seconds,
    Spawned,
    Transformers,
    write_pth,
)

if TYPE_CHECKING:
    from spikelm.kernels.measure import Passes
    from spikelm.kernels.rows import RowMatrix
    from spikelm.models.spikelm import LanguageModel

PEERS = ("dense", "llama.cpp", "transformers", "rwkv")
HIDDEN = "ffn_hidden"
CALIBRATION_TOKENS = 24
CALIBRATION_ROUNDS = 2
IDS = 64
PASSES = 3
# Vectors less silent than this have their matrix read in order.
SKIPPING_SILENCE = 0.3
# Counts per mean |x|: nearly all of a vector fires, or what the dead zone lets through has some
# steps of size.
DENSE_K, SPIKING_K = 64.0, 4.0

_log = logging.getLogger(__name__)


def bench_decode(
    preset: str,
    *,
    silence: float = 0.8,
    hidden_silence: float | None = None,
    bits: int = 8,
    threads: int = 1,
    against: Sequence[str] = ("dense",),
    rounds: int = 4,
    tokens: int = 12,
    position: int = 0,
    load: int = 0,
    batch: int = 1,
    peer_model: str | None = None,
) -> dict[str, Any]:
    """Median times per token and ratios to ours, as JSON types.

    `silence` is the silent fraction of every vector that enters a matrix, `hidden_silence` that of
    the FFN's hidden vector (the same by default). `bits` are those of our weights (the head has 8)
    and decide llama.cpp's: Q8_0 or Q4_0. Behind `position` tokens that are not read.

    A step decodes a token for each of `batch` sequences, and a token's time is its share of that;
    other programs than ours take part with one sequence only.

    Other programs run a model of the same shape, or of `peer_model`'s; transformers, which has no
    RWKV-7, a Transformer with as many parameters.

    With `load`, every round is run once more while so many other processes each keep a core busy,
    and `slowdown` says what that does to everyone.

    `preset` is a preset's name or file, or a model folder, whose shape is taken. `dense` is our own
    decoder where neurons silence nothing; what a ReLU makes 0 it skips as well.

    Raises: ConfigError for what is not allowed, BackendError if a contestant fails,
    MissingExtraError if its package is not there.
    """
    _check_position(position, batch, against)
    found = contest(
        preset,
        lambda contestant: contestant.decode_at(position, tokens),
        silence=silence,
        hidden_silence=hidden_silence,
        bits=bits,
        threads=threads,
        against=against,
        rounds=rounds,
        tokens=tokens,
        batch=batch,
        load=load,
        peer_model=peer_model,
        limit=batch == 1,
        context=position + 2 * tokens,
        divisor=batch,
    )
    return found | {"position": position, "batch": batch}


def contest(
    preset: str,
    turn: Callable[[Contestant], Sequence[Seconds]],
    *,
    silence: float,
    hidden_silence: float | None,
    bits: int,
    threads: int,
    against: Sequence[str],
    rounds: int,
    tokens: int,
    context: int,
    divisor: int,
    batch: int = 1,
    load: int = 0,
    peer_model: str | None = None,
    limit: bool = False,
) -> dict[str, Any]:
    """The report of contestants that take turns; each turn's median counts, by `divisor` tokens.

    `limit` asks for what memory allows one token at a time.
    """
    hidden_silence = silence if hidden_silence is None else hidden_silence
    _check(silence, hidden_silence, bits, threads, against, rounds, tokens)
    _at_least("load", load, 0)
    config, theirs = shape_of(preset), shape_of(peer_model or preset)
    _check_peers(against, theirs)
    results: dict[str, list[tuple[float, float]]] = {}
    loaded: dict[str, list[tuple[float, float]]] = {}
    rates: list[dict[str, float]] = []
    contestants: dict[str, Contestant] = {}
    facts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        ours = {"spikelm": (silence, hidden_silence), "dense": (0.0, 0.0)}
        for name in ("spikelm", *against):
            contestant: Contestant
            if name in ours:
                about = (config, *ours[name], bits, threads, batch)
                label, contestant = name, Spawned(name, OurReader, *about)
            else:
                label, contestant = _peer(name, theirs, Path(folder), bits, threads, context)
            stack.callback(contestant.close)
            contestants[label] = contestant
            _log.info("%s is ready", label)
        for round_number in range(rounds):
            for found, processes in ((results, 0), (loaded, load))[: 1 + bool(load)]:
                with busy(processes):
                    for label, contestant in contestants.items():
                        seconds = turn(contestant)
                        wall = statistics.median(s.wall for s in seconds) / divisor
                        cpu = statistics.median(s.cpu for s in seconds) / divisor
                        found.setdefault(label, []).append((wall, cpu))
                        _log.info("round %d, %s: %.2f ms", round_number + 1, label, 1e3 * wall)
            if limit:
                rates.append(contestants["spikelm"].bandwidth(threads))
        for label, contestant in contestants.items():
            facts[label] = {"resident_bytes": contestant.resident_bytes(), **contestant.facts()}
    own = results["spikelm"]

    def ratios(
        above: list[tuple[float, float]], below: list[tuple[float, float]]
    ) -> dict[str, dict[str, float]]:
        pairs = list(zip(above, below, strict=True))
        return {
            kind: spread([a[i] / b[i] for a, b in pairs]) for i, kind in enumerate(("wall", "cpu"))
        }

    return {
        "preset": preset,
        "peer_model": peer_model or preset,
        "bits": bits,
        "silence_asked_for": {"inputs": silence, HIDDEN: hidden_silence},
        "threads": threads,
        "rounds": rounds,
        "tokens": tokens,
        "contestants": [
            {
                "name": label,
                "ms_per_token": 1e3 * statistics.median(wall for wall, _ in found),
                "cpu_ms_per_token": 1e3 * statistics.median(cpu for _, cpu in found),
                **facts[label],
            }
            for label, found in results.items()
        ],
        "ratios": {
            label: ratios(found, own) for label, found in results.items() if label != "spikelm"
        },
        "limit": _limit(facts["spikelm"], rates, [cpu / threads for _, cpu in own])
        if limit
        else None,
        "load": load,
        "slowdown": {label: ratios(found, results[label]) for label, found in loaded.items()},
    }


def _peer(
    name: str, shape: ModelConfig, folder: Path, bits: int, threads: int, context: int
) -> tuple[str, Contestant]:
    """Another program, with what to call it."""
    if name == "llama.cpp":
        quantisation: Quantisation = "Q8_0" if bits == 8 else "Q4_0"
        file = folder / "model.gguf"
        write_gguf(file, shape, quantisation=quantisation)
        read = bytes_read(shape, quantisation)
        llama = LlamaCpp(file, threads, context=max(4096, context), bytes_per_token=read)
        return f"{name} {quantisation}", llama
    if name == "transformers":
        # It has no RWKV-7.
        twin = transformer_twin(shape) if kind_of(shape) == "rwkv7" else shape
        return name, Transformers(twin, threads)
    file = folder / "model.pth"
    write_pth(file, shape)
    return name, Rwkv(file, threads)


def _limit(
    facts: dict[str, Any], rates: list[dict[str, float]], seconds: list[float]
) -> dict[str, Any]:
    """What memory allows: listed rows at the rate of `touch`, or of `stream` at the very best,
    everything else at that of `stream`, the state read and written. By CPU time per thread.
    """
    rows, ordered = facts["row_bytes"], facts["bytes_per_token"] - facts["row_bytes"]
    ordered += 2 * facts["state_bytes"]
    limits = {
        name: [rows / rate[name] + ordered / rate["stream"] for rate in rates]
        for name in ("touch", "stream")
    }
    read = facts["bytes_per_token"]
    return {
        "weights_gb_per_s": spread([read / s / 1e9 for s in seconds]),
        **{f"{name}_gb_per_s": spread([rate[name] / 1e9 for rate in rates]) for name in limits},
        "ms_per_token": 1e3 * statistics.median(limits["touch"]),
        "ms_per_token_at_stream": 1e3 * statistics.median(limits["stream"]),
        "ours_over": spread([s / t for s, t in zip(seconds, limits["touch"], strict=True)]),
        "ours_over_at_stream": spread(
            [s / t for s, t in zip(seconds, limits["stream"], strict=True)]
        ),
    }


def parse_silence(text: str) -> tuple[float, float | None]:
    """The numbers of "0.8" or "0.5,0.85". Raises: ConfigError."""
    try:
        silence, *hidden = map(float, text.split(","))
        second = hidden.pop() if hidden else None
        if hidden:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--silence takes one number like 0.8 or two like 0.5,0.85, got '{text}'"
        ) from None
    return silence, second


def _check(
    silence: float,
    hidden_silence: float,
    bits: int,
    threads: int,
    against: Sequence[str],
    rounds: int,
    tokens: int,
) -> None:
    for name, value in (("silence", silence), ("hidden silence", hidden_silence)):
        if not 0 <= value < 1:
            raise ConfigError(f"{name}: {value} given; allowed: 0 <= silence < 1")
    if bits not in (8, 4):
        raise ConfigError(f"bits: {bits} given; allowed: 8, 4")
    for name, count, low in (
        ("threads", threads, 1),
        ("rounds", rounds, 1),
        ("tokens", tokens, 1),
    ):
        _at_least(name, count, low)
    for peer in against:
        if peer not in PEERS:
            raise ConfigError(f"against: '{peer}' given; {did_you_mean(peer, PEERS)}")


def _check_peers(against: Sequence[str], shape: ModelConfig) -> None:
    """Whether other programs have such layers, before anything is built."""
    others = [peer for peer in against if peer != "dense"]
    if not others:
        return
    try:
        kind = kind_of(shape)
    except ConfigError as error:
        raise ConfigError(f"{error}; give {', '.join(others)} another one: --peer-model") from None
    if "rwkv" in others and kind != "rwkv7":
        raise ConfigError("the rwkv package reads shapes with rwkv7 layers; leave it out")


def _at_least(name: str, count: int, low: int) -> None:
    if count < low:
        raise ConfigError(f"{name}: {count} given; allowed: an integer >= {low}")


def _check_position(position: int, batch: int, against: Sequence[str]) -> None:
    _at_least("position", position, 0)
    _at_least("batch", batch, 1)
    others = [peer for peer in against if peer != "dense"]
    if batch > 1 and others:
        raise ConfigError(
            f"batch: {batch} given against {', '.join(others)}; several sequences at once are "
            "measured against dense only"
        )


class OurReader(Reader):
    """Our decoder, in the process of a contestant: `batch` sequences if a token is read at a time.

    Many tokens are read as the engine reads a prompt, of one sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        silence: float,
        hidden: float,
        bits: int,
        threads: int,
        batch: int = 1,
    ) -> None:
        import torch

        from spikelm.decoder import native_program
        from spikelm.decoder.program import Counts
        from spikelm.errors import BackendError
        from spikelm.eval.traffic import weight_traffic

        torch.set_num_threads(threads)
        self.model = random_model(config, silence, hidden, bits)
        self.traffic = weight_traffic(self.model)
        program, obstacle = native_program(self.model)
        if program is None:
            raise BackendError(f"this model does not decode natively: {obstacle}")
        self.program, self.batch = program, batch
        self.counts, self.tokens = Counts(), 0
        self.silence = self._silence()
        self.passes: Passes | None = None

    def _silence(self) -> dict[str, float]:
        """Of every population, on some tokens."""
        import torch

        from spikelm.coding.meter import Meter

        meter = Meter()
        with torch.inference_mode():
            self.model(torch.arange(CALIBRATION_TOKENS)[None], probe=meter, last_only=True)
        return {name: tally.silent_fraction for name, tally in meter.tallies.items()}

    def hold(self, tokens: int) -> None:
        import torch

        self.state = self.model.initial_state(self.batch).clone()
        self.state.position.fill_(tokens)
        self.seen = 0
        # Sequences read other tokens: their spikes differ.
        N, rows = self.model.config.vocab_size, torch.arange(self.batch) * 104_729
        self.ids = [(rows + seen * 7919) % N for seen in range(IDS)]

    def read(self, tokens: int) -> None:
        import torch

        from spikelm.decoder.program import Counts
        from spikelm.generate import run

        N = self.model.config.vocab_size
        if tokens == 1:
            # As a greedy generation does.
            ids = self.ids[self.seen % IDS]
            _, counts = self.program.run(ids, self.state, within=0.0)
        elif self.program.reads_prompts:
            ids = (self.seen + torch.arange(tokens)) * 7919 % N
            _, counts = self.program.read(ids, self.state)
        else:
            ids, counts = (self.seen + torch.arange(tokens)) * 7919 % N, Counts()
            with torch.inference_mode():
                _, self.state = run(self.model, ids[None], self.state, reset_id=None)
        self.counts = Counts(*map(operator.add, self.counts, counts))
        self.seen += tokens
        self.tokens += tokens * self.batch

    def bandwidth(self, threads: int) -> dict[str, float]:
        """Bytes per second of CPU time that reading the weights without arithmetic reaches: all of
        them in order, and the rows of vectors as silent as ours.
        """
        self.passes = self.passes or self._passes()
        seconds = {}
        for name in ("touch", "stream"):
            times = []
            for _ in range(PASSES):
                begun = process_time()
                getattr(self.passes, name)(threads)
                times.append((process_time() - begun) / threads)
            # A limit is what comes closest to undisturbed.
            seconds[name] = min(times)
        stream = self.passes.num_bytes / seconds["stream"]
        return {"stream": stream, "touch": self.passes.event_bytes / seconds["touch"]}

    def _skips(self, name: str) -> bool:
        return self.silence.get(name, 0.0) > SKIPPING_SILENCE

    def _passes(self) -> Passes:
        import torch

        from spikelm.kernels.measure import Passes
        from spikelm.models.coded import CodedLinear, projections

        generator = torch.Generator().manual_seed(0)
        matrices, counts = [], []
        for projection in projections(self.model):
            linear, name = projection.linear, projection.neuron.name
            assert isinstance(linear, CodedLinear)
            # What is read in order has no rows to gather, unless that is everything.
            if self._skips(name) or not any(map(self._skips, self.silence)):
                matrices.append(_rows(linear.table))
                silence = self.silence.get(name, 0.0)
                counts.append(random_counts(linear.in_features, silence, generator))
        return Passes(matrices, counts)

    def facts(self) -> dict[str, Any]:
        """What the time belongs to."""
        from spikelm.models.coded import projections

        counts, tokens = self.counts, max(1, self.tokens)
        return {
            "silent_fraction": counts.silent / max(1, counts.total),
            "bytes_per_token": self.traffic.other_bytes + counts.weight_bytes / tokens,
            "row_bytes": sum(
                (1 - self.silence[p.neuron.name]) * _rows(p.linear.table).nbytes
                for p in projections(self.model)
                if self._skips(p.neuron.name)
            ),
            "weight_bytes": self.traffic.num_bytes,
            "state_bytes": self.model.initial_state(1).nbytes,
        }


def _rows(table: object) -> RowMatrix:
    """The part of a matrix that is read by input."""
    from spikelm.kernels.outputs import Gated, Halves
    from spikelm.kernels.rows import RowMatrix

    rows = table.upper if isinstance(table, Halves) else table
    rows = rows.gates if isinstance(rows, Gated) else rows
    assert isinstance(rows, RowMatrix)
    return rows


def random_model(config: ModelConfig, silence: float, hidden: float, bits: int) -> LanguageModel:
    """A spike-coded model with random weights, packed for native code, as silent as asked for.

    The narrow vectors in front of low-rank gates all fire; queries and keys are floats.
    """
    import torch

    from spikelm.coding.meter import DeadZones
    from spikelm.kernels import event
    from spikelm.models.coded import CodedLinear, projections, use_coded_linears, use_two_stages
    from spikelm.models.layers import reset_parameters
    from spikelm.models.spikelm import LanguageModel

    def neuron(fraction: float, *, unsigned: bool = False) -> NeuronConfig:
        k = SPIKING_K if fraction else DENSE_K
        return NeuronConfig(kind="integer", k=k, max_count=127, unsigned=unsigned)

    wanted = dict.fromkeys(TENSOR_CLASSES, silence) | {HIDDEN: hidden, "gate_input": 0.0}
    relu = config.ffn.kind == "channel_mix"
    neurons = {
        name: neuron(fraction, unsigned=relu and name == HIDDEN)
        for name, fraction in wanted.items()
        if name not in WEIGHTLESS_CLASSES
    }
    config = dataclasses.replace(config, neurons=NeuronsConfig(**neurons))
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = LanguageModel(config)
        names = [projection.neuron.name for projection in projections(model)]
        use_coded_linears(model, 1, dict.fromkeys(names, bits) | {"head": 8})
        use_two_stages(model)
    for projection in projections(model):
        linear = projection.linear
        assert isinstance(linear, CodedLinear)
        K, N = linear.in_features, linear.out_features
        top = 2 ** (linear.bits - 1)
        weight = torch.randint(1 - top, top, (K, N), dtype=torch.int8, generator=generator)
        linear.weight, linear.backend = None, "native"
        linear.table = event.pack(weight, "native", linear.bits, linear.layout)
        # Weights of variance 1 / K.
        linear.scale = torch.full((N,), (3 / K) ** 0.5 / top)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    empty = torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
                    setattr(module, name, empty)
            reset_parameters(module)
    model.eval()
    ids = torch.randint(0, config.vocab_size, (1, CALIBRATION_TOKENS), generator=generator)
    with torch.inference_mode():
        for _ in range(CALIBRATION_ROUNDS):
            histograms = DeadZones()
            model(ids, probe=histograms, last_only=True)
            for population in model.neurons():
                fraction = wanted[population.tensor_class]
                spikes = population.tensor_class in neurons
                if spikes and fraction and population.name in histograms.histograms:
                    zone = histograms.quantile(population.name, fraction)
                    population.dead_zone.fill_(zone)
    return model
