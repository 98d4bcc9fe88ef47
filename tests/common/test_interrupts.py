"""Exceptions of signal handlers in the main thread: the queue goes on, whatever they interrupt.

A *strike* is such an exception. ``every_strike`` calls a function again and again, and interrupts each
call one point later than the call before.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import TimeoutError

import pytest
from helpers import (
    PATIENCE,
    PlainLedger,
    Waiting,
    eventually,
    no_rounds,
    node_of,
    parts_of,
    pool_of,
    run_in_thread,
    undisturbed,
)
from strikes import every_strike, strike_at

from taskx import Hook, QueueFull, RepositoryError, RepositoryUnavailable, Task, TaskStatus
from taskx.node.audit import Audit
from taskx.node.buffer import Buffer, Slots
from taskx.node.pool import WorkerPool
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda, Bell
from taskx.tasks.clock import to_ms
from taskx.tasks.log import GuardedLogger
from taskx.tasks.timing import DEFAULT_TIMING


@pytest.fixture
def log():
    return GuardedLogger(logging.getLogger("taskx"))


#: Runs the audit without pause, so that it finds lost tasks at once.
auditing = pytest.mark.timing(audit_every=0.02)


def strikes(call, step=1, recovered=lambda: True):
    """Strike a call at every point, and wait after each strike until ``recovered()`` is true.

    SQLite calls Python code for each new statement. An exception that strikes in such a callback is lost,
    and the statement fails.
    """

    def guarded(point):
        try:
            call(point)
        except RepositoryError as error:
            if "not authorized" not in str(error):
                raise

    struck = []
    for strike in every_strike(guarded, step=step):
        struck.append(strike)
        eventually(recovered)
    return struck


def check_it_works(queue):
    """Check that nothing is left behind and that other threads go on."""
    assert queue.drain(PATIENCE)
    pool = pool_of(queue)
    assert (dict(pool.runs), queue.buffered, len(pool.buffer)) == ({}, 0, 0)
    assert not parts_of(queue).moves.unsettled
    assert run_in_thread(lambda: queue.submit("fine").result(PATIENCE))() == "fine"


def check_stored(queue, struck):
    """Check that all stored tasks have run, and that the exceptions carry their ids."""
    found = queue.repository.get_many(list(struck))
    assert {task.status for task in found.values()} <= {TaskStatus.COMPLETED}
    for task_id in found:
        assert getattr(struck[task_id], "task_id", None) == task_id, str(struck[task_id])


STRIKES = {
    "plain": {},
    "to a full buffer": {"buffer_size": 1, "overflow": "spill"},
    "that wait for room": {"buffer_size": 1, "overflow": "block"},
    "told to hooks": {"hooks": [type("Told", (Hook,), {"submitted": lambda self, task: None})()]},
}


@auditing
@pytest.mark.parametrize(
    ("repository", "kind"),
    [*(("memory", kind) for kind in STRIKES), ("sqlite", "plain")],
    indirect=["repository"],
)
def test_an_interrupted_submit_leaves_nothing_behind(make_queue, kind):
    queue = make_queue(worker_num=2, **STRIKES[kind])
    queue.executor("fine")(lambda: "fine")
    queue.start()
    queue.submit("fine").result(PATIENCE)
    struck = {
        f"x{point}": strike
        for point, strike in enumerate(strikes(lambda point: queue.submit("fine", id=f"x{point}")))
    }
    assert len(struck) > 50
    check_it_works(queue)
    # If submit() has already returned, or the exception was lost, no exception can carry the id.
    last = ("in __init__", "in submit", "in _submit", "in __call__", __file__)
    check_stored(queue, {i: s for i, s in struck.items() if not any(w in str(s) for w in last)})


@auditing
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_an_interrupted_submit_many_stores_all_tasks_or_none(make_queue):
    queue = make_queue(worker_num=2, buffer_size=3, overflow="spill")
    queue.executor("fine")(lambda: "fine")
    queue.start()

    def submit(point):
        queue.submit_many([Task(type="fine", id=f"{point}-{n}") for n in range(3)])

    points = len(strikes(submit, step=3))
    check_it_works(queue)
    for point in range(points * 3):
        names = [f"{point}-{n}" for n in range(3)]
        assert len(queue.repository.get_many(names)) in (0, 3)


@auditing
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_an_interrupted_task_that_its_submitter_runs_runs_again(make_queue, gate):
    queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")
    queue.executor("fine")(lambda: "fine")
    queue.start()
    Waiting(queue, gate).fill(1)
    queue.submit("fine")
    struck = strikes(lambda point: queue.submit("fine", id=f"x{point}"), step=3)
    assert len(struck) > 50
    gate.open()
    check_it_works(queue)


@auditing
@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_an_interrupted_cancel_leaves_nothing_behind(make_queue, gate):
    queue = make_queue(worker_num=1, buffer_size=1100)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    Waiting(queue, gate).fill(1)
    queue.submit_many([Task(type="fine", id=f"x{n}") for n in range(1000)])
    agenda, moves = queue._agenda, queue._moves
    # Else each cancel also completes the work of the one before, and is struck during that work.
    recovered = lambda: not moves.unsettled or agenda.wake()  # noqa: E731
    struck = strikes(lambda point: queue.cancel_task(f"x{point}"), recovered=recovered)
    assert len(struck) > 20
    gate.open()
    check_it_works(queue)


@auditing
@pytest.mark.parametrize("what", ["drain", "list_tasks", "wait_quiet", "result", "map"])
def test_other_interrupted_calls_leave_nothing_behind(started, what):
    later = started.submit("fine", delay=3600)

    def times_out(point):
        with pytest.raises(TimeoutError):
            later.result(0.001)

    call = {
        "drain": lambda point: started.drain(0.001),
        "list_tasks": lambda point: started.list_tasks(),
        "wait_quiet": lambda point: pool_of(started).wait_quiet(0.001),
        "result": times_out,
        "map": lambda point: list(started.map("fine", [{}] * 3, lambda _: 1, name=f"m{point}")),
    }[what]
    assert len(strikes(call, step=3)) > 2
    check_it_works(started)


@auditing
@pytest.mark.parametrize("ordered", [True, False])
def test_a_map_goes_on_after_an_interrupt_and_gives_no_result_twice(make_queue, ordered):
    """Only the item that is read and the result that is taken at that moment may be lost."""
    queue = make_queue(worker_num=1)
    queue.executor("fine")(lambda n="fine": n)
    queue.start()
    points = 0
    while True:
        items, got = [{"n": n} for n in range(5)], []
        results = queue.map(
            *("fine", items, lambda item: item["n"]), name=f"m{points}", window=3, ordered=ordered
        )

        def take(results=results, got=got):
            for result in results:
                got.append(result)

        strike = strike_at(17 * points, take)
        got += results
        assert len(got) == len(set(got)) >= 4, strike
        if strike is None:
            break
        points += 1
    assert points > 20
    check_it_works(queue)


# Threads that work for others


def insert(task_id):
    return lifecycle.create(task_id=task_id, type="t", params="{}", created_by="", now=1)


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_an_interrupted_leader_loses_no_write_of_other_threads(repository, log):
    """Each outcome is reported once, by a thread that no signal strikes."""
    agenda = Agenda()
    agenda.attended = True
    ledger = PlainLedger(repository, log, agenda, DEFAULT_TIMING)
    told = []

    def lead(point):
        for n in range(3):
            name = f"{point}-{n}"
            ledger.later(
                [insert(name)], lambda results, error, name=name: told.append((name, *results))
            )
        ledger.commit([insert(f"{point}-mine")])

    points = 0
    for strike in every_strike(lead):
        if ledger.unsettled:
            run_in_thread(ledger.flush)()
        deferred = {f"{points}-{n}" for n in range(3)} & set(
            repository.get_many([f"{points}-{n}" for n in range(3)])
        )
        assert sorted(told) == [(name, True) for name in sorted(deferred)], strike
        told.clear()
        points += 1
        assert not ledger._leading._is_owned()
    assert points > 10
    assert agenda._told  # the housekeeper reports the outcomes


def test_outcomes_survive_two_interrupted_leaders(repository, log):
    """What the first one has sent is read back, although the second one was struck before it did so."""
    agenda = Agenda()
    agenda.attended = True
    ledger = PlainLedger(repository, log, agenda, DEFAULT_TIMING)

    def interrupt(writes):
        repository.after = lambda writes: None
        raise KeyboardInterrupt

    for point in range(40):
        told = []
        ledger.later([insert(f"{point}")], lambda results, error, told=told: told.extend(results))
        repository.after = interrupt
        with pytest.raises(KeyboardInterrupt):
            ledger.commit([insert(f"{point}-first")])
        strike_at(point, lambda point=point: ledger.commit([insert(f"{point}-second")]))
        run_in_thread(ledger.flush)()
        assert told == [True]


def test_a_follower_of_an_interrupted_leader_gets_its_result(repository, log):
    ledger = PlainLedger(repository, log, Agenda(), DEFAULT_TIMING)
    reached, go_on = threading.Event(), threading.Event()

    def hold(writes):
        repository.before = lambda writes: None
        reached.set()
        assert go_on.wait(PATIENCE)

    for point in range(0, 60, 3):
        repository.before = hold
        first = run_in_thread(lambda point=point: ledger.commit([insert(f"{point}-first")]))
        assert reached.wait(PATIENCE)
        second = run_in_thread(lambda point=point: ledger.commit([insert(f"{point}-second")]))
        eventually(lambda: len(ledger._waiting) == 1)
        go_on.set()
        strike_at(point, lambda point=point: ledger.commit([insert(f"{point}-third")]))
        assert (first(), second()) == ([True], [True])
        ledger.flush()  # the third one may have come when the others were done, and was struck alone
        reached.clear()
        go_on.clear()


# The parts


def test_an_interrupted_bell_still_wakes_its_listeners():
    bell = Bell()

    def both(point):
        bell.wait(bell.listen(), 0.0)
        bell.ring()

    for _ in every_strike(both):
        left = len(bell.listening)  # by the interrupted call
        woken = run_in_thread(lambda: bell.wait(bell.listen(), PATIENCE))
        eventually(lambda left=left: len(bell.listening) > left)
        eventually(lambda: bell.ring_all() or not bell.listening)
        woken()


def slots(buffer, *names):
    return Slots(buffer, "node", [insert(name) for name in names or ("x",)], bool)


def test_an_interrupted_submit_gives_its_slot_back():
    buffer = Buffer(2, 2, lambda: True)

    def use(point):
        place = slots(buffer, f"x{point}")
        try:
            assert place.reserve()
            place.fill()
        except BaseException as error:
            place.release(error)
            raise

    for strike in every_strike(use):
        inside = len(buffer)
        assert buffer.submitted == inside, strike
        assert len(buffer.take(9)) == inside, strike
        buffer.started()


def test_a_full_buffer_has_no_slot_left():
    buffer = Buffer(1, 1, lambda: True)
    assert slots(buffer).reserve()
    assert not slots(buffer).reserve()


@auditing
def test_the_audit_finds_lost_slots(started):
    buffer = pool_of(started).buffer
    with no_rounds(started):
        assert slots(buffer, *map(str, range(buffer.maxsize))).reserve()
        with pytest.raises(QueueFull):
            started.submit("fine", id="with an id, so that it goes through the buffer")
    eventually(lambda: not buffer.reserved)
    assert started.submit("fine").result(PATIENCE) == "fine"


def test_a_start_that_was_interrupted_when_it_let_the_workers_go_can_be_repeated(
    queue, monkeypatch
):
    queue.executor("fine")(lambda: "fine")
    go = WorkerPool.go

    def struck(pool):
        with monkeypatch.context() as patch:
            patch.setattr(pool.begun, "set", strike, raising=False)
            go(pool)

    def strike():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "go", struck)
        with pytest.raises(KeyboardInterrupt):
            queue.start()
    queue.start()
    assert queue.submit("fine").result(PATIENCE) == "fine"


@pytest.mark.parametrize("repository", ["memory", "sqlite"], indirect=True)
def test_an_interrupted_start_leaves_no_node(queue, monkeypatch):
    queue.executor("fine")(lambda: "fine")
    join = queue.repository.liveness.join

    def struck(node, **about):
        join(node, **about)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue.repository.liveness, "join", struck)
    with pytest.raises(KeyboardInterrupt):
        queue.start()
    assert queue.repository.liveness.nodes() == []
    monkeypatch.setattr(queue.repository.liveness, "join", join)
    queue.start()
    check_it_works(queue)


def test_a_start_that_cannot_join_asks_the_repository_only_once(queue, monkeypatch):
    """A repository that does not answer would block each call."""
    asked = []

    def away(*args, **options):
        asked.append(1)
        raise RepositoryUnavailable("away")

    for name in ("join", "leave"):
        monkeypatch.setattr(queue.repository.liveness, name, away)
    for name in ("find", "apply"):
        monkeypatch.setattr(queue.repository, name, away)
    with pytest.raises(RepositoryUnavailable):
        queue.start()
    assert asked == [1]


# Differences between memory and the repository


@auditing
def test_the_audit_forgets_a_run_whose_task_has_ended(started):
    handle = started.submit("fine")
    handle.result(PATIENCE)
    pool = pool_of(started)
    pool.runs[handle.id] = pool.starter._make_run(handle.task())
    pool.runs[handle.id].task.status = TaskStatus.RUNNING
    eventually(lambda: not pool.runs)
    check_it_works(started)


@auditing
def test_a_run_that_no_thread_executes_runs_again(started):
    pool, starter = pool_of(started), pool_of(started).starter
    started.executor("held", max_attempts=1)(lambda: "ran")
    repository = started.repository
    with_run = lifecycle.create(task_id="x", type="fine", params="{}", created_by="", now=1)
    with no_rounds(started):
        repository.apply([with_run._replace(row={**with_run.row, "owner": pool.node.id})])
        (task,) = repository.get_many(["x"]).values()
        run = starter._make_run(task)
        pool.runs["x"] = run
        update = lifecycle.start(task, 2, pool.node.id)
        assert repository.apply([update]) == [True]
        lifecycle.mark_started([task], [update])
    eventually(lambda: started.get_task_status("x").status is TaskStatus.COMPLETED)
    assert started.get_task_status("x").interruptions == 0  # its executor was not called before
    check_it_works(started)


@undisturbed
def test_a_run_that_the_audit_has_claimed_is_not_executed(started):
    """The thread that had the run comes too late: the task is pending again."""
    pool = pool_of(started)
    called = []
    started.executor("late")(lambda: called.append(1))
    handle = started.submit("late", delay=3600)
    run = pool.starter._make_run(handle.task())
    pool.runs[handle.id] = run
    assert pool.starter.claim(run)
    pool.execute(run, "late")
    assert called == []
    assert pool.runs.executing == []


@undisturbed
def test_a_run_is_either_claimed_by_the_audit_or_executed(started, monkeypatch):
    """A thread that comes between the audit's two checks finds the run forgotten, and leaves it alone."""
    pool = pool_of(started)
    handle = started.submit("fine", delay=3600)
    run = pool.starter._make_run(handle.task())
    pool.runs[handle.id] = run
    forget = pool.runs.forget

    def then_a_thread_comes(run):
        assert forget(run)
        assert not pool.execute(run, "late").returned
        return True

    monkeypatch.setattr(pool.runs, "forget", then_a_thread_comes)
    assert pool.starter.claim(run)
    assert not pool.runs


def test_a_run_whose_outcome_is_being_stored_is_not_lost(started, monkeypatch):
    """Else its executor would be called a second time while a slow write goes on."""
    pool, going_on = pool_of(started), threading.Event()
    at_it, outcome = threading.Event(), pool._outcome

    def slow(run, ending):
        at_it.set()
        assert going_on.wait(PATIENCE)
        return outcome(run, ending)

    monkeypatch.setattr(pool, "_outcome", slow)
    handle = started.submit("fine")
    assert at_it.wait(PATIENCE)
    audit = Audit(pool)
    audit.check()
    audit.check()
    going_on.set()
    assert handle.result(PATIENCE) == "fine"
    assert handle.task().interruptions == 0


@undisturbed
def test_claiming_an_ended_run_leaves_the_next_run_alone(started):
    """Else the next run would be handed back while its executor works."""
    pool = started._node.pool
    handle = started.submit("fine", delay=3600)
    over, later = (pool.starter._make_run(handle.task()) for _ in range(2))
    pool.runs[handle.id] = later
    assert not pool.starter.claim(over)
    assert pool.runs.pop(handle.id) is later


@auditing
def test_the_audit_finds_a_run_lost_between_two_threads(started, monkeypatch):
    """This may happen if memory runs out between two lines."""
    pool = started._node.pool
    handle = started.submit("fine", id="x", delay=3600)
    with monkeypatch.context() as patch:
        patch.setattr(pool.fetcher, "refill", lambda: None)  # so that no other thread starts it
        started.repository.apply([lifecycle.release("x")])
        run = pool.starter._make_run(handle.task())
        update = lifecycle.start(run.task, to_ms(run.task.run_at), pool.node.id)
        pool.runs["x"] = run
        assert started.repository.apply([update]) == [True]
    lifecycle.mark_started([run.task], [update])
    run.state = "ahead"
    assert handle.result(PATIENCE) == "fine"
    check_it_works(started)


@undisturbed
def test_a_run_that_just_begins_is_not_lost(started):
    pool = pool_of(started)
    handle = started.submit("fine", delay=3600)
    run = pool.starter._make_run(handle.task())
    pool.runs[handle.id] = run
    run.state = "executing"
    assert not pool.starter.claim(run)
    assert pool.runs.pop(handle.id) is run


STEPS = [("_by", 4), ("_wait_for_workers", 2)]


@pytest.mark.parametrize(
    ("step", "nth"), [(step, nth) for step, times in STEPS for nth in range(times)]
)
@pytest.mark.parametrize("first", [True, False])
def test_the_next_stop_completes_an_interrupted_stop(
    make_queue, gate, monkeypatch, step, nth, first
):
    """The end of ``with queue:`` does so after Ctrl-C in ``stop``. It need not wait for the time-out."""
    queue = make_queue(worker_num=1)
    held = queue.executor("hold")(lambda: gate() or "held").submit()
    queue.start()
    gate.wait_for()
    node, calls = node_of(queue), []
    do = getattr(node, step)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == nth + 1:
            if not first:
                do(*args)
            raise KeyboardInterrupt
        return do(*args)

    monkeypatch.setattr(node, step, interrupted)
    run_in_thread(lambda: (eventually(lambda: node.pool.stopping), gate.open()))
    with pytest.raises(KeyboardInterrupt):
        queue.stop(PATIENCE)
    gate.open()
    assert queue.stop(PATIENCE) == []
    assert node._left.is_set()
    assert not queue.repository.liveness.nodes()
    assert held.result(PATIENCE) == "held"
