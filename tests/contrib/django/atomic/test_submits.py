"""Tasks that are submitted and changed inside ``atomic()``, and executors that commit with their task."""

from __future__ import annotations

import unittest
from concurrent.futures import wait
from contextlib import contextmanager, suppress

import pytest
from django.db import DatabaseError, IntegrityError, connections, transaction
from django.test import TestCase, override_settings
from units import CallersTransactions

from contrib.django.atomic.blocks import elsewhere, ids, rolled_back
from taskx import (
    ConfigurationError,
    InvalidTransition,
    TaskStatus,
)
from taskx.contrib.django import DjangoRepository, get_queue
from taskx.tasks import lifecycle

LONG = 60


class TestContract(CallersTransactions):
    @pytest.fixture
    def begin(self, using):
        @contextmanager
        def begin(undo=False):
            with rolled_back(using) if undo else transaction.atomic(using=using):
                yield {}

        return begin

    @pytest.fixture
    def add(self, add):
        return lambda within: add("readers")

    @pytest.fixture
    def rows(self, names):
        return lambda: len(names())

    @pytest.fixture
    def outside(self):
        return elsewhere


class TestSubmit:
    def test_nested_blocks_decide_for_themselves(self, queue, using):
        with transaction.atomic(using=using):
            with rolled_back(using):
                queue.submit("elsewhere")
            kept = queue.submit("elsewhere")
            with transaction.atomic(using=using):
                inner = queue.submit("elsewhere")
            mark = connections[using].savepoint()
            queue.submit("elsewhere")
            connections[using].savepoint_rollback(mark)
        assert ids(queue) == {kept.id, inner.id}

    def test_a_durable_block_takes_it(self, queue, using):
        with transaction.atomic(using=using, durable=True):
            handle = queue.submit("elsewhere")
        assert ids(queue) == {handle.id}

    def test_outside_of_blocks_it_is_stored_at_once(self, queue):
        handle = queue.submit("elsewhere")
        assert elsewhere(lambda: ids(queue)) == {handle.id}

    def test_a_connection_can_be_named(self, queue, using):
        with rolled_back(using):
            queue.submit("elsewhere", connection=connections[using])
        assert queue.count_tasks() == 0
        with transaction.atomic(using=using):
            queue.submit("elsewhere", connection=connections[using])
        assert queue.count_tasks() == 1

    def test_without_autocommit_the_task_belongs_to_the_open_transaction(self, queue, using, add):
        transaction.set_autocommit(False, using=using)
        try:
            queue.submit("elsewhere")
            transaction.rollback(using=using)
            kept = queue.submit("elsewhere")
            add("readers")
            transaction.commit(using=using)
        finally:
            transaction.set_autocommit(True, using=using)
        assert ids(queue) == {kept.id}

    def test_a_transaction_that_took_back_what_it_wrote_is_over_and_nobody_is_told(
        self, queue, repository, using
    ):
        task_id, told = queue.submit("elsewhere").id, []
        # One of two takes place, and is undone, as they must take place together.
        writes = [lifecycle.delete(task_id), lifecycle.free(task_id, "nobody")]

        def undone():
            with repository.transactions.join(connections[using], told.append) as inside:
                assert inside.apply(writes, all_or_nothing=True) == [True, False]

        with transaction.atomic(using=using):
            undone()
        transaction.set_autocommit(False, using=using)
        try:
            undone()
            if repository.vendor == "sqlite":  # it would keep the write lock
                assert not connections[using].connection.in_transaction
        finally:
            transaction.rollback(using=using)
            transaction.set_autocommit(True, using=using)
        assert (ids(queue), told) == ({task_id}, [])


class TestChange:
    def test_changes_are_rolled_back_with_the_data(self, queue, using):
        cancelled, pending, gone = (queue.submit("elsewhere").id for _ in range(3))
        queue.cancel_task(cancelled)
        with rolled_back(using):
            queue.requeue(cancelled)
            assert queue.cancel_task(pending)
            queue.delete(gone)
            assert queue.cancel_all(type="elsewhere").changed == 1
        states = {task.id: task.status for task in queue.iter_tasks()}
        assert states == {
            cancelled: TaskStatus.CANCELLED,
            pending: TaskStatus.PENDING,
            gone: TaskStatus.PENDING,
        }

    def test_an_ended_task_is_not_cancelled(self, queue, using):
        handle = queue.submit("elsewhere")
        handle.cancel()
        with transaction.atomic(using=using), pytest.raises(InvalidTransition):
            queue.cancel_task(handle.id)


class TestRead:
    def test_reads_see_what_the_block_has_written(self, queue, using):
        with rolled_back(using):
            handle = queue.submit("elsewhere", tags=["red"])
            assert handle.task().status is TaskStatus.PENDING
            assert [task.id for task in queue.list_tasks(tag="red")[0]] == [handle.id]
            queue.cancel_task(handle.id)
            assert queue.get_task_status(handle.id).status is TaskStatus.CANCELLED

    def test_a_wait_that_cannot_end_raises_at_once(self, queue, using):
        with queue:
            with transaction.atomic(using=using):
                handle = queue.submit("echo", {"n": 3})
                assert not handle.done()
                for call in (handle.result, handle.exception, lambda: wait([handle])):
                    with pytest.raises(ConfigurationError, match="wait for it after that"):
                        call()
            assert handle.result(timeout=LONG) == 3

    def test_a_cancel_that_is_rolled_back_leaves_the_handle_open(self, queue, using):
        handle = queue.submit("echo", {"n": 3})
        with rolled_back(using):
            assert handle.cancel()
            assert not handle.cancelled()
        with queue:
            assert handle.result(timeout=LONG) == 3


class TestWrongConnections:
    def test_of_another_database(self, queue):
        with transaction.atomic(using="other"), pytest.raises(ConfigurationError, match="'other'"):
            queue.submit("elsewhere", connection=connections["other"])
        assert queue.count_tasks() == 0

    def test_in_no_transaction(self, queue, using):
        with pytest.raises(ConfigurationError, match="in no transaction"):
            queue.submit("elsewhere", connection=connections[using])

    def test_of_another_thread(self, queue, using):
        def submit():
            with pytest.raises(ConfigurationError, match="another thread"):
                queue.submit("elsewhere", connection=mine)
            return True

        with transaction.atomic(using=using):
            mine = connections[using]
            assert elsewhere(submit)

    def test_something_else(self, queue):
        with pytest.raises(ConfigurationError, match="must be connections"):
            queue.submit("elsewhere", connection="default")

    def test_a_block_that_an_error_has_broken(self, queue, using, add):
        with suppress(transaction.TransactionManagementError), transaction.atomic(using=using):
            add("readers")
            with suppress(IntegrityError):
                add("readers")
            with pytest.raises(ConfigurationError, match="rolled back"):
                queue.submit("elsewhere")
        assert queue.count_tasks() == 0

    def test_a_statement_that_postgresql_has_refused(self, repository, queue, using):
        if repository.vendor != "postgresql":
            pytest.skip("SQLite and MySQL go on after an error")
        with transaction.atomic(using=using):
            with suppress(DatabaseError), connections[using].cursor() as cursor:
                cursor.execute("SELECT nothing")
            for call in (lambda: queue.submit("elsewhere"), queue.count_tasks):
                with pytest.raises(ConfigurationError, match="an error has broken"):
                    call()
        assert queue.count_tasks() == 0


class TestOtherCalls:
    def test_checkpoints_in_a_block_are_refused(self, queue, using):
        refused = []

        @queue.executor()
        def work(ctx):
            with transaction.atomic(using=using), pytest.raises(ConfigurationError) as error:
                ctx.step("one", lambda: 1)
            refused.append(str(error.value))
            return ctx.step("one", lambda: 2)

        with queue:
            assert queue.submit("work").result(timeout=LONG) == 2
        assert "use ctx.transaction()" in refused[0]

    def test_a_submit_in_a_block_of_another_database_waits_for_it(self, queue):
        with transaction.atomic(using="other"):
            handle = queue.submit("elsewhere")
            assert queue.count_tasks() == 0
        assert ids(queue) == {handle.id}

    def test_the_database_of_the_tasks_comes_first(self, queue, using):
        with rolled_back("other"), transaction.atomic(using=using):
            handle = queue.submit("elsewhere")
        assert ids(queue) == {handle.id}

    def test_it_can_be_refused(self, using, make_queue):
        queue = make_queue(DjangoRepository(using, on_commit="refuse"))
        queue.declare("elsewhere")
        with transaction.atomic(using="other"), pytest.raises(ConfigurationError, match="other"):
            queue.submit("elsewhere")
        with transaction.atomic(using=using):
            queue.submit("elsewhere")
        assert queue.count_tasks() == 1
        queue.close()

    @override_settings(TASKS={"default": {"BACKEND": "x", "OPTIONS": {"on_commit": "refuse"}}})
    def test_the_options_of_the_site_can_refuse_it(self):
        assert get_queue().repository.on_commit == "refuse"

    def test_a_setting_that_is_not_known_is_refused(self):
        with pytest.raises(ConfigurationError, match="on_commit must be"):
            DjangoRepository(on_commit="later")


class TestInTestCase:
    def test_tasks_belong_to_the_test(self, queue, using):
        class Case(TestCase):
            databases = frozenset({using})

            def test_it(self):
                queue.submit("elsewhere")
                assert queue.count_tasks() == 1

        result = unittest.TestResult()
        unittest.TestSuite([Case("test_it")]).run(result)
        assert result.testsRun == 1
        assert not [*result.errors, *result.failures]
        assert queue.count_tasks() == 0
