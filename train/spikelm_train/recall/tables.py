"""The report of `spikelm recall` as aligned text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spikelm.eval.tables import aligned, percent, size

# Of a run, what the table's rows tell apart; seeds are averaged.
COLUMNS = {
    "mixer": "mixer",
    "key_dim": "K",
    "value_dim": "V",
    "spiking": "spiking",
    "bypass": "bypass",
    "lr": "lr",
}


def recall_table(report: Mapping[str, Any]) -> str:
    """Accuracy (mean over seeds, ± the largest distance from it) beside the bytes of the state."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in report["runs"]:
        key = tuple(result["run"][name] for name in COLUMNS)
        groups.setdefault(key, []).append(result)
    first = report["runs"][0]
    sizes = list(first["accuracy"])
    head = [*COLUMNS.values(), "seeds", *sizes, "q", "k", "rows", "state", "touched", "parameters"]
    rows = [head]
    for key, results in groups.items():
        active = {n: statistics.fmean(r["active"][n] for r in results) for n in first["active"]}
        rows.append(
            [
                *map(str, key),
                str(len(results)),
                *(_spread([r["accuracy"][name] for r in results]) for name in sizes),
                *(percent(active[name]) for name in ("queries", "keys", "rows")),
                size(results[0]["state_bytes"]),
                size(statistics.fmean(r["touched_bytes"] for r in results)),
                f"{results[0]['parameters']:,}",
            ]
        )
    run = first["run"]
    overwritten = f", {percent(run['overwritten'])} of the pairs overwrite" * (
        run["overwritten"] > 0
    )
    return "\n".join(
        [
            aligned(rows),
            "",
            f"accuracy in % at tokens:pairs, chance {100 / (run['vocab_size'] // 2):.1f} %; "
            f"vocabulary {run['vocab_size']}, width {run['width']}, {run['steps']} steps of "
            f"{run['batch_size']} sequences{overwritten}",
            "q, k: channels that fire; rows: of the state, that a token's q or k fires at",
        ]
    )


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    shown = f"{100 * mean:.1f}"
    if len(values) == 1:
        return shown
    return f"{shown} ±{100 * max(abs(value - mean) for value in values):.1f}"
