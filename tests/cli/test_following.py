"""``taskx wait``, ``tail`` and ``watch``."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, eventually

from taskx.programs.cli import following
from taskx.programs.cli.following import Tail, _new_lines

from .conftest import call


@pytest.fixture
def worker(queue, gate):
    """A started queue with an executor for each outcome."""

    @queue.executor(capture_log=True)
    def email(ctx, to: str) -> dict:
        ctx.logger.info("sending to %s", to)
        ctx.progress(40, "half \x1b[2J way")
        gate()
        if to == "bad":
            raise ValueError("no such \x1b[31maddress")
        return {"to": to, "token": "hunter2"}

    with queue:
        yield queue
        gate.open()


def test_wait_prints_the_result_of_a_completed_task(worker, taskx, gate):
    gate.open()
    handle = worker.submit("email", {"to": "ann"})
    said = taskx("wait", handle.id)
    assert (said.code, said.out, said.err) == (0, '{"to": "ann", "token": "***"}\n', "")


def test_wait_ends_with_1_after_a_failure(worker, taskx, gate):
    gate.open()
    handle = worker.submit("email", {"to": "bad"})
    said = taskx("wait", handle.id, "--timeout", "1h")
    assert (said.code, said.out) == (1, "")
    assert said.err == f"taskx: task {handle.id}: failed: ValueError: no such \\x1b[31maddress\n"
    [row] = taskx("wait", handle.id, "--json").rows
    assert row["status"] == "failed"


def test_wait_ends_with_1_after_a_cancel(outside, taskx):
    outside.declare("email")
    handle = outside.submit("email")
    handle.cancel()
    said = taskx("wait", handle.id)
    assert (said.code, said.err) == (1, f"taskx: task {handle.id}: cancelled\n")


def test_wait_ends_with_1_after_its_timeout(outside, taskx):
    outside.declare("email")
    handle = outside.submit("email")
    said = taskx("wait", handle.id, "--timeout", "10ms")
    assert (said.code, said.out) == (1, "")
    assert f"taskx: task {handle.id} has not ended within 0.01 s" in said.err


def test_wait_knows_at_once_that_there_is_no_such_task(taskx):
    assert taskx("wait", "nope").code == 3


def test_tail_prints_the_log_and_the_outcome(worker, taskx, gate):
    gate.open()
    handle = worker.submit("email", {"to": "bad"})
    handle.exception(PATIENCE)
    said = taskx("tail", handle.id)
    assert said.code == 0
    assert "\x1b" not in said.out
    assert said.lines[1].endswith("INFO taskx: sending to bad")
    assert said.lines[-2:] == [
        "40% half \\x1b[2J way",
        "failed: ValueError: no such \\x1b[31maddress",
    ]


def test_tail_follows_until_the_task_has_ended(worker, taskx, gate):
    handle = worker.submit("email", {"to": "ann"})
    gate.wait_for()
    said = []
    follower = threading.Thread(
        target=lambda: said.append(taskx("tail", handle.id, "--json", "--interval", "10ms"))
    )
    follower.start()
    gate.open()
    follower.join(PATIENCE)
    [ended] = said
    events = [(row["event"], row.get("status")) for row in ended.rows]
    assert events[-1] == ("status", "completed")
    assert ("log", None) in events
    assert {row["id"] for row in ended.rows} == {handle.id}


def test_tail_ends_when_the_task_is_deleted(outside, taskx, monkeypatch):
    outside.declare("email")
    handle = outside.submit("email")
    monkeypatch.setattr(
        following, "time", SimpleNamespace(sleep=lambda _: outside.delete(handle.id))
    )
    said = taskx("tail", handle.id)
    assert (said.code, said.err) == (0, f"task {handle.id} was deleted\n")


def test_tail_of_a_type_shows_what_runs(worker, taskx, gate):
    handle = worker.submit("email", {"to": "ann"})
    gate.wait_for()
    eventually(lambda: handle.task().progress)
    said = taskx("tail", "--type", "email", "--no-follow")
    assert said.code == 0
    assert said.lines == [f"{handle.id} running", f"{handle.id} 40% half \\x1b[2J way"]
    assert said.err == ""
    other = taskx("tail", "--type", "emial", "--no-follow")
    assert other.out == ""
    assert other.err == "no node and no task has type 'emial'; did you mean 'email'?\n"


@pytest.mark.parametrize("words", [[], ["an-id", "--type", "email"]])
def test_tail_needs_ids_or_a_type(taskx, words):
    said = taskx("tail", *words)
    assert said.code == 2
    assert "name the tasks by their ids, or by --type" in said.err


def test_tail_shows_the_beginning_of_a_long_message(queue, taskx):
    queue.executor("email")(lambda ctx: ctx.progress(40, "x" * 5000))
    with queue:
        handle = queue.submit("email")
        handle.result(PATIENCE)
    assert f"100% {'x' * 199}…\n" in taskx("tail", handle.id).out
    told = [row.get("message") for row in taskx("tail", handle.id, "--json").rows]
    assert "x" * 5000 in told


def test_tail_shows_what_a_task_emits(queue, taskx):
    @queue.executor("email")
    def email(ctx):
        ctx.emit("Dear Ann")
        ctx.emit({"password": "secret"})

    with queue:
        handle = queue.submit("email")
        handle.result(PATIENCE)
    assert taskx("tail", handle.id).out.startswith('Dear Ann\n{"password": "***"}\n')
    rows = [row for row in taskx("tail", handle.id, "--json").rows if row["event"] == "chunk"]
    assert (rows[0]["value"], rows[0]["position"]) == ("Dear Ann", "1-1")


def test_a_tail_tells_each_thing_once(outside):
    outside.declare("email")
    task = outside.submit("email").task()
    tail = Tail(outside)
    assert [event["status"] for event in tail.news(task)] == ["pending"]
    assert [*tail.news(task)] == []
    task.log, task.progress = "one\n", 10
    assert [event["event"] for event in tail.news(task)] == ["log", "progress"]
    task.log = "one\ntwo\n"
    assert [event["line"] for event in tail.news(task)] == ["two"]
    assert tail.open == [task.id]


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "", []),
        ("", "a\nb\n", ["a", "b"]),
        ("a\nb\n", "a\nb\nc\n", ["c"]),
        ("a\nb\n", "b\nc\n", ["c"]),  # the beginning was cut off
        ("a\nb\n", "x\ny\n", ["x", "y"]),
        ("a\n", "a\n\n\nb\n", ["", "", "b"]),
        # A message of two lines, of which the second is always the same.
        ("1\nend\n2\nend\n", "2\nend\n3\nend\n4\nend\n", ["3", "end", "4", "end"]),
        ("--- attempt\n1\nend\n2\nend\n", "--- attempt\n2\nend\n3\nend\n", ["3", "end"]),
        ("--- attempt\n1\nend\n", "--- attempt\n5\nend\n", ["5", "end"]),
    ],
)
def test_only_the_new_lines_of_a_log_are_printed(before, now, new):
    assert _new_lines(before, now) == new


def test_watch_in_a_pipe_runs_a_command_once_or_so_often(outside, taskx):
    outside.declare("email")
    outside.submit("email")
    once = taskx("watch", "list", "type:email", "--limit", "5")
    header = once.out.splitlines()[0].split()  # the width of a column grows with the age of a task
    assert header == taskx("list", "type:email").lines[0].split()
    assert len(once.lines) == 2
    thrice = taskx("watch", "--times", "3", "--interval", "0s", "list", "--json")
    assert len(thrice.rows) == 3


def test_watch_ends_with_the_code_of_its_last_command(taskx):
    assert taskx("watch", "check").code == 1
    assert taskx("watch", "why", "nope").code == 3


def test_only_commands_that_read_can_be_watched(taskx):
    said = taskx("watch", "cancel", "x")
    assert said.code == 2
    assert "'cancel' cannot be repeated: use list, show" in said.err


@pytest.mark.parametrize("words", [("nodes", "stop", "x"), ("schedules", "trigger", "nightly")])
@pytest.mark.parametrize("options", [[], ["--repository", "show"], ["--json", "--repository=x"]])
def test_a_change_is_not_repeated(words, options):
    said = call("watch", words[0], *options, *words[1:])
    assert (said.code, said.out) == (2, "")
    assert said.err == f"taskx: `{words[0]} {words[1]}` changes something: it is not repeated\n"


def test_the_value_of_an_option_is_no_change():
    said = call("watch", "schedules", "--repository", "pause", "show", "nightly")
    assert (said.code, "changes something" in said.err) == (5, False)  # there is no file `pause`


def test_a_task_may_have_the_name_of_an_action(outside, taskx):
    outside.declare("email")
    outside.submit("email", id="stop")
    assert taskx("watch", "show", "stop").code == 0
