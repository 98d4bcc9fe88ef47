"""``taskx submit``."""

from __future__ import annotations

import pytest
from helpers import PATIENCE

from taskx.programs.cli.output import Output


@pytest.fixture
def known(outside):
    """A queue that knows the type ``email``, because a task has it."""
    outside.declare("email")
    outside.submit("email", {"n": 0})
    return outside


def test_a_task_is_submitted_and_its_id_printed(known, taskx):
    said = taskx(
        "submit", "email", '{"to": "ann", "n": 1}', "--priority", "5", "--by", "web", "--tag", "eu"
    )
    assert said.code == 0
    [task_id] = said.lines
    task = known.get_task_status(task_id)
    assert task.params == {"to": "ann", "n": 1}
    assert (task.type, task.priority, task.created_by) == ("email", 5, "web")
    assert [*task.tags] == ["eu"]


def test_a_submitted_task_runs(queue, taskx):
    @queue.executor()
    def email(to: str) -> str:
        return to

    with queue:
        [row] = taskx("submit", "email", "-p", "to=ann", "--json").rows
        assert queue.handle(row["id"]).result(PATIENCE) == "ann"
    assert row["type"] == "email"


def test_params_are_json_or_else_texts(known, taskx):
    [task_id] = taskx("submit", "email", "-p", "n=2", "-p", "to=ann=x", "-p", 's="2"').lines
    assert known.get_task_status(task_id).params == {"n": 2, "to": "ann=x", "s": "2"}


def test_several_tasks_come_from_arguments_and_from_stdin(known, taskx):
    said = taskx("submit", "email", '{"n": 1}', "-", "-p", "x=1", input='{"n": 2}\n\n{"n": 3}\n')
    assert [known.get_task_status(task_id).params for task_id in said.lines] == [
        {"n": 1, "x": 1},
        {"n": 2, "x": 1},
        {"n": 3, "x": 1},
    ]


def test_a_task_can_wait(known, taskx):
    now = known.repository.clock.now_ms()
    [task_id] = taskx("submit", "email", "--delay", "1h", "--expires", "2h").lines
    task = known.get_task_status(task_id)
    assert 3590 < task.run_at.timestamp() - now / 1000 < 3700
    assert (task.expires_at - task.run_at).total_seconds() == pytest.approx(7200, abs=60)
    [other] = taskx("submit", "email", "--run-at", "2030-01-01", "--depends-on", task_id).lines
    task = known.get_task_status(other)
    assert task.run_at.isoformat() == "2030-01-01T00:00:00+00:00"
    assert [*task.depends_on] == [task_id]


def test_a_task_has_a_key_and_a_cost(known, taskx):
    words = ("--key", "tenant:acme", "--cost", "tokens=1200", "--cost", "images=2")
    [task_id] = taskx("submit", "email", *words).lines
    task = known.get_task_status(task_id)
    assert (task.concurrency_key, task.cost) == ("tenant:acme", {"tokens": 1200, "images": 2})
    [other] = taskx("submit", "email", "--concurrency-key", "old").lines  # the old name
    assert known.get_task_status(other).concurrency_key == "old"


@pytest.mark.parametrize("cost", ["1200", "tokens", "tokens=many", "tokens=-1", "tokens="])
def test_a_cost_has_a_unit_and_a_number(known, taskx, cost):
    said = taskx("submit", "email", "--cost", cost)
    assert said.code == 2
    assert "--cost must be UNIT=N, such as tokens=1200" in said.err


def test_a_misspelt_type_is_pointed_out(known, taskx):
    said = taskx("submit", "emial")
    assert said.code == 0
    assert "no node and no task has type 'emial'; did you mean 'email'?" in said.err


def test_a_taken_id_is_a_conflict(known, taskx):
    assert taskx("submit", "email", "--id", "one").out == "one\n"
    said = taskx("submit", "email", "--id", "one")
    assert said.code == 4
    assert said.err.endswith("taskx: a task with id 'one' already exists; nothing was stored\n")


def test_a_held_unique_key_is_a_conflict(known, taskx):
    assert taskx("submit", "email", "--unique-key", "k").code == 0
    assert taskx("submit", "email", "--unique-key", "k").code == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{"], "the JSON of the params is not JSON"),
        (["[1]"], "the JSON of the params must be a JSON object"),
        (["-p", "x"], "--param 'x': write it as key=value"),
        (["--delay", "1h", "--run-at", "2030-01-01"], "give only one of them"),
        (["--tag", "a b"], "the tag 'a b' contains white space"),
        (["--id", "a", "{}", "{}"], "--id is for one task"),
        (["--delay", "soon"], "'soon' is not a duration"),
        (["--run-at", "soon"], "'soon' is not a time"),
        (['{"n": NaN}'], "params.n"),
    ],
)
def test_a_wrong_submit_stores_nothing(known, taskx, words, message):
    said = taskx("submit", "email", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert known.count_tasks() == 1


def test_a_wrong_line_of_stdin_is_named(known, taskx):
    said = taskx("submit", "email", "-", input='{"n": 1}\n{\n')
    assert said.code == 2
    assert "line 2 of stdin is not JSON" in said.err
    assert known.count_tasks() == 1


def test_tasks_before_a_wrong_line_may_be_stored_and_that_is_said(known, taskx):
    said = taskx("submit", "email", "-", input='{"n": 1}\n' * 500 + "{\n")
    assert said.code == 2
    assert len(said.lines) == 500
    assert said.err.startswith("500 tasks were stored before the error\n")


def test_tasks_whose_ids_could_not_be_printed_are_counted(known, taskx, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "line", interrupted)
    said = taskx("submit", "email", "-", input='{"n": 1}\n{"n": 2}\n')
    assert (said.code, said.out) == (130, "")
    assert said.err == "2 tasks were stored before the error\ntaskx: interrupted\n"
    assert taskx("submit", "email").err.startswith("1 task was stored before the error\n")
    assert known.count_tasks() == 4
