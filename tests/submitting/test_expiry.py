"""Expiry: a task that has not started for the first time by its ``expires_at`` is cancelled."""

from __future__ import annotations

import math
from concurrent.futures import CancelledError, wait
from datetime import datetime, timedelta, timezone
from functools import partial

import pytest
from helpers import PATIENCE, eventually, parts_of, pool_of, undisturbed, whole_round
from storage.repositories import thirteen_fields_only

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Hook,
    RepositoryError,
    Retry,
    RetryPolicy,
    Snooze,
    Task,
    TaskFilter,
    TaskStatus,
    chain,
    every,
)
from taskx.node.due import expire
from taskx.tasks import lifecycle
from taskx.tasks.writes import Insert
from taskx.testing import ManualQueue

SECOND = timedelta(seconds=1)


#: The housekeeper looks for expired tasks in every round.
often = pytest.mark.timing(recover_every=0, audit_every=0.05, handles_every=0.05)
#: The housekeeper looks for expired tasks only when the queue starts.
seldom = pytest.mark.timing(recover_every=3600)


def ends_as(task):
    """Return everything that shows how a task ended."""
    return task.status.value, task.error, task.expires_at, task.starts


EXPIRED = "expired at 2024-01-01T00:01:00Z before its first start"


# Tasks that nothing starts


@often
@pytest.mark.every_store
@pytest.mark.parametrize("reason", ["no executor", "pause", "time", "parent", "turn", "rate"])
def test_a_task_expires_whatever_it_waits_for(make_queue, gate, clock, reason):
    queue = make_queue(worker_num=2, clock=clock)
    queue.executor("fine", **({"rate": "1/d"} if reason == "rate" else {}))(lambda: "fine")
    queue.executor("hold")(gate)
    queue.declare("remote")
    queue.start()
    if reason == "pause":
        queue.pause("fine")
    if reason == "rate":
        queue.submit("fine").result(PATIENCE)
    if reason in ("parent", "turn"):
        parent = queue.submit("hold", concurrency_key="k")
        gate.wait_for()
    options = {
        "time": lambda: {"run_at": clock.now() + 59 * SECOND},
        "parent": lambda: {"depends_on": [parent]},
        "turn": lambda: {"concurrency_key": "k"},
    }.get(reason, dict)()
    moment = clock.now() + 60 * SECOND
    if reason == "time":
        queue.pause("fine")
    handle = queue.submit(
        "remote" if reason == "no executor" else "fine", expires=moment, **options
    )
    clock.advance(59.999)
    whole_round(queue)
    assert (handle.task().status, handle.task().expires_at) == (TaskStatus.PENDING, moment)
    clock.advance(0.001)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    task = handle.task()
    assert ends_as(task) == ("cancelled", EXPIRED, None, 0)
    assert (task.completed_at, task.attempts, task.owner) == (clock.now(), [], "")


def test_a_queue_that_is_not_started_cancels_nothing(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("fine")(lambda: "fine")
    queue.pause("fine")
    handle = queue.submit("fine", expires=60)
    clock.advance(60)
    assert handle.task().status is TaskStatus.PENDING
    queue.start()
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)


@pytest.mark.timing(batch=3)
def test_many_expired_tasks_are_cancelled_in_batches(make_queue, repository, clock):
    queue = make_queue(clock=clock)
    queue.declare("remote")
    handles = queue.submit_many(
        [Task(type="remote", expires_at=clock.now() + n * SECOND) for n in range(1, 12)]
    )
    clock.advance(10)
    queue.start()
    eventually(lambda: [h.task().status.value for h in handles] == ["cancelled"] * 10 + ["pending"])
    sizes = [
        len({write.id for write in batch})
        for batch in repository.batches
        if {write.move for write in batch} == {"expire"}
    ]
    assert sum(sizes) == 10
    assert max(sizes) == 3


@pytest.mark.timing(batch=4)
def test_tasks_that_another_node_cancels_are_left_to_it(make_queue, repository, clock):
    queue = make_queue(clock=clock)
    queue.declare("remote")
    queue.submit_many([Task(type="remote", expires_at=clock.now()) for _ in range(8)])
    expiry = expiry_of(queue)

    def elsewhere(writes):
        repository.before = lambda writes: None
        ids = {write.id for write in writes}
        for task_id in sorted(ids)[:3]:
            repository.apply(lifecycle.cancel(task_id, 0))

    repository.before = elsewhere
    assert not expiry(math.inf)
    assert statuses(queue) == {"cancelled": 4, "pending": 4}
    expiry(math.inf)
    assert statuses(queue) == {"cancelled": 8}


def expiry_of(queue):
    parts = parts_of(queue)
    return partial(expire, parts.moves, parts.timing.batch)


def statuses(queue):
    found = [task.status.value for task in queue.iter_tasks()]
    return {status: found.count(status) for status in sorted(set(found))}


def refuse_expiry(writes):
    if "expire" in [write.move for write in writes]:
        raise RepositoryError("the record is full")


@often
def test_an_expiry_that_cannot_be_stored_holds_up_no_schedule(make_queue, repository, clock):
    queue = make_queue(clock=clock)
    queue.executor("fine")(lambda: "fine")
    queue.declare("remote")
    bad = queue.submit("remote", expires=60)
    repository.before = refuse_expiry
    queue.schedule("ticks", every(60), "fine")
    queue.start()
    clock.advance(60)
    eventually(lambda: statuses(queue) == {"completed": 1, "pending": 1})
    repository.before = lambda writes: None
    assert wait([bad], PATIENCE).done


@pytest.mark.every_store
@pytest.mark.parametrize("on_conflict", ["reject", "return", "replace"])
def test_a_submit_cancels_an_expired_task_that_has_its_key(make_queue, clock, on_conflict):
    queue = make_queue(clock=clock)
    queue.executor("fine")(lambda n: n)
    first = queue.submit("fine", {"n": 1}, unique_key="k", expires=60)
    clock.advance(60)
    second = queue.submit("fine", {"n": 2}, unique_key="k", on_conflict=on_conflict)
    assert ends_as(first.task())[:2] == ("cancelled", EXPIRED)
    queue.start()
    assert second.result(PATIENCE) == 2


# Tasks that a worker comes to too late


@seldom
def test_a_worker_cancels_an_expired_task_instead_of_starting_it(busy, gate, clock):
    queue = busy(clock=clock)
    late = queue.submit("note", {"n": 1}, expires=60)
    fine = queue.submit("note", {"n": 2}, expires=60.001)
    clock.advance(60)
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == [2]
    assert ends_as(late.task()) == ("cancelled", EXPIRED, None, 0)
    assert ends_as(fine.task()) == ("completed", "", None, 1)


@often
def test_an_expiry_that_cannot_be_stored_holds_up_no_worker(busy, repository, gate, clock):
    queue = busy(clock=clock)
    bad = queue.submit("note", {"n": 1}, expires=60)
    fine = queue.submit("note", {"n": 2})
    repository.before = refuse_expiry
    clock.advance(60)
    gate.open()
    fine.result(PATIENCE)
    repository.before = lambda writes: None
    assert wait([bad], PATIENCE).done
    assert (queue.ran, bad.task().error) == ([2], EXPIRED)


@seldom
def test_an_expired_task_uses_up_no_rate(busy, gate, clock):
    queue = busy(clock=clock)
    ran = []
    queue.executor("limited", rate="1/d", max_concurrency=1)(lambda n: ran.append(n))
    queue.submit("limited", {"n": 1}, expires=60)
    clock.advance(60)
    queue.submit("limited", {"n": 2})
    gate.open()
    assert queue.drain(PATIENCE)
    assert ran == [2]


@seldom
def test_an_expired_task_does_not_run_in_its_submitter(busy, repository, clock):
    queue = busy(clock=clock, buffer_size=1, overflow="caller_runs")
    queue.submit("note", {"n": 1})
    repository.after = lambda writes: clock.advance(60)
    late = queue.submit("note", {"n": 2}, expires=60)
    repository.after = lambda writes: None
    assert queue.ran == []
    assert late.task().status is TaskStatus.CANCELLED
    queue.submit("note", {"n": 3}, expires=60)
    assert queue.ran == [3]


@seldom
def test_a_deadline_that_has_passed_already_is_no_error(started, clock):
    handle = started.submit("fine", expires=datetime.now(timezone.utc) - SECOND)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)


# The first start


@undisturbed
def test_a_waiting_worker_starts_the_task_at_once(started, repository):
    whole_round(started)  # the first one checks everything
    eventually(lambda: pool_of(started).idles)
    handle = started.submit("fine", expires=3600)
    assert handle.result(PATIENCE) == "fine"
    [insert] = [w for batch in repository.batches for w in batch if isinstance(w, Insert)]
    assert insert.row["status"] == "running"
    assert ends_as(handle.task()) == ("completed", "", None, 1)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_hook_of_a_submit_sees_the_expiry(make_queue, clock, at_once):
    class Note(Hook):
        def submitted(self, task):
            seen.append((task.status, task.expires_at))

    seen = []
    queue = make_queue(hooks=[Note()], clock=clock)
    queue.executor("fine")(lambda: "fine")
    if at_once:
        queue.start()
        eventually(lambda: pool_of(queue).idles)
    queue.submit("fine", expires=60)
    eventually(lambda: seen == [(TaskStatus.PENDING, clock.now() + 60 * SECOND)])


@often
@pytest.mark.parametrize("how", [Retry(delay=100), Snooze(100), ValueError("wrong")])
def test_a_task_that_has_started_never_expires(make_queue, clock, how):
    queue = make_queue(clock=clock)
    ran = []

    @queue.executor("again", max_attempts=2)
    def again():
        ran.append(clock.now())
        if len(ran) == 1:
            queue.pause()
            raise how

    queue.start()
    handle = queue.submit("again", expires=60)
    eventually(lambda: ran and handle.task().status is TaskStatus.PENDING)
    clock.advance(100)
    whole_round(queue)
    assert (handle.task().status, handle.task().expires_at) == (TaskStatus.PENDING, None)
    queue.resume()
    handle.result(PATIENCE)
    assert len(ran) == 2


@often
@pytest.mark.every_store
def test_a_task_whose_process_died_never_expires(make_queue, repository, clock):
    queue = make_queue(clock=clock)
    queue.declare("remote")
    handle = queue.submit("remote", expires=60)
    start = lifecycle.start(handle.task(), clock.now_ms(), "a dead node")
    assert list(repository.apply([start])) == [True]
    queue.start()
    eventually(lambda: handle.task().crashes)
    clock.advance(60)
    whole_round(queue)
    assert (handle.task().status, handle.task().expires_at) == (TaskStatus.PENDING, None)


@seldom
def test_a_start_that_is_handed_back_does_not_count(busy, gate, clock):
    queue = busy(clock=clock)
    handle = queue.submit("note", expires=60)
    pool = pool_of(queue)
    runs = pool.starter.start(pool.buffer.take(1), "worker")
    pool.buffer.started()
    assert handle.task().status is TaskStatus.RUNNING
    pool.starter.hand_back(runs)
    assert handle.task().expires_at == clock.now() + 60 * SECOND
    clock.advance(60)
    gate.open()
    assert queue.drain(PATIENCE)
    assert (queue.ran, handle.task().error) == ([], EXPIRED)


# What follows


@often
def test_everything_follows_as_after_a_cancel(make_queue, clock):
    class Note(Hook):
        def finished(self, task):
            heard.append((task.type, task.status.value, task.error))

    heard, ran = [], []
    queue = make_queue(clock=clock, hooks=[Note()])
    queue.declare("remote")
    queue.executor("note")(lambda n: ran.append(n))
    queue.start()
    late = queue.submit("remote", expires=60, unique_key="u", concurrency_key="k")
    children = {
        policy: queue.submit("note", {"n": policy}, depends_on=[late], on_parent_failure=policy)
        for policy in ("cancel", "fail", "run")
    }
    next_one = queue.submit("note", {"n": "next"}, concurrency_key="k")
    with pytest.raises(DuplicateTask):
        queue.submit("remote", unique_key="u")
    clock.advance(60)
    for handle in (late, *children.values(), next_one):
        assert wait([handle], PATIENCE).done
    assert {policy: handle.task().status.value for policy, handle in children.items()} == {
        "cancel": "cancelled",
        "fail": "failed",
        "run": "completed",
    }
    assert children["cancel"].task().error == f"its parent {late.id} was cancelled"
    with pytest.raises(CancelledError, match=f"task {late.id} was cancelled: {EXPIRED}"):
        late.result(PATIENCE)
    with pytest.raises(CancelledError, match=f"was cancelled: its parent {late.id} was cancelled"):
        children["cancel"].exception(PATIENCE)
    assert sorted(ran) == ["next", "run"]
    queue.submit("remote", unique_key="u")
    eventually(lambda: ("remote", "cancelled", EXPIRED) in heard)


@often
def test_a_requeued_task_has_no_expiry(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("fine")(lambda: "fine")
    queue.pause("fine")
    queue.start()
    first = queue.submit("fine", expires=60)
    second = queue.submit("fine", depends_on=[first], expires=3600)
    clock.advance(60)
    assert wait([second], PATIENCE).done
    assert second.task().expires_at is None
    queue.requeue(first.id)
    clock.advance(10_000)
    whole_round(queue)
    queue.resume("fine")
    assert queue.handle(second.id).result(PATIENCE) == "fine"
    assert ends_as(first.task()) == ("completed", "", None, 1)


def test_a_map_that_is_run_again_requeues_expired_items(make_queue):
    queue, items = make_queue(), [{"n": 1}, {"n": 2}]
    queue.executor("double", expires=0.001)(lambda n: 2 * n)
    queue.pause("double")
    queue.start()
    with pytest.raises(CancelledError):
        next(queue.map("double", items))
    eventually(lambda: queue.count_tasks(TaskFilter(status="cancelled")) == 2)
    queue.resume("double")
    assert list(queue.map("double", items)) == [2, 4]


def test_a_started_task_that_is_made_pending_by_hand_never_expires(queue, repository):
    queue.declare("remote")
    handle = queue.submit("remote", expires=3600)
    repository.update_status(handle.id, TaskStatus.RUNNING)
    running = handle.task()
    running.expires_at = datetime.now(timezone.utc) + SECOND
    running.status = TaskStatus.PENDING
    repository.update(running)
    assert (handle.task().status, handle.task().expires_at) == (TaskStatus.PENDING, None)


def test_a_run_that_is_taken_from_its_worker_never_expires(make_queue, repository, gate):
    queue = make_queue()
    queue.executor("gate")(gate)
    queue.start()
    handle = queue.submit("gate", expires=3600)
    gate.wait_for(1)
    queue.pause("gate")
    repository.update_status(handle.id, TaskStatus.PENDING)
    assert handle.task().expires_at is None
    gate.open()


@pytest.mark.parametrize("end", ["cancel", "orphan", "run", "done", "delete"])
def test_only_a_task_that_can_expire_is_in_the_index(queue, repository, end):
    queue.declare("remote")
    parent = queue.submit("remote")
    handle = queue.submit("remote", depends_on=[parent], expires=3600)
    assert [i for i, _ in repository.due(None, 10, "expires_at")] == [handle.id]
    if end == "cancel":
        handle.cancel()
    elif end == "orphan":
        parent.cancel()
    elif end == "delete":
        queue.delete(handle.id)
    else:
        repository.update_status(handle.id, TaskStatus.RUNNING)
        if end == "done":
            repository.update_status(handle.id, TaskStatus.COMPLETED)
    assert list(repository.due(None, 10, "expires_at")) == []
    if end != "delete":
        assert handle.task().expires_at is None


@often
def test_an_expiry_can_be_changed_by_hand(make_queue, repository, clock):
    queue = make_queue(clock=clock)
    queue.declare("remote")
    handle = queue.submit("remote", expires=60)
    task = handle.task()
    task.expires_at += 60 * SECOND
    repository.update(task)
    queue.start()
    clock.advance(119)
    whole_round(queue)
    assert handle.task().status is TaskStatus.PENDING
    clock.advance(1)
    assert wait([handle], PATIENCE).done


# The option


@pytest.fixture
def remote(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.declare("remote")
    return queue


def left(queue, clock, **options):
    """Return the seconds that a new task has until it expires."""
    expires_at = queue.submit("remote", **options).task().expires_at
    return None if expires_at is None else (expires_at - clock.now()) / SECOND


def test_seconds_count_from_the_time_at_which_the_task_may_start(remote, clock):
    assert left(remote, clock) is None
    assert left(remote, clock, expires=60) == 60
    assert left(remote, clock, expires=timedelta(minutes=1)) == 60
    assert left(remote, clock, expires=60, delay=100) == 160
    assert left(remote, clock, expires=60, run_at=clock.now() + 100 * SECOND) == 160
    assert left(remote, clock, expires=60, run_at=clock.now() - 100 * SECOND) == 60
    assert left(remote, clock, expires=0.0001) == 0.001
    assert remote.submit("remote", expires=1e300).task().expires_at.year == 9999


def test_a_datetime_is_the_moment_itself(remote, clock):
    moment = clock.now() + 60 * SECOND
    assert left(remote, clock, expires=moment) == 60
    assert left(remote, clock, expires=moment, delay=59) == 60
    assert left(remote, clock, expires=moment.astimezone(timezone(timedelta(hours=5)))) == 60


@pytest.mark.parametrize("delay", [60, 61])
def test_a_task_that_could_never_start_is_refused(remote, clock, delay):
    with pytest.raises(ConfigurationError, match="before it may start"):
        remote.submit("remote", expires=clock.now() + 60 * SECOND, delay=delay)
    assert remote.list_tasks()[1] == 0


@pytest.mark.parametrize(
    "value",
    [0, -1, True, "60", float("nan"), timedelta(0), timedelta(-1), datetime(2030, 1, 1)],
)
def test_a_wrong_expiry_is_refused(remote, value):
    with pytest.raises(ConfigurationError, match="expires"):
        remote.submit("remote", expires=value)
    assert remote.list_tasks()[1] == 0


def test_a_wrong_run_at_is_refused_with_an_expiry_too(remote):
    with pytest.raises(ConfigurationError, match="run_at"):
        remote.submit("remote", run_at="tomorrow", expires=60)
    with pytest.raises(ConfigurationError, match="run_at"):
        remote.submit("remote", run_at=datetime(2030, 1, 1), expires=60)


def test_an_executor_has_a_default_for_its_tasks(make_queue, clock):
    queue = make_queue(clock=clock)
    now = clock.now()

    @queue.executor("short", expires=timedelta(seconds=60))
    def short(n=0):
        return n

    def expiries(*handles):
        return [(handle.task().expires_at - now) / SECOND for handle in handles]

    assert expiries(short.submit(), queue.submit("short", expires=5)) == [60, 5]
    assert expiries(queue.submit("short", delay=100)) == [160]
    assert expiries(*queue.submit_many([short.task(n=1)])) == [60]
    assert expiries(*queue.submit_flow(chain(short.task(), short.task())).handles) == [60, 60]
    for value in (0, now, "a minute"):
        with pytest.raises(ConfigurationError, match="expires"):
            queue.executor("other", expires=value)


def test_a_bound_executor_takes_seconds_for_submits_and_datetimes_for_tasks(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("fine")(fine := (lambda: "fine"))
    bound = queue.executor("bound")(fine).using(expires=60)
    moment = clock.now() + 60 * SECOND
    assert bound.submit().task().expires_at == moment
    with pytest.raises(ConfigurationError, match="expires"):
        bound.task()
    assert bound.using(expires=moment).task().expires_at == moment


def test_a_replaced_task_gets_the_expiry_of_the_new_one(remote, clock):
    for options, seconds in (({"expires": 60}, 60), ({"expires": 5}, 5), ({}, None)):
        left_now = left(remote, clock, unique_key="k", on_conflict="replace", **options)
        assert left_now == seconds
    assert remote.list_tasks()[1] == 1


def test_a_replaced_retry_expires_if_the_new_params_never_start(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("broken", max_attempts=2, retry=RetryPolicy(2, base=600, jitter=0))(
        lambda n: 1 / n
    )
    queue.start()
    handle = queue.submit("broken", {"n": 0}, unique_key="k")
    eventually(lambda: handle.task().errors == 1)
    queue.submit("broken", {"n": 1}, unique_key="k", on_conflict="replace", delay=60, expires=1)
    queue.pause("broken")
    clock.advance(61)
    assert wait([handle], PATIENCE).done
    status, error, expires_at, _ = ends_as(handle.task())
    assert (status, expires_at) == ("cancelled", None)
    assert error.endswith("before its first start since it was replaced")


def test_the_tasks_of_a_schedule_expire_after_their_tick():
    queue = ManualQueue()
    queue.executor("report", expires=30)(lambda: None)
    queue.pause("report")
    own = queue.schedule("own", every(100), "report", expires=timedelta(seconds=60))
    queue.schedule("default", every(100), "report")
    queue.advance(100)
    first = queue.clock.now()
    found = {task.created_by: task.expires_at - first for task in queue.iter_tasks()}
    assert found == {"schedule:own": 60 * SECOND, "schedule:default": 30 * SECOND}
    assert own.trigger().task().expires_at == first + 60 * SECOND
    queue.advance(50)
    assert statuses(queue) == {"cancelled": 1, "pending": 2}
    for wrong in (0, first + 999 * SECOND):
        with pytest.raises(ConfigurationError, match="expires"):
            queue.schedule("wrong", every(100), "report", expires=wrong)
    with pytest.raises(ConfigurationError, match="expires_at"):
        queue.schedule("wrong", every(100), Task(type="report", expires_at=first + SECOND))
    queue.stop()


def test_in_a_manual_queue_each_task_expires_at_its_moment():
    queue = ManualQueue()
    queue.declare("remote")
    handles = [queue.submit("remote", expires=seconds) for seconds in (30, 10)]
    before = queue.clock.now()
    queue.advance(100)
    ends = [(handle.task().completed_at - before) / SECOND for handle in handles]
    assert ends == [30, 10]
    queue.stop()


# Repositories of eight methods


@pytest.mark.parametrize("start", [True, False])
def test_a_repository_that_loses_the_expiry_refuses_it(make_queue, start):
    queue = make_queue(on=thirteen_fields_only())
    queue.executor("fine")(lambda: "fine")
    if start:
        queue.start()
    with pytest.raises(ConfigurationError, match="does not keep expires_at; nothing was stored"):
        queue.submit("fine", expires=60)
    assert queue.list_tasks()[1] == 0
    assert queue.submit("fine").id


# Races


@seldom
def test_a_task_that_expires_during_its_start_does_not_run(busy, repository, gate, clock):
    queue = busy(clock=clock)
    handle = queue.submit("note", expires=60)

    def expire_first(writes):
        if ("start", handle.id) in [(write.move, write.id) for write in writes]:
            repository.before = lambda writes: None
            clock.advance(60)
            assert any(repository.apply(lifecycle.expire(handle.task(), clock.now_ms())))

    repository.before = expire_first
    gate.open()
    assert queue.drain(PATIENCE)
    assert (queue.ran, handle.task().error) == ([], EXPIRED)


def test_a_task_that_starts_during_its_expiry_runs(make_queue, repository, clock):
    queue = make_queue(clock=clock)
    queue.declare("remote")
    handle = queue.submit("remote", expires=60)
    start = lifecycle.start(handle.task(), clock.now_ms(), "another node")

    def start_first(writes):
        repository.before = lambda writes: None
        assert list(repository.apply([start])) == [True]

    repository.before = start_first
    clock.advance(60)
    expiry_of(queue)(math.inf)
    assert (handle.task().status, handle.task().starts) == (TaskStatus.RUNNING, 1)
