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
    said = taskx("resume", "email")
    assert (said.out, said.err) == ("", "email was not paused\n")
    taskx("pause", "email")
    assert taskx("resume", "emial").err == "emial was not paused; did you mean 'email'?\n"
    assert "email" in queue.paused


def test_a_task_that_was_cancelled_before_it_began_shows_no_duration(queue, taskx):
    queue.declare("email")
    task = queue.submit("email")
    task.cancel()
    shown = taskx("show", task.id).out
    assert "ended" in shown
    assert "after" not in shown


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


def test_a_type_that_nobody_knows_is_paused_only_if_a_person_says_yes(queue, taskx, monkeypatch):
    queue.declare("email")
    queue.submit("email")
    said = taskx("pause", "email", "emial")
    assert (said.code, said.out) == (2, "")
    assert "no node and no task has type 'emial'; did you mean 'email'?\n" in said.err
    assert "Pause emial? Nobody can be asked here: give --yes to do it" in said.err
    assert not queue.paused
    monkeypatch.setattr("taskx.programs.cli.changing._can_ask", lambda: True)
    assert taskx("pause", "emial", input="n\n").code == 1
    assert not queue.paused
    assert taskx("pause", "emial", input="y\n").code == 0
    assert taskx("pause", "emails", "--yes").out == "emails paused\n"
    assert {*queue.paused.types} == {"emial", "emails"}


@pytest.mark.parametrize("words", [[], ["email", "--all"]])
@pytest.mark.parametrize("command", ["pause", "resume"])
def test_a_pause_needs_types_or_all(taskx, command, words):
    said = taskx(command, *words)
    assert said.code == 2
    assert "name the types, or give --all" in said.err


# All that match


@pytest.fixture
def tasks(outside):
    """Three pending tasks of two types."""
    outside.declare("email", "sms")
    return [outside.submit(type, tags=["eu"]) for type in ("email", "sms", "email")]


def test_all_that_match_are_cancelled(tasks, outside, taskx):
    said = taskx("cancel", "--where", "type:email tag:eu", "--yes")
    assert (said.code, said.out) == (0, "2 tasks cancelled\n")
    assert [status(outside, task) for task in tasks] == ["cancelled", "pending", "cancelled"]


def test_a_dry_run_only_counts(tasks, outside, taskx):
    said = taskx("cancel", "--where", "type:email", "--dry-run")
    assert (said.code, said.out) == (0, "2 tasks would be changed (cancel)\n")
    [row] = taskx("delete", "-w", "type:email", "--dry-run", "--json").rows
    assert (row["action"], row["dry_run"], row["matched"], row["changed"]) == ("delete", True, 2, 0)
    assert outside.count_tasks(status="pending") == 3


@pytest.mark.parametrize("command", ["cancel", "requeue", "delete"])
def test_a_bulk_change_needs_a_yes_where_nobody_can_be_asked(
    failed, tasks, outside, taskx, command
):
    before = [task.to_dict() for task in outside.iter_tasks()]
    said = taskx(command, "--where", "type:email")
    assert said.code == 2
    assert "give --yes to do it, or --dry-run to only count" in said.err
    assert [task.to_dict() for task in outside.iter_tasks()] == before


def test_a_person_is_asked(tasks, outside, taskx, monkeypatch):
    monkeypatch.setattr("taskx.programs.cli.changing._can_ask", lambda: True)
    said = taskx("cancel", "--where", "type:email", input="n\n")
    assert said.code == 1
    assert "Cancel 2 tasks? [y/N]:" in said.err
    assert said.err.endswith("taskx: nothing was changed\n")
    assert outside.count_tasks(status="pending") == 3
    assert taskx("cancel", "--where", "type:email", input="y\n").code == 0
    assert outside.count_tasks(status="cancelled") == 2


def test_nobody_is_asked_about_nothing(outside, taskx):
    said = taskx("delete", "--where", "type:email")
    assert (said.code, said.out) == (0, "0 tasks deleted\n")


def test_a_limit_takes_some_of_those_that_match(tasks, outside, taskx):
    assert taskx("delete", "--where", "tag:eu", "--limit", "1", "--yes").out == "1 task deleted\n"
    assert outside.count_tasks() == 2


def test_failed_tasks_are_requeued_at_a_rate(failed, outside, taskx):
    said = taskx("requeue", "--where", "type:email", "--rate", "1/h", "--yes")
    assert said.code == 0
    assert said.out.startswith("1 task requeued; the last one starts in ")
    assert status(outside, failed) == "pending"


def test_a_group_of_failures_is_requeued(failed, outside, taskx):
    [group] = taskx("failures", "--json").rows
    said = taskx("requeue", "--group", group["group"], "--yes")
    assert (said.code, said.out) == (0, "1 task requeued\n")
    assert status(outside, failed) == "pending"
    said = taskx("requeue", "--group", group["group"], "--yes")
    assert said.code == 2
    assert f"there is no group '{group['group']}'" in said.err


def test_a_group_of_old_failures_is_found_too(queue, outside, taskx):
    @queue.executor()
    def old() -> None:
        raise ValueError("old")

    @queue.executor()
    def new() -> None:
        raise ValueError("new")

    first = queue.submit("old")
    queue.submit_many([new.task() for _ in range(1000)])
    with queue:
        assert queue.drain(PATIENCE)
    groups = {
        row["type"]: row["group"] for row in taskx("failures", "--at-most", "2000", "--json").rows
    }
    assert groups["old"] not in taskx("failures").out
    assert taskx("requeue", "--group", groups["old"], "--yes").code == 0
    assert status(outside, first) == "pending"


def test_a_task_is_requeued_with_other_params(queue, outside, taskx):
    @queue.executor()
    def email(to: str) -> None:
        raise ValueError(to)

    with queue:
        handle = queue.submit("email", {"to": "ann"})
        handle.exception(PATIENCE)
    said = taskx("requeue", handle.id, "--params", '{"to": "bob"}')
    assert (said.code, said.err) == (0, "")
    assert outside.get_task_status(handle.id).params == {"to": "bob"}
    assert "params before: {'to': 'ann'}" in taskx("show", handle.id).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the tasks by their ids, or by --where FILTER"),
        (["x", "--where", "type:email"], "name the tasks by their ids, or by --where FILTER"),
        (["x", "--limit", "1"], "--limit belongs to --where"),
        (["x", "--dry-run"], "--dry-run belongs to --where"),
        (["x", "--rate", "1/s"], "--rate belongs to --where or --group"),
        (["x", "y", "--params", "{}"], "--params and --from-step correct one task"),
        (
            ["--where", "type:email", "--from-step", "x"],
            "--params and --from-step correct one task",
        ),
        (["x", "--params", "{"], "--params is not JSON"),
        (["x", "--group", "y"], "--group names the tasks"),
        (["--where", "typ:email"], "did you mean 'type'?"),
        (["--where", "status:running", "--yes"], "status"),
        (["--where", "type:email", "--rate", "fast", "--yes"], "rate"),
    ],
)
def test_a_wrong_requeue_is_a_wrong_call(taskx, words, message):
    said = taskx("requeue", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err


def test_each_change_is_noted_with_who_made_it(tasks, outside, taskx, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    taskx("cancel", tasks[0].id)
    taskx("cancel", "nope")
    taskx("cancel", "--where", "type:email", "--dry-run")
    taskx("delete", "--where", "type:email", "--yes")
    taskx("pause", "sms", "--yes")
    taskx("resume", "--all")  # nothing was paused by it, so nothing is noted
    taskx("resume", "sms")
    noted = outside.changes()
    assert [(change.action, change.target) for change in reversed(noted)] == [
        ("cancel", tasks[0].id),
        ("delete", "type:email"),
        ("pause", "sms"),
        ("resume", "sms"),
    ]
    assert all(change.by.startswith("ann@") for change in noted)
    assert noted[2].detail["changed"] == 2


def test_a_filter_without_a_condition_changes_nothing(tasks, outside, taskx):
    said = taskx("delete", "--where", "", "--yes")
    assert said.code == 2
    assert outside.count_tasks() == 3


def test_an_interrupt_says_how_far_it_came(tasks, outside, taskx, monkeypatch):
    real = outside.delete_all

    def delete_all(filter, *, dry_run, at_most, on_progress):
        if not dry_run:
            on_progress(real(type="sms"))
            raise KeyboardInterrupt
        return real(filter, dry_run=True)

    monkeypatch.setattr(outside, "delete_all", delete_all)
    said = taskx("delete", "--where", "tag:eu", "--yes")
    assert said.code == 130
    assert "1 task changed before that; the same call goes on from there" in said.err
