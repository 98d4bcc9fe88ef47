"""Faults on purpose: at named points, by killed processes, in repositories."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from typing import get_args

import pytest

from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    MemoryRepository,
    Queue,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
)
from taskx.testing import Faults, InjectedFault, ManualClock, ManualQueue, fail_at, kill_at
from taskx.testing.faults import Point

POINTS = get_args(Point)


@pytest.fixture
def ran():
    return []


@pytest.fixture
def queue(ran):
    made = ManualQueue()
    made.executor("note")(lambda n=0: ran.append(n))
    return made


# Errors at points


def test_before_submit_commit_nothing_is_stored(queue):
    with fail_at(queue, "before submit commit") as fault:
        with pytest.raises(RepositoryUnavailable, match="injected before submit commit") as raised:
            queue.submit("note", id="a")
        assert fault.hits == 1
        assert not raised.value.in_doubt
        assert queue.list_tasks()[1] == 0
        queue.submit("note", id="a")


def test_after_submit_commit_the_task_is_stored_and_in_doubt(queue, ran):
    with fail_at(queue, "after submit commit"):
        with pytest.raises(RepositoryUnavailable) as raised:
            queue.submit("note", id="a")
        assert (raised.value.in_doubt, raised.value.task_id) == (True, "a")
    with pytest.raises(DuplicateTask):
        queue.submit("note", id="a")
    queue.run_all()
    assert ran == [0]


@pytest.mark.parametrize("point", ["before", "after"])
def test_a_start_that_fails_is_made_again_and_counts_nothing(queue, ran, point):
    handle = queue.submit("note")
    with fail_at(queue, f"{point} start commit"), pytest.raises(RepositoryUnavailable):
        queue.run_next()
    assert ran == []
    queue.run_all()
    assert (ran, handle.result(), handle.task().interruptions) == ([0], None, 0)


def test_in_the_executor_the_attempt_fails(queue, ran):
    handle = queue.submit("note", max_attempts=2)
    with fail_at(queue, "in the executor"):
        queue.run_next()
    assert handle.task().attempts[-1].error == "InjectedFault: injected in the executor"
    queue.run_all()
    assert ran == [0]


def test_in_the_executor_a_call_for_many_tasks_fails(queue):
    queue.executor("many", batch=2)(lambda tasks: tasks)
    handles = [queue.submit("many") for _ in range(2)]
    with fail_at(queue, "in the executor"):
        queue.run_next()
    assert "InjectedFault" in handles[0].task().attempts[0].error
    queue.run_all()
    assert [handle.result() for handle in handles] == [{}, {}]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_outcome_is_written_later_and_the_task_runs_once(queue, ran, when):
    handle = queue.submit("note")
    with fail_at(queue, f"{when} outcome commit"):
        queue.run_next()
    queue.run_all()
    assert (ran, handle.result()) == ([0], None)


def test_an_error_of_ones_own_is_raised_as_often_as_asked(queue):
    error = ValueError("mine")
    for n in range(3):
        queue.submit("note", id=str(n))
    with fail_at(queue, "in the executor", error, times=2) as fault:
        queue.run_all()
    assert fault.hits == 2
    failed, count = queue.dead_letters()
    assert (failed[0].error, count) == ("ValueError: mine", 2)


def test_a_point_that_no_task_came_to_is_noticed(queue):
    message = "no task came to the point 'in the executor'"
    with pytest.raises(AssertionError, match=message), fail_at(queue, "in the executor"):
        queue.submit("note")
    assert len(queue.run_all()) == 1


def test_a_commit_of_ones_own_is_no_point(tmp_path):
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with SQLiteRepository(path, prefix="taskx_") as repository:
        queue = ManualQueue(repository)

        @queue.executor("pay")
        def pay(ctx) -> None:
            with ctx.transaction() as tx:
                tx.complete("paid")

        handle = queue.submit("pay")
        message = (
            "no task came to the point 'before outcome commit' outside of its own transactions"
        )
        with pytest.raises(AssertionError, match=message), fail_at(queue, "before outcome commit"):
            queue.run_all()
        assert handle.result() == "paid"
        queue.stop()


def test_the_error_of_the_test_is_not_hidden(queue):
    with pytest.raises(ValueError, match="of the test"), fail_at(queue, "in the executor"):
        raise ValueError("of the test")


def test_nothing_of_a_fault_is_left(queue):
    before = dict(vars(queue.repository))
    with (
        fail_at(queue, "before submit commit") as outer,
        fail_at(queue, "after submit commit", KeyError) as inner,
    ):
        with pytest.raises(RepositoryUnavailable):
            queue.submit("note")
        with pytest.raises(KeyError):
            queue.submit("note")
    assert (outer.hits, inner.hits) == (1, 1)
    assert vars(queue.repository).keys() == before.keys()


def test_a_started_queue_goes_on_after_each_fault(tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        queue = Queue(repository, Config(worker_num=2))
        queue.executor("fine", max_attempts=2)(lambda: "fine")
        for point in POINTS[2:]:
            with fail_at(queue, point):
                handle = queue.submit("fine", id=point)
                if queue.running == 0 and point == POINTS[2]:
                    queue.start()
                assert handle.result(timeout=60) == "fine"
        queue.stop()


@pytest.mark.parametrize(
    "call", [lambda q, p: fail_at(q, p).__enter__(), lambda q, p: kill_at(p, q)]
)
def test_an_unknown_point_is_refused(queue, call):
    with pytest.raises(ConfigurationError, match="point must be one of"):
        call(queue, "during lunch")


# Killed processes


def note_run(folder):
    with (folder / "ran").open("a") as file:
        file.write("x")


def work(path):
    """Submit a task, and run it."""
    queue = Queue(SQLiteRepository(path), Config(worker_num=1))
    queue.executor("note")(lambda: note_run(path.parent))
    with queue:
        queue.submit("note", id="a").result(timeout=60)


@pytest.mark.process
@pytest.mark.parametrize("point", POINTS)
def test_a_task_that_was_accepted_survives_the_death_of_its_process(tmp_path, point):
    path = tmp_path / "tasks.db"
    kill_at(point, work, path)
    with SQLiteRepository(path) as repository:
        queue = ManualQueue(repository)
        queue.executor("note")(lambda: note_run(tmp_path))
        tasks, count = queue.list_tasks()
        assert count == (0 if point == "before submit commit" else 1)
        queue.run_all()
        if count:
            task = queue.get_task_status(tasks[0].id)
            assert task.status is TaskStatus.COMPLETED
            assert task.crashes == (1 if point in POINTS[4:6] else 0)
            assert (tmp_path / "ran").read_text() == ("xx" if point == POINTS[5] else "x")
        queue.stop()


@pytest.mark.process
def test_a_program_that_never_comes_to_the_point_is_noticed(tmp_path, capfd):
    with pytest.raises(AssertionError, match="ended with exit code 0 before"):
        kill_at("in the executor", lambda: None)
    with pytest.raises(AssertionError, match="ended with exit code 1 before"):
        kill_at("in the executor", lambda: 1 / 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(AssertionError, match="exit code 0"):
        kill_at("in the executor", work, tmp_path / "tasks.db", passing=2)
    with pytest.raises(AssertionError, match=r"in 0\.05 s"):
        kill_at("in the executor", threading.Event().wait, timeout=0.05)


# Repositories that fail


def test_a_repository_fails_as_often_as_asked(queue, ran):
    with Faults(queue.repository) as faults:
        faults.fail(times=2)
        for _ in range(2):
            with pytest.raises(RepositoryUnavailable, match="injected"):
                queue.submit("note")
        queue.submit("note")
        faults.fail(OSError, on="apply")
        with pytest.raises(OSError, match=r"^$"):
            queue.submit("note")
        assert queue.list_tasks()[1] == 1
        faults.heal()
        assert "apply" in faults.calls
        assert len(queue.run_all()) == 1
    assert not {*vars(queue.repository)} & {"apply", "find", "list"}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_lists_and_counts_fail_too(tmp_path, kind):
    made = MemoryRepository() if kind == "memory" else SQLiteRepository(tmp_path / "tasks.db")
    with made as repository:
        queue = Queue(repository)
        queue.declare("any")
        queue.submit("any")
        with Faults(repository) as faults:
            faults.fail()
            for call in (queue.list_tasks, queue.count_tasks, queue.stats, queue.flows):
                with pytest.raises(RepositoryUnavailable, match="injected"):
                    call()
            faults.heal()
            faults.fail(on="list_after", times=1)
            assert queue.count_tasks() == 1
            with pytest.raises(RepositoryUnavailable, match="injected"):
                queue.list_tasks()
        assert queue.list_tasks()[1] == 1
        assert "list_after" not in vars(repository.reads)


def test_a_failure_after_the_call_is_in_doubt(queue):
    with Faults(queue.repository) as faults:
        faults.fail(on="apply", after=True, times=1)
        with pytest.raises(RepositoryUnavailable) as raised:
            queue.submit("note", id="a")
        assert raised.value.in_doubt
        assert queue.get_task_status("a").status is TaskStatus.PENDING


def test_a_delay_moves_the_clock_of_the_repository():
    clock = ManualClock()
    repository = MemoryRepository(clock=clock)
    with Faults(repository) as faults:
        faults.delay(2, on=["list", "count"])
        before = clock.monotonic()
        repository.list(TaskFilter())
        repository.notes("")
        assert clock.monotonic() == before + 2
    real = MemoryRepository()
    with Faults(real) as faults:
        for _ in range(2):
            faults.delay(0.001)
            before = time.monotonic()
            assert real.count(TaskFilter()) == 0
            assert time.monotonic() >= before + 0.001
            faults.heal()


def test_a_stalled_repository_answers_when_it_is_healed():
    queue = Queue(MemoryRepository(), Config(worker_num=1))
    queue.executor("fine")(lambda: "fine")
    results = []
    with Faults(queue.repository) as faults:
        faults.stall(on="apply")
        thread = threading.Thread(target=lambda: results.append(queue.submit("fine")))
        thread.start()
        assert faults.stalled.wait(60)
        assert results == []
        faults.heal()
        thread.join(60)
    assert len(results) == 1


class Eight(TaskRepository):
    """A repository of the eight methods, in a dict."""

    def __init__(self):
        self.inner = MemoryRepository()

    def create(self, task):
        self.inner.create(task)

    def get_by_id(self, task_id):
        return self.inner.get_by_id(task_id)

    def update(self, task):
        self.inner.update(task)

    def update_status(self, task_id, status, message=""):
        self.inner.update_status(task_id, status, message)

    def update_progress(self, task_id, progress, message=""):
        self.inner.update_progress(task_id, progress, message)

    def list(self, filter):
        return self.inner.list(filter)

    def count(self, filter):
        return self.inner.count(filter)

    def delete(self, task_id):
        self.inner.delete(task_id)


def test_a_repository_of_eight_methods_can_fail_too():
    eight = Eight()
    with Faults(eight) as faults:
        faults.fail(InjectedFault, on="create", times=1)
        with pytest.raises(InjectedFault):
            eight.create(Task(id="a", type="t"))
    eight.create(Task(id="a", type="t"))
    assert eight.count(TaskFilter()) == 1


def test_mistakes_are_explained(queue):
    with Faults(queue.repository) as faults:
        with pytest.raises(ConfigurationError, match="no method insert; the repository has apply"):
            faults.fail(on="insert")
        with pytest.raises(ConfigurationError, match="times"):
            faults.fail(times=0)
    with pytest.raises(ConfigurationError, match="expected a repository, got object"):
        Faults(object())
