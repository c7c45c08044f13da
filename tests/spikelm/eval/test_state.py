from __future__ import annotations

import json

import pytest
import torch

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.eval.state import bench_state
from spikelm.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no native library")

SMALL = {"num_heads": 2, "key_dim": 24, "value_dim": 16, "num_layers": 3, "tokens": 32}


@pytest.mark.parametrize("value_dim", [16, 64, 128])
def test_only_rows_of_spikes_are_touched_and_the_result_is_the_dense_one(value_dim: int) -> None:
    threads = torch.get_num_threads()
    report = bench_state(**SMALL | {"value_dim": value_dim}, spiking=[0.1, 0.5, 1.0])  # type: ignore[arg-type]
    assert torch.get_num_threads() == threads
    rows, pending = 3 * 2 * 24, 3 * 2 * 24 * 4
    for found in report["measurements"]:
        assert found["dense_bytes_per_token"] == 2 * 4 * rows * value_dim
        # Rows are read where a query or a key spikes, and written where a key does.
        share = found["union_fraction"] + found["key_fraction"]
        assert found["bytes_per_token"] == pytest.approx(
            4 * rows * value_dim * share + 2 * pending, rel=1e-6
        )
        for form in ("lazy", "dense"):
            assert max(found[form]["deviation"].values()) < 1e-5
            assert found[form]["ms_per_token"] > 0
    sparse, _, full = report["measurements"]
    assert 0.1 < sparse["union_fraction"] < 0.3
    assert full["union_fraction"] == 1


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"heads": 2, "key-dim": 8, "value-dim": 8, "layers": 2, "tokens": 16}
    arguments = ["bench", "state", *(f"--{name}={number}" for name, number in sizes.items())]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "dense / ours" in printed
    assert "2 layers of 2 heads of 8 x 8: 1.0 KiB of state" in printed
    assert main([*arguments, "--spiking", "0.5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 0}, "heads: 0 given; allowed: an integer >= 1"),
        ({"key_dim": 1025}, "key channels: 1025 given; allowed: 1 to 1024"),
        ({"tokens": 33}, "tokens: 33 given; allowed: 8 to 32"),
        ({"spiking": [0.0]}, "spiking: 0.0 given; allowed: 0 < share <= 1"),
    ],
)
def test_what_is_not_allowed(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_state(**SMALL | wrong)  # type: ignore[arg-type]


def test_shares_that_are_no_numbers() -> None:
    assert main(["bench", "state", "--spiking", "few"]) != 0
