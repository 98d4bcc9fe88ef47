"""Pages: routes, headers, static files, and what an unchanged page costs."""

from __future__ import annotations

import gzip
import re

import pytest
from storage.repositories import TinyRepository

from taskx.programs.dashboard import Dashboard
from taskx.programs.dashboard.screens import SCREENS
from taskx.stores.adapter import EightMethodAdapter
from taskx.tasks.writes import Update

PATHS = [screen.path or f"/{screen.name}" for screen in SCREENS if screen.letter]


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_html_without_inline_scripts_and_styles(look, path):
    answer = look().get(path)
    assert answer.status_code == 200
    assert answer.mimetype == "text/html"
    assert not re.search(r"<style|<script(?! src=)| style=| on\w+=|javascript:", answer.text)


@pytest.mark.parametrize("path", PATHS)
def test_an_unchanged_page_is_not_sent_again(look, repository, path):
    browser = look()
    first = browser.get(path)
    again = browser.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304
    assert again.data == b""


@pytest.mark.parametrize("path", PATHS)
def test_head_answers_as_get_without_a_body(look, path):
    answer = look().head(path)
    assert answer.status_code == 200
    assert answer.data == b""


def test_screens_have_different_letters():
    letters = [screen.letter for screen in SCREENS if screen.letter]
    assert len({*letters}) == len(letters)


def test_an_unknown_page_is_not_found(look):
    answer = look().get("/nowhere")
    assert answer.status_code == 404
    assert "Not found" in answer.text


def test_a_page_links_to_itself_under_its_mount_point(look):
    answer = look().get("/", base_url="http://localhost/admin/taskx")
    links = re.findall(r'(?:href|src|action|data-url)="([^"#]*)"', answer.text)
    assert links
    assert all(link.startswith("/admin/taskx/") for link in links)


def test_static_files_are_kept_by_browsers_and_packed(look):
    page = look().get("/")
    for link in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        answer = look().get(link, headers={"Accept-Encoding": "gzip"})
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        plain = look().get(link)
        assert gzip.decompress(answer.data) == plain.data
        assert answer.headers["ETag"] != plain.headers["ETag"]


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_static_file_that_a_browser_has_is_not_sent_again(look, encoding):
    first = look().get("/static/taskx.css", headers={"Accept-Encoding": encoding})
    known = {"Accept-Encoding": encoding, "If-None-Match": first.headers["ETag"]}
    assert look().get("/static/taskx.css", headers=known).status_code == 304


@pytest.mark.parametrize("name", ["nothing.css", "..", "%2e%2e/app.py"])
def test_other_files_are_not_served(look, name):
    assert look().get(f"/static/{name}").status_code == 404


def test_security_headers_are_on_every_answer(look):
    for path in ("/", "/nowhere", "/static/refresh.js"):
        headers = look().get(path).headers
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"


def test_only_a_queue_has_a_dashboard():
    with pytest.raises(Exception, match="queue must be a Queue, not str"):
        Dashboard("queue")


@pytest.mark.parametrize("path", PATHS)
def test_a_page_needs_only_the_eight_methods(look, make_queue, path):
    queue = make_queue(EightMethodAdapter(TinyRepository()))
    queue.declare("report")
    task_id = queue.submit("report").id
    browser = look(queue)
    answer = browser.get(path)
    assert answer.status_code == 200 or "use SQLiteRepository, PostgresRepository" in answer.text
    assert browser.get("/task", query_string={"id": task_id}).status_code == 200
    assert browser.post("/task/cancel", data={"id": task_id, "confirmed": "1"}).status_code == 303


@pytest.mark.parametrize("path", PATHS)
def test_a_page_shows_a_damaged_record(look, make_queue, repository, path):
    queue = make_queue()
    queue.declare("report")
    task_id = queue.submit("report", {"n": 1}).id
    assert all(repository.apply([Update(task_id, {}, {"params": "{", "progress": "x"})]))
    browser = look(queue)
    assert browser.get(path).status_code == 200
    assert "is damaged" in browser.get("/task", query_string={"id": task_id}).text
    assert browser.get("/api/tasks").status_code == 200
