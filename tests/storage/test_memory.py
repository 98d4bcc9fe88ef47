"""The repository in memory: consistent after any interrupt, and fast however many tasks it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import earliest_due, first_waiting, held_on, key_holders, those_with, waiting_keys
from hypothesis import given
from hypothesis import strategies as st
from strikes import strike_at

from taskx import MemoryRepository, Task, TaskFilter
from taskx.node.housekeeper import unfinished
from taskx.stores import memory, ordered
from taskx.stores.queries import oldest_ready, owners
from taskx.tasks import lifecycle
from taskx.tasks.writes import Update, Write

EVERYTHING = TaskFilter(limit=10**6)


def insert(task_id: str, **more: Any) -> Any:
    options = {"type": "t", "params": "{}", "created_by": "", "now": 1000, **more}
    return lifecycle.create(task_id=task_id, **options)


def start(store: MemoryRepository, task_id: str) -> Update:
    update = lifecycle.start(store.get_by_id(task_id), 2000, "node")
    assert update
    return update


def filled() -> MemoryRepository:
    store = MemoryRepository()
    store.apply([insert(task_id) for task_id in "abc"])
    store.apply([insert("late", run_at=5000), insert("key", unique_key="k", unique_scope="{}")])
    store.apply([start(store, "a")])
    return store


def complete(store: MemoryRepository) -> list[Write]:
    return list(lifecycle.conclude(store.get_by_id("a"), lifecycle.Ending(returned=True), 3000))


#: The writes that an interrupt may strike.
WRITES: dict[str, Any] = {
    "new tasks": lambda store: [insert("x"), insert("y", run_at=9000), insert("z", priority=3)],
    "one that waits for its turn": lambda store: [insert("x", concurrency_key="line")],
    "a child": lambda store: [insert("x", depends_on=["b"])],
    "a start": lambda store: [start(store, "b")],
    "an end": complete,
    "a release": lambda store: [lifecycle.release("late")],
    "a cancel": lambda store: lifecycle.cancel("key", 4000),
    "a deletion": lambda store: [lifecycle.delete("b")],
    "a mixture": lambda store: [insert("x"), start(store, "c"), lifecycle.delete("key")],
}


def seen(store: MemoryRepository) -> dict[str, Any]:
    """Return the results of all queries that the runtime makes."""
    return {
        "tasks": [task.to_dict() for task in store.list(EVERYTHING)],
        "ready": [store.ready(["t"], 100, owner) for owner in ("", "node")],
        "by age": store.ready(["t"], 100, ageing=1000),
        "due": (store.due(10**6, 100), earliest_due(store), oldest_ready(store)),
        "nodes": (set(owners(store)), held_on(store, "node"), unfinished(store, ["t"])),
        "keys": (
            key_holders(store, ["k"]),
            waiting_keys(store, "", 100),
            first_waiting(store, "line"),
        ),
        "parents": (
            store.distinct("waiting_on", "", 100),
            those_with(store, "waiting_on", "b"),
            store.statuses(["b"]),
        ),
        "ended": [store.ended(status, 10**6, 100) for status in lifecycle.FINISHED],
    }


def struck(point: int, what: str, whole: bool) -> MemoryRepository | None:
    """Interrupt an ``apply`` at a point, and return its store. Return None if it has fewer points."""
    store = filled()
    writes = WRITES[what](store)
    strike = strike_at(point, lambda: store.apply(writes, all_or_nothing=whole))
    return None if strike is None else store


@pytest.mark.parametrize("whole", [True, False], ids=["all or nothing", "each for itself"])
@pytest.mark.parametrize("what", WRITES)
def test_an_interrupted_transaction_is_applied_whole_or_not_at_all(what, whole):
    store = filled()
    before = seen(store)
    store.apply(WRITES[what](store), all_or_nothing=whole)
    after = seen(store)
    outcomes = []
    while (store := struck(len(outcomes), what, whole)) is not None:
        outcomes.append(seen(store))
        assert outcomes[-1] in (before, after), len(outcomes)
    assert len(outcomes) > 20
    assert outcomes[0] == before


def test_an_interrupted_transaction_can_be_repeated():
    store = struck(30, "a mixture", whole=False)
    assert all(store.apply(WRITES["a mixture"](store)))
    other = filled()
    other.apply(WRITES["a mixture"](other))
    assert seen(store) == seen(other)


def test_listing_a_page_reads_no_more_than_that_page(monkeypatch):
    store, asked, meets = MemoryRepository(), [], memory._meets
    store.apply([insert(f"{n:04}", now=1000 + n) for n in range(2000)])
    monkeypatch.setattr(memory, "_meets", lambda row, f: asked.append(row) or meets(row, f))
    page = store.list(TaskFilter(limit=3, offset=5))
    assert [task.id for task in page] == ["1994", "1993", "1992"]
    assert len(asked) <= 9


def test_tasks_are_listed_by_creation_time_not_by_order_of_storage():
    store = MemoryRepository()
    for number in (2, 3, 1):
        store.apply([insert(str(number), now=number)])
    store.create(Task(id="now", type="t"))
    assert [task.id for task in store.list(EVERYTHING)] == ["now", "3", "2", "1"]


# Sorted items


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40))), st.integers(-1, 41))
def test_sorted_items_behave_like_a_sorted_set(changes, first):
    items, expected = ordered.SortedItems(), set()
    for put_in, item in changes:
        (items.add if put_in else items.discard)(item)
        (expected.add if put_in else expected.discard)(item)
    in_order = [item for item in range(50) if item in expected]
    assert list(items) == in_order
    assert list(reversed(items)) == in_order[::-1]
    assert list(items.start_at(first)) == [item for item in in_order if item >= first]
    assert bool(items) == bool(expected)


@pytest.mark.parametrize("order", [1, -1])
def test_a_change_of_a_large_collection_moves_few_items(order):
    """The cost of a change grows with the length of the block that is changed."""
    items = ordered.SortedItems()
    for item in range(20_000)[::order]:
        items.add(item)
    assert max(map(len, items._blocks)) <= 2 * ordered.BLOCK
    assert len(items._blocks) <= 20_000 / ordered.BLOCK + 1
    for item in range(19_990):
        items.discard(item)
    assert list(items) == list(range(19_990, 20_000))
    assert all(items._blocks)


class Counted(str):
    """An id that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_a_change_of_a_task_with_many_parents_compares_each_of_them_a_few_times(monkeypatch):
    monkeypatch.setattr(Counted, "compared", 0)
    monkeypatch.setattr(
        memory, "ids_from_text", lambda text: [Counted(n) for n in json.loads(text)]
    )
    store = MemoryRepository()
    parents = [f"parent{number}" for number in range(200)]
    store.apply([insert("child", depends_on=parents)])
    [applied] = store.apply([Update("child", {}, {"priority": 3})])
    assert applied
    assert [id for (id,) in store.find("parent", ["parent7"], ("id",))] == ["child"]
    assert 0 < Counted.compared < 20 * len(parents)
