from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spikelm.errors import CheckpointError
from spikelm.state import State


def make(B: int, cache: int = 3, seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    layer = {
        "S": torch.randn(B, 2, 3, 4, generator=g),
        "k": torch.randn(B, cache, 1, 2, generator=g),
        "ffn_input.v": torch.randn(B, 5, generator=g),
    }
    return State((layer, {}), torch.arange(B) + 1)


def same(a: State, b: State) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return torch.equal(a.position, b.position) and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs
    )


def test_merge_then_take_gives_the_parts_back() -> None:
    a, b = make(2), make(3, seed=1)
    merged = State.merge([a, b])
    assert merged.batch_size == 5
    assert same(merged.take([0, 1]), a)
    assert same(merged.take([2, 3, 4]), b)
    assert same(State.merge([merged.take([4]), merged.take([2])]), merged.take([4, 2]))


def test_put_replaces_rows() -> None:
    a, b = make(4), make(2, seed=1)
    put = a.put([3, 1], b)
    assert same(put.take([3, 1]), b)
    assert same(put.take([0, 2]), a.take([0, 2]))
    with pytest.raises(ValueError, match="2 sequences given"):
        a.put([1], b)
    with pytest.raises(ValueError, match=r"rows \[1, 4\] of 4"):
        a.put([1, 4], b)


def test_growing_caches_are_padded() -> None:
    merged = State.merge([make(1, cache=2), make(1, cache=5)])
    assert merged.layers[0]["k"].shape[1] == 5
    assert not merged.layers[0]["k"][0, 2:].any()


def test_nbytes_counts_every_tensor() -> None:
    assert make(2).nbytes == 2 * (4 * (24 + 6 + 5) + 8)


def test_save_and_load(tmp_path: Path) -> None:
    state, path = make(2), tmp_path / "chat.safetensors"
    state.save(path, "a" * 64)
    assert same(State.load(path, "a" * 64), state)
    with pytest.raises(CheckpointError, match="belongs to model aaaaaaaaaaaa, not to bbbb"):
        State.load(path, "b" * 64)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot read the state"):
        State.load(path, "a" * 64)
    with pytest.raises(CheckpointError, match="cannot read the state"):
        State.load(tmp_path / "missing", "a" * 64)


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    metadata = {"format": "spikelm-state-1", "fingerprint": "a", "num_layers": "0"}
    save_file({"position": torch.zeros(1, dtype=torch.int64)}, tmp_path / "old", metadata)
    with pytest.raises(CheckpointError, match="format spikelm-state-2; its format: .*-1"):
        State.load(tmp_path / "old", "a")
