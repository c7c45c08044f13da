"""`--profile N`: where the time of a training step goes, operator by operator, and neurons' share.

torch.profiler watches N steps after a warm-up. Neurons are a range around the forward call of every
`Neuron` (its probe included) and, in the backward pass, the nodes of autograd functions that live
in `spikelm.neurons`: both compiled and torch forms are such functions. A node's time holds
everything it calls. Casts and reshapes around them are not counted, and profiling slows small
operators more than large ones, so `spikelm bench train` has the share without a profiler: it times
the step beside that of the same model without neurons.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import Function
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from spikelm.neurons import Neuron

FOLDER, NEURONS, STEP = "profile", "spikelm::neurons", "spikelm::step"
WARM_UP = 3
"""Steps before the first that counts: one that is not watched, two that are and do not count."""
ROWS = 25


class StepProfiler:
    """Watches `steps` calls; writes the trace and the table into `folder` after the last of them.

    `say` is told what came out. With `steps` 0 it does nothing.
    """

    def __init__(
        self,
        steps: int,
        folder: Path,
        neurons: Iterable[Neuron],
        say: Callable[[str], None],
    ) -> None:
        self._steps, self._folder, self._say = steps, folder, say
        self._neurons = list(neurons) if steps else []
        self._profile: Any = None
        self._seen = 0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step."""
        if self._seen >= self._steps + WARM_UP or not self._steps:
            yield
            return
        if self._seen == 0:
            self._begin()
        with record_function(STEP):
            yield
        self._seen += 1
        self._profile.step()
        if self._seen == self._steps + WARM_UP:
            self.close()

    def close(self) -> None:
        """Ends a profile that is still running; the run may be shorter than it."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            for neuron in self._neurons:
                del neuron.forward

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        for neuron in self._neurons:
            neuron.forward = _ranged(neuron.forward)  # type: ignore[method-assign]
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                skip_first=1, wait=0, warmup=WARM_UP - 1, active=self._steps, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _write(self, found: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json"
        found.export_chrome_trace(str(trace))
        on_cuda = torch.cuda.is_available()
        events = found.key_averages()
        order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        table = events.table(sort_by=order, row_limit=ROWS, max_name_column_width=48)
        share = neuron_share(events, on_cuda=on_cuda)
        text = (
            f"{table}\nneurons: {share:.1%} of the time of {self._steps} steps "
            "(forward ranges and backward nodes, under the profiler)"
        )
        (self._folder / "table.txt").write_text(text + "\n", encoding="utf-8")
        self._say(f"{text}\ntrace: {trace} (chrome://tracing, ui.perfetto.dev)")


def neuron_share(events: Iterable[Any], *, on_cuda: bool = False) -> float:
    """The neurons' part of the steps' time, given a profile's `key_averages()`."""
    attribute = "device_time_total" if on_cuda else "cpu_time_total"
    times = {event.key: getattr(event, attribute) for event in events}
    names = {NEURONS, *backward_nodes()}
    neurons: float = sum(time for key, time in times.items() if key in names)
    return neurons / (times.get(STEP) or 1.0)


def backward_nodes() -> list[str]:
    """How the profiler calls the backward nodes of the neurons' autograd functions."""
    return [
        f"{function.__name__}Backward"
        for function in Function.__subclasses__()
        if function.__module__.startswith("spikelm.neurons")
    ]


def _ranged(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with record_function(NEURONS):
            return forward(*arguments, **options)

    return wrapped
