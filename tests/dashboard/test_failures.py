"""The screen of failed tasks in groups."""

from __future__ import annotations

import re
from datetime import timedelta
from html import unescape

import pytest

HOSTILE = """<script>alert('"&')</script>"""


@pytest.fixture
def queue(make_queue, clock):
    """A queue with three failed tasks: two now, and one of another kind two days ago."""
    queue = make_queue(worker_num=1, clock=clock)
    queue.mended = False

    @queue.executor("broken")
    def broken(why: str) -> None:
        if not queue.mended:
            raise ValueError(why)

    @queue.executor(HOSTILE)
    def other() -> None:
        raise KeyError(HOSTILE)

    queue.start()
    queue.submit(HOSTILE).exception(60)
    clock.advance(timedelta(days=2))
    for n in range(2):
        queue.submit("broken", {"why": f"reason {n}"}).exception(60)
    return queue


def rows(response):
    """Return the texts of the rows of the table."""
    body = re.search(r"<tbody>(.*)</tbody>", response.text, re.DOTALL)
    found = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL) if body else []
    return [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in found]


def test_groups_have_their_counts_by_period(look, queue):
    response = look(queue).get("/failures")
    first, second = rows(response)
    assert first.startswith("2 broken ValueError reason 1 · ")
    assert "in broken · example 2 2 " in first
    assert second.startswith("1 ")
    assert "example 0 0 " in second
    assert HOSTILE not in response.text


def test_a_period_can_be_chosen(look, queue):
    browser = look(queue)
    assert len(rows(browser.get("/failures?period=day"))) == 1
    assert len(rows(browser.get("/failures?period=all"))) == 2
    assert len(rows(browser.get("/failures?period=nonsense"))) == 2


def test_a_page_without_failures_says_so(look, make_queue):
    assert "No task has failed in this period." in look(make_queue()).get("/failures").text


def form(response, place=0):
    """Return the hidden fields of a form that runs a group again."""
    forms = re.findall(r'action="/failures/requeue".*?</form>', response.text, re.DOTALL)
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', forms[place])
    return {name: unescape(value) for name, value in fields}


@pytest.mark.every_store
def test_a_group_runs_again(look, queue, clock):
    browser = look(queue)
    given = form(browser.get("/failures"))
    queue.mended = True
    question = browser.post("/failures/requeue", data=given)
    assert "Run all 2 failed tasks of this group again?" in question.text
    assert queue.count_tasks(status="failed") == 3
    response = browser.post("/failures/requeue", data={**given, "confirmed": 1})
    assert (response.status_code, response.location) == (303, "/failures")
    assert "2 tasks run again." in browser.get("/failures").text
    assert queue.drain(60)
    assert len(rows(browser.get("/failures"))) == 1
    response = browser.post("/failures/requeue", data=given)
    assert response.status_code == 404


def test_a_group_runs_again_at_a_rate(look, queue, clock):
    browser = look(queue)
    queue.pause()
    given = {**form(browser.get("/failures")), "rate": "1/h", "confirmed": "1"}
    browser.post("/failures/requeue", data=given)
    times = sorted(task.run_at or clock.now() for task in queue.iter_tasks(type="broken"))
    assert times[1] - times[0] == timedelta(hours=1)
    wrong = browser.post("/failures/requeue", data={**given, "rate": "much"})
    assert wrong.status_code in (400, 404)


def test_running_again_needs_its_permission(look, queue):
    browser = look(queue, permissions={"read"})
    page = browser.get("/failures")
    assert "/failures/requeue" not in page.text
    assert "reason 1" in page.text
    response = browser.post("/failures/requeue", data={"type": "broken"})
    assert response.status_code == 403
    assert queue.count_tasks(status="failed") == 3
