"""Numbers for Prometheus: what was asked, how long it took, what is held. Names begin with `sparsify_`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from sparsify.serving.engine import Engine

COUNTED = ("steps", "loads", "evictions", "waits", "refusals")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server. No label holds what a client wrote: their number is bounded."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter("sparsify_http_responses", "Responses by status.", ["status"], registry=self.registry)
        self.answers = Counter("sparsify_answers", "Answers by how they ended.", ["end"], registry=self.registry)
        self.prompt = Counter("sparsify_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.written = Counter("sparsify_generated_tokens", "Tokens that were written.", registry=self.registry)
        self.first = Histogram(
            "sparsify_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "sparsify_request_seconds", "From the request to its end.", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(State(engine))  # type: ignore[arg-type]

    def text(self) -> bytes:
        return generate_latest(self.registry)


class State:
    """What an engine holds right now."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        now = {"requests": self.engine.inside, "steps": self.engine.manager.steps, **self.engine.handle.status()}
        for name, value in now.items():
            if name in COUNTED:
                yield CounterMetricFamily(f"sparsify_{name}", f"{name} since the start.", value)
            else:
                yield GaugeMetricFamily(f"sparsify_{name}", f"{name.replace('_', ' ')} now.", value)


__all__ = ["Metrics"]
