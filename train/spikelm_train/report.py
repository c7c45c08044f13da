"""What a run says while it goes: a progress line, metrics.jsonl, trackers, curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from spikelm.eval.tables import size
from spikelm_train.curves import CURVES, draw_curves
from spikelm_train.trackers import open_trackers

METRICS = "metrics.jsonl"


class Reporter:
    """Writes one run's progress to a stream, its folder and trackers, continuing after `step`.

    Raises: MissingExtraError for a tracker that is not installed.
    """

    def __init__(
        self,
        out: Path,
        stream: TextIO,
        step: int,
        report_to: Sequence[str] = ("tensorboard",),
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self._trackers = open_trackers(report_to, out, step, recipe or {})
        self.out = out
        self.stream = stream
        self.updates = stream.isatty()
        kept = [record for record in read_metrics(out) if record["step"] <= step]
        self._metrics = (out / METRICS).open("w", encoding="utf-8")
        self._metrics.writelines(json.dumps(record) + "\n" for record in kept)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self.stream.write(f"\r\x1b[K{text}\n" if self.updates else f"{text}\n")
        self.stream.flush()

    def progress(self, record: Mapping[str, Any]) -> None:
        """Records a training measurement and shows it on the progress line."""
        self.record(record)
        text = progress_line(record)
        if self.updates:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{text[:width]}")
            self.stream.flush()
        else:
            self.say(text)

    def record(self, record: Mapping[str, Any]) -> None:
        """Records what belongs to the step `record["step"]`; trackers get the numbers."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        numbers = scalars(record)
        for tracker in self._trackers:
            tracker.record(record["step"], numbers)

    def draw(self) -> None:
        """Writes the curves of the whole run so far."""
        for tracker in self._trackers:
            tracker.flush()
        draw_curves(read_metrics(self.out), self.out / CURVES)

    def close(self) -> None:
        if self.updates:
            self.stream.write("\n")
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by tag: `loss`, `silent/ffn_hidden`."""
    found = {}
    for name, value in record.items():
        for part, number in (value if isinstance(value, Mapping) else {"": value}).items():
            if isinstance(number, int | float) and name != "step":
                found[f"{name}/{part}" if part else name] = number
    return found


def progress_line(record: Mapping[str, Any]) -> str:
    """One line for a training measurement."""
    parts = [
        f"step {record['step']}",
        f"{record['progress']:4.0%}",
        f"loss {record['loss']:.3f}",
        f"{record['bits_per_byte']:.3f} bits/byte",
        f"lr {record['lr']:.1e}",
        f"|g| {record['gradient_norm']:.2g}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"MFU {record['mfu']:.1%}",
        size(record["memory_bytes"]),
    ]
    if record["silent_fraction"] is not None:
        classes = " ".join(f"{name} {value:.0%}" for name, value in record["silent"].items())
        parts.append(f"silent {record['silent_fraction']:.1%} ({classes})")
    for name in ("dead", "saturated"):
        found = [f"{n} {value:.1%}" for n, value in record[name].items() if value >= 0.0005]
        if found:
            parts.append(f"{name} {' '.join(found)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """For people: 42 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, oldest first; a torn last line is left out."""
    try:
        lines = (out / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]
