"""The queues and turns of concurrency keys in every repository of TaskX."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest
from helpers import first_waiting, waiting_keys

from taskx import TaskFilter, TaskStatus
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import CancelReason
from taskx.tasks.record import FREE
from taskx.tasks.writes import Update
from taskx.testing import ManualClock

STORES = ["memory", "sqlite", "mongomock", "mongo", "mongo-set"]
on_every_store = pytest.mark.parametrize("store", STORES, indirect=True)

#: Numbers of random moves. A round trip to a server takes long, and the mock runs the same code.
ROUNDS = {"mongomock": 80, "mongo": 30, "mongo-set": 30}


def insert(task_id: str, now: int, key: str | None = "k", **options: Any) -> Any:
    return lifecycle.create(
        task_id=task_id,
        type="t",
        params="{}",
        created_by="",
        now=now,
        concurrency_key=key,
        max_attempts=2,
        **options,
    )


def ready(store: Repository) -> list[str]:
    return [stub.id for stub in store.ready(["t"], 100)]


def give(store: Repository, task_id: str, key: str = "k") -> bool:
    return any(store.apply(lifecycle.give_turn(task_id, key)))


def run(store: Repository, task_id: str, now: int) -> Any:
    task = store.get_by_id(task_id)
    assert store.apply([lifecycle.start(task, now, "node")])[0]
    return store.get_by_id(task_id)


def ending(**options: Any) -> lifecycle.Ending:
    return lifecycle.Ending(**{"returned": False, **options})


#: Ways in which a run ends; the second value is True if it gives up its turn.
ENDINGS = {
    "completes": (ending(returned=True), True),
    "fails": (ending(error="broken", permanent=True), True),
    "is cancelled": (ending(reason=CancelReason.CANCEL), True),
    "is retried": (ending(error="broken"), False),
    "is retried later": (ending(error="broken", delay=60.0), False),
    "snoozes": (ending(snooze=60.0), False),
    "is interrupted": (ending(reason=CancelReason.STOP), False),
}


@on_every_store
class TestTurns:
    def test_only_one_task_of_a_key_has_the_turn(self, store, clock):
        now = clock.now_ms()
        store.apply([insert("a", now), insert("b", now), insert("c", now, "other")])
        assert [give(store, "a"), give(store, "b"), give(store, "c", "other")] == [
            True,
            False,
            True,
        ]
        assert not give(store, "a")
        assert sorted(ready(store)) == ["a", "c"]

    def test_a_queue_stands_still_if_no_task_has_the_turn(self, store, clock):
        now = clock.now_ms()
        assert waiting_keys(store, "", 10) == {}
        store.apply([insert(f"{key}{n}", now, key) for n in range(3) for key in "abc"])
        assert waiting_keys(store, "", 10) == {"a": True, "b": True, "c": True}
        give(store, "b0", "b")
        assert waiting_keys(store, "", 10) == {"a": True, "b": False, "c": True}

    def test_all_queues_are_listed_page_by_page(self, store, clock):
        now = clock.now_ms()
        store.apply([insert(f"{key}{n}", now, key) for n in range(3) for key in "cab"])
        for key in "abc":
            give(store, f"{key}0", key)
        pages, after = [], ""
        while page := waiting_keys(store, after, 2):
            assert len(page) <= 2
            pages += page
            after = pages[-1]
        assert pages == ["a", "b", "c"]

    @pytest.mark.parametrize("how", ENDINGS)
    def test_only_the_end_of_a_task_gives_up_its_turn(self, store, clock, how):
        how_it_ended, gives_up = ENDINGS[how]
        now = clock.now_ms()
        store.apply([insert("a", now), insert("b", now)])
        give(store, "a")
        task = run(store, "a", now)
        store.apply(lifecycle.conclude(task, how_it_ended, now))
        assert give(store, "b") == gives_up

    @pytest.mark.parametrize("crashes", [1, 3])
    def test_a_rescued_task_keeps_its_turn_unless_it_ends(self, store, clock, crashes):
        now = clock.now_ms()
        store.apply([insert("a", now, max_crashes=crashes), insert("b", now)])
        give(store, "a")
        [writes] = lifecycle.rescue([run(store, "a", now)], now, stopping=False)
        assert any(store.apply(writes))
        assert give(store, "b") == (crashes == 1)

    def test_a_task_that_is_handed_back_keeps_its_turn(self, store, clock):
        now = clock.now_ms()
        store.apply([insert("a", now), insert("b", now)])
        give(store, "a")
        store.apply(lifecycle.hand_back(run(store, "a", now), now))
        assert not give(store, "b")

    def test_the_next_task_gets_the_turn_in_the_transaction_of_the_end(self, store, clock):
        now = clock.now_ms()
        store.apply([insert("a", now), insert("b", now)])
        give(store, "a")
        end = lifecycle.conclude(run(store, "a", now), ENDINGS["completes"][0], now)
        assert list(store.apply([*end, *lifecycle.give_turn("b", "k")])) == [True, True, False]
        assert ready(store) == ["b"]

    def test_a_task_created_by_hand_waits_for_its_turn(self, store):
        from taskx import Task

        store.create(Task(id="a", type="t", concurrency_key="k"))
        assert (ready(store), first_waiting(store, "k")) == ([], "a")
        assert store.get_by_id("a").concurrency_key == "k"

    @pytest.mark.parametrize("change", [{"priority": 9}, {"run_at": to_datetime(1)}])
    def test_an_updated_task_still_waits_for_its_turn(self, store, clock, change):
        """It does so even if the update sets a ``run_at`` that has passed."""
        now = clock.now_ms()
        store.apply([insert("a", now), insert("b", now)])
        store.update(attrs.evolve(store.get_by_id("b"), **change))
        assert ready(store) == []
        assert [give(store, "a"), give(store, "b")] == [True, False]


def some_move(chance: random.Random, store: Repository, now: int, number: int) -> list[Any]:
    """Return the writes of a random move on a random task."""
    tasks = list(store.list(TaskFilter(limit=1000)))
    kind = chance.randrange(6)
    if not tasks or kind == 0:
        return [insert(f"{number:04}", now, chance.choice("jk"))]
    task = chance.choice(tasks)
    if kind == 1:
        key = chance.choice("jk")
        first = first_waiting(store, key)
        return lifecycle.give_turn(first, key) if first else []
    if kind == 2 and task.status is TaskStatus.PENDING:
        start = lifecycle.start(task, now, "node")
        return [start] if start else []
    if kind == 3 and task.status is TaskStatus.RUNNING:
        return lifecycle.conclude(task, chance.choice([*ENDINGS.values()])[0], now)
    if kind == 4 and task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
        return [lifecycle.requeue(task, now)]
    if kind == 5:
        if task.status is TaskStatus.RUNNING:
            return lifecycle.rescue([task], now, stopping=chance.random() < 0.5)[0]
        moves = (lifecycle.cancel(task.id, now)[:1], [lifecycle.release(task.id)])
        return chance.choice([*moves, [lifecycle.delete(task.id)]])
    return []


@pytest.mark.parametrize("seed", range(3))
@on_every_store
def test_at_most_one_task_of_a_key_may_start_or_runs(store, clock, seed, request):
    """This holds after any moves. And no queue stands still if its next task could start."""
    make_moves(store, clock, seed, ROUNDS.get(request.node.callspec.params["store"], 250))


def make_moves(store: Repository, clock: ManualClock, seed: int, rounds: int) -> None:
    chance, most = random.Random(seed), 0
    for number in range(rounds):
        clock.advance(1)
        store.apply(some_move(chance, store, clock.now_ms(), number))
        tasks = store.list(TaskFilter(limit=1000))
        may_start, delayed = {*ready(store)}, dict(store.due(None, 1000))
        for key in "jk":
            of_key = [task for task in tasks if task.concurrency_key == key]
            at_it = [t for t in of_key if t.id in may_start or t.status is TaskStatus.RUNNING]
            assert len(at_it) <= 1
            most = max(most, len(at_it))
            # The task that has the turn may also be delayed.
            held = [task for task in of_key if task.id in delayed]
            assert len(at_it) + len(held) <= 1
            waits = first_waiting(store, key) is not None
            assert waiting_keys(store, "", 10).get(key, False) == (waits and not at_it and not held)
    assert most == 1


@on_every_store
def test_the_test_above_finds_a_turn_that_is_given_unchecked(store, clock, monkeypatch, request):
    """Otherwise it would prove nothing."""

    def careless(task_id, key):
        return [Update(task_id, {"status": "pending"}, {"held": FREE})]

    monkeypatch.setattr(lifecycle, "give_turn", careless)
    with pytest.raises(AssertionError):
        make_moves(store, clock, 0, ROUNDS.get(request.node.callspec.params["store"], 250))
