"""Families of samples in Prometheus' text format, by its client library. Knows no metric of castore's.

The library is loaded with the first of them: a program that nobody asks for metrics does without (18 ms, 1.4 MB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import add
from typing import TYPE_CHECKING, Any

from castore.durations import Durations

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

Values = Iterable[tuple[tuple[str, ...], float]]
"""Values by the values of their labels. Those with the same ones are added up."""


class Families:
    """Collects families, in order, and writes them. Used once."""

    def __init__(self) -> None:
        import prometheus_client

        self._library = prometheus_client
        self._families: list[Metric] = []

    def counter(self, name: str, meaning: str, values: float | Values, labels: Sequence[str] = ()) -> None:
        """What only goes up while the program runs. `name` ends in `_total`."""
        self._add(self._library.metrics_core.CounterMetricFamily(name, meaning, labels=labels), _summed(values, add))

    def gauge(
        self,
        name: str,
        meaning: str,
        values: float | Values,
        labels: Sequence[str] = (),
        combine: Callable[[Any, Any], float] = add,
    ) -> None:
        """What goes up and down. `combine` makes one of two values with the same labels."""
        self._add(self._library.metrics_core.GaugeMetricFamily(name, meaning, labels=labels), _summed(values, combine))

    def histogram(
        self, name: str, meaning: str, values: Iterable[tuple[tuple[str, ...], Durations]], labels: Sequence[str] = ()
    ) -> None:
        """Durations in seconds by their size. `name` ends in `_seconds`."""
        family = self._library.metrics_core.HistogramMetricFamily(name, meaning, labels=labels)
        merged: dict[tuple[str, ...], Durations] = {}
        for key, durations in values:
            merged.setdefault(key, Durations()).include(durations)
        for key, durations in merged.items():
            buckets = [
                ("+Inf" if bound == float("inf") else repr(bound), count) for bound, count in durations.cumulative()
            ]
            family.add_metric(key, buckets, durations.sum_s)
        self._families.append(family)

    def process(self) -> None:
        """What the system knows of this process, under the names that all programs use."""
        self._families += self._library.ProcessCollector(registry=None).collect()

    def text(self) -> tuple[bytes, str]:
        """All of it, and its media type."""
        exposition = self._library.exposition
        return exposition.generate_latest(self), exposition.CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """What the library asks of a registry."""
        return iter(self._families)

    def _add(self, family: Any, values: dict[tuple[str, ...], float]) -> None:
        for key, value in values.items():
            family.add_metric(key, value)
        self._families.append(family)


def _summed(values: float | Values, combine: Callable[[Any, Any], float]) -> dict[tuple[str, ...], float]:
    if isinstance(values, int | float):
        return {(): values}
    found: dict[tuple[str, ...], float] = {}
    for key, value in values:
        found[key] = combine(found[key], value) if key in found else value
    return found
