"""``taskx why``, ``stats``, ``check``, ``failures`` and ``top``."""

from __future__ import annotations

import json

import pytest
from helpers import PATIENCE

from taskx import TaskFailed, answer


@pytest.fixture
def ended(queue):
    """Three tasks that have ended: two failures of one cause, and one that completed."""

    @queue.executor()
    def email(to: str) -> str:
        if to == "bad":
            raise ValueError("no such \x1b[31maddress")
        return to

    with queue:
        handles = [queue.submit("email", {"to": to}) for to in ("bad", "ann", "bad")]
        for handle in handles:
            try:
                handle.result(PATIENCE)
            except TaskFailed:
                continue
    return handles


def test_why_says_a_sentence_for_each_reason(queue, taskx):
    queue.declare("email")
    handle = queue.submit("email", delay=3600)
    queue.pause("email")
    said = taskx("why", handle.id)
    assert said.code == 0
    assert said.lines == [str(reason) for reason in queue.why(handle.id)]
    assert "The type 'email' is paused" in said.out
    assert [row["kind"] for row in taskx("why", handle.id, "--json").rows] == [
        reason.kind for reason in queue.why(handle.id)
    ]


def test_stats_have_a_row_for_each_type(ended, outside, taskx):
    outside.declare("sms")
    outside.submit("sms")
    outside.submit("sms", delay=60)
    said = taskx("stats")
    head, email, sms = (line.split() for line in said.lines)
    assert head[:6] == ["TYPE", "WAITING", "DELAYED", "BLOCKED", "RUNNING", "OLDEST"]
    assert email[:5] == ["email", "-", "-", "-", "-"]
    assert email[5:8] == ["1", "2", "66.7%"]
    assert sms[:5] == ["sms", "1", "1", "-", "-"]


def test_stats_say_how_many_answers_are_to_be_given(outside, taskx):
    outside.submit_flow(answer("legal"))
    assert "1 answer to give: taskx answers lists them" in taskx("stats").err


def test_stats_can_be_of_some_types_and_of_a_time(ended, outside, taskx):
    outside.declare("sms")
    outside.submit("sms")
    said = taskx("stats", "email", "--since", "2h")
    assert [line.split()[0] for line in said.lines] == ["TYPE", "email"]
    assert [row["type"] for row in taskx("stats", "sms", "--json").rows] == ["sms"]
    unknown = taskx("stats", "emial")
    assert (unknown.code, unknown.out) == (0, "")
    words = "no task that was read or counted has type 'emial'; did you mean 'email'?\n"
    assert unknown.err == words


def test_stats_say_if_they_are_not_complete(ended, outside, taskx, monkeypatch):
    stats = outside.stats
    outside.declare("sms")
    outside.submit("sms", delay=60)
    monkeypatch.setattr(outside, "stats", lambda **given: stats(at_most=1, **given))
    said = taskx("stats")
    assert "the numbers are at least so high" in said.err
    assert "not all was read, or the counts begin at" in said.err


def test_the_json_of_stats_is_a_type_a_line(ended, outside, taskx):
    [row] = taskx("stats", "--json", "--period", "1d").rows
    expected = outside.stats(period=86400).to_dict()
    assert row["type"] == "email"
    assert row["failed"] == 2
    assert row.keys() == {"type", *expected["types"]["email"], *expected} - {"types"}


def test_a_check_is_unhealthy_without_a_node(queue, taskx):
    queue.declare("email")
    queue.submit("email")
    said = taskx("check")
    assert said.code == 1
    assert said.lines == ["0 live nodes run tasks of this repository; at least 1 must."]
    [row] = taskx("check", "--json").rows
    assert not row["ok"]
    assert row["problems"][0]["kind"] == "nodes"


def test_a_check_is_fine_with_other_thresholds(queue, taskx):
    queue.declare("email")
    queue.submit("email")
    thresholds = ["--max-age", "--max-failed", "--max-size", "--max-overdue"]
    said = taskx("check", "--nodes", "0", *(word for each in thresholds for word in (each, "off")))
    assert (said.code, said.out) == (0, "All is well.\n")


def test_the_thresholds_of_a_check_are_options(ended, taskx):
    fine = ["check", "--nodes", "0"]
    assert taskx(*fine, "--max-failed", "2").code == 0
    said = taskx(*fine, "--max-failed", "1", "--within", "1h")
    assert said.code == 1
    assert "2 tasks" in said.out
    with_nodes = taskx("check", "--nodes", "email=2", "--nodes", "sms=0", "--json").rows[0]
    assert {"type": "email", "nodes": 0, "least": 2} in [
        problem["facts"] for problem in with_nodes["problems"]
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "x"], "--nodes takes one number, or numbers of types"),
        (["--nodes", "1", "--nodes", "2"], "--nodes takes one number, or numbers of types"),
        (["--nodes", "1", "--nodes", "email=2"], "--nodes takes one number, or numbers of types"),
        (["--max-age", "soon"], "'soon' is not a duration"),
        (["--max-size", "big"], "'big' is not a size: write it as 500M or 2G"),
        (["--max-size", "2G"], "file_size requires a repository in a file"),
    ],
)
def test_a_wrong_threshold_is_a_wrong_call(taskx, words, message):
    said = taskx("check", *words)
    assert said.code == 2
    assert message in said.err


def test_failures_are_groups(ended, taskx):
    said = taskx("failures")
    assert said.code == 0
    head, row = said.lines
    assert head.split() == ["GROUP", "COUNT", "TYPE", "LAST", "ERROR", "PLACE", "EXAMPLE"]
    assert row.split()[1:3] == ["2", "email"]
    assert "no such \\x1b[31maddress" in row
    [group] = taskx("failures", "--json").rows
    assert group["group"] == row.split()[0]
    assert group["count"] == 2
    assert set(group["task_ids"]) == {ended[0].id, ended[2].id}


def test_failures_can_be_of_a_type_and_of_a_time(ended, taskx):
    assert taskx("failures", "--type", "sms").err == "no failed task matches\n"
    assert taskx("failures", "--since", "0s").err == "no failed task matches\n"
    assert len(taskx("failures", "--type", "email", "--since", "1d").lines) == 2


def test_failures_say_when_not_all_were_read(ended, taskx):
    assert "were not read" in taskx("failures", "--at-most", "1").err


def test_nothing_has_failed(taskx):
    assert taskx("failures").err == "no task has failed\n"


def test_top_in_a_pipe_prints_the_state_once(ended, outside, taskx):
    outside.declare("\x1b[2J", "sms")
    outside.submit("\x1b[2J", delay=60)
    outside.pause("sms")
    said = taskx("top", "--period", "1h")
    assert said.code == 0
    assert "\x1b" not in said.out
    assert "0 waiting" in said.lines[1]
    assert "failed" in said.lines[1]
    assert said.lines[2] == "paused: sms"
    assert any(line.startswith("email") for line in said.lines)


def test_top_shows_what_runs(queue, taskx, gate):
    @queue.executor()
    def email(ctx) -> None:
        ctx.progress(40, "half \x1b[2J way")
        gate()

    with queue:
        handle = queue.submit("email")
        gate.wait_for()
        said = taskx("top")
        [row] = taskx("top", "--json").rows
        gate.open()
        handle.result(PATIENCE)
    line = next(line for line in said.lines if handle.id in line)
    assert "email" in line.split()
    assert [task["id"] for task in row["running"]] == [handle.id]
    assert row["types"]["email"]["running"] == 1
    assert json.loads(json.dumps(row)) == row


def test_stats_of_nothing_print_nothing(taskx):
    said = taskx("stats")
    assert (said.code, said.out, said.err) == (0, "", "no type has a task or an executor\n")
