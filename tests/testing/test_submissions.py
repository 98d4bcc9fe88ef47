"""Assertions about what was submitted."""

from __future__ import annotations

import pytest

from taskx import ConfigurationError, Task, chain, every
from taskx.testing import ManualQueue


@pytest.fixture
def queue():
    made = ManualQueue()
    made.declare("mail", "report", "bill")
    return made


@pytest.fixture
def busy(queue):
    """A queue that three tasks were submitted to."""
    queue.submit("mail", {"to": "ann", "text": "hi"}, priority=5)
    queue.submit("bill", {"amount": 3})
    queue.submit("mail", {"to": "bob"}, delay=60, created_by="web")
    return queue


LISTED = """\
3 task(s) were submitted:
  1. mail {"to": "ann", "text": "hi"}
  2. bill {"amount": 3}
  3. mail {"to": "bob"}, delay 60 s"""


def test_submitted_returns_the_tasks_that_meet_all_conditions(busy):
    def to(**conditions):
        return [task.params.get("to") for task in busy.submitted("mail", **conditions)]

    assert to() == ["ann", "bob"]
    assert to(params={"to": "bob"}) == ["bob"]
    assert to(params={"to": "bob", "text": "hi"}) == []
    assert to(params={"missing": None}) == []
    assert to(delay=60) == ["bob"]
    assert to(delay=0) == ["ann"]
    assert to(priority=5) == ["ann"]
    assert to(created_by="web", delay=60) == ["bob"]
    assert len(busy.submitted()) == 3
    assert busy.submitted("report") == []


def test_a_type_can_be_given_by_its_executor(queue):
    note = queue.executor("note")(lambda n: None)
    queue.submit("mail")
    note.using(priority=3).submit(n=1)
    assert queue.assert_submitted(note, priority=3).type == "note"
    assert queue.submitted(note.using(priority=3)) == queue.submitted("note")
    queue.assert_submitted_in_order("mail", note)
    assert "type 'note'" in fails(queue.assert_not_submitted, note)


def test_an_assertion_about_a_type_that_nothing_can_submit_is_refused(queue):
    with pytest.raises(ConfigurationError, match="no task of type 'mial' can be submitted"):
        queue.assert_not_submitted("mial")


def test_a_list_and_a_tuple_are_the_same(queue):
    queue.executor("pair")(lambda a: None)
    handle = queue.submit("pair", {"a": (1, (2, 3))}, tags=["new"])
    assert queue.assert_submitted("pair", params={"a": (1, (2, 3))}).id == handle.id
    assert queue.assert_submitted("pair", params={"a": [1, [2, 3]]}, tags=["new"]).id == handle.id
    queue.assert_not_submitted("pair", tags=["old"])


def test_within_counts_from_now_back(busy):
    busy.clock.advance(30)
    busy.submit("mail", {"to": "cid"})
    assert [t.params["to"] for t in busy.submitted("mail", within=29)] == ["cid"]
    assert len(busy.submitted("mail", within=30)) == 3


def test_tasks_are_kept_as_they_were_submitted(queue):
    queue.executor("gone")(lambda: None)
    task = queue.submit("gone").task()
    queue.run_all()
    queue.delete(task.id)
    assert [t.status.value for t in queue.submitted("gone")] == ["pending"]


def test_tasks_of_flows_schedules_and_executors_count(queue):
    queue.executor("outer")(lambda: queue.submit("mail"))
    queue.submit("outer")
    queue.submit_many([Task(type="bill")])
    queue.submit_flow(chain(Task(type="report"), Task(type="bill")))
    queue.schedule("often", every(60), "report")
    queue.advance(60)
    types = [task.type for task in queue.submitted()]
    assert types == ["outer", "bill", "report", "bill", "mail", "report"]


def test_a_field_that_tasks_do_not_have_is_refused(queue):
    with pytest.raises(ConfigurationError, match="no field proirity"):
        queue.submitted(proirity=1)


@pytest.mark.parametrize("wrong", [-1, float("nan"), "60"])
@pytest.mark.parametrize("name", ["within", "delay"])
def test_a_time_that_no_task_can_have_is_refused(queue, name, wrong):
    with pytest.raises(ConfigurationError, match=r"must be|no unit"):
        queue.assert_not_submitted(**{name: wrong})


def test_assert_submitted_returns_the_first_task(busy):
    assert busy.assert_submitted("mail").params["to"] == "ann"
    assert busy.assert_submitted("mail", times=2).params["to"] == "ann"
    assert busy.assert_submitted(params={"amount": 3}, times=1).type == "bill"


def fails(call, *args, **options):
    """The message of an assertion that fails."""
    with pytest.raises(AssertionError) as raised:
        call(*args, **options)
    return str(raised.value)


def test_a_failed_assertion_lists_what_was_submitted(busy):
    message = fails(busy.assert_submitted, "mail", params={"to": "eve"})
    assert message == f"no task of type 'mail' with params {{'to': 'eve'}} was submitted. {LISTED}"
    message = fails(busy.assert_submitted, "mail", times=1)
    assert message.startswith("task of type 'mail': expected 1 submission(s), found 2. 3 task(s)")


def test_assert_not_submitted_fails_for_any_that_was(busy, queue):
    busy.assert_not_submitted("report")
    busy.assert_not_submitted("mail", params={"to": "eve"})
    assert fails(busy.assert_not_submitted, "bill").startswith(
        f"task of type 'bill': expected no submission, found 1. {LISTED}"
    )
    assert fails(busy.assert_not_submitted).startswith("task: expected no submission, found 3.")
    ManualQueue().assert_not_submitted()


def test_assert_submitted_in_order_looks_at_the_given_types(busy):
    busy.assert_submitted_in_order("mail", "bill", "mail")
    busy.assert_submitted_in_order("mail", "mail")
    message = fails(busy.assert_submitted_in_order, "bill", "mail")
    assert message.startswith(
        "expected bill, mail; submitted were, of these types, mail, bill, mail."
    )
    assert "none" in fails(ManualQueue().assert_submitted_in_order, "mail")


def test_a_long_list_is_cut(queue):
    for n in range(25):
        queue.submit("mail", {"text": "x" * 300, "n": n})
    message = fails(queue.assert_submitted, "bill")
    assert "… and 5 more" in message
    assert len(message) < 10_000
