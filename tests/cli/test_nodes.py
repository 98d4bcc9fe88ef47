"""``taskx nodes`` and ``taskx tune``."""

from __future__ import annotations

import pytest
from helpers import eventually

from taskx.stores.liveness.base import Node


@pytest.fixture
def started(queue, gate):
    """A started queue that runs a task."""

    @queue.executor(rate="10/m")
    def email() -> None:
        gate()

    with queue:
        handle = queue.submit("email")
        gate.wait_for()
        yield handle
        gate.open()


def test_nodes_are_listed_with_what_they_run(started, outside, taskx):
    [node] = outside.nodes()
    said = taskx("nodes")
    assert said.code == 0
    head, row, _, tasks, task = said.lines
    assert head.split() == [
        "NODE",
        "STATE",
        "UP",
        "WORKERS",
        "RUNNING",
        "BUFFERED",
        "VERSION",
        "TYPES",
        "ID",
    ]
    assert row.startswith(node.name)
    assert " alive " in row
    assert row.endswith(node.id)
    assert tasks.split()[:1] == ["NODE"]
    assert task.endswith(started.id)
    [record] = taskx("nodes", "--json").rows
    assert record["id"] == node.id
    assert [task["id"] for task in record["running"]] == [started.id]


def test_a_node_that_may_be_dead_shows_the_age_of_its_heartbeat(outside, taskx, monkeypatch):
    node = Node(id="n", name="host:1", beat_at=outside.clock.now_ms() - 3_600_000)
    monkeypatch.setattr(outside.repository.liveness, "nodes", lambda: [node])
    assert "  last beat 1h ago, lease 30s  " in taskx("nodes").lines[1]
    said = taskx("check")
    assert said.code == 1
    assert said.lines[0].startswith("Node host:1 may be dead: the last heartbeat was 1 h ")
    assert said.lines[1] == "0 live nodes run tasks of this repository; at least 1 must."


def test_stuck_threads_are_shown_by_node_and_by_type(make_queue, gate, clock, taskx):
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0, max_attempts=2)(gate)
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for()
    assert not any("STUCK" in taskx(command).out for command in ("nodes", "stats"))
    clock.advance(60)
    eventually(lambda: handle.task().stuck_on)
    for command in ("nodes", "stats"):
        head, row = (line.split() for line in taskx(command).lines[:2])
        assert row[head.index("STUCK")] == "1"
    top = taskx("top", "--once").lines
    heads = [line.split() for line in top if "STUCK" in line]
    assert [head[0] for head in heads] == ["TYPE", "NODE"]
    said = taskx("check")
    assert said.code == 1
    assert (
        "1 task of type 'hang' cannot start, and none runs: all wait for 1 stuck thread" in said.out
    )


def test_no_node_is_started(taskx):
    said = taskx("nodes")
    assert (said.code, said.out, said.err) == (0, "", "no node is started\n")


def test_shares_of_keys_are_shown_and_changed(queue, outside, taskx):
    queue.limit("tenant:", share=True)
    with queue:
        head, row = taskx("limits").lines
        assert head.split() == [
            *("LIMIT", "RUNNING", "RATE", "FREE", "SHARE", "TYPES", "CHANGED", "HELD")
        ]
        assert row.split() == ["tenant:", "1"]
        assert taskx("tune", "--limit", "tenant:", "--share", "3").code == 0
        assert taskx("limits", "--json").rows[0]["share"] == 3
        assert taskx("limits").lines[1].split() == ["tenant:", "3", "share"]
    assert outside.tuned().limits == {"tenant:": {"share": 3}}


def test_the_limits_of_a_type_are_changed_and_reset(started, outside, taskx):
    said = taskx("tune", "email", "--max-concurrency", "4", "--rate", "100/m", "--burst", "none")
    assert said.code == 0
    assert outside.tuned().types["email"].limits == {
        "max_concurrency": 4,
        "rate": "100/m",
        "burst": None,
    }
    assert [line.split()[:3] for line in said.lines] == [
        ["WHAT", "OPTION", "NOW"],
        ["email", "max_concurrency", "4"],
        ["email", "rate", "100/m"],
        ["email", "burst", "none"],
    ]
    eventually(
        lambda: taskx("tune", "email").lines[2].split() == ["email", "rate", "100/m", "10/m"]
    )
    [row] = taskx("tune", "--json").rows
    assert row["types"]["email"]["limits"]["max_concurrency"] == 4
    assert taskx("tune", "sms").err == "nothing was changed live for sms\n"
    taken = "taken back: email max_concurrency 4, email rate 100/m, email burst none\n"
    assert taskx("tune", "email", "--reset").err == taken
    assert taskx("tune", "email").err == "nothing was changed live for email\n"
    assert not outside.tuned()
    assert [change.action for change in outside.changes()] == ["untune", "tune"]


def test_a_limit_is_held_and_released(queue, outside, taskx):
    queue.limit("api", concurrency=2, rate="5/s")
    with queue:
        assert " HELD" in taskx("limits").lines[0]
        said = taskx("hold", "api", "10m")
        assert said.out.startswith("api is held until 20")
        [limit] = taskx("limits", "--json").rows
        assert limit["held_by"] == ""
        assert f"until {limit['held_until'][:10]} " in taskx("limits").lines[1]
        assert taskx("limits").lines[1].endswith(" by hand")
        assert taskx("hold", "api", "5s", "--json").rows == [limit]  # a hold is never shortened
        assert taskx("release", "api").out == "api is released\n"
        assert taskx("release", "api").out == "api was not held\n"
        assert taskx("release", "api", "--json").rows == [{"limit": "api", "was_held": False}]
    assert [change.action for change in outside.changes()] == ["release", "hold", "hold"]


def test_a_hold_that_has_ended_before_it_is_read_is_told(outside, taskx, monkeypatch):
    outside.declare("email")
    monkeypatch.setattr(type(outside), "limits", lambda self: [])  # as 2 ms later
    said = taskx("hold", "type/email", "1ms")
    assert (said.code, said.out) == (0, "")
    assert said.err == "type/email was held, and the time is over\n"


def test_the_number_of_workers_is_changed_and_reset(started, outside, taskx):
    [node] = outside.nodes()
    assert taskx("tune", "--workers", "8").lines[1].split() == ["all", "nodes", "workers", "8"]
    assert taskx("tune", "--workers", "3", "--node", node.id).code == 0
    tuned = outside.tuned()
    assert (tuned.workers, tuned.nodes) == (8, {node.id: 3})
    eventually(lambda: " 3 (of 2) " in taskx("nodes").lines[1])
    taskx("tune", "--reset", "--node", node.id)
    taskx("tune", "--reset")
    assert not outside.tuned()


def test_nothing_is_tuned(taskx):
    said = taskx("tune")
    assert (said.code, said.out, said.err) == (0, "", "nothing was changed live\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "1/s"], "the limits are those of a type"),
        (["email", "--workers", "2"], "leave out the type"),
        (["email", "--rate", "1/s", "--workers", "2"], "change them in a call of their own"),
        (["email", "--rate", "fast"], "rate"),
        (
            ["email", "--max-concurrency", "x"],
            "--max-concurrency must be a whole number or `none`, not 'x'",
        ),
        (["email", "--reset", "--rate", "1/s"], "leave out the values"),
        (["email", "--reset", "--node", "x"], "leave out one of them"),
        (["--node", "x"], "--node needs --workers or --reset"),
    ],
)
def test_a_wrong_tune_changes_nothing(outside, taskx, words, message):
    said = taskx("tune", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert not outside.tuned()


def test_the_stacks_of_a_node_are_printed(started, outside, taskx):
    [node] = outside.nodes()
    said = taskx("stacks", node.id[:30])
    assert said.code == 0
    assert f"email {started.id}" in said.lines[0]
    assert "in gate" in said.out or "__call__" in said.out
    rows = taskx("stacks", node.id, "--json").rows
    assert rows[0]["task_id"] == started.id


def test_an_unknown_node_is_not_found(started, taskx):
    assert taskx("stacks", "nope").code == 3


def test_a_node_that_does_not_answer_is_a_failure(started, outside, taskx, monkeypatch):
    def late(*args, **kwargs):
        raise TimeoutError("the node did not answer within 5 s")

    monkeypatch.setattr(outside, "stacks", late)
    said = taskx("stacks", outside.nodes()[0].id)
    assert (said.code, said.err) == (1, "taskx: the node did not answer within 5 s\n")


@pytest.mark.parametrize("by", ["id", "beginning", "name"])
def test_a_node_is_asked_to_stop_by_its_id_its_beginning_or_its_name(
    started, queue, outside, taskx, gate, by
):
    [node] = outside.nodes()
    word = {"id": node.id, "beginning": node.id[:8], "name": node.name}[by]
    said = taskx("nodes", "stop", word)
    assert (said.code, said.lines) == (0, [f"{node.id} asked to stop"])
    [change] = outside.changes()
    assert (change.action, change.target) == ("stop node", node.id)
    gate.open()
    eventually(lambda: queue.stopped)


def test_a_stop_prints_json(started, outside, taskx):
    [node] = outside.nodes()
    assert taskx("nodes", "stop", node.id, "--json").rows == [
        {"id": node.id, "outcome": "asked to stop"}
    ]


def test_a_word_that_fits_no_node_or_several_stops_none(started, queue, make_queue, outside, taskx):
    other = make_queue()
    other.executor("email")(lambda: None)
    other.start()
    said = taskx("nodes", "stop", "0")
    assert (said.code, said.err) == (
        2,
        "taskx: 2 nodes begin with '0': give more of the id\n",
    )
    assert taskx("nodes", "stop", "").code == 2
    assert taskx("nodes", "stop", "nope").code == 3
    said = taskx("nodes", "stpo", "0")
    assert (said.code, said.err) == (
        2,
        "taskx: `nodes` has no action 'stpo'; did you mean 'stop'?\n",
    )
    assert outside.changes() == []
    assert not queue.stopped
    assert not other.stopped


def test_the_workers_of_one_node_are_changed_by_its_name(started, outside, taskx):
    [node] = outside.nodes()
    assert taskx("tune", "--workers", "7", "--node", node.name).code == 0
    assert outside.tuned().nodes == {node.id: 7}
