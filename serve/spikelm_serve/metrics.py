"""What the server has done, for Prometheus; the names are vLLM's where it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from spikelm_serve.jobs import Job
    from spikelm_serve.scheduler import Scheduler

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and gauges of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        store = scheduler.store

        def gauge(name: str, about: str, value: object) -> None:
            Gauge(f"spikelm_{name}", about, registry=registry).set_function(value)  # type: ignore[arg-type]

        gauge(
            "num_requests_running",
            "Prompts and sequences.",
            lambda: scheduler.num_running,
        )
        gauge("num_requests_waiting", "Requests that wait.", lambda: scheduler.num_waiting)
        gauge("state_pool_used_bytes", "Bytes of states in memory.", lambda: store.used)
        gauge("state_checkpoints", "States in memory.", lambda: store.num_kept)
        gauge("state_restored", "States read from the shelf.", lambda: store.restored)
        gauge("state_evictions", "States that left memory.", lambda: store.evictions)
        gauge(
            "silent_fraction",
            "Exact zeros among the inputs of projections, of decoded tokens.",
            lambda: scheduler.engine.silent_fraction or 0.0,
        )

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"spikelm_{name}", about, labels, registry=registry)

        self._ended = counter("request_success", "Requests that ended.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("prefix_cache_hits", "Tokens of prompts that were read before.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._misses = counter("state_miss", "Prompts without a state to begin with.", "reason")
        self.refused = counter("requests_refused", "Requests that got an error.", "status")

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"spikelm_{name}_seconds", about, registry=registry, buckets=_SECONDS)

        self._queue = seconds("request_queue_time", "Waiting for a slot.")
        self._prefill = seconds("request_prefill_time", "Reading the prompt.")
        self._decode = seconds("request_decode_time", "Generating behind the first token.")
        self._first = seconds("time_to_first_token", "From the request to its first token.")
        self._token = seconds("inter_token_latency", "Mean time between tokens of a request.")
        scheduler.observe = self.observe

    def observe(self, job: Job, outcome: str) -> None:
        """A job has ended."""
        totals = job.totals
        self._ended.labels(outcome).inc()
        self._prompt.inc(totals.prompt_tokens)
        self._cached.inc(totals.cached_tokens)
        self._generated.inc(totals.completion_tokens)
        if totals.miss:
            self._misses.labels(totals.miss).inc()
        self._queue.observe(totals.queue_seconds)
        if totals.completion_tokens:
            self._prefill.observe(totals.prompt_seconds)
            self._first.observe(totals.queue_seconds + totals.prompt_seconds)
            self._decode.observe(totals.decode_seconds)
        if totals.decode_tokens:
            self._token.observe(totals.decode_seconds / totals.decode_tokens * job.n)

    def page(self) -> bytes:
        return generate_latest(self.registry)
