from __future__ import annotations

import sys

import pytest

from spikelm.eval.process import memory_bytes, reset_peak


def test_peak_memory_is_seen_after_a_reset() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    size = 2**26
    block = bytearray(2 * size)
    del block
    reset_peak()
    before = memory_bytes("VmRSS")
    assert memory_bytes("VmHWM") - before < size / 4
    block = bytearray(size)
    del block
    assert size * 0.9 < memory_bytes("VmHWM") - before < size * 1.25
