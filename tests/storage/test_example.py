"""A queue on the example repository for authors: every feature works."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from helpers import PATIENCE, run_in_thread
from strikes import every_strike

from taskx import (
    DuplicateTask,
    Task,
    TaskFailed,
    TaskFilter,
    TaskStatus,
    chain,
    every,
)
from taskx.repository import example
from taskx.repository.example import ExampleRepository
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.testing import RepositoryContract

from .repositories import insert

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")

HOLD = """
    import sys, threading
    from taskx import Config, Queue
    from taskx.repository.example import ExampleRepository
    from taskx.tasks.timing import Timing

    timing = Timing(hand_back_after=3600.0)  # as ``calm``
    queue = Queue(ExampleRepository(sys.argv[1]), Config(worker_num=1), timing=timing)

    @queue.executor("work")
    def work(n):
        if n == 0:
            print("runs", flush=True)
            threading.Event().wait()
        return n

    queue.start()
    print("started", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def repository(tmp_path):
    with ExampleRepository(tmp_path / "example.db") as repository:
        yield repository


@pytest.fixture
def queue(make_queue):
    return make_queue(worker_num=3)


class TestItsEightMethods(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self, tmp_path):
        with ExampleRepository(tmp_path / "example.db") as repository:
            yield repository


def test_the_example_stays_small():
    assert len(Path(example.__file__).read_text(encoding="utf-8").splitlines()) <= 450


def test_tasks_are_executed_retried_delayed_and_cancelled(queue):
    failures = [OSError("once")]

    @queue.executor("square", max_attempts=2)
    def square(n):
        if failures:
            raise failures.pop()
        return n * n

    later = queue.submit("square", {"n": 2}, delay=3600)
    with queue:
        handle = queue.submit("square", {"n": 3}, priority=5, created_by="me")
        assert handle.result(PATIENCE) == 9
        assert queue.get_task_status(handle.id).errors == 1
        assert queue.submit("square", {"n": 4}, delay=0.01).result(PATIENCE) == 16
        assert queue.cancel_task(later.id)
        assert list(queue.map(square, range(20), timeout=PATIENCE)) == [n * n for n in range(20)]
        found, total = queue.list_tasks(TaskFilter(status=TaskStatus.CANCELLED))
        assert ([task.id for task in found], total) == ([later.id], 1)


def test_a_running_task_is_cancelled(queue):
    begun = threading.Event()

    @queue.executor("wait")
    def wait(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        ctx.token.raise_if_cancelled()

    with queue:
        handle = queue.submit("wait")
        assert begun.wait(PATIENCE)
        assert not queue.cancel_task(handle.id)
        with pytest.raises(CancelledError):
            handle.result(PATIENCE)


def test_flows_unique_keys_and_turns_work(queue):
    inside, most = [], []

    @queue.executor("add")
    def add(n):
        inside.append(n)
        most.append(len(inside))
        inside.pop()
        return n

    @queue.executor("fail")
    def fail():
        raise ValueError("no")

    first = queue.submit("add", {"n": 1}, unique_key="k")
    with pytest.raises(DuplicateTask) as caught:
        queue.submit("add", {"n": 1}, unique_key="k")
    assert caught.value.task_id == first.id
    child = queue.submit("add", {"n": 2}, depends_on=[first])
    flow = queue.submit_flow(chain(fail.task(), add.task(n=3)))
    with queue:
        assert child.result(PATIENCE) == 2
        with pytest.raises(TaskFailed):
            flow.result(PATIENCE)
        del most[:]
        turns = [queue.submit("add", {"n": n}, concurrency_key="c") for n in range(10)]
        assert [turn.result(PATIENCE) for turn in turns] == list(range(10))
        assert max(most) == 1
    assert [queue.get_task_status(i).status.value for i in flow.ids] == ["failed", "cancelled"]


def test_schedules_pauses_and_batches_work(queue):
    ticked = threading.Event()

    @queue.executor("tick")
    def tick():
        ticked.set()

    schedule = queue.schedule("often", every(1), "tick")
    with queue:
        assert ticked.wait(PATIENCE)
        schedule.remove()
        queue.pause("tick")
        handles = queue.submit_many([Task(type="tick") for _ in range(50)])
        queue.resume("tick")
        for handle in handles:
            handle.result(PATIENCE)


def test_the_tasks_of_a_dead_process_run_again(queue, repository, spawn):
    """They run in another process: the running task, and the tasks in the dead process's buffer."""
    child = spawn(HOLD, repository.path)
    assert child.read() == "started"
    queue.declare("work")
    handles = [queue.submit("work", {"n": n}) for n in (0, 1, 2)]
    assert child.read() == "runs"
    child.kill()

    @queue.executor("work")
    def work(n):
        return n + 10

    with queue:
        assert [handle.result(PATIENCE) for handle in handles] == [10, 11, 12]
    task = queue.get_task_status(handles[0].id)
    assert (task.crashes, task.starts, task.errors) == (1, 2, 0)


def test_two_processes_run_each_task_once(queue, repository, spawn):

    @queue.executor("work")
    def work(n):
        return n

    child = spawn(HOLD, repository.path)
    assert child.read() == "started"
    handles = [queue.submit("work", {"n": n}) for n in range(1, 200)]
    with queue:
        assert [handle.result(PATIENCE) for handle in handles] == list(range(1, 200))
    assert {queue.get_task_status(handle.id).starts for handle in handles} == {1}


def test_an_interrupted_transaction_is_applied_whole_or_not_at_all(repository):
    """Afterwards another thread can use the repository."""
    repository.count(TaskFilter())

    def pair(number):
        return [insert(f"{number}{letter}", SYSTEM_CLOCK) for letter in "ab"]

    def found(number):
        return len(repository.find("id", [f"{number}a", f"{number}b"], ("id",)))

    outcomes = set()
    for number, _ in enumerate(every_strike(lambda point: repository.apply(pair(point)))):
        outcomes.add(run_in_thread(lambda number=number: found(number))())
    assert outcomes == {0, 2}
