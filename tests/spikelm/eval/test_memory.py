from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.eval.memory import bench_memory


def test_memory_stays_flat(coded_folder: Path) -> None:
    rows = bench_memory(coded_folder, 3000)["measurements"]
    assert [row["tokens"] for row in rows][:4] == [10, 100, 300, 600]
    assert len({row["state_bytes"] for row in rows}) == 1
    # After the first thousand tokens the allocator has what it needs.
    settled = [row["resident_bytes"] for row in rows if row["tokens"] >= 1000]
    assert max(settled) - min(settled) < 2**20


def test_command(coded_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", str(coded_folder), "--tokens", "20"]) == 0
    assert "resident" in capsys.readouterr().out
    assert main(["bench", "memory", str(coded_folder), "--tokens", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measurements"][-1]["tokens"] == 20
    with pytest.raises(ConfigError, match="allowed: 10 or more"):
        bench_memory(coded_folder, 9)
