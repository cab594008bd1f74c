"""What Prometheus is told of an endpoint. Each has a registry of its own: nothing else of the process is in it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flows.endpoint.vectors import Vectors
from stages.serving.batching import Batching

GONE, REFUSED, TURNED_AWAY, EMBEDDED = "gone", "refused", "turned_away", "embedded"
OUTCOMES = ("stop", "length", GONE, "failed", REFUSED, TURNED_AWAY, EMBEDDED)
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """See `stages.serving.asked.Watch`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ended = Counter(
            "enginery_requests",
            "Prompts by how they ended; requests for vectors, and those that were refused or turned away.",
            ["outcome"],
            registry=self.registry,
        )
        for one in OUTCOMES:
            self._ended.labels(one)
        self._read = Counter("enginery_prompt_tokens", "Tokens of prompts that were read.", registry=self.registry)
        self._said = Counter("enginery_generated_tokens", "Tokens that were said.", registry=self.registry)
        self._first_s = Histogram(
            "enginery_time_to_first_token_seconds",
            "From a prompt's arrival to the first token of its answer.",
            buckets=_FIRST_S,
            registry=self.registry,
        )
        self._token_s = Histogram(
            "enginery_time_per_token_seconds",
            "From one token of an answer to the next.",
            buckets=_TOKEN_S,
            registry=self.registry,
        )

    def follow(self, batching: Batching | Vectors) -> None:
        """Say how long its queue is and how many rows it writes, whenever that is asked."""
        queue = Gauge(
            "enginery_queue_length",
            "Prompts that wait for a row, or requests for vectors that wait.",
            registry=self.registry,
        )
        queue.set_function(lambda: batching.waiting)
        rows = Gauge(
            "enginery_active_rows", "Answers that are being written, or a request for vectors.", registry=self.registry
        )
        rows.set_function(lambda: batching.active)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def read(self, tokens: int) -> None:
        """See Watch."""
        self._read.inc(tokens)

    def said(self, seconds: float, first: bool) -> None:
        """See Watch."""
        self._said.inc()
        (self._first_s if first else self._token_s).observe(seconds)

    def ended(self, how: str) -> None:
        """See Watch; besides, REFUSED, TURNED_AWAY and EMBEDDED."""
        self._ended.labels(how).inc()
