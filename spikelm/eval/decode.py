"""Decode speed on models of a preset's shape: ours at chosen silence, beside other programs.

Weights are random, as time does not depend on them, and thresholds are calibrated until the
silence is what was asked for. Every contestant lives in a process of its own; they take turns in
rounds, and ratios are formed within a round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.config import (
    TENSOR_CLASSES,
    WEIGHTLESS_CLASSES,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    load_model_config,
)
from spikelm.errors import ConfigError, did_you_mean
from spikelm.eval.gguf import write_gguf
from spikelm.eval.peers import (
    Contestant,
    LlamaCpp,
    Reader,
    Rwkv,
    Spawned,
    Transformers,
    write_pth,
)

if TYPE_CHECKING:
    from spikelm.models.spikelm import LanguageModel

PEERS = ("dense", "llama.cpp", "transformers", "rwkv")
HIDDEN = "ffn_hidden"
CALIBRATION_TOKENS = 24
CALIBRATION_ROUNDS = 2
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
) -> dict[str, Any]:
    """Median times per token and ratios to ours, as JSON types.

    `silence` is the silent fraction of every vector that enters a matrix, `hidden_silence` that of
    the FFN's hidden vector (the same by default). `bits` are those of our weights (the head has 8)
    and decide llama.cpp's: Q8_0 or Q4_0. Behind `position` tokens that are not read.

    `dense` is our own decoder with nothing silent. Raises: ConfigError for what is not allowed,
    BackendError if a contestant fails, MissingExtraError if its package is not there.
    """
    hidden_silence = silence if hidden_silence is None else hidden_silence
    _check(silence, hidden_silence, bits, threads, against, rounds, tokens, position)
    config = load_model_config(preset)
    llama = {8: "Q8_0", 4: "Q4_0"}[bits]
    results: dict[str, list[tuple[float, float]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        contestants: dict[str, Contestant] = {}

        def enter(label: str, contestant: Contestant) -> None:
            stack.callback(contestant.close)
            contestants[label] = contestant
            _log.info("%s is ready", label)

        own = (config, silence, hidden_silence, bits, threads)
        enter("spikelm", Spawned("spikelm", OurReader, *own))
        for peer in against:
            if peer == "dense":
                enter("dense", Spawned("dense", OurReader, config, 0.0, 0.0, bits, threads))
            elif peer == "llama.cpp":
                file = Path(folder) / "model.gguf"
                write_gguf(file, config, quantisation=llama)  # type: ignore[arg-type]
                context = max(4096, position + 2 * tokens)
                enter(f"llama.cpp {llama}", LlamaCpp(file, threads, context=context))
            elif peer == "transformers":
                enter("transformers", Transformers(config, threads))
            else:
                file = Path(folder) / "model.pth"
                write_pth(file, config)
                enter("rwkv", Rwkv(file, threads))
        for round_number in range(rounds):
            for label, contestant in contestants.items():
                seconds = contestant.decode_at(position, tokens)
                wall = statistics.median(s.wall for s in seconds)
                cpu = statistics.median(s.cpu for s in seconds)
                results.setdefault(label, []).append((wall, cpu))
                _log.info("round %d, %s: %.2f ms", round_number + 1, label, 1e3 * wall)
        for label, contestant in contestants.items():
            facts[label] = {"resident_bytes": contestant.resident_bytes(), **contestant.facts()}
    ours = results["spikelm"]
    return {
        "preset": preset,
        "bits": bits,
        "silence_asked_for": {"inputs": silence, HIDDEN: hidden_silence},
        "threads": threads,
        "rounds": rounds,
        "tokens": tokens,
        "position": position,
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
            label: {
                kind: _spread(
                    [theirs[i] / mine[i] for theirs, mine in zip(found, ours, strict=True)]
                )
                for i, kind in enumerate(("wall", "cpu"))
            }
            for label, found in results.items()
            if label != "spikelm"
        },
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


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _check(
    silence: float,
    hidden_silence: float,
    bits: int,
    threads: int,
    against: Sequence[str],
    rounds: int,
    tokens: int,
    position: int,
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
        ("position", position, 0),
    ):
        if count < low:
            raise ConfigError(f"{name}: {count} given; allowed: an integer >= {low}")
    for peer in against:
        if peer not in PEERS:
            raise ConfigError(f"against: '{peer}' given; {did_you_mean(peer, PEERS)}")


class OurReader(Reader):
    """Our decoder, in the process of a contestant."""

    def __init__(
        self, config: ModelConfig, silence: float, hidden: float, bits: int, threads: int
    ) -> None:
        import torch

        from spikelm.decoder import native_program
        from spikelm.errors import BackendError
        from spikelm.eval.traffic import weight_traffic

        torch.set_num_threads(threads)
        self.model = random_model(config, silence, hidden, bits)
        self.traffic = weight_traffic(self.model)
        program, obstacle = native_program(self.model)
        if program is None:
            raise BackendError(f"this model does not decode natively: {obstacle}")
        self.program = program
        self.counts, self.tokens = [0, 0, 0], 0

    def hold(self, tokens: int) -> None:
        self.state = self.model.initial_state(1).clone()
        self.state.position.fill_(tokens)
        self.seen = 0

    def read(self, tokens: int) -> None:
        import torch

        for _ in range(tokens):
            token = self.seen * 7919 % self.model.config.vocab_size
            # As a greedy generation does.
            _, counts = self.program.run(torch.tensor([token]), self.state, within=0.0)
            self.seen += 1
            self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
            self.tokens += 1

    def facts(self) -> dict[str, Any]:
        """What the time belongs to."""
        silent, total, weight_bytes = self.counts
        return {
            "silent_fraction": silent / max(1, total),
            "bytes_per_token": self.traffic.other_bytes + weight_bytes / max(1, self.tokens),
            "weight_bytes": self.traffic.num_bytes,
            "state_bytes": self.model.initial_state(1).nbytes,
        }


def random_model(config: ModelConfig, silence: float, hidden: float, bits: int) -> LanguageModel:
    """A spike-coded model with random weights, packed for native code, as silent as asked for.

    The narrow vectors in front of low-rank gates all fire.
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
                if fraction and population.name in histograms.histograms:
                    zone = histograms.quantile(population.name, fraction)
                    population.dead_zone.fill_(zone)
    return model
