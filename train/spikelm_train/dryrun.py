"""`spikelm train --dry-run`: what a run is, needs and takes, two steps of it really run."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spikelm.errors import ConfigError
from spikelm.eval import process
from spikelm.eval.tables import size
from spikelm_train import cost, hardware
from spikelm_train.config import TrainConfig
from spikelm_train.data import prepare
from spikelm_train.optim import lr_factor
from spikelm_train.parallel import make_accelerator, resolve_precision
from spikelm_train.report import duration
from spikelm_train.trainer import Trainer

SAMPLED_BYTES = 4_000_000
"""Text that the two steps are run on, at most; the whole corpus may take hours to tokenise."""


def plan(config: TrainConfig, context: int = 1) -> dict[str, Any]:
    """What can be said without a step, as JSON types; sizes in bytes, per process.

    `fits` is null where nobody says how much memory there is, or how processes share it. `context`
    processes share a row.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.precision)
    length = config.data.sequence_length
    processes = world_size()
    tokens = config.micro_batch_size * config.grad_accum_steps * length
    kinds = cost.parameters_by_kind(cost.meta_model(config.model))
    marks = sorted({0.0, config.optim.warmup_fraction, 0.5, 0.9, 1.0})
    found: dict[str, Any] = {
        "parameters": {"total": sum(kinds.values()), **kinds},
        "tokens_per_step": tokens * processes // context,
        "processes": processes,
        "steps": config.steps,
        "tokens": config.steps * tokens * processes // context,
        "max_seconds": config.max_seconds,
        "learning_rate": {f"{m:.0%}": config.optim.lr * lr_factor(config.optim, m) for m in marks},
        "device": device.type,
        "precision": precision,
        "state_bytes": cost.state_bytes(config.model),
        "memory_present": cost.present_bytes(device),
    }
    present = found["memory_present"] if processes == 1 else None
    least = cost.least_bytes(config)
    if present is not None and least > present:
        # Not even a layer may fit.
        return {**found, "memory": {"weights, gradients, moments": least}, "fits": False}
    layers = cost.layer_costs(config.model, length, device, precision)
    memory = cost.memory_by_category(config, layers, device, context)
    forward = cost.forward_flops(config.model, layers)
    training = cost.training_flops(config.model, layers)
    return {
        **found,
        "flops_per_token": {"forward": forward, "training": training},
        "flops": training * found["tokens"],
        "memory": memory,
        "fits": None if present is None else sum(memory.values()) <= present,
    }


def check_memory(config: TrainConfig) -> None:
    """Raises: ConfigError for a run that this machine cannot hold, where it has one process."""
    if world_size() == 1:
        require_memory(plan(config))


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that speaks."""
    return os.environ.get("RANK", "0") == "0"


def require_memory(found: dict[str, Any]) -> None:
    """Raises: ConfigError if what `plan` found does not fit."""
    if found["fits"] is False:
        needed, present = sum(found["memory"].values()), found["memory_present"]
        raise ConfigError(
            f"the run needs about {needed / 1e9:,.1f} GB and {present / 1e9:,.1f} GB are here; "
            "lower model.width, micro_batch_size, data.sequence_length or tokenizer.vocab_size"
        )


def two_steps(
    config: TrainConfig, found: dict[str, Any], corpus: Path | None, context: int = 1
) -> dict[str, Any]:
    """Two steps of the run in a folder that is deleted: speed of the second, peak memory of both.

    They read the first part of the run's own text, or the whole of it where `corpus` has it.

    Raises: DataError, ConfigError as the run would.
    """
    text = config.data
    enough = max(SAMPLED_BYTES, 64 * found["tokens_per_step"], 256 * config.model.vocab_size)
    if corpus is None and text.sources:
        limit = enough if text.max_bytes is None else min(enough, text.max_bytes)
        text = dataclasses.replace(text, max_bytes=limit)
    sampled = dataclasses.replace(config, data=text)
    with tempfile.TemporaryDirectory(prefix="spikelm-") as name:
        folder = Path(name)
        accelerator = make_accelerator(sampled)
        device = accelerator.device
        trained_on = prepare(sampled, corpus or folder / "data")
        process.reset_peak()
        trainer = Trainer(sampled, folder, trained_on, accelerator, None, context=context)
        seconds = [_timed_step(trainer) for _ in range(2)]
    peak = hardware.peak_of(device, found["precision"], config.peak_flops)
    speed = trainer.tokens_per_step / seconds[-1]
    reached = speed * found["flops_per_token"]["training"] / found["processes"]
    whole = config.steps * seconds[-1]
    return {
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "mfu": reached / peak.flops,
        "memory_measured": hardware.peak_bytes(device),
        "seconds": min(whole, config.max_seconds or whole),
    }


def _timed_step(trainer: Trainer) -> float:
    began = time.perf_counter()
    trainer.advance(0.0)
    return time.perf_counter() - began


def describe(found: dict[str, Any]) -> str:
    """What `--dry-run` prints below the recipe."""
    kinds = ", ".join(f"{n} {v:,}" for n, v in found["parameters"].items() if n != "total" and v)
    state, memory = found["state_bytes"], found["memory"]
    growth = f", and {size(state['bytes_per_token'])} per token" if state["bytes_per_token"] else ""
    budget = "" if found["max_seconds"] is None else f" or {found['max_seconds']:g} s"
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.items() if value)
    present = found["memory_present"]
    numbers = {
        "parameters": f"{found['parameters']['total']:,}: {kinds}",
        "tokens per step": f"{found['tokens_per_step']:,} on {found['processes']} process(es)",
        "length": f"{found['steps']:,} steps{budget}, at most {found['tokens']:,} tokens",
        "learning rate": ", ".join(f"{v:.2g} at {at}" for at, v in found["learning_rate"].items()),
        "precision": f"{found['precision']} on {found['device']}",
        "state": f"{size(state['bytes'])} per sequence{growth}",
        "memory": f"about {size(sum(memory.values()))} per process"
        + ("" if present is None else f" of {size(present)}"),
        "": parts,
    }
    if "flops_per_token" in found:
        flops = found["flops_per_token"]
        numbers["FLOPs"] = (
            f"{flops['forward'] / 1e6:,.1f} M per token forward, {flops['training'] / 1e6:,.1f} M "
            f"in training, {found['flops']:.2e} in all"
        )
    if "step_seconds" in found:
        measured = found["memory_measured"]
        first, second = found["step_seconds"]
        numbers |= {
            "two steps": f"{first:.2f} s and {second:.2f} s: {found['tokens_per_second']:,.0f} "
            f"tokens/s, MFU {found['mfu']:.1%} of {found['peak_flops'] / 1e12:,.3g} TFLOP/s "
            f"({found['peak_source']})",
            "peak memory": f"{size(measured)} measured, {size(sum(memory.values()))} estimated",
            "time": f"about {duration(found['seconds'])}, validations and checkpoints not counted",
        }
    return "\n".join(f"{name + ':' if name else '':17}{value}" for name, value in numbers.items())
