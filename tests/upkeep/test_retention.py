"""Retention and prune: finished tasks are removed when they are old enough, and the file shrinks."""

from __future__ import annotations

import os
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from helpers import PATIENCE, connections_of, eventually, ids, whole_round

from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    Queue,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskStatus,
    chain,
    group,
)
from taskx.tasks.timing import DEFAULT_TIMING


@pytest.fixture
def fill(make_queue, clock):
    """Return a function that makes a queue with a completed, a failed and a cancelled task."""

    def make(**config):
        queue = make_queue(worker_num=2, clock=clock, **config)
        queue.executor("fine")(lambda: None)
        queue.executor("wrong")(lambda: 1 / 0)
        queue.submit("fine", id="cancelled")
        queue.cancel_task("cancelled")
        for kind in ("fine", "wrong"):
            queue.submit(kind, id=kind)
        queue.start()
        assert queue.drain(PATIENCE)
        return queue

    return make


def later(queue, clock, seconds):
    """Let time pass, and wait for a round of the housekeeper."""
    clock.advance(seconds)
    whole_round(queue)


class TestRetention:
    def test_each_status_is_kept_for_its_own_period(self, fill, clock):
        kept = {"completed": timedelta(hours=1), TaskStatus.FAILED: 7200}
        queue = fill(retention=kept)
        later(queue, clock, 3599)
        assert ids(queue) == {"fine", "wrong", "cancelled"}
        later(queue, clock, 2 + DEFAULT_TIMING.retention_every)
        eventually(lambda: ids(queue) == {"wrong", "cancelled"})
        later(queue, clock, 3601)
        eventually(lambda: ids(queue) == {"cancelled"})
        later(queue, clock, 365 * 86400)
        assert ids(queue) == {"cancelled"}

    @pytest.mark.parametrize("period", [timedelta.max, 1e300, 1.7e308, 7e10])
    def test_a_period_longer_than_the_calendar_keeps_tasks_for_ever(
        self, fill, clock, caplog, period
    ):
        """Tasks of another status are still removed."""
        queue = fill(retention={"completed": period, "failed": 3600})
        clock.advance(365 * 86400)
        eventually(lambda: ids(queue) == {"fine", "cancelled"})
        whole_round(queue)
        assert [r for r in caplog.records if "housekeeper" in r.msg or r.exc_info] == []

    def test_without_retention_no_task_is_removed(self, fill, clock):
        queue = fill()
        later(queue, clock, 365 * 86400)
        assert ids(queue) == {"fine", "wrong", "cancelled"}

    @pytest.mark.slow
    def test_many_tasks_are_removed_in_small_transactions(self, make_queue, repository, clock):
        """Other writers do not wait for long."""
        queue = make_queue(clock=clock, retention={"cancelled": 60})
        queue.executor("fine")(lambda: None)
        many = 2 * DEFAULT_TIMING.batch + 50
        for handle in queue.submit_many([Task(type="fine") for _ in range(many)]):
            handle.cancel()
        clock.advance(61)
        repository.batches.clear()
        queue.start()
        eventually(lambda: not ids(queue))
        sizes = [len(batch) for batch in repository.batches if "starts" in batch[0].guard]
        assert sum(sizes) >= many
        assert max(sizes) == DEFAULT_TIMING.batch

    @pytest.mark.parametrize(
        "wrong",
        [
            {"pending": 5},
            {"gone": 5},
            {"completed": -1},
            {"completed": "7 days"},
            {"completed": 10**400},
            {"failed": timedelta(days=-1)},
            7,
        ],
    )
    def test_an_invalid_retention_is_refused(self, wrong):
        with pytest.raises(ConfigurationError):
            Config(retention=wrong)


class TestPrune:
    def test_prune_removes_tasks_that_ended_before_a_moment(self, fill, clock):
        queue = fill()
        clock.advance(10)
        queue.submit("fine", id="young").result(PATIENCE)
        assert queue.prune(clock.now() - timedelta(seconds=5)) == 3
        assert ids(queue) == {"young"}

    @pytest.mark.parametrize(
        ("status", "left"),
        [
            ("completed", {"wrong", "cancelled"}),
            (TaskStatus.FAILED, {"fine", "cancelled"}),
            ("cancelled", {"fine", "wrong"}),
        ],
    )
    def test_prune_can_be_limited_to_one_status(self, fill, clock, status, left):
        queue = fill()
        clock.advance(10)
        assert queue.prune(clock.now(), status) == 1
        assert ids(queue) == left

    @pytest.mark.every_store
    def test_prune_keeps_pending_and_running_tasks(self, make_queue, clock, gate):
        queue = make_queue(worker_num=1, clock=clock)
        queue.executor("hold")(lambda: gate())
        queue.start()
        queue.submit("hold")
        queue.submit("hold")
        gate.wait_for()
        clock.advance(10)
        assert queue.prune(clock.now()) == 0
        assert len(ids(queue)) == 2

    @pytest.mark.every_store
    @pytest.mark.parametrize(
        ("moment", "removed"),
        [
            (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5))), 0),
            (datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5))), 3),
        ],
    )
    def test_prune_accepts_a_moment_outside_the_calendar_of_utc(self, fill, moment, removed):
        """The moment is in another time zone, and before all tasks, or after them."""
        queue = fill()
        assert queue.list_tasks(TaskFilter(start_date=moment))[1] == 3 - removed
        assert queue.list_tasks(TaskFilter(end_date=moment))[1] == removed
        assert queue.prune(moment) == removed
        assert len(ids(queue)) == 3 - removed

    def test_prune_requires_a_moment(self, fill):
        queue = fill()
        with pytest.raises(ConfigurationError, match="before must be a datetime, not None"):
            queue.prune(None)
        assert ids(queue) == {"fine", "wrong", "cancelled"}

    @pytest.mark.parametrize(
        ("before", "status"),
        [("naive", None), (5, None), (None, "pending"), (None, "running"), (None, "gone")],
    )
    def test_prune_refuses_invalid_arguments(self, make_queue, clock, before, status):
        queue = make_queue(clock=clock)
        moment = clock.now().replace(tzinfo=None) if before == "naive" else before or clock.now()
        with pytest.raises(ConfigurationError):
            queue.prune(moment, status)


@pytest.mark.slow
class TestHistory:
    """A record is kept as long as another task or a flow may need it."""

    @pytest.fixture
    def queue(self, make_queue, clock, gate):
        queue = make_queue(worker_num=2, clock=clock)
        queue.mended = []

        @queue.executor("step")
        def step(ctx, n=0, wrong=False, hold=False):
            if wrong and not queue.mended:
                raise ValueError("wrong")
            if hold:
                gate()
            return n + sum(parent.result for parent in ctx.parents)

        queue.start()
        return queue

    @staticmethod
    def step(n, **params):
        return Task(type="step", params={"n": n, **params})

    def prune(self, queue, clock, status=None):
        clock.advance(10)
        return queue.prune(clock.now(), status)

    def test_a_flow_that_runs_longer_than_the_retention_keeps_all_its_tasks(
        self, queue, clock, gate
    ):
        steps = [self.step(n, hold=n == 3) for n in range(4)]
        flow = queue.submit_flow(chain(*steps))
        gate.wait_for(1)
        assert self.prune(queue, clock) == 0
        gate.open()
        assert flow.result(PATIENCE) == 6
        assert flow.status() is TaskStatus.COMPLETED
        assert self.prune(queue, clock) == 4

    def test_requeued_tasks_find_their_parents_after_the_retention(self, queue, clock):
        flow = queue.submit_flow(
            chain(group(self.step(1), self.step(2)), self.step(4, wrong=True), self.step(8))
        )
        queue.drain(PATIENCE)
        assert self.prune(queue, clock, "completed") == 0
        assert self.prune(queue, clock, "failed") == 0, "a cancelled task may be requeued"
        queue.mended.append(True)
        assert queue.requeue_dead_letters() == 2
        assert queue.drain(PATIENCE)
        assert flow.result(PATIENCE) == 15

    def test_parents_are_removed_with_the_last_task_that_depends_on_them(self, queue, clock):
        queue.submit_flow(chain(self.step(1), self.step(2, wrong=True), self.step(4)))
        queue.drain(PATIENCE)
        assert self.prune(queue, clock) == 3

    def test_children_that_were_stored_before_their_parents_are_removed_first(self, queue, clock):
        tasks = {"a": ["b"], "b": ["c", "d"], "c": [], "d": []}
        queue.submit_many(
            Task(id=i, type="step", depends_on=parents) for i, parents in tasks.items()
        )
        assert queue.drain(PATIENCE)
        assert self.prune(queue, clock, "completed") == 4

    def test_a_task_stays_as_long_as_it_holds_its_unique_key(self, queue, clock):
        queue.submit("step", unique_key="k", unique_scope=60).result(PATIENCE)
        queue.submit("step", unique_key="e", unique_scope="ever").result(PATIENCE)
        assert self.prune(queue, clock) == 1
        with pytest.raises(DuplicateTask):
            queue.submit("step", unique_key="k")
        queue.submit("step", unique_key="e").result(PATIENCE)
        clock.advance(50)
        assert self.prune(queue, clock) == 2

    @pytest.mark.timing(batch=20)
    def test_a_long_chain_is_removed_in_few_scans(self, make_queue, repository, clock, monkeypatch):
        queue = make_queue(clock=clock)
        queue.executor("step")(lambda: None)
        flow = queue.submit_flow(chain(*(Task(type="step") for _ in range(90))))
        flow.cancel()
        clock.advance(10)
        scans, ended = [], repository.ended

        def counted(*args):
            scans.append(args)
            return ended(*args)

        monkeypatch.setattr(repository, "ended", counted)
        assert queue.prune(clock.now(), "cancelled") == 90
        assert len(scans) <= 5 + 1

    @pytest.mark.timing(batch=2)
    def test_tasks_that_must_stay_do_not_hide_others_that_can_be_removed(
        self, make_queue, clock, gate
    ):
        """This holds for any number of them: the next scan goes on where this one stopped."""
        queue = make_queue(clock=clock, retention={"completed": 60})
        queue.executor("step")(lambda: None)
        old = [queue.submit("step", id=f"old{n}") for n in range(3)]
        kept = [queue.submit("step", id=f"kept{n}") for n in range(7)]
        queue.submit("step", id="waits", depends_on=kept, delay=3600)
        queue.start()
        for handle in (*old, *kept):
            handle.result(PATIENCE)
        later(queue, clock, 61)
        eventually(lambda: not any(task_id.startswith("old") for task_id in ids(queue)))
        assert ids(queue) == {"waits", *(handle.id for handle in kept)}


@pytest.mark.slow
def test_the_file_shrinks_when_most_of_it_is_free(database, clock):
    """An incremental vacuum shrinks it a little at a time, and keeps some free space for later use."""
    repository = SQLiteRepository(database, durability="process", clock=clock)
    with repository, closing(Queue(repository, clock=clock)) as queue:
        queue.executor("fine")(lambda text: None)
        tasks = [Task(type="fine", params={"text": "x" * 4000}) for _ in range(6000)]
        queue.cancel_many([handle.id for handle in queue.submit_many(tasks)])
        repository._file_links.transaction(lambda cursor: None, durable=True)
        clock.advance(10)
        full = size(repository)
        assert queue.prune(clock.now()) == 6000
        assert size(repository) < full / 3
        assert queue.list_tasks(TaskFilter())[1] == 0
        assert not repository.house.shrink()


def size(repository):
    """Return the size of the file in bytes, after a checkpoint of the write-ahead log."""
    with repository._file_links.write_lock:
        connections_of(repository).writer().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return os.path.getsize(repository.path)
