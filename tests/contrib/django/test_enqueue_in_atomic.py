"""A task that is enqueued inside ``atomic()`` commits and rolls back with the block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import django_project
import pytest
from django.db import connections, transaction
from django.test.utils import override_settings
from helpers import eventually
from shop import tasks

from taskx import ConfigurationError
from taskx.contrib.django import TaskxBackend, get_queue
from taskx.contrib.django.compat import TaskResultDoesNotExist, TaskResultStatus, task_backends

from .test_backend import ended, entry

READY, SUCCESSFUL = TaskResultStatus.READY, TaskResultStatus.SUCCESSFUL


@pytest.fixture(params=django_project.MAKERS)
def site(request, tmp_path) -> Iterator[str]:
    """The alias of a database with the tables of TaskX, and a table of the site."""
    with django_project.MAKERS[request.param](tmp_path) as repository:
        alias = repository.using
    with connections[alias].cursor() as cursor:
        cursor.execute("CREATE TABLE orders (name TEXT)")
    yield alias
    with connections[alias].cursor() as cursor:
        cursor.execute("DROP TABLE orders")
    connections[alias].close()


def orders(site: str) -> int:
    with connections[site].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM orders")
        return int(cursor.fetchone()[0])


def order(site: str) -> Any:
    """Store an order, and enqueue its task."""
    with connections[site].cursor() as cursor:
        cursor.execute("INSERT INTO orders VALUES ('x')")
    return tasks.add.enqueue(1)


@pytest.fixture
def joined(site, tmp_path) -> Iterator[TaskxBackend]:
    """The backend with its tasks in the database of the site, and a started queue."""
    settings = entry(tmp_path, database=site)
    del settings["OPTIONS"]["repository"]
    with override_settings(TASKS={"default": settings}):
        get_queue().start()
        yield task_backends["default"]


@pytest.fixture(params=["wait", "refuse"])
def beside(request, site, tmp_path) -> Iterator[str]:
    """The backend with its tasks in a file of their own, and a started queue; its setting of on_commit."""
    with override_settings(TASKS={"default": entry(tmp_path, on_commit=request.param)}):
        get_queue().start()
        yield request.param


def test_in_the_database_of_the_tasks_it_is_part_of_the_block(site, joined):
    with transaction.atomic(using=site):
        result = order(site)
        assert joined.get_result(result.id) == result
        assert result.status == READY
        with transaction.atomic(using=site):
            lost = order(site)
            assert tasks.add.get_result(lost.id).status == READY
            transaction.set_rollback(True, using=site)
        with pytest.raises(TaskResultDoesNotExist):
            lost.refresh()
        result.refresh()
        assert result.status == READY
    assert ended(result).status == SUCCESSFUL
    assert orders(site) == joined.queue.count_tasks() == 1


def test_in_another_database_it_waits_for_the_commit_or_is_refused(site, beside):
    with transaction.atomic(using=site):
        if beside == "refuse":
            with pytest.raises(ConfigurationError, match="inside atomic"):
                order(site)
            return
        result = order(site)
        assert result.status == READY
        assert get_queue().count_tasks() == 0
        with pytest.raises(TaskResultDoesNotExist, match="stored at the commit of atomic"):
            result.refresh()
        with transaction.atomic(using=site):
            lost = order(site)
            transaction.set_rollback(True, using=site)
    eventually(lambda: tasks.add.get_result(result.id).status == SUCCESSFUL)
    assert tasks.add.get_result(result.id).enqueued_at == result.enqueued_at
    with pytest.raises(TaskResultDoesNotExist):
        lost.refresh()
    assert orders(site) == get_queue().count_tasks() == 1


def test_outside_of_a_block_it_is_stored_at_once(site, joined):
    result = order(site)
    assert ended(result).status == SUCCESSFUL
    assert orders(site) == 1


def unique(on_conflict: str) -> Any:
    return tasks.echo.using(unique_key="k", on_conflict=on_conflict)


@pytest.mark.parametrize("beside", ["wait"], indirect=True)
def test_the_task_that_has_the_key_may_wait_for_the_same_commit(site, beside):
    get_queue().pause()  # each enqueue is stored by itself: the first could start before it is replaced
    with transaction.atomic(using=site):
        first = unique("return").enqueue("first")
        assert unique("return").enqueue("second") == first
        replaced = unique("replace").enqueue("third")
        assert (replaced.id, replaced.args) == (first.id, ["third"])
        assert unique("return").enqueue("fourth") == replaced
    get_queue().resume()
    assert ended(first).return_value == [["third"], {}]
    assert get_queue().count_tasks() == 1


def test_the_task_that_has_the_key_may_be_part_of_the_block(site, joined):
    with transaction.atomic(using=site):
        first = unique("return").enqueue("first")
        assert unique("return").enqueue("second") == first
        replaced = unique("replace").enqueue("third")
        assert (replaced.id, replaced.args) == (first.id, ["third"])
        assert joined.get_result(first.id) == unique("return").enqueue("fourth") == replaced
    assert ended(first).return_value == [["third"], {}]
    assert get_queue().count_tasks() == 1
