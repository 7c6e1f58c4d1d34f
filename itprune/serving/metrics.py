"""Metrics: figures of the server for Prometheus. None of them tells what was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from itprune.serving.backend import Gauge, Usage

KIND = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
ENDS = ("stop", "length", "time", "gone", "failed")


class Metrics:
    """Counts.

    Args:
        gauges: figures of the moment.
    """

    def __init__(self, gauges: Callable[[], Sequence[Gauge]]) -> None:
        own = CollectorRegistry()
        own.register(_Gauges(gauges))
        self._registry = own
        self._requests = Counter(
            "itprune_requests", "Requests by address and status", ("path", "status"), registry=own
        )
        self._answers = Counter(
            "itprune_answers",
            "Answers by how they ended; time: cut by the time limit; gone: nobody listened",
            ("finish",),
            registry=own,
        )
        for end in ENDS:
            self._answers.labels(end)
        self._prompt = _counter(own, "prompt_tokens", "Prompt tokens before pruning")
        self._kept = _counter(own, "kept_tokens", "Prompt tokens that entered the language model")
        self._visual = _counter(own, "visual_tokens", "Visual tokens before pruning")
        self._seen = _counter(own, "kept_visual_tokens", "Visual tokens that entered the model")
        self._said = _counter(own, "answer_tokens", "Tokens of answers")
        self._first = Histogram(
            "itprune_first_token_seconds",
            "From a request's last byte to its first token",
            buckets=SECONDS,
            registry=own,
        )
        self._whole = Histogram(
            "itprune_answer_seconds",
            "From a request's last byte to its last token",
            buckets=SECONDS,
            registry=own,
        )

    def request(self, path: str, status: int) -> None:
        """One more request was answered, or at least its answer begun."""
        self._requests.labels(path, str(status)).inc()

    def first(self, seconds: float, usage: Usage) -> None:
        """A request got its first token."""
        self._first.observe(seconds)
        self._prompt.inc(usage.tokens_in)
        self._kept.inc(usage.tokens_kept)
        self._visual.inc(usage.visual_in)
        self._seen.inc(usage.visual_kept)

    def last(self, finish: str, seconds: float, usage: Usage | None) -> None:
        """An answer is over.

        Args:
            finish: one of `ENDS`.
            seconds: it took.
            usage: None: there was no token.
        """
        self._answers.labels(finish).inc()
        if usage is not None:
            self._said.inc(usage.tokens_out)
            self._whole.observe(seconds)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)


def _counter(registry: CollectorRegistry, name: str, meaning: str) -> Counter:
    return Counter(f"itprune_{name}", meaning, registry=registry)


class _Gauges(Collector):
    """What a backend tells when it is asked."""

    def __init__(self, gauges: Callable[[], Sequence[Gauge]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        by_name: dict[str, list[Gauge]] = {}
        for gauge in self._gauges():
            by_name.setdefault(gauge.name, []).append(gauge)
        for name, gauges in by_name.items():
            yield _family(name, gauges)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()


def _family(name: str, gauges: Sequence[Gauge]) -> GaugeMetricFamily:
    labels = tuple(gauges[0].labels)
    family = GaugeMetricFamily(f"itprune_{name}", gauges[0].meaning, labels=labels)
    for gauge in gauges:
        family.add_metric([gauge.labels[label] for label in labels], gauge.value)
    return family
