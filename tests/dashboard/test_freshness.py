"""Unchanged pages: when a page is made again, and when it is not."""

from __future__ import annotations

import os

import pytest

from taskx import Queue, SQLiteRepository
from taskx.programs.dashboard import ALL, Dashboard
from taskx.programs.dashboard.screens import overview


@pytest.fixture
def repository(database, clock):
    with SQLiteRepository(database, clock=clock) as repository:
        yield repository


@pytest.fixture
def queue(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.declare("report")
    queue.submit("report")  # the first write opens the connection
    return queue


@pytest.fixture
def asks(look, queue):
    """Return a function that asks for a page with the ETag of the last answer; it returns the status."""
    browser = look(queue)
    etags = {}

    def ask(path="/tasks", **headers):
        known = {"If-None-Match": etags[path]} if path in etags else {}
        answer = browser.get(path, headers={**known, **headers})
        etags[path] = answer.headers.get("ETag", "")
        return answer.status_code

    ask.browser = browser
    return ask


def test_a_page_is_not_made_while_nothing_changes(asks, queue, monkeypatch):
    assert asks("/") == 200
    monkeypatch.setattr(overview, "show", None)
    monkeypatch.setattr(Queue, "stats", None)  # a call would fail
    assert asks("/") == 304


def test_a_write_of_the_own_queue_changes_a_page(asks, queue):
    assert asks() == 200
    assert asks() == 304
    queue.submit("report")
    assert asks() == 200
    queue.pause("report")
    assert asks() == 200
    assert asks() == 304


def test_a_write_of_another_process_changes_a_page(asks, queue, database, clock):
    assert asks() == 200
    with SQLiteRepository(database, clock=clock) as other:  # has connections of its own
        Queue(other).pause()
    assert asks() == 200
    assert asks() == 304


def test_a_page_is_made_again_after_five_seconds(asks, queue, clock):
    assert asks() == 200
    assert asks() == 304
    clock.advance(5)
    assert asks() == 200


def test_pages_of_other_languages_users_and_permissions_are_different(queue):
    app = Dashboard(
        queue,
        permissions=lambda environ: ALL if environ["REMOTE_USER"] == "ann" else {"read"},
    )
    from werkzeug.test import Client

    seen = set()
    for user in ("ann", "ben", "cid"):
        for language in ("en", "zh"):
            answer = Client(app).get(
                "/tasks",
                headers={"Accept-Language": language, "Sec-Fetch-Site": "same-origin"},
                environ_overrides={"REMOTE_USER": user},
            )
            seen.add(answer.headers["ETag"])
    assert len(seen) == 6


def test_two_processes_have_different_etags(queue, look):
    assert look(queue).get("/").headers["ETag"] != look(queue).get("/").headers["ETag"]


def test_a_forked_process_has_other_etags(asks, monkeypatch):
    """Its counters of changes may have the same values."""
    assert asks() == 200
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert asks() == 200
    assert asks() == 304


def test_a_page_with_a_notice_is_not_kept(asks, queue):
    assert asks() == 200
    asks.browser.post("/tasks/cancel", data={"back": "/tasks"})  # nothing was selected
    assert asks() == 200
    assert asks() == 200
    assert asks() == 304


def test_a_page_that_refreshes_itself_leaves_a_notice_to_the_next_page(asks):
    """It may be the page of before the action, or one in another window."""
    assert asks() == 200
    asks.browser.post("/tasks/cancel", data={"back": "/tasks"})
    shown = [
        '<p class="notice' in asks.browser.get("/tasks", headers=headers).text
        for headers in ({"Taskx-Refresh": "1"}, {}, {})
    ]
    assert shown == [False, True, False]


def test_pages_are_not_kept_by_proxies(asks, queue):
    headers = asks.browser.get("/").headers
    assert headers["Cache-Control"] == "private, no-cache"
    assert {*headers["Vary"].split(", ")} >= {"Cookie", "Accept-Language", "Authorization"}
