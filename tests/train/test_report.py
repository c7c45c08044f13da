from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from spikelm_train.curves import CURVES, draw_curves
from spikelm_train.report import (
    METRICS,
    Reporter,
    duration,
    progress_line,
    read_metrics,
    scalars,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def measurement(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "progress": step / 10,
        "loss": 3.0,
        "bits_per_byte": 2.5,
        "lr": 1e-3,
        "gradient_norm": 0.254,
        "tokens_per_second": 12345.6,
        "mfu": 0.4217,
        "memory_bytes": 3 * 2**29,
        "silent_fraction": 0.625,
        "silent": {"mixer_input": 0.5, "ffn_hidden": 0.95},
        "dead": {"mixer_input": 0.0, "ffn_hidden": 0.0},
        "saturated": {"mixer_input": 0.0002},
    }


def test_progress_line_names_every_number() -> None:
    line = progress_line(measurement(4))
    for part in ("step 4", "40%", "loss 3.000", "2.500 bits/byte", "1.0e-03", "12,346 tok/s"):
        assert part in line
    for part in ("|g| 0.25", "MFU 42.2%", "1.5 GiB"):
        assert part in line
    assert line.endswith("silent 62.5% (mixer_input 50% ffn_hidden 95%)")


def test_progress_line_names_dead_and_saturated_neurons_where_there_are_any() -> None:
    found = {"dead": {"mixer_input": 0.0, "ffn_hidden": 0.0312}, "saturated": {"ffn_hidden": 0.009}}
    line = progress_line({**measurement(4), **found})
    assert line.endswith("ffn_hidden 95%)  dead ffn_hidden 3.1%  saturated ffn_hidden 0.9%")


def test_progress_line_without_silence() -> None:
    assert "silent" not in progress_line({**measurement(1), "silent_fraction": None, "silent": {}})


def test_plain_stream_gets_whole_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = Reporter(tmp_path, stream, 0)
    reporter.progress(measurement(1))
    reporter.say("hello")
    reporter.close()
    assert stream.getvalue() == f"{progress_line(measurement(1))}\nhello\n"


def test_terminal_gets_one_updating_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    reporter = Reporter(tmp_path, stream, 0)
    for step in (1, 2):
        reporter.progress(measurement(step))
    assert "\n" not in stream.getvalue()
    shown = stream.getvalue().split("\r\x1b[K")[1:]
    assert [text[:6] for text in shown] == ["step 1", "step 2"]
    assert all(len(text) == 39 for text in shown)
    reporter.say("hello")
    assert stream.getvalue().endswith("\r\x1b[Khello\n")
    reporter.close()


def test_reporter_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = Reporter(tmp_path, io.StringIO(), 0)
    for step in (1, 2, 3):
        first.progress(measurement(step))
    first.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the process died here
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    second = Reporter(tmp_path, io.StringIO(), 2)
    second.progress(measurement(3))
    second.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 3


def test_draw_writes_a_png_and_scalars(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, io.StringIO(), 0)
    reporter.progress(measurement(1))
    reporter.record({"step": 1, "validation_bits_per_byte": 2.0})
    reporter.record({"step": 1, "sample": "not a number"})
    reporter.draw()
    reporter.close()
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG")
    events = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    for tag in (b"loss", b"silent/ffn_hidden", b"dead/ffn_hidden", b"validation_bits_per_byte"):
        assert tag in events


def test_scalars_are_the_numbers_by_tag() -> None:
    record = {
        "step": 3,
        "loss": 1.5,
        "silent": {"a": 0.5},
        "sample": "text",
        "silent_fraction": None,
    }
    assert scalars(record) == {"loss": 1.5, "silent/a": 0.5}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (47.9 * 3600, "47 h 54 min"),
        (4e5, "4 d 15 h"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_draw_curves_without_records(tmp_path: Path) -> None:
    draw_curves([], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
