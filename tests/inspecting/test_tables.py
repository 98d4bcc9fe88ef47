"""How tasks, pages of them and numbers look in a console and in a notebook."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path, PosixPath, PurePosixPath

import pytest

from taskx import PayloadError, Task

NOON = datetime(2026, 11, 30, 12, tzinfo=timezone.utc)


def test_the_line_of_a_task_says_what_differs_from_a_new_one():
    assert repr(Task()) == "Task(status='pending')"
    task = Task(id="a", type="email", params={"to": "me"}, created_at=NOON, priority=3)
    assert repr(task) == (
        "Task(id='a', type='email', status='pending', params={'to': 'me'}, "
        "created_at=2026-11-30T12:00:00.000Z, priority=3)"
    )


def test_the_line_of_a_task_is_short_and_hides_secrets():
    task = Task(
        params={"password": "x1y2", "text": "z" * 1000}, error="e" * 1000, traceback="t\n" * 99
    )
    assert "\n" not in repr(task)
    assert len(repr(task)) < 300
    assert "x1y2" not in repr(task) + task._repr_html_()


def test_a_task_with_an_array_has_a_line():
    class Array:
        def __eq__(self, other):
            raise ValueError("the truth value of an array is ambiguous")

        __hash__ = None

    assert "result=<" in repr(Task(result=Array()))


def test_a_page_is_a_table_in_a_notebook(queue):
    queue.declare("email")
    for name in ("a", "<b>"):
        queue.submit("email", {"to": name}, id=name)
    table = queue.list_tasks()._repr_html_()
    assert "<caption>2 of 2 tasks</caption>" in table
    assert re.findall("<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", table) == [
        ("&lt;b&gt;", "email", "pending"),
        ("a", "email", "pending"),
    ]


def test_numbers_are_a_line_and_a_table(queue):
    queue.declare("email")
    queue.executor("idle")(lambda: None)
    queue.submit("email")
    stats = queue.stats()
    assert repr(stats) == "Stats(email: 1 waiting; idle: nothing)"
    assert "<tr><td>email</td><td>1</td><td>0</td>" in stats._repr_html_()


class int64:  # noqa: N801
    """A scalar of NumPy, as far as the message is concerned."""

    __module__ = "numpy"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (int64(), "int64 is not JSON; write value.item() for a scalar"),
        (Path("x"), "annotate that of the executor with Path and register"),
        (PurePosixPath("x"), "annotate that of the executor with Path and register"),
    ],
)
def test_the_error_for_a_value_says_what_to_write(queue, value, words):
    assert isinstance(Path("x"), PosixPath)
    queue.declare("any")
    with pytest.raises(PayloadError, match=re.escape(words)):
        queue.submit("any", {"n": value})
