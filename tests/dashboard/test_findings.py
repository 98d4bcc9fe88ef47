"""What is wrong, and why a task waits: sentences in both languages, each with what to do about it."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import get_args

import pytest
from werkzeug.routing import Map, Rule
from werkzeug.test import EnvironBuilder

from taskx import Health, Problem, Stats, TypeStats
from taskx.programs.dashboard import ALL
from taskx.programs.dashboard.display import Display
from taskx.programs.dashboard.explaining import linked, sentence
from taskx.programs.dashboard.findings import findings
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.screens import SCREENS
from taskx.stores.controls import Paused
from taskx.tasks.findings import ProblemKind, Reason, ReasonKind
from taskx.tasks.ids import new_id

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
LATER = NOW + timedelta(hours=2)
NO_PAUSE = Paused(False, ())

# The facts of each kind of problem, as ``Queue.health`` gives them.
PROBLEMS = {
    "repository": {"error": "x", "error_type": "E"},
    "disk": {"free": 1024},
    "stuck": {"node": "n", "name": "h:1", "threads": 3, "most": 1},
    "blocked_loop": {"node": "n", "name": "h:1", "seconds": 9.0, "stack": "", "task_id": "t"},
    "silent_node": {"nodes": {"n": 3600.0}, "number": 1, "lease": 30.0, "seconds": 3600.0},
    "nodes": {"type": "mail", "nodes": 0, "least": 1},
    "broker": {"node": "n", "name": "h:1", "error": "x"},
    "limit": {"limit": "api", "type": "mail"},
    "hold": {"limit": "api", "until": LATER, "seconds": 7200.0, "by": ""},
    "snoozes": {"task_id": "t", "type": "mail", "snoozes": 1001},
    "stuck_type": {"type": "mail", "waiting": 2, "threads": 1, "nodes": {"n": "h:1"}},
    "oldest_due": {"task_id": "t", "since": NOW, "seconds": 301.0, "most": 300.0},
    "failed": {"failed": 11, "types": {"mail": 11}, "more": False, "most": 10, "seconds": 300.0},
    "file_size": {"bytes": 2048, "most": 1024},
    "open_transaction": {"seconds": 900.0},
    "schedule_overdue": {"schedules": {"s": NOW}, "number": 1, "seconds": 90.0, "most": 60.0},
    "schedule_damaged": {"schedules": {"s": "x"}, "number": 1},
}
# The buttons: the action, and a field of its form.
BUTTONS = {
    "stuck": ("/nodes/stacks", "id", "n"),
    "nodes": ("/tasks/cancel", "q", "type:mail status:pending"),
    "hold": ("/types/release", "limit", "api"),
    "schedule_overdue": ("/schedules/trigger", "name", "s"),
}
# The facts of each kind of reason, as ``Queue.why`` gives them.
ENDED = {"at": NOW, "duration": 0.0001, "attempts": 2, "worker": "w", "error": ""}
AWAITED = {"id": "t", "type": "answer", "status": "pending", "since": NOW, "until": LATER}
REASONS = {
    "expired": {"expires_at": NOW},
    "stuck": {"node": "n", "name": "h:1", "stack": ""},
    "parents": {"parents": {"t": "running"}, "unfinished": 1, "of": 2, "more": False},
    "waiting": AWAITED,
    "turn": {"key": "k", "holder": "t", "status": "running", "type": "mail", "place": 2},
    "due": {"run_at": LATER, "seconds": 7200.0, "attempt": 2},
    "no_node": {"type": "mail", "nodes": ["h:1"], "stopping": []},
    "paused": {"type": "mail"},
    "hold": {"limit": "type/mail", "until": LATER, "by": ""},
    "slot": {"limit": "api", "max_concurrency": 1, "scope": "node", "holders": ["t"], "nodes": {}},
    "token": {"limit": "api", "count": 9, "period": 60.0, "seconds": 0.5},
    "suspect": {"crashes": 2, "others": ["t"]},
    "broker": {"nodes": ["h:1"], "error": "x"},
    "ahead": {"ahead": 3, "higher": 1, "more": False},
    "worker": {"nodes": ["h:1"], "running": 4, "buffered_on": ""},
    "dead_node": {"node": "n", "name": "h:1"},
    "silent_node": {"node": "n", "name": "h:1", "at": NOW},
    "cancel_requested": {"at": NOW},
    "timeout": {"timeout": 5.0, "seconds": 2.0},
    "running": {"seconds": 3.0, "attempt": 1, "worker": "w", "progress": 7, "state": ""},
    "completed": ENDED,
    "failed": {**ENDED, "error": "E: x"},
    "cancelled": {**ENDED, "attempts": 0},
    "damaged": {"damage": "x"},
    "repository": {"error": "x", "error_type": "E"},
}
ENGLISH = re.compile(r"[a-z]{2,} [a-z]{2,}|[A-Za-z]+ (?:is|are|the) ")


def test_each_kind_has_an_example():
    assert PROBLEMS.keys() == {*get_args(ProblemKind)}
    assert REASONS.keys() == {*get_args(ReasonKind)}


@pytest.fixture
def found(make_queue):
    """Return a function that says what is wrong with a queue, in a language, to a user."""
    urls = Map(
        Rule(f"/{screen.name}{part}", endpoint=f"{screen.name}{part}")
        for screen in SCREENS
        for part in ("", *(f"/{name}" for name in (*screen.parts, *screen.actions)))
    )
    queue = make_queue()

    def found(problems=(), language="en", permissions=ALL, types=None, paused=NO_PAUSE):
        headers = {"Accept-Language": language}
        request = Request(EnvironBuilder(headers=headers).get_environ(), queue, urls)
        request.permissions = frozenset(permissions)
        stats = Stats(
            types=types or {"mail": TypeStats(waiting=40)},
            answers=0,
            checked_at=NOW,
            period=3600.0,
            since=NOW,
            complete=True,
        )
        health = Health(tuple(problems), NOW)
        return [*findings(request, health, stats, paused)]

    return found


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_problem_says_what_is_wrong_and_what_to_do(found, kind):
    problem = Problem(kind, "the sentence of the queue", PROBLEMS[kind])
    [english] = found([problem])
    what, advice = english.parts
    assert what.endswith(". ")
    assert advice.endswith(".")
    assert bool(english.link) == (kind != "repository")
    if kind in BUTTONS:
        action, name, value = BUTTONS[kind]
        assert (english.action, english.fields[name]) == (action, value)
        assert not found([problem], permissions=())[0].action
    [chinese] = found([problem], "zh")
    what, advice = chinese.parts
    assert what.endswith("。")
    assert advice.endswith("。")
    assert not ENGLISH.search(chinese.text)


def test_a_type_that_nobody_runs_is_named_with_what_waits_for_it(found):
    [one] = found([Problem("nodes", "", PROBLEMS["nodes"])])
    assert one.text == (
        "No node runs mail: 40 tasks wait. Start a worker that has it, or cancel them."
    )


def test_pauses_and_types_that_fail_are_found_without_a_threshold(found):
    types = {
        "mail": TypeStats(failed=10, completed=30, error_share=0.25),
        "few": TypeStats(failed=9, completed=0, error_share=1.0),
        "rare": TypeStats(failed=10, completed=990, error_share=0.01),
    }
    failing, everything, one = found(types=types, paused=Paused(True, ("few",)))
    assert failing.text.startswith("mail fails: 10 of 40 tasks of the last hour.")
    assert (everything.action, everything.level) == ("/types/resume", "warn")
    assert one.fields == {"type": "few"}


@pytest.mark.parametrize("kind", REASONS)
def test_a_reason_is_said_in_both_languages(kind):
    reason = Reason(kind, "the sentence of the queue", REASONS[kind])
    assert sentence(reason, Display("en", NOW))
    chinese = sentence(reason, Display("zh", NOW))
    assert re.search("[\u4e00-\u9fff]", chinese)
    assert not ENGLISH.search(chinese)


def test_a_task_that_has_ended_says_so_in_the_units_of_the_page():
    reason = Reason("completed", "It completed after 0.0001 s.", ENDED)
    assert sentence(reason, Display("en", NOW)) == (
        "It completed at 12:00:00 UTC after its executor ran for 0.1 ms, in attempt 2 on w"
    )


def test_ids_in_a_sentence_are_short_links():
    task_id = new_id()
    shown = linked(f"<b> for {task_id}/approval.", lambda found: f"/task?id={found}")
    assert shown == (
        f'&lt;b&gt; for <a href="/task?id={task_id}/approval"><code>{task_id[9:23]}/approval'
        "</code></a>."
    )
