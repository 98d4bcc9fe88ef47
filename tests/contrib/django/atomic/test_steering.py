"""Pauses, schedules, reads, waits and the other calls of a queue inside ``atomic()``."""

from __future__ import annotations

from concurrent.futures import wait
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import count

import pytest
from django.db import connections, transaction
from helpers import eventually, storing, whole_round

from contrib.django.atomic.blocks import LONG, elsewhere, ids, rolled_back
from taskx import ConfigurationError, Queue, TaskNotFound, TaskStatus, every
from taskx.contrib.django import DjangoRepository, schedules


@pytest.fixture
def written(using, add):
    """Make a block that has written, so that it has SQLite's write lock."""
    rows = count(1)

    @contextmanager
    def block():
        with transaction.atomic(using=using):
            add(f"row {next(rows)}")
            yield

    return block


class TestSchedules:
    @pytest.fixture
    def queue(self, queue):
        return storing(queue)

    def test_a_declaration_is_stored_with_the_data(self, queue, using, written, names):
        with rolled_back(using), written():
            queue.schedule("nightly", "0 3 * * *", "elsewhere")
            assert {*queue.schedules()} == {"nightly"}
        assert queue.schedules() == {}
        with written():
            queue.schedule("nightly", "0 3 * * *", "elsewhere")
            assert elsewhere(queue.schedules) == {}
        assert {*elsewhere(queue.schedules)} == {"nightly"}
        assert names() == ["row 2"]

    def test_changes_are_rolled_back_with_the_data(self, queue, using, written):
        kept = queue.schedule("nightly", "0 3 * * *", "elsewhere")
        gone = queue.schedule("hourly", "0 * * * *", "elsewhere")
        with rolled_back(using), written():
            queue.schedule("nightly", "0 4 * * *", "elsewhere")
            kept.pause()
            gone.remove()
            assert {*queue.schedules()} == {"nightly"}
            assert queue.schedules()["nightly"].paused
        stored = queue.schedules()
        assert {*stored} == {"nightly", "hourly"}
        assert (stored["nightly"].spec, stored["nightly"].paused) == ("0 3 * * *", False)

    def test_a_pause_and_its_end_are_committed_with_the_data(self, queue, written):
        schedule = queue.schedule("nightly", "0 3 * * *", "elsewhere")
        with written():
            schedule.pause()
        assert queue.schedules()["nightly"].paused
        with transaction.atomic():  # of another database
            schedule.resume()
        assert not queue.schedules()["nightly"].paused

    def test_tasks_of_a_schedule_belong_to_the_block(self, queue, using, written):
        schedule = queue.schedule("hourly", every(3600), "elsewhere")
        end = datetime.now(timezone.utc) - timedelta(minutes=1)
        span = (end - timedelta(hours=3), end)
        with rolled_back(using), written():
            assert len(schedule.backfill(*span)) == 3
            handle = schedule.trigger()
            assert handle.task().status is TaskStatus.PENDING
        assert queue.count_tasks() == 0
        with written():
            handle = schedule.trigger()
        assert ids(queue) == {handle.id}

    def test_in_a_block_of_another_database_a_task_waits_for_its_commit(self, queue):
        schedule = queue.schedule("nightly", "0 3 * * *", "elsewhere")
        with rolled_back("other"):
            schedule.trigger()
        assert queue.count_tasks() == 0
        with transaction.atomic(using="other"):
            handle = schedule.trigger()
            assert elsewhere(queue.count_tasks) == 0
        assert ids(queue) == {handle.id}

    def test_a_schedule_ticks_after_the_commit(self, queue, written):
        with queue:
            with written():
                queue.schedule("often", every(0.2), "echo")
            eventually(lambda: queue.count_tasks(status="completed") > 0)
            with written():
                queue.schedules()["often"].remove()


class TestPauses:
    def test_a_pause_is_rolled_back_with_the_data(self, queue, using, written):
        with rolled_back(using), written():
            queue.pause("elsewhere")
            assert "elsewhere" in queue.paused
            assert "elsewhere" not in elsewhere(lambda: queue.paused)
        assert not queue.paused

    def test_a_pause_is_in_effect_after_the_commit(self, queue, written):
        with queue:
            with written():
                queue.pause("echo")
            handle = queue.submit("echo", {"n": 3})
            whole_round(queue)
            assert handle.task().status is TaskStatus.PENDING
            with written():
                queue.resume("echo")
            assert handle.result(timeout=LONG) == 3


class TestReads:
    def test_they_see_what_the_block_has_written(self, queue, using, written):
        with rolled_back(using), written():
            handle = queue.submit("elsewhere", delay=3600)
            queue.note_change("ann", "submit", handle.id)
            assert [task.id for task in queue.iter_tasks()] == [handle.id]
            assert queue.why(handle.id)
            assert queue.stats().types["elsewhere"].delayed == 1
            assert not queue.failures().groups
            assert [change.by for change in queue.changes()] == ["ann"]
        assert queue.changes() == []
        with pytest.raises(TaskNotFound):
            queue.why(handle.id)

    def test_those_about_nodes_answer_as_well(self, queue, written):
        with queue, written():
            (node,) = queue.nodes()
            assert node.alive
            assert not queue.health(oldest_due=None).problems
            assert not queue.tuned()


class TestRefused:
    CALLS = (
        ("tune", lambda queue: queue.tune("elsewhere", max_concurrency=1)),
        ("untune", lambda queue: queue.untune("elsewhere")),
        ("hold", lambda queue: queue.hold("elsewhere", 1)),
        ("release", lambda queue: queue.release("elsewhere")),
        ("prune", lambda queue: queue.prune(datetime.now(timezone.utc))),
        ("drain", lambda queue: queue.drain(timeout=LONG)),
        ("follow", lambda queue: queue.follow(timeout=LONG)),
        ("map", lambda queue: list(queue.map("elsewhere", [{"n": 1}]))),
    )

    @pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS])
    def test_it_raises_at_once(self, queue, written, call):
        with queue:
            with written(), pytest.raises(ConfigurationError, match=r"inside atomic\(\)"):
                call(queue)
            assert not queue.tuned()

    def test_requests_to_other_nodes(self, queue, make_queue, using, written):
        with DjangoRepository(using) as second:
            other: Queue = make_queue(second, worker_num=1)
            with other:
                (node,) = queue.nodes()
                for ask in (queue.stop_node, queue.stacks):
                    with written(), pytest.raises(ConfigurationError, match=r"inside atomic\(\)"):
                        ask(node.id)
                assert not other.stopped

    def test_an_executor_is_registered_and_recorded_later(self, queue, written):
        with queue:
            with written():
                queue.executor("late")(lambda: "done")
            assert queue.submit("late").result(timeout=LONG) == "done"


def test_declared_schedules_are_stored_without_autocommit_too(queue, using):
    schedules.schedule("nightly", "0 3 * * *", "elsewhere", backend="of-this-test")
    transaction.set_autocommit(False, using=using)
    try:
        schedules.declare("of-this-test", queue)
        assert queue.repository.notes("schedule/") == {}
        queue.start()
        assert elsewhere(lambda: queue.repository.notes("schedule/")).keys() == {"schedule/nightly"}
    finally:
        transaction.rollback(using=using)
        transaction.set_autocommit(True, using=using)


def test_a_declared_schedule_that_is_not_valid_is_named(queue):
    schedules.schedule("nightly", "bad cron", "elsewhere", backend="wrong-spec")
    with pytest.raises(ConfigurationError, match="schedule 'nightly': cron expression 'bad cron'"):
        schedules.declare("wrong-spec", queue)
    schedules.schedule("hourly", every(3600), "elsewhere", backend="wrong-option", owerlap="skip")
    with pytest.raises(ConfigurationError, match=r"schedule 'hourly': .* no option owerlap"):
        schedules.declare("wrong-option", queue)


class TestWaits:
    def test_without_autocommit(self, queue, using):
        with queue:
            old = queue.submit("elsewhere")
            transaction.set_autocommit(False, using=using)
            try:
                handle = queue.submit("echo", {"n": 3})
                assert old.cancel()
                assert not old.cancelled()
                for wanted in (handle, old):
                    for call in (wanted.result, lambda one=wanted: wait([one])):
                        with pytest.raises(ConfigurationError, match="wait for it after that"):
                            call()
                transaction.commit(using=using)
                assert handle.result(timeout=LONG) == 3
                assert old.cancelled()
                assert queue.count_tasks() == 2
                assert elsewhere(lambda: queue.submit("elsewhere")).task().type == "elsewhere"
            finally:
                transaction.rollback(using=using)  # reads begin a transaction on PostgreSQL
                transaction.set_autocommit(True, using=using)

    def test_for_another_task_while_the_block_has_the_write_lock(self, queue, repository, written):
        with queue:
            queue.pause("echo")
            ended = queue.submit("elsewhere")
            ended.cancel()
            other = queue.submit("echo", {"n": 3})
            with written():
                if repository.vendor != "sqlite":
                    elsewhere(lambda: queue.resume("echo"))
                assert queue.handle(ended.id).cancelled()
                if repository.vendor == "sqlite":
                    with pytest.raises(ConfigurationError, match="would wait for itself"):
                        other.result()
                else:
                    assert other.result(timeout=LONG) == 3
            queue.resume("echo")
            assert other.result(timeout=LONG) == 3

    def test_a_queue_is_not_started_while_the_block_has_the_write_lock(
        self, queue, repository, written
    ):
        if repository.vendor == "sqlite":
            with written(), pytest.raises(ConfigurationError, match="would wait for itself"):
                queue.start()
        with queue:
            assert connections[repository.using].in_atomic_block is False
            assert queue.submit("echo", {"n": 3}).result(timeout=LONG) == 3
