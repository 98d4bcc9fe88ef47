"""Finished tasks go when they are old enough, and the space they took with them."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone

import pytest

from taskx import Config, ConfigurationError, SQLiteRepository, Task, TaskFilter, TaskStatus
from taskx.runtime import retention

from .conftest import PATIENCE, eventually, ids, whole_round

pytestmark = pytest.mark.every_store


@pytest.fixture
def fill(make_queue, clock):
    """Makes a queue that has run tasks ``fine`` and ``wrong``, and cancelled one."""

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
    """Let time pass, and the scheduler look."""
    clock.advance(seconds)
    queue._node._scheduler.tick()


class TestRetention:
    def test_each_status_is_kept_for_as_long_as_it_says(self, fill, clock):
        kept = {"completed": timedelta(hours=1), TaskStatus.FAILED: 7200}
        queue = fill(retention=kept)
        later(queue, clock, 3599)
        assert ids(queue) == {"fine", "wrong", "cancelled"}
        later(queue, clock, 2 + retention.EVERY)
        eventually(lambda: ids(queue) == {"wrong", "cancelled"})
        later(queue, clock, 3601)
        eventually(lambda: ids(queue) == {"cancelled"})
        later(queue, clock, 365 * 86400)
        assert ids(queue) == {"cancelled"}

    @pytest.mark.parametrize("period", [timedelta.max, 1e300, 1.7e308, 7e10])
    def test_longer_than_the_calendar_is_for_ever(self, fill, clock, caplog, period):
        """And keeps nothing else."""
        queue = fill(retention={"completed": period, "failed": 3600})
        clock.advance(365 * 86400)
        eventually(lambda: ids(queue) == {"fine", "cancelled"})
        whole_round(queue)
        assert [r for r in caplog.records if "fails the scheduler" in r.msg or r.exc_info] == []

    def test_without_it_nothing_goes(self, fill, clock):
        queue = fill()
        later(queue, clock, 365 * 86400)
        assert ids(queue) == {"fine", "wrong", "cancelled"}

    @pytest.mark.slow
    def test_many_go_in_small_transactions(self, make_queue, repository, clock):
        """So that nobody who writes meanwhile waits for long."""
        queue = make_queue(clock=clock, retention={"cancelled": 60})
        queue.executor("fine")(lambda: None)
        many = 2 * retention.BATCH + 50
        for handle in queue.submit_many([Task(type="fine") for _ in range(many)]):
            handle.cancel()
        clock.advance(61)
        repository.batches.clear()
        queue.start()
        eventually(lambda: not ids(queue))
        sizes = [len(batch) for batch in repository.batches if "starts" in batch[0].guard]
        assert sum(sizes) >= many
        assert max(sizes) == retention.BATCH

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
    def test_what_cannot_work_is_refused(self, wrong):
        with pytest.raises(ConfigurationError):
            Config(retention=wrong)


class TestPrune:
    def test_what_ended_before(self, fill, clock):
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
    def test_of_one_status(self, fill, clock, status, left):
        queue = fill()
        clock.advance(10)
        assert queue.prune(clock.now(), status) == 1
        assert ids(queue) == left

    def test_never_what_is_pending_or_runs(self, make_queue, clock, gate):
        queue = make_queue(worker_num=1, clock=clock)
        queue.executor("hold")(lambda: gate())
        queue.start()
        queue.submit("hold")
        queue.submit("hold")
        gate.wait_for()
        clock.advance(10)
        assert queue.prune(clock.now()) == 0
        assert len(ids(queue)) == 2

    @pytest.mark.parametrize(
        ("moment", "removed"),
        [
            (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5))), 0),
            (datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5))), 3),
        ],
    )
    def test_a_moment_that_the_calendar_of_utc_has_not(self, fill, moment, removed):
        """It is that of a time zone, and before all tasks, or after them."""
        queue = fill()
        assert queue.list_tasks(TaskFilter(start_date=moment))[1] == 3 - removed
        assert queue.list_tasks(TaskFilter(end_date=moment))[1] == removed
        assert queue.prune(moment) == removed
        assert len(ids(queue)) == 3 - removed

    def test_a_moment_must_be_given(self, fill):
        queue = fill()
        with pytest.raises(ConfigurationError, match="before must be a datetime, not None"):
            queue.prune(None)
        assert ids(queue) == {"fine", "wrong", "cancelled"}

    @pytest.mark.parametrize(
        ("before", "status"),
        [("naive", None), (5, None), (None, "pending"), (None, "running"), (None, "gone")],
    )
    def test_what_makes_no_sense_is_refused(self, make_queue, clock, before, status):
        queue = make_queue(clock=clock)
        moment = clock.now().replace(tzinfo=None) if before == "naive" else before or clock.now()
        with pytest.raises(ConfigurationError):
            queue.prune(moment, status)


@pytest.mark.slow
def test_the_file_shrinks_when_most_of_it_is_free(make_queue, database, clock):
    """By incremental vacuum, a little at a time; a part of what is free is kept to be used again."""
    repository = SQLiteRepository(database, durability="process", clock=clock)
    with repository:
        queue = make_queue(repository, clock=clock)
        queue.executor("fine")(lambda text: None)
        tasks = [Task(type="fine", params={"text": "x" * 4000}) for _ in range(6000)]
        for handle in queue.submit_many(tasks):
            handle.cancel()
        repository._transact(lambda cursor: None, durable=True)
        clock.advance(10)
        full = size(repository)
        assert queue.prune(clock.now()) == 6000
        assert size(repository) < full / 3
        assert queue.list_tasks(TaskFilter())[1] == 0
        assert not repository.shrink()


def size(repository):
    """Bytes of the file, when what was committed has been copied into it."""
    with repository._write_lock:
        repository._connections.writer().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return os.path.getsize(repository.path)
