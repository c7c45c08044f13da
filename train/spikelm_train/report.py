"""What a run says while it goes: a progress line, metrics.jsonl, TensorBoard, a loss curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from spikelm.errors import MissingExtraError

METRICS, CURVE, TENSORBOARD = "metrics.jsonl", "loss.png", "tensorboard"


class Reporter:
    """Writes one run's progress to a stream and to its folder, continuing after `step`."""

    def __init__(self, out: Path, stream: TextIO, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "train") from None
        self.out = out
        self.stream = stream
        self.updates = stream.isatty()
        kept = [record for record in read_metrics(out) if record["step"] <= step]
        self._metrics = (out / METRICS).open("w", encoding="utf-8")
        self._metrics.writelines(json.dumps(record) + "\n" for record in kept)
        self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

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
        """Records numbers that belong to the step `record["step"]`."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in record.items():
            values = value if isinstance(value, Mapping) else {"": value}
            for part, number in values.items():
                if number is not None and name != "step":
                    tag = f"{name}/{part}" if part else name
                    self._board.add_scalar(tag, number, record["step"])

    def draw(self) -> None:
        """Writes the loss curve of the whole run so far."""
        self._board.flush()
        draw_curve(read_metrics(self.out), self.out / CURVE)

    def close(self) -> None:
        if self.updates:
            self.stream.write("\n")
        self._metrics.close()
        self._board.close()


def progress_line(record: Mapping[str, Any]) -> str:
    """One line for a training measurement."""
    parts = [
        f"step {record['step']}",
        f"{record['progress']:4.0%}",
        f"loss {record['loss']:.3f}",
        f"{record['bits_per_byte']:.3f} bits/byte",
        f"lr {record['lr']:.1e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    if record["silent_fraction"] is not None:
        classes = " ".join(f"{name} {value:.0%}" for name, value in record["silent"].items())
        parts.append(f"silent {record['silent_fraction']:.1%} ({classes})")
    for name in ("dead", "saturated"):
        found = [f"{n} {value:.1%}" for n, value in record[name].items() if value >= 0.0005]
        if found:
            parts.append(f"{name} {' '.join(found)}")
    return "  ".join(parts)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, oldest first; a torn last line is left out."""
    try:
        lines = (out / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against steps as a PNG: training as a line, validation as points."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "train") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style, label in (
        ("bits_per_byte", "-", "training"),
        ("validation_bits_per_byte", "o", "validation"),
    ):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)
