"""``taskx cancel``, ``requeue``, ``delete``, ``prune``, ``pause`` and ``resume``."""

from __future__ import annotations

import pytest
from helpers import PATIENCE

from taskx import TaskStatus


@pytest.fixture
def failed(queue):
    """A task that has failed."""

    @queue.executor()
    def email() -> None:
        raise ValueError("no")

    with queue:
        handle = queue.submit("email")
        handle.exception(PATIENCE)
    return handle


def status(queue, handle) -> TaskStatus:
    return queue.get_task_status(handle.id).status


def test_a_pending_task_is_cancelled(queue, taskx):
    queue.declare("email")
    one, two = queue.submit("email"), queue.submit("email")
    said = taskx("cancel", one.id, two.id)
    assert (said.code, said.lines) == (0, [f"{one.id} cancelled", f"{two.id} cancelled"])
    assert status(queue, one) == status(queue, two) == "cancelled"


def test_a_running_task_is_asked_to_stop(queue, taskx, gate):
    @queue.executor()
    def email() -> None:
        gate()

    with queue:
        handle = queue.submit("email")
        gate.wait_for()
        rows = taskx("cancel", handle.id, "--json").rows
        gate.open()
    assert rows == [{"id": handle.id, "outcome": "asked to stop"}]


def test_an_error_of_one_task_does_not_keep_the_others_back(queue, taskx):
    queue.declare("email")
    one, two = queue.submit("email"), queue.submit("email")
    queue.cancel_task(one.id)
    said = taskx("cancel", one.id, "nope", two.id)
    assert said.code == 4  # that of the first error
    assert said.lines == [f"{two.id} cancelled"]
    assert "no task with id 'nope'" in said.err
    assert status(queue, two) == "cancelled"


def test_a_failed_task_is_requeued(failed, outside, taskx):
    said = taskx("requeue", failed.id)
    assert (said.code, said.out) == (0, f"{failed.id} requeued\n")
    assert status(outside, failed) == "pending"
    assert taskx("requeue", failed.id).code == 4


def test_a_task_is_deleted(failed, outside, taskx):
    assert taskx("delete", failed.id).out == f"{failed.id} deleted\n"
    assert taskx("show", failed.id).code == 3
    assert taskx("delete", failed.id).code == 3


def test_prune_deletes_what_ended_before(failed, outside, taskx):
    assert taskx("prune", "--older", "1h", "--yes").out == "0 deleted\n"
    said = taskx("prune", "--older", "0s", "--dry-run")
    assert said.out == "at most 1 task would be deleted\n"
    assert taskx("prune", "--older", "0s", "--status", "completed", "--yes").out == "0 deleted\n"
    assert taskx("prune", "--older", "0s", "--yes", "--json").rows == [{"deleted": 1}]
    assert taskx("show", failed.id).code == 3


def test_prune_needs_a_yes_where_nobody_can_be_asked(failed, outside, taskx):
    said = taskx("prune", "--older", "0s")
    assert said.code == 2
    assert "give --yes to do it, or --dry-run to only count" in said.err
    assert taskx("show", failed.id).code == 0


def test_types_are_paused_and_resumed(queue, taskx):
    queue.declare("email")
    queue.submit("email")
    said = taskx("pause", "email")
    assert (said.code, said.out, said.err) == (0, "email paused\n", "")
    assert "email" in queue.paused
    assert taskx("resume", "email", "--json").rows == [{"type": "email", "paused": False}]
    assert not queue.paused
    assert taskx("resume", "email").err == "email was not paused\n"


def test_all_types_are_paused_and_resumed(queue, taskx):
    assert taskx("pause", "--all").out == "all types paused\n"
    assert queue.paused.everything
    said = taskx("resume", "email")
    assert (
        said.err
        == "email was not paused\nall types are still paused: taskx resume --all ends this\n"
    )
    assert taskx("resume", "--all").code == 0
    assert not queue.paused


def test_an_unknown_type_is_paused_with_a_suggestion(queue, taskx):
    queue.declare("email")
    queue.submit("email")
    said = taskx("pause", "emial")
    assert said.code == 0
    assert said.err == "no node and no task has type 'emial'; did you mean 'email'?\n"


@pytest.mark.parametrize("words", [[], ["email", "--all"]])
@pytest.mark.parametrize("command", ["pause", "resume"])
def test_a_pause_needs_types_or_all(taskx, command, words):
    said = taskx(command, *words)
    assert said.code == 2
    assert "name the types, or give --all" in said.err
