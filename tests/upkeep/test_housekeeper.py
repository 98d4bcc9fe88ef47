"""The housekeeper: if one duty has much to do, the others are still done in time."""

from __future__ import annotations

import shutil
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
from helpers import (
    PATIENCE,
    Spy,
    eventually,
    frequent_checks,
    held_on,
    housekeeper_of,
    no_rounds,
    node_of,
    parts_of,
    pool_of,
    prepared_node,
    undisturbed,
    whole_round,
)

from taskx import Queue, RepositoryUnavailable, SQLiteRepository, Task, TaskStatus, every
from taskx.node import audit
from taskx.stores.base import Locked
from taskx.stores.liveness.base import Node
from taskx.stores.queries import owners
from taskx.tasks import lifecycle
from taskx.tasks.record import UNTIL_DUE
from taskx.tasks.writes import Update

#: Gives the duties no time: each does one step in each round.
hurried = pytest.mark.timing(round_within=0.0)


@pytest.mark.timing(poll_every=0.001, recover_every=3600.0)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_an_idle_node_looks_for_changes_and_does_no_round_until_there_is_one(started, repository):
    whole_round(started)
    housekeeper, rounds, looks = housekeeper_of(started), [], threading.Semaphore(0)
    tick, changed = housekeeper.tick, housekeeper._changed
    housekeeper.tick = lambda: rounds.append(tick())
    housekeeper._changed = lambda: bool(looks.release()) or changed()
    assert all(looks.acquire(timeout=PATIENCE) for _ in range(20))
    before = len(rounds)
    assert all(looks.acquire(timeout=PATIENCE) for _ in range(20))
    assert len(rounds) == before
    with SQLiteRepository(repository.path) as another:
        another.put_note("changed", "by another", 0)
    eventually(lambda: len(rounds) > before)


@pytest.mark.timing(poll_every=0.001, recover_every=3600.0, audit_every=3600.0)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_an_idle_node_notices_a_clock_that_a_test_moves(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("late")(lambda: "done")
    queue.start()
    handle = queue.submit("late", delay=3600)
    whole_round(queue)
    clock.advance(3600)
    assert handle.result(PATIENCE) == "done"


@pytest.mark.timing(poll_every=0.001, recover_every=3600.0, audit_every=3600.0)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_an_idle_node_reads_at_once_when_a_delayed_task_of_another_process_is_due(
    make_queue, started
):
    """Its news come after the release of a round, and the task may be due before the next one."""
    release = housekeeper_of(started)._release
    whole_round(started)
    eventually(lambda: parts_of(started).agenda.due_known and release.next is None)
    with SQLiteRepository(started.repository.path) as another:
        queue = make_queue(another)
        queue.declare("remote")
        queue.submit("remote", delay=3600)
        eventually(lambda: release.next is not None)


@pytest.mark.timing(poll_every=0.001, recover_every=3600.0, audit_every=3600.0)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_an_idle_node_reads_the_schedules_of_another_process_as_soon_as_it_may(make_queue, started):
    """Its news come too soon after the last look at all schedules."""
    ticker = housekeeper_of(started)._ticker
    whole_round(started)
    eventually(lambda: ticker._refresh_at and not ticker._stale)
    with SQLiteRepository(started.repository.path) as another:
        queue = make_queue(another)
        queue.declare("remote")
        queue.schedule("s", every(3600), "remote").store()
        eventually(lambda: ticker.next is not None)


@undisturbed
def test_a_fetch_that_another_thread_prevents_is_made_soon(make_queue):
    """That thread may have read before the task came."""
    queue = make_queue(worker_num=1)
    queue.executor("t", max_concurrency=1)(lambda: "done")
    queue.start()
    whole_round(queue)
    with pool_of(queue).fetcher._refilling:
        handle = queue.submit("t")
        for _ in range(2):  # at the second one, nothing of the submit is left
            whole_round(queue)
    assert handle.result(PATIENCE) == "done"


# What a node knows of its own troubles


def test_a_repository_that_is_away_is_a_problem_of_the_node_until_it_is_back(started, repository):
    node = node_of(started)
    whole_round(started)
    assert node.problems() == []
    repository.down = True
    eventually(node.problems)
    assert node.problems() == ["The repository cannot be used: down for a while."]
    repository.down = False
    eventually(lambda: not node.problems())


@frequent_checks
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_disk_that_is_nearly_full_is_a_problem_of_the_node(started, monkeypatch):
    disk = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    [problem] = eventually(node_of(started).problems)
    assert problem.endswith("Free some space. Soon no task can be stored.")
    disk.free = 1 << 40
    eventually(lambda: not node_of(started).problems())


@pytest.mark.timing(answer_within=0.01)
def test_a_repository_that_does_not_answer_is_a_problem_while_it_is_waited_for(
    started, repository, monkeypatch
):
    node, asked, answers, find = (
        node_of(started),
        threading.Event(),
        threading.Event(),
        repository.find,
    )

    def hangs(*args):
        asked.set()
        assert answers.wait(PATIENCE)
        return find(*args)

    monkeypatch.setattr(repository, "find", hangs)
    assert asked.wait(PATIENCE)
    [problem] = eventually(node.problems)
    assert problem.startswith("The repository cannot be used: it has not answered for ")
    answers.set()
    eventually(lambda: not node.problems())


def test_a_record_that_another_transaction_has_locked_is_no_problem(started, monkeypatch):
    housekeeper, rounds = housekeeper_of(started), threading.Semaphore(0)

    def tick():
        rounds.release()
        raise Locked("a record is locked", 1.0)

    monkeypatch.setattr(housekeeper, "tick", tick)
    for _ in range(3):  # at the third one, the first has ended
        assert rounds.acquire(timeout=PATIENCE)
    assert housekeeper.problems() == []


@frequent_checks
def test_a_type_that_stuck_threads_hold_up_is_a_problem_of_their_node(make_queue, gate, clock):
    queue, other = make_queue(worker_num=1, clock=clock), make_queue()
    queue.executor("hang", timeout=60, grace=0.0, max_attempts=2)(gate)
    queue.start()
    other.executor("fine")(lambda: None)
    other.start()
    queue.submit("hang")
    gate.wait_for()
    clock.advance(60)
    [problem] = eventually(node_of(queue).problems)
    assert problem.startswith("1 task of type 'hang' cannot start, and none runs: all wait for 1 ")
    whole_round(other)
    assert node_of(other).problems() == []
    gate.open()
    eventually(lambda: not node_of(queue).problems())


# Duties that have much to do


@hurried
@pytest.mark.timing(due_batch=1)
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_a_cancel_does_not_wait_for_all_due_tasks(make_queue, repository, clock):
    """Another process cancels a task in the middle of the release of two thousand others."""
    queue, released, tokens = make_queue(worker_num=2, clock=clock), [], []

    @queue.executor()
    def hold(ctx):
        tokens.append(ctx.token)
        ctx.token.wait(PATIENCE)

    queue.declare("remote")
    due = clock.now() + timedelta(seconds=60)
    queue.submit_many([Task(type="remote", run_at=due) for _ in range(2000)])
    handle = hold.submit()

    def release(writes):
        if is_release(writes[0]):
            released.append(tokens[0].cancelled)
            if len(released) == 1:
                repository.apply(lifecycle.cancel(handle.id, clock.now_ms()))

    queue.start()
    eventually(lambda: tokens)
    repository.before = release
    clock.advance(60)
    parts_of(queue).agenda.wake()
    assert handle.result(PATIENCE) is None  # its token has fired
    assert 0 < released.count(False) < 1000


def is_release(write):
    return isinstance(write, Update) and write.guard.get("held") == UNTIL_DUE


@hurried
@pytest.mark.timing(due_batch=10)
def test_all_due_tasks_are_released_over_several_rounds(make_queue, clock):
    queue = make_queue(worker_num=2, clock=clock, buffer_size=200)
    queue.executor("t")(lambda: None)
    due = clock.now() + timedelta(seconds=60)
    handles = queue.submit_many([Task(type="t", run_at=due) for _ in range(105)])
    queue.start()
    clock.advance(60)
    for handle in handles:
        assert handle.result(PATIENCE) is None


@hurried
@pytest.mark.timing(due_batch=10, tick_batch=10)
def test_a_round_does_a_step_of_each_burst(make_queue, clock):
    queue = make_queue(worker_num=1, clock=clock)
    queue.declare("remote")
    due = clock.now() + timedelta(seconds=60)
    queue.submit_many([Task(type="remote", run_at=due) for _ in range(105)])
    for n in range(55):
        queue.schedule(f"s{n}", every(60), "remote")
    queue.start()
    housekeeper = housekeeper_of(queue)
    ticker, tick, rounds = housekeeper._ticker, housekeeper.tick, []
    eventually(lambda: ticker._refresh_at and not ticker.waiting)
    batches = queue.repository.batches

    def watched():
        before = len(batches)
        tick()
        rounds.append([batch for batch in batches[before:] if len(batch) > 1])

    housekeeper.tick = watched
    clock.advance(60)
    parts_of(queue).agenda.wake()
    eventually(lambda: len(queue.repository.ready(["remote"], 1000)) == 105 + 55)
    busy = [batches for batches in rounds if batches]
    assert len(busy) >= 10
    for batches in busy:
        assert [len(batch) for batch in batches if is_release(batch[0])] in ([], [5], [10])
        assert [len(batch) for batch in batches if not is_release(batch[0])] in ([], [5], [10])


@pytest.mark.timing(due_batch=10)
@pytest.mark.timing(poll_every=10000)
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_due_tasks_that_another_node_releases_are_left_to_it_for_a_while(
    make_queue, repository, clock
):
    queue = make_queue(worker_num=1, clock=clock)
    queue.declare("remote")
    due = clock.now() + timedelta(seconds=60)
    queue.submit_many([Task(type="remote", run_at=due) for _ in range(105)])
    queue.start()
    tried = []

    def another_comes_first(writes):
        if is_release(writes[0]):
            tried.append(len(writes))
            super(Spy, repository).apply(writes)

    repository.before = another_comes_first
    clock.advance(60)
    whole_round(queue)
    eventually(lambda: tried)
    for _ in range(3):
        whole_round(queue)
    assert tried == [10]
    assert 9000 < housekeeper_of(queue)._release.due() <= 10000
    repository.before = lambda writes: None  # the other node has died
    housekeeper_of(queue)._release._again_at = 0.0
    parts_of(queue).agenda.wake()
    eventually(lambda: len(repository.ready(["remote"], 1000)) == 105)


# Dead nodes


@pytest.fixture
def dead(database):
    """Return a function that makes a dead node with tasks in its buffer."""
    with SQLiteRepository(database) as store:

        def make(tasks):
            node = Node(id="dead", name="host:1:dead")
            store.liveness.join(node)
            store.apply(tasks)
            store.liveness._locks.let_go("dead")

        yield make


def waiting(task_id):
    row = lifecycle.create(task_id=task_id, type="remote", params="{}", created_by="", now=1000)
    row.row["owner"] = "dead"
    return row


@pytest.mark.timing(recover_every=0.001, audit_every=3600.0)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
class TestLooking:
    @pytest.fixture
    def looks(self, started):
        """The looks of a queue's node from when it knows that it is alone."""
        housekeeper, looks = housekeeper_of(started), []
        recovery = housekeeper.recovery
        whole_round(started)  # all is news to the first one
        eventually(lambda: recovery.alone and not housekeeper._may_have_come)
        look = recovery.recover

        def watched(until):
            looks.append(until)
            return look(until)

        recovery.recover = watched
        return looks

    def test_a_node_that_is_alone_looks_for_dead_nodes_only_after_news(self, started, looks, dead):
        for _ in range(5):
            whole_round(started)
        assert looks == []
        dead([waiting("t")])
        eventually(lambda: held_on(started.repository, "dead") == [])
        assert looks

    def test_a_node_beside_another_goes_on_looking_for_dead_ones(self, started, looks):
        with SQLiteRepository(started.repository.path) as another:
            another.liveness.join(Node(id="other", name="host:1:other"))
            eventually(lambda: len(looks) > 5)
            another.liveness.leave("other")

    def test_an_audit_looks_in_any_case(self, started, looks):
        with no_rounds(started):
            housekeeper_of(started)._run_audits(0.0)
        eventually(lambda: looks)


@pytest.mark.timing(free_batch=10)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_the_buffer_of_a_dead_node_is_freed_in_parts(make_queue, repository, dead):
    queue = make_queue()
    queue.declare("remote")
    dead([waiting(f"{n:03}") for n in range(35)])
    recovery = queue_recovery(queue)
    assert recovery.recover(0.0) == 10
    assert recovery.waiting
    assert [node.id for node in repository.liveness.nodes()] == ["dead"]  # until nothing is left
    assert [recovery.go_on(0.0) for _ in range(3)] == [10, 10, 5]
    assert not recovery.waiting
    assert repository.liveness.nodes() == []
    assert (owners(repository), len(repository.ready(["remote"], 100))) == ([], 35)


@pytest.mark.timing(free_batch=2)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_task_of_a_dead_node_that_cannot_be_freed_holds_up_no_other(
    monkeypatch, make_queue, repository, dead
):
    queue = make_queue()
    queue.declare("remote")
    dead([waiting(f"{n}") for n in range(6)])
    apply = repository.apply

    def but_for_some(writes, **options):
        refused = {"0", "1", "3"}
        results = iter(apply([write for write in writes if write.id not in refused], **options))
        return [write.id not in refused and next(results) for write in writes]

    monkeypatch.setattr(repository, "apply", but_for_some)
    assert queue_recovery(queue).recover() == 3
    assert held_on(repository, "dead") == ["0", "1", "3"]


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_record_that_a_dead_process_still_locks_keeps_no_queue_from_starting(
    monkeypatch, make_queue, repository, dead, caplog
):
    queue = make_queue(worker_num=1)
    queue.executor("remote")(lambda: "done")
    dead([waiting("0")])
    assert all(repository.apply([lifecycle.start(repository.get_by_id("0"), 2000, "dead")]))
    apply = repository.apply

    def but_for_one(writes, **options):
        if any(write.id == "0" for write in writes):
            raise RepositoryUnavailable("a transaction holds the record")
        return apply(writes, **options)

    with monkeypatch.context() as patch:
        patch.setattr(repository, "apply", but_for_one)
        queue.start()
        assert queue.submit("remote").result(PATIENCE) == "done"
        assert "cannot be taken back yet: a transaction holds the record" in caplog.text
    assert eventually(lambda: repository.get_by_id("0").status is TaskStatus.COMPLETED)
    # The node is gone: the next checks for dead nodes forget it.
    assert eventually(lambda: not housekeeper_of(queue).recovery._held)


@pytest.mark.timing(free_batch=2)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_all_tasks_of_a_dead_node_are_taken_back(make_queue, repository, dead):
    queue = make_queue()
    queue.declare("remote")
    dead([waiting(f"{n}") for n in range(5)])
    found = repository.get_many(["0", "1", "2"])
    assert all(repository.apply([lifecycle.start(task, 2000, "dead") for task in found.values()]))
    assert queue_recovery(queue).recover() == 5
    assert [task.crashes for task in repository.get_many(list("01234")).values()] == [1] * 3 + [
        0
    ] * 2


@pytest.mark.timing(most_audited=2)
class TestAudit:
    """The audit: a node finds its own tasks that it lost track of."""

    @pytest.fixture
    def audits(self, busy, monkeypatch):
        """A queue whose only worker is busy, and an audit of two buffered tasks at a time."""
        queue = busy(buffer_size=100)
        monkeypatch.setattr(housekeeper_of(queue)._audit, "check", lambda: None)
        return queue, audit.Audit(pool_of(queue))

    def test_an_audit_reads_only_the_next_tasks_of_a_large_buffer(self, audits, monkeypatch):
        queue, mine = audits
        queue.submit_many([Task(type="note") for _ in range(20)])
        read, find, this = {}, queue.repository.find, threading.get_ident()

        def counted(column, *args):
            found = find(column, *args)
            if threading.get_ident() == this:  # the housekeeper reads, too
                read[column] = len(found)
            return found

        monkeypatch.setattr(queue.repository, "find", counted)
        mine.check()
        assert read == {"running_on": 1, "buffered_on": 2}

    def test_a_lost_task_is_found_when_it_is_among_the_next_ones(self, audits, gate):
        queue, mine = audits
        handles = [queue.submit("note", {"n": n}) for n in range(5)]
        pool_of(queue).buffer.discard([handles[4].id])
        mine.check()
        mine.check()
        assert queue.buffered == 4
        gate.open()
        assert [handle.result(PATIENCE) for handle in handles[:4]] == [None] * 4
        mine.check()
        mine.check()
        assert handles[4].result(PATIENCE) is None
        assert queue.ran == [0, 1, 2, 3, 4]


@hurried
@pytest.mark.timing(free_batch=10)
@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_started_queue_frees_all_tasks_of_a_dead_node(make_queue, repository, dead):
    queue = make_queue()
    queue.declare("remote")
    queue.start()
    dead([waiting(f"{n:03}") for n in range(35)])
    eventually(lambda: "dead" not in owners(repository))
    eventually(
        lambda: [node.id for node in repository.liveness.nodes()] == [node_of(queue).record.id]
    )


def queue_recovery(queue):
    return prepared_node(queue)._housekeeper.recovery


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("crashes", "cancelled", "consequence"),
    [
        (0, False, "it runs again"),
        (0, True, "it is cancelled, as requested"),
        (2, False, "it has failed and is a dead letter (params={})"),
    ],
)
def test_the_log_says_what_happens_to_a_task_whose_process_died(
    make_queue, repository, dead, caplog, crashes, cancelled, consequence
):
    insert = waiting("victim")
    insert.row["crashes"] = crashes
    ran = {"status": "running", "starts": 1, "max_crashes": 3, "worker": "host:1:dead"}
    start = Update("victim", {}, ran)
    dead([insert, start, *(lifecycle.cancel("victim", 2000) if cancelled else ())])
    queue_recovery(make_queue()).recover()
    [message] = [r.getMessage() for r in caplog.records if "died" in r.getMessage()]
    if consequence == "it runs again":
        assert message == "node host:1:dead died while it ran 1 task, which runs again: victim"
    else:
        assert message == f"task victim was running on host:1:dead, which died: {consequence}"


# Turns and parents


@pytest.mark.timing(batch=10)
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_stalled_queues_of_concurrency_keys_are_advanced_in_parts(
    monkeypatch, make_queue, repository
):
    queue = make_queue()
    queue.declare("remote")
    turns = parts_of(queue).moves.turns
    monkeypatch.setattr(turns, "advance", lambda keys: None)  # as if the submitter died at once
    for n in range(35):
        queue.submit("remote", concurrency_key=f"key {n:02}")
    turns.scan_all_soon()
    moved = []
    while turns.waiting:
        turns.process(0.0)
        moved.append(len(repository.ready(["remote"], 100)))
    assert moved == [10, 20, 30, 35, 35]
    assert not turns.overdue()


@pytest.mark.timing(batch=10)
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_a_stalled_concurrency_key_is_found_behind_many_that_move(make_queue, repository):
    queue = make_queue()
    queue.declare("remote")
    for n in range(35):
        for _ in range(2):
            queue.submit("remote", concurrency_key=f"key {n:02}")
    turns = parts_of(queue).moves.turns
    assert not turns.overdue()
    last = repository.ready(["remote"], 100)[-1].id
    assert any(repository.apply(lifecycle.cancel(last, 2000)))  # as by a process that died then
    assert turns.overdue()
    for _ in range(5):
        turns.scan_some()
    assert not turns.overdue()


def test_an_error_between_two_rounds_does_not_end_the_housekeeper(started, monkeypatch, caplog):
    housekeeper = housekeeper_of(started)
    until, failed = housekeeper._until_next, threading.Event()

    def fail():
        if failed.is_set():
            return until()
        failed.set()
        raise TypeError("a defect")

    monkeypatch.setattr(housekeeper, "_until_next", fail)
    assert failed.wait(PATIENCE)
    whole_round(started)
    assert "unexpected error in the housekeeper" in caplog.text


def test_a_drain_sees_a_type_that_another_process_has_just_resumed(started, repository):
    other = Queue(repository)
    other.declare("fine")
    with no_rounds(started):
        other.pause("fine")
        started._node.pool.tuning.refresh()
        handle = other.submit("fine")
        other.resume("fine")
        assert housekeeper_of(started).stored_left()
    assert started.drain(PATIENCE)
    assert handle.result(0) == "fine"
