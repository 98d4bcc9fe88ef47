"""The beginning of an id is enough wherever a command takes the id of a task."""

from __future__ import annotations

import pytest

from taskx import Task, TaskStatus


@pytest.fixture
def two(queue):
    """Two tasks whose ids begin alike."""
    queue.declare("email")
    for task_id in ("0199aa-one", "0199ab-two"):
        queue.submit("email", id=task_id)
    return queue


@pytest.mark.parametrize("command", ["show", "why", "cancel", "delete"])
def test_a_command_takes_the_beginning_of_an_id(two, taskx, command):
    assert taskx(command, "0199aa").code == 0


def test_a_change_names_the_whole_id(two, taskx):
    assert taskx("cancel", "0199aa", "0199ab").lines == [
        "0199aa-one cancelled",
        "0199ab-two cancelled",
    ]
    assert taskx("requeue", "0199ab", "--json").rows == [
        {"id": "0199ab-two", "outcome": "requeued"}
    ]
    assert two.get_task_status("0199ab-two").status is TaskStatus.PENDING
    assert taskx("tail", "0199aa", "--no-follow").code == 0
    assert taskx("wait", "0199aa").code == 1


def test_a_new_task_may_depend_on_a_beginning(two, taskx):
    (task_id,) = taskx("submit", "email", "--depends-on", "0199aa", "--depends-on", "0199ab").lines
    assert [*two.get_task_status(task_id).depends_on] == ["0199aa-one", "0199ab-two"]


def test_a_beginning_of_several_ids_changes_nothing(two, taskx):
    said = taskx("cancel", "0199a")
    assert (said.code, said.out) == (2, "")
    assert "several ids begin with '0199a'" in said.err
    assert "0199aa-one (email, pending)" in said.err
    assert "0199ab-two (email, pending)" in said.err
    assert two.count_tasks(status="pending") == 2


def test_an_id_is_itself_even_if_another_begins_with_it(two, taskx):
    two.submit("email", id="0199")
    assert taskx("cancel", "0199").lines == ["0199 cancelled"]


def test_what_a_task_waits_for_does_not_make_its_id_unclear(two, taskx):
    for name in ("0199aa-one/approval", "0199aa-one/wake"):
        two.submit("email", id=name)
    assert taskx("cancel", "0199aa").lines == ["0199aa-one cancelled"]
    assert taskx("cancel", "0199aa-one/a").lines == ["0199aa-one/approval cancelled"]


def test_a_message_names_a_few_of_many(two, taskx):
    two.submit_many([Task(type="email", id=f"0199b{n:03}") for n in range(60)])
    said = taskx("cancel", "0199b")
    assert (said.code, said.err.count("(email, pending)")) == (2, 5)
    assert "and others; give more of the id" in said.err


def test_an_unknown_id_is_not_found(two, taskx):
    assert taskx("show", "0200").code == 3
