"""The curves of a run, drawn while it goes and when it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikelm.eval.length import require_matplotlib

CURVES = "curves.png"

Records = Sequence[Mapping[str, Any]]


def draw_curves(records: Records, file: Path) -> None:
    """Six panels against steps: bits per byte, learning rate, gradient norm, silence by class, dead
    channels, tokens/s.

    Raises: MissingExtraError without matplotlib.
    """
    figure = require_matplotlib()(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3)
    _plot_bits(panels[0, 0], records)
    for axes, key, title in (
        (panels[0, 1], "lr", "learning rate"),
        (panels[0, 2], "gradient_norm", "gradient norm"),
        (panels[1, 0], "silent", "silent fraction"),
        (panels[1, 1], "dead", "dead channels"),
        (panels[1, 2], "tokens_per_second", "tokens per second"),
    ):
        _plot(axes, [(r["step"], r[key]) for r in records if key in r])
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("step")
    figure.savefig(file, dpi=110)


def _plot_bits(axes: Any, records: Records) -> None:
    """Bits per byte against steps: training as a line, validation as points."""
    for key, style, label in (
        ("bits_per_byte", "-", "training"),
        ("validation_bits_per_byte", "o", "validation"),
    ):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def _plot(axes: Any, points: Sequence[tuple[int, Any]]) -> None:
    """One line, or one per class."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for step, value in points:
        for name, number in (value if isinstance(value, Mapping) else {"": value}).items():
            lines.setdefault(name, []).append((step, number))
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), label=name or None, linewidth=1)
    if any(lines):
        axes.legend(fontsize=7)
