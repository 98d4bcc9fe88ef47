"""Group commit: what is shared, what fails alone, and what an interrupt or an outage leaves."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from helpers import PATIENCE, eventually, ids, pool_of, run_in_thread, services_of

from taskx import (
    Config,
    DuplicateTask,
    MemoryRepository,
    Queue,
    RepositoryError,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.common.bell import Agenda
from taskx.common.ledger import Ledger
from taskx.core import lifecycle
from taskx.core.log import Complaint
from taskx.core.writes import Insert
from taskx.running.ahead import MAX_AHEAD, Ahead


def insert(task_id):
    return lifecycle.create(task_id=task_id, type="t", params="{}", created_by="", now=1)


@pytest.fixture
def ledger(repository):
    return Ledger(repository, logging.getLogger("taskx"), Agenda())


class Told(list):
    """What became of each of the writes that were deferred with this as their callback."""

    def __call__(self, results, error):
        self.append(results if error is None else str(error))


class Hold:
    """Holds the first transaction up until told to go on."""

    def __init__(self, repository):
        self.reached, self.go_on = threading.Event(), threading.Event()
        repository.before = self._before
        self._repository = repository

    def _before(self, writes):
        self._repository.before = lambda writes: None
        self.reached.set()
        assert self.go_on.wait(PATIENCE)


def test_alone_it_is_one_transaction(ledger, repository):
    assert ledger.commit([insert("a")]) == [True]
    assert ledger.commit([insert("a"), insert("b")]) == [False, True]
    assert [len(batch) for batch in repository.batches] == [1, 2]
    assert not ledger


def test_what_came_meanwhile_shares_the_next_transaction(ledger, repository):
    hold = Hold(repository)
    first = run_in_thread(lambda: ledger.commit([insert("first")]))
    assert hold.reached.wait(PATIENCE)
    others = [
        run_in_thread(lambda n=n: ledger.commit([insert(f"t{n}"), insert(f"t{n}")]))
        for n in range(20)
    ]
    eventually(lambda: len(ledger._waiting) == 20)
    hold.go_on.set()
    assert first() == [True]
    assert [result() for result in others] == [[True, False]] * 20
    assert [len(batch) for batch in repository.batches] == [1, 40]


def test_a_follower_whose_writes_are_done_waits_for_no_further_leader(ledger, repository):
    """The leader of the next batch may take long: as long as a server is away."""
    with ledger._leading:
        followers = [run_in_thread(lambda n=n: ledger.commit([insert(f"t{n}")])) for n in range(5)]
        eventually(lambda: len(ledger._waiting) == 5)
        ledger._lead()
        assert [follower() for follower in followers] == [[True]] * 5
    assert [len(batch) for batch in repository.batches] == [5]


def test_a_follower_whose_leader_calls_nobody_looks_by_itself(ledger, repository):
    """The leader may have been struck by an interrupt just before."""
    with ledger._leading:
        follower = run_in_thread(lambda: ledger.commit([insert("a")]))
        eventually(lambda: ledger._waiting)
    assert follower() == [True]


def test_deferred_writes_ride_along(ledger, repository):
    told = Told()
    ledger.defer([insert("a")], told)
    ledger.defer([insert("a"), insert("b")], told)
    assert (bool(ledger), repository.batches) == (True, [])
    assert ledger.commit([insert("c")]) == [True]
    assert told == [[True], [False, True]]
    assert [len(batch) for batch in repository.batches] == [4]
    assert ledger.flush()
    assert len(repository.batches) == 1


def test_flush_does_not_wait_when_told_so(ledger, repository):
    hold = Hold(repository)
    leader = run_in_thread(lambda: ledger.commit([insert("a")]))
    assert hold.reached.wait(PATIENCE)
    assert ledger.flush(wait=False) is True  # what a thread waits for is that one's
    ledger.defer([insert("b")], Told())
    assert ledger.flush(wait=False) is False
    hold.go_on.set()
    leader()
    assert ledger.flush(wait=False) is True


@pytest.mark.every_store
def test_bad_write_fails_alone(ledger, repository):
    def refuse(writes):
        if any(write.id == "bad" for write in writes):
            raise RepositoryError("that one cannot be stored")

    hold = Hold(repository)
    first = run_in_thread(lambda: ledger.commit([insert("first")]))
    assert hold.reached.wait(PATIENCE)
    others = {
        name: run_in_thread(lambda name=name: ledger.commit([insert(name)]))
        for name in ("good", "bad", "fine")
    }
    eventually(lambda: len(ledger._waiting) == 3)
    repository.before = refuse
    hold.go_on.set()
    assert first() == others["good"]() == others["fine"]() == [True]
    with pytest.raises(RepositoryError, match="that one"):
        others["bad"]()
    assert set(repository.get_many(["good", "bad", "fine"])) == {"good", "fine"}
    assert not ledger


def test_deferred_bad_write_is_told_why_and_logged(ledger, repository, caplog):
    """What else can be stored is."""

    def refuse(writes):
        if any(write.id == "bad" for write in writes):
            raise RepositoryError("that one cannot be stored")

    told = Told()
    repository.before = refuse
    ledger.defer([insert("bad")], told)
    ledger.defer([insert("good")], told)
    ledger.flush()
    assert told == ["that one cannot be stored", [True]]
    assert "that one" in caplog.text
    assert not ledger


def test_callback_that_raises_keeps_no_other_from_being_called(ledger, caplog):
    told = Told()
    ledger.defer([insert("a")], lambda results, error: 1 / 0)
    ledger.defer([insert("b")], told)
    ledger.flush()
    assert told == [[True]]
    assert "ZeroDivisionError" in caplog.text


# Interrupted


class Interrupt:
    """Raises KeyboardInterrupt once, before or after a transaction is committed."""

    def __init__(self, repository, when):
        setattr(repository, when, self._strike)
        self._repository, self._when = repository, when

    def _strike(self, writes):
        setattr(self._repository, self._when, lambda writes: None)
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_leader_is_succeeded(ledger, repository, when):
    """Whether its COMMIT happened is read back; nothing is lost, and nothing applied twice."""
    told = Told()
    ledger.defer([insert("a")], told)
    Interrupt(repository, when)
    with pytest.raises(KeyboardInterrupt):
        ledger.commit([insert("b")])
    assert ledger.commit([insert("c")]) == [True]
    assert told == [[True]]
    assert set(repository.get_many(["a", "b", "c"])) == {"a", "b", "c"}
    assert not ledger


@pytest.mark.parametrize("when", ["before", "after"])
def test_followers_of_an_interrupted_leader_learn_their_outcome(ledger, repository, when):
    hold = Hold(repository)
    first = run_in_thread(lambda: ledger.commit([insert("first")]))
    assert hold.reached.wait(PATIENCE)
    leader = run_in_thread(lambda: ledger.commit([insert("leader")]))
    eventually(lambda: len(ledger._waiting) == 1)
    follower = run_in_thread(lambda: ledger.commit([insert("follower"), insert("follower")]))
    eventually(lambda: len(ledger._waiting) == 2)
    Interrupt(repository, when)
    outcomes = []
    hold.go_on.set()
    first_interrupted = False
    for result in (first, leader, follower):
        try:
            outcomes.append(result())
        except KeyboardInterrupt:
            first_interrupted = True
    assert first_interrupted
    assert ledger.commit([insert("last")]) == [True]
    names = ["first", "leader", "follower", "last"]
    assert set(repository.get_many(names)) == set(names)
    assert all(outcome[0] for outcome in outcomes)


def test_a_write_is_in_doubt_if_it_cannot_be_read_back(ledger, repository, monkeypatch):
    """Its leader was interrupted: whoever waits for it must not be told that nothing was stored."""
    hold = Hold(repository)
    first = run_in_thread(lambda: ledger.commit([insert("first")]))
    assert hold.reached.wait(PATIENCE)
    both = [run_in_thread(lambda name=name: ledger.commit([insert(name)])) for name in "ab"]
    eventually(lambda: len(ledger._waiting) == 2)
    Interrupt(repository, "before")

    def unreadable(*args):
        raise RepositoryUnavailable("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(repository, "find", unreadable)
        hold.go_on.set()
        assert first() == [True]
        errors = []
        for result in both:
            with pytest.raises((KeyboardInterrupt, RepositoryUnavailable)) as caught:
                result()
            errors.append(caught.value)
    [told] = [error for error in errors if isinstance(error, RepositoryUnavailable)]
    assert told.in_doubt
    assert ledger.flush()
    assert set(repository.get_many(["a", "b"])) == {"a", "b"}


def test_what_does_not_show_after_an_interrupt_is_sent_again(ledger, repository, monkeypatch):
    """Where a repository was struck in the middle of a batch; what shows is not sent twice."""
    told, apply, sent = Told(), repository.apply, []

    def in_part(writes, **options):
        apply(writes[:1])
        monkeypatch.setattr(repository, "apply", rest)
        raise KeyboardInterrupt

    def rest(writes, **options):
        sent.append([write.id for write in writes])
        return apply(writes, **options)

    ledger.defer([insert("a"), insert("b")], told)
    monkeypatch.setattr(repository, "apply", in_part)
    with pytest.raises(KeyboardInterrupt):
        ledger.flush()
    assert ledger.commit([insert("c")]) == [True]
    assert told == [[True, True]]
    assert sent == [["b", "c"]]


def test_interrupted_submit_carries_the_id(queue):
    queue.executor("fine")(lambda: "fine")
    Interrupt(queue.repository, "after")
    with pytest.raises(KeyboardInterrupt) as caught:
        queue.submit("fine")
    assert queue.get_task_status(caught.value.task_id).type == "fine"


@pytest.mark.every_store
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_submit_may_be_repeated_and_runs_once(make_queue, when, look_every):
    look_every(audit=0.1)  # it is the audit that finds the task
    queue = make_queue(worker_num=1)
    ran = []
    queue.executor("note")(lambda: ran.append(1))
    queue.start()
    Interrupt(queue.repository, when)
    with pytest.raises(KeyboardInterrupt):
        queue.submit("note", id="mine")
    eventually(lambda: queue.list_tasks()[1] == 1)
    queue.handle("mine").result(PATIENCE)
    assert ran == [1]


# In doubt: the write was sent to a server that did not answer


def lose_answers(repository, when="after"):
    """Every commit ends in doubt until told otherwise, carried out (``after``) or not."""

    def strike(writes):
        error = RepositoryUnavailable("no answer")
        error.in_doubt = True
        raise error

    setattr(repository, when, strike)


def answer(repository):
    repository.before = repository.after = lambda writes: None


@pytest.mark.every_store
@pytest.mark.parametrize("when", ["before", "after"])
def test_submit_in_doubt_carries_the_id_and_may_be_repeated(queue, when):
    queue.executor("fine")(lambda: "fine")
    lose_answers(queue.repository, when)
    with pytest.raises(RepositoryUnavailable, match="no answer") as caught:
        queue.submit("fine")
    answer(queue.repository)
    task_id = caught.value.task_id
    assert caught.value.in_doubt
    if when == "after":
        with pytest.raises(DuplicateTask):
            queue.submit("fine", id=task_id)
    else:
        queue.submit("fine", id=task_id)
    assert ids(queue) == {task_id}


@pytest.mark.every_store
def test_what_was_not_tried_is_not_in_doubt(ledger, repository, monkeypatch):
    """Though the write before it, in whose transaction it had no room, is."""
    monkeypatch.setattr("taskx.common.ledger.MAX_BATCH", 1)
    told = Told()
    ledger.defer([insert("before")], told)

    def doubt(writes):
        error = RepositoryUnavailable("no answer")
        error.in_doubt = True
        raise error

    repository.before = doubt
    with pytest.raises(RepositoryUnavailable, match="no answer") as caught:
        ledger.commit([insert("behind")])
    assert not caught.value.in_doubt
    repository.before = lambda writes: None
    assert ledger.flush()
    assert told == [[True]]
    assert repository.get_many(["before", "behind"]).keys() == {"before"}


def test_a_write_that_was_stored_is_not_refused_for_the_one_behind_it(
    ledger, repository, monkeypatch
):
    """The two shared a batch that failed, and were then sent one by one."""
    monkeypatch.setattr("taskx.common.ledger.MAX_BATCH", 1)
    told = Told()
    ledger.defer([insert("before")], Told())

    def fail(writes):
        task_ids = [write.id for write in writes]
        if task_ids == ["before"]:
            monkeypatch.setattr("taskx.common.ledger.MAX_BATCH", 10)
            ledger.defer([insert("behind")], told)
        elif "behind" in task_ids:
            raise (RepositoryError if "own" in task_ids else RepositoryUnavailable)("no answer")

    repository.before = fail
    assert ledger.commit([insert("own")]) == [True]
    repository.before = lambda writes: None
    assert ledger.flush()
    assert told == [[True]]


def test_a_write_is_in_doubt_if_its_batch_was_and_it_is_not_sent_again(ledger, repository):
    ledger.defer([insert("before")], Told())

    def fail(writes):
        doubtful = len(writes) > 1
        error = (RepositoryError if doubtful else RepositoryUnavailable)("no answer")
        error.in_doubt = doubtful
        raise error

    repository.before = fail
    with pytest.raises(RepositoryUnavailable) as caught:
        ledger.commit([insert("own")])
    assert caught.value.in_doubt


def test_submit_in_doubt_runs_once(make_queue, look_every):
    look_every(audit=0.1)  # it is the audit that finds the task
    queue = make_queue(worker_num=1)
    ran = []
    queue.executor("note")(lambda: ran.append(1))
    queue.start()
    lose_answers(queue.repository)
    with pytest.raises(RepositoryUnavailable):
        queue.submit("note", id="mine")
    answer(queue.repository)
    queue.handle("mine").result(PATIENCE)
    assert ran == [1]


@pytest.mark.every_store
def test_batch_in_doubt_names_its_first_task(queue):
    queue.executor("fine")(lambda: "fine")
    lose_answers(queue.repository)
    with pytest.raises(RepositoryUnavailable) as caught:
        queue.submit_many([Task(type="fine"), Task(type="fine")])
    answer(queue.repository)
    assert caught.value.in_doubt
    assert caught.value.task_id in ids(queue)


@pytest.mark.every_store
def test_submits_that_shared_a_commit_are_told_of_their_own_task(queue):
    queue.executor("fine")(lambda: "fine")
    hold = Hold(queue.repository)
    first = run_in_thread(lambda: queue.submit("fine"))
    assert hold.reached.wait(PATIENCE)
    names = ["a", "b", "c"]
    submits = [run_in_thread(lambda name=name: queue.submit("fine", id=name)) for name in names]
    eventually(lambda: len(services_of(queue).ledger._waiting) == 3)
    queue.repository.after = lambda writes: lose_answers(queue.repository)
    hold.go_on.set()
    first()
    told = []
    for submit in submits:
        with pytest.raises(RepositoryUnavailable) as caught:
            submit()
        told.append(caught.value.task_id)
    answer(queue.repository)
    assert told == names


@pytest.mark.every_store
def test_refused_submit_leaves_no_doubt(queue):
    queue.executor("fine")(lambda: "fine")
    queue.repository.down = True
    with pytest.raises(RepositoryUnavailable) as caught:
        queue.submit("fine")
    assert not caught.value.in_doubt
    assert caught.value.task_id == ""


# Out of order


def test_outage_fails_those_who_wait_and_keeps_what_was_deferred(ledger, repository):
    told = Told()
    ledger.defer([insert("a")], told)
    repository.down = True
    for _ in range(3):
        with pytest.raises(RepositoryUnavailable):
            ledger.commit([insert("b")])
        with pytest.raises(RepositoryUnavailable):
            ledger.flush()
    assert told == []
    repository.down = False
    ledger.flush()
    assert told == [[True]]
    assert set(repository.get_many(["a", "b"])) == {"a"}


def test_refused_behind_a_long_queue_of_outcomes_is_refused(ledger, repository):
    """A commit that lay behind more than one batch was told that it failed, and must not happen."""
    told = Told()
    for n in range(600):
        ledger.defer([insert(f"t{n}")], told)
    repository.down = True
    with pytest.raises(RepositoryUnavailable):
        ledger.commit([insert("refused")])
    repository.down = False
    while ledger:
        ledger.flush()
    assert told == [[True]] * 600
    assert repository.get_many(["refused"]) == {}


def test_every_callback_is_called_when_an_outage_begins_between_batches(ledger, repository):
    told = Told()
    for n in range(600):
        ledger.defer([insert(f"t{n}")], told)
    repository.after = lambda writes: setattr(repository, "down", True)
    with pytest.raises(RepositoryUnavailable):
        ledger.commit([insert("refused")])
    assert 0 < len(told) < 600
    repository.after, repository.down = lambda writes: None, False
    while ledger:
        ledger.flush()
    assert told == [[True]] * 600


@pytest.mark.every_store
def test_outage_while_tasks_run(queue, gate):
    """Submits fail in bounded time; outcomes wait and are written when the repository is back."""
    queue.executor("hold", max_attempts=2)(lambda n: (gate(), n)[1])
    queue.executor("fine")(lambda: "fine")
    queue.start()
    handles = [queue.submit("hold", {"n": n}) for n in range(2)]
    waiting = queue.submit("fine")
    gate.wait_for(2)
    queue.repository.down = True
    gate.open()
    began = time.monotonic()
    with pytest.raises(RepositoryUnavailable):
        queue.submit("fine", id="refused")
    assert time.monotonic() - began < 10
    eventually(lambda: bool(services_of(queue).ledger))
    threading.Event().wait(0.3)
    queue.repository.down = False
    assert [h.result(PATIENCE) for h in handles] == [0, 1]
    assert waiting.result(PATIENCE) == "fine"
    assert {h.task().starts for h in handles} == {1}
    assert queue.submit("fine").result(PATIENCE) == "fine"
    assert queue.repository.get_many(["refused"]) == {}
    assert pool_of(queue).workers_left == 2


@pytest.mark.slow
def test_outage_is_told_ever_more_rarely(make_queue, gate, monkeypatch, caplog):
    """However many workers it keeps from their work; and they pause before they try again."""
    queue = make_queue(worker_num=8, buffer_size=100)
    queue.executor("hold")(lambda: gate())
    queue.start()
    handles = [queue.submit("hold") for _ in range(40)]
    gate.wait_for(8)
    tries = []

    def check():
        tries.append(time.monotonic())
        raise RepositoryUnavailable("down for a while")

    with monkeypatch.context() as patched, caplog.at_level(logging.INFO, "taskx"):
        patched.setattr(queue.repository, "check", check)
        gate.open()
        eventually(lambda: len(tries) >= 40)
    assert tries[39] - tries[0] > 0.2
    assert 3 <= len(caplog.records) <= 14
    assert [handle.result(PATIENCE) for handle in handles] == [None] * 40


def test_outage_is_told_anew_after_it_was_over(caplog):
    complaint = Complaint(logging.getLogger("taskx"))
    for failures in (5, 2):
        for number in range(1, failures + 1):
            complaint.make("failure: %s", ValueError(number))
        complaint.over()
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"failure: {number}" for number in (1, 2, 4, 1, 2)]


@pytest.mark.every_store
def test_outage_at_a_stop_ends_all_the_same(queue, gate):
    queue.executor("hold")(lambda: gate())
    queue.start()
    handle = queue.submit("hold")
    gate.wait_for(1)
    queue.repository.down = True
    gate.open()
    began = time.monotonic()
    still = queue.stop(timeout=0.2)
    assert time.monotonic() - began < 10
    assert still == [handle.id]
    queue.repository.down = False
    eventually(lambda: handle.task().status is TaskStatus.COMPLETED)


# Starting ahead


@pytest.fixture
def all_short(monkeypatch):
    """Every task counts as short, however slow the machine is; but for the first ones, which are long."""
    monkeypatch.setattr("taskx.running.ahead.SHORT", float("inf"))


@pytest.fixture
def calm(monkeypatch):
    """Only while it is set is anything handed back: a stall of the machine hands nothing back."""
    clear, calm = Ahead.clear, threading.Event()

    def clear_in_the_calm(ahead, older_than=0.0):
        return clear(ahead, older_than) if calm.is_set() or not older_than else []

    monkeypatch.setattr(Ahead, "clear", clear_in_the_calm)
    return calm


@pytest.fixture
def short(make_queue, all_short, calm):
    """A queue, not started, that has one worker and holds 300 tasks which take no time."""
    queue = make_queue(worker_num=1, buffer_size=1000)
    queue.ran = []
    queue.executor("n")(lambda n: queue.ran.append(n))
    queue.handles = [queue.submit("n", {"n": n}) for n in range(300)]
    return queue


def starts(queue):
    """How many tasks were started in each transaction that started any."""
    counts = [
        sum(not isinstance(w, Insert) and w.changes.get("status") == "running" for w in batch)
        for batch in queue.repository.batches
    ]
    return [count for count in counts if count]


@pytest.mark.every_store
def test_short_tasks_are_started_in_batches(short):
    short.start()
    assert short.drain(PATIENCE)
    assert sorted(short.ran) == list(range(300))
    assert starts(short)[0] == 1
    assert sum(starts(short)) == 300
    assert 2 <= max(starts(short)) <= MAX_AHEAD
    assert len(starts(short)) < 250


def test_long_tasks_are_started_one_by_one(make_queue):
    queue = make_queue(worker_num=1)
    queue.executor("long")(lambda ctx: ctx.token.wait(0.003))
    handles = [queue.submit("long") for _ in range(40)]
    queue.start()
    for handle in handles:
        handle.result(PATIENCE)
    assert set(starts(queue)) == {1}


@pytest.mark.every_store
@pytest.mark.parametrize("declared", [False, True])
def test_tasks_that_must_not_crash_twice_are_started_alone(make_queue, declared):
    queue = make_queue(worker_num=1, buffer_size=1000)
    ran = []
    submitter = queue
    if declared:  # the process that submits knows nothing of the executor's options
        submitter = make_queue()
        submitter.declare("n")
    else:
        queue.executor("n", max_crashes=1)(lambda n: ran.append(n))
    for n in range(100):
        submitter.submit("n", {"n": n})
    if declared:
        queue.executor("n", max_crashes=1)(lambda n: ran.append(n))
    queue.start()
    assert queue.drain(PATIENCE)
    assert ran == list(range(100))
    assert set(starts(queue)) == {1}


@pytest.mark.every_store
@pytest.mark.usefixtures("all_short", "calm")
def test_started_ahead_and_cancelled_it_never_runs(make_queue):
    queue = make_queue(worker_num=1, buffer_size=1000)
    ran, cancelled, ready = [], [], threading.Event()

    @queue.executor("n")
    def n(n):
        assert ready.wait(PATIENCE)
        ran.append(n)
        ahead = list(pool_of(queue).ahead.runs)
        if ahead and not cancelled:
            cancelled.append(ahead[-1].task.id)
            assert queue.cancel_task(cancelled[0]) is False  # it counts as running

    for number in range(300):
        queue.submit("n", {"n": number})
    queue.start()
    ready.set()
    assert queue.drain(PATIENCE)
    [task_id] = cancelled
    task = queue.get_task_status(task_id)
    assert task.status is TaskStatus.CANCELLED
    assert task.params["n"] not in ran
    assert len(ran) == 299


@pytest.mark.every_store
@pytest.mark.usefixtures("all_short")
def test_started_ahead_without_a_free_hand_it_is_handed_back(make_queue, gate, calm, clock):
    """To where it was in the order, also among tasks of the same moment."""
    queue = make_queue(worker_num=1, buffer_size=1000, clock=clock)
    ran, ready = [], threading.Event()
    hung = []

    @queue.executor("n")
    def n(n):
        assert ready.wait(PATIENCE)
        ran.append(n)
        ahead = [run.task.id for run in pool_of(queue).ahead.runs]
        if ahead and not hung:
            hung.extend(ahead)
            gate()

    for number in range(300):
        queue.submit("n", {"n": number})
    queue.start()
    ready.set()
    gate.wait_for(1)
    calm.set()
    eventually(lambda: not pool_of(queue).ahead.runs)
    calm.clear()
    tasks = [queue.get_task_status(task_id) for task_id in hung]
    eventually(
        lambda: {queue.get_task_status(task_id).status for task_id in hung} == {TaskStatus.PENDING}
    )
    gate.open()
    assert queue.drain(PATIENCE)
    assert ran == list(range(300))
    for task in tasks:
        done = queue.get_task_status(task.id)
        assert (done.starts, done.errors, done.interruptions, len(done.attempts)) == (2, 0, 0, 1)


@pytest.mark.every_store
@pytest.mark.usefixtures("all_short", "calm")
def test_stop_hands_back_what_was_started_ahead(make_queue):
    queue = make_queue(worker_num=1, buffer_size=1000)
    ran, ready = [], threading.Event()

    @queue.executor("n")
    def n(n):
        assert ready.wait(PATIENCE)
        ran.append(n)
        if pool_of(queue).ahead.runs and stopping == []:
            stopping.append(run_in_thread(lambda: queue.stop(PATIENCE)))
            eventually(lambda: pool_of(queue).stopping)

    stopping: list = []
    handles = [queue.submit("n", {"n": number}) for number in range(300)]
    queue.start()
    ready.set()
    eventually(lambda: stopping)
    assert stopping[0]() == []
    tasks = [h.task() for h in handles]
    pending = [t for t in tasks if t.status is TaskStatus.PENDING]
    assert sorted(t.params["n"] for t in tasks if t.status is TaskStatus.COMPLETED) == sorted(ran)
    assert len(pending) == 300 - len(ran)
    assert {(t.owner, t.interruptions) for t in pending} == {("", 0)}


def test_outage_while_a_worker_fetches_more_loses_no_task_that_it_started():
    class FailsUntilAWorkerHasSeenIt(MemoryRepository):
        asked = failed = False

        def ready(self, *asked):
            if self.asked and not self.failed:
                self.failed = threading.current_thread().name.startswith("taskx-worker")
                raise RepositoryUnavailable("for a moment")
            self.asked = True
            return super().ready(*asked)

    repository = FailsUntilAWorkerHasSeenIt()
    queue = Queue(repository, Config(worker_num=1))
    queue.executor("fine")(lambda: "fine")
    queue.submit_many([Task(type="fine") for _ in range(300)])
    with queue:
        assert queue.drain(PATIENCE)
    assert repository.failed
    assert repository.count(TaskFilter(status="completed")) == 300
