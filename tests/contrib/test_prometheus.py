"""Metrics report what happened, are valid, and are correct with several processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import PATIENCE, eventually, parts_of, pool_of, whole_round
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    Hook,
    MemoryRepository,
    Permanent,
    Queue,
    QueueFull,
    Retry,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    Task,
    every,
)
from taskx.contrib import prometheus
from taskx.contrib.prometheus import BUCKETS, PrometheusHook, StoreCollector
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def make(registry, clock):
    """Return a function that makes queues on one repository with one hook; they are stopped at the end."""
    hook = PrometheusHook(registry)
    repository = MemoryRepository(clock)
    made = []

    def make(*hooks: Hook, **config):
        queue = Queue(repository, Config(**config), hooks=[hook, *hooks], clock=clock)
        queue.executor("fine")(lambda: clock.advance(2))
        made.append(queue)
        return queue

    yield make
    for queue in made:
        queue.stop(PATIENCE, cancel=True)


@pytest.fixture
def value(registry):
    """Return a function that reads the value of a metric; it returns None if the metric has none."""
    return lambda name, **labels: registry.get_sample_value(f"taskx_{name}", labels)


def wait_told(queue):
    assert parts_of(queue).hooks.wait(PATIENCE)


class TestHook:
    def test_tasks_are_counted_by_type_and_outcome(self, make, value):
        queue = make(worker_num=1)
        errors = [Retry("again", delay=0), Permanent("no")]

        @queue.executor("bad", max_attempts=3)
        def bad():
            raise errors.pop(0)

        queue.start()
        queue.submit_many([Task(type="fine") for _ in range(3)])
        queue.submit("bad")
        queue.cancel_task(queue.submit("fine", delay=60).id)
        assert queue.drain(PATIENCE)
        assert value("tasks_submitted_total", type="fine") == 4
        assert value("tasks_started_total", type="fine") == 3
        assert value("tasks_finished_total", type="fine", outcome="completed") == 3
        assert value("tasks_finished_total", type="fine", outcome="cancelled") == 1
        assert value("tasks_finished_total", type="fine", outcome="failed") is None
        assert value("tasks_submitted_total", type="bad") == 1
        assert value("tasks_started_total", type="bad") == 2
        assert value("tasks_retried_total", type="bad") == 1
        assert value("tasks_finished_total", type="bad", outcome="failed") == 1

    def test_the_duration_of_each_run_is_measured(self, make, value):
        queue = make(worker_num=1)
        queue.cancel_task(queue.submit("fine").id)
        queue.start()
        queue.submit("fine")
        assert queue.drain(PATIENCE)
        assert value("task_duration_seconds_count", type="fine", outcome="completed") == 1
        assert value("task_duration_seconds_sum", type="fine", outcome="completed") == 2
        assert (
            value("task_duration_seconds_bucket", type="fine", outcome="completed", le="1.0") == 0
        )
        assert (
            value("task_duration_seconds_bucket", type="fine", outcome="completed", le="5.0") == 1
        )

    @pytest.mark.parametrize(("delay", "wait"), [(None, 50), (40, 10), (50, 0)])
    def test_waiting_time_counts_from_when_a_task_could_start(
        self, make, value, clock, delay, wait
    ):
        queue = make(worker_num=1)
        queue.submit("fine", delay=delay)
        clock.advance(50)
        queue.start()
        assert queue.drain(PATIENCE)
        assert value("task_wait_seconds_sum", type="fine") == wait
        assert value("task_wait_seconds_count", type="fine") == 1

    def test_waiting_time_of_an_attempt_counts_from_the_last_one(self, make, value, clock):
        queue = make(worker_num=1)
        errors = [OSError("x")]

        @queue.executor("bad", max_attempts=2)
        def bad():
            clock.advance(30)
            if errors:
                raise errors.pop()

        queue.start()
        queue.submit("bad")
        assert queue.drain(PATIENCE)
        assert value("task_wait_seconds_count", type="bad") == 2
        assert value("task_wait_seconds_sum", type="bad") == 0

    def test_waiting_time_of_a_requeued_task_counts_from_the_requeue(
        self, make, registry, value, clock
    ):
        """The time as a dead letter does not count, so that it raises no alert."""
        queue = make(worker_num=1)
        queue.executor("bad")(lambda: 1 / 0)
        registry.register(StoreCollector(queue))
        queue.start()
        queue.submit("bad")
        assert queue.drain(PATIENCE)
        clock.advance(3 * 86_400)
        queue.pause("bad")
        assert queue.requeue_dead_letters() == 1
        clock.advance(5)
        assert queue.stats().types["bad"].oldest_due == 5
        queue.resume("bad")
        assert queue.drain(PATIENCE)
        assert value("task_wait_seconds_count", type="bad") == 2
        assert value("task_wait_seconds_sum", type="bad") == 5

    def test_stuck_attempts_are_counted(self, make, value, clock):
        queue = make(worker_num=1)
        begun, go_on = threading.Event(), threading.Event()

        @queue.executor("deaf", timeout=60, grace=5)
        def deaf():
            begun.set()
            assert go_on.wait(PATIENCE)

        queue.start()
        queue.submit("deaf")
        assert begun.wait(PATIENCE)
        clock.advance(65)
        assert queue.drain(PATIENCE)
        assert value("tasks_stuck_total", type="deaf") == 1
        assert value("tasks_finished_total", type="deaf", outcome="failed") == 1
        assert value("tasks_running") == 0
        go_on.set()

    def test_tasks_rescued_from_a_dead_process_are_counted(self, make, value, clock):
        queue = make(worker_num=1)
        repository = queue.repository
        repository.create(Task(id="a", type="fine"))
        start = lifecycle.start(repository.get_by_id("a"), clock.now_ms(), "a node that died")
        repository.apply([start])
        queue.start()
        assert queue.drain(PATIENCE)
        assert value("tasks_rescued_total", type="fine") == 1
        assert value("tasks_started_total", type="fine") == 1

    def test_failures_are_counted_by_the_class_of_their_error(self, make, value):
        queue = make(worker_num=1)
        errors = [KeyError("a"), KeyError("b"), OSError("c")]

        @queue.executor("bad")
        def bad():
            raise errors.pop()

        queue.start()
        for _ in range(3):
            queue.submit("bad")
        assert queue.drain(PATIENCE)
        assert value("tasks_failed_total", type="bad", error="KeyError") == 2
        assert value("tasks_failed_total", type="bad", error="OSError") == 1

    def test_attempts_that_are_not_the_last_are_timed_and_counted(self, make, value, clock):
        queue = make(worker_num=1)
        endings = [Snooze(0), OSError("x")]

        @queue.executor("slow", max_attempts=2, retry=RetryPolicy(base=0))
        def slow():
            clock.advance(3 if endings else 10)
            if endings:
                raise endings.pop()

        queue.start()
        queue.submit("slow")
        assert queue.drain(PATIENCE)
        sums = {
            outcome: value("task_duration_seconds_sum", type="slow", outcome=outcome)
            for outcome in ("retried", "snoozed", "completed")
        }
        assert sums == {"retried": 3, "snoozed": 3, "completed": 10}
        assert value("tasks_retried_total", type="slow") == 1
        assert value("tasks_snoozed_total", type="slow") == 1

    def test_interrupted_and_requeued_tasks_are_counted(self, make, value):
        queue = make(worker_num=1)
        begun = threading.Event()

        @queue.executor("hold")
        def hold(ctx):
            begun.set()
            ctx.token.wait(PATIENCE)
            ctx.token.raise_if_cancelled()

        queue.start()
        queue.submit("hold")
        dropped = queue.submit("fine")
        dropped.cancel()
        queue.requeue(dropped.id)
        assert begun.wait(PATIENCE)
        queue.stop(PATIENCE, cancel=True)
        assert value("tasks_interrupted_total", type="hold") == 1
        assert value("tasks_requeued_total", type="fine") == 1

    def test_refused_submits_are_counted_by_reason(self, make, value):
        queue = make(worker_num=1, buffer_size=1)
        begun, go_on = threading.Event(), threading.Event()
        queue.executor("hold")(lambda: begun.set() or go_on.wait(PATIENCE))
        queue.start()
        queue.submit("hold")
        assert begun.wait(PATIENCE)
        queue.submit("fine", unique_key="u")
        with pytest.raises(QueueFull):
            queue.submit("fine")
        for _ in range(2):
            with pytest.raises(DuplicateTask):
                queue.submit("fine", delay=60, unique_key="u")
        wait_told(queue)
        assert value("tasks_refused_total", type="fine", reason="QueueFull") == 1
        assert value("tasks_refused_total", type="fine", reason="DuplicateTask") == 2
        go_on.set()

    def test_a_gap_of_a_schedule_is_counted_once(self, make, value, clock):
        queue = make(worker_num=1)
        queue.schedule("often", every(60), "fine").store()
        clock.advance(3600)
        queue.start()
        eventually(lambda: queue.count_tasks(status="completed") == 1)
        whole_round(queue)  # the housekeeper tells of the gap after the task was stored
        wait_told(queue)
        assert value("schedule_gaps_total", schedule="often") == 1

    def test_a_lost_lease_is_counted(self, make, value):
        queue = make(worker_num=1)
        queue.start()
        assert value("leases_lost_total") == 0
        pool_of(queue).lose_lease()
        wait_told(queue)
        assert value("leases_lost_total") == 1

    def test_capacity_and_health_are_those_of_the_moment_of_the_scrape(
        self, make, value, monkeypatch
    ):
        queues = [make(worker_num=2, buffer_size=10), make(worker_num=3, buffer_size=5)]
        assert (value("workers"), value("buffer_size"), value("healthy")) == (0, 0, 1)
        for queue in queues:
            queue.start()
            wait_told(queue)
        assert (value("workers"), value("buffer_size"), value("healthy")) == (5, 15, 1)
        assert value("events_waiting") == 0
        monkeypatch.setattr(Queue, "healthy", property(lambda self: self is queues[0]))
        assert value("healthy") == 0  # without an event

    def test_running_and_buffered_tasks_of_all_queues_are_added_up(self, make, value):
        begun, go_on = threading.Semaphore(0), threading.Event()

        def hold():
            begun.release()
            assert go_on.wait(PATIENCE)

        queues = [make(worker_num=1), make(worker_num=1)]
        for queue in queues:
            queue.executor("hold")(hold)
            queue.start()
            queue.submit("hold")
            assert begun.acquire(timeout=PATIENCE)
        for _ in range(3):
            queues[0].submit("fine")
        for queue in queues:
            wait_told(queue)
        assert (value("tasks_running"), value("tasks_buffered")) == (2, 3)
        go_on.set()
        for queue in queues:
            assert queue.drain(PATIENCE)
        assert (value("tasks_running"), value("tasks_buffered")) == (0, 0)

    def test_the_records_of_waits_are_no_tasks(self, make, registry, value):
        queue = make(worker_num=2)
        registry.register(StoreCollector(queue))
        gate, inside = threading.Event(), threading.Event()

        @queue.executor("child")
        def child():
            inside.set()
            assert gate.wait(PATIENCE)

        queue.executor("parent")(lambda ctx: ctx.run_all("all", [child.task()]) and None)
        queue.start()
        handle = queue.submit("parent")
        assert inside.wait(PATIENCE)
        eventually(lambda: value("tasks_pending") == 1)  # the parent
        gate.set()
        handle.result(PATIENCE)
        queue.stop()
        ended = {
            type: value("tasks_finished_total", type=type, outcome="completed")
            for type in ("parent", "child", "children")
        }
        assert ended == {"parent": 1, "child": 1, "children": None}

    def test_the_type_is_the_only_label_that_programs_choose(self, make, registry):
        queue = make(worker_num=1)
        queue.start()
        queue.submit_many([Task(type="fine", created_by=str(n)) for n in range(50)])
        assert queue.drain(PATIENCE)
        series = {
            tuple(sorted(sample.labels.items()))
            for family in registry.collect()
            for sample in family.samples
        }
        assert {name for labels in series for name, _ in labels} == {"type", "outcome", "le"}
        assert len(series) <= 4 + 2 * (len(BUCKETS) + 1)

    def test_a_registry_accepts_only_one_hook(self, make, registry):
        with pytest.raises(ConfigurationError, match="share one PrometheusHook") as caught:
            PrometheusHook(registry)
        assert "Duplicated" in str(caught.value.__cause__)

    def test_all_metrics_are_registered_or_none(self, registry):
        taken = Gauge("taskx_tasks_running", "Of another library.", registry=registry)
        before = generate_latest(registry)
        with pytest.raises(ConfigurationError):
            PrometheusHook(registry)
        with pytest.raises(ValueError, match="sorted"):
            PrometheusHook(registry, buckets=[5, 1])
        assert generate_latest(registry) == before
        registry.unregister(taken)
        PrometheusHook(registry)


class TestCollector:
    @pytest.fixture
    def queue(self, make, registry, clock):
        queue = make(worker_num=1)
        queue.declare("t")
        registry.register(StoreCollector(queue))
        return queue

    @pytest.mark.parametrize("thing", ["x", None, MemoryRepository()])
    def test_the_collector_refuses_other_objects_than_queues(self, thing):
        with pytest.raises(ConfigurationError, match="StoreCollector requires a Queue"):
            StoreCollector(thing)

    def test_the_collector_reports_an_empty_store(self, queue, value):
        assert value("repository_up") == 1
        assert value("tasks_pending") == value("dead_letters") == 0
        assert value("oldest_pending_age_seconds", type="fine") == 0
        assert value("nodes") == value("threads_stuck") == value("schedules_overdue") == 0
        assert value("schedule_lag_seconds") == 0

    def test_the_collector_reports_pending_tasks_and_nodes(self, queue, make, value, clock):
        queue.submit("t")
        clock.advance(30)
        queue.submit("t")
        queue.submit("t", delay=60)
        other = make()
        other.start()
        assert value("tasks_pending") == 3
        assert value("oldest_pending_age_seconds", type="t") == 30
        queue.pause("t")
        assert value("oldest_pending_age_seconds", type="t") == 0
        assert value("nodes") == 1
        other.stop(PATIENCE)
        assert value("nodes") == 0

    def test_unfinished_tasks_are_counted_by_type_and_state(self, queue, value, clock):
        def states(type):
            names = ("ready", "paused", "delayed", "blocked", "running")
            return {name: value("tasks", type=type, state=name) for name in names}

        queue.submit("t")
        queue.submit("t", delay=60)
        parent = queue.submit("t", delay=60)
        queue.submit("t", depends_on=[parent])
        assert states("t") == {"ready": 1, "paused": 0, "delayed": 2, "blocked": 1, "running": 0}
        queue.pause("t")
        assert states("t") == {"ready": 0, "paused": 1, "delayed": 2, "blocked": 1, "running": 0}
        assert value("paused", type="t") == 1
        queue.resume("t")
        queue.pause()
        assert states("t")["paused"] == 1
        assert value("paused", type="") == 1
        queue.resume()
        assert value("paused", type="") is None

    def test_dead_letters_are_counted_up_to_a_limit(self, make, clock):
        registry = CollectorRegistry()
        queue = make(worker_num=1)
        queue.executor("bad")(lambda: 1 / 0)
        registry.register(StoreCollector(queue, at_most=3))
        queue.start()
        for number, expected in enumerate((1, 2, 3, 3), 1):
            queue.submit("bad")
            assert queue.drain(PATIENCE)
            assert queue.count_tasks(status="failed") == number
            assert registry.get_sample_value("taskx_dead_letters") == expected

    def test_schedules_are_late_while_no_queue_runs(self, queue, value, clock):
        queue.schedule("a", every(60), "t").store()
        queue.schedule("b", every(600), "t").store()
        clock.advance(150)
        assert value("schedules_overdue") == 1
        assert value("schedule_lag_seconds") == 90
        clock.advance(600)
        assert value("schedules_overdue") == 2
        assert value("schedule_lag_seconds") == 690

    def test_threads_that_run_on_are_counted_while_they_do(self, queue, value, clock):
        begun, go_on = threading.Event(), threading.Event()
        queue.executor("deaf", timeout=60, grace=5)(lambda: begun.set() or go_on.wait(PATIENCE))
        queue.start()
        queue.submit("deaf")
        assert begun.wait(PATIENCE)
        clock.advance(65)
        assert queue.drain(PATIENCE)
        assert value("threads_stuck") == 1
        assert value("types_stuck", type="deaf") == 0  # no task waits for it
        go_on.set()
        eventually(lambda: value("threads_stuck") == 0)

    def test_a_type_whose_tasks_wait_for_stuck_threads_is_reported(self, queue, value, clock):
        begun, go_on = threading.Event(), threading.Event()

        @queue.executor(timeout=60, grace=0.0, max_attempts=2)
        def deaf():
            begun.set()
            go_on.wait(PATIENCE)

        queue.start()
        handle = queue.submit("deaf")
        assert begun.wait(PATIENCE)
        clock.advance(60)
        eventually(lambda: handle.task().stuck_on)
        assert value("types_stuck", type="deaf") == 1
        go_on.set()
        handle.result(PATIENCE)
        assert value("types_stuck", type="deaf") == 0

    def test_a_node_that_may_be_dead_is_not_counted(self, queue, value, clock, monkeypatch):
        now = clock.now_ms()
        nodes = [
            Node(id=str(alive), name="n", beat_at=now - 90_000, alive=alive)
            for alive in (None, True)
        ]
        monkeypatch.setattr(queue.repository.liveness, "nodes", lambda: nodes)
        assert value("nodes") == 1

    def test_an_unreadable_store_loses_only_its_own_metrics(self, tmp_path, caplog):
        registry = CollectorRegistry()
        queue = Queue(SQLiteRepository(tmp_path / "no such folder" / "tasks.db"))
        PrometheusHook(registry)
        registry.register(StoreCollector(queue))  # reads nothing
        text = generate_latest(registry).decode()
        assert "taskx_tasks_running 0.0" in text
        assert "taskx_nodes" not in text
        assert "taskx_repository_up 0.0" in text
        assert "taskx_repository_errors_total 1.0" in text
        assert "taskx_repository_errors_total 2.0" in generate_latest(registry).decode()
        assert "the metrics of the repository are missing" in caplog.text

    def test_a_second_collector_is_refused(self, queue, registry):
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(StoreCollector(queue))


# Valid


@pytest.fixture
def text(make, registry, value, clock):
    """The text of a scrape in which all metrics have values."""
    queue = make(worker_num=1, buffer_size=3)
    begun, go_on = threading.Event(), threading.Event()
    queue.limit("api", concurrency=2, rate="5/s")
    queue.executor("deaf", timeout=60)(lambda: begun.set() or go_on.wait(PATIENCE))
    registry.register(StoreCollector(queue))
    queue.executor("bad", max_attempts=2)(lambda: 1 / 0)
    queue.repository.create(Task(id="a", type="fine"))
    start = lifecycle.start(queue.repository.get_by_id("a"), 0, "a node that died")
    queue.repository.apply([start])
    queue.schedule("often", every(60), "fine").store()
    clock.advance(3600)
    queue.start()
    queue.submit("bad")
    queue.submit("fine", delay=1000, unique_key="u")
    with pytest.raises(DuplicateTask):
        queue.submit("fine", unique_key="u")
    endings = [Snooze(0)]

    @queue.executor("later")
    def later():
        if endings:
            raise endings.pop()

    again = queue.submit("later", delay=1000)
    again.cancel()
    queue.requeue(again.id)
    queue.pause("other")
    queue.hold("api", 86_400)
    queue.submit("deaf")
    assert begun.wait(PATIENCE)
    clock.advance(100)
    assert queue.drain(PATIENCE)
    whole_round(queue)  # the housekeeper tells of the gap after the task was stored
    wait_told(queue)
    go_on.set()
    return generate_latest(registry).decode()


def test_the_librarys_parser_reads_the_metrics(text):
    families = {f.name: f for f in text_string_to_metric_families(text)}
    kinds = {
        name: family.type for name, family in families.items() if not name.endswith("_created")
    }
    assert kinds == {
        "taskx_tasks_submitted": "counter",
        "taskx_tasks_started": "counter",
        "taskx_tasks_finished": "counter",
        "taskx_tasks_retried": "counter",
        "taskx_tasks_stuck": "counter",
        "taskx_tasks_rescued": "counter",
        "taskx_tasks_failed": "counter",
        "taskx_tasks_snoozed": "counter",
        "taskx_tasks_interrupted": "counter",
        "taskx_tasks_requeued": "counter",
        "taskx_tasks_refused": "counter",
        "taskx_schedule_gaps": "counter",
        "taskx_leases_lost": "counter",
        "taskx_repository_errors": "counter",
        "taskx_task_duration_seconds": "histogram",
        "taskx_task_wait_seconds": "histogram",
        "taskx_tasks_running": "gauge",
        "taskx_tasks_buffered": "gauge",
        "taskx_tasks_pending": "gauge",
        "taskx_answers_pending": "gauge",
        "taskx_oldest_pending_age_seconds": "gauge",
        "taskx_limit_slots": "gauge",
        "taskx_limit_slots_taken": "gauge",
        "taskx_limit_free": "gauge",
        "taskx_limit_held_seconds": "gauge",
        "taskx_nodes": "gauge",
        "taskx_workers": "gauge",
        "taskx_buffer_size": "gauge",
        "taskx_events_waiting": "gauge",
        "taskx_healthy": "gauge",
        "taskx_repository_up": "gauge",
        "taskx_tasks": "gauge",
        "taskx_tasks_last_hour": "gauge",
        "taskx_dead_letters": "gauge",
        "taskx_paused": "gauge",
        "taskx_threads_stuck": "gauge",
        "taskx_types_stuck": "gauge",
        "taskx_schedules_overdue": "gauge",
        "taskx_schedule_lag_seconds": "gauge",
    }
    assert all(family.documentation for family in families.values())
    empty = {name for name, family in families.items() if not family.samples}
    assert empty == {"taskx_tasks_interrupted"}


@pytest.mark.process
@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="PROMTOOL IS MISSING: no metric was checked by it"
)
def test_promtool_accepts_the_metrics(text):
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_documentation_names_every_metric(text):
    page = (ROOT / "docs" / "metrics.rst").read_text()
    families = text_string_to_metric_families(text)
    names = [f.name + "_total" * (f.type == "counter") for f in families]
    missing = [n for n in names if not n.endswith("_created") and f"``{n}``" not in page]
    assert not missing


# Several processes

PROGRAM = """
import sys
from taskx import Config, Queue, SQLiteRepository
from taskx.contrib.prometheus import PrometheusHook

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=1), hooks=[PrometheusHook()])

@queue.executor("hold" + sys.argv[2])  # each process has its own type, so that no other runs it
def hold():
    print("holding", flush=True)
    sys.stdin.readline()

queue.executor("quick")(lambda: None)
for _ in range(int(sys.argv[2])):
    queue.submit("quick")
queue.start()
queue.drain()
hold.submit().result()
queue.drain()
print("done", flush=True)
sys.stdin.readline()
queue.stop()
"""

SCRAPE = """
import sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from taskx import Queue, SQLiteRepository
from taskx.contrib.prometheus import StoreCollector

queue = Queue(SQLiteRepository(sys.argv[1]))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
registry.register(StoreCollector(queue))
print(generate_latest(registry).decode())
"""


@pytest.mark.process
def test_counters_of_processes_are_added_up_and_store_metrics_are_not(tmp_path, monkeypatch):
    folder = tmp_path / "metrics"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = str(tmp_path / "tasks.db")

    def python(program: str, *args: object) -> list[str]:
        return [sys.executable, "-c", program, path, *map(str, args)]

    def scrape() -> dict[str, float]:
        ran = subprocess.run(python(SCRAPE), capture_output=True, text=True, check=True)
        return {
            sample.name.removeprefix("taskx_") + "".join(sorted(sample.labels.values())): (
                sample.value
            )
            for family in text_string_to_metric_families(ran.stdout)
            for sample in family.samples
        }

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    children = [subprocess.Popen(python(PROGRAM, count), **pipes) for count in (3, 4)]
    try:
        for child in children:
            assert child.stdout.readline() == "holding\n"
        # One may have run a task of the other one after its drain. Hooks are told a moment later.
        eventually(lambda: scrape()["tasks_finished_totalcompletedquick"] == 7)
        eventually(lambda: scrape()["tasks_running"] == 2)
        found = scrape()
        assert found["tasks_running"] == 2
        assert found["tasks_submitted_totalquick"] == 7
        assert found["task_wait_seconds_countquick"] == 7
        assert found["nodes"] == 2
        assert found["tasks_pending"] == 0
        for child in children:
            child.stdin.write("\n")
            assert child.stdout.readline() == "done\n"
        found = scrape()
        assert (found["tasks_running"], found["nodes"]) == (0, 2)
        assert found["tasks_finished_totalcompletedhold3"] == 1
        assert found["tasks_finished_totalcompletedhold4"] == 1
        for child in children:
            child.communicate("\n", timeout=PATIENCE)
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
    assert scrape()["nodes"] == 0
    assert [child.returncode for child in children] == [0, 0]


ISOLATED = """
import sys
from taskx import Config, Queue, SQLiteRepository
from taskx.contrib.prometheus import PrometheusHook

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=1), hooks=[PrometheusHook()])

@queue.executor(isolation="process")
def work():
    return 1

if __name__ == "__main__":
    with queue:
        assert work.submit().result(60) == 1
"""


@pytest.mark.process
def test_the_child_process_of_an_executor_leaves_no_file(tmp_path, monkeypatch):
    folder, program = tmp_path / "metrics", tmp_path / "program.py"
    folder.mkdir()
    program.write_text(ISOLATED)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run([sys.executable, program, tmp_path / "tasks.db"], check=True)
    assert len({path.stem.rpartition("_")[2] for path in folder.iterdir()}) == 1


def test_an_integration_lists_its_public_names():
    own = {
        name
        for name, value in vars(prometheus).items()
        if getattr(value, "__module__", "") == prometheus.__name__ and not name.startswith("_")
    }
    assert {"BUCKETS", *own} == set(prometheus.__all__)
