"""A finished run on one page, beside its curves: OUT/report.md.

Everything but the machine is read from the run's folder, so a run that was interrupted and
continued has the curves of the whole.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikelm.eval.tables import size
from spikelm_train.config import TrainConfig
from spikelm_train.curves import CURVES, Records
from spikelm_train.experiments.provenance import provenance
from spikelm_train.report import duration, read_metrics

REPORT = "report.md"


def write_summary(out: Path, config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Writes the page of the finished run in `out`.

    `facts`: parameters, training_tokens, training_bytes, tokens_per_step, flops_per_token,
    peak_flops, peak_source, device, processes, precision, steps, seconds.
    """
    records = read_metrics(out)
    page = summary_page(out, config, facts, records)
    staging = out / f"{REPORT}.tmp"
    staging.write_text(page, encoding="utf-8")
    staging.replace(out / REPORT)


def summary_page(out: Path, config: TrainConfig, facts: Mapping[str, Any], records: Records) -> str:
    """The page as Markdown."""
    samples = [r for r in records if "sample" in r]
    shown = "\n\n".join(f"Step {r['step']}:\n\n{_quoted(r['sample'])}" for r in samples[-3:])
    folder = shlex.quote(str(out))
    commands = [
        f"spikelm convert {folder} {shlex.quote(str(out / 'spikes'))}",
        f"spikelm eval {folder}",
        f"spikelm chat {folder}",
        f"spikelm serve {folder}",
    ]
    parts = [
        f"# {out.resolve().name}",
        _table("trained", _trained(config, facts)),
        _table("result", _result(records)),
        f"![curves]({CURVES})",
        _table("time", _times(records, facts)),
        *([f"## Samples\n\n{shown}"] if samples else []),
        "## Next\n\n```\n" + "\n".join(commands) + "\n```",
        "The whole recipe is in config.yaml, every measurement in metrics.jsonl.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {title} | |", "| --- | --- |", *(f"| {n} | {v} |" for n, v in rows.items())]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    # Four spaces need no escapes, whatever a model writes.
    return "\n".join(f"    {line}" for line in text.splitlines())


def _trained(config: TrainConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    origin, model = provenance(), config.model
    tokens = facts["steps"] * facts["tokens_per_step"]
    kinds = {m: model.mixers.count(m) for m in dict.fromkeys(model.mixers)}
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    commit = "outside a git checkout"
    if origin["commit"]:
        commit = origin["commit"][:12] + (" and changes" if origin["dirty"] else "")
    versions = {"spikelm": origin["spikelm"], "python": origin["python"], **origin["packages"]}
    return {
        "model": f"{facts['parameters']:,} parameters: {layers}, width {model.width}, "
        f"vocabulary {model.vocab_size:,}",
        "tokens": f"{tokens:,} in {facts['steps']:,} steps of {facts['tokens_per_step']:,}, "
        f"sequences of {config.data.sequence_length:,}; "
        f"{tokens / facts['training_tokens']:.2f} times the text",
        "FLOPs": f"{facts['flops_per_token'] * tokens:.3e} "
        f"({facts['flops_per_token'] / 1e6:,.1f} M per token)",
        "data": f"{_text(config)}: {facts['training_tokens']:,} tokens, "
        f"{facts['training_bytes']:,} bytes",
        **({"begins with": config.init} if config.init else {}),
        "optimiser": f"{config.optim.name}, learning rate {config.optim.lr:g}, "
        f"{config.optim.schedule}",
        "precision": facts["precision"],
        "seed": str(config.seed),
        "hardware": f"{facts['processes']} x {facts['device']}; {origin['cpu']}, "
        f"{origin['cores']} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "peak": f"{facts['peak_flops'] / 1e12:,.3g} TFLOP/s ({facts['peak_source']})",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit,
        "finished": origin["time"],
    }


def _text(config: TrainConfig) -> str:
    """Where the training text is from."""
    data = config.data
    if data.mixture:
        sets = (
            f"{part.prepared or ' '.join(part.sources)} ({part.weight:g})" for part in data.mixture
        )
        return ", ".join(sets)
    return data.prepared or ", ".join(data.sources) or "the built-in corpus"


def _result(records: Records) -> dict[str, str]:
    found = {}
    for record in records:
        if "validation_loss" in record:
            found["validation loss"] = f"{record['validation_loss']:.4f} nats per token"
            found["validation bits per byte"] = f"{record['validation_bits_per_byte']:.4f}"
        if "loss" in record:
            found["training loss"] = f"{record['loss']:.4f} nats per token, last logged step"
            if record["silent_fraction"] is not None:
                found["silent"] = f"{record['silent_fraction']:.1%} of what enters projections"
                found["silent by class"] = _fractions(record["silent"])
            found["dead channels"] = _fractions(record["dead"])
            found["saturated entries"] = _fractions(record["saturated"])
    return {name: value for name, value in found.items() if value}


def _fractions(by_class: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in by_class.items())


def _times(records: Records, facts: Mapping[str, Any]) -> dict[str, str]:
    """Time in the loop, that of steps being what the logged speeds say."""
    logged = [r for r in records if "tokens_per_second" in r]
    steps, before = 0.0, 0
    for record in logged:
        tokens = (record["step"] - before) * facts["tokens_per_step"]
        steps += tokens / record["tokens_per_second"]
        before = record["step"]
    rows = {
        "in the loop": duration(facts["seconds"]),
        "training steps": duration(steps),
        "validation, samples, checkpoints": duration(max(0.0, facts["seconds"] - steps)),
    }
    if logged:
        speeds = sorted(r["tokens_per_second"] for r in logged)
        used = sorted(r["mfu"] for r in logged if "mfu" in r)
        rows["speed"] = f"{speeds[len(speeds) // 2]:,.0f} tokens/s, median"
        if used:
            rows["MFU"] = f"{used[len(used) // 2]:.1%}, median; of {facts['peak_source']}"
            rows["peak memory"] = size(max(r.get("memory_bytes", 0) for r in logged))
    return rows
