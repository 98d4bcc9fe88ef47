"""Group commit: shared transactions, writes that fail alone, interrupts and outages."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from helpers import (
    PATIENCE,
    SOON,
    PlainLedger,
    eventually,
    housekeeper_of,
    ids,
    joined_node,
    parts_of,
    pool_of,
    run_in_thread,
)

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
from taskx.stores.base import Locked
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda
from taskx.tasks.log import Complaint
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import Insert


def insert(task_id):
    return lifecycle.create(task_id=task_id, type="t", params="{}", created_by="", now=1)


@pytest.fixture
def ledger(repository, timing):
    return PlainLedger(repository, logging.getLogger("taskx"), Agenda(), timing)


class Told(list):
    """A callback for deferred writes that collects their outcomes."""

    def __call__(self, results, error):
        self.append(results if error is None else str(error))


class Hold:
    """Holds the first transaction until ``go_on`` is set."""

    def __init__(self, repository):
        self.reached, self.go_on = threading.Event(), threading.Event()
        repository.before = self._before
        self._repository = repository

    def _before(self, writes):
        self._repository.before = lambda writes: None
        self.reached.set()
        assert self.go_on.wait(PATIENCE)


def test_a_single_commit_is_one_transaction(ledger, repository):
    assert ledger.commit([insert("a")]) == [True]
    assert ledger.commit([insert("a"), insert("b")]) == [False, True]
    assert [len(batch) for batch in repository.batches] == [1, 2]
    assert not ledger.unsettled


def test_waiting_writes_share_the_next_transaction(ledger, repository):
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


def test_a_follower_returns_as_soon_as_its_writes_are_committed(ledger, repository):
    """It must not wait for the next leader, which may block as long as a server is unavailable."""
    with ledger._leading:
        followers = [run_in_thread(lambda n=n: ledger.commit([insert(f"t{n}")])) for n in range(5)]
        eventually(lambda: len(ledger._waiting) == 5)
        ledger._lead()
        assert [follower() for follower in followers] == [[True]] * 5
    assert [len(batch) for batch in repository.batches] == [5]


def test_a_follower_goes_on_if_its_leader_does_not_wake_it(ledger, repository):
    """An interrupt may have struck the leader just before."""
    with ledger._leading:
        follower = run_in_thread(lambda: ledger.commit([insert("a")]))
        eventually(lambda: ledger._waiting)
    assert follower() == [True]


def test_deferred_writes_join_the_next_commit(ledger, repository):
    told = Told()
    ledger.later([insert("a")], told)
    ledger.later([insert("a"), insert("b")], told)
    assert (ledger.unsettled, repository.batches) == (True, [])
    assert ledger.commit([insert("c")]) == [True]
    assert told == [[True], [False, True]]
    assert [len(batch) for batch in repository.batches] == [4]
    assert ledger.flush()
    assert len(repository.batches) == 1


def test_a_late_flush_leaves_an_outcome_to_the_next_start_once(ledger, repository):
    """The first call sees that it waits, and the next one stores it, if no other write did in between."""
    ledger.later([insert("a")], Told())
    assert not ledger.flush(late=True)
    assert repository.get_many(["a"]) == {}
    ledger.commit([insert("b")])
    ledger.later([insert("c")], Told())
    assert not ledger.flush(late=True)
    assert set(repository.get_many("abc")) == {"a", "b"}
    assert ledger.flush(late=True)
    assert set(repository.get_many("abc")) == {"a", "b", "c"}


def test_flush_can_return_instead_of_waiting_for_the_leader(ledger, repository):
    hold = Hold(repository)
    leader = run_in_thread(lambda: ledger.commit([insert("a")]))
    assert hold.reached.wait(PATIENCE)
    assert ledger.flush(wait=False) is True  # the leader's own writes do not count
    ledger.later([insert("b")], Told())
    assert ledger.flush(wait=False) is False
    hold.go_on.set()
    leader()
    assert ledger.flush(wait=False) is True


@pytest.mark.every_store
def test_a_bad_write_fails_alone(ledger, repository):
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
    assert not ledger.unsettled


def test_a_refused_deferred_write_is_reported_and_logged(ledger, repository, caplog):
    def refuse(writes):
        if any(write.id == "bad" for write in writes):
            raise RepositoryError("that one cannot be stored")

    told = Told()
    repository.before = refuse
    ledger.later([insert("bad")], told)
    ledger.later([insert("good")], told)
    ledger.flush()
    assert told == ["that one cannot be stored", [True]]
    assert "that one" in caplog.text
    assert not ledger.unsettled


def test_a_callback_that_raises_does_not_prevent_others(ledger, caplog):
    told = Told()
    ledger.later([insert("a")], lambda results, error: 1 / 0)
    ledger.later([insert("b")], told)
    ledger.flush()
    assert told == [[True]]
    assert "ZeroDivisionError" in caplog.text


# Interrupts


class Interrupt:
    """Raises KeyboardInterrupt once, before or after a transaction is committed."""

    def __init__(self, repository, when):
        setattr(repository, when, self._strike)
        self._repository, self._when = repository, when

    def _strike(self, writes):
        setattr(self._repository, self._when, lambda writes: None)
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_next_leader_completes_the_work_of_an_interrupted_one(ledger, repository, when):
    """It reads back if the COMMIT happened. No write is lost, and none is applied twice."""
    told = Told()
    ledger.later([insert("a")], told)
    Interrupt(repository, when)
    with pytest.raises(KeyboardInterrupt):
        ledger.commit([insert("b")])
    assert ledger.commit([insert("c")]) == [True]
    assert told == [[True]]
    assert set(repository.get_many(["a", "b", "c"])) == {"a", "b", "c"}
    assert not ledger.unsettled


@pytest.mark.parametrize("when", ["before", "after"])
def test_followers_of_an_interrupted_leader_get_their_outcome(ledger, repository, when):
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
    """After its leader was interrupted, a waiting thread must not hear that nothing was stored."""
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


def test_only_writes_that_an_interrupt_has_prevented_are_sent_again(
    ledger, repository, monkeypatch
):
    """The interrupt strikes the repository in the middle of a batch. Stored writes are not sent twice."""
    told, apply, sent = Told(), repository.apply, []

    def in_part(writes, **options):
        apply(writes[:1])
        monkeypatch.setattr(repository, "apply", rest)
        raise KeyboardInterrupt

    def rest(writes, **options):
        sent.append([write.id for write in writes])
        return apply(writes, **options)

    ledger.later([insert("a"), insert("b")], told)
    monkeypatch.setattr(repository, "apply", in_part)
    with pytest.raises(KeyboardInterrupt):
        ledger.flush()
    assert ledger.commit([insert("c")]) == [True]
    assert told == [[True, True]]
    assert sent == [["b", "c"]]


def test_an_interrupted_submit_carries_the_task_id(queue):
    queue.executor("fine")(lambda: "fine")
    Interrupt(queue.repository, "after")
    with pytest.raises(KeyboardInterrupt) as caught:
        queue.submit("fine")
    assert queue.get_task_status(caught.value.task_id).type == "fine"


@pytest.mark.timing(audit_every=0.1)
@pytest.mark.every_store
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_task_of_an_interrupted_submit_runs_once(make_queue, when):
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


# Writes in doubt, sent to a server that did not answer


def lose_answers(repository, when="after"):
    """End each commit in doubt until ``answer`` is called, ``before`` or ``after`` it is applied."""

    def strike(writes):
        error = RepositoryUnavailable("no answer")
        error.in_doubt = True
        raise error

    setattr(repository, when, strike)


def answer(repository):
    """Let commits succeed again."""
    repository.before = repository.after = lambda writes: None


@pytest.mark.every_store
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_submit_in_doubt_carries_the_task_id_and_can_be_repeated(queue, when):
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


@pytest.mark.timing(commit_batch=1)
@pytest.mark.every_store
def test_a_write_that_was_not_tried_is_not_in_doubt(ledger, repository):
    """The write before it is in doubt. It had no room in that write's transaction."""
    told = Told()
    ledger.later([insert("before")], told)

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


@pytest.mark.timing(commit_batch=2)
def test_a_stored_write_does_not_fail_with_the_write_behind_it(ledger, repository):
    """Both were in a batch that failed, and were then sent one by one."""
    told = Told()
    ledger.later([insert("first")], Told())
    ledger.later([insert("second")], Told())

    def fail(writes):
        task_ids = [write.id for write in writes]
        if task_ids == ["first", "second"]:
            ledger.later([insert("behind")], told)
        elif "behind" in task_ids:
            raise (RepositoryError if "own" in task_ids else RepositoryUnavailable)("no answer")

    repository.before = fail
    assert ledger.commit([insert("own")]) == [True]
    repository.before = lambda writes: None
    assert ledger.flush()
    assert told == [[True]]


def test_a_write_is_in_doubt_if_its_batch_is_in_doubt(ledger, repository):
    ledger.later([insert("before")], Told())

    def fail(writes):
        doubtful = len(writes) > 1
        error = (RepositoryError if doubtful else RepositoryUnavailable)("no answer")
        error.in_doubt = doubtful
        raise error

    repository.before = fail
    with pytest.raises(RepositoryUnavailable) as caught:
        ledger.commit([insert("own")])
    assert caught.value.in_doubt


@pytest.mark.timing(audit_every=0.1)
def test_a_task_of_a_submit_in_doubt_runs_once(make_queue):
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


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
@pytest.mark.timing(audit_every=0.05)
def test_a_delayed_task_of_a_submit_in_doubt_starts_in_time(make_queue):
    """Nobody has told the housekeeper that such a task is stored."""
    queue = make_queue(worker_num=1)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    queue.submit("fine").result(PATIENCE)
    eventually(lambda: not housekeeper_of(queue)._changed())
    eventually(lambda: parts_of(queue).agenda.due_known)
    lose_answers(queue.repository)
    with pytest.raises(RepositoryUnavailable):
        queue.submit("fine", id="later", delay=0.1)
    answer(queue.repository)
    assert queue.handle("later").result(PATIENCE) == "fine"


@pytest.mark.every_store
def test_a_submit_many_in_doubt_names_its_first_task(queue):
    queue.executor("fine")(lambda: "fine")
    lose_answers(queue.repository)
    with pytest.raises(RepositoryUnavailable) as caught:
        queue.submit_many([Task(type="fine"), Task(type="fine")])
    answer(queue.repository)
    assert caught.value.in_doubt
    assert caught.value.task_id in ids(queue)


@pytest.mark.every_store
def test_each_submit_of_a_doubtful_commit_names_its_own_task(queue):
    queue.executor("fine")(lambda: "fine")
    hold = Hold(queue.repository)
    first = run_in_thread(lambda: queue.submit("fine"))
    assert hold.reached.wait(PATIENCE)
    names = ["a", "b", "c"]
    submits = [run_in_thread(lambda name=name: queue.submit("fine", id=name)) for name in names]
    eventually(lambda: len(parts_of(queue).moves._waiting) == 3)
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
def test_a_refused_submit_is_not_in_doubt(queue):
    queue.executor("fine")(lambda: "fine")
    queue.repository.down = True
    with pytest.raises(RepositoryUnavailable) as caught:
        queue.submit("fine")
    assert not caught.value.in_doubt
    assert caught.value.task_id == ""


# Outages


def test_an_outage_fails_waiting_writes_and_keeps_deferred_ones(ledger, repository):
    told = Told()
    ledger.later([insert("a")], told)
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


class Lock:
    """Another transaction's lock on some tasks, until ``open`` is called."""

    def __init__(self, repository, *task_ids, patience=PATIENCE):
        self.tried, self._ids, self._patience = 0, set(task_ids), patience
        repository.before = self._before

    def _before(self, writes):
        if self._ids.intersection(write.id for write in writes):
            self.tried += 1
            raise Locked("a lock is kept", self._patience)

    def open(self):
        self._ids = set()


def test_a_locked_write_is_tried_again_and_others_pass(ledger, repository):
    lock = Lock(repository, "locked")
    waits = run_in_thread(lambda: ledger.commit([insert("locked")]))
    whole = run_in_thread(lambda: ledger.commit([insert("also"), insert("locked")], whole=True))
    eventually(lambda: lock.tried > 3)
    assert ledger.commit([insert("other")]) == [True]
    lock.open()
    assert (waits(), whole()) in (([True], [True, False]), ([False], [True, True]))


def test_locked_outcomes_are_put_off_and_others_are_stored(ledger, repository):
    lock, late, told = Lock(repository, "locked"), Told(), Told()
    ledger.later([insert("locked")], late)
    ledger.later([insert("other")], told)
    with pytest.raises(Locked):
        ledger.flush()
    assert (late, told) == ([], [[True]])
    assert ledger.commit([insert("third")]) == [True]
    assert ledger.unsettled  # something is left to do
    lock.open()
    assert ledger.flush(patient=True)
    assert late == [[True]]
    assert not ledger.unsettled


def test_the_patience_with_a_lock_is_limited(ledger, repository):
    Lock(repository, "locked", patience=0.01)
    with pytest.raises(Locked):
        ledger.commit([insert("locked")])
    assert not ledger._waiting


def test_a_batch_is_left_after_some_locked_writes(ledger, repository):
    """Perhaps the whole table is locked, and each of them takes its time."""
    lock = Lock(repository, *map(str, range(50)))
    told = Told()
    for n in range(50):
        ledger.later([insert(str(n))], told)
    assert not ledger.flush(wait=False)
    assert lock.tried < 10
    lock.open()
    assert eventually(lambda: ledger.flush(wait=False))
    assert not ledger.unsettled
    assert told == [[True]] * 50


def test_a_write_refused_behind_many_others_is_never_stored(ledger, repository):
    """A commit behind more than one batch was reported as failed, so it must not happen later."""
    told = Told()
    for n in range(600):
        ledger.later([insert(f"t{n}")], told)
    repository.down = True
    with pytest.raises(RepositoryUnavailable):
        ledger.commit([insert("refused")])
    repository.down = False
    while ledger.unsettled:
        ledger.flush()
    assert told == [[True]] * 600
    assert repository.get_many(["refused"]) == {}


def test_an_outage_between_batches_loses_no_callback(ledger, repository):
    told = Told()
    for n in range(600):
        ledger.later([insert(f"t{n}")], told)
    repository.after = lambda writes: setattr(repository, "down", True)
    with pytest.raises(RepositoryUnavailable):
        ledger.commit([insert("refused")])
    assert 0 < len(told) < 600
    repository.after, repository.down = lambda writes: None, False
    while ledger.unsettled:
        ledger.flush()
    assert told == [[True]] * 600


@pytest.mark.every_store
@pytest.mark.usefixtures("calm")
def test_outcomes_are_stored_after_an_outage(queue, gate):
    """During the outage submits fail in a limited time, and outcomes wait."""
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
    assert time.monotonic() - began < SOON
    eventually(lambda: parts_of(queue).moves.unsettled)
    threading.Event().wait(0.3)
    queue.repository.down = False
    assert [h.result(PATIENCE) for h in handles] == [0, 1]
    assert waiting.result(PATIENCE) == "fine"
    assert {h.task().starts for h in handles} == {1}
    assert queue.submit("fine").result(PATIENCE) == "fine"
    assert queue.repository.get_many(["refused"]) == {}
    assert pool_of(queue).workers_left == 2


@pytest.mark.slow
def test_a_long_outage_is_logged_less_and_less_often(make_queue, gate, monkeypatch, caplog):
    """This does not depend on the number of workers. They also pause before they try again."""
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


def test_an_outage_its_end_and_a_new_one_are_logged(caplog):
    caplog.set_level(logging.INFO, "taskx")
    complaint = Complaint(logging.getLogger("taskx"), "it works again")
    for failures in (5, 2):
        for number in range(1, failures + 1):
            complaint.make("failure: %s", ValueError(number))
        complaint.over()
        complaint.over()
    assert [record.getMessage() for record in caplog.records] == [
        *("failure: 1", "failure: 2", "failure: 4", "it works again, after 5 failures in a row"),
        *("failure: 1", "failure: 2", "it works again, after 2 failures in a row"),
    ]


@pytest.mark.every_store
def test_a_stop_during_an_outage_ends(queue, gate):
    queue.executor("hold")(lambda: gate())
    queue.start()
    handle = queue.submit("hold")
    gate.wait_for(1)
    queue.repository.down = True
    gate.open()
    began = time.monotonic()
    still = queue.stop(timeout=0.2)
    assert time.monotonic() - began < SOON
    assert still == [handle.id]
    queue.repository.down = False
    eventually(lambda: handle.task().status is TaskStatus.COMPLETED)


# Starting ahead


#: Makes every task count as short, however slow the machine is, except the first ones.
all_short = pytest.mark.timing(short_task=float("inf"))


@pytest.fixture
def short(make_queue, calm):
    """A queue that is not started, with one worker and 300 tasks that take no time."""
    queue = make_queue(worker_num=1, buffer_size=1000)
    queue.ran = []
    queue.executor("n")(lambda n: queue.ran.append(n))
    queue.handles = [queue.submit("n", {"n": n}) for n in range(300)]
    return queue


def starts(queue):
    """Return the number of tasks started in each transaction that started any."""
    counts = [
        sum(not isinstance(w, Insert) and w.changes.get("status") == "running" for w in batch)
        for batch in queue.repository.batches
    ]
    return [count for count in counts if count]


@pytest.mark.every_store
@all_short
def test_short_tasks_are_started_in_batches(short):
    short.start()
    assert short.drain(PATIENCE)
    assert sorted(short.ran) == list(range(300))
    assert starts(short)[0] == 1
    assert sum(starts(short)) == 300
    assert 2 <= max(starts(short)) <= DEFAULT_TIMING.most_ahead
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
def test_tasks_with_max_crashes_1_are_started_one_by_one(make_queue, declared):
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
@all_short
@pytest.mark.usefixtures("calm")
def test_a_task_whose_start_frees_its_key_is_not_started_ahead(make_queue):
    queue = make_queue(worker_num=1, buffer_size=1000)
    ahead = []

    @queue.executor("n")
    def n():
        ahead.extend(run.task.unique_key for run in pool_of(queue).ahead.runs)

    for number in range(300):
        queue.submit("n", unique_key=f"k{number}", unique_scope="pending")
    queue.start()
    assert queue.drain(PATIENCE)
    assert ahead == []
    assert set(starts(queue)) == {1}


@pytest.mark.parametrize("alone", [{"max_crashes": 1}, {"unique_scope": "pending"}])
def test_tasks_that_start_alone_are_not_read_for_each_start(make_queue, alone):
    queue = make_queue(worker_num=1)
    read = []
    queue.executor("n")(lambda: None)
    for number in range(40):
        key = f"k{number}" if "unique_scope" in alone else None
        queue.submit("n", unique_key=key, **alone)
    node = joined_node(queue)
    pool, get_many = node.pool, node.pool.moves.repository.get_many
    node.pool.moves.repository.get_many = lambda ids: read.append(len(ids)) or get_many(ids)
    while items := pool.buffer.take(32):
        pool.starter.start(items, "worker")
        pool.buffer.started()
    assert len(read) == 40
    assert sum(read) < 3 * 40
    node.withdraw()


@pytest.mark.every_store
@all_short
@pytest.mark.usefixtures("calm")
def test_a_task_started_ahead_and_cancelled_never_runs(make_queue):
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
@all_short
def test_a_task_started_ahead_is_handed_back_if_no_worker_is_free(make_queue, gate, calm, clock):
    """It gets its old place in the order back, even among tasks created at the same time."""
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
    eventually(lambda: all(pool_of(queue).buffer.holds(task_id) for task_id in hung))
    assert queue.repository.statuses(hung) == dict.fromkeys(hung, "pending")
    gate.open()
    assert queue.drain(PATIENCE)
    assert ran == list(range(300))
    for task in tasks:
        done = queue.get_task_status(task.id)
        assert (done.starts, done.errors, done.interruptions, len(done.attempts)) == (2, 0, 0, 1)


@pytest.mark.every_store
@all_short
@pytest.mark.usefixtures("calm")
def test_a_stop_hands_back_tasks_that_were_started_ahead(make_queue):
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


def test_an_outage_during_a_fetch_loses_no_started_task():
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
