"""Metrics for Prometheus: a hook that counts events, and a collector that reads the repository."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from taskx import ConfigurationError, Hook, Queue, RepositoryError, Task, TaskFilter, TaskStatus
from taskx.common import permission
from taskx.storage.queries import oldest_ready

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError:
    raise ConfigurationError(
        "taskx.contrib.prometheus needs prometheus-client: pip install 'taskx-queue[prometheus]'"
    ) from None

__all__ = ["BUCKETS", "PrometheusHook", "StoreCollector"]

#: Upper bounds of the histograms, in seconds: from a fast call to a task of one hour.
BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)

_log = logging.getLogger("taskx")


class PrometheusHook(Hook):
    """A hook that counts the work of this process: ``Queue(..., hooks=[PrometheusHook()])``.

    Use one hook for all queues of a process. It works in prometheus_client's multiprocess mode.

    Args:
        registry: the registry for the metrics.
        buckets: the upper bounds of both histograms, in seconds.

    Raises:
        ConfigurationError: the registry already has these metrics.
    """

    def __init__(
        self, registry: CollectorRegistry = REGISTRY, buckets: Sequence[float] = BUCKETS
    ) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"taskx_tasks_{name}", what, ("type", *labels), registry=None)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(
                f"taskx_task_{name}_seconds", what, ("type",), registry=None, buckets=buckets
            )

        self._submitted = counter("submitted", "Tasks stored.")
        self._started = counter("started", "Attempts begun.")
        self._finished = counter("finished", "Tasks completed, failed or cancelled.", "outcome")
        self._retried = counter("retried", "Attempts that raised and are followed by another.")
        self._stuck = counter("stuck", "Attempts that timed out and whose threads ran on.")
        self._rescued = counter("rescued", "Tasks taken back from processes that had died.")
        self._duration = histogram("duration", "Time that the last attempt of a task took.")
        self._wait = histogram("wait", "Time from when a task could start until it did.")
        # In multiprocess mode, making a gauge opens a file that stays when the process has ended.
        self._gauges: tuple[Gauge, ...] = () if permission.in_child else _make_gauges()
        _register(
            registry,
            *(self._submitted, self._started, self._finished, self._retried),
            *(self._stuck, self._rescued, self._duration, self._wait),
            *self._gauges,
        )
        self._registry = registry
        self._queues: set[Queue] = set()
        self._lock = threading.Lock()

    def queue_started(self, queue: Queue) -> None:
        with self._lock:
            if not self._gauges:
                self._gauges = _make_gauges()
                _register(self._registry, *self._gauges)
            self._queues.add(queue)
        self._set_gauges()

    def queue_stopped(self, queue: Queue) -> None:
        with self._lock:
            self._queues.discard(queue)
        self._set_gauges()

    def submitted(self, task: Task) -> None:
        self._submitted.labels(task.type).inc()
        self._set_gauges()

    def started(self, task: Task) -> None:
        self._started.labels(task.type).inc()
        if (waited := _waited(task)) is not None:
            self._wait.labels(task.type).observe(waited)
        self._set_gauges()

    def finished(self, task: Task) -> None:
        self._finished.labels(task.type, task.status.value).inc()
        if task.duration:
            self._duration.labels(task.type).observe(task.duration)
        self._set_gauges()

    def retried(self, task: Task, error: str, delay: float) -> None:
        self._retried.labels(task.type).inc()
        self._set_gauges()

    def stuck(self, task: Task) -> None:
        self._stuck.labels(task.type).inc()
        self._set_gauges()

    def rescued(self, task: Task) -> None:
        self._rescued.labels(task.type).inc()

    def snoozed(self, task: Task, delay: float) -> None:
        self._set_gauges()

    def interrupted(self, task: Task) -> None:
        self._set_gauges()

    def _set_gauges(self) -> None:
        with self._lock:  # each queue has a thread of its own, and the latest values must win
            if self._gauges:
                running, buffered = self._gauges
                running.set(sum(queue.running for queue in self._queues))
                buffered.set(sum(queue.buffered for queue in self._queues))


def _make_gauges() -> tuple[Gauge, ...]:
    """Make the gauges of a process that starts a queue; an executor's child process needs none."""
    return tuple(
        Gauge(f"taskx_tasks_{name}", what, registry=None, multiprocess_mode="livesum")
        for name, what in (
            ("running", "Executors at work."),
            ("buffered", "Submitted tasks that wait in the buffer."),
        )
    )


def _register(registry: CollectorRegistry, *metrics: Collector) -> None:
    """Register all metrics or none."""
    done: list[Collector] = []
    try:
        for metric in metrics:
            registry.register(metric)
            done.append(metric)
    except ValueError as error:
        for metric in done:
            registry.unregister(metric)
        raise ConfigurationError(
            "the registry already has these metrics: share one PrometheusHook between all queues of a "
            "process, or give another registry"
        ) from error


def _waited(task: Task) -> float | None:
    """Return the seconds between the time when an attempt could start and its start."""
    if task.started_at is None:
        return None
    since = [task.created_at, task.run_at, *(a.ended_at for a in task.earlier_attempts[-1:])]
    known = [moment for moment in since if moment is not None]
    return max(0.0, (task.started_at - max(known, default=task.started_at)).total_seconds())


class StoreCollector(Collector):
    """A collector that reads a queue's repository at every scrape.

    It reports the number of pending tasks, how long the oldest one waits, and the number of nodes. Every
    process that shares the repository reports the same values. Register the collector in the process that
    answers the scrape: ``REGISTRY.register(StoreCollector(queue))``. Do not add up the values of several
    processes. While the repository cannot be read, its metrics are missing.

    Args:
        queue: a queue on the repository, started or not.

    Raises:
        ConfigurationError: the argument is not a queue.
    """

    def __init__(self, queue: Queue) -> None:
        if not isinstance(queue, Queue):
            raise ConfigurationError(f"StoreCollector requires a Queue, not {type(queue).__name__}")
        self._repository = queue.repository

    def describe(self) -> Iterator[Metric]:
        # Without values, so that registering the collector does not read the repository.
        return self._metrics(None, None, None)

    def collect(self) -> Iterator[Metric]:
        repository = self._repository
        try:
            pending = repository.count(TaskFilter(status=TaskStatus.PENDING))
            since = oldest_ready(repository)
            nodes = sum(node.alive is not False for node in repository.nodes())
        except RepositoryError as error:
            _log.warning("the metrics of the repository are missing: %s", error)
            return iter(())
        age = 0.0 if since is None else max(0.0, (repository.clock.now_ms() - since) / 1000)
        return self._metrics(pending, age, nodes)

    def _metrics(self, pending: Any, age: Any, nodes: Any) -> Iterator[Metric]:
        for name, what, value in (
            ("taskx_tasks_pending", "Pending tasks, delayed ones included.", pending),
            ("taskx_oldest_pending_age_seconds", "How long the oldest ready task waits.", age),
            ("taskx_nodes", "Started queues that are alive.", nodes),
        ):
            yield GaugeMetricFamily(name, what, value)
