"""Tasks, dead letters and schedules in Django's admin."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import mariadb_server
import postgres_server
import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection, connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_project import FOLDER
from helpers import PATIENCE, ROOT

from taskx import (
    MemoryRepository,
    Queue,
    RepositoryUnavailable,
    RetryPolicy,
    Task,
    TaskStatus,
    every,
)
from taskx.contrib.django import DjangoRepository
from taskx.contrib.django.admin import bulk, finding, pages
from taskx.contrib.django.admin.schedules import ScheduleAdmin
from taskx.contrib.django.models import TaskRow
from taskx.contrib.django.queues import get_queue

LIST, DEAD, SCHEDULES = "/admin/taskx/task/", "/admin/taskx/deadletter/", "/admin/taskx/schedule/"


@pytest.fixture
def queue(site: None) -> Queue:
    """The queue of the site: it is not started."""
    made = get_queue()
    made.declare("mail", "report", "shop.tasks.send@emails")
    return made


@pytest.fixture
def failed(queue: Queue) -> Callable[..., str]:
    """Return a function that lets a task fail, and returns its id."""

    def fail(params: dict[str, Any] | None = None, **options: Any) -> str:
        task_id = queue.submit("mail", params or {}, **options).id
        with closing(Queue(DjangoRepository())) as runner, runner:

            @runner.executor("mail", capture_log=True)
            def mail(**given: Any) -> None:
                logging.getLogger("shop").warning("now it breaks")
                raise ValueError("the server is down")

            with pytest.raises(Exception, match="the server is down"):
                runner.handle(task_id).result(timeout=60)
        return task_id

    return fail


def page_of(client: Client, url: str, **query: Any) -> str:
    response = client.get(url, query)
    assert response.status_code == 200, response
    return response.content.decode()


def listed(client: Client, url: str = LIST, **query: Any) -> list[str]:
    """Return the ids in the list, in its order."""
    return re.findall('class="field-task_id"><a[^>]*>([^<]*)<', page_of(client, url, **query))


def key_of(task_id: str) -> int:
    return TaskRow.objects.get(task_id=task_id).pk


def act(client: Client, url: str, action: str, *keys: Any, **more: Any) -> str:
    """Take an action on rows of a list; return the page that follows."""
    form = {"action": action, "_selected_action": keys, **more}
    response = client.post(url, form, follow=True)
    assert response.status_code == 200
    return response.content.decode()


def status(queue: Queue, task_id: str) -> str:
    return queue.get_task_status(task_id).status.value


# --- the list


def test_the_newest_tasks_come_first(boss, queue):
    ids = [queue.submit("mail").id for _ in range(3)]
    assert listed(boss) == ids[::-1]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"status": "cancelled"}, ["b"]),
        ({"status": "pending"}, ["c", "a"]),
        ({"type": "report"}, ["b"]),
        ({"queue": "emails"}, ["c"]),
        ({"queue": "default"}, ["b", "a"]),
        ({"tag": "urgent"}, ["a"]),
        ({"since": "hour"}, ["c", "b", "a"]),
        ({"q": "key-of-a"}, ["a"]),
        ({"q": "room-1"}, ["b"]),
        ({"q": "ann@example.org"}, ["a"]),
        ({"q": "hunter2"}, []),
        ({"q": "c"}, ["c"]),
        ({"q": "nobody"}, []),
        ({"q": "ann@example.org", "status": "cancelled"}, []),
    ],
    ids=str,
)
def test_a_list_is_filtered_and_searched(boss, queue, query, found):
    params = {"to": "ann@example.org", "password": "hunter2"}
    queue.submit("mail", params, id="a", tags=["urgent"], unique_key="key-of-a")
    queue.submit("report", id="b", concurrency_key="room-1")
    queue.submit("shop.tasks.send@emails", id="c")
    queue.cancel_task("b")
    assert listed(boss, **query) == found


def test_filters_offer_the_values_of_the_newest_tasks(boss, queue):
    queue.submit("mail", tags=["urgent"])
    queue.submit("shop.tasks.send@emails")
    page = page_of(boss, LIST)
    offered = re.findall(r'href="\?(type|queue|tag|status|since)=([^"]*)"', page)
    assert {value for name, value in offered if name == "type"} == {
        "mail",
        "shop.tasks.send%40emails",
    }
    assert {value for name, value in offered if name == "queue"} == {"default", "emails"}
    assert [value for name, value in offered if name == "tag"] == ["urgent"]
    assert len([value for name, value in offered if name == "status"]) == len(TaskStatus)


def test_the_cost_of_a_list_does_not_depend_on_its_length(boss, queue):
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            page_of(boss, LIST)
        assert not [one for one in captured if '"traceback"' in one["sql"]]
        return len(captured)

    queue.submit("mail")
    few = queries()
    for _ in range(30):
        queue.submit("mail", tags=["a"])
    assert queries() == few


def test_at_most_ten_thousand_rows_are_counted(boss, queue, monkeypatch):
    monkeypatch.setattr(finding, "MOST", 5)
    for _ in range(9):
        queue.submit("mail")
    with CaptureQueriesContext(connection) as captured:
        assert "5 tasks" in page_of(boss, LIST)
    counts = [
        one["sql"] for one in captured if "COUNT" in one["sql"] and "taskx_task" in one["sql"]
    ]
    assert counts
    assert all("LIMIT 5" in sql for sql in counts)
    assert "_facets" not in page_of(boss, LIST)


# --- who may do what


def test_a_user_without_permissions_sees_nothing(browse, queue):
    key = key_of(queue.submit("mail").id)
    client = browse()
    for url in (LIST, DEAD, SCHEDULES, f"{LIST}{key}/change/", f"{LIST}{key}/requeue/"):
        assert client.get(url).status_code == 403


def test_a_user_who_may_view_changes_nothing(browse, queue):
    task_id = queue.submit("mail").id
    key = key_of(task_id)
    client = browse("taskx.view_task")
    page = page_of(client, f"{LIST}{key}/change/")
    assert f"{key}/cancel/" not in page
    assert "Cancel selected tasks" not in page_of(client, LIST)
    assert client.post(f"{LIST}{key}/cancel/").status_code == 403
    assert client.post(f"{LIST}{key}/requeue/", {"params": "{}"}).status_code == 403
    assert client.post(f"{LIST}{key}/delete/", {"post": "yes"}).status_code == 403
    act(client, LIST, "cancel", key)
    assert status(queue, task_id) == "pending"


def test_a_user_who_may_change_tasks_does_not_delete_them(browse, queue):
    task_id = queue.submit("mail").id
    key = key_of(task_id)
    client = browse("taskx.view_task", "taskx.change_task")
    act(client, LIST, "cancel", key)
    assert status(queue, task_id) == "cancelled"
    assert client.post(f"{LIST}{key}/delete/", {"post": "yes"}).status_code == 403
    act(client, LIST, "delete_selected", key, post="yes")
    assert status(queue, task_id) == "cancelled"


def test_nobody_adds_tasks_or_edits_their_rows(boss, queue):
    key = key_of(queue.submit("mail").id)
    assert boss.get(f"{LIST}add/").status_code == 403
    assert boss.post(f"{LIST}{key}/change/", {"task_id": "other"}).status_code == 403


# --- a task


def test_the_page_of_a_task_tells_everything_about_it(boss, queue, failed):
    task_id = failed({"to": "ann", "password": "hunter2"}, tags=["urgent"], priority=7)
    page = page_of(boss, f"{LIST}{key_of(task_id)}/change/")
    for text in (
        task_id,
        "&quot;to&quot;: &quot;ann&quot;",
        "ValueError: the server is down",
        "now it breaks",
        "urgent",
        "Traceback (most recent call last)",
        "It failed",
    ):
        assert text in page, text
    assert "hunter2" not in page
    assert "&quot;password&quot;: &quot;***&quot;" in page
    assert f'href="/tasks/task?id={task_id}"' in page
    assert 'name="_save"' not in page


def test_what_a_task_does_not_have_is_shown_as_a_dash_and_times_to_the_millisecond(boss, queue):
    task = queue.submit("mail").task()
    page = page_of(boss, f"{LIST}{key_of(task.id)}/change/")
    shown = re.findall(r'class="readonly">(.*?)</div>', page, flags=re.DOTALL)
    assert not [text for text in shown if text in ("", "None", "null")]
    assert shown.count("-") > 10
    created = timezone.localtime(task.created_at)
    assert f"{created:%Y-%m-%d %H:%M:%S.%f}"[:-3] + f" {created:%Z}" in shown


def test_why_a_task_waits_is_on_its_page(boss, queue):
    key = key_of(queue.submit("mail", delay=3600).id)
    assert "It is due at" in page_of(boss, f"{LIST}{key}/change/")


def test_values_of_a_task_cannot_break_the_page(boss, queue):
    bad = "</pre><script>alert(1)</script>"
    key = key_of(queue.submit("mail", {"to": bad}, created_by=bad, tags=["<b>"]).id)
    for url in (LIST, f"{LIST}{key}/change/", f"{LIST}{key}/cancel/"):
        assert "<script>alert" not in page_of(boss, url)


def test_a_task_that_is_gone_leads_back_to_the_list(boss, queue):
    assert boss.get(f"{LIST}123/change/").status_code == 302
    assert boss.get(f"{LIST}123/requeue/").status_code == 302


# --- cancel and requeue


def test_a_task_is_cancelled_after_a_question(boss, queue):
    task_id = queue.submit("mail").id
    url = f"{LIST}{key_of(task_id)}/cancel/"
    assert f"Cancel task {task_id}?" in page_of(boss, url)
    assert status(queue, task_id) == "pending"
    assert "The task is cancelled." in boss.post(url, follow=True).content.decode()
    assert status(queue, task_id) == "cancelled"
    assert '<li class="error">' in boss.post(url, follow=True).content.decode()
    [change] = queue.changes()
    assert (change.by, change.action, change.target) == ("boss", "cancel", task_id)


def test_a_form_without_djangos_token_is_refused(queue, site):
    from django.contrib.auth.models import User

    task_id = queue.submit("mail").id
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("boss"))
    assert client.post(f"{LIST}{key_of(task_id)}/cancel/").status_code == 403
    assert client.post(f"{SCHEDULES}add/", {"name": "x"}).status_code == 403
    assert client.post(f"{LIST}{key_of(task_id)}/delete/", {"post": "yes"}).status_code == 403
    assert status(queue, task_id) == "pending"


def test_several_tasks_are_cancelled_and_requeued(boss, queue):
    ids = [queue.submit("mail").id for _ in range(3)]
    keys = [key_of(task_id) for task_id in ids]
    assert "2 of 2 tasks are cancelled" in act(boss, LIST, "cancel", *keys[:2])
    assert [status(queue, i) for i in ids] == ["cancelled", "cancelled", "pending"]
    assert "because of them: 2." in act(boss, LIST, "requeue", *keys)
    assert [status(queue, i) for i in ids] == ["pending"] * 3
    assert [change.target for change in queue.changes()] == ["3 in the admin", "2 in the admin"]


def test_all_tasks_that_match_are_cancelled(boss, queue):
    """Also those on other pages of the list."""
    ids = [queue.submit("mail").id for _ in range(103)]
    other = queue.submit("report").id
    url = f"{LIST}?type=mail"
    act(boss, url, "cancel", key_of(ids[0]), select_across="1")
    assert {status(queue, i) for i in ids} == {"cancelled"}
    assert status(queue, other) == "pending"


class Background:
    """The threads of actions that go on after their request."""

    def __init__(self) -> None:
        self.began: list[threading.Thread] = []

    def __call__(self, **options: Any) -> threading.Thread:
        self.began.append(threading.Thread(**options))
        return self.began[-1]

    def join(self) -> None:
        for thread in self.began:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    """The threads of actions on more than four tasks."""
    made = Background()
    monkeypatch.setattr(bulk, "AT_ONCE", 4)
    monkeypatch.setattr(bulk, "threading", SimpleNamespace(Thread=made))
    yield made
    made.join()


def test_an_action_on_many_tasks_goes_on_in_the_background(boss, queue, background, caplog):
    caplog.set_level(logging.INFO, "taskx")
    ids = [queue.submit("mail").id for _ in range(11)]
    other = queue.submit("report").id
    url = f"{LIST}?type=mail"
    page = act(boss, url, "cancel", key_of(ids[0]), select_across="1")
    assert "goes on in the background, for all tasks that match (11 now)" in page
    background.join()
    assert {status(queue, i) for i in ids} == {"cancelled"}
    assert status(queue, other) == "pending"
    assert "admin: cancel by boss is done: 11 of 11 tasks changed" in caplog.messages
    act(boss, url, "requeue", key_of(ids[0]), select_across="1")
    background.join()
    assert {status(queue, i) for i in ids} == {"pending"}
    noted = [(change.by, change.action, change.target) for change in queue.changes()]
    assert noted == [("boss", name, "11 in the admin") for name in ("requeue", "cancel")]
    assert len(background.began) == 2


def test_few_tasks_are_changed_within_the_request(boss, queue, background):
    ids = [queue.submit("mail").id for _ in range(4)]
    page = act(boss, LIST, "cancel", key_of(ids[0]), select_across="1")
    assert "4 of 4 tasks are cancelled" in page
    assert background.began == []


def test_an_action_takes_more_tasks_than_are_counted(boss, queue, background, monkeypatch):
    monkeypatch.setattr(bulk, "MOST", 5)
    ids = [queue.submit("mail").id for _ in range(9)]
    page = act(boss, LIST, "cancel", key_of(ids[0]), select_across="1")
    assert "(more than 5 now)" in page
    background.join()
    assert {status(queue, i) for i in ids} == {"cancelled"}
    act(boss, LIST, "delete_selected", key_of(ids[0]), select_across="1", post="yes")
    assert queue.count_tasks() == 0


def test_an_action_in_the_background_begins_after_the_transaction_of_its_request(
    boss, queue, background, atomic_requests, monkeypatch
):
    ids = [queue.submit("mail").id for _ in range(5)]
    begin = bulk.begin

    def begin_and_look(*arguments: Any) -> None:
        begin(*arguments)
        assert background.began[0].ident is None

    monkeypatch.setattr(bulk, "begin", begin_and_look)
    act(boss, LIST, "cancel", key_of(ids[0]), select_across="1")
    background.join()
    assert {status(queue, i) for i in ids} == {"cancelled"}


def test_an_action_in_the_background_that_fails_says_how_far_it_was(
    boss, queue, background, monkeypatch, caplog
):
    ids = [queue.submit("mail").id for _ in range(9)]
    cancel, calls = queue.cancel_many, []

    def once(task_ids: Any) -> int:
        calls.append(task_ids)
        if len(calls) > 1:
            raise RepositoryUnavailable("the server is away")
        return int(cancel(task_ids))

    monkeypatch.setattr(queue, "cancel_many", once)
    act(boss, LIST, "cancel", key_of(ids[0]), select_across="1")
    background.join()
    assert [status(queue, i) for i in ids] == ["pending"] * 5 + ["cancelled"] * 4
    text = "admin: cancel by boss has stopped after 4 tasks; take the action again to go on"
    assert text in caplog.messages
    assert queue.changes()[0].target == "4 in the admin"


@pytest.mark.parametrize("lookup", ["params__contains", "params__startswith", "result__regex"])
def test_no_lookup_in_an_address_finds_out_a_hidden_value(boss, failed, lookup):
    failed({"to": "ann", "password": "hunter2"})
    assert boss.get(LIST, {lookup: "h"}).status_code == 400
    assert boss.get(LIST, {"status": "failed", "q": "ann", "o": "1"}).status_code == 200


def test_a_failed_task_runs_again_with_other_params(boss, queue, failed):
    task_id = failed({"to": "ann", "password": "hunter2"})
    url = f"{DEAD}{key_of(task_id)}/requeue/"
    page = page_of(boss, url)
    assert "&quot;to&quot;: &quot;ann&quot;" in page
    assert "hunter2" not in page
    edited = json.dumps({"to": "bob", "password": "***"})
    assert (
        "The task runs again." in boss.post(url, {"params": edited}, follow=True).content.decode()
    )
    task = queue.get_task_status(task_id)
    assert (task.status, task.params) == (
        TaskStatus.PENDING,
        {"to": "bob", "password": "hunter2"},
    )
    [requeued] = [one for one in task.attempts if one.outcome == "requeued"]
    assert requeued.old_params == {"to": "ann", "password": "hunter2"}


def test_a_task_runs_again_as_it_is(boss, queue, failed):
    task_id = failed({"to": "ann"})
    boss.post(f"{LIST}{key_of(task_id)}/requeue/", {"params": '{"to": "ann"}'})
    task = queue.get_task_status(task_id)
    assert (task.status, task.params) == (TaskStatus.PENDING, {"to": "ann"})
    assert "requeued" not in [one.outcome for one in task.attempts]


def test_wrong_params_are_an_error_of_the_form(boss, queue, failed):
    task_id = failed()
    for text, problem in (
        ("{", "Enter a valid JSON"),
        ("[1]", "Params must be a JSON object"),
        ('{"n": 1e999}', "params.n"),
        ('{"n": %s}' % ("[" * 900 + "]" * 900), "nested more than"),
        ('{"n": %s}' % ("[" * 200_000), "Params cannot be read"),
        ('{"n": "\\ud800"}', "lone surrogate"),
        ('{"n": %s}' % ("9" * 5000), "Exceeds the limit"),
    ):
        response = boss.post(f"{LIST}{key_of(task_id)}/requeue/", {"params": text})
        assert response.status_code == 200
        assert problem in response.content.decode()
        assert status(queue, task_id) == "failed"


def test_a_task_that_cannot_run_again_is_an_error_of_the_form(boss, queue):
    task_id = queue.submit("mail").id
    page = boss.post(f"{LIST}{key_of(task_id)}/requeue/", {"params": "{}"}).content.decode()
    assert "errorlist" in page
    assert status(queue, task_id) == "pending"


def test_the_action_with_other_params_is_for_one_task(boss, queue):
    keys = [key_of(queue.submit("mail").id) for _ in range(2)]
    assert "Select one task." in act(boss, LIST, "requeue_edited", *keys)
    assert "Run task" in act(boss, LIST, "requeue_edited", keys[0])


def test_only_failed_tasks_are_dead_letters(boss, queue, failed):
    dead, other = failed(), queue.submit("mail").id
    assert listed(boss, DEAD) == [dead]
    assert boss.get(f"{DEAD}{key_of(other)}/change/").status_code == 302
    act(boss, DEAD, "requeue", key_of(dead))
    assert listed(boss, DEAD) == []


# --- deleting


def test_tasks_are_deleted_after_a_question(boss, queue):
    ids = [queue.submit("mail", tags=["a"]).id for _ in range(2)]
    keys = [key_of(task_id) for task_id in ids]
    assert "Are you sure" in act(boss, LIST, "delete_selected", *keys)
    assert "Are you sure" in page_of(boss, f"{LIST}{keys[0]}/delete/")
    assert queue.count_tasks() == 2
    act(boss, LIST, "delete_selected", *keys, post="yes")
    assert queue.count_tasks() == 0
    assert queue.changes()[0].action == "delete"
    assert LogEntry.objects.filter(object_id=str(keys[0])).exists()


def test_many_tasks_are_deleted_in_a_few_transactions(boss, queue, monkeypatch):
    ids = [queue.submit("mail").id for _ in range(60)]
    keys = [key_of(task_id) for task_id in ids]
    batches, apply = [], queue.repository.apply
    monkeypatch.setattr(
        queue.repository,
        "apply",
        lambda writes, **more: batches.append(writes) or apply(writes, **more),
    )
    act(boss, LIST, "delete_selected", *keys, post="yes")
    assert queue.count_tasks() == 0
    assert [len(batch) for batch in batches] == [60]


def test_a_task_that_started_after_the_question_stays(boss, queue, monkeypatch):
    ids = [queue.submit("mail").id for _ in range(2)]
    many = queue.delete_many

    def late(task_ids):
        TaskRow.objects.filter(task_id=ids[0]).update(status="running")
        return many(task_ids)

    monkeypatch.setattr(queue, "delete_many", late)
    page = act(boss, LIST, "delete_selected", *map(key_of, ids), post="yes")
    assert "1 of the tasks were not deleted" in page
    assert [task.id for task in queue.list_tasks()[0]] == ids[:1]


def test_a_single_task_is_deleted(boss, queue):
    key = key_of(queue.submit("mail").id)
    response = boss.post(f"{LIST}{key}/delete/", {"post": "yes"}, follow=True)
    assert "was deleted successfully" in response.content.decode()
    assert queue.count_tasks() == 0


def test_a_running_task_is_not_deleted(boss, queue):
    key = key_of(queue.submit("mail").id)
    TaskRow.objects.filter(pk=key).update(status="running")
    page = act(boss, LIST, "delete_selected", key, post="yes")
    assert "protected" in page
    assert queue.count_tasks() == 1


# --- schedules


FORM = {
    "name": "nightly",
    "spec": "0 3 * * *",
    "tz": "Europe/Berlin",
    "type": "mail",
    "params": '{"to": "ann"}',
    "priority": "4",
    "tags": "a b",
    "expires": "60",
    "misfire": "one",
    "misfire_grace": "",
    "overlap": "skip",
}


def errors(page: str) -> list[str]:
    return re.findall(r'<ul class="errorlist[^>]*>\s*<li>(.*?)</li>', page)


def test_a_schedule_is_added(boss, queue):
    response = boss.post(f"{SCHEDULES}add/", FORM, follow=True)
    assert "was added successfully" in response.content.decode()
    schedule = queue.schedules()["nightly"]
    assert (schedule.spec, schedule.tz, schedule.type) == ("0 3 * * *", "Europe/Berlin", "mail")
    assert (schedule.params, schedule.tags, schedule.overlap) == ({"to": "ann"}, ("a", "b"), "skip")
    assert (schedule.task.priority, schedule.expires, schedule.paused) == (4, 60, False)
    assert queue.changes()[0].action == "add schedule"
    page = page_of(boss, SCHEDULES)
    assert "nightly" in page
    assert "Europe/Berlin" in page


@pytest.mark.parametrize(
    ("text", "spec"),
    [("every 90 s", 90), ("every 15m", 900), ("every 2 h", 7200), ("every 1 d", 86400)],
)
def test_a_schedule_can_have_an_interval(boss, queue, text, spec):
    boss.post(f"{SCHEDULES}add/", {**FORM, "spec": text, "tz": ""})
    assert queue.schedules()["nightly"].spec == every(spec)
    shown = page_of(boss, f"{SCHEDULES}schedule_2Fnightly/change/")
    assert f'value="every {spec} s"' in shown
    boss.post(
        f"{SCHEDULES}schedule_2Fnightly/change/", {**FORM, "spec": f"every {spec} s", "tz": ""}
    )
    assert queue.schedules()["nightly"].spec == every(spec)


def test_a_schedule_is_changed_and_keeps_the_options_that_the_form_does_not_show(boss, queue):
    retry = RetryPolicy(5, base=2.0)
    queue.schedule(
        "nightly", "0 3 * * *", Task(type="mail", retry=retry, timeout=9.0), tz="UTC"
    ).store()
    changed = {**FORM, "spec": "0 4 * * *", "paused": "on"}
    response = boss.post(f"{SCHEDULES}schedule_2Fnightly/change/", changed, follow=True)
    assert "was changed successfully" in response.content.decode()
    schedule = queue.schedules()["nightly"]
    assert (schedule.spec, schedule.params, schedule.paused) == ("0 4 * * *", {"to": "ann"}, True)
    assert (schedule.task.retry, schedule.task.timeout) == (retry, 9.0)
    boss.post(f"{SCHEDULES}schedule_2Fnightly/change/", {**changed, "paused": ""})
    assert not queue.schedules()["nightly"].paused


def test_the_name_of_a_schedule_stays(boss, queue):
    queue.schedule("nightly", "0 3 * * *", "mail").store()
    boss.post(f"{SCHEDULES}schedule_2Fnightly/change/", {**FORM, "name": "other"})
    assert {*queue.schedules()} == {"nightly"}


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"spec": "0 3 * *"}, "has 4 fields"),
        ({"spec": "every 0 s", "tz": ""}, "an interval must be from 0.1"),
        ({"tz": "Mars/Base"}, "unknown time zone"),
        ({"type": "nobody"}, "nobody"),
        ({"params": "{"}, "Enter a valid JSON"),
        ({"tags": "x" * 65}, "tag"),
        ({"misfire": "all"}, "requires misfire_grace"),
        ({"expires": "-1"}, "expires"),
        ({"expires": "1e300"}, "less than or equal to 253402300799"),
        ({"name": ""}, "required"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_an_error_of_the_form_and_is_not_stored(boss, queue, wrong, problem):
    page = boss.post(f"{SCHEDULES}add/", {**FORM, **wrong}).content.decode()
    assert problem in "".join(errors(page)), page
    assert queue.schedules() == {}


def test_adding_a_schedule_does_not_replace_another_one(boss, queue):
    queue.schedule("nightly", "0 5 * * *", "report").store()
    page = boss.post(f"{SCHEDULES}add/", FORM).content.decode()
    assert "There is a schedule with this name" in page
    assert queue.schedules()["nightly"].type == "report"


def test_schedules_are_paused_resumed_run_and_removed(boss, queue):
    for name in ("a", "b"):
        queue.schedule(name, "0 3 * * *", "mail").store()
    both = ("schedule/a", "schedule/b")
    assert "2 schedules: paused." in act(boss, SCHEDULES, "pause", *both)
    assert all(one.paused for one in queue.schedules().values())
    act(boss, SCHEDULES, "resume", *both)
    assert not any(one.paused for one in queue.schedules().values())
    act(boss, SCHEDULES, "run_now", both[0])
    assert queue.count_tasks(created_by="schedule:a") == 1
    act(boss, SCHEDULES, "delete_selected", both[0], post="yes")
    assert {*queue.schedules()} == {"b"}
    boss.post(f"{SCHEDULES}schedule_2Fb/delete/", {"post": "yes"})
    assert queue.schedules() == {}
    assert queue.count_tasks() == 1


def test_permissions_of_schedules_are_those_of_django(browse, queue):
    queue.schedule("nightly", "0 3 * * *", "mail").store()
    client = browse("taskx.view_schedule")
    assert "nightly" in page_of(client, SCHEDULES)
    url = f"{SCHEDULES}schedule_2Fnightly/change/"
    assert "0 3 * * *" in page_of(client, url)
    assert client.post(url, FORM).status_code == 403
    assert client.post(f"{SCHEDULES}add/", FORM).status_code == 403
    act(client, SCHEDULES, "pause", "schedule/nightly")
    assert not queue.schedules()["nightly"].paused
    client = browse("taskx.view_schedule", "taskx.change_schedule")
    act(client, SCHEDULES, "pause", "schedule/nightly")
    assert queue.schedules()["nightly"].paused
    assert client.post(f"{SCHEDULES}schedule_2Fnightly/delete/", {"post": "yes"}).status_code == 403


def test_the_cost_of_the_list_of_schedules_does_not_depend_on_its_length(boss, queue):
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            page_of(boss, SCHEDULES)
        return len(captured)

    queue.schedule("a", "0 3 * * *", "mail").store()
    few = queries()
    for number in range(20):
        queue.schedule(f"s{number}", "0 3 * * *", "mail").store()
    assert queries() == few


def test_other_notes_are_no_schedules(boss, queue):
    queue.pause("mail")
    assert "0 schedules" in page_of(boss, SCHEDULES)


# --- transactions and places


@pytest.fixture
def atomic_requests(site: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is in a transaction, which takes the lock of the SQLite file as it begins."""
    for alias in ("default", "other"):  # tests of the store add databases that are away
        monkeypatch.setitem(connections[alias].settings_dict, "ATOMIC_REQUESTS", True)
        monkeypatch.setattr(connections[alias], "transaction_mode", "IMMEDIATE", raising=False)


def test_actions_and_forms_do_not_wait_for_the_transaction_of_their_own_request(
    boss, queue, atomic_requests
):
    task_id = queue.submit("mail").id
    key = key_of(task_id)
    boss.post(f"{LIST}{key}/cancel/")
    assert status(queue, task_id) == "cancelled"
    boss.post(f"{LIST}{key}/requeue/", {"params": "{}"})
    assert status(queue, task_id) == "pending"
    act(boss, LIST, "cancel", key)
    assert status(queue, task_id) == "cancelled"
    boss.post(f"{LIST}{key}/delete/", {"post": "yes"})
    assert queue.count_tasks() == 0
    boss.post(f"{SCHEDULES}add/", FORM)
    boss.post(f"{SCHEDULES}schedule_2Fnightly/change/", {**FORM, "spec": "0 4 * * *"})
    assert queue.schedules()["nightly"].spec == "0 4 * * *"
    act(boss, SCHEDULES, "delete_selected", "schedule/nightly", post="yes")
    assert queue.schedules() == {}


def test_a_schedule_that_is_edited_is_rolled_back_with_its_request(
    boss, queue, atomic_requests, monkeypatch
):
    boss.post(f"{SCHEDULES}add/", FORM)

    def fail(self: Any, request: Any, obj: Any) -> None:
        assert queue.schedules()["nightly"].spec == "0 4 * * *"
        raise OSError("after the change")

    monkeypatch.setattr(ScheduleAdmin, "response_change", fail)
    with pytest.raises(OSError, match="after the change"):
        boss.post(f"{SCHEDULES}schedule_2Fnightly/change/", {**FORM, "spec": "0 4 * * *"})
    assert queue.schedules()["nightly"].spec == "0 3 * * *"
    assert [change.action for change in queue.changes()] == ["add schedule"]


def test_tasks_somewhere_else_are_named_and_break_nothing(boss, queue, monkeypatch):
    queue.submit("mail", id="left-over")
    queue.schedule("nightly", "0 3 * * *", "mail").store()
    key = key_of("left-over")
    with closing(Queue(MemoryRepository())) as other:
        monkeypatch.setattr(pages, "load_queue", lambda alias: other)
        for url in (LIST, DEAD, SCHEDULES):
            page = page_of(boss, url)
            assert "not in a database of this site" in page
            assert "left-over" not in page
        assert boss.get(f"{LIST}{key}/change/").status_code == 302
        assert boss.get(f"{SCHEDULES}schedule_2Fnightly/change/").status_code == 302
        assert boss.get(f"{SCHEDULES}add/").status_code == 403


def test_tasks_in_another_database_of_the_site_are_shown(boss, queue, monkeypatch):
    queue.submit("mail", id="in-default")
    with closing(Queue(DjangoRepository("other"))) as other:
        other.declare("mail")
        other.submit("mail", id="in-other")
        monkeypatch.setattr(pages, "load_queue", lambda alias: other)
        try:
            assert listed(boss) == ["in-other"]
        finally:
            other.delete("in-other")


# --- servers


ON_SERVER = """
import json, re
import django
django.setup()
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connections
from django.test import Client
from taskx.contrib.django.models import TaskRow
from taskx.contrib.django.queues import get_queue

call_command("migrate", verbosity=0)
queue = get_queue()
queue.declare("mail", "report")
ids = [queue.submit("mail", {"to": "ann"}, id=f"t{n}", tags=["a"]).id for n in range(2)]
queue.submit("report", id="other")
boss = Client()
boss.force_login(User.objects.create_superuser("boss"))
pages = {}
for query in ("status=pending", "type=mail", "queue=emails", "tag=a", "since=hour", "q=t", "q=ann"):
    page = boss.get(f"/admin/taskx/task/?{query}").content.decode()
    pages[query] = re.findall('class="field-task_id"><a[^>]*>([^<]*)<', page)
for alias in connections:
    connections[alias].settings_dict["ATOMIC_REQUESTS"] = True
keys = [TaskRow.objects.get(task_id=task_id).pk for task_id in ids]
boss.post("/admin/taskx/task/", {"action": "cancel", "_selected_action": keys})
boss.post(f"/admin/taskx/task/{keys[0]}/requeue/", {"params": '{"to": "bob"}'})
form = {"name": "nightly", "spec": "0 3 * * *", "type": "mail", "params": "{}"}
boss.post("/admin/taskx/schedule/add/", {**form, "misfire": "one", "overlap": "skip"})
boss.post("/admin/taskx/schedule/", {"action": "run_now", "_selected_action": "schedule/nightly"})
more = {"action": "delete_selected", "post": "yes"}
boss.post("/admin/taskx/task/", {**more, "_selected_action": keys[1:]})
tasks = [(task.type, task.status.value, task.params) for task in queue.iter_tasks()]
print(json.dumps([pages, tasks, [*queue.schedules()], boss.get("/tasks/").status_code]))
queue.close()
"""


@pytest.mark.process
@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_lists_actions_and_forms_work_on_a_server(kind, tmp_path):
    server = {"postgres": postgres_server, "mariadb": mariadb_server}[kind].shared()
    name = server.new_database()
    done = subprocess.run(
        [sys.executable, "-c", ON_SERVER],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "TASKX_DJANGO_SERVER": server.url(name),
            "TASKX_DJANGO_SQLITE": str(tmp_path / "site.db"),
            "PYTHONPATH": os.pathsep.join((str(FOLDER), str(ROOT))),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.drop_database(name)
    assert done.returncode == 0, done.stderr
    pages, tasks, schedules, status = json.loads(done.stdout.splitlines()[-1])
    assert pages == {
        "status=pending": ["other", "t1", "t0"],
        "type=mail": ["t1", "t0"],
        "queue=emails": [],
        "tag=a": ["t1", "t0"],
        "since=hour": ["other", "t1", "t0"],
        "q=t": ["t1", "t0"],
        "q=ann": ["t1", "t0"],
    }
    assert tasks == [
        ["mail", "pending", {}],
        ["report", "pending", {}],
        ["mail", "pending", {"to": "bob"}],
    ]
    assert (schedules, status) == (["nightly"], 200)
