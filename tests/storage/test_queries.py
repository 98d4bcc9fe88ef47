"""The queries that the runtime builds from the primitives, which work the same on every repository."""

import attrs
import pytest
from helpers import held_on, those_with

from taskx import TaskFilter
from taskx.node.housekeeper import unfinished
from taskx.node.retention import needed
from taskx.stores import queries
from taskx.stores.queries import count, matching, oldest_ready, owners, page, shown
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending
from taskx.tasks.writes import Delete

from .repositories import between_tasks, insert


class TestShown:
    """Reading back after an interrupt if a write took place."""

    def test_writes_that_took_place_are_recognised(self, store, add, clock, now):
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

    def test_a_new_task_is_recognised_after_it_changed(self, store, add, clock, now):
        """Otherwise a stored submission that another process has started would look like a duplicate."""
        write = insert("a", clock, owner="node", max_attempts=None)
        store.apply([write])
        store.apply([lifecycle.free("a", "node")])
        task = attrs.evolve(store.get_by_id("a"), max_attempts=3, timeout=5.0)
        store.apply([lifecycle.start(task, now, "other")])
        assert list(shown(store, [write])) == [True]

    def test_another_task_with_the_same_id_is_not_mistaken_for_it(self, store, add, clock):
        add("a")
        clock.advance(1)
        assert list(shown(store, [insert("a", clock)])) == [False]

    def test_a_start_by_another_node_is_not_mistaken_for_it(self, store, add, now):
        task = add("a")
        ours, theirs = (lifecycle.start(task, now, node) for node in ("ours", "theirs"))
        store.apply([theirs])
        assert list(shown(store, [ours, theirs])) in ([False, True], [False, True])


class TestPage:
    """A page of a list and the total, even if others write between the two reads."""

    @pytest.mark.parametrize(
        ("offset", "limit", "total"), [(0, 2, 2), (1, 1, 2), (2, 1, 0), (0, 0, 0)]
    )
    def test_the_total_fits_the_page_if_tasks_are_deleted(
        self, store, add, monkeypatch, offset, limit, total
    ):
        self.assert_total(store, add, monkeypatch, offset, limit, total, lambda: delete_all(store))

    @pytest.mark.parametrize(
        ("offset", "limit", "total"), [(0, 3, 2), (1, 2, 2), (2, 1, 2), (9, 1, 3)]
    )
    def test_the_total_fits_the_page_if_a_task_is_added(
        self, store, add, monkeypatch, offset, limit, total
    ):
        self.assert_total(store, add, monkeypatch, offset, limit, total, lambda: add("c"))

    def assert_total(self, store, add, monkeypatch, offset, limit, total, in_between):
        add("a")
        add("b")
        read = store.reads.list_after
        monkeypatch.setattr(store.reads, "list_after", lambda *args: (read(*args), in_between())[0])
        tasks, counted = page(store, TaskFilter(offset=offset, limit=limit))
        assert (len(tasks), counted) == (min(limit, max(0, 2 - offset)), total)

    def test_the_page_tells_how_many_tasks_follow_it(self, store, add):
        for name in "abc":
            add(name)
        for offset, limit, more in [
            (0, 1, 2),
            (1, 1, 1),
            (0, 3, 0),
            (2, 5, 0),
            (1, 0, 2),
            (9, 1, 0),
        ]:
            found = page(store, TaskFilter(offset=offset, limit=limit))
            assert (found.more, found.total) == (more, 3)


@pytest.mark.timing(batch=2)
class TestMatching:
    """An iteration over all tasks that match."""

    @pytest.fixture
    def seven(self, store, add, clock):
        for number in range(7):
            clock.advance(number % 3)
            add(str(number), type="ab"[number % 2])

    @pytest.mark.parametrize("conditions", [{}, {"type": "a"}, {"type": "x"}])
    def test_it_yields_what_a_list_returns(self, store, seven, conditions):
        whole = store.list(TaskFilter(**conditions))
        for offset, limit in [(0, None), (2, None), (0, 3), (3, 2), (9, 1), (0, 0)]:
            limits = {} if limit is None else {"limit": limit}
            found = matching(store, TaskFilter(**conditions, offset=offset, **limits))
            assert [*found] == whole[offset:][:limit]

    def test_a_span_of_time_bounds_it(self, store, seven):
        newest, *_, oldest = store.list(TaskFilter())
        wanted = TaskFilter(start_date=oldest.created_at, end_date=newest.created_at)
        assert len([*matching(store, wanted)]) == 7
        wanted = TaskFilter(start_date=newest.created_at, end_date=newest.created_at)
        assert [*matching(store, wanted)] == store.list(wanted) != []

    def test_it_reads_a_page_when_it_is_asked_for_it(self, store, seven, monkeypatch):
        limits, list_after = [], store.reads.list_after

        def counted(filter, after=None):
            limits.append(filter.limit)
            return list_after(filter, after)

        monkeypatch.setattr(store.reads, "list_after", counted)
        found = matching(store, TaskFilter())
        assert limits == []
        next(found), next(found)
        assert limits == [2]
        next(found)
        assert limits == [2, 2]


@pytest.mark.timing(batch=2)
class TestConditions:
    """Conditions that some repositories do not know: the queries apply them task by task."""

    @pytest.fixture
    def nine(self, store, add, clock):
        """Nine tasks, three of which have an id with "y"; several were created at the same time."""
        for n in range(9):
            clock.advance(n % 2)
            add(f"{'x' if n % 3 else 'y'}{n}", type="ab"[n % 2], params=f'{{"n":{n}}}')
        return [task.id for task in store.list(TaskFilter())]

    @pytest.mark.parametrize("prefix", ["x", "y", "y6", "z", ""])
    def test_pages_cover_the_matches_exactly_once(self, store, nine, prefix):
        for limit in (1, 2, 3, 5, 6, 7):
            self.assert_pages(store, nine, prefix, limit)

    def assert_pages(self, store, nine, prefix, limit):
        expected = [task_id for task_id in nine if task_id.startswith(prefix)]
        wanted = TaskFilter(id_prefix=prefix, limit=limit)
        found, made = [], page(store, wanted)
        while made.tasks:
            assert len(made.tasks) == limit or made.next is None
            found += [task.id for task in made.tasks]
            assert (made.total, made.more) == (len(expected), len(expected) - len(found))
            if made.next is None:
                break
            made = page(store, wanted, made.next)
        assert found == expected
        assert [task.id for task in matching(store, wanted)] == expected[:limit]
        skipped = page(store, attrs.evolve(wanted, offset=2))
        assert [task.id for task in skipped.tasks] == expected[2:][:limit]

    def test_matches_are_counted_up_to_a_number(self, store, nine):
        for at_most in (None, 1, 3, 4):
            counted = count(store, TaskFilter(id_prefix="y", limit=1), at_most)
            assert (counted, counted.exact) == (min(3, at_most or 3), (at_most or 3) >= 3)
            assert count(store, TaskFilter(id_prefix="y", type="b"), at_most) == 1
            assert count(store, TaskFilter(error="x"), at_most) == 0

    def test_params_are_searched(self, store, nine):
        wanted = TaskFilter(params={"n": 3}, type="b")
        assert [task.id for task in page(store, wanted).tasks] == ["y3"]
        assert [task.id for task in matching(store, wanted)] == ["y3"]
        assert count(store, wanted) == 1

    @pytest.mark.timing(most_searched=2)
    def test_a_page_searches_the_newest_tasks_in_params(self, store, nine):
        wanted = TaskFilter(params={"n": 3}, type="b")
        assert (page(store, wanted).total, page(store, wanted).exact) == (0, False)
        assert page(store, wanted).searched_since == store.get_by_id("x7").created_at
        assert count(store, wanted) == 1
        assert not count(store, wanted, 5).exact


def delete_all(store):
    store.apply([Delete("a", {}), Delete("b", {})])


class TestGetMany:
    def test_the_existing_tasks_are_returned_by_id(self, store, add):
        add("a")
        add("b")
        found = store.get_many(["b", "x", "a", "b"])
        assert {task_id: task.id for task_id, task in found.items()} == {"a": "a", "b": "b"}
        assert store.get_many([]) == {}

    def test_more_than_a_thousand_ids_can_be_read(self, store, clock):
        names = [f"task-{number}" for number in range(1201)]
        store.apply([insert(name, clock) for name in names])
        assert sorted(store.get_many([*names, "missing"])) == sorted(names)


class TestOldestReady:
    """The time since when the longest waiting task that may start has waited."""

    def test_running_and_cancelled_tasks_do_not_wait(self, store, run, add, now):
        run("a")
        add("b")
        store.apply([lifecycle.cancel("b", now)[0]])
        assert oldest_ready(store) is None

    def test_tasks_of_all_types_priorities_and_owners_count(self, store, add, clock, now):
        add("a", type="u", owner="node")
        clock.advance(1)
        add("b", priority=5)
        clock.advance(1)
        add("c")
        assert oldest_ready(store) == now
        store.apply([lifecycle.cancel("a", clock.now_ms())[0]])
        assert oldest_ready(store) == now + 1000
        store.apply([lifecycle.cancel("b", clock.now_ms())[0]])
        assert oldest_ready(store) == now + 2000


def test_a_delayed_task_waits_from_its_run_at_on(store, add, clock, now):
    add("a", run_at=now + 1000)
    assert oldest_ready(store) is None
    clock.advance(5)
    store.apply([lifecycle.release("a")])
    assert oldest_ready(store) == now + 1000


def test_a_task_just_released_does_not_hide_one_that_waits_longer(store, add, clock, now):
    """It was stored before the other one. The same holds for two delayed tasks."""
    add("a", run_at=now + 10_000)
    add("b", run_at=now + 5000)
    clock.advance(7)
    add("c")
    clock.advance(5)
    store.apply([lifecycle.release("a")])
    assert oldest_ready(store) == now + 7000
    store.apply([lifecycle.release("b")])
    assert oldest_ready(store) == now + 5000


def test_a_requeued_task_waits_from_its_requeue_on(store, run, clock, now):
    task = run("a")
    assert any(store.apply(lifecycle.conclude(task, Ending(returned=False, error="e"), now)))
    clock.advance(86_400)
    store.apply([lifecycle.requeue(store.get_by_id("a"), clock.now_ms())])
    assert oldest_ready(store) == clock.now_ms()


class TestOwners:
    """The nodes that hold tasks."""

    def test_a_node_owns_its_pending_and_running_tasks_until_they_end(self, store, add, run, now):
        add("a", owner="one")
        task = run("b", node="two")
        assert sorted(owners(store)) == ["one", "two"]
        assert those_with(store, "buffered_on", "one", "two") == ["a"]
        assert those_with(store, "running_on", "one", "two") == ["b"]
        store.apply(lifecycle.conclude(task, lifecycle.Ending(returned=True), now))
        store.apply([lifecycle.cancel("a", now)[0]])
        assert list(owners(store)) == []
        assert held_on(store, "two") == []

    def test_a_task_without_a_node_has_no_owner(self, store, add):
        add("a")
        assert list(owners(store)) == []
        assert held_on(store, "") == []
        assert held_on(store, "' OR 1=1 --") == []


class TestUnfinished:
    """The check for tasks that a drain waits for."""

    def test_pending_and_running_tasks_of_these_types_are_unfinished(self, store, add, run, now):
        assert not unfinished(store, ["t", "u"])
        task = run("a")
        assert unfinished(store, ["u", "t"])
        assert not unfinished(store, ["u"])
        assert not unfinished(store, [])
        store.apply(lifecycle.conclude(task, lifecycle.Ending(returned=True), now))
        assert not unfinished(store, ["t"])
        add("b", owner="node")
        assert unfinished(store, ["t"])

    def test_delayed_tasks_are_not_waited_for(self, store, add, now):
        add("a", run_at=now + 1)
        assert not unfinished(store, ["t"])


class TestParents:
    @between_tasks
    def test_the_statuses_of_many_tasks_are_read_at_once(self, store, add, run):
        add("a")
        run("b")
        assert store.statuses(["b", "nobody", "a"]) == {"a": "pending", "b": "running"}
        assert store.statuses([]) == {}

    @between_tasks
    def test_a_parent_is_needed_as_long_as_its_children_are_stored(self, store, add):
        add("p")
        add("q")
        for child, parents in {"a": ["p"], "b": ["p", "q"], "c": ["a", "gone"]}.items():
            add(child, depends_on=parents, waiting_on=parents[0])
        assert needed(store, ["p", "q", "a", "b", "nobody"]) == {"a"}, (
            "c needs it; the others are pruned together"
        )
        assert needed(store, ["p", "q"]) == {"p", "q"}
        assert needed(store, ["gone"]) == {"gone"}, "a hint without effect: the task does not exist"
        store.apply(lifecycle.cancel("b", 1))
        assert needed(store, ["q"]) == {"q"}
        store.delete("b")
        assert needed(store, ["q"]) == set()

    @between_tasks
    def test_the_children_of_several_tasks_are_found_with_their_parents(self, store, add):
        add("p")
        for child, parents in {"a": ["p"], "b": ["p", "q"], "c": ["a"]}.items():
            add(child, depends_on=parents, waiting_on=parents[0])
        pairs = queries.families(store, ["p", "q"])
        assert sorted(pairs) == [("p", "a"), ("p", "b"), ("q", "b")]
        assert list(queries.families(store, ["a", "nobody"])) == [("a", "c")]
        store.apply(lifecycle.cancel("c", 1))
        assert list(queries.families(store, ["a"])) == [("a", "c")]
        store.delete("c")
        assert list(queries.families(store, ["a"])) == list(queries.families(store, [])) == []
