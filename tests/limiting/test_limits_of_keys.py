"""Limits of keys: each key that begins with a name has so many turns, and starts at a rate of its own."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter

import pytest
from helpers import PATIENCE, parts_of

from taskx import ConfigurationError, MemoryRepository
from taskx.node.ordering import Turns
from taskx.tasks import lifecycle
from taskx.tasks.rate import MOST_TURNS
from taskx.tasks.writes import Update
from taskx.testing import ManualQueue

from .test_limits import Crowd

pytestmark = pytest.mark.timing(audit_every=0.05, recover_every=0.05)


class Crowds:
    """An executor that counts the tasks of each key that run at once."""

    def __init__(self, wait=lambda: None):
        self.now, self.most, self.total = Counter(), Counter(), Counter()
        self._wait, self._lock = wait, threading.Lock()

    def __call__(self, ctx):
        key = ctx.task.concurrency_key
        with self._lock:
            self.now[key] += 1
            self.total[key] += 1
            self.most[key] = max(self.most[key], self.now[key])
        self._wait()
        with self._lock:
            self.now[key] -= 1


@pytest.mark.every_store
def test_each_key_has_its_turns_on_all_nodes(make_queue, gate):
    crowds = Crowds(gate)
    queues = [make_queue(worker_num=8) for _ in range(2)]
    for queue in queues:
        queue.limit("tenant:", concurrency=3)
        queue.limit("tenant:one", concurrency=1)
        queue.executor("t")(crowds)
        queue.start()
    for n in range(8):
        for key in ("tenant:a", "tenant:b", "tenant:one", "plain"):
            queues[n % 2].submit("t", key=key)
    gate.wait_for(8)
    gate.open()
    for queue in queues:
        assert queue.drain(PATIENCE)
    wanted = {"tenant:a": 3, "tenant:b": 3, "tenant:one": 1, "plain": 1}
    assert dict(crowds.most) == wanted
    assert crowds.total == dict.fromkeys(wanted, 8)


def test_a_program_that_only_submits_gives_as_many_turns_as_the_others_declare(make_queue, gate):
    queue, submitter = make_queue(worker_num=4), make_queue()
    queue.limit("tenant:", concurrency=3)
    queue.executor("t")(gate)
    queue.start()
    submitter.declare("t")
    ids = [submitter.submit("t", key="tenant:a").id for _ in range(4)]
    found = submitter.repository.find("id", ids, ("turn",))
    assert sorted(turn is not None for (turn,) in found) == [False, True, True, True]
    gate.wait_for(3)


def test_turns_pass_on_while_threads_take_turns_all_the_time(make_queue):
    crowds = Crowds()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        queues = [make_queue(worker_num=4) for _ in range(2)]
        for queue in queues:
            queue.limit("k:", concurrency=2)
            queue.executor("t")(crowds)
            queue.start()
        for n in range(120):
            queues[n % 2].submit("t", key=f"k:{n % 3}")
        for queue in queues:
            assert queue.drain(3 * PATIENCE)
    finally:
        sys.setswitchinterval(before)
    assert max(crowds.most.values()) <= 2
    assert crowds.total == dict.fromkeys(("k:0", "k:1", "k:2"), 40)


def test_without_the_unique_turns_more_would_run(make_queue, gate, monkeypatch):
    """The tests above can fail: here each task gets a turn of its own."""
    inner, names = lifecycle.give_turn, iter(range(100))
    monkeypatch.setattr(
        lifecycle, "give_turn", lambda i, turn, *more: inner(i, f"{turn} {next(names)}", *more)
    )
    crowd = Crowd(gate)
    queue = make_queue(worker_num=4)
    queue.limit("k:", concurrency=2)
    queue.executor("t")(crowd)
    queue.start()
    for _ in range(4):
        queue.submit("t", key="k:a")
    gate.wait_for(4)


def test_the_next_tasks_come_into_the_ready_index_in_their_order(queue):
    queue.limit("k:", concurrency=2)
    queue.declare("t")
    ids = [queue.submit("t", key="k:a").id for _ in range(5)]
    ready = [stub.id for stub in queue.repository.ready(["t"], 10, "", 0)]
    assert ready == ids[:2]  # no fetch ever reads the others
    queue.cancel_task(ids[0])
    assert [stub.id for stub in queue.repository.ready(["t"], 10, "", 0)] == ids[1:3]


def test_a_lowered_number_of_turns_strands_nothing_and_holds_when_tasks_end(make_queue, gate):
    crowds = Crowds(gate)
    queue = make_queue(worker_num=8)
    queue.limit("k:", concurrency=5)
    queue.executor("t")(crowds)
    queue.start()
    handles = [queue.submit("t", key="k:a") for _ in range(12)]
    gate.wait_for(5)
    queue.tune(limit="k:", concurrency=2)
    taken = lambda: len(  # noqa: E731
        queue.repository.find("turn", lifecycle.turns_of("k:a", MOST_TURNS), ("id",))
    )
    assert taken() == 5
    queue._moves.turns.advance(["k:a"])
    assert taken() == 5  # none is given while more than two are held
    gate.open()
    assert queue.drain(PATIENCE)
    assert [handle.done() for handle in handles] == [True] * 12
    assert taken() == 0


def test_no_turn_is_given_while_higher_ones_are_held(queue):
    """The tasks that had the first turns have ended, and the number was lowered."""
    queue.limit("k:", concurrency=5)
    queue.declare("t")
    ids = [queue.submit("t", key="k:a").id for _ in range(8)]
    queue.limit("k:", concurrency=2)
    holders = lambda: {  # noqa: E731
        task_id
        for (task_id,) in queue.repository.find(
            "turn", lifecycle.turns_of("k:a", MOST_TURNS), ("id",)
        )
    }
    for task_id in ids[:2]:
        queue.cancel_task(task_id)
    assert holders() == {*ids[2:5]}
    queue.cancel_task(ids[2])
    assert holders() == {*ids[3:5]}
    queue.cancel_task(ids[3])
    assert holders() == {*ids[4:6]}


def test_a_damaged_cost_holds_no_turn_back(queue):
    queue.limit("k:", rate="1 units/s")
    queue.declare("t")
    first = queue.submit("t", key="k:a", cost={"units": 1})
    second = queue.submit("t", key="k:a", cost={"units": 1})
    damage = Update(second.id, {}, {"cost": "{"}, move="by hand")
    assert queue.repository.apply([damage]) == [True]
    first.cancel()
    assert queue.repository.find("id", [second.id], ("turn",)) == [("k:a",)]


def test_a_raised_number_is_used_soon(make_queue, gate):
    queue = make_queue(worker_num=8)
    queue.limit("k:", concurrency=1)
    queue.executor("t")(gate)
    queue.start()
    for _ in range(6):
        queue.submit("t", key="k:a")
    gate.wait_for(1)
    queue.tune(limit="k:", concurrency=4)
    gate.wait_for(3)


def test_a_node_that_died_before_it_passed_turns_on_strands_nothing(make_queue, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Turns, "next_turn", lambda *_: ())
        patch.setattr(Turns, "advance", lambda *_: None)
        first = make_queue()
        first.limit("k:", concurrency=3)
        first.declare("t")
        for _ in range(9):
            first.submit("t", key="k:a")
    crowds = Crowds()
    queue = make_queue(worker_num=4)
    queue.limit("k:", concurrency=3)
    queue.executor("t")(crowds)
    queue.start()
    assert queue.drain(PATIENCE)
    assert crowds.total == {"k:a": 9}


def test_why_names_the_holders(queue):
    queue.limit("k:", concurrency=2)
    queue.declare("t")
    ids = [queue.submit("t", key="k:a").id for _ in range(3)]
    reason = next(reason for reason in queue.why(ids[2]) if reason.kind == "turn")
    assert reason.facts["holders"] == ids[:2]
    assert "have its 2 turns" in str(reason)


# --- rates


def rated(clock, **options):
    """Return a queue for which each key has a rate, and the times at which tasks have begun."""
    queue, times = ManualQueue(clock=clock), []
    queue.limit("k:", **options)
    begun = clock.monotonic()
    queue.executor("t")(lambda: times.append(round(clock.monotonic() - begun)))
    return queue, times


def test_a_key_starts_tasks_at_its_rate(clock):
    queue, times = rated(clock, concurrency=5, rate="6/m", burst=2)
    with queue:
        for _ in range(5):
            queue.submit("t", key="k:a")
        queue.advance(60)
        assert times == [0, 0, 10, 20, 30]


def test_time_without_workers_saves_up_no_more_than_a_burst(clock):
    queue, times = rated(clock, concurrency=5, rate="6/m", burst=2)
    for _ in range(8):
        queue.submit("t", key="k:a")
    clock.advance(600)  # those that have turns are due by now
    with queue:
        queue.advance(60)
    assert times == [600, 600, 610, 620, 630, 640, 650, 660]


def test_keys_do_not_wait_for_each_others_rates(clock):
    queue, times = rated(clock, rate="1/h")
    with queue:
        for n in range(4):
            queue.submit("t", key=f"k:{n % 2}")
        queue.run_all()
        assert times == [0, 0]


def test_a_key_has_a_budget_of_units(clock):
    queue, times = rated(clock, concurrency=3, rate="600 tokens/m")
    with queue:
        for number in (400, 300, 100):
            queue.submit("t", key="k:a", cost={"tokens": number})
        queue.submit("t", key="k:b", cost={"tokens": 600})
        with pytest.raises(ConfigurationError, match="above the burst of limit of key 'k:a', 600"):
            queue.submit("t", key="k:a", cost={"tokens": 601})
        queue.advance(60)
        assert len(times) == 4
        assert times[-1] in (10, 20)


def test_each_attempt_takes_a_token(clock):
    queue = ManualQueue(clock=clock)
    queue.limit("k:", rate="1/m", burst=1)
    begun, times = clock.monotonic(), []

    @queue.executor("t", max_attempts=3)
    def t():
        times.append(round(clock.monotonic() - begun))
        raise ValueError

    with queue:
        queue.submit("t", key="k:a")
        queue.advance(300)
    assert times == [0, 60, 120]


def test_a_task_that_the_rate_of_its_key_puts_off_is_not_ready(clock):
    queue, _ = rated(clock, concurrency=3, rate="1/h")
    with queue:
        ids = [queue.submit("t", key="k:a").id for _ in range(3)]
        queue.run_all()
        assert list(queue.repository.ready(["t"], 10, "", 0)) == []
        assert next(iter(queue.why(ids[1]))).kind == "due"


def test_a_task_that_another_node_puts_off_for_the_token_of_this_one_starts_soon(
    clock, monkeypatch
):
    """Both have it: this one takes the token, and the other one, which finds none, puts the task off."""
    queue, times = rated(clock, rate="1/h")
    repository, others = queue.repository, []
    inner = repository.apply

    def apply(writes, **options):
        if writes and writes[0].move == "start" and not others:
            task = repository.get_by_id(writes[0].id)
            others.extend(inner([lifecycle.put_off(task, clock.now_ms() + 3_600_000)]))
        return inner(writes, **options)

    monkeypatch.setattr(repository, "apply", apply)
    with queue:
        queue.submit("t", key="k:a")
        queue.run_all()
        queue.advance(1)
    assert others == [True]
    assert times in ([0], [1])


def test_a_rate_of_a_key_survives_a_restart(clock):
    repository = MemoryRepository(clock=clock)
    for ran in (1, 0):
        queue = ManualQueue(repository, clock=clock)
        queue.limit("k:", rate="1/h")
        queue.executor("t")(lambda: None)
        with queue:
            queue.submit("t", key="k:a")
            assert len(queue.run_all()) == ran


def test_rates_that_are_full_again_are_forgotten(clock):
    queue, _ = rated(clock, rate="1/m")
    with queue:
        for n in range(3):
            queue.submit("t", key=f"k:{n}")
        queue.run_all()
        notes = lambda: len(queue.repository.notes("limit/rate/k:"))  # noqa: E731
        turns = parts_of(queue).moves.turns
        turns.scan_some()
        assert notes() == 3
        clock.advance(62)
        turns.scan_some()
        turns.scan_some()
        assert notes() == 0


# --- the option


def test_key_is_the_new_name_of_concurrency_key(queue):
    queue.declare("t")
    assert queue.submit("t", key="a").task().concurrency_key == "a"
    assert queue.submit("t", concurrency_key="b").task().concurrency_key == "b"
    with pytest.raises(ConfigurationError, match="not both"):
        queue.submit("t", key="a", concurrency_key="a")
    with pytest.raises(ConfigurationError, match="key must not be empty"):
        queue.submit("t", key="")


@pytest.mark.parametrize(
    ("key", "number"),
    [("a:b:c", 3), ("a:b:x", 2), ("a:x", 1), ("a:", 1), ("x:a:b:", None), ("a", None)],
)
def test_the_exact_name_wins_and_then_the_longest_beginning(queue, key, number):
    for name, most in (("a:", 1), ("a:b:", 2), ("a:b:c", 3), ("a", 9)):
        queue.limit(name, concurrency=most)
    limit = queue._registry.limit_of_key(key)
    assert (limit and limit.max_concurrency) == number


def test_a_key_has_at_most_so_many_turns(queue):
    with pytest.raises(ConfigurationError, match="at most 100"):
        queue.limit("k:", concurrency=MOST_TURNS + 1)


def test_the_tasks_that_run_with_a_key_take_slots_of_its_own_limit(make_queue, gate):
    queue = make_queue(worker_num=4)
    queue.limit("k:a", concurrency=3)
    queue.executor("hold")(gate)
    queue.start()
    for _ in range(2):
        queue.submit("hold", concurrency_key="k:a")
    queue.submit("hold", concurrency_key="k:b")
    gate.wait_for(3)
    [limit] = queue.limits()
    assert (limit.name, limit.taken) == ("k:a", 2)


def test_a_limit_of_keys_has_no_state_of_its_own(make_queue):
    queue = make_queue()
    queue.limit("k:", concurrency=2, rate="5/s")
    queue.start()
    [limit] = queue.limits()
    assert (limit.taken, limit.free, limit.concurrency) == (None, (), 2)
    note = queue.repository.notes("pause.limits")["pause.limits"]
    assert json.loads(note.text) == {"k:": {"max_concurrency": 2, "rate": "5/s"}}
