"""Counts what a server does, under the names that dashboards for vLLM know."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxlm.inference.engine import Answering, Piece, Request
from jaxlm.inference.server.service import Service

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))


class Metrics:
    """Metrics are counted in a registry of their own, so that several servers may live in one process."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.model = service.name
        if service.engine is not None:
            self.registry.register(_OfEngine(service))
        names = ["model_name", "finished_reason"]
        self._ends = Counter("vllm:request_success", "Answers that ended.", names, registry=self.registry)
        self.read = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.new = self._histogram("request_generation_tokens", "New tokens of a request.", _TOKENS)
        self.first = self._histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.")
        self.between = self._histogram("inter_token_latency_seconds", "Seconds between tokens of an answer.")
        self.all = self._histogram("e2e_request_latency_seconds", "Seconds from arrival to the end.")
        self.queued = self._histogram("request_queue_time_seconds", "Seconds that a request waited to be begun.")
        self.prefill = self._histogram("request_prefill_time_seconds", "Seconds from its begin to the first token.")
        self.decode = self._histogram("request_decode_time_seconds", "Seconds from the first token to the last.")

    def _histogram(self, name: str, does: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        made = Histogram(f"vllm:{name}", does, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self.model)

    def observe(self, request: Request, arrived: float) -> "Observed":
        """Returns what notes how one request goes."""
        return Observed(self, request, arrived)

    def ended(self, reason: str) -> None:
        """Counts an answer that ended."""
        self._ends.labels(self.model, reason).inc()

    def text(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Observed:
    """An Observed notes how one request goes."""

    def __init__(self, metrics: Metrics, request: Request, arrived: float) -> None:
        self.metrics, self.arrived, self.new = metrics, arrived, 0
        self.before: dict[int, float] = {}
        self.ends = 0
        metrics.read.observe(len(request.prompt if request.source is None else request.source))

    def piece(self, piece: Piece) -> None:
        """Notes a piece of an answer."""
        now = time.monotonic()
        if piece.tokens:
            if not self.before:
                self.metrics.first.observe(now - self.arrived)
            elif piece.sample in self.before:
                gap = (now - self.before[piece.sample]) / len(piece.tokens)
                for _ in piece.tokens:
                    self.metrics.between.observe(gap)
            self.before[piece.sample] = now
            self.new += len(piece.tokens)
        if piece.reason is not None:
            self.metrics.ended(piece.reason)
            self.ends += 1

    def ended(self, answer: Answering) -> None:
        """Notes the end of a request, whether all of its answers ended or not."""
        self.metrics.new.observe(self.new)
        self.metrics.all.observe(time.monotonic() - self.arrived)
        times = answer.times
        if times.started is not None:
            self.metrics.queued.observe(max(0.0, times.started - times.arrived))
            if times.first is not None:
                self.metrics.prefill.observe(times.first - times.started)
                if times.last is not None:
                    self.metrics.decode.observe(times.last - times.first)


class _OfEngine:
    """An _OfEngine reads an engine's own counters when somebody asks for them."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        assert self.service.engine is not None
        s, name = self.service.engine.stats(), self.service.name
        gauges = dict(
            num_requests_running=(s.running, "Requests that are being answered."),
            num_requests_waiting=(s.waiting, "Requests that wait to be begun."),
            kv_cache_usage_perc=(
                s.cache_used / max(1, s.cache_tokens),
                "Share of the cache that is filled.",
            ),
        )
        counters = dict(
            prefix_cache_queries=(s.prefix_queries, "Tokens that were looked for in the prefix cache."),
            prefix_cache_hits=(s.prefix_hits, "Tokens that were found there."),
            prompt_tokens=(s.prompt_tokens, "Tokens of prompts that were read."),
            generation_tokens=(s.generated_tokens, "Tokens that were generated."),
            num_preemptions=(s.preemptions, "Requests that gave up their place in memory for a while."),
        )
        for key, (value, does) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{key}", does, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        pages = GaugeMetricFamily(
            "jaxlm:prefix_cache_pages", "Pages of the prefix cache: free, cached and used are all.",
            labels=["model_name", "state"],
        )  # fmt: skip
        states = dict(free=s.pages_free, cached=s.pages_cached, used=s.pages_used, all=s.pages)
        for state, number in states.items():
            pages.add_metric([name, state], number)
        yield pages
        for key, (value, does) in counters.items():
            counter = CounterMetricFamily(f"vllm:{key}", does, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
