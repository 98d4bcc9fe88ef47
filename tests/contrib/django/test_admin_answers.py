"""Answers in the admin and on the dashboard of a Django site."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.test import Client

from taskx import Queue, Task
from taskx.contrib.django.admin.forms import AnswerForm
from taskx.contrib.django.models import TaskRow
from taskx.contrib.django.queues import get_queue
from taskx.queue.flows import answer

LIST = "/admin/taskx/task/"


@pytest.fixture
def queue(site: None) -> Queue:
    """The queue of the site: it is not started."""
    made = get_queue()
    made.declare("mail")
    return made


@pytest.fixture
def asked(queue: Queue) -> str:
    """The id of an open answer."""
    question = {"order": 7, "password": "hunter2"}
    return queue.submit_flow(answer("legal", question)).ids[0]


def key_of(task_id: str) -> int:
    return int(TaskRow.objects.get(task_id=task_id).pk)


def page_of(client: Client, url: str) -> str:
    response = client.get(url)
    assert response.status_code == 200, response
    return response.content.decode()


def give(client: Client, task_id: str, value: str = "", kind: str = "text") -> str:
    """Send the form; return the page that follows."""
    form = {"value": value, "kind": kind}
    response = client.post(f"{LIST}{key_of(task_id)}/answer/", form, follow=True)
    assert response.status_code == 200, response
    return response.content.decode()


def test_the_page_of_an_answer_leads_to_its_form(boss, queue, asked):
    assert f"{key_of(asked)}/answer/" in page_of(boss, f"{LIST}{key_of(asked)}/change/")
    other = key_of(queue.submit("mail").id)
    assert "/answer/" not in page_of(boss, f"{LIST}{other}/change/")


def test_the_form_shows_the_question_without_secrets(boss, asked):
    page = page_of(boss, f"{LIST}{key_of(asked)}/answer/")
    assert "legal" in page
    assert "hunter2" not in page
    assert 'value="Answer"' in page
    assert "do it again" not in page


@pytest.mark.parametrize(
    ("value", "kind", "result"), [("yes", "text", "yes"), ('{"ok": 1}', "json", {"ok": 1})]
)
def test_an_answer_is_a_text_or_json(boss, queue, asked, value, kind, result):
    assert "The answer was given." in give(boss, asked, value, kind)
    task = queue.get_task_status(asked)
    assert (task.status.value, task.result, task.worker) == ("completed", result, "boss")
    assert [(c.by, c.action, c.target) for c in queue.changes()] == [("boss", "finish", asked)]


def test_an_answer_can_be_an_error(boss, queue, asked):
    give(boss, asked, "refused", "error")
    task = queue.get_task_status(asked)
    assert (task.status.value, task.error) == ("failed", "refused")


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [(" ", "text", "The answer is empty."), ("{", "json", "The answer is not JSON")],
)
def test_what_is_no_answer_is_an_error_of_the_form(boss, queue, asked, value, kind, words):
    assert words in give(boss, asked, value, kind)
    assert queue.get_task_status(asked).status.value == "pending"


def test_a_given_answer_has_no_form(boss, queue, asked):
    queue.finish(asked, "no")
    page = give(boss, asked, "yes")
    assert "doesn’t exist" in page
    assert queue.get_task_status(asked).result == "no"


def test_the_action_leads_to_the_form_of_one_open_answer(boss, queue, asked):
    other = queue.submit("mail").id

    def select(*ids: str) -> str:
        form = {"action": "answer", "_selected_action": [key_of(i) for i in ids]}
        return boss.post(LIST, form, follow=True).content.decode()

    assert 'value="Answer"' in select(asked)
    for ids in ((other,), (asked, other)):
        assert "Select one pending task of the type answer." in select(*ids)


def test_it_needs_a_permission_of_its_own(browse: Callable[..., Client], queue, asked):
    url = f"{LIST}{key_of(asked)}/answer/"
    assert browse("taskx.view_task", "taskx.change_task").get(url).status_code == 403
    allowed = browse("taskx.answer_task")
    assert allowed.get(url).status_code == 200
    assert "/cancel/" not in page_of(allowed, f"{LIST}{key_of(asked)}/change/")


def test_a_call_with_an_unknown_outcome_can_be_made_again(queue):
    call = AnswerForm(queue, Task(type="answer", params={"once": "charge"}), "eva")
    assert "it was not done: do it again" in str(call["kind"])
    done = AnswerForm(
        queue, Task(id="event/a", type="answer"), "eva", {"kind": "text", "value": "x"}
    )
    assert "do it again" not in str(done["kind"])
    assert done.is_valid()
