from __future__ import annotations

import pytest
import torch

from spikelm.errors import ConfigError
from spikelm.eval.bandwidth import StreamRead
from spikelm.eval.peers import Seconds


def test_passes_are_timed_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    stream = StreamRead(before + 1, num_bytes=2**24)
    seconds = stream.measure(3)
    assert torch.get_num_threads() == before
    assert len(seconds) == 3
    # Slower than a disk, or faster than a first-level cache, would not be memory.
    assert all(2**24 / 1e12 < s.wall < 2**24 / 1e7 for s in seconds)


def test_rates_are_bytes_by_seconds_of_one_thread() -> None:
    stream = StreamRead(2, num_bytes=2**20)
    seconds = [Seconds(wall=0.5, cpu=0.5), Seconds(wall=1.0, cpu=1.0), Seconds(wall=2.0, cpu=4.0)]
    rates = stream.gigabytes_per_second(seconds)
    gigabytes = 2**20 / 1e9
    assert (rates["threads"], rates["bytes"], rates["passes"]) == (2, 2**20, 3)
    assert rates["wall"] == {"median": gigabytes, "best": 2 * gigabytes}
    # Two threads in one second of processor time were half a second each.
    assert rates["cpu"] == {"median": 2 * gigabytes, "best": 4 * gigabytes}


def test_bad_sizes() -> None:
    with pytest.raises(ConfigError, match="threads: 0"):
        StreamRead(0)
    with pytest.raises(ConfigError, match="multiple of 8"):
        StreamRead(1, num_bytes=12)
