"""Waiting for a task: interrupts, forks, dropped handles, failures, and the cost of a wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import threading
import weakref
from concurrent.futures import CancelledError, TimeoutError, as_completed, wait
from contextlib import suppress

import pytest
from helpers import PATIENCE, eventually, housekeeper_of, parts_of, pool_of, run_in_thread
from strikes import Strike, every_strike, strike_at

from taskx import (
    Queue,
    QueueStopped,
    RepositoryCorrupt,
    RepositoryUnavailable,
    TaskHandle,
    TaskNotFound,
)


@pytest.fixture
def done(queue):
    """The id of a task that has completed with the result ``"value"``."""
    queue.executor("echo")(lambda: "value")
    queue.start()
    handle = queue.submit("echo")
    assert queue.drain(PATIENCE)
    return handle.id


@pytest.fixture
def held(queue, gate):
    """The id of a task that runs until the gate opens."""
    queue.executor("hold")(lambda: (gate(), "value")[1])
    queue.start()
    handle = queue.submit("hold")
    gate.wait_for(1)
    return handle.id


#: Makes the slow checks too rare to matter, so that only wake-ups count.
no_slow_checks = pytest.mark.timing(
    **dict.fromkeys(("recover_every", "audit_every", "handles_every"), 1000000.0)
)


# Interrupts


WAYS = {
    "result": lambda handle: handle.result(0),
    "exception": lambda handle: handle.exception(0),
    "done": lambda handle: handle.done(),
    "wait": lambda handle: wait([handle], 0),
    "as_completed": lambda handle: list(as_completed([handle], 0)),
    "callback": lambda handle: handle.add_done_callback(lambda _: None),
}


def struck(make, way):
    """Make handles, and interrupt the use of each one point later than that of the handle before."""
    for point in itertools.count():
        handle = make()
        strike = strike_at(point, lambda handle=handle: use(way, handle))
        if strike is None:
            assert point > 10
            return
        yield handle, strike


def use(way, handle):
    with suppress(TimeoutError):
        WAYS[way](handle)


@pytest.mark.parametrize("way", WAYS)
def test_a_handle_of_an_ended_task_works_after_an_interrupt(queue, done, way):
    for handle, strike in struck(lambda: queue.handle(done), way):
        assert handle.result(0) == "value", strike
        assert wait([handle], 0).done, strike


@pytest.mark.parametrize("way", WAYS)
def test_a_handle_resolves_after_an_interrupted_wait(queue, held, gate, way):
    handles = [handle for handle, _ in struck(lambda: queue.handle(held), way)]
    assert not any(handle.done() for handle in handles)
    other = run_in_thread(lambda: wait(handles, PATIENCE))
    gate.open()
    assert [handle.result(PATIENCE) for handle in handles] == ["value"] * len(handles)
    assert not other().not_done
    assert queue.submit("hold").result(PATIENCE) == "value"  # no worker hangs


@pytest.mark.timing(handles_every=0.01)
def test_an_interrupted_thread_does_not_keep_others_waiting(queue, repository):
    """The main thread finds the end by its own check, while others wait for the same task."""
    queue.declare("t")
    for point in itertools.count(step=5):
        handle = queue.submit("t")
        waiting = run_in_thread(lambda handle=handle: handle.exception(PATIENCE))
        eventually(lambda handle=handle: handle._listeners)
        repository.delete(handle.id)
        strike = strike_at(point, queue.handle(handle.id).done)
        assert isinstance(waiting(), TaskNotFound), strike
        if strike is None:
            break
    assert point > 20


def test_a_cancel_is_visible_at_once_and_wakes_waiting_threads(queue):
    queue.declare("t")
    handle = queue.submit("t")
    waiting = run_in_thread(lambda: handle.result(PATIENCE))
    eventually(lambda: handle._listeners)
    assert queue.cancel_task(handle.id)
    assert handle.cancelled()
    with pytest.raises(CancelledError):
        waiting()


def test_the_first_outcome_of_a_handle_stays(queue, done):
    handle = queue.handle(done)
    assert handle.result(PATIENCE) == "value"
    queue.delete(done)
    assert handle._conclude(None)
    assert handle.result(0) == "value"


def test_a_record_that_was_read_before_a_requeue_does_not_end_a_later_handle(
    queue, repository, monkeypatch
):
    """The thread that reads may go on only when the task waits for its next run, and has a new handle."""
    queue.declare("t")
    first, read, later = queue.submit("t"), repository.get_many, []
    assert queue.cancel_task(first.id)

    def stopped(task_ids):
        found = read(task_ids)
        monkeypatch.undo()
        queue.requeue(first.id)
        later.append(queue.handle(first.id))
        assert not later[0].done()
        return found

    monkeypatch.setattr(repository, "get_many", stopped)
    assert first.cancelled()
    assert not later[0].done()
    assert queue.cancel_task(first.id)
    assert later[0].cancelled()


# Dropped handles


def test_a_dropped_handle_is_freed(queue):
    queue.declare("t")
    handle = queue.submit("t")
    assert not handle.done()
    for _ in range(20):
        assert not queue.handle(handle.id).done()
    task_id, live = handle.id, parts_of(queue).watcher._live
    # The watcher may just be looking at one of them.
    eventually(lambda: (gc.collect(), len(live(task_id)) == 1)[1])
    gone = weakref.ref(handle)
    del handle
    eventually(lambda: (gc.collect(), gone() is None)[1])  # the watcher may just be looking at it
    eventually(lambda: "taskx-watch" not in {thread.name for thread in threading.enumerate()})
    assert not queue.handle(task_id).done()


def test_the_next_check_drops_a_dead_handle(queue):
    watcher, gone = parts_of(queue).watcher, weakref.ref(queue.handle("a"))
    watcher._handles["a"] = {1: gone}
    watcher.check_all()
    assert not watcher.watching


@pytest.mark.parametrize("closed", [False, True])
def test_no_interrupt_leaves_a_task_watched_without_a_handle(queue, closed):
    """Else the watcher's thread would never end."""
    queue.declare("t")
    task_id, watcher = queue.submit("t").id, parts_of(queue).watcher
    watcher.ensure_polling = lambda: None  # no other thread drops it
    left = 0
    for strike in every_strike(lambda point: queue.handle(task_id).done()):
        left += watcher.watching
        watcher._close_all() if closed else watcher.check_all()
        assert not watcher.watching, strike
    assert left  # some interrupts leave work to the next check
    del watcher.ensure_polling


def test_a_handle_that_timed_out_is_freed(queue):
    queue.declare("t")
    with pytest.raises(TimeoutError):
        queue.submit("t").result(0)
    watcher = parts_of(queue).watcher
    # Its thread may just be looking at the handle.
    eventually(lambda: (gc.collect(), watcher.check_all(), not watcher.watching)[2])


def test_a_handle_with_a_callback_is_kept_until_the_call(queue, held, gate):
    called = threading.Event()
    queue.handle(held).add_done_callback(lambda handle: called.set())
    gc.collect()
    gate.open()
    assert called.wait(PATIENCE)
    eventually(lambda: not parts_of(queue).watcher.watching)


def test_a_handle_that_asyncio_waits_for_is_kept(queue, held, gate):
    async def main():
        future = asyncio.wrap_future(queue.handle(held))
        gc.collect()
        gate.open()
        return await asyncio.wait_for(future, PATIENCE)

    assert asyncio.run(main()) == "value"


def test_handles_in_as_completed_are_kept(queue, held, gate):
    completed = as_completed((queue.handle(held) for _ in range(3)), PATIENCE)
    opened = run_in_thread(gate.open)
    assert [handle.result(0) for handle in completed] == ["value"] * 3
    opened()


def test_a_callback_that_raises_does_not_prevent_others(queue, held, gate, caplog):
    handle, called = queue.handle(held), threading.Event()
    handle.add_done_callback(lambda handle: 1 / 0)
    handle.add_done_callback(lambda handle: (_ for _ in ()).throw(Strike))
    handle.add_done_callback(lambda handle: called.set())
    gate.open()
    assert called.wait(PATIENCE)
    handle.add_done_callback(lambda handle: 1 / 0)  # on this thread
    # Two threads that find the end may have shared the callbacks.
    eventually(lambda: caplog.text.count("exception calling callback") == 3)


def test_a_callback_that_could_not_be_added_is_not_called(queue):
    queue.declare("t")
    handle, called = queue.submit("t"), []
    queue.repository.down = True
    with pytest.raises(RepositoryUnavailable):
        handle.add_done_callback(called.append)
    queue.repository.down = False
    assert not handle._has_callbacks
    queue.cancel_task(handle.id)
    assert handle.cancelled()
    assert not called


# wait() and as_completed() while other threads work


def test_wait_and_as_completed_count_each_handle_once(queue):
    """A task may end between any two steps of wait()."""
    queue.executor("echo")(lambda: "value")
    queue.start()
    for _ in range(30):
        handles = [queue.submit("echo") for _ in range(8)]
        assert len(wait(handles, PATIENCE).done) == 8
        handles = [queue.submit("echo") for _ in range(8)]
        assert len(list(as_completed(handles, PATIENCE))) == 8


def test_wait_accepts_handles_and_other_futures_together(queue, held, gate):
    handle = queue.handle(held)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(gate.open)
        assert wait([handle, future], PATIENCE).done == {handle, future}


# Failures of the watcher


@pytest.mark.timing(handles_every=0.01)
@pytest.mark.parametrize("error", [OSError("the disk is gone"), Strike("a panic")])
def test_the_watcher_survives_any_error_of_a_check(queue, monkeypatch, error):
    queue.declare("t")
    handle, raised = queue.submit("t"), threading.Event()
    version = queue.repository.version

    def failing():
        monkeypatch.setattr(queue.repository, "version", version)
        raised.set()
        raise error

    monkeypatch.setattr(queue.repository, "version", failing)
    waiting = run_in_thread(lambda: handle.result(PATIENCE))
    assert raised.wait(PATIENCE)
    queue.repository.delete(handle.id)
    with pytest.raises(LookupError):
        waiting()


@pytest.mark.timing(handles_every=0.01)
def test_a_waiting_thread_polls_if_no_thread_can_be_started(queue, monkeypatch, held, gate):
    web = Queue(queue.repository)
    waiting = run_in_thread(lambda: web.handle(held).result(PATIENCE))
    eventually(lambda: parts_of(web).watcher._polls)

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    handle = web.handle(held)
    other = Queue(queue.repository)
    assert not other.handle(held).done()
    gate.open()
    assert other.handle(held).result(PATIENCE) == "value"
    assert handle.result(PATIENCE) == "value"
    assert waiting() == "value"


def test_a_closed_queue_tells_all_waiting_threads(queue):
    queue.declare("t")
    handles = [queue.submit("t") for _ in range(3)]
    waiting = [run_in_thread(lambda h=handle: h.exception(PATIENCE)) for handle in handles]
    eventually(lambda: all(handle._listeners for handle in handles))
    queue.close()
    assert [type(told()) for told in waiting] == [QueueStopped] * 3
    assert all(handle.done() for handle in handles)


# What waiting costs


@pytest.fixture
def read(repository, monkeypatch):
    """The ids of the tasks whose records are read."""
    ids, get_many = [], repository.get_many
    monkeypatch.setattr(repository, "get_many", lambda some: ids.extend(some) or get_many(some))
    return ids


def test_waiting_reads_no_record_before_the_end(queue, read):
    queue.declare("t")
    handles = [queue.submit("t") for _ in range(20)]
    assert not any(handle.done() for handle in handles)
    read.clear()  # of one record, read to see if any node runs its type
    parts_of(queue).watcher.check_all()
    assert not read
    queue.cancel_task(handles[7].id)
    eventually(handles[7].done)
    assert set(read) == {handles[7].id}


@pytest.mark.parametrize("repository", ["sqlite", "mongomock"], indirect=True)
def test_the_check_for_cancels_reads_no_record_of_a_running_task(queue, held, read):
    read.clear()
    housekeeper_of(queue)._process_changes()
    assert held not in read


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_running_task_with_a_damaged_record_can_be_cancelled(queue, repository, held):
    run = pool_of(queue).runs[held]
    repository._file_links.transaction(
        lambda cursor: cursor.execute("UPDATE tasks SET cancel_requested_at = 'abc'"), durable=False
    )
    housekeeper_of(queue)._process_changes()
    assert run.token.cancelled
    assert queue.cancel_task(held) is False
    assert queue.cancel_many([held]) == 0


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_cancelling_a_damaged_record_raises_an_error(queue, repository, caplog):
    queue.declare("t")
    damaged, sound = queue.submit("t").id, queue.submit("t").id
    repository._file_links.transaction(
        lambda cursor: cursor.execute("UPDATE tasks SET held = 'abc' WHERE id = ?", (damaged,)),
        durable=False,
    )
    with pytest.raises(RepositoryCorrupt, match=f"{damaged} cannot be cancelled"):
        queue.cancel_task(damaged)
    assert queue.cancel_many([damaged, sound]) == 1
    assert f"{damaged} cannot be cancelled" in caplog.text
    queue.delete(damaged)


# Two queues on one repository


@no_slow_checks
def test_queues_that_share_a_repository_wake_each_other_at_once(make_queue, repository):
    runner, web = make_queue(worker_num=1), make_queue()
    runner.executor("echo")(lambda: "value")
    web.declare("echo")
    runner.start()
    assert web.submit("echo").result(PATIENCE) == "value"
    web.start()
    assert web.submit("echo").result(PATIENCE) == "value"
    assert web.submit("echo").result(PATIENCE) == "value"


# Fork


FORK = """
import os, sys, threading
from taskx import Config, Queue, SQLiteRepository

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=1))
gate = threading.Event()
queue.executor("hold")(lambda: (gate.wait(60), "value")[1])
queue.start()
handle, fresh = queue.submit("hold"), queue.submit("hold")
assert not handle.done()
called = []
handle.add_done_callback(lambda handle: called.append(os.getpid()))
waiting = threading.Thread(target=handle.result)
waiting.start()
ready, go = os.pipe()
child = os.fork()
if child == 0:
    os.write(go, b".")
    assert handle.result(60) == "value"
    assert fresh.result(60) == "value"
    assert not called
    os._exit(7)
os.read(ready, 1)
gate.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
waiting.join()
queue.stop()
print(called == [os.getpid()])
"""


def test_a_watched_handle_resolves_in_a_forked_child(spawn, database):
    assert spawn(FORK, database).ends()[0].strip() == "True"


# Types that are registered late


def test_types_registered_after_the_start_are_recorded(queue, repository, caplog):
    queue.executor("early")(lambda: "value")
    queue.start()
    queue.executor("late")(lambda: "value")
    assert [node.types for node in repository.liveness.nodes()] == [("early", "late")]
    web = Queue(repository)
    web.declare("late")
    assert web.submit("late").result(PATIENCE) == "value"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_types_that_could_not_be_recorded_are_recorded_later(queue, repository, monkeypatch):
    queue.start()
    liveness = repository.liveness
    record = liveness.record

    def failing(*args):
        monkeypatch.setattr(liveness, "record", record)
        raise RepositoryUnavailable("away")

    monkeypatch.setattr(liveness, "record", failing)
    queue.executor("late")(lambda: "value")
    eventually(lambda: [node.types for node in repository.liveness.nodes()] == [("late",)])


def test_a_new_handle_has_no_more_attributes_than_needed(queue):
    handle = TaskHandle("id", queue)
    assert isinstance(handle, concurrent.futures.Future)
    assert vars(handle) == {"id": "id", "_owner": queue}


def test_a_close_does_not_wait_for_a_thread_that_has_not_started(queue):
    """Another thread has just created the watcher's thread."""
    parts_of(queue).watcher._thread = threading.Thread(name="taskx-watch")
    queue.close()
