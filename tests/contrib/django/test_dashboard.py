"""The dashboard at a URL of a Django site."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from types import ModuleType
from typing import Any

import django
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.db import connections
from django.http import HttpRequest
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path, resolve, reverse
from helpers import PATIENCE

from taskx import MemoryRepository, Queue, TaskStatus
from taskx.contrib.django import dashboard, views
from taskx.programs.dashboard import ALL
from taskx.programs.dashboard.api import MOST_STREAMS

VIEW, CHANGE, DELETE = "taskx.view_task", "taskx.change_task", "taskx.delete_task"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """The queue of the backend ``default``: it is not started, and its tasks wait."""
    with closing(Queue(MemoryRepository())) as made:
        made.declare("mail")
        monkeypatch.setattr(views, "get_queue", {"default": made}.__getitem__)
        yield made


def urls(*patterns: Any) -> Any:
    """Return an object for ``ROOT_URLCONF``."""
    made = ModuleType("urls")
    made.urlpatterns = [*patterns]
    return made


def page_of(client: Client, url: str, **options: Any) -> str:
    response = client.get(url, **options)
    assert response.status_code == 200, response.content
    return response.content.decode()


# --- who gets in


def test_a_visitor_is_sent_to_the_login_page_and_back(site, queue):
    response = Client().get("/tasks/tasks?q=type:mail")
    assert response.status_code == 302
    assert response["Location"] == "/admin/login/?next=/tasks/tasks%3Fq%3Dtype%3Amail"


def test_a_visitor_is_sent_to_login_url_if_there_is_no_admin(site, queue):
    with override_settings(ROOT_URLCONF=urls(path("tasks/", dashboard())), LOGIN_URL="/enter/"):
        assert Client().get("/tasks/")["Location"] == "/enter/?next=/tasks/"


def test_a_visitors_page_that_refreshes_itself_is_loaded_again(site, queue):
    """Otherwise its script would look for its part in the login page."""
    response = Client().get("/tasks/", HTTP_TASKX_REFRESH="1")
    assert (response.status_code, response.content) == (401, b"")


def test_a_visitors_program_gets_401(site, queue):
    response = Client().get("/tasks/api/tasks")
    assert response.status_code == 401
    assert response.json() == {"error": "log in first"}


def test_a_user_who_is_not_staff_sees_nothing(browse, queue):
    assert browse(VIEW, CHANGE, staff=False).get("/tasks/").status_code == 403


def test_staff_without_permissions_see_nothing(browse, queue):
    assert browse().get("/tasks/").status_code == 403


def test_an_inactive_user_is_a_visitor(boss, queue):
    from django.contrib.auth.models import User

    User.objects.update(is_active=False)
    assert boss.get("/tasks/").status_code == 302


def test_permission_to_view_tasks_shows_everything_and_changes_nothing(browse, queue):
    task_id = queue.submit("mail", {"to": "ann"}).id
    client = browse(VIEW)
    assert "ann" in page_of(client, f"/tasks/task?id={task_id}")
    for action in ("cancel", "requeue", "delete"):
        response = client.post(f"/tasks/api/{action}", {"ids": [task_id]}, "application/json")
        assert response.status_code == 403
    assert client.post("/tasks/types/pause", {"type": "mail"}).status_code == 403
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


def test_permission_to_change_tasks_cancels_and_pauses_but_does_not_delete(browse, queue):
    """It includes the permission to view them, as in the admin."""
    task_id = queue.submit("mail").id
    client = browse(CHANGE)
    assert client.get(f"/tasks/task?id={task_id}").status_code == 200
    body = {"ids": [task_id]}
    assert client.post("/tasks/api/cancel", body, "application/json").json()["changed"] == 1
    assert client.post("/tasks/types/pause", {"type": "mail"}).status_code == 303
    assert "mail" in queue.paused
    assert client.post("/tasks/api/delete", body, "application/json").status_code == 403
    client = browse(VIEW, DELETE)
    assert client.post("/tasks/api/delete", body, "application/json").json()["changed"] == 1


def test_a_superuser_may_do_everything(boss, queue):
    queue.schedule("nightly", "0 3 * * *", "mail").store()
    assert boss.post("/tasks/schedules/pause", {"name": "nightly"}).status_code == 303
    assert queue.schedules()["nightly"].paused


def test_the_program_may_decide_who_may_do_what(browse, queue):
    def check(request: HttpRequest) -> set[str]:
        return {"read"} if request.user.get_username() == "user-0" else set()

    with override_settings(ROOT_URLCONF=urls(path("tasks/", dashboard(permissions=check)))):
        assert browse(staff=False).get("/tasks/").status_code == 200
        assert browse(VIEW).get("/tasks/").status_code == 403


def test_the_function_of_the_program_may_read_the_form(boss, queue):
    read: list[Any] = []

    def check(request: HttpRequest) -> frozenset[str]:
        read.append(request.POST.get("type") or request.read())
        return ALL

    with override_settings(ROOT_URLCONF=urls(path("tasks/", dashboard(permissions=check)))):
        for form in (("type=mail", "application/x-www-form-urlencoded"), ({"type": "mail"},)):
            queue.resume("mail")
            assert (
                boss.post("/tasks/types/pause", *form).status_code == 303
            )  # the second: multipart
            assert "mail" in queue.paused
        body = {"ids": [queue.submit("mail").id]}
        assert boss.post("/tasks/api/cancel", body, "application/json").json()["changed"] == 1
    assert read == ["mail", "mail", json.dumps(body).encode()]


def test_a_read_only_dashboard_changes_nothing(boss, queue):
    task_id = queue.submit("mail").id
    with override_settings(ROOT_URLCONF=urls(path("look/", dashboard(read_only=True)))):
        assert boss.get("/look/").status_code == 200
        body = {"ids": [task_id]}
        assert boss.post("/look/api/cancel", body, "application/json").status_code == 403


def test_a_site_without_users_is_told_what_is_missing(queue):
    request = RequestFactory().get("/tasks/")
    with pytest.raises(ImproperlyConfigured, match="AuthenticationMiddleware"):
        resolve("/tasks/").func(request, "")


# --- forms


def test_a_change_from_another_site_is_refused(boss, queue):
    task_id = queue.submit("mail").id
    response = boss.post("/tasks/task/cancel", {"id": task_id}, HTTP_SEC_FETCH_SITE="cross-site")
    assert response.status_code == 403
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


def test_a_form_is_accepted_by_its_token_if_the_browser_sends_no_origin(browse, queue):
    """Django's own token is not asked for, because the pages of the dashboard do not carry it."""
    task_id = queue.submit("mail").id
    client = browse(VIEW, CHANGE, enforce_csrf_checks=True)
    del client.defaults["HTTP_SEC_FETCH_SITE"]
    assert client.post("/tasks/task/cancel", {"id": task_id}).status_code == 403
    client.get(f"/tasks/task?id={task_id}")
    form = {"id": task_id, "taskx_token": client.cookies["taskx_token"].value, "confirmed": "1"}
    assert client.post("/tasks/task/cancel", form).status_code == 303
    assert queue.get_task_status(task_id).status is TaskStatus.CANCELLED


def test_a_change_is_noted_with_the_name_of_the_user(browse, queue):
    task_id = queue.submit("mail").id
    browse(VIEW, CHANGE).post("/tasks/task/cancel", {"id": task_id, "confirmed": "1"})
    [change] = queue.changes()
    assert (change.by, change.action, change.target) == ("user-0", "cancel", task_id)


def test_a_header_does_not_name_the_user(browse, queue):
    queue.submit("mail", id="one")
    client = browse(VIEW, CHANGE)
    client.post(
        "/tasks/task/cancel",
        {"id": "one", "confirmed": "1"},
        REMOTE_USER="mallory",
        HTTP_REMOTE_USER="mallory",
    )
    assert [change.by for change in queue.changes()] == ["user-0"]


# --- requests and answers


def test_links_lead_to_where_the_dashboard_is(boss, queue):
    assert reverse("taskx:dashboard") == "/tasks/"
    assert 'href="/tasks/failures"' in page_of(boss, "/tasks/")
    with override_settings(ROOT_URLCONF=urls(path("a b/é/", dashboard()))):
        [link, *_] = re.findall('href="([^"]*/failures)"', page_of(boss, "/a%20b/%C3%A9/"))
        assert "No task has failed" in page_of(boss, link)
    assert 'href="/under/tasks/failures"' in page_of(boss, "/tasks/", SCRIPT_NAME="/under")


def test_a_path_without_its_slash_is_redirected(boss, queue):
    assert boss.get("/tasks")["Location"] == "/tasks/"


def test_a_page_that_does_not_exist_is_404(boss, queue):
    assert boss.get("/tasks/nothing/here").status_code == 404


def test_a_page_that_has_not_changed_is_not_sent_again(boss, queue):
    first = boss.get("/tasks/schedules")
    again = boss.get("/tasks/schedules", HTTP_IF_NONE_MATCH=first["ETag"])
    assert (again.status_code, again.content, again["ETag"]) == (304, b"", first["ETag"])
    queue.schedule("nightly", "0 3 * * *", "mail").store()
    assert boss.get("/tasks/schedules", HTTP_IF_NONE_MATCH=first["ETag"]).status_code == 200


def test_head_has_the_headers_of_get_and_no_body(boss, queue):
    full, head = boss.get("/tasks/static/taskx.css"), boss.head("/tasks/static/taskx.css")
    assert head.content == b""
    assert head["Content-Length"] == full["Content-Length"] == str(len(full.content))
    assert head["Content-Type"] == full["Content-Type"] == "text/css; charset=utf-8"


def test_the_headers_of_the_dashboard_win_over_those_of_the_site(boss, queue):
    response = boss.get("/tasks/")
    assert "script-src 'self'" in response["Content-Security-Policy"]
    assert response["X-Frame-Options"] == "DENY"
    assert response["Referrer-Policy"] == "same-origin"


def test_several_cookies_are_set(boss, queue):
    """The chosen language, and the token for browsers that send no origin."""
    response = boss.post("/tasks/language", {"to": "zh"})
    cookie = response.cookies["taskx_lang"]
    assert (cookie.value, cookie["path"], cookie["samesite"]) == ("zh", "/tasks", "Strict")
    assert cookie["httponly"] is True
    del boss.defaults["HTTP_SEC_FETCH_SITE"]
    response = boss.get("/tasks/")
    assert 'lang="zh"' in response.content.decode()
    assert {*response.cookies} >= {"taskx_token"}


def test_cookies_are_secure_where_the_site_knows_that_its_proxy_speaks_https(boss, queue):
    with override_settings(SECURE_PROXY_SSL_HEADER=("HTTP_X_FORWARDED_PROTO", "https")):
        response = boss.post("/tasks/language", {"to": "zh"}, HTTP_X_FORWARDED_PROTO="https")
    assert response.cookies["taskx_lang"]["secure"] is True


def test_the_host_is_that_of_the_proxy_if_the_site_trusts_it(boss, queue):
    """An older browser sends the origin of the page, which is compared with the host."""
    queue.submit("mail", id="one")
    del boss.defaults["HTTP_SEC_FETCH_SITE"]
    given = {"HTTP_ORIGIN": "http://shop.example", "HTTP_X_FORWARDED_HOST": "shop.example"}
    form = {"id": "one", "confirmed": "1"}
    assert boss.post("/tasks/task/cancel", form, **given).status_code == 403
    with override_settings(USE_X_FORWARDED_HOST=True):
        assert boss.post("/tasks/task/cancel", form, **given).status_code == 303


def test_an_export_is_streamed(boss, queue):
    for _ in range(3):
        queue.submit("mail")
    response = boss.get("/tasks/tasks/export")
    assert response.streaming
    lines = b"".join(response.streaming_content).splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["mail"] * 3


def test_a_stream_is_closed_with_the_response(boss, queue):
    """Otherwise the ninth one would be refused."""
    for _ in range(9):
        response = boss.get("/tasks/api/changes")
        assert response.status_code == 200
        next(iter(response.streaming_content))
        response.close()


def test_a_backend_with_another_queue_gets_another_dashboard(boss, queue, monkeypatch):
    """Settings that a test overrides make another queue."""
    page_of(boss, "/tasks/")
    with closing(Queue(MemoryRepository())) as other:
        other.declare("other")
        other.submit("other", id="of-the-other")
        monkeypatch.setattr(views, "get_queue", lambda alias: other)
        assert "of-the-other" in page_of(boss, "/tasks/tasks")


# --- transactions


def test_the_view_is_outside_of_the_transactions_of_requests(boss, queue, monkeypatch):
    inside = []

    def check(request: HttpRequest) -> set[str]:
        inside.append([connections[alias].in_atomic_block for alias in connections])
        return {"read"}

    for alias in ("default", "other"):  # tests of the store add databases that are away
        monkeypatch.setitem(connections[alias].settings_dict, "ATOMIC_REQUESTS", True)
    with override_settings(ROOT_URLCONF=urls(path("tasks/", dashboard(permissions=check)))):
        page_of(boss, "/tasks/")
    assert inside == [[False for alias in connections]]


# --- ASGI


def test_pages_and_changes_work_under_asgi(browse, queue):
    queue.submit("mail", id="one")
    session = browse(VIEW, CHANGE).cookies

    async def use() -> tuple[Any, Any]:
        client = AsyncClient()
        client.cookies = session
        page = await client.get("/tasks/tasks")
        done = await client.post(
            "/tasks/task/cancel",
            {"id": "one", "confirmed": "1"},
            headers={"Sec-Fetch-Site": "same-origin"},
        )
        return page, done

    page, done = asyncio.run(use())
    assert "mail" in page.content.decode()
    assert done.status_code == 303
    assert queue.get_task_status("one").status is TaskStatus.CANCELLED


@pytest.mark.slow
def test_a_stream_is_sent_as_it_comes_under_asgi_and_closed_when_the_client_goes(browse, queue):
    """Django would collect an ordinary stream, here of a minute, before it sends the first byte."""
    queue.submit("mail", id="one")
    session = browse(VIEW).cookies

    handler = ASGIHandler()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/tasks/api/changes",
        "query_string": b"",
        "headers": [
            (b"host", b"testserver"),
            (b"cookie", session.output(header="", sep=";").strip().encode()),
        ],
    }

    async def first_of_a_stream() -> list[Any]:
        """Return the first two lines of a stream; then the client goes."""
        sent: asyncio.Queue[Any] = asyncio.Queue()
        received: asyncio.Queue[Any] = asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        handling = asyncio.create_task(handler(scope, received.get, sent.put))
        try:
            start = await asyncio.wait_for(sent.get(), PATIENCE)
            assert start["status"] == 200, start
            return [json.loads((await sent.get())["body"]) for _ in range(2)]
        finally:
            received.put_nowait({"type": "http.disconnect"})
            if django.VERSION < (5, 0):  # does not listen while it sends: the server ends it
                handling.cancel()
            with suppress(asyncio.CancelledError):
                await handling

    async def use() -> None:
        for _ in range(MOST_STREAMS + 1):
            task, now = await first_of_a_stream()
            assert task["id"] == "one"
            assert now.keys() == {"now"}

    asyncio.run(use())
