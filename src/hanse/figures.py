"""Figures of this process for Prometheus, at an HTTP address of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from hanse.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric, now. value: a number, or one for each value of `label`. counter: it only grows, and its name ends in _total."""

    name: str
    help: str
    value: float | Mapping[str, float]
    label: str = ""
    counter: bool = False


class _Collector:
    def __init__(self, figures: Callable[[], Iterable[Figure]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[object]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for figure in self._figures():
            form = CounterMetricFamily if figure.counter else GaugeMetricFamily
            family = form(figure.name, figure.help, labels=[figure.label] if figure.label else [])
            for label, value in (figure.value if isinstance(figure.value, Mapping) else {"": figure.value}).items():
                family.add_metric([label] if figure.label else [], value)
            yield family


@contextlib.contextmanager
def published(address: str | None, figures: Callable[[], Iterable[Figure]]) -> Iterator[None]:
    """Answer `GET /metrics` at host:port meanwhile, with `figures` and the process's own memory, CPU time and open files.

    figures: called by another thread for each request. No address: nothing is published. Raises ConfigError if nothing can listen there.
    """
    if address is None:
        yield
        return
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(figures))  # type: ignore[arg-type]
    ProcessCollector(registry=registry)
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"metrics cannot be published at {address}: {error}", hint="Name another host:port under `metrics`.") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
