"""How fast this machine reads memory: what bounds a decoder that reads its weights once per token.

One pass takes the maximum of a buffer far larger than the caches, eight bytes per comparison. As
in a decoder's inner loop there is no explicit prefetch, so a kernel that has one may read faster.
"""

from __future__ import annotations

import contextlib
import mmap
import statistics
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any

import torch

from spikelm.errors import ConfigError
from spikelm.eval.peers import Seconds

BUFFER_BYTES = 2**29


class StreamRead:
    """A buffer and the threads that read it; it keeps its memory until it is deleted."""

    def __init__(self, threads: int = 1, num_bytes: int = BUFFER_BYTES) -> None:
        """Raises: ConfigError for no threads, or a buffer that is not whole 8-byte words."""
        if threads < 1:
            raise ConfigError(f"threads: {threads} given; allowed: an integer >= 1")
        if num_bytes < 8 or num_bytes % 8:
            raise ConfigError(f"num_bytes: {num_bytes} given; allowed: a multiple of 8")
        self.threads, self.num_bytes = threads, num_bytes
        pages = mmap.mmap(-1, num_bytes)
        # With small pages a quarter of the bandwidth is lost to address translation. Not every
        # system has large ones for the asking.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        self._words = torch.frombuffer(pages, dtype=torch.int64)
        # Pages nobody wrote are all the same one.
        torch.arange(len(self._words), out=self._words)

    def measure(self, passes: int) -> list[Seconds]:
        """Time of each of `passes` passes, after one that is not counted."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self._read()
            return [self._timed() for _ in range(passes)]
        finally:
            torch.set_num_threads(before)

    def gigabytes_per_second(self, seconds: Sequence[Seconds]) -> dict[str, Any]:
        """Median and best of the passes in 1e9 bytes per second, as JSON types.

        `wall` is what was there to be had; `cpu` counts only the time that the threads ran, as if
        nobody else had wanted the processors.
        """
        wall = [self.num_bytes / 1e9 / s.wall for s in seconds]
        cpu = [self.threads * self.num_bytes / 1e9 / s.cpu for s in seconds]
        return {
            "threads": self.threads,
            "bytes": self.num_bytes,
            "passes": len(seconds),
            **{
                name: {"median": statistics.median(rates), "best": max(rates)}
                for name, rates in {"wall": wall, "cpu": cpu}.items()
            },
        }

    def _read(self) -> int:
        return int(self._words.amax())

    def _timed(self) -> Seconds:
        wall, cpu = perf_counter(), process_time()
        self._read()
        return Seconds(perf_counter() - wall, process_time() - cpu)
