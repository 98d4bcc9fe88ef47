"""Many threads at once on one queue, whether the interpreter has a lock or not."""

from __future__ import annotations

import importlib
import logging
import sys
import sysconfig
import threading
from collections import Counter
from pathlib import Path

import pytest
from helpers import PATIENCE, parts_of, pool_of

import taskx
from taskx import Hook, TaskCancelled

THREADS = 32
#: The modules that need a site of Django.
SITES = ("taskx", "contrib", "django")


@pytest.fixture(autouse=True)
def frequent_switches():
    """Let threads take turns as often as possible, where there is an interpreter's lock to pass on."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(work):
    """Call a function with a number in each of many threads, which begin together; raise their errors."""
    barrier, errors = threading.Barrier(THREADS), []

    def run(number):
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  (shown by the assertion)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


class Told(Hook):
    """A hook that counts the events of each task."""

    def __init__(self):
        self.events = Counter()

    def submitted(self, task):
        self.events[task.id, "submitted"] += 1

    def started(self, task):
        self.events[task.id, "started"] += 1

    def finished(self, task):
        self.events[task.id, "finished"] += 1


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_each_task_of_many_threads_runs_once_and_is_told_once(make_queue, caplog):
    told, ran, called = Told(), Counter(), []
    queue = make_queue(worker_num=8, overflow="spill", hooks=[told])
    handles, lock = {}, threading.Lock()

    def count(n):
        with lock:
            ran[n] += 1

    @queue.executor()
    def plain(n: int) -> int:
        count(n)
        return n

    @queue.executor(max_concurrency=3)
    def limited(ctx, n: int) -> int:
        ctx.progress(n % 100, str(n))
        count(n)
        return n

    def submit(number):
        for place in range(8):
            n = 100 * number + place
            executor = limited if place % 4 == 0 else plain
            handle = executor.submit(n=n)
            handle.add_done_callback(lambda _, n=n: called.append(n))
            handles[n] = handle
        many = queue.submit_many(plain.task(n=100 * number + place) for place in range(8, 16))
        handles.update(zip(range(100 * number + 8, 100 * number + 16), many, strict=True))
        assert handles[100 * number].result(PATIENCE) == 100 * number

    with caplog.at_level(logging.WARNING), queue:
        at_once(submit)
        assert queue.drain(PATIENCE)
        assert {n: handle.result(PATIENCE) for n, handle in handles.items()} == {
            n: n for n in handles
        }
        assert not pool_of(queue).runs
        assert not parts_of(queue).moves.unsettled
    assert len(handles) == 16 * THREADS
    assert ran == dict.fromkeys(handles, 1)
    assert told.events == {
        (handle.id, event): 1
        for handle in handles.values()
        for event in ("submitted", "started", "finished")
    }
    assert len({*called}) == len(called)
    assert [record.getMessage() for record in caplog.records] == []


def test_many_threads_read_and_register_while_types_are_added(queue):
    """Each thread adds types, and lists those that the others add."""

    def register(number):
        for place in range(20):
            queue.register_executor(taskx.executor(f"t{number}.{place}")(lambda: None))
            assert f"t{number}.{place}" in parts_of(queue).registry.types
            assert parts_of(queue).registry.isolated == frozenset()

    at_once(register)
    assert len(parts_of(queue).registry.types) == 20 * THREADS


def test_one_of_many_threads_that_fire_a_token_calls_each_callback():
    called, token = [], taskx.CancelToken()

    def fire(number):
        remove = token.on_cancel(lambda: called.append(number))
        fired = token.fire(taskx.CancelReason.CANCEL)
        remove()
        if fired:  # another thread may be about to store the reason
            with pytest.raises(TaskCancelled):
                token.raise_if_cancelled()

    at_once(fire)
    assert len({*called}) == len(called)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has the interpreter's lock"
)
def test_no_module_switches_the_interpreters_lock_on():
    root = Path(taskx.__path__[0])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if "__main__" not in parts and parts[:3] != SITES:
            try:
                importlib.import_module(".".join(parts))
            except ModuleNotFoundError as error:
                assert error.name == "psycopg"  # noqa: PT017  (it has no wheel for this Python)
    importlib.import_module("django.db")
    assert not sys._is_gil_enabled()
