"""What the runtime asks of a repository by its primitives, the same on every repository."""

import attrs
import pytest
from helpers import first_in_line, held_on, lines, those_with

from taskx import TaskFilter, TaskStatus
from taskx.core import lifecycle
from taskx.core.lifecycle import Ending
from taskx.core.writes import Delete, Update
from taskx.storage.queries import oldest_ready, owners, page, shown
from taskx.submitting.operations import children
from taskx.upkeep.housekeeper import unfinished
from taskx.upkeep.retention import needed

from .repositories import add_if_kept, between_tasks, ids, insert, keeping_time


class TestSettle:
    """After an interrupt, whether a write took place is read back."""

    def test_what_took_place(self, store, add, clock, now):
        task = add("a")
        writes = [
            insert("b", clock, params='{"x":1}', owner="node"),
            lifecycle.start(task, now, "node"),
            Delete("c", {}),
        ]
        add("c")
        assert list(shown(store, writes)) == [False, False, False]
        store.apply(writes)
        assert list(shown(store, writes)) == [True, True, True]

    def test_an_insert_is_known_again_after_it_moved_on(self, store, add, clock, now):
        """Or a submission that was stored, and taken up by another process, would seem a duplicate."""
        write = insert("a", clock, owner="node", max_attempts=None)
        store.apply([write])
        store.apply([lifecycle.disown("a", "node")])
        task = attrs.evolve(store.get_by_id("a"), max_attempts=3, timeout=5.0)
        store.apply([lifecycle.start(task, now, "other")])
        assert list(shown(store, [write])) == [True]

    def test_another_ones_insert_is_not_taken_for_it(self, store, add, clock):
        add("a")
        clock.advance(1)
        assert list(shown(store, [insert("a", clock)])) == [False]

    def test_another_nodes_start_is_not_taken_for_it(self, store, add, now):
        task = add("a")
        ours, theirs = (lifecycle.start(task, now, node) for node in ("ours", "theirs"))
        store.apply([theirs])
        assert list(shown(store, [ours, theirs])) in ([False, True], [False, True])


class TestPage:
    """A list and how many there are, though others write between the two looks."""

    @pytest.mark.parametrize(
        ("offset", "limit", "total"), [(0, 2, 2), (1, 1, 2), (2, 1, 0), (0, 0, 0)]
    )
    def test_if_tasks_are_deleted(self, store, add, monkeypatch, offset, limit, total):
        self.assert_total(store, add, monkeypatch, offset, limit, total, lambda: delete_all(store))

    @pytest.mark.parametrize(
        ("offset", "limit", "total"), [(0, 3, 2), (1, 2, 2), (2, 1, 2), (9, 1, 3)]
    )
    def test_if_one_more_is_stored(self, store, add, monkeypatch, offset, limit, total):
        self.assert_total(store, add, monkeypatch, offset, limit, total, lambda: add("c"))

    def assert_total(self, store, add, monkeypatch, offset, limit, total, meanwhile):
        add("a")
        add("b")
        look = store.list
        monkeypatch.setattr(store, "list", lambda filter: (look(filter), meanwhile())[0])
        tasks, counted = page(store, TaskFilter(offset=offset, limit=limit))
        assert (len(tasks), counted) == (min(limit, max(0, 2 - offset)), total)


def delete_all(store):
    store.apply([Delete("a", {}), Delete("b", {})])


class TestGetMany:
    def test_those_that_exist_by_id(self, store, add):
        add("a")
        add("b")
        found = store.get_many(["b", "x", "a", "b"])
        assert {task_id: task.id for task_id, task in found.items()} == {"a": "a", "b": "b"}
        assert store.get_many([]) == {}

    def test_a_thousand_and_more(self, store, clock):
        names = [f"task-{number}" for number in range(1201)]
        store.apply([insert(name, clock) for name in names])
        assert sorted(store.get_many([*names, "missing"])) == sorted(names)


class TestOldestReady:
    """Since when the task has waited, of those that may start, that waits longest."""

    def test_nothing_waits(self, store, run, add, now):
        run("a")
        add("b")
        store.apply([lifecycle.cancel("b", now)[0]])
        assert oldest_ready(store) is None

    def test_whatever_its_type_priority_and_owner(self, store, add, clock, now):
        add("a", type="u", owner="node")
        clock.advance(1)
        add_if_kept(add, "b", priority=5)
        clock.advance(1)
        add("c")
        assert oldest_ready(store) == now
        store.apply([lifecycle.cancel("a", clock.now_ms())[0]])
        assert oldest_ready(store) == now + 1000
        store.apply([lifecycle.cancel("b", clock.now_ms())[0]])
        assert oldest_ready(store) == now + 2000


@keeping_time
def test_a_delayed_task_waits_since_its_time_came(store, add, clock, now):
    add("a", run_at=now + 1000)
    assert oldest_ready(store) is None
    clock.advance(5)
    store.apply([lifecycle.release("a")])
    assert oldest_ready(store) == now + 1000


@keeping_time
def test_one_whose_time_has_just_come_hides_none_that_waits_longer(store, add, clock, now):
    """Though it was stored before that one; and so it is of two that were delayed."""
    add("a", run_at=now + 10_000)
    add("b", run_at=now + 5000)
    clock.advance(7)
    add("c")
    clock.advance(5)
    store.apply([lifecycle.release("a")])
    assert oldest_ready(store) == now + 7000
    store.apply([lifecycle.release("b")])
    assert oldest_ready(store) == now + 5000


@keeping_time
def test_a_requeued_task_waits_since_then(store, run, clock, now):
    task = run("a")
    assert any(store.apply(lifecycle.conclude(task, Ending(returned=False, error="e"), now)))
    clock.advance(86_400)
    store.apply([lifecycle.requeue(store.get_by_id("a"), clock.now_ms())])
    assert oldest_ready(store) == clock.now_ms()


class TestOwners:
    """Which node holds what."""

    def test_pending_and_running_until_they_end(self, store, add, run, now):
        add("a", owner="one")
        task = run("b", node="two")
        assert sorted(owners(store)) == ["one", "two"]
        assert those_with(store, "buffered_on", "one", "two") == ["a"]
        assert those_with(store, "running_on", "one", "two") == ["b"]
        store.apply(lifecycle.conclude(task, lifecycle.Ending(returned=True), now))
        store.apply([lifecycle.cancel("a", now)[0]])
        assert list(owners(store)) == []
        assert held_on(store, "two") == []

    def test_nobody_is_no_owner(self, store, add):
        add("a")
        assert list(owners(store)) == []
        assert held_on(store, "") == []
        assert held_on(store, "' OR 1=1 --") == []


class TestUnfinished:
    """Whether there is anything left to wait for."""

    def test_pending_or_running_of_these_types(self, store, add, run, now):
        assert not unfinished(store, ["t", "u"])
        task = run("a")
        assert unfinished(store, ["u", "t"])
        assert not unfinished(store, ["u"])
        assert not unfinished(store, [])
        store.apply(lifecycle.conclude(task, lifecycle.Ending(returned=True), now))
        assert not unfinished(store, ["t"])
        add("b", owner="node")
        assert unfinished(store, ["t"])

    @keeping_time
    def test_held_back_is_not_waited_for(self, store, add, now):
        add("a", run_at=now + 1)
        assert not unfinished(store, ["t"])


class TestParents:
    @between_tasks
    def test_a_child_is_found_by_the_parent_it_waits_on(self, store, add, clock):
        add("p")
        add("q")
        add("c", depends_on=["p", "q"], waiting_on="q")
        add("d", depends_on=["p"], waiting_on="p", on_parent_failure="run")
        assert store.get_by_id("d").depends_on == ["p"]
        assert store.get_by_id("d").on_parent_failure == "run"
        assert store.distinct("waiting_on", "", 10) == ["p", "q"]
        assert store.distinct("waiting_on", "p", 10) == ["q"]
        assert store.distinct("waiting_on", "", 1) == ["p"]
        assert those_with(store, "waiting_on", "q", "nobody") == ["c"]
        assert ids(store.ready(["t"], 10)) == ["p", "q"]
        assert store.count(TaskFilter(status=TaskStatus.PENDING)) == 4
        moved = Update("c", {"waiting_on": "q", "held": 2}, {"waiting_on": "p"})
        freed = Update("d", {"waiting_on": "p", "held": 2}, {"waiting_on": None, "held": 0})
        assert list(store.apply([moved, freed])) == [True, True]
        assert (store.distinct("waiting_on", "", 10), those_with(store, "waiting_on", "p")) == (
            ["p"],
            ["c"],
        )
        assert ids(store.ready(["t"], 10)) == ["p", "q", "d"]

    @between_tasks
    def test_the_status_of_many(self, store, add, run):
        add("a")
        run("b")
        assert store.statuses(["b", "nobody", "a"]) == {"a": "pending", "b": "running"}
        assert store.statuses([]) == {}

    @between_tasks
    def test_a_parent_is_needed_whatever_the_status_of_its_children(self, store, add):
        add("p")
        add("q")
        for child, parents in {"a": ["p"], "b": ["p", "q"], "c": ["a", "gone"]}.items():
            add(child, depends_on=parents, waiting_on=parents[0])
        assert needed(store, ["p", "q", "a", "b", "nobody"]) == {"a"}, (
            "by c: the others go with them"
        )
        assert needed(store, ["p", "q"]) == {"p", "q"}
        assert needed(store, ["gone"]) == {"gone"}, "a hint for nobody: it is not there"
        store.apply(lifecycle.cancel("b", 1))
        assert needed(store, ["q"]) == {"q"}
        store.delete("b")
        assert needed(store, ["q"]) == set()

    @between_tasks
    def test_children_of_several_tasks_are_listed_once(self, store, add):
        add("p")
        for child, parents in {"a": ["p"], "b": ["p", "q"], "c": ["a"]}.items():
            add(child, depends_on=parents, waiting_on=parents[0])
        assert sorted(children(store, ["p", "q"])) == ["a", "b"]
        assert list(children(store, ["a", "nobody"])) == ["c"]
        store.apply(lifecycle.cancel("c", 1))
        assert list(children(store, ["a"])) == ["c"]
        store.delete("c")
        assert list(children(store, ["a"])) == list(children(store, [])) == []


class TestLines:
    @between_tasks
    def test_first_come_first_in_line(self, store, add):
        for task_id in "cab":
            add(task_id, concurrency_key="k")
        add("x", concurrency_key="other")
        assert first_in_line(store, "k") == "c"
        assert first_in_line(store, "nobody") is None
        assert lines(store, "", 10) == {"k": True, "other": True}
        assert store.ready(["t"], 10) == []
        turn = Update("c", {"held": 4}, {"held": 0, "turn": "k"})
        assert list(store.apply([turn])) == [True]
        assert (first_in_line(store, "k"), lines(store, "", 10)) == (
            "a",
            {"k": False, "other": True},
        )
        assert ids(store.ready(["t"], 10)) == ["c"]
        store.delete("c")
        assert lines(store, "", 10) == {"k": True, "other": True}
        assert lines(store, "k", 10) == {"other": True}


@between_tasks
def test_stuck_tasks_are_found_by_node_whatever_their_status(store, run, clock):
    for task_id, status in (("a", "failed"), ("b", "pending")):
        run(task_id)
        changes = {"status": status, "owner": "", "stuck_on": "node", "held": 3}
        if status == "failed":
            changes["completed_at"] = clock.now_ms()
        assert list(store.apply([Update(task_id, {}, changes)])) == [True]
    assert sorted(those_with(store, "stuck_on", "node")) == ["a", "b"]
    assert those_with(store, "stuck_on", "other") == []
    assert owners(store) == ["node"]
    assert (held_on(store, "node"), store.ready(["t"], 10)) == ([], [])
    assert store.get_by_id("a").stuck_on == "node"
    over = [Update(i, {"stuck_on": "node"}, {"stuck_on": "", "held": 0}) for i in "ab"]
    assert list(store.apply(over)) == [True, True]
    assert (those_with(store, "stuck_on", "node"), owners(store)) == ([], [])
    assert ids(store.ready(["t"], 10)) == ["b"]
