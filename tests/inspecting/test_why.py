"""The question why a task waits: every reason, on every store, with its facts and its sentence."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import get_args

import pytest
from helpers import PATIENCE, Waiting, eventually, node_of, parts_of, pool_of

import taskx
from taskx import ConfigurationError, Reason, TaskNotFound, TaskStatus
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.findings import ReasonKind, duration
from taskx.tasks.rate import NO_RATES, Limit
from taskx.tasks.writes import NoteChange, Update


def kinds(found):
    return [reason.kind for reason in found]


def ask(queue, handle):
    """Return the reasons; check that asking changes nothing, and that they are fit to be printed."""
    repository = queue.repository
    before = list(getattr(repository, "batches", ()))
    found = queue.why(handle if isinstance(handle, str) else handle.id)
    # Started queues write by themselves.
    if not any(node_of(one) for one in queue.repository.queues):
        assert list(getattr(repository, "batches", ())) == before
    for reason in found:
        assert re.fullmatch(r"[A-Z0-9].+\.", str(reason), re.S), reason
        assert taskx.tasks.payload.encode(reason.to_dict(), "reason")
    return found


def only(queue, handle, kind):
    [reason] = ask(queue, handle)
    assert reason.kind == kind
    return reason


@pytest.fixture
def asker(make_queue):
    """A queue that is not started, on the same repository, without executors: as in another process."""
    return make_queue()


@pytest.fixture
def full(queue, gate):
    """A started queue of two workers that are busy until the gate opens; ``full.first`` run there."""
    queue.executor("note")(lambda n=0: n)
    waiting = Waiting(queue, gate)
    queue.start()
    queue.first = waiting.fill(2)
    return queue


# Pending


def test_an_unknown_task_is_not_found(queue):
    with pytest.raises(TaskNotFound):
        queue.why("unknown")
    with pytest.raises(ConfigurationError):
        queue.why(7)


def test_a_handle_gives_the_answer_about_its_task(full, asker):
    later = full.submit("note", delay=3600)
    for handle in (later, asker.handle(later.id)):
        assert kinds(handle.why()) == ["due"]
    with pytest.raises(TaskNotFound):
        asker.handle("unknown").why()


def test_a_delayed_task_waits_until_it_is_due(started, asker):
    when = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(hours=2)
    handle = started.submit("fine", run_at=when)
    for queue in (started, asker):
        reason = only(queue, handle, "due")
        assert reason.facts["run_at"] == when
        assert 7000 < reason.facts["seconds"] <= 7200
        left = duration(reason.facts["seconds"])
        assert str(reason) == f"It is due at {when:%Y-%m-%d %H:%M:%S} UTC, in {left}."


def test_a_retry_says_which_attempt_is_due(queue):
    @queue.executor(retry=taskx.RetryPolicy(2, base=3600, jitter=0))
    def fails():
        raise ValueError("not yet")

    queue.start()
    handle = fails.submit()
    eventually(lambda: handle.task().errors)
    reason = only(queue, handle, "due")
    assert reason.facts["attempt"] == 2
    assert str(reason).startswith("Attempt 2 is due at ")


def test_a_due_task_that_nobody_has_released_says_that_a_started_queue_does_it(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.declare("t")
    handle = queue.submit("t", delay=10)
    clock.advance(11)
    found = ask(queue, handle)
    assert kinds(found) == ["no_node", "due"]
    assert "It was due at" in str(found[1])
    assert "a started queue" in str(found[1])


def test_an_expired_task_says_that_a_started_queue_cancels_it(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.declare("t")
    handle = queue.submit("t", expires=10)
    assert kinds(ask(queue, handle)) == ["no_node"]
    clock.advance(10)
    found = ask(queue, handle)
    assert kinds(found) == ["expired", "no_node"]
    assert found[0].facts == {"expires_at": handle.task().expires_at}
    assert "a started queue cancels it" in str(found[0])


def test_a_child_waits_for_its_parents(full, asker):
    delayed = full.submit("note", delay=3600)
    child = full.submit("note", depends_on=[full.first[0].id, delayed.id])
    for queue in (full, asker):
        reason = only(queue, child, "parents")
        assert reason.facts["parents"] == {full.first[0].id: "running", delayed.id: "pending"}
        assert (reason.facts["unfinished"], reason.facts["of"]) == (2, 2)
        assert str(reason) == (
            f"It waits for 2 of 2 parents: {full.first[0].id} (running), {delayed.id} (pending)."
        )


def test_completed_parents_are_not_listed(started):
    done = started.submit("fine")
    done.result(PATIENCE)
    delayed = started.submit("fine", delay=3600)
    child = started.submit("fine", depends_on=[done.id, delayed.id])
    reason = only(started, child, "parents")
    assert reason.facts["parents"] == {delayed.id: "pending"}
    assert (reason.facts["unfinished"], reason.facts["of"]) == (1, 2)


@pytest.mark.timing(most_explained=2)
def test_of_very_many_parents_only_the_first_are_read(queue):
    queue.declare("t")
    parents = [queue.submit("t").id for _ in range(5)]
    reason = ask(queue, queue.submit("t", depends_on=parents))[0]
    assert reason.facts == {
        "parents": dict.fromkeys(parents[:2], "pending"),
        "unfinished": 2,
        "of": 5,
        "more": True,
    }
    assert str(reason).startswith(f"It waits for at least 2 of 5 parents: {parents[0]} (pending), ")


def test_a_child_whose_parents_have_ended_waits_for_a_started_queue(queue):
    queue.declare("t")
    parent = queue.submit("t")
    child = queue.submit("t", depends_on=[parent.id])
    queue.repository.update_status(parent.id, TaskStatus.CANCELLED)
    found = ask(queue, child)
    assert kinds(found) == ["parents", "no_node"]
    assert found[0].facts["parents"] == {parent.id: "cancelled"}
    assert str(found[0]).startswith("All its parents have ended: a started queue ")


def test_a_task_waits_for_the_turn_of_its_key(full, asker):
    first, second, third = (full.submit("note", concurrency_key="k") for _ in range(3))
    for queue in (full, asker):
        reason = only(queue, third, "turn")
        assert reason.facts == {
            "key": "k",
            "holder": first.id,
            "status": "pending",
            "type": "note",
            "place": 2,
        }
        assert str(reason) == (
            "It waits for the turn of concurrency key 'k', number 2 in its queue; "
            f"task {first.id} (pending, note) has the turn."
        )
        assert only(queue, second, "turn").facts["place"] == 1


@pytest.mark.timing(most_explained=2)
def test_a_place_far_back_in_the_queue_of_a_key_is_not_counted(queue):
    queue.declare("t")
    handles = [queue.submit("t", concurrency_key="k") for _ in range(5)]
    turn = ask(queue, handles[-1])[0]
    assert (turn.kind, turn.facts["place"]) == ("turn", None)
    assert "behind more than 2 tasks" in str(turn)


def test_a_free_turn_that_nobody_gives_says_that_a_started_queue_does_it(queue):
    queue.declare("t")
    first, second = (queue.submit("t", concurrency_key="k") for _ in range(2))
    queue.repository.apply([lifecycle.delete(first.id)])
    found = ask(queue, second)
    assert kinds(found) == ["turn", "no_node"]
    assert found[0].facts["holder"] is None
    assert "no task has the turn: a started queue" in str(found[0])


def test_a_task_of_a_type_that_no_live_node_runs_waits_for_one(started, asker):
    asker.declare("rare")
    reason = only(asker, asker.submit("rare"), "no_node")
    assert reason.facts == {"type": "rare", "nodes": [node_of(started).record.name], "stopping": []}
    assert str(reason) == (
        "No live node has an executor for type 'rare'; live nodes with other types: "
        f"{node_of(started).record.name}. Start a queue that has one."
    )


def test_a_queue_that_is_not_started_says_that_no_node_lives(queue):
    queue.executor("t")(lambda: None)
    reason = only(queue, queue.submit("t"), "no_node")
    assert reason.facts == {"type": "t", "nodes": [], "stopping": []}


def silent(id, clock, **more):
    return Node(id=id, name=id, types=("t",), beat_at=clock.now_ms() - 90_000, **more)


def test_a_node_that_may_be_dead_takes_no_task_and_is_named(make_queue, clock, monkeypatch):
    queue = make_queue(clock=clock)
    queue.declare("t")
    monkeypatch.setattr(queue.repository.liveness, "nodes", lambda: [silent("n", clock)])
    reason = only(queue, queue.submit("t"), "no_node")
    assert reason.facts == {"type": "t", "nodes": [], "stopping": [], "silent": ["n"]}
    assert str(reason) == (
        "No live node has an executor for type 't'; node n may be dead (the last heartbeat was 1 min 30 s "
        "ago, and a lease is 30 s). Start a queue that has one."
    )


def test_a_task_that_runs_on_a_node_that_may_be_dead_says_so(make_queue, clock, monkeypatch):
    queue = make_queue(clock=clock)
    queue.declare("t")
    handle = queue.submit("t")
    queue.repository.apply([lifecycle.start(handle.task(), clock.now_ms(), "n")])
    monkeypatch.setattr(queue.repository.liveness, "nodes", lambda: [silent("n", clock)])
    found = ask(queue, handle)
    assert kinds(found) == ["silent_node", "running"]
    assert str(found[0]) == (
        "Node n may be dead (the last heartbeat was 1 min 30 s ago, and a lease is 30 s): if it is, a live "
        "node takes the task back."
    )
    assert (found[0].facts["node"], found[0].facts["name"]) == ("n", "n")


def test_a_node_that_is_stopping_takes_no_task(full, asker, monkeypatch):
    full.repository.liveness.mark_stopping(node_of(full).record.id)
    if not full.repository.shared:  # nodes of one process are not asked to stop by their record
        node = Node(id="n", name="ends", types=("note",), stopping=True)
        monkeypatch.setattr(full.repository.liveness, "nodes", lambda: [node])
    asker.declare("note")
    found = ask(asker, asker.submit("note"))
    assert found[0].kind == "no_node"
    assert len(found[0].facts["stopping"]) == 1
    assert "is not stopping" in str(found[0])


def test_a_paused_task_says_how_to_resume_it(started, asker):
    started.pause("fine")
    handle = started.submit("fine")
    for queue in (started, asker):
        reason = only(queue, handle, "paused")
        assert reason.facts == {"type": "fine"}
        assert str(reason) == (
            "The type 'fine' is paused; queue.resume('fine'), or `taskx resume fine` in a shell, ends this."
        )
    started.pause()
    found = ask(asker, handle)
    assert [reason.facts["type"] for reason in found] == [None, "fine"]
    assert kinds(found) == ["paused", "paused"]


@pytest.mark.parametrize("scope", ["node", "global"])
def test_a_task_waits_for_a_slot(make_queue, gate, asker, scope):
    queue = make_queue(worker_num=2)
    queue.executor("hold", max_concurrency=1, limit_scope=scope)(gate)
    queue.start()
    holder = queue.submit("hold")
    gate.wait_for(1)
    waits = queue.submit("hold")
    for one in (queue, asker):
        reason = only(one, waits, "slot")
        assert reason.facts == {
            "limit": "type/hold",
            "max_concurrency": 1,
            "scope": scope,
            "holders": [holder.id],
            "nodes": {node_of(queue).record.name: 1},
        }
        name = node_of(queue).record.name
        where = "of all nodes together" if scope == "global" else f"on node {name}"
        assert str(reason) == (f"The only slot of type 'hold' {where} is held by task {holder.id}.")


@pytest.mark.parametrize("scope", ["node", "global"])
def test_the_slots_of_all_nodes_are_one_reason(make_queue, gate, asker, scope):
    queues = [make_queue(worker_num=3) for _ in range(2)]
    for queue in queues:
        queue.executor("hold", max_concurrency=2, limit_scope=scope)(gate)
        queue.start()
    most = 2 if scope == "global" else 4
    holders = {queues[0].submit("hold").id for _ in range(most)}
    gate.wait_for(most)
    reason = only(asker, queues[0].submit("hold"), "slot")
    assert set(reason.facts["holders"]) == holders
    assert sum(reason.facts["nodes"].values()) == most
    names = {node_of(queue).record.name for queue in queues}
    assert set(reason.facts["nodes"]) <= names
    where = "of all nodes together" if scope == "global" else "on each of the nodes "
    assert str(reason).startswith(f"All 2 slots of type 'hold' {where}")
    assert " are held by tasks " in str(reason)


def test_slots_that_a_node_keeps_without_a_task_are_a_reason(queue, monkeypatch):
    node = Node(
        id="n",
        name="keeper",
        types=("hold",),
        limits={"type/hold": Limit(2, NO_RATES, "global")},
        limited={"hold": ("type/hold",)},
        alive=True,
    )
    monkeypatch.setattr(queue.repository.liveness, "nodes", lambda: [node])
    note = NoteChange("limit/slots/type/hold", '{"n": 2}', 0)
    assert queue.repository.put_notes([note]) == [True]
    queue.declare("hold")
    reason = only(queue, queue.submit("hold"), "slot")
    assert (reason.facts["holders"], reason.facts["nodes"]) == ([], {"keeper": 2})
    assert str(reason).endswith(" are kept by node keeper.")


@pytest.mark.parametrize("scope", ["node", "global"])
def test_a_task_waits_for_a_token(make_queue, asker, scope):
    queue = make_queue(worker_num=2)
    queue.executor("call", rate="2/d", burst=1, limit_scope=scope)(lambda: None)
    queue.start()
    queue.submit("call").result(PATIENCE)
    waits = queue.submit("call")
    reason = only(queue, waits, "token")
    assert 42_000 < reason.facts["seconds"] <= 43_200
    assert reason.facts["next_at"] > datetime.now(timezone.utc) + timedelta(hours=11)
    assert {**reason.facts, "next_at": 0, "seconds": 0} == {
        "limit": "type/call",
        "count": 2,
        "period": 86400.0,
        "burst": 1,
        "scope": scope,
        "next_at": 0,
        "seconds": 0,
    }
    left = duration(reason.facts["seconds"])
    assert str(reason) == f"The next token of type 'call' comes in {left} (its rate is 2 in 24 h)."
    elsewhere = only(asker, waits, "token")
    if scope == "global":
        assert 42_000 < elsewhere.facts["seconds"] <= 43_200
    else:
        assert elsewhere.facts["seconds"] is elsewhere.facts["next_at"] is None
        assert f"only node {node_of(queue).record.name} knows" in str(elsewhere)


def test_a_slot_and_a_token_can_be_missing_at_once(make_queue, gate):
    queue = make_queue(worker_num=2)
    queue.executor("hold", max_concurrency=1, rate="1/d")(gate)
    queue.start()
    queue.submit("hold")
    gate.wait_for(1)
    assert kinds(ask(queue, queue.submit("hold"))) == ["slot", "token"]


def test_a_limit_of_an_executor_that_was_registered_later_is_known_elsewhere(started, asker, gate):
    started.executor("hold", max_concurrency=1)(gate)
    holder = started.submit("hold")
    gate.wait_for(1)
    [slot] = ask(asker, started.submit("hold"))
    assert (slot.kind, slot.facts["holders"]) == ("slot", [holder.id])


def test_slots_of_a_damaged_note_do_not_count(make_queue, gate):
    queue = make_queue(worker_num=1)
    queue.executor("hold", max_concurrency=2, limit_scope="global")(gate)
    queue.start()
    queue.submit("hold")
    gate.wait_for(1)
    waits = queue.submit("hold")
    name = "limit/slots/type/hold"
    version = queue.repository.notes(name)[name].version
    queue.repository.put_notes([NoteChange(name, "no JSON", version)])
    assert kinds(ask(queue, waits)) == ["worker"]


def test_a_limit_of_one_node_does_not_hold_a_task_that_another_node_can_run(make_queue, gate):
    limited, other = make_queue(worker_num=2), make_queue(worker_num=1)
    limited.executor("hold", max_concurrency=1)(gate)
    other.executor("hold")(gate)
    for queue in (limited, other):
        queue.start()
    for _ in range(2):
        limited.submit("hold")
    gate.wait_for(2)
    assert kinds(ask(limited, limited.submit("hold"))) == ["worker"]


def test_a_task_waits_for_a_free_worker(full, asker):
    handle = full.submit("note")
    name = node_of(full).record.name
    for queue in (full, asker):
        reason = only(queue, handle, "worker")
        assert reason.facts == {"nodes": [name], "running": 2, "buffered_on": name}
        assert str(reason) == (
            f"It may start, and waits for a free worker on {name}, where 2 tasks run."
        )


@pytest.mark.every_store
def test_a_task_waits_behind_those_that_come_first(full, asker):
    full.submit("note")
    full.submit("note", priority=5)
    last = full.submit("note")
    full.submit("note", priority=-1)
    for queue in (full, asker):
        found = ask(queue, last)
        assert kinds(found) == ["ahead", "worker"]
        assert found[0].facts == {"ahead": 2, "higher": 1, "more": False}
        assert str(found[0]) == "2 tasks come first, 1 with a higher priority."


def test_ageing_changes_how_many_come_first(make_queue, clock):
    plain, ageing = make_queue(clock=clock), make_queue(clock=clock, ageing=1)
    plain.declare("t")
    old = plain.submit("t")
    clock.advance(60)
    plain.submit("t", priority=5)
    assert "ahead" in kinds(ask(plain, old))
    assert "ahead" not in kinds(ask(ageing, old))


@pytest.mark.timing(most_explained=3)
def test_very_many_tasks_that_come_first_are_not_all_counted(queue):
    queue.declare("t")
    for _ in range(6):
        queue.submit("t")
    last = queue.submit("t")
    found = ask(queue, last)
    assert kinds(found) == ["no_node", "ahead"]
    assert found[1].facts == {"ahead": 3, "higher": 0, "more": True}
    assert str(found[1]) == "More than 3 tasks come first."


#: Makes a task that runs alone do so on a slow machine, too.
alone = pytest.mark.timing(alone_within=3600)


@pytest.fixture
def suspects(make_queue, gate, clock):
    """Return a started queue with two workers, another queue, and a function that stores a suspect."""
    queue = make_queue(worker_num=2, clock=clock)
    queue.executor("hold")(gate)

    def crashed(name, crashes=2):
        queue.pause("hold")
        handle = queue.submit("hold", id=name)
        assert list(queue.repository.apply([Update(name, {}, {"crashes": crashes})])) == [True]
        queue.resume("hold")
        return handle

    queue.start()
    asker = make_queue(clock=clock)
    asker.declare("hold")
    return queue, asker, crashed


@alone
def test_tasks_wait_for_one_that_runs_alone(suspects, gate, clock):
    queue, asker, crashed = suspects
    crashed("last")
    gate.wait_for(1)
    other = queue.submit("hold")
    for process in (queue, asker):
        reason = ask(process, other)[0]
        assert (reason.kind, reason.facts) == ("suspect", {"crashes": 0, "others": ["last"]})
    assert str(reason) == (
        "It waits for last, which would fail at the next crash, and so runs alone, for a minute at most."
    )
    clock.advance(3601)
    assert "suspect" not in kinds(ask(asker, other))


@alone
def test_a_task_on_its_last_chance_waits_for_the_others(suspects, gate, clock):
    queue, asker, crashed = suspects
    queue.submit("hold", id="neighbour")
    gate.wait_for(1)
    last = crashed("last")
    assert eventually(lambda: pool_of(queue).starter.suspects.item)
    clock.advance(1)
    behind = queue.submit("hold")
    for process in (queue, asker):
        reason = ask(process, last)[0]
        assert (reason.kind, reason.facts) == ("suspect", {"crashes": 2, "others": ["neighbour"]})
        assert str(reason) == (
            "It waits for neighbour, because it would fail at its next crash, and so runs alone."
        )
        reason = ask(process, behind)[0]
        assert (reason.kind, reason.facts) == ("suspect", {"crashes": 0, "others": ["last"]})


@alone
def test_a_task_on_its_last_chance_waits_for_another_one(suspects, gate, clock):
    _, asker, crashed = suspects
    crashed("one")
    gate.wait_for(1)
    clock.advance(61)  # the other tasks do not wait for it any more
    reason = ask(asker, crashed("another"))[0]
    assert (reason.kind, reason.facts) == ("suspect", {"crashes": 2, "others": ["one"]})


@pytest.mark.every_store
@alone
def test_a_task_that_may_crash_again_waits_for_a_worker(suspects, gate):
    _, asker, crashed = suspects
    for number in (1, 2):
        crashed(f"running{number}", crashes=1)
        gate.wait_for()
    assert "suspect" not in kinds(ask(asker, crashed("waiting", crashes=1)))


def test_a_task_is_held_by_a_stuck_attempt(make_queue, gate, asker, clock):
    queue = make_queue(worker_num=2, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0, max_attempts=2)(gate)
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for()
    clock.advance(60)
    eventually(lambda: handle.task().stuck_on)
    reason = only(queue, handle, "stuck")
    assert reason.facts["name"] == node_of(queue).record.name
    assert reason.facts["node"] == node_of(queue).record.id
    assert "in __call__" in reason.facts["stack"]
    assert "is stuck on node" in str(reason)
    assert only(asker, handle, "stuck").facts.keys() == reason.facts.keys()


def test_several_reasons_are_listed_with_the_decisive_one_first(queue):
    queue.declare("t")
    parent = queue.submit("t")
    child = queue.submit("t", depends_on=[parent.id], delay=3600)
    queue.pause("t")
    assert kinds(ask(queue, child)) == ["parents", "due", "no_node", "paused"]
    assert kinds(ask(queue, parent)) == ["no_node", "paused"]


# Running


def test_a_running_task_says_where_and_what_its_thread_does(full, asker):
    reason = only(full, full.first[0], "running")
    assert reason.facts["since"] == full.first[0].task().started_at
    assert reason.facts["node"] == node_of(full).record.id
    assert reason.facts["worker"] == full.first[0].task().worker
    assert (reason.facts["state"], reason.facts["attempt"]) == ("executing", 1)
    assert "in _hold" in reason.facts["stack"]
    assert f" on {reason.facts['worker']}, in attempt 1." in str(reason)
    elsewhere = only(asker, full.first[0], "running")
    assert elsewhere.facts["state"] == ""  # another queue has the thread
    assert "in _hold" in elsewhere.facts["stack"]
    assert elsewhere.facts["worker"] == reason.facts["worker"]


def test_each_running_task_has_the_stack_of_its_own_thread(make_queue, gate):
    def left():
        gate()

    def right():
        gate()

    queue = make_queue(worker_num=2)
    one, two = queue.executor()(left), queue.executor()(right)
    queue.start()
    handles = one.submit(), two.submit()
    gate.wait_for(2)
    stacks = [only(queue, handle, "running").facts["stack"] for handle in handles]
    assert ["in left" in stack for stack in stacks] == [True, False]
    assert ["in right" in stack for stack in stacks] == [False, True]


def test_the_stack_of_a_task_inside_another_one_begins_with_its_own_executor(make_queue, gate):
    queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")

    @queue.executor()
    def inner():
        gate()

    @queue.executor()
    def outer():
        inner.submit(), inner.submit()

    queue.start()
    handle = outer.submit()
    gate.wait_for(1)
    [task] = queue.list_tasks(type="inner", status="running").tasks
    assert "in outer" not in only(queue, task.id, "running").facts["stack"]
    stack = only(queue, handle, "running").facts["stack"]
    assert "in outer" in stack
    assert stack.index("in outer") < stack.index("in inner")


def test_a_running_task_that_was_asked_to_stop_says_so(full):
    full.cancel_task(full.first[0].id)
    found = ask(full, full.first[0])
    assert kinds(found) == ["cancel_requested", "running"]
    assert found[0].facts["at"] == full.first[0].task().cancel_requested_at


def test_a_task_that_runs_on_after_its_time_out_says_so(make_queue, gate, clock):
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("hang", timeout=10, grace=3600)(gate)
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for(1)
    clock.advance(15)
    found = ask(queue, handle)
    assert kinds(found) == ["timeout", "running"]
    assert str(found[0]) == "Its time-out of 10 s passed 5 s ago."


def test_a_task_of_a_dead_node_is_taken_back(queue):
    queue.declare("t")
    handle = queue.submit("t")
    queue.repository.apply([lifecycle.start(handle.task(), 0, "dead", "host:7:dead")])
    found = ask(queue, handle)
    assert kinds(found) == ["dead_node", "running"]
    assert str(found[0]) == "The node host:7:dead is dead: a live node takes the task back."


def test_a_node_that_leaves_while_somebody_asks_is_not_called_dead(queue, monkeypatch):
    queue.declare("t")
    handle = queue.submit("t")
    queue.repository.apply([lifecycle.start(handle.task(), 0, "left", "host:7:left")])

    def nodes():
        if handle.task().status is TaskStatus.RUNNING:
            queue.repository.update_status(handle.id, TaskStatus.PENDING)
        return []

    monkeypatch.setattr(queue.repository.liveness, "nodes", nodes)
    assert kinds(queue.why(handle.id)) == ["no_node"]


# Ended


def test_a_completed_task_says_when_it_ended(started, asker):
    handle = started.submit("fine")
    handle.result(PATIENCE)
    reason = only(asker, handle, "completed")
    task = handle.task()
    assert reason.facts["at"] == task.completed_at
    assert (reason.facts["attempts"], reason.facts["worker"]) == (1, task.worker)
    assert str(reason).startswith(
        f"It completed at {task.completed_at:%Y-%m-%d %H:%M:%S} UTC after"
    )


def test_a_failed_task_says_with_which_error(queue):
    @queue.executor()
    def fails():
        raise ValueError("no such account\nsecond line")

    queue.start()
    handle = fails.submit()
    eventually(lambda: handle.task().status.finished)
    reason = only(queue, handle, "failed")
    assert reason.facts["error_type"] == "ValueError"
    assert "in attempt 1 on " in str(reason)
    assert str(reason).endswith(": ValueError: no such account.")


def test_a_cancelled_task_says_when(queue):
    queue.declare("t")
    handle = queue.submit("t")
    handle.cancel()
    reason = only(queue, handle, "cancelled")
    assert str(reason) == (
        f"It was cancelled at {handle.task().completed_at:%Y-%m-%d %H:%M:%S} UTC."
    )


def test_a_failed_task_whose_thread_runs_on_says_so(make_queue, gate, clock):
    queue = make_queue(worker_num=2, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0)(gate)
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for()
    clock.advance(60)
    eventually(lambda: (task := handle.task()).stuck_on and task.status == "failed")
    assert kinds(ask(queue, handle)) == ["failed", "stuck"]


# Away


def test_a_repository_that_is_away_is_a_reason(queue, repository):
    queue.declare("t")
    handle = queue.submit("t")
    repository.down = True
    reason = only(queue, handle, "repository")
    assert reason.facts == {
        "error": "down for a while",
        "error_type": "RepositoryUnavailable",
    }
    repository.down = False
    assert kinds(ask(queue, handle)) == ["no_node"]


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_moved_file_is_a_reason(queue, database):
    queue.declare("t")
    handle = queue.submit("t")
    database.rename(database.with_name("elsewhere.db"))
    assert "was moved or deleted" in str(only(queue, handle, "repository"))
    database.with_name("elsewhere.db").rename(database)


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_damaged_record_says_so(queue, database):
    queue.declare("t")
    handle = queue.submit("t")
    parts_of(queue).repository.apply([Update(handle.id, {}, {"params": "no JSON"})])
    found = ask(queue, handle)
    assert kinds(found) == ["no_node", "damaged"]
    assert str(found[1]).startswith("The stored record is damaged: ")


# Documentation


def test_every_kind_is_in_the_table_of_the_page():
    page = Path(__file__).parent.parent.parent / "docs" / "why.rst"
    listed = re.findall(r"^``(\w+)``  ", page.read_text(), re.M)
    assert sorted(listed) == sorted(get_args(ReasonKind))


def test_a_reason_is_a_record_that_prints_its_sentence():
    reason = Reason("paused", "The type 't' is paused.", {"type": "t"})
    assert (str(reason), reason.kind, reason.facts["type"]) == (reason.sentence, "paused", "t")
    assert reason == Reason("paused", "The type 't' is paused.", {"type": "t"})
    assert hash(reason)
