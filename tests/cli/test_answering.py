"""``taskx answers`` and ``taskx finish``."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually

from taskx import Uncertain, answer


@pytest.fixture
def budget(queue):
    return queue.submit(answer("budget", {"most": 90}, timeout=timedelta(days=3), tags=["finance"]))


def test_open_answers_are_listed(queue, taskx, budget):
    queue.submit(answer("given", id="given"))
    queue.finish("given", 1)
    said = taskx("answers")
    assert said.code == 0
    head, row = said.lines
    assert head.split()[:4] == ["ID", "AGE", "LEFT", "QUESTION"]
    assert all(part in row for part in (budget.id, "2d", "budget", "finance"))
    assert [one["id"] for one in taskx("answers", "tag:finance", "--json").rows] == [budget.id]
    none = taskx("answers", "tag:other")
    assert (none.out, none.err) == ("", "no task waits for an answer\n")
    assert taskx("answers", "status:failed").code == 2


def test_an_answer_is_given_once(queue, taskx, budget):
    said = taskx("finish", budget.id, '{"euro": 90}')
    assert (said.code, said.lines) == (0, [f"{budget.id} finished"])
    assert budget.task().result == {"euro": 90}
    [change] = queue.changes()
    assert (change.action, change.target) == ("finish", budget.id)
    assert change.by == budget.task().worker != ""
    again = taskx("finish", budget.id, "1")
    assert again.code == 4
    assert "was given before" in again.err


def test_an_answer_that_is_an_error(taskx, budget):
    assert taskx("finish", budget.id, "--error", "refused by Eva", "--json").rows == [
        {"id": budget.id, "outcome": "finished"}
    ]
    assert budget.task().error == "refused by Eva"


@pytest.mark.parametrize("words", [(), ("yes",), ("1", "--error", "both")])
def test_a_call_that_is_wrong(taskx, budget, words):
    said = taskx("finish", budget.id, *words)
    assert said.code == 2
    assert "'\"yes\"'" in said.err
    assert budget.task().status == "pending"


def test_a_call_that_is_made_again(queue, taskx):
    @queue.executor("order")
    def order(ctx):
        return ctx.once("pay", pay) if not ctx.task.starts > 1 else ctx.once("pay", str)

    def pay():
        raise Uncertain

    with queue:
        handle = queue.submit("order")
        eventually(lambda: queue.list_tasks(type="answer", status="pending").tasks)
        assert taskx("finish", f"{handle.id}/pay", "--again").code == 0
        assert handle.result(PATIENCE) == ""


def test_an_unknown_answer(taskx):
    assert taskx("finish", "nobody/one", "1").code == 3
