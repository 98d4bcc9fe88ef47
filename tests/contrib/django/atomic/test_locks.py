"""Locks that an application's transaction keeps on a server delay nothing else."""

from __future__ import annotations

import threading

import django_project
import pytest
from django.db import connections, transaction
from helpers import eventually, parts_of, run_in_thread

from contrib.django.atomic.blocks import LONG, elsewhere
from contrib.django.atomic.conftest import closing
from taskx import DuplicateTask, TaskStatus
from taskx.contrib.django.models import TaskRow

# Seconds that the repository waits for a lock. Nobody else may wait so long.
NEVER = 4 * LONG


@pytest.fixture(params=["postgres", "mariadb"])
def repository(request, tmp_path):
    with django_project.MAKERS[request.param](tmp_path, timeout=NEVER) as made:
        yield made
        connections.close_all()


@pytest.fixture
def gate():
    made = threading.Event()
    yield made
    made.set()


@pytest.fixture
def queue(make_queue, repository, gate, clock):
    made = make_queue(repository, worker_num=2, middleware=[closing], clock=clock)
    made.executor("echo")(lambda n=0: n)
    made.executor("gated")(lambda: gate.wait(LONG))
    made.declare("elsewhere")
    made.start()
    return made


def apart(call):
    """Call on a thread of its own; return a function that waits for the result."""

    def run():
        try:
            return call()
        finally:
            connections.close_all()

    return run_in_thread(run)


def lock(repository, *task_ids):
    """Lock the rows of tasks in the open block, as a change of these tasks does."""
    rows = TaskRow.objects.using(repository.using).select_for_update()
    assert len(rows.filter(task_id__in=task_ids)) == len(task_ids)


def test_other_tasks_are_submitted_run_and_end(queue, repository, gate, clock):
    running = queue.submit("gated")
    scheduled, parent = (queue.submit("echo", delay=60) for _ in range(2))
    child, idle = queue.submit("echo", depends_on=[parent]), queue.submit("elsewhere")
    eventually(lambda: running.task().status is TaskStatus.RUNNING)

    def others():
        made = [queue.submit("echo", {"n": n}, delay=60 * (n % 2)) for n in range(6)]
        clock.advance(60)
        parts_of(queue).agenda.wake()
        ended = [one.result(timeout=LONG) for one in [*made, parent]]
        return ended, [one.task().status.value for one in (running, scheduled, child)]

    with transaction.atomic(using=repository.using):
        lock(repository, running.id, scheduled.id, child.id, idle.id)
        queue.submit("elsewhere", unique_key="taken")
        same_key = apart(lambda: queue.submit("elsewhere", unique_key="taken"))
        cancelled = apart(lambda: queue.cancel_task(idle.id))
        gate.set()
        assert elsewhere(others) == ([*range(6), 0], ["running", "pending", "pending"])
    assert running.result(timeout=LONG) is True
    assert (scheduled.result(timeout=LONG), child.result(timeout=LONG)) == (0, 0)
    with pytest.raises(DuplicateTask):
        same_key()
    assert cancelled()
    assert [len(one.task().attempts) for one in (running, scheduled)] == [1, 1]


@pytest.mark.parametrize("repository", ["postgres"], indirect=True)
def test_a_lock_of_the_whole_table_loses_no_write(queue, repository):
    with transaction.atomic(using=repository.using):
        with connections[repository.using].cursor() as cursor:
            cursor.execute("LOCK TABLE taskx_task IN EXCLUSIVE MODE")
        submits = [apart(lambda n=n: queue.submit("echo", {"n": n})) for n in range(12)]
        eventually(lambda: len(parts_of(queue).moves._waiting) > 5)
    assert [submit().result(timeout=LONG) for submit in submits] == [*range(12)]


def test_a_note_that_is_locked_delays_no_task(queue, repository):
    queue.schedule("nightly", "0 3 * * *", "echo")
    with transaction.atomic(using=repository.using):
        queue.schedules()["nightly"].pause()
        resumed = apart(lambda: queue.schedule("nightly", "0 4 * * *", "echo"))
        for n in range(5):
            submitted = elsewhere(lambda n=n: queue.submit("echo", {"n": n}))
            assert elsewhere(lambda: submitted.result(timeout=LONG)) == n  # noqa: B023
    assert str(resumed().spec) == "0 4 * * *"
