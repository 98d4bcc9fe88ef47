"""The screen of schedules."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import pytest

from taskx import every
from taskx.testing import ManualClock

NOON = datetime(2026, 3, 27, 12, tzinfo=timezone.utc)
HOSTILE = """<script>alert('"&')</script>"""


@pytest.fixture
def clock():
    return ManualClock(NOON)


@pytest.fixture
def queue(make_queue, clock):
    """A queue that is not started, with two schedules."""
    queue = make_queue(clock=clock)
    queue.declare("report", HOSTILE)
    queue.schedule("nightly", "30 2 * * *", "report", tz="Europe/Berlin").store()
    queue.schedule(HOSTILE, every(3600), HOSTILE).store()
    return queue


def sections(response):
    """Return the texts of the rows of the page, one for each schedule."""
    found = re.findall(r"<tr>\n<th scope=\"row\".*?</tr>", response.text, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]*>", " ", part).split()) for part in found]


def test_a_schedule_is_shown_in_words_with_its_ticks(look, queue, clock):
    response = look(queue).get("/schedules")
    assert "2 schedules" in response.text
    assert HOSTILE not in response.text
    hourly, nightly = sections(response)
    assert "nightly report daily, at 02:30 30 2 * * * · Europe/Berlin in 14 h" in nightly
    assert "2026-03-28 02:30:00 2026-03-29 03:00:00 2026-03-30 02:30:00" in nightly
    assert "every 1 h" in hourly
    assert "no tick yet" in hourly
    assert "每 1 小时" in look(queue).get("/schedules", headers={"Accept-Language": "zh"}).text


def test_an_overdue_schedule_is_marked(look, queue, clock):
    clock.advance(timedelta(hours=1, seconds=30))
    assert "overdue" not in look(queue).get("/schedules").text
    clock.advance(timedelta(minutes=1))
    hourly, nightly = sections(look(queue).get("/schedules"))
    assert "overdue since 13:00" in hourly
    assert "overdue" not in nightly
    assert "no task 1.5 min ago" in hourly


def test_schedules_are_searched_and_paged(look, make_queue):
    queue = make_queue()
    queue.declare("t")
    for number in range(60):
        queue.schedule(f"s{number:02}", every(60), "t").store()
    browser = look(queue)
    assert len(sections(browser.get("/schedules"))) == 50
    following = browser.get("/schedules?after=s49")
    assert len(sections(following)) == 10
    assert "Next page" not in following.text
    assert len(sections(browser.get("/schedules?q=S1"))) == 10


def act(look, queue, action, **data):
    response = look(queue).post(
        f"/schedules/{action}", data={"name": "nightly", "back": "/schedules", **data}
    )
    assert (response.status_code, response.location) == (303, "/schedules"), response.text
    return queue.schedules().get("nightly")


def test_a_schedule_is_paused_and_resumed(look, queue):
    assert act(look, queue, "pause").paused
    assert "paused" in sections(look(queue).get("/schedules"))[1]
    assert not act(look, queue, "resume").paused


def test_a_schedule_is_triggered(look, queue):
    act(look, queue, "trigger")
    [task] = queue.iter_tasks()
    assert (task.type, task.created_by) == ("report", "schedule:nightly")


def test_missing_ticks_are_filled(look, queue):
    act(look, queue, "backfill", start="2026-03-20T00:00", end="2026-03-22T12:00")
    assert sorted(task.id for task in queue.iter_tasks()) == [
        f"nightly@2026-03-{day}T01:30:00Z" for day in (20, 21, 22)
    ]


def test_a_schedule_is_removed(look, queue):
    question = look(queue).post("/schedules/remove", data={"name": "nightly"})
    assert "Remove the schedule nightly?" in question.text
    assert "nightly" in queue.schedules()
    assert act(look, queue, "remove", confirmed="1") is None


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        ({"name": "none"}, 404, "none"),
        ({"start": "soon", "end": "now"}, 400, "start must be a time"),
        ({"start": "2026-03-02", "end": "2026-03-01"}, 400, "start"),
        ({"start": "2026-03-02", "end": "2030-03-01"}, 400, "future"),
        ({}, 400, "start must be a time"),
    ],
)
def test_wrong_input_is_refused(look, queue, data, status, words):
    response = look(queue).post("/schedules/backfill", data={"name": "nightly", **data})
    assert response.status_code == status
    assert words in response.text
    assert queue.count_tasks() == 0


@pytest.mark.parametrize("action", ["pause", "resume", "trigger", "backfill", "remove"])
def test_changes_need_the_permission(look, queue, action):
    browser = look(queue, permissions={"read", "pause", "requeue"})
    assert f"/schedules/{action}" not in browser.get("/schedules").text
    response = browser.post(f"/schedules/{action}", data={"name": "nightly"})
    assert response.status_code == 403
    assert not queue.schedules()["nightly"].paused
