"""What a preset is before it has weights: sizes, counted on the meta device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spikelm.config import load_model_config, presets
from spikelm.eval.inspect import describe_state
from spikelm.eval.tables import aligned, size
from spikelm.models.ffn import ExpertsFFN
from spikelm.models.spikelm import LanguageModel


def describe_preset(name: str) -> dict[str, Any]:
    """Parameters, those a token uses, thresholds of neurons, and the state of one sequence.

    Raises: ConfigError for an unknown preset.
    """
    config = load_model_config(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    thresholds = sum(p.numel() for neuron in model.neurons() for p in neuron.parameters())
    parameters = sum(p.numel() for p in model.parameters()) - thresholds
    idle = 0.0
    for layer in model.modules():
        if isinstance(layer, ExpertsFFN):
            routed = sum(p.numel() for n, p in layer.experts.named_parameters() if _is_weight(n))
            idle += routed * (1 - layer.config.top_k / layer.config.num_experts)
    kinds = {m: config.mixers.count(m) for m in dict.fromkeys(config.mixers)}
    return {
        "name": name,
        "layers": kinds,
        "width": config.width,
        "vocab_size": config.vocab_size,
        "parameters": parameters,
        "active_parameters": round(parameters - idle),
        "thresholds": thresholds,
        "spiking": sorted({n.tensor_class for n in model.neurons() if n.config.kind != "off"}),
        "state": describe_state(model),
    }


def _is_weight(parameter: str) -> bool:
    return parameter.endswith("linear.weight")


def preset_table(reports: Sequence[dict[str, Any]]) -> str:
    """What `spikelm inspect PRESET` prints."""
    rows = [["preset", "layers", "parameters", "active", "thresholds", "state", "per token"]]
    for report in reports:
        state = report["state"]
        rows.append(
            [
                report["name"],
                ", ".join(f"{count} {kind}" for kind, count in report["layers"].items()),
                f"{report['parameters']:,}",
                f"{100 * report['active_parameters'] / report['parameters']:.1f} %",
                f"{report['thresholds']:,}",
                size(state["bytes"]),
                f"+{size(state['bytes_per_token'])}" if state["bytes_per_token"] else "0",
            ]
        )
    return aligned(rows, left=2)


def preset_markdown(reports: Sequence[dict[str, Any]]) -> str:
    """The table of docs/models.md."""
    lines = [
        "| preset | layers | parameters | active | state bytes | bytes per token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        kinds = ", ".join(f"{count} `{kind}`" for kind, count in report["layers"].items())
        active = 100 * report["active_parameters"] / report["parameters"]
        state = report["state"]
        lines.append(
            f"| `{report['name']}` | {kinds} | {report['parameters']:,} | {active:.1f} % | "
            f"{state['bytes']:,} | {state['bytes_per_token']:,} |"
        )
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """docs/models.md with the table of all presets between its marks."""
    begin, end = "<!-- presets -->\n", "<!-- end of presets -->\n"
    before, _, rest = page.partition(begin)
    table = preset_markdown([describe_preset(name) for name in presets()])
    return before + begin + table + end + rest.partition(end)[2]


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
