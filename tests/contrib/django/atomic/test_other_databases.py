"""Submits inside ``atomic()`` of another database than that of the tasks: they wait, or are refused."""

from __future__ import annotations

import unittest

import pytest
from django.db import connections, transaction
from django.test import TestCase

from contrib.django.atomic.blocks import ids, rolled_back
from taskx import (
    ConfigurationError,
    DuplicateTask,
    PayloadError,
    SQLiteRepository,
    Task,
    TaskNotFound,
    UnknownTaskType,
    chain,
)
from taskx.contrib.django.blocks import beside_blocks

LONG = 60


@pytest.fixture
def repository(database, request):
    with SQLiteRepository(database) as made:
        yield beside_blocks(made, getattr(request, "param", "wait"))


@pytest.fixture
def queue(make_queue):
    made = make_queue(worker_num=2)
    made.executor("echo")(lambda n=0: n)
    made.declare("elsewhere")
    return made


@pytest.fixture(autouse=True)
def closed():
    yield
    connections.close_all()


class TestWait:
    def test_the_task_is_stored_and_starts_after_the_commit(self, queue):
        with queue:
            with transaction.atomic():
                handle = queue.submit("echo", {"n": 3})
                assert queue.count_tasks() == 0
                assert not handle.done()
                with pytest.raises(ConfigurationError, match="wait for it after that"):
                    handle.result(timeout=LONG)
            assert handle.result(timeout=LONG) == 3

    def test_a_rollback_leaves_no_task(self, queue):
        with rolled_back("default"):
            queue.submit("echo")
            queue.submit_many([Task(type="echo")])
            queue.submit_flow(chain(Task(type="echo"), Task(type="echo")))
        assert queue.count_tasks() == 0

    def test_a_nested_block_takes_its_task_back(self, queue):
        with transaction.atomic():
            kept = queue.submit("elsewhere")
            with rolled_back("default"):
                queue.submit("elsewhere")
        assert ids(queue) == {kept.id}

    def test_the_last_of_several_databases_decides(self, queue):
        with transaction.atomic():
            with transaction.atomic(using="other"):
                handle = queue.submit("elsewhere")
            assert queue.count_tasks() == 0
        assert ids(queue) == {handle.id}

    def test_the_outer_block_of_another_database_takes_the_task_back(self, queue):
        with rolled_back("default"), transaction.atomic(using="other"):
            queue.submit("elsewhere")
        assert queue.count_tasks() == 0

    def test_a_wrong_task_is_refused_at_once(self, queue):
        taken = queue.submit("elsewhere", unique_key="k").id
        with transaction.atomic():
            with pytest.raises(UnknownTaskType):
                queue.submit("unknown")
            with pytest.raises(PayloadError):
                queue.submit("echo", {"n": object()})
            with pytest.raises(DuplicateTask):
                queue.submit("echo", id=taken)
            with pytest.raises(DuplicateTask):
                queue.submit("echo", unique_key="k")
            with pytest.raises(TaskNotFound):
                queue.submit("echo", depends_on=["nobody"])
            with pytest.raises(DuplicateTask):
                queue.submit_many([Task(type="echo"), Task(id=taken, type="echo")])
        assert ids(queue) == {taken}

    def test_a_task_that_waits_counts_for_later_ones(self, queue):
        with transaction.atomic():
            first = queue.submit("elsewhere", {"n": 1}, unique_key="k")
            again = queue.submit("elsewhere", {"n": 2}, unique_key="k", on_conflict="return")
            child = queue.submit("echo", depends_on=[first])
            with pytest.raises(DuplicateTask):
                queue.submit("elsewhere", unique_key="k")
            changed = queue.submit("elsewhere", {"n": 3}, unique_key="k", on_conflict="replace")
        assert first.id == again.id == changed.id
        assert ids(queue) == {first.id, child.id}
        assert first.task().params == {"n": 3}
        assert child.task().depends_on == [first.id]

    def test_a_key_that_another_task_took_in_the_meantime_is_logged(
        self, queue, make_queue, caplog
    ):
        with transaction.atomic():
            queue.submit("elsewhere", unique_key="k")
            late = queue.submit("elsewhere")
            # As another process would: it is in no block.
            with SQLiteRepository(queue.repository.path) as other:
                there = make_queue(other)
                there.declare("elsewhere")
                there.submit("elsewhere", id="theirs", unique_key="k")
        assert ids(queue) == {"theirs", late.id}
        assert "was not stored after the commit" in caplog.text

    def test_two_tasks_of_one_call_with_the_same_id_are_refused_at_once(self, queue):
        with transaction.atomic():
            kept = queue.submit("elsewhere")
            with pytest.raises(DuplicateTask):
                queue.submit_many([Task(id=name, type="elsewhere") for name in "xyx"])
        assert ids(queue) == {kept.id}

    def test_each_task_that_another_one_of_its_call_prevents_is_logged(
        self, queue, make_queue, caplog
    ):
        with transaction.atomic():
            queue.submit_many([Task(id=name, type="elsewhere") for name in "xyz"])
            with SQLiteRepository(queue.repository.path) as other:
                there = make_queue(other)
                there.declare("elsewhere")
                there.submit("elsewhere", id="y")
        assert ids(queue) == {"y"}
        lost = [record.args[0] for record in caplog.records if "was not stored" in record.message]
        assert lost == ["x", "y", "z"]

    def test_cancels_do_not_wait(self, queue):
        handle = queue.submit("elsewhere")
        with rolled_back("default"):
            assert handle.cancel()
        assert handle.cancelled()

    def test_outside_of_blocks_nothing_waits(self, queue):
        handle = queue.submit("elsewhere")
        assert ids(queue) == {handle.id}


class TestRefuse:
    @pytest.mark.parametrize("repository", ["refuse"], indirect=True)
    def test_the_submit_raises_and_nothing_is_stored(self, queue):
        with transaction.atomic(using="other"):
            for submit in (
                lambda: queue.submit("echo"),
                lambda: queue.submit_many([Task(type="echo")]),
                lambda: queue.submit_flow(chain(Task(type="echo"), Task(type="echo"))),
            ):
                with pytest.raises(ConfigurationError, match="of the database 'other'"):
                    submit()
        assert queue.count_tasks() == 0
        queue.submit("echo")
        assert queue.count_tasks() == 1


class TestInTestCase:
    def test_captured_callbacks_store_the_task(self, queue):
        class Case(TestCase):
            def test_it(self):
                with self.captureOnCommitCallbacks(execute=True) as callbacks:
                    self.handle = queue.submit("elsewhere")
                assert len(callbacks) == 1
                assert ids(queue) == {self.handle.id}
                queue.submit("elsewhere")
                assert ids(queue) == {self.handle.id}

        result = unittest.TestResult()
        unittest.TestSuite([Case("test_it")]).run(result)
        assert result.testsRun == 1
        assert not [*result.errors, *result.failures]
