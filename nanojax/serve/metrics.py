"""What /metrics shows: tokens, queue, time to first token, rate, memory."""

import time
from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from nanojax.serve.scheduler import Job, Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.requests = Counter("nanojax_requests", "requests, by path and status", ["path", "status"], registry=r)
        self.answers = Counter("nanojax_answers", "answers, by how they ended", ["reason"], registry=r)
        self.prompt = Counter("nanojax_prompt_tokens", "tokens of prompts", registry=r)
        self.cached = Counter("nanojax_prompt_tokens_cached", "of these, found in a cache", registry=r)
        self.generated = Counter("nanojax_generated_tokens", "tokens written", registry=r)
        self.writing = Counter(
            "nanojax_decode_seconds", "seconds of writing; tokens by seconds is the rate", registry=r
        )
        self.first = Histogram(
            "nanojax_time_to_first_token_seconds", "from the request to its first token", buckets=SECONDS, registry=r
        )
        self.rate = Histogram("nanojax_tokens_per_second", "of an answer, after its first", buckets=RATES, registry=r)
        self.waiting = Gauge("nanojax_requests_waiting", "answers in the queue", registry=r)
        self.running = Gauge("nanojax_requests_running", "answers that are read or written", registry=r)
        self.slots = Gauge("nanojax_slots", "answers that can be written together", registry=r)
        self.memory = Gauge("nanojax_device_memory_bytes", "of the device, in use; 0 where it does not say", registry=r)

    def read(self, tokens: int, cached: int) -> None:
        """A prompt was taken up."""
        self.prompt.inc(tokens)
        self.cached.inc(cached)

    def wrote(self, tokens: int, seconds: float) -> None:
        """A call of the loop has ended."""
        self.generated.inc(tokens)
        self.writing.inc(seconds)

    def began(self, seconds: float) -> None:
        """An answer has its first token."""
        self.first.observe(seconds)

    def ended(self, job: Job, reason: str) -> None:
        """An answer has ended."""
        self.answers.labels(reason).inc()
        if job.first is not None and job.written > 1:
            self.rate.observe((job.written - 1) / max(1e-6, time.monotonic() - job.first))

    def text(self, scheduler: Scheduler | None) -> bytes:
        """In Prometheus' text format."""
        if scheduler is not None:
            self.slots.set(scheduler.engine.count)
            self.waiting.set(len(scheduler.waiting))
            self.running.set(len(scheduler.reading) + len(scheduler.writing))
        stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
        self.memory.set(stats.get("bytes_in_use", 0))
        return generate_latest(self.registry)
