"""What each process of `test_context.py` does, started by torchrun on a folder: it runs the
commands in commands.json, and compares slices of rows with whole rows, in float64. Rank 0 writes
how far they are apart to errors.json: {model: {slices: error}}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor

from spikelm.config import (
    AttentionConfig,
    DeltaConfig,
    ExpertsConfig,
    FFNConfig,
    GLAConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    RWKV7Config,
)
from spikelm.models.spikelm import LanguageModel
from spikelm.state import State
from spikelm_train.cli import main
from spikelm_train.context import Slices
from spikelm_train.data import Batch
from spikelm_train.objective import Objective
from spikelm_train.silence import Silence

EOS, LENGTH, ROWS, STEPS = 0, 84, 2, 2
SIZES = {"delta, window": (2, 3, 4), "wkv4, LIF": (2, 3, 4)}
"""Slices of a row; four for all other models."""

LIF = NeuronConfig(kind="lif", v_threshold=0.3)
INTEGER = NeuronConfig(kind="integer", k=4.0, dead_zone=0.3, learn=True)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8}
DELTA = DeltaConfig(num_heads=2, key_dim=8, value_dim=12, gate_rank=8)
KDA = dataclasses.replace(DELTA, gates="tied")
GATED = FFNConfig(kind="reglu", hidden_dim=24)
# A window that is longer than a slice of 21 tokens, shorter than one of 28.
WINDOW = AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, window=25, sinks=2, rope_theta=1e4, qk_norm=True
)

MODELS: dict[str, dict[str, Any]] = {
    "delta, window": {
        "mixers": ("delta", "window", "delta"),
        "neurons": NeuronsConfig(
            mixer_input=INTEGER,
            queries_keys=INTEGER,
            attention_queries=INTEGER,
            ffn_hidden=dataclasses.replace(INTEGER, unsigned=True),
        ),
    },
    "kda": {"mixers": ("delta", "delta"), "delta": KDA},
    "gated deltanet": {"delta": dataclasses.replace(KDA, decay="scalar")},
    "deltanet": {"delta": dataclasses.replace(KDA, decay="none")},
    "gla": {"mixers": ("gla", "gla"), "gla": GLAConfig(**HEADS, gate_rank=4)},  # type: ignore[arg-type]
    "parallel": {
        "mixers": ("parallel", "gla"),
        "gla": GLAConfig(**HEADS, decay="tied", feature_map="sigmoid"),  # type: ignore[arg-type]
    },
    "rwkv7": {
        "mixers": ("rwkv7", "rwkv7"),
        "rwkv7": RWKV7Config(head_dim=8, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4),
    },
    "wkv4, LIF": {
        "mixers": ("channel_mix", "wkv4", "wkv4"),
        "ffn": FFNConfig(hidden_dim=40, receptance=True),
        "neurons": NeuronsConfig(mixer_residual=LIF, ffn_residual=LIF),
    },
    "membranes without gradient, soft ones": {
        "mixers": ("wkv4", "delta"),
        "ffn": dataclasses.replace(GATED, token_shift=True),
        "neurons": NeuronsConfig(
            mixer_input=dataclasses.replace(LIF, detach_membrane=True),
            ffn_residual=dataclasses.replace(LIF, softness=0.2, learn=True),
        ),
    },
    "experts": {
        "ffn": dataclasses.replace(
            GATED, experts=ExpertsConfig(num_experts=3, top_k=2, balance=0.0)
        )
    },
}


def make_model(fields: dict[str, Any]) -> LanguageModel:
    shape = {"mixers": ("delta", "window"), "delta": DELTA, "attention": WINDOW} | fields
    ffn = shape.pop("ffn", FFNConfig(hidden_dim=40))
    config = ModelConfig(vocab_size=24, width=32, ffn=ffn, **shape)
    return LanguageModel(config).initialise(3).double().train()


def make_rows(seed: int) -> Batch:
    """One row of a single document; one with several, which begin at the borders of slices too."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 24, (ROWS, LENGTH + 1), generator=generator)
    tokens[1, [5, 20, 28, 42, 62, 63, 77]] = EOS
    inputs = tokens[:, :-1]
    return Batch(inputs, tokens[:, 1:], inputs == EOS)


def loss_of(model: LanguageModel, batch: Batch, slices: Slices | None) -> tuple[Tensor, State]:
    """The objective as the loop has it, L1 and z-loss included."""
    objective, silence = Objective(z_weight=0.1), Silence(model.neurons(), 0.1)
    silence.penalise = True
    losses: list[Tensor] = []
    state = handover = None
    if slices is not None:
        batch, state, handover = slices.take(batch, model)
    output, state = model(
        batch.inputs,
        state,
        reset=batch.reset,
        probe=silence,
        losses=losses,
        handover=handover,
    )
    if handover is not None:
        losses.append(handover.end)
    loss, more = objective.terms(output, batch.targets)
    return sum([*losses, *more, 0.1 * silence.take_l1()], start=loss), state


def train(
    fields: dict[str, Any], slices: Slices | None, seeds: list[int], ranks: int
) -> list[Tensor]:
    """Losses, first gradients and last parameters of a few steps of plain descent on the rows of
    `seeds`, one after the other; averaged over the first `ranks` processes.
    """
    model = make_model(fields)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, first = [], []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        if dist.get_rank() < ranks:
            for seed in seeds:
                loss, _ = loss_of(model, make_rows(100 * step + seed), slices)
                (loss / len(seeds)).backward()
                if slices is not None:
                    slices.settle()
                total += loss.detach() / len(seeds)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if slices is not None:
            flat = torch.cat([total[None], *(g.flatten() for g in gradients)])
            dist.all_reduce(flat)
            flat /= ranks
            total = flat[0]
            sizes = [g.numel() for g in gradients]
            parts = flat[1:].split(sizes)
            gradients = [x.view_as(g) for x, g in zip(parts, gradients, strict=True)]
        losses.append(total)
        first = first or [g.clone() for g in gradients]
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= 0.05 * gradient
                p.grad = None
    return [*losses, *first, *(p.detach() for p in parameters)]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of its tensor."""
    return max(
        float((x - y).abs().max() / y.abs().max().clamp(min=1e-3))
        for x, y in zip(a, b, strict=True)
    )


def state_apart(fields: dict[str, Any], slices: Slices, ranks: int) -> float:
    """How far the state behind the last slice is from the one behind the row."""
    model, rows = make_model(fields), make_rows(7)
    if dist.get_rank() >= ranks:
        return 0.0
    with torch.no_grad():
        _, expected = loss_of(model, rows, None)
        _, found = loss_of(model, rows, slices)
    slices.settle()
    if slices.after is not None:
        return 0.0
    assert torch.equal(found.position, expected.position)
    layers = list(zip(found.layers, expected.layers, strict=True))
    assert all(a.keys() == b.keys() for a, b in layers)
    return apart(*([t for pair in layers for _, t in sorted(pair[i].items())] for i in (0, 1)))


def errors(rank: int, ranks: int) -> Iterator[tuple[str, int, float]]:
    slices = {size: Slices(rank, size) for size in (2, 3, 4)}
    for name, fields in MODELS.items():
        whole: dict[int, list[Tensor]] = {}
        for size in SIZES.get(name, (4,)):
            groups = ranks // size
            used, mine = groups * size, rank // size
            found = train(fields, slices[size], [mine, mine + groups], used)
            worst = state_apart(fields, slices[size], used)
            if rank == 0:
                if groups not in whole:
                    whole[groups] = train(fields, None, list(range(2 * groups)), 1)
                worst = max(worst, apart(found, whole[groups]))
            largest = torch.tensor(worst)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            yield name, size, float(largest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for arguments in json.loads((folder / "commands.json").read_text()):
        AcceleratorState._reset_state(True)
        if status := main(arguments):
            sys.exit(status)
    torch.set_flush_denormal(False)
    measured: dict[str, dict[int, float]] = {}
    for name, size, error in errors(dist.get_rank(), dist.get_world_size()):
        measured.setdefault(name, {})[size] = error
    if dist.get_rank() == 0:
        (folder / "errors.json").write_text(json.dumps(measured))
    dist.destroy_process_group()
