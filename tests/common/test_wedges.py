"""Situations that must not block the queue: user code inside a write, a hanging start, an exit."""

from __future__ import annotations

import itertools
import logging
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, Waiting, eventually, parts_of, pool_of, run_in_thread
from strikes import strike_at

from taskx import Hook, QueueFull, QueueStopped, SQLiteRepository, Task, TaskStatus
from taskx.node import node
from taskx.node.buffer import Buffer, Line, Slots
from taskx.repository import Reentered
from taskx.tasks import ids as ids_module
from taskx.tasks import lifecycle
from taskx.tasks.timing import DEFAULT_TIMING


def once(function):
    """Return a function that calls ``function`` the first time only, as a finalizer runs once."""
    calls = []

    def call(*args):
        if not calls:
            calls.append(1)
            function()

    return call


# Finalizers, which the garbage collector may call at any point


def in_the_ledger(queue, monkeypatch, finalize):
    queue.repository.before = once(finalize)


def after_the_commit(queue, monkeypatch, finalize):
    queue.repository.after = once(finalize)


def in_the_buffer(queue, monkeypatch, finalize):
    push, finalizer = Line.push, once(finalize)

    def pushed(line, item):
        finalizer()
        push(line, item)

    monkeypatch.setattr(Line, "push", pushed)


def in_the_id(queue, monkeypatch, finalize):
    urandom, finalizer = ids_module.os.urandom, once(finalize)

    def drawn(size):
        if not parts_of(
            queue
        ).moves.entered:  # another thread may draw an id in the middle of a write
            finalizer()
        return urandom(size)

    monkeypatch.setattr(ids_module.os, "urandom", drawn)
    # Else it draws only in the next millisecond.
    monkeypatch.setattr(ids_module, "_latest", ids_module._NEVER)


def in_the_repository(queue, monkeypatch, finalize):
    queue.repository.apply = within_lock(queue.repository, once(finalize))


def within_lock(repository, finalizer):
    apply = repository.apply
    on_file = isinstance(repository, SQLiteRepository)
    lock = repository._file_links.write_lock if on_file else repository._lock

    def write(*args, **kwargs):
        with lock:
            finalizer()
        return apply(*args, **kwargs)

    return write


WRITES = [in_the_ledger, after_the_commit, in_the_repository]


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
@pytest.mark.parametrize("place", [in_the_buffer, in_the_id])
@pytest.mark.parametrize("overflow", ["reject", "block", "caller_runs"])
def test_a_finalizer_can_submit_outside_of_writes(make_queue, place, overflow, monkeypatch):
    queue = make_queue(worker_num=2, overflow=overflow)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    place(queue, monkeypatch, lambda: queue.submit("fine", id="late"))

    def stored():
        # An idle worker gets the first task at once; the others go through the buffer and are read.
        # Again, if another thread was in a write at each draw of an id.
        run_in_thread(lambda: (queue.submit("fine"), queue.submit_many([Task(type="fine")] * 3)))()
        return "late" in queue.repository.statuses(["late"])

    eventually(stored)
    assert run_in_thread(lambda: queue.drain(PATIENCE))()
    assert queue.get_task_status("late").status is TaskStatus.COMPLETED


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
@pytest.mark.parametrize("place", WRITES)
@pytest.mark.parametrize("overflow", ["reject", "block", "caller_runs", "spill"])
@pytest.mark.parametrize("size", [1, 1000])
def test_a_finalizer_gets_an_error_inside_a_write(make_queue, place, overflow, size, monkeypatch):
    """What it submits is not stored, whether there is room or not, and the write goes on."""
    queue = make_queue(worker_num=2, overflow=overflow, buffer_size=size)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    errors = []
    may_raise = (Reentered, QueueFull) if (overflow, size) == ("reject", 1) else Reentered

    def finalize():
        for submit in (
            lambda: queue.submit("fine", id="one"),
            lambda: queue.submit("fine", id="keyed", unique_key="k"),
            lambda: queue.submit_many([Task(type="fine", id="many")]),
        ):
            try:
                submit()
            except may_raise as error:
                errors.append(error)

    place(queue, monkeypatch, finalize)
    handles = [run_in_thread(lambda: queue.submit("fine"))()]
    if size > 1:
        handles += run_in_thread(lambda: queue.submit_many([Task(type="fine")] * 3))()
    assert [handle.result(PATIENCE) for handle in handles] == ["fine"] * len(handles)
    eventually(lambda: len(errors) == 3)
    assert size == 1 or all("another thread, or later" in str(error) for error in errors)
    assert not queue.repository.get_many(["one", "keyed", "many"])
    # The same calls are accepted afterwards.
    again = run_in_thread(lambda: queue.submit("fine", id="keyed", unique_key="k"))()
    assert again.result(PATIENCE) == "fine"
    assert run_in_thread(lambda: queue.drain(PATIENCE))()


def test_hooks_are_told_of_a_submit_that_was_refused_inside_a_write(make_queue):
    refused = []

    class Note(Hook):
        def refused(self, task, error):
            refused.append((task.id, type(error)))

    queue = make_queue(hooks=[Note()])
    queue.declare("fine")

    def finalize():
        with pytest.raises(Reentered):
            queue.submit("fine", id="late")

    queue.repository.before = once(finalize)
    run_in_thread(lambda: queue.submit("fine"))()
    eventually(lambda: refused == [("late", Reentered)])


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_a_finalizer_can_leave_its_submit_to_another_thread(make_queue):
    queue, left = make_queue(), SimpleQueue()
    queue.declare("fine")
    submitter = run_in_thread(lambda: queue.submit("fine", id=left.get()))
    queue.repository.before = once(lambda: left.put("late"))
    run_in_thread(lambda: queue.submit("fine", id="outer"))()
    submitter()
    assert queue.repository.get_many(["outer", "late"]).keys() == {"outer", "late"}


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_a_log_handler_can_submit_when_an_outcome_is_refused(make_queue, repository):
    logger = logging.getLogger("taskx.alerts")
    logger.propagate = False
    queue = make_queue(worker_num=2, logger=logger)
    mails = []
    queue.executor("mail")(lambda text: mails.append(text))
    queue.executor("odd")(lambda: "odd")

    class Alert(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.ERROR:
                queue.submit("mail", {"text": record.getMessage()[:20]})

    alert = Alert()
    logger.addHandler(alert)

    def refuse(writes):
        if any(dict(getattr(write, "changes", {})).get("result") == '"odd"' for write in writes):
            raise ValueError("cannot be stored")

    repository.before = refuse
    try:
        queue.start()
        handle = queue.submit("odd")
        eventually(lambda: mails)
        assert (
            run_in_thread(lambda: queue.submit("mail", {"text": "later"}).result(PATIENCE))()
            is None
        )
        eventually(lambda: handle.task().status is TaskStatus.FAILED)
    finally:
        logger.removeHandler(alert)


# Stops


def test_a_stop_ends_in_time_while_a_start_waits_for_the_repository(queue, monkeypatch, gate):
    queue.executor("fine")(lambda: "fine")
    repository = queue.repository
    join = repository.liveness.join

    def hang(node, **about):
        gate()
        join(node, **about)

    monkeypatch.setattr(repository.liveness, "join", hang)
    starting = run_in_thread(queue.start)
    gate.wait_for(1)
    assert run_in_thread(lambda: queue.stop(timeout=0.1))() == []
    gate.open()
    with pytest.raises(QueueStopped):
        starting()
    assert repository.liveness.nodes() == []


def test_queues_left_running_at_the_exit_are_stopped_together(make_queue, monkeypatch, gate):
    """Each has a task that does not check its token. The exit waits only once for all of them."""
    queues = [make_queue(worker_num=1) for _ in range(3)]
    for queue in queues:
        queue.start()
        Waiting(queue, gate).fill(1)
    monkeypatch.setattr(node, "_nodes", {queue._node for queue in queues})
    given: list[float] = []

    def wait_in_vain(node, timeout, *, cancel):
        assert all(pool_of(q).stopping for q in queues)
        given.append(timeout)
        clock.now += timeout

    clock = SimpleNamespace(now=1000.0)
    with monkeypatch.context() as patched:
        patched.setattr(node, "time", SimpleNamespace(monotonic=lambda: clock.now))
        patched.setattr(node.LocalNode, "stop", wait_in_vain)
        node.stop_forgotten()
    assert given == [DEFAULT_TIMING.exit_within, 0.0, 0.0]


# Large buffers


@pytest.fixture
def full():
    buffer = Buffer(1000, 64, lambda: True)
    for n in range(1000):
        submit(buffer, f"x{n}", n)
    return buffer


def submit(buffer, task_id, at):
    """Put a new task into the buffer."""
    row = lifecycle.create(task_id=task_id, type="t", params="{}", created_by="", now=at)
    slots = Slots(buffer, "node", [row], bool)
    assert slots.reserve()
    slots.fill()


def test_a_fetch_reads_no_more_rows_for_a_large_buffer(busy, monkeypatch):
    queue = busy(buffer_size=2000)
    queue.submit_many([Task(type="note") for _ in range(1900)])
    pool, asked = pool_of(queue), []
    ready = queue.repository.ready
    monkeypatch.setattr(
        queue.repository,
        "ready",
        lambda types, limit, *more: asked.append(limit) or ready(types, limit, *more),
    )

    def fetched():  # unless the housekeeper is just fetching
        pool.agenda.expect_more()
        pool.fetcher.refill()
        return asked

    eventually(fetched)
    assert max(asked) < 2 * pool.buffer.fetch_size


def test_a_discarded_task_does_not_rebuild_the_line(full):
    line = full._line
    for n in range(100):
        full.discard([f"x{n}"])
    assert full._line is line
    assert (len(full), full.submitted) == (900, 900)
    assert full.take(1)[0].id == "x100"


def test_a_line_full_of_discarded_tasks_is_rebuilt(full):
    full.discard([f"x{n}" for n in range(999)])
    assert len(full._line) < 100
    assert [item.id for item in full.take(9)] == ["x999"]


def test_an_interrupted_take_leaves_no_task_that_is_known_and_never_taken():
    """One that is not known any more is still this node's in the repository, where the audit finds it."""
    for point in itertools.count():
        buffer = Buffer(10, 64, lambda: True)
        for n in range(3):
            submit(buffer, f"x{n}", n)
        if strike_at(point, lambda: buffer.take(2)) is None:  # noqa: B023  (called at once)
            break
        buffer.started()
        known = {f"x{n}" for n in range(3) if f"x{n}" in buffer}
        assert {item.id for item in buffer.take(9)} == known
    assert point > 10


def test_a_clock_set_back_does_not_change_the_order():
    buffer = Buffer(100, 64, lambda: True)
    submit(buffer, "a", 5000)
    submit(buffer, "b", 1000)  # set back
    submit(buffer, "c", 1001)
    buffer.add("old", "t", 0, 500, None, 98)  # stored long before
    buffer.add("d", "t", 0, 1002, None, 99)  # spilled afterwards
    submit(buffer, "e", 6000)  # the clock has caught up
    taken = [item.id for item in buffer.take(9)]
    assert taken == ["old", "a", "b", "c", "d", "e"]
