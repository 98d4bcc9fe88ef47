"""Metrics for Prometheus: a hook that counts events, and a collector that reads the repository."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from datetime import datetime
from typing import Any

from taskx import ConfigurationError, Hook, Queue, RepositoryError, Task, TaskStatus, TaskxError
from taskx.tasks import permission

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError:
    raise ConfigurationError(
        "taskx.contrib.prometheus needs prometheus-client: pip install 'taskx-queue[prometheus]'"
    ) from None

__all__ = ["BUCKETS", "PrometheusHook", "StoreCollector"]

#: Upper bounds of the histograms, in seconds: from a fast call to a task of one hour.
BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)

# Records of what tasks wait for: they are no work.
_NO_WORK = ("answer", "children")

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

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            name = f"taskx_task_{name}_seconds"
            return Histogram(name, what, ("type", *labels), registry=None, buckets=buckets)

        self._submitted = counter("submitted", "Tasks stored.")
        self._started = counter("started", "Attempts begun.")
        self._finished = counter("finished", "Tasks completed, failed or cancelled.", "outcome")
        self._failed = counter("failed", "Tasks failed, by the class of the last error.", "error")
        self._retried = counter("retried", "Attempts that raised and are followed by another.")
        self._snoozed = counter("snoozed", "Attempts that asked to run again later.")
        self._interrupted = counter("interrupted", "Attempts cut short by the stop of a queue.")
        self._stuck = counter("stuck", "Attempts that timed out and whose threads ran on.")
        self._rescued = counter("rescued", "Tasks taken back from processes that had died.")
        self._requeued = counter("requeued", "Failed or cancelled tasks that were requeued.")
        self._refused = counter("refused", "Submits of valid tasks that were refused.", "reason")
        self._duration = histogram("duration", "Time that an attempt took.", "outcome")
        self._wait = histogram("wait", "Time from when a task could start until it did.")
        what = "Times in which no queue ran at ticks of a schedule."
        self._gaps = Counter("taskx_schedule_gaps", what, ("schedule",), registry=None)
        self._queues: set[Queue] = set()
        self._lock = threading.Lock()
        self._process = None if permission.in_child else _ProcessMetrics(self._queues)
        _register(
            registry,
            self._submitted,
            self._started,
            self._finished,
            self._failed,
            self._retried,
            self._snoozed,
            self._interrupted,
            self._stuck,
            self._rescued,
            self._requeued,
            self._refused,
            self._duration,
            self._wait,
            self._gaps,
            *(() if self._process is None else self._process.metrics),
        )
        self._registry = registry

    def queue_started(self, queue: Queue) -> None:
        with self._lock:
            if self._process is None:
                self._process = _ProcessMetrics(self._queues)
                _register(self._registry, *self._process.metrics)
            self._queues.add(queue)
        self._refresh()

    def queue_stopped(self, queue: Queue) -> None:
        with self._lock:
            self._queues.discard(queue)
        self._refresh()

    def submitted(self, task: Task) -> None:
        self._submitted.labels(task.type).inc()
        self._refresh()

    def refused(self, task: Task, error: TaskxError) -> None:
        self._refused.labels(task.type, type(error).__name__).inc()

    def started(self, task: Task) -> None:
        self._started.labels(task.type).inc()
        if (waited := _waited(task)) is not None:
            self._wait.labels(task.type).observe(waited)
        self._refresh()

    def finished(self, task: Task) -> None:
        if task.type in _NO_WORK:
            return
        outcome = task.status.value
        self._finished.labels(task.type, outcome).inc()
        if task.status is TaskStatus.FAILED:
            self._failed.labels(task.type, task.error_type or "").inc()
        if task.duration:
            self._duration.labels(task.type, outcome).observe(task.duration)
        self._refresh()

    def retried(self, task: Task, error: str, delay: float) -> None:
        self._retried.labels(task.type).inc()
        self._attempt_ended(task, "retried")

    def snoozed(self, task: Task, delay: float) -> None:
        self._snoozed.labels(task.type).inc()
        self._attempt_ended(task, "snoozed")

    def interrupted(self, task: Task) -> None:
        self._interrupted.labels(task.type).inc()
        self._refresh()

    def stuck(self, task: Task) -> None:
        self._stuck.labels(task.type).inc()
        self._refresh()

    def rescued(self, task: Task) -> None:
        self._rescued.labels(task.type).inc()

    def requeued(self, task: Task) -> None:
        self._requeued.labels(task.type).inc()

    def lease_lost(self, node: str) -> None:
        if self._process is not None:
            self._process.leases.inc()

    def ticks_missed(self, schedule: str, since: datetime) -> None:
        self._gaps.labels(schedule).inc()

    def _attempt_ended(self, task: Task, outcome: str) -> None:
        for attempt in task.earlier_attempts[-1:]:
            if attempt.started_at is not None and attempt.ended_at is not None:
                seconds = (attempt.ended_at - attempt.started_at).total_seconds()
                self._duration.labels(task.type, outcome).observe(max(0.0, seconds))
        self._refresh()

    def _refresh(self) -> None:
        with self._lock:  # each queue has a thread of its own, and the latest values must win
            if self._process is not None:
                self._process.refresh()


class _ProcessMetrics:
    """The metrics without labels of a process that starts queues.

    In multiprocess mode, making one opens a file that stays when the process has ended, so an executor's
    child process makes none.
    """

    def __init__(self, queues: Set[Queue]) -> None:
        self._queues = queues
        self._values: dict[Gauge, Callable[[Set[Queue]], float]] = {}

        def gauge(name: str, what: str, value: Callable[[Set[Queue]], float], mode: Any) -> None:
            made = _FreshGauge(f"taskx_{name}", what, registry=None, multiprocess_mode=mode)
            made.refresh = self.refresh
            self._values[made] = value

        def total(name: str, what: str, value: Callable[[Queue], float]) -> None:
            gauge(name, what, lambda queues: sum(map(value, queues)), "livesum")

        total("tasks_running", "Executors at work.", lambda queue: queue.running)
        total("tasks_buffered", "Tasks that wait in the buffer.", lambda queue: queue.buffered)
        total("workers", "Worker threads.", lambda queue: queue.config.worker_num)
        total("buffer_size", "Tasks for which buffers have room.", lambda q: q.config.buffer_size)
        total("events_waiting", "Events not told to hooks yet.", lambda q: q.events_waiting)
        everywhere = "1 if each queue of the process is healthy, else 0."
        gauge("healthy", everywhere, lambda queues: all(q.healthy for q in queues), "livemin")
        self.leases = Counter("taskx_leases_lost", "Leases that nodes lost.", registry=None)
        self.metrics: tuple[Collector, ...] = (*self._values, self.leases)

    def refresh(self) -> None:
        """Set all gauges to the values of this moment."""
        queues = {*self._queues}
        for gauge, value in self._values.items():
            gauge.set(value(queues))


class _FreshGauge(Gauge):
    """A gauge that is set before it is read. In multiprocess mode another process reads its file."""

    refresh: Callable[[], None]

    def collect(self) -> Iterable[Metric]:
        self.refresh()
        return super().collect()


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

    Every process that shares the repository reports the same values. Register the collector in the process
    that answers the scrape: ``REGISTRY.register(StoreCollector(queue))``. Do not add up the values of
    several processes. While the repository cannot be read, ``taskx_repository_up`` is 0 and the other
    metrics are missing.

    Args:
        queue: a queue on the repository, started or not.
        at_most: most delayed, blocked and running tasks that are read to count them by type, and most
            failed tasks that are counted.

    Raises:
        ConfigurationError: the first argument is not a queue.
    """

    def __init__(self, queue: Queue, at_most: int = 10_000) -> None:
        if not isinstance(queue, Queue):
            raise ConfigurationError(f"StoreCollector requires a Queue, not {type(queue).__name__}")
        self._queue = queue
        self._at_most = at_most
        self._errors = 0

    def describe(self) -> Iterator[Metric]:
        # Without values, so that registering the collector does not read the repository.
        yield from (make() for make in _FAMILIES.values())

    def collect(self) -> Iterator[Metric]:
        found = {name: make() for name, make in _FAMILIES.items()}
        try:
            self._read(found)
        except RepositoryError as error:
            _log.warning("the metrics of the repository are missing: %s", error)
            self._errors += 1
            found = {name: _FAMILIES[name]() for name in ("repository_up", "repository_errors")}
        found["repository_up"].add_metric([], len(found) > 2)
        found["repository_errors"].add_metric([], self._errors)
        return iter(found.values())

    def _read(self, found: Mapping[str, Any]) -> None:
        queue, paused = self._queue, self._queue.paused
        stats = queue.stats(at_most=self._at_most)
        for type, of in stats.types.items():
            ready = ["paused", "ready"] if type in paused else ["ready", "paused"]
            numbers = zip(ready, (of.waiting, 0), strict=True)
            for state, number in (
                *numbers,
                ("delayed", of.delayed),
                ("blocked", of.blocked),
                ("running", of.running),
            ):
                found["tasks"].add_metric([type, state], number)
            for outcome in ("completed", "failed", "cancelled", "retried"):
                found["tasks_last_hour"].add_metric([type, outcome], getattr(of, outcome))
            oldest = 0.0 if type in paused else of.oldest_due or 0.0
            found["oldest_pending_age_seconds"].add_metric([type], oldest)
        dead = queue.count_tasks(status=TaskStatus.FAILED, at_most=self._at_most)
        found["dead_letters"].add_metric([], dead)
        for type in ("", *paused.types) if paused.everything else paused.types:
            found["paused"].add_metric([type], 1)
        pending = queue.count_tasks(status=TaskStatus.PENDING)
        no_work = sum(queue.count_tasks(status=TaskStatus.PENDING, type=type) for type in _NO_WORK)
        found["tasks_pending"].add_metric([], max(0, pending - no_work))
        found["answers_pending"].add_metric([], stats.answers)
        for limit in () if queue.repository.shortcoming else queue.limits():
            if limit.concurrency is not None:
                found["limit_slots"].add_metric([limit.name], limit.concurrency)
                if limit.taken is not None:
                    found["limit_slots_taken"].add_metric([limit.name], limit.taken)
            for rate, free in zip(limit.rates, limit.free, strict=False):
                found["limit_free"].add_metric([limit.name, rate], free)
            if limit.held_until is not None:
                left = limit.held_until.timestamp() - queue.clock.now_ms() / 1000
                found["limit_held_seconds"].add_metric([limit.name], max(0.0, left))
        nodes = sum(node.lives for node in queue.repository.nodes())
        found["nodes"].add_metric([], nodes)
        self._read_health(found, stats.types)

    def _read_health(self, found: Mapping[str, Any], types: Iterable[str]) -> None:
        health = self._queue.health(oldest_due=None, nodes=0, stuck=0, schedule_overdue=0)
        facts = [(problem.kind, problem.facts) for problem in health.problems]
        stuck = sum(known["threads"] for kind, known in facts if kind == "stuck")
        found["threads_stuck"].add_metric([], stuck)
        waiting = {known["type"]: known["waiting"] for kind, known in facts if kind == "stuck_type"}
        for type in types:
            found["types_stuck"].add_metric([type], waiting.get(type, 0))
        late = [known for kind, known in facts if kind == "schedule_overdue"]
        found["schedules_overdue"].add_metric([], sum(known["number"] for known in late))
        lag = max((known["seconds"] for known in late), default=0.0)
        found["schedule_lag_seconds"].add_metric([], lag)


def _family(kind: Any, name: str, what: str, *labels: str) -> Callable[[], Any]:
    return lambda: kind(f"taskx_{name}", what, labels=labels)


_FAMILIES: Mapping[str, Callable[[], Any]] = {
    name: _family(kind, name, what, *labels)
    for kind, name, what, *labels in (
        (GaugeMetricFamily, "repository_up", "1 if the repository was read, else 0."),
        (CounterMetricFamily, "repository_errors", "Scrapes for which it was not read."),
        (GaugeMetricFamily, "tasks", "Unfinished tasks by type and state.", "type", "state"),
        (
            GaugeMetricFamily,
            "tasks_last_hour",
            "Tasks that ended in the last hour, and attempts that were retried.",
            "type",
            "outcome",
        ),
        (GaugeMetricFamily, "tasks_pending", "Pending tasks, delayed ones included."),
        (GaugeMetricFamily, "answers_pending", "Answers that somebody has yet to give."),
        (
            GaugeMetricFamily,
            "oldest_pending_age_seconds",
            "How long the oldest ready task of a type waits.",
            "type",
        ),
        (GaugeMetricFamily, "dead_letters", "Failed tasks."),
        (GaugeMetricFamily, "paused", "1 for each paused type; the type is empty for all.", "type"),
        (GaugeMetricFamily, "limit_slots", "Most tasks of a named limit at once.", "limit"),
        (GaugeMetricFamily, "limit_slots_taken", "Slots of it that nodes keep.", "limit"),
        (GaugeMetricFamily, "limit_free", "What may start now by a rate of it.", "limit", "rate"),
        (GaugeMetricFamily, "limit_held_seconds", "Until its hold ends, if it is held.", "limit"),
        (GaugeMetricFamily, "nodes", "Started queues that are alive."),
        (GaugeMetricFamily, "threads_stuck", "Threads of timed-out tasks that run on."),
        (
            GaugeMetricFamily,
            "types_stuck",
            "Waiting tasks of a type, if all of them wait for stuck threads.",
            "type",
        ),
        (GaugeMetricFamily, "schedules_overdue", "Schedules with a tick that has no task."),
        (GaugeMetricFamily, "schedule_lag_seconds", "Age of the oldest tick without a task."),
    )
}
