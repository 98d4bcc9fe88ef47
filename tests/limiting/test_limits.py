"""Limits of a type: max_concurrency and rates of one node, and no other task is held up."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from helpers import (
    PATIENCE,
    eventually,
    frequent_checks,
    housekeeper_of,
    node_of,
    parts_of,
    pool_of,
    whole_round,
)
from storage.repositories import TinyRepository
from strikes import strike_at

from taskx import (
    Config,
    ConfigurationError,
    MemoryRepository,
    Queue,
    Retry,
    Snooze,
    Task,
    TaskStatus,
    executor,
)
from taskx.node.admission import Admission, Asking
from taskx.tasks.rate import Limit, rates_of
from taskx.testing import ManualQueue

#: The limits of the type "t".
OF_T = ("type/t",)


class Crowd:
    """Counts the calls that run at the same time."""

    def __init__(self, gate=None) -> None:
        self.now = self.most = self.total = 0
        self._lock = threading.Lock()
        self._gate = gate or (lambda: None)

    def __call__(self, n=0):
        with self._lock:
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)
        self._gate()
        with self._lock:
            self.now -= 1


@pytest.fixture
def admits(clock):
    """Return a function that makes the admission of a type ``t``, and the list of the fetches it plans.

    No node uses it: the fetch and the starts are those that a test plays.
    """

    def make(rate=None, burst=None, max_concurrency=None):
        planned = []
        limits = {"type/t": Limit(max_concurrency, rates_of(rate, burst), "node")}
        plan = lambda: planned.append(made.next_fetch())  # noqa: E731
        about = (limits, {"t": OF_T}, MemoryRepository(), "node", clock)
        made = Admission(*about, freed=lambda: None, scheduled=plan)
        return made, planned

    return make


def linger():
    """Give other threads time to come in at the same time, if they may."""
    time.sleep(0.0005)  # blocks on purpose


# Slots


def test_a_token_that_comes_while_the_buffer_is_full_is_used_later(make_queue, clock, monkeypatch):
    queue = make_queue(clock=clock)
    queue.executor("t", rate="1/s", burst=1)(lambda: None)
    queue.start()
    handles = [queue.submit("t") for _ in range(2)]
    assert handles[0].result(PATIENCE) is None
    pool = pool_of(queue)
    whole_round(queue)
    eventually(pool.holds_nothing)  # the second one is in the store, and with no worker
    eventually(pool.admission.next_fetch)
    with (
        pool.fetcher._refilling
    ):  # no fetch has begun before the buffer is full, and looks after that
        monkeypatch.setattr(pool.buffer, "room_to_fetch", lambda: 0)
        pool.agenda.expect_more()
        clock.advance(2)
    pool.agenda.wake_from_long_sleep()
    eventually(lambda: pool.admission.next_fetch() is None)
    monkeypatch.undo()
    pool.agenda.wake_from_long_sleep()
    assert handles[1].result(PATIENCE) is None


def test_at_most_max_concurrency_tasks_run_at_once(make_queue, gate):
    queue = make_queue(worker_num=8)
    crowd = Crowd(gate)
    queue.executor("t", max_concurrency=3)(crowd)
    queue.start()
    for _ in range(20):
        queue.submit("t")
    gate.wait_for(3)
    assert queue.running == 3
    gate.open()
    assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (20, 3)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_many_short_tasks_stay_within_max_concurrency(make_queue, most):
    """They are started ahead, many in one transaction."""
    queue = make_queue(worker_num=8)
    crowd, other = Crowd(linger), Crowd()
    queue.executor("t", max_concurrency=most)(crowd)
    queue.executor("other")(other)
    queue.start()
    for n in range(150):
        queue.submit("t", {"n": n})
        queue.submit("other") if n % 2 else None
    assert queue.drain(PATIENCE)
    assert (crowd.total, other.total) == (150, 75)
    assert crowd.most <= most


@pytest.mark.timing(audit_every=3600)
def test_the_limit_holds_even_if_too_many_tasks_were_fetched(make_queue, gate, monkeypatch):
    """An estimate was wrong for a moment. The extra tasks go back."""
    monkeypatch.setattr(Admission, "room", lambda self, type, held: (10, 0))
    queue = make_queue(worker_num=8)
    crowd = Crowd(lambda: (gate(), linger()))
    queue.executor("t", max_concurrency=2)(crowd)
    for _ in range(40):
        queue.submit("t")
    queue.start()
    gate.wait_for(2)
    gate.open()
    assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (40, 2)


def test_other_types_do_not_wait_behind_a_limited_type(make_queue, gate):
    """Many tasks of that type came first, with a higher priority, and one of two workers is free."""
    queue = make_queue(worker_num=2, buffer_size=5)
    queue.executor("slow", max_concurrency=1, priority=9)(lambda: gate())
    queue.executor("fast")(lambda: "fast")
    queue.start()
    for _ in range(300):  # the buffer has room for five
        queue.submit("slow")
    gate.wait_for(1)
    for _ in range(10):
        assert queue.submit("fast").result(PATIENCE) == "fast"
    # For a moment it may have had one more: it was fetched just before the first one was counted.
    eventually(lambda: queue.buffered == 0)
    queue.pause("slow")
    gate.open()


@pytest.mark.parametrize("overflow", ["reject", "block", "spill", "caller_runs"])
def test_a_full_buffer_does_not_affect_limited_types(busy, gate, overflow):
    """A task with a limit waits in the repository in any case."""
    queue = busy(buffer_size=1, overflow=overflow)
    ran = []
    queue.executor("t", max_concurrency=1)(lambda n: ran.append(n))
    queue.submit("note")
    for n in range(5):
        queue.submit("t", {"n": n})
    assert ran == []
    gate.open()
    assert queue.drain(PATIENCE)
    assert ran == [0, 1, 2, 3, 4]


def test_limited_tasks_run_in_order_and_by_priority(make_queue, gate):
    queue = make_queue(worker_num=1)
    ran = []
    queue.executor("t", max_concurrency=2)(lambda n: ran.append(n))
    queue.executor("other")(lambda n: ran.append(n))
    queue.submit_many(
        [
            *(Task(type="t", params={"n": n}, priority=1) for n in range(4)),
            Task(type="other", params={"n": "high"}, priority=2),
            Task(type="other", params={"n": "low"}),
        ]
    )
    queue.start()
    assert queue.drain(PATIENCE)
    assert ran[0] == "high"
    assert [n for n in ran if isinstance(n, int)] == [0, 1, 2, 3]


def test_submit_many_takes_limited_and_other_types_together(make_queue, gate):
    queue = make_queue(worker_num=3, buffer_size=2)
    crowd = Crowd(gate)
    queue.executor("t", max_concurrency=1)(crowd)
    queue.executor("other")(lambda: None)
    queue.start()
    queue.submit_many(Task(type=type) for type in ["t"] * 5 + ["other"] * 2)
    gate.wait_for(1)
    gate.open()
    assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (5, 1)


@pytest.mark.every_store
@pytest.mark.timing(recover_every=3600, audit_every=3600)
@pytest.mark.parametrize("together", [True, False])
def test_a_task_that_may_start_is_fetched_at_once(make_queue, repository, monkeypatch, together):
    """It does not wait for the next audit, or for another change in the repository."""
    queue = make_queue(worker_num=1)
    queue.executor("t", max_concurrency=1)(lambda: "done")
    queue.start()
    whole_round(queue)  # its first round
    monkeypatch.setattr(repository, "version", lambda: 0)
    eventually(lambda: not pool_of(queue).agenda.more_stored)
    tasks = [Task(type="t"), Task(type="t")]
    handles = queue.submit_many(tasks) if together else [queue.submit(task) for task in tasks]
    for handle in handles:
        assert handle.result(PATIENCE) == "done"


@frequent_checks
def test_each_node_has_its_own_limit(make_queue, gate):
    queues = [make_queue(worker_num=4) for _ in range(2)]
    crowd = Crowd(gate)
    for queue in queues:
        queue.executor("t", max_concurrency=2)(crowd)
        queue.start()
    for _ in range(10):
        queues[0].submit("t")
    gate.wait_for(4)
    assert [queue.running for queue in queues] == [2, 2]
    gate.open()
    assert queues[0].drain(PATIENCE)
    assert crowd.most == 4


def test_an_idle_node_keeps_its_limit_when_it_helps_a_busy_one(busy, make_queue, repository, gate):
    """The busy node has no limit; the idle one does not start more of its tasks than its own limit."""
    queue = busy()
    for n in range(10):
        queue.submit("note", {"n": n})
    helper = make_queue(worker_num=4)
    crowd = Crowd(linger)
    helper.executor("note", max_concurrency=1)(crowd)
    helper.start()
    eventually(lambda: crowd.total == 10)
    assert crowd.most == 1


@pytest.mark.every_store
def test_an_idle_node_leaves_tasks_beyond_its_limit_to_the_busy_one(
    busy, make_queue, repository, gate
):
    queue = busy()
    for n in range(10):
        queue.submit("note", {"n": n})
    helper = make_queue(worker_num=4)
    helper.executor("note", max_concurrency=1)(lambda n: gate())
    helper.start()
    gate.wait_for(1)
    helper.executor("other")(lambda: None)
    helper.submit("other").result(PATIENCE)  # its worker has tried once more to find tasks
    # For a moment the helper may have had one more: it was fetched just before the first one was counted.
    eventually(lambda: len(repository.ready(["note"], 20, node_of(queue).record.id)) == 9)


@frequent_checks
def test_the_highest_priorities_are_fetched_if_not_all_tasks_fit(busy):
    queue = busy()
    queue.executor("t", max_concurrency=5)(lambda: None)
    queue.repository.create(Task(id="low", type="note"))
    queue.repository.create(Task(id="high", type="t", priority=1))
    queue.repository.create(Task(id="higher", type="note", priority=2))
    pool = pool_of(queue)
    eventually(lambda: all(i in pool.buffer for i in ("low", "high", "higher")))
    with pool.fetcher._refilling:  # so that no other thread fetches them
        pool.starter.free([item.id for item in pool.buffer.sweep(lambda type: True)])
        assert [stub.id for stub in pool.fetcher._offered(2)] == ["higher", "high"]


# Freeing slots


@pytest.mark.parametrize("how", ["raises", "retries", "retries later", "is cancelled", "snoozes"])
def test_however_a_task_ends_the_next_one_starts(make_queue, clock, how):
    queue = make_queue(worker_num=3, clock=clock)
    crowd = Crowd(linger)

    @queue.executor("t", max_concurrency=1, max_attempts=2)
    def t(ctx, n):
        crowd()
        if n or ctx.task.starts > 1:
            return
        if how == "is cancelled":
            ctx.sleep(PATIENCE)
        elif how == "retries":
            raise ValueError("at once")
        elif how == "retries later":
            raise Retry(delay=60)
        elif how == "snoozes":
            raise Snooze(60)
        else:
            raise SystemExit("broken")

    queue.start()
    first, second = (queue.submit("t", {"n": n}) for n in (0, 1))
    if how == "is cancelled":
        eventually(lambda: queue.running == 1)
        first.cancel()
    second.result(PATIENCE)
    # In rare cases the second one comes first: then the first one may have to wait from a later time on.
    eventually(lambda: clock.advance(61) or first.task().status.finished)
    assert queue.drain(PATIENCE)
    assert crowd.most == 1


@frequent_checks
@pytest.mark.parametrize("remove", ["cancel_task", "delete"])
def test_a_fetched_task_that_never_starts_frees_its_slot(busy, gate, remove):
    queue = busy()
    ran = []
    queue.executor("t", max_concurrency=1)(lambda n: ran.append(n))
    queue.submit("t", {"n": 0}, id="first")
    eventually(lambda: "first" in pool_of(queue).buffer)
    queue.submit("t", {"n": 1})
    getattr(queue, remove)("first")
    gate.open()
    assert queue.drain(PATIENCE)
    assert ran == [1]


@pytest.mark.timing(audit_every=3600)  # an audit would find a running task without a thread
def test_a_task_that_another_node_started_frees_its_slot(busy, gate, repository):
    """It was fetched here, and turns out to be gone."""
    queue = busy()
    ran = []
    queue.executor("t", max_concurrency=1, rate=(1, 3600.0))(lambda n: ran.append(n))
    queue.submit("t", {"n": 0}, id="first")
    eventually(lambda: "first" in pool_of(queue).buffer)
    queue.submit("t", {"n": 1})
    repository.update_status("first", TaskStatus.RUNNING)
    gate.open()
    eventually(lambda: ran == [1])


def test_a_failing_repository_leaves_no_slot_taken(make_queue, repository):
    """It fails when the start is written."""
    queue = make_queue(worker_num=2)
    crowd = Crowd()
    queue.executor("t", max_concurrency=1)(crowd)
    failed = []

    def fail(writes):
        if len(failed) < 3 and any(
            getattr(w, "changes", {}).get("status") == "running" for w in writes
        ):
            failed.append(True)
            raise OSError("as if the disk were gone")

    repository.before = fail
    queue.start()
    for _ in range(5):
        queue.submit("t")
    assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most, len(failed)) == (5, 1, 3)


def test_a_task_that_is_handed_back_frees_its_slot(admits):
    """For example, a task that was started ahead and found no free worker."""
    admission, _ = admits(max_concurrency=1)
    assert admission.admit({OF_T: [Asking("x"), Asking("y")]}) == {"x"}
    assert not admission.open("t")
    admission.over("x", ran=False)
    assert admission.open("t")


def test_no_task_of_a_paused_limited_type_starts_before_it_is_resumed(make_queue):
    queue = make_queue(worker_num=2)
    crowd = Crowd()
    queue.executor("t", max_concurrency=1)(crowd)
    queue.start()
    queue.pause("t")
    for _ in range(5):
        queue.submit("t")
    assert queue.drain(PATIENCE)
    assert crowd.total == 0
    queue.resume("t")
    assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (5, 1)


@pytest.mark.every_store
def test_tasks_of_a_concurrency_key_stay_in_order_under_a_limit(make_queue):
    queue = make_queue(worker_num=4)
    ran = []
    queue.executor("t", max_concurrency=2)(lambda n: ran.append(n))
    queue.start()
    for n in range(20):
        queue.submit("t", {"n": n}, concurrency_key=f"k{n % 2}")
    assert queue.drain(PATIENCE)
    assert [n for n in ran if n % 2] == list(range(1, 20, 2))
    assert [n for n in ran if not n % 2] == list(range(0, 20, 2))


# Rates


def started_by(queue, count, *others):
    """Wait until ``count`` tasks have run and two full fetches found no more; return how many have run."""
    eventually(lambda: len(queue.ran) >= count)
    for one in (queue, *others) * 2:
        parts_of(one).agenda.fetch_soon()
        whole_round(one)
        eventually(pool_of(one).holds_nothing)
    return len(queue.ran)


@pytest.fixture
def rated(make_queue, clock):
    """Return a function that makes a started queue with an executor ``t`` of a given rate."""

    def make(**options):
        queue = make_queue(worker_num=3, clock=clock)
        queue.ran = []
        queue.executor("t", **options)(lambda: queue.ran.append(clock.monotonic()))
        queue.executor("other")(lambda: "other")
        queue.start()
        return queue

    return make


def test_a_rate_allows_a_burst_and_then_one_task_at_a_time(rated, clock):
    queue = rated(rate="60/m", burst=4)
    for _ in range(10):
        queue.submit("t")
    assert started_by(queue, 4) == 4
    assert queue.submit("other").result(PATIENCE) == "other"
    clock.advance(0.9)
    assert started_by(queue, 4) == 4
    clock.advance(0.1)
    assert started_by(queue, 5) == 5
    clock.advance(2.5)
    assert started_by(queue, 7) == 7
    clock.advance(3600)
    assert started_by(queue, 10) == 10
    clock.advance(3600)
    for _ in range(6):
        queue.submit("t")
    assert started_by(queue, 14) == 14  # a pause fills the bucket, and no more


def test_the_default_burst_is_the_count_of_the_rate(rated):
    queue = rated(rate=(3, 3600.0))
    for _ in range(10):
        queue.submit("t")
    assert started_by(queue, 3) == 3


def test_limited_tasks_start_as_time_passes_and_nothing_else_happens(rated, clock):
    """No submit, no end of a task and no other process wakes a thread."""
    queue = rated(rate="1/s")
    for _ in range(5):
        queue.submit("t")
    for n in range(1, 6):
        assert started_by(queue, n) == n
        clock.advance(1)
    assert queue.drain(PATIENCE)


def test_each_attempt_takes_a_token(make_queue, clock):
    queue = make_queue(worker_num=1, clock=clock)
    attempts = []

    @queue.executor("t", rate="2/m", max_attempts=5)
    def t(ctx):
        attempts.append(ctx.task.attempt)
        raise ValueError("broken")

    queue.start()
    handle = queue.submit("t")
    eventually(lambda: len(attempts) == 2)
    for n in (3, 4, 5):
        eventually(lambda n=n: pool_of(queue).admission.next_fetch() is not None)
        assert len(attempts) == n - 1
        clock.advance(30)
        eventually(lambda n=n: len(attempts) == n)
    eventually(lambda: handle.task().status is TaskStatus.FAILED)


@pytest.mark.timing(poll_every=10.0)
def test_a_fast_rate_is_kept_in_real_time(make_queue):
    """The housekeeper wakes for each token: at its own polling interval this would take minutes."""
    queue = make_queue(worker_num=2)
    queue.executor("t", rate=(100, 1.0), burst=1)(lambda: None)
    for _ in range(60):
        queue.submit("t")
    began = time.monotonic()
    queue.start()
    assert queue.drain(PATIENCE)
    assert time.monotonic() - began >= 0.58


@pytest.mark.timing(poll_every=60.0)
def test_each_token_starts_a_task_even_if_none_ends(make_queue, gate):
    """A start waits neither for a long run to end nor for the housekeeper's polling interval."""
    queue = make_queue(worker_num=5)
    queue.executor("t", rate=(50, 1.0), burst=1)(lambda: gate())
    for _ in range(5):
        queue.submit("t")
    queue.start()
    gate.wait_for(5)


@pytest.mark.timing(poll_every=600.0)
def test_a_slot_freed_during_a_housekeeping_round_is_noticed(make_queue, monkeypatch):
    """The housekeeper does not go to sleep for long after that round."""
    queue = make_queue()
    queue.start()
    pool, sleeper = pool_of(queue), housekeeper_of(queue)
    told = threading.Event()

    def tell():
        if not told.is_set():
            pool.agenda.fetch_soon()
            told.set()

    whole_round(queue)
    eventually(lambda: pool.agenda._asleep_long)
    monkeypatch.setattr(sleeper._retention, "tick", tell)
    pool.agenda.wake()
    assert told.wait(PATIENCE)
    eventually(lambda: not pool.agenda.more_stored)


def test_a_token_that_came_during_a_fetch_is_used_at_once(admits, clock):
    """It may come while tasks are fetched, or while a task that waits for a token is started."""
    admission, told = admits("60/m", 2)
    assert admission.admit({OF_T: [Asking("w"), Asking("x")]}) == {"w", "x"}
    clock.advance(1)
    assert admission.is_time()
    assert admission.room(OF_T, ()) == (1, 0)
    clock.advance(1)
    admission.fetch_done({OF_T: 1}, {OF_T: 1})
    assert told[1:] == [clock.monotonic()]
    assert admission.is_time()
    admission.fetched("t", "y")
    admission.fetched("t", "z")
    assert admission.room(OF_T, ("y", "z")) == (0, 2)
    clock.advance(1)  # no more than two tokens
    assert admission.admit({OF_T: [Asking("y")]}) == {"y"}
    assert told[2:] == [clock.monotonic() + 1]
    clock.advance(1)
    assert admission.admit({OF_T: [Asking("z")]}) == {"z"}
    assert told[3:] == [clock.monotonic()]


def test_no_fetch_is_planned_when_no_more_tasks_are_stored(admits):
    """At least not at every start: a submit of more tasks reports them."""
    admission, told = admits("60/m", 9)
    assert admission.room(OF_T, ()) == (9, 0)
    admission.fetch_done({OF_T: 9}, {OF_T: 5})
    assert admission.admit({OF_T: [Asking("x")]}) == {"x"}
    assert (told, admission.next_fetch()) == ([], None)


def test_the_housekeeper_is_told_when_a_task_waits_for_a_token(admits, clock):
    """The start that takes the last token tells it, and a fetch after which there may be more tasks."""
    admission, told = admits("60/m", 2)
    assert admission.admit({OF_T: [Asking("x"), Asking("y")]}) == {"x", "y"}
    assert told == [clock.monotonic() + 1]
    clock.advance(1)
    assert admission.is_time()
    assert (admission.is_time(), admission.next_fetch()) == (False, None)
    assert admission.room(OF_T, ()) == (1, 0)
    admission.fetch_done({OF_T: 1}, {OF_T: 0})  # nothing waits for it
    assert (len(told), admission.next_fetch()) == (1, None)
    admission.fetch_done({OF_T: 1}, {OF_T: 1})
    assert told[1:] == [clock.monotonic() + 1]


def test_a_task_that_never_ran_gives_its_token_back(admits):
    admission, _ = admits("1/h")
    assert admission.admit({OF_T: [Asking("x"), Asking("y")]}) == {"x"}
    assert admission.admit({OF_T: [Asking("y")]}) == set()
    admission.over("x", ran=False)
    admission.over("x", ran=False)  # told twice, it counts once
    assert admission.admit({OF_T: [Asking("y")]}) == {"y"}
    admission.over("y", ran=True)
    assert admission.admit({OF_T: [Asking("z")]}) == set()


def test_a_slot_without_a_token_is_given_back(admits, clock):
    """Two tasks are about to start, and one of them gets no token."""
    admission, _ = admits("1/h", max_concurrency=2)
    assert admission.admit({OF_T: [Asking("x"), Asking("y")]}) == {"x"}
    clock.advance(3600)
    assert admission.admit({OF_T: [Asking("y")]}) == {"y"}
    clock.advance(3600)
    assert admission.admit({OF_T: [Asking("z")]}) == set()
    admission.over("x", ran=True)
    assert admission.admit({OF_T: [Asking("z")]}) == {"z"}


def test_tasks_that_cannot_start_are_not_fetched(busy, gate):
    """This holds for any number of refills."""
    queue = busy()
    queue.executor("t", max_concurrency=2)(lambda: None)
    for _ in range(10):
        queue.submit("t")
    pool = pool_of(queue)
    eventually(lambda: len(pool.buffer) == 2)
    for _ in range(5):
        pool.agenda.expect_more()
        pool.fetcher.refill()
        assert len(pool.buffer) == 2
    gate.open()
    assert queue.drain(PATIENCE)


def test_a_rate_and_max_concurrency_hold_together(make_queue, clock, gate):
    queue = make_queue(worker_num=8, clock=clock)
    crowd = Crowd(gate)
    queue.executor("t", rate="5/m", max_concurrency=2)(crowd)
    queue.start()
    for _ in range(10):
        queue.submit("t")
    gate.wait_for(2)
    assert crowd.most == 2
    gate.open()
    eventually(lambda: crowd.total == 5)
    clock.advance(60)
    assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (10, 2)


# Types without limits


def test_a_type_without_a_limit_pays_nothing(started, monkeypatch):
    """No admission method is called for it: neither without limits nor if another type has one."""
    asked = []
    for name in ("admit", "room", "fetch_done", "fetched", "open"):
        method = getattr(Admission, name)

        def noting(self, about, *more, method=method):
            asked.extend([about] if isinstance(about, str) else about)
            return method(self, about, *more)

        monkeypatch.setattr(Admission, name, noting)
    for _ in range(5):
        started.submit("fine").result(PATIENCE)
    assert not asked
    started.executor("limited", max_concurrency=1)(lambda: None)
    for type in ("fine", "limited") * 5:
        started.submit(type).result(PATIENCE)
    assert {*asked} <= {"limited", "type/limited", ("type/limited",)}


# Options


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 1.5}, "max_concurrency"),
        ({"max_concurrency": True}, "max_concurrency"),
        ({"rate": "fast"}, "rate"),
        ({"rate": "1/s", "burst": 0}, "burst"),
        ({"burst": 2}, "burst"),
        ({"max_concurrency": 1, "burst": 2}, "burst"),
        ({"limit_scope": "global"}, "limit_scope"),
        ({"max_concurrency": 1, "limit_scope": "host"}, "limit_scope"),
    ],
)
def test_invalid_limits_are_refused(queue, options, about):
    with pytest.raises(ConfigurationError, match=about):
        queue.executor("t", **options)(lambda: None)
    queue.executor("t")(lambda: None)  # the refused call left nothing behind


def test_options_at_registration_override_those_of_the_executor(queue):
    @executor("t", rate="1/s", max_concurrency=5)
    def t():
        pass

    queue.register_executor(t, max_concurrency=2, burst=7, limit_scope="global")
    limit = queue._registry.limits["type/t"]
    assert (limit.max_concurrency, limit.rates[0].burst, limit.scope) == (2, 7, "global")


def test_a_repository_of_eight_methods_keeps_limits_of_a_node():
    crowd = Crowd(linger)
    with Queue(TinyRepository(), Config(worker_num=4)) as queue:
        queue.executor("t", max_concurrency=2)(crowd)
        for _ in range(30):
            queue.submit("t")
        assert queue.drain(PATIENCE)
    assert crowd.total == 30
    assert crowd.most <= 2


@pytest.mark.parametrize("options", [{"max_concurrency": 1}, {"rate": "1/s"}])
def test_a_repository_of_eight_methods_refuses_global_limits(options):
    queue = Queue(TinyRepository())
    with pytest.raises(ConfigurationError, match="limit_scope"):
        queue.executor("t", limit_scope="global", **options)(lambda: None)
    queue.executor("t", **options)(lambda: None)


# Interrupts


def test_an_interrupted_admission_is_forgotten():
    """So the next task of a test may start, although the limit lets a single one start."""
    for point in itertools.count():
        queue = ManualQueue()
        queue.executor("t", max_concurrency=1)(lambda: None)
        queue.submit("t")
        queue.run_all()
        admission = pool_of(queue).admission
        ask = lambda: admission.admit({OF_T: [Asking("x")]})  # noqa: B023, E731  (called at once)
        if strike_at(point, ask) is None:
            break
        admission.keep_only(())
        assert not admission.admitted
        assert admission.open("t")
    assert point > 10
