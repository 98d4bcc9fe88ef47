"""Pauses: no node starts a paused task, other tasks run on, and a pause outlasts a restart."""

from __future__ import annotations

import threading
from enum import Enum

import pytest
from helpers import (
    PATIENCE,
    earliest_due,
    eventually,
    frequent_checks,
    node_of,
    pool_of,
    whole_round,
)
from storage.repositories import TinyRepository

from taskx import ConfigurationError, Paused, Queue, SQLiteRepository, Task, TaskStatus
from taskx.node.fetcher import Fetcher
from taskx.tasks import lifecycle
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.testing import ManualClock


@pytest.fixture
def other(queue, make_queue):
    """A second queue on the same repository, with one worker and not started; both run ``a`` and ``b``."""
    made = make_queue(worker_num=1)
    for one in (queue, made):
        one.ran = []
        for name in "ab":
            one.executor(name)(lambda n=0, name=name, one=one: one.ran.append(f"{name}{n}"))
    return made


def pending(handle):
    return handle.task().status is TaskStatus.PENDING


def wait_for_refresh(queue):
    """Wait until the queue's housekeeper has refreshed the pauses at least once from now on."""
    refreshed, tuning = threading.Event(), pool_of(queue).tuning
    refresh = tuning.refresh

    def watched():
        refresh()
        refreshed.set()

    tuning.refresh = watched
    assert refreshed.wait(PATIENCE)
    tuning.refresh = refresh


def test_a_paused_type_waits_and_the_others_run(queue, other):
    queue.start()
    queue.pause("a")
    waits = queue.submit("a")
    for n in range(3):
        queue.submit("b", {"n": n}).result(PATIENCE)
    assert queue.ran == ["b0", "b1", "b2"]
    assert pending(waits)
    queue.resume("a")
    waits.result(PATIENCE)


def test_a_paused_queue_starts_nothing_and_takes_everything(queue, other):
    queue.start()
    queue.pause()
    handles = [queue.submit("ab"[n % 2], {"n": n}) for n in range(300)]  # three buffers full
    assert (queue.buffered, queue.drain(PATIENCE)) == (0, True)
    assert queue.ran == []
    queue.resume()
    for handle in handles:
        handle.result(PATIENCE)
    assert len(queue.ran) == 300


def test_a_running_task_goes_on_when_its_type_is_paused(queue, gate):
    queue.executor("a")(lambda: (gate(), "done")[1])
    queue.start()
    runs = queue.submit("a")
    gate.wait_for(1)
    queue.pause("a")
    waits = queue.submit("a")
    gate.open()
    assert runs.result(PATIENCE) == "done"
    assert queue.drain(PATIENCE)
    assert pending(waits)


def test_a_pause_removes_tasks_from_the_buffer_at_once(busy, gate, repository):
    """The tasks leave the buffer even if no worker is free, so that any queue can run them later."""
    queue = busy(buffer_size=2)
    queue.executor("b")(lambda: queue.ran.append("b"))
    for n in range(2):
        queue.submit("note", {"n": n})
    assert queue.buffered == 2
    queue.pause("note")
    # The housekeeper may have seen the pause first: then it frees the tasks, perhaps a moment later.
    eventually(lambda: queue.buffered == 0 and len(repository.ready(["note"], 10)) == 2)
    queue.submit("b")
    queue.submit("b")
    queue.submit("note", {"n": 2})  # accepted by a full buffer, because it takes no room there
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["b", "b"]
    queue.resume("note")
    assert queue.drain(PATIENCE)
    assert queue.ran == ["b", "b", 0, 1, 2]


@pytest.mark.timing(audit_every=3600)
def test_a_task_buffered_while_its_type_is_paused_does_not_start(
    queue, other, repository, monkeypatch
):
    """The pause comes between the check of the pauses and the read from the buffer."""
    queue.start()
    queue.pause("a")
    with monkeypatch.context() as blind:
        blind.setattr(Fetcher, "takes", lambda *_: True)
        handles = [queue.submit("a", {"n": n}) for n in range(3)]
    queue.submit("b").result(PATIENCE)
    eventually(lambda: len(repository.ready(["a"], 10)) == 3)
    assert queue.ran == ["b0"]
    assert queue.drain(PATIENCE)
    queue.resume("a")
    for handle in handles:
        handle.result(PATIENCE)


@pytest.mark.every_store
@frequent_checks
def test_a_pause_applies_to_all_queues_soon(queue, other):
    """A started queue applies it at its next check. A queue that is not started can pause, too."""
    other.pause("a")
    queue.start()  # reads the pause
    queue.submit("a")
    queue.submit("b").result(PATIENCE)
    other.resume("a")
    eventually(lambda: queue.ran == ["b0", "a0"])
    other.pause()
    wait_for_refresh(queue)
    waits = queue.submit("b")
    assert queue.drain(PATIENCE)
    assert pending(waits)
    other.resume()
    waits.result(PATIENCE)


@pytest.mark.timing(recover_every=3600)
def test_a_resume_fetches_waiting_tasks_at_once(queue, other, repository, monkeypatch):
    """It waits neither for the next slow check nor for a change by another process."""
    queue.start()
    whole_round(queue)  # the first round checks everything
    monkeypatch.setattr(repository, "version", lambda: 0)
    queue.pause()
    eventually(lambda: not pool_of(queue).agenda.more_stored)
    handle = queue.submit("a")
    queue.resume()
    handle.result(PATIENCE)


def test_a_resume_succeeds_while_others_pause_and_resume(queue, repository, monkeypatch):
    """Here they change the note between its read and its removal."""
    queue.pause("a")
    put = repository.put_note

    def disturbed(name, text, version):
        monkeypatch.setattr(repository, "put_note", put)
        assert put(name, "", version)
        return put(name, text, version)

    monkeypatch.setattr(repository, "put_note", disturbed)
    queue.resume("a")
    assert not queue.paused


def test_a_pause_outlasts_a_restart(make_queue):
    first = make_queue()
    first.pause("a")
    first.close()
    second = make_queue()
    ran = []
    second.executor("a")(lambda: ran.append("a"))
    second.submit("a")
    second.start()
    assert second.drain(PATIENCE)
    assert ran == []
    second.resume("a")
    assert second.drain(PATIENCE)
    assert ran == ["a"]


def test_queue_paused_names_all_pauses(queue, other):
    assert not queue.paused
    queue.pause("a")
    queue.pause("a")
    assert queue.paused == Paused(types=frozenset({"a"})) == other.paused
    assert ("a" in queue.paused, "b" in queue.paused) == (True, False)
    queue.pause()
    assert queue.paused == Paused(everything=True, types=frozenset({"a"}))
    assert "b" in queue.paused
    other.resume()
    assert queue.paused.types == {"a"}  # its own pause stays
    assert not queue.paused.everything
    other.resume("a")
    other.resume("a")
    assert not queue.paused


def test_types_with_similar_names_are_paused_separately(queue):
    """A name may be the beginning of another name, or look like a path."""
    for name in ("a", "a/b", "/", "a*", "pause"):
        queue.pause(name)
    queue.resume("a")
    assert queue.paused.types == {"a/b", "/", "a*", "pause"}


class Kind(str, Enum):
    REPORT = "report"


def test_an_enum_member_pauses_the_type_of_its_value(queue):
    queue.pause(Kind.REPORT)
    assert queue.paused.types == {"report"}
    queue.resume(Kind.REPORT)
    assert not queue.paused


@pytest.mark.parametrize("name", ["", 5, b"a", "a\0", "a" * 256])
def test_an_invalid_type_cannot_be_paused(queue, name):
    for call in (queue.pause, queue.resume):
        with pytest.raises(ConfigurationError):
            call(name)
    assert not queue.paused


@frequent_checks
def test_an_idle_node_takes_no_paused_task_from_another_buffer(busy, make_queue, repository):
    queue = busy()
    queue.submit("note", {"n": "paused"})
    repository.put_note("pause/note", "", 0)  # the busy queue does not notice
    helper = make_queue(worker_num=1)
    ran = []
    helper.executor("note")(lambda n: ran.append(n))
    helper.executor("fine")(lambda: "fine")
    helper.start()
    helper.submit("fine").result(PATIENCE)
    wait_for_refresh(helper)
    assert ran == []


def test_a_retry_of_a_paused_type_waits(queue, gate):
    """The pause comes while the first attempt runs."""
    attempts = []

    @queue.executor("a", max_attempts=2)
    def fails(ctx):
        attempts.append(ctx.task.attempt)
        if ctx.task.attempt == 1:
            gate()
            raise ValueError("once more")

    queue.start()
    handle = queue.submit("a")
    gate.wait_for(1)
    queue.pause("a")
    gate.open()
    assert queue.drain(PATIENCE)
    assert attempts == [1]
    queue.resume("a")
    handle.result(PATIENCE)
    assert attempts == [1, 2]


def test_a_delayed_task_of_a_paused_type_waits_when_it_is_due(make_queue):
    clock = ManualClock()
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("a")(lambda: "ran")
    queue.start()
    handle = queue.submit("a", delay=10)
    queue.pause("a")
    clock.advance(11)
    eventually(lambda: earliest_due(queue.repository) is None)
    assert queue.drain(PATIENCE)
    assert pending(handle)
    queue.resume("a")
    assert handle.result(PATIENCE) == "ran"


@pytest.mark.timing(audit_every=0.1)
def test_the_audit_releases_tasks_of_a_paused_type(queue, other, repository):
    """The record names this node as the owner of a task that the node does not know."""
    queue.start()
    queue.pause("a")
    insert = lifecycle.create(task_id="x", type="a", params="{}", created_by="", now=1)
    insert.row["owner"] = node_of(queue).record.id
    assert repository.apply([insert]) == [True]
    eventually(lambda: repository.get_by_id("x").owner == "")
    assert queue.ran == []


def test_tasks_of_a_paused_type_take_no_room_in_the_buffer(busy):
    queue = busy(buffer_size=2)
    queue.executor("b")(lambda: None)
    queue.pause("note")
    assert len(queue.submit_many(Task(type=type) for type in ["note"] * 5 + ["b"] * 2)) == 7
    assert queue.buffered == 2


def test_a_repository_with_eight_methods_cannot_store_pauses():
    with Queue(TinyRepository()) as queue:
        for type in (None, "a"):
            with pytest.raises(ConfigurationError, match="eight methods"):
                queue.pause(type)
            queue.resume(type)
        assert not queue.paused


def test_a_pause_applies_to_other_processes(spawn, database):
    """A process that only submits can pause and resume."""
    child = spawn(
        """
        import sys, threading
        from taskx import Queue, SQLiteRepository
        queue = Queue(SQLiteRepository(sys.argv[1]))
        for name in "ab":
            queue.executor(name)(lambda name=name: print(name, flush=True))
        queue.start()
        print("started", flush=True)
        while "a" not in queue._controls.paused:
            threading.Event().wait(0.01)
        print("heeds", flush=True)
        sys.stdin.readline()
        """,
        database,
    )
    assert child.read() == "started"
    with SQLiteRepository(database) as repository:
        web = Queue(repository)
        web.declare("a", "b")
        web.pause("a")
        assert child.read() == "heeds"
        waits = web.submit("a")
        web.submit("b")
        assert child.read() == "b"
        assert pending(waits)
        web.resume("a")
        assert child.read() == "a"


@pytest.mark.parametrize("everything", [True, False])
def test_no_task_of_a_paused_type_starts_after_pause_returns(make_queue, everything):
    queue = make_queue(worker_num=2, buffer_size=1000)
    began = []
    queue.executor("a")(lambda n: began.append(n))
    queue.start()
    for n in range(300):
        queue.submit("a", {"n": n})
    queue.pause(None if everything else "a")
    gone_on = (
        len(pool_of(queue).runs) + DEFAULT_TIMING.most_ahead
    )  # started before the pause, or just starting
    seen = len(began)
    assert queue.drain(PATIENCE)
    assert len(began) <= seen + gone_on
    queue.resume(None if everything else "a")
    eventually(lambda: len(began) == 300)


def misspelt(caplog):
    return [r.getMessage() for r in caplog.records if "is it misspelt?" in r.getMessage()]


def test_a_pause_of_a_type_that_nobody_knows_is_warned_of(queue, other, caplog):
    queue.declare("c")
    for known in (None, "a", "c"):
        queue.pause(known)
    assert not misspelt(caplog)
    queue.pause("resise")
    [warning] = misspelt(caplog)
    assert warning.startswith(
        "type 'resise' is paused, but no running queue has an executor for it"
    )
    assert warning.endswith("This queue knows: a, b, c")
    assert "resise" in other.paused


def test_a_pause_of_a_type_that_another_queue_runs_is_not_warned_of(queue, make_queue, caplog):
    worker = make_queue()
    worker.executor("far")(lambda: 1)
    worker.start()
    queue.pause("far")
    assert not misspelt(caplog)
    assert "far" in queue.paused
