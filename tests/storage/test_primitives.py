"""What the runtime needs beyond the eight methods, the same on every repository."""

import json
import sys
import threading
from datetime import timedelta

import attrs
import pytest

from taskx import (
    CancelReason,
    ConfigurationError,
    InvalidTransition,
    MemoryRepository,
    PayloadError,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.core import lifecycle
from taskx.core.clock import to_ms
from taskx.core.lifecycle import Ending
from taskx.core.writes import PRESENT, Delete, Update, matches
from taskx.storage.base import Node, NoteChange
from taskx.testing import ManualClock

from .repositories import MAKERS

MONGO = ["mongomock", "mongo", "mongo-set"]
#: Stores that keep several new tasks in one transaction, or any several writes.
whole_batches = pytest.mark.parametrize(
    "store", ["memory", "sqlite", "sqlite-coded", *MONGO], indirect=True
)
#: Stores that keep more than the thirteen fields of the original.
keeping_options = pytest.mark.parametrize(
    "store", [kind for kind in MAKERS if kind != "adapter-13"], indirect=True
)
transactional = pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)


@pytest.fixture
def now(clock):
    return clock.now_ms()


def insert(task_id, clock, *, owner="", **options):
    write = lifecycle.create(
        **{
            "task_id": task_id,
            "type": "t",
            "params": "{}",
            "created_by": "",
            "now": clock.now_ms(),
            **options,
        }
    )
    write.row["owner"] = owner
    return write


@pytest.fixture
def add(store, clock):
    """Store a pending task."""

    def add(task_id, waiting_on=None, **options):
        new = insert(task_id, clock, **options)
        if waiting_on is not None:
            lifecycle.wait_for(new, waiting_on)
        assert list(store.apply([new])) == [True]
        return store.get_by_id(task_id)

    return add


@pytest.fixture
def run(store, add, clock):
    """Store a task and start it."""

    def run(task_id, node="node", **options):
        task = add(task_id, **options)
        start = lifecycle.start(task, clock.now_ms(), node)
        assert list(store.apply([start])) == [True]
        return store.get_by_id(task_id)

    return run


def in_threads(work, count):
    """Do it in so many threads at once, that switch all the time; each has a number."""
    failures = []

    def guarded(number):
        try:
            work(number)
        except Exception as error:  # noqa: BLE001  (told below)
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


def ids(stubs):
    return [stub.id for stub in stubs]


def ids_of_ended(found):
    return [task.stub.id for task in found]


class TestApply:
    def test_each_write_says_whether_its_guard_held(self, store, add, clock):
        add("a")
        writes = [
            insert("a", clock),
            Update("a", {"status": "pending"}, {"message": "held"}),
            Update("a", {"status": "running"}, {"message": "did not"}),
            Update("nobody", {}, {"message": "no such task"}),
            insert("b", clock),
        ]
        assert list(store.apply(writes)) == [False, True, False, False, True]
        assert store.get_by_id("a").message == "held"
        assert sorted(store.get_many(["a", "b", "nobody"])) == ["a", "b"]

    def test_a_later_write_sees_an_earlier_one(self, store, add):
        add("a")
        first = Update("a", {"message": ""}, {"message": "one"})
        second = Update("a", {"message": "one"}, {"message": "two"})
        assert list(store.apply([second, first, second, second])) == [False, True, True, False]

    def test_alike_writes_are_told_apart(self, store, add, clock):
        """Also where they go out together."""
        for number in range(60):
            add(str(number), owner="other" if number % 7 == 0 else "")
        takes = [lifecycle.take(str(number), "node") for number in range(61)]
        held = [number % 7 != 0 and number < 60 for number in range(61)]
        assert list(store.apply(takes)) == held
        assert list(store.apply(takes)) == [False] * 61
        assert list(store.apply([lifecycle.give_up("1", "node")] * 2)) == [True, False]
        assert sorted(ids(store.owned("node")), key=int) == [
            str(number) for number in range(2, 60) if number % 7
        ]

    def test_no_writes_are_fine(self, store):
        assert list(store.apply([])) == []

    @pytest.mark.parametrize(
        ("guard", "holds"),
        [
            ({}, True),
            ({"message": "said"}, True),
            ({"message": "SAID"}, False),
            ({"message": ""}, False),
            ({"progress": 0}, True),
            ({"progress": 1}, False),
            ({"run_at": None}, True),
            ({"started_at": None}, False),
            ({"started_at": PRESENT}, True),
            ({"run_at": PRESENT}, False),
            ({"status": ("pending", "running")}, True),
            ({"status": ("completed",)}, False),
            ({"status": ()}, False),
            ({"status": "running", "message": "said", "run_at": None}, True),
            ({"status": "running", "message": "said", "run_at": PRESENT}, False),
            ({"message": "' OR 1=1 --"}, False),
        ],
    )
    def test_a_guard_tests_columns(self, store, run, guard, holds):
        """A value, None, one of several, or present; all of them must hold."""
        run("a")
        store.apply([Update("a", {}, {"message": "said"})])
        assert list(store.apply([Update("a", guard, {"message": "changed"})])) == [holds]
        assert store.get_by_id("a").message == ("changed" if holds else "said")
        if holds and "message" not in guard:
            assert list(store.apply([Delete("a", guard)])) == [True]
            assert store.get_many(["a"]) == {}

    def test_guards_in_python_mean_the_same(self):
        row = {"a": None, "b": 0}
        assert matches(row, {"a": None, "b": (0, 1)})
        assert not matches(row, {"a": PRESENT})
        assert matches(row, {"b": PRESENT})

    def test_a_delete_that_fails_its_guard_deletes_nothing(self, store, run):
        run("a")
        assert list(store.apply([lifecycle.delete("a"), lifecycle.delete("b")])) == [False, False]
        assert store.get_by_id("a").status is TaskStatus.RUNNING


class TestAllOrNothing:
    @whole_batches
    def test_all_when_every_guard_holds(self, store, add, clock):
        writes = [insert("a", clock), insert("b", clock)]
        assert list(store.apply(writes, all_or_nothing=True)) == [True, True]
        assert sorted(store.get_many(["a", "b"])) == ["a", "b"]

    @whole_batches
    @pytest.mark.parametrize(
        "others", [["b"], ["b", "b"], ["b", "c", "b"]], ids=["exists", "twice", "exists and twice"]
    )
    def test_nothing_when_an_insert_is_a_duplicate(self, store, add, clock, others):
        """The ids at fault are those that are told False."""
        add("a")
        writes = [insert(task_id, clock) for task_id in (*others, "a")]
        results = store.apply(writes, all_or_nothing=True)
        expected = [task_id not in others[:i] for i, task_id in enumerate(others)]
        assert list(results) == [*expected, False]
        assert store.count(TaskFilter()) == 1

    @transactional
    def test_nothing_when_a_guard_fails(self, store, add, clock):
        add("a")
        writes = [
            Update("a", {"status": "pending"}, {"message": "changed"}),
            Update("a", {"status": "running"}, {"message": "no"}),
            insert("b", clock),
        ]
        assert not all(store.apply(writes, all_or_nothing=True))
        assert store.get_by_id("a").message == ""
        assert store.count(TaskFilter()) == 1

    @pytest.mark.parametrize("store", MONGO, indirect=True)
    def test_mongo_has_it_for_new_tasks_only(self, store, add, clock):
        """It uses no transactions, which a standalone server has not."""
        add("a")
        writes = [Update("a", {}, {"message": "changed"}), insert("b", clock)]
        with pytest.raises(ConfigurationError, match="new tasks only"):
            store.apply(writes, all_or_nothing=True)
        assert store.get_by_id("a").message == ""
        assert store.count(TaskFilter()) == 1

    @pytest.mark.parametrize("store", ["adapter"], indirect=True)
    def test_eight_methods_have_no_transaction(self, store, clock):
        with pytest.raises(ConfigurationError, match="TinyRepository"):
            store.apply([insert("a", clock), insert("b", clock)], all_or_nothing=True)
        assert store.count(TaskFilter()) == 0
        assert list(store.apply([insert("a", clock)], all_or_nothing=True)) == [True]


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
        assert list(store.settle(writes)) == [False, False, False]
        store.apply(writes)
        assert list(store.settle(writes)) == [True, True, True]

    def test_an_insert_is_known_again_after_it_moved_on(self, store, add, clock, now):
        """Or a submission that was stored, and taken up by another process, would seem a duplicate."""
        write = insert("a", clock, owner="node", max_attempts=None)
        store.apply([write])
        store.apply([lifecycle.give_up("a", "node")])
        task = attrs.evolve(store.get_by_id("a"), max_attempts=3, timeout=5.0)
        store.apply([lifecycle.start(task, now, "other")])
        assert list(store.settle([write])) == [True]

    def test_another_ones_insert_is_not_taken_for_it(self, store, add, clock):
        add("a")
        clock.advance(1)
        assert list(store.settle([insert("a", clock)])) == [False]

    def test_another_nodes_start_is_not_taken_for_it(self, store, add, now):
        task = add("a")
        ours, theirs = (lifecycle.start(task, now, node) for node in ("ours", "theirs"))
        store.apply([theirs])
        assert list(store.settle([ours, theirs])) in ([False, True], [False, True])


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


class TestReady:
    """Pending tasks that may start now and that nobody holds."""

    def test_highest_priority_then_first_stored(self, store, add, clock):
        for number, priority in enumerate([0, 5, -5, 5, 0]):
            options = {} if not priority else {"priority": priority}
            add_if_kept(store, add, str(number), **options)
            clock.advance(-0.0)
        expected = [i for _, i in sorted((-store.get_by_id(i).priority, i) for i in "01234")]
        assert ids(store.ready(["t"], 10)) == expected
        assert ids(store.ready(["t"], 3)) == expected[:3]
        assert ids(store.ready(["t"], 0)) == []

    def test_first_stored_across_types_whatever_the_clock_says(self, store, add, clock):
        add("first", type="t")
        clock.set_wall(clock.now() - timedelta(hours=1))
        add("second", type="u")
        add("third", type="t")
        assert ids(store.ready(["u", "t"], 10)) == ["first", "second", "third"]

    def test_only_of_the_types_asked_for(self, store, add):
        add("a", type="t")
        add("b", type="u")
        assert ids(store.ready(["u", "v"], 10)) == ["b"]
        assert ids(store.ready(["' OR 1=1 --", "%"], 10)) == []
        assert ids(store.ready([], 10)) == []

    def test_not_what_a_node_holds(self, store, add):
        add("a", owner="node")
        assert ids(store.ready(["t"], 10)) == []
        store.apply([lifecycle.give_up("a", "other")])
        assert ids(store.ready(["t"], 10)) == []
        store.apply([lifecycle.give_up("a", "node")])
        assert ids(store.ready(["t"], 10)) == ["a"]
        store.apply([lifecycle.take("a", "node")])
        assert ids(store.ready(["t"], 10)) == []

    def test_what_waits_in_the_buffer_of_a_node(self, store, add, run, clock):
        for task_id, owner in [("a", "one"), ("b", "one"), ("c", "two")]:
            add(task_id, owner=owner)
            clock.advance(1)
        run("d", node="one")
        assert ids(store.ready(["t"], 10, "one")) == ["a", "b"]
        assert ids(store.ready(["t"], 1, "one")) == ["a"]
        assert ids(store.ready(["u"], 10, "one")) == []
        assert list(store.apply([lifecycle.take("a", "two", "one")])) == [True]
        assert list(store.apply([lifecycle.take("a", "three", "one")])) == [False]
        assert ids(store.ready(["t"], 10, "two")) == ["a", "c"]

    @keeping_options
    def test_with_ageing_so_much_waiting_counts_as_one_priority_more(self, store, add, clock):
        """Ten seconds here; equal ones by when they were stored, whatever their type."""
        for task_id, priority, type, wait in [
            ("old", 0, "t", 20),
            ("higher", 1, "u", 10),
            ("middle", 1, "t", 0),
            ("same", 1, "u", 10),
            ("high", 2, "t", 11),
            ("new", 0, "t", 0),
        ]:
            add(task_id, priority=priority, type=type, now=clock.now_ms())
            clock.advance(wait)
        order = ["old", "higher", "middle", "same", "high", "new"]
        assert ids(store.ready(["t", "u"], 10, ageing=10_000)) == order
        assert ids(store.ready(["t", "u"], 3, ageing=10_000)) == order[:3]
        assert ids(store.ready(["u"], 10, ageing=10_000)) == ["higher", "same"]
        assert ids(store.ready(["t", "u"], 10, ageing=1)) == [
            "old",
            "higher",
            "middle",
            "same",
            "high",
            "new",
        ]
        assert ids(store.ready(["t", "u"], 10, ageing=10**9))[0] == "high"
        assert ids(store.ready([], 10, ageing=1)) == []

    @keeping_options
    def test_with_ageing_what_was_delayed_waits_since_its_time(self, store, add, clock, now):
        add("late", run_at=now + 50_000)
        add("soon", now=now + 20_000)
        clock.advance(60)
        store.apply([lifecycle.release("late")])
        assert ids(store.ready(["t"], 10)) == ["late", "soon"]
        assert ids(store.ready(["t"], 10, ageing=1000)) == ["soon", "late"]

    @keeping_options
    def test_with_ageing_many_of_a_high_priority_hide_no_old_one(self, store, clock):
        store.apply([insert("old", clock)])
        clock.advance(100)
        store.apply([insert(f"new {n}", clock, priority=9) for n in range(50)])
        assert ids(store.ready(["t"], 1)) == ["new 0"]
        assert ids(store.ready(["t"], 2, ageing=1000)) == ["old", "new 0"]

    def test_not_what_runs_or_has_ended(self, store, add, run, now):
        run("a")
        add("b")
        store.apply([lifecycle.cancel("b", now)[0]])
        assert ids(store.ready(["t"], 10)) == []

    def test_a_stub_says_what_the_buffer_needs(self, store, run, clock, now):
        run("a")
        store.apply([lifecycle.cancel("a", now)[-1]])
        [stub] = store.owned("node")
        assert stub == ("a", "running", 1, 0, now, True, "t", None)


def add_if_kept(store, add, task_id, **options):
    """Store a task with options, without them where the repository does not keep them."""
    try:
        add(task_id, **options)
    except ConfigurationError:
        add(task_id)


@whole_batches
class TestCheckpoints:
    """What a run stores on its way."""

    TEXT = '{"steps":{"a.$b":[1,null,{"":2.5}]},"cursor":"ä"}'

    def test_are_read_as_they_were_stored(self, store, run):
        task = run("a")
        assert task.checkpoints is None
        write = lifecycle.checkpoint(task, self.TEXT, durable=True)
        assert list(store.apply([write])) == [True]
        assert store.get_by_id("a").checkpoints == json.loads(self.TEXT)
        assert list(store.settle([write])) == [True]

    def test_are_fenced(self, store, add, run, clock, now):
        """Neither an earlier run nor one that has ended stores any."""
        waiting, task = add("b"), run("a")
        stale = attrs.evolve(task, starts=0)
        for other in (waiting, stale):
            write = lifecycle.checkpoint(other, self.TEXT, durable=False)
            assert list(store.apply([write])) == [False]
        store.apply(lifecycle.conclude(task, Ending(returned=True), now))
        assert list(store.apply([lifecycle.checkpoint(task, "{}", durable=True)])) == [False]
        assert store.get_by_id("a").checkpoints is None

    def test_outlast_retries_requeues_and_what_is_written_by_hand(self, store, run, now):
        task = run("a", max_attempts=2)
        store.apply([lifecycle.checkpoint(task, self.TEXT, durable=True)])
        store.apply(lifecycle.conclude(task, Ending(returned=False, error="e"), now))
        task = store.get_by_id("a")
        store.apply([lifecycle.start(task, now, "node")])
        task = store.get_by_id("a")
        assert (task.errors, task.checkpoints) == (1, json.loads(self.TEXT))
        store.apply(lifecycle.conclude(task, Ending(returned=False, error="e"), now))
        store.apply([lifecycle.requeue(store.get_by_id("a"), now)])
        task = store.get_by_id("a")
        task.checkpoints = {}
        store.update(task)
        task = store.get_by_id("a")
        assert (task.status, task.checkpoints) == (TaskStatus.PENDING, json.loads(self.TEXT))
        assert store.list(TaskFilter())[0].checkpoints == json.loads(self.TEXT)


@whole_batches
def test_who_read_it_before_it_was_changed_by_hand_does_not_start_it(store, now):
    """Else it would run with params that it has no more."""
    store.create(Task(id="a", type="t", params={"n": 1}))
    read = store.get_by_id("a")
    store.update(attrs.evolve(read, params={"n": 2}))
    assert list(store.apply([lifecycle.start(read, now, "node")])) == [False]
    again = store.get_by_id("a")
    assert (again.status, again.params) == (TaskStatus.PENDING, {"n": 2})
    assert list(store.apply([lifecycle.start(again, now, "node")])) == [True]


@whole_batches
def test_what_attempts_log_is_kept_in_order(store, run, now):
    """Also over a requeue and what is written by hand; who logs nothing changes nothing."""
    for number, log in enumerate(("ä\n", "", "two\nthree\n")):
        task = store.get_by_id("a") if number else run("a", max_attempts=2)
        if number:
            store.apply([lifecycle.start(task, now, "node")])
            task = store.get_by_id("a")
        ending = Ending(returned=False, error="e", log=log)
        assert any(store.apply(lifecycle.conclude(task, ending, now)))
        task = store.get_by_id("a")
        if task.status is TaskStatus.FAILED:
            store.apply([lifecycle.requeue(task, now)])
            task = store.get_by_id("a")
        task.log = "by hand"
        store.update(task)
    # Two starts between these, and two changes by hand while it was pending.
    expected = "--- attempt 1, start 1\nä\n--- attempt 1, start 5\ntwo\nthree\n"
    assert store.get_by_id("a").log == expected
    assert store.list(TaskFilter())[0].log == expected


@pytest.mark.parametrize("store", ["memory", "sqlite", *MONGO, "adapter"], indirect=True)
class TestDue:
    """Tasks that are held back until their time has come."""

    def test_held_until_their_time(self, store, add, now):
        add("a", run_at=now + 2000)
        add("b", run_at=now + 1000)
        assert ids(store.ready(["t"], 10)) == []
        assert store.next_due() == now + 1000
        assert list(store.due(now + 999, 10)) == []
        assert list(store.due(now + 1000, 10)) == ["b"]
        assert list(store.due(now + 2000, 10)) == ["b", "a"]
        assert list(store.due(now + 2000, 1)) == ["b"]
        assert list(store.due(now + 2000, 0)) == []

    def test_a_held_task_does_not_start(self, store, add, now):
        task = add("a", run_at=now + 1000)
        assert list(store.apply([lifecycle.start(task, now, "node")])) == [False]

    def test_released_it_is_ready(self, store, add, now):
        add("a", run_at=now + 1000)
        assert list(store.apply([lifecycle.release("a")])) == [True]
        assert list(store.apply([lifecycle.release("a")])) == [False]
        assert (ids(store.ready(["t"], 10)), store.next_due()) == (["a"], None)

    def test_of_the_past_is_never_held(self, store, add, now):
        add("past", run_at=now - 1)
        add("present", run_at=now)
        assert ids(store.ready(["t"], 10)) == ["past", "present"]
        assert store.next_due() is None

    def test_cancelled_it_is_never_due(self, store, add, now):
        add("a", run_at=now + 1000)
        store.apply([lifecycle.cancel("a", now)[0]])
        assert list(store.due(now + 1000, 10)) == []
        assert store.next_due() is None

    def test_a_time_that_is_changed_by_hand_counts(self, store, add, clock, now):
        task = add("a")
        task.run_at = clock.now() + timedelta(seconds=5)
        store.update(task)
        assert (ids(store.ready(["t"], 10)), store.next_due()) == ([], now + 5000)
        task.run_at = None
        store.update(task)
        assert (ids(store.ready(["t"], 10)), store.next_due()) == (["a"], None)

    def test_started_by_hand_before_its_time_it_is_held_no_more(self, store, add, now):
        add("a", run_at=now + 1000)
        store.update_status("a", TaskStatus.RUNNING)
        assert store.next_due() is None
        store.update_status("a", TaskStatus.PENDING)
        assert ids(store.ready(["t"], 10)) == ["a"]


class TestOldestReady:
    """Since when the task has waited, of those that may start, that waits longest."""

    def test_nothing_waits(self, store, run, add, now):
        run("a")
        add("b")
        store.apply([lifecycle.cancel("b", now)[0]])
        assert store.oldest_ready() is None

    def test_whatever_its_type_priority_and_owner(self, store, add, clock, now):
        add("a", type="u", owner="node")
        clock.advance(1)
        add_if_kept(store, add, "b", priority=5)
        clock.advance(1)
        add("c")
        assert store.oldest_ready() == now
        store.apply([lifecycle.cancel("a", clock.now_ms())[0]])
        assert store.oldest_ready() == now + 1000
        store.apply([lifecycle.cancel("b", clock.now_ms())[0]])
        assert store.oldest_ready() == now + 2000


@pytest.mark.parametrize("store", ["memory", "sqlite", *MONGO, "adapter"], indirect=True)
def test_a_delayed_task_waits_since_its_time_came(store, add, clock, now):
    add("a", run_at=now + 1000)
    assert store.oldest_ready() is None
    clock.advance(5)
    store.apply([lifecycle.release("a")])
    assert store.oldest_ready() == now + 1000


@pytest.mark.parametrize("store", ["memory", "sqlite", *MONGO, "adapter"], indirect=True)
def test_one_whose_time_has_just_come_hides_none_that_waits_longer(store, add, clock, now):
    """Though it was stored before that one; and so it is of two that were delayed."""
    add("a", run_at=now + 10_000)
    add("b", run_at=now + 5000)
    clock.advance(7)
    add("c")
    clock.advance(5)
    store.apply([lifecycle.release("a")])
    assert store.oldest_ready() == now + 7000
    store.apply([lifecycle.release("b")])
    assert store.oldest_ready() == now + 5000


@pytest.mark.parametrize("store", ["memory", "sqlite", *MONGO, "adapter"], indirect=True)
def test_a_requeued_task_waits_since_then(store, run, clock, now):
    task = run("a")
    assert any(store.apply(lifecycle.conclude(task, Ending(returned=False, error="e"), now)))
    clock.advance(86_400)
    store.apply([lifecycle.requeue(store.get_by_id("a"), clock.now_ms())])
    assert store.oldest_ready() == clock.now_ms()


class TestOwners:
    """Which node holds what."""

    def test_pending_and_running_until_they_end(self, store, add, run, now):
        add("a", owner="one")
        task = run("b", node="two")
        assert sorted(store.owners()) == ["one", "two"]
        assert [(s.id, s.status) for s in store.owned("one")] == [("a", "pending")]
        assert [(s.id, s.status) for s in store.owned("two")] == [("b", "running")]
        store.apply(lifecycle.conclude(task, lifecycle.Ending(returned=True), now))
        store.apply([lifecycle.cancel("a", now)[0]])
        assert list(store.owners()) == []
        assert ids(store.owned("two")) == []

    def test_what_runs_comes_first_where_only_some_are_asked_for(self, store, add, run):
        for name in "abc":
            add(name, owner="one")
        run("d", node="one")
        run("e", node="one")
        assert {s.id for s in store.owned("one", 2)} == {"d", "e"}
        assert [s.status for s in store.owned("one", 4)] == ["running"] * 2 + ["pending"] * 2
        assert {s.id for s in store.owned("one")} == set("abcde")

    def test_nobody_is_no_owner(self, store, add):
        add("a")
        assert list(store.owners()) == []
        assert ids(store.owned("")) == []
        assert ids(store.owned("' OR 1=1 --")) == []


class TestUnfinished:
    """Whether there is anything left to wait for."""

    def test_pending_or_running_of_these_types(self, store, add, run, now):
        assert not store.unfinished(["t", "u"])
        task = run("a")
        assert store.unfinished(["u", "t"])
        assert not store.unfinished(["u"])
        assert not store.unfinished([])
        store.apply(lifecycle.conclude(task, lifecycle.Ending(returned=True), now))
        assert not store.unfinished(["t"])
        add("b", owner="node")
        assert store.unfinished(["t"])

    @pytest.mark.parametrize("store", ["memory", "sqlite", *MONGO, "adapter"], indirect=True)
    def test_held_back_is_not_waited_for(self, store, add, now):
        add("a", run_at=now + 1)
        assert not store.unfinished(["t"])


class TestNodes:
    def test_joined_until_it_leaves(self, store):
        node = Node(id="n1", name="host process 1", types=("t", "u"))
        store.join(node)
        assert list(store.nodes()) == [attrs.evolve(node, alive=True)]
        store.leave("n1")
        assert list(store.nodes()) == []
        store.leave("n1")

    @pytest.mark.parametrize("store", ["sqlite", *MONGO], indirect=True)
    def test_stopping_is_recorded(self, store):
        """Where a node can outlive its process."""
        store.join(Node(id="n1", name="one"))
        store.join(Node(id="n2", name="two"))
        store.mark_stopping("n1")
        store.mark_stopping("unknown")
        assert {node.id: node.stopping for node in store.nodes()} == {"n1": True, "n2": False}


class TestByHand:
    """What a caller's ``update`` may not do to a record that the runtime works with."""

    def test_a_request_to_cancel_survives(self, store, run, now):
        """The caller read the task before it came."""
        task = run("a")
        store.apply([lifecycle.cancel("a", now)[-1]])
        task.message = "by hand"
        store.update(task)
        stored = store.get_by_id("a")
        assert (stored.message, stored.cancel_requested_at is None) == ("by hand", False)

    def test_identity_fence_and_counters_stay(self, store, run):
        task = run("a")
        wanted = attrs.evolve(
            task, type="other", starts=9, owner="me", errors=9, crashes=9, interruptions=9
        )
        store.update(wanted)
        assert store.get_by_id("a") == task

    def test_a_pending_task_never_looks_finished(self, store, add, clock):
        task = add("a")
        task.completed_at = clock.now()
        store.update(task)
        assert ids(store.ready(["t"], 10)) == ["a"]

    def test_a_finished_task_never_looks_unfinished(self, store, run):
        run("a")
        store.update_status("a", TaskStatus.COMPLETED)
        task = store.get_by_id("a")
        task.completed_at = None
        store.update(task)
        assert ids(store.list(TaskFilter(status="completed"))) == ["a"]
        assert not store.unfinished(["t"])

    def test_a_status_may_be_text(self, store, run):
        task = run("a")
        task.status = "completed"
        store.update(task)
        assert store.get_by_id("a").status is TaskStatus.COMPLETED

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("params", {"x": float("nan")}, PayloadError),
            ("params", [], PayloadError),
            ("result", b"", PayloadError),
            ("priority", 2**70, ConfigurationError),
            ("priority", "high", ConfigurationError),
            ("created_by", "\ud800", ConfigurationError),
            ("timeout", float("inf"), ConfigurationError),
            ("max_attempts", 0, ConfigurationError),
            ("max_crashes", 1.5, ConfigurationError),
            ("duration", "long", ConfigurationError),
            ("progress", "half", PayloadError),
            ("status", "sleeping", ConfigurationError),
            ("started_at", "now", ConfigurationError),
        ],
    )
    def test_what_no_store_can_hold_is_refused(self, store, add, field, value, error):
        """By update and by create alike; nothing is changed."""
        task = add("a")
        with pytest.raises(error):
            store.update(attrs.evolve(task, **{field: value}))
        if field != "result":  # a new task has none
            with pytest.raises(error):
                store.create(attrs.evolve(task, id="b", **{field: value}))
        assert store.get_by_id("a") == task
        assert store.count(TaskFilter()) == 1

    def test_text_is_made_storable(self, store, run):
        task = run("a")
        task.error, task.message = "lone \ud800 surrogate", "m" * 2000
        store.update(task)
        stored = store.get_by_id("a")
        assert stored.error == "lone \\ud800 surrogate"
        assert len(stored.message) == 1000

    def test_an_update_that_was_overtaken_is_refused(self, store, run, monkeypatch):
        stale = run("a")
        store.update_status("a", TaskStatus.FAILED, "meanwhile")
        monkeypatch.setattr(store, "get_by_id", lambda task_id: stale)
        with pytest.raises(InvalidTransition, match="moved on"):
            store.update(attrs.evolve(stale, status=TaskStatus.COMPLETED))
        with pytest.raises(InvalidTransition, match="moved on"):
            store.update_status("a", TaskStatus.COMPLETED)


class TestAdapter:
    """A user's repository that was there before."""

    @pytest.fixture(params=["adapter", "adapter-13"])
    def store(self, request, tmp_path, clock):
        return MAKERS[request.param](tmp_path, clock)

    def test_what_ran_before_this_process_was_left_behind(self, store, clock):
        """Even if it was looked at before the queue started."""
        store.inner.create(Task(id="a", type="t", created_at=clock.now()))
        store.inner.create(Task(id="b", type="t", created_at=clock.now()))
        store.inner.update_status("b", TaskStatus.RUNNING, "")
        assert store.get_by_id("b").status is TaskStatus.RUNNING
        store.join(Node(id="n", name="n"))
        assert ids(store.ready(["t"], 10)) == ["a"]
        [owner] = store.owners()
        assert owner not in {node.id for node in store.nodes()}
        assert ids(store.owned(owner)) == ["b"]

    def test_unfinished_tasks_are_read_in_pages(self, store, clock):
        for number in range(1003):
            store.inner.create(Task(id=f"{number:04}", type="t", created_at=clock.now()))
            clock.advance(0.001)
        store.join(Node(id="n", name="n"))
        assert ids(store.ready(["t"], 2000)) == [f"{number:04}" for number in range(1003)]

    def test_ended_without_a_time_it_has_ended_all_the_same(self, store, add):
        """A user's ``update_status`` need not set ``completed_at``."""
        add("a")
        store.inner.update_status("a", TaskStatus.CANCELLED, "")
        assert store.get_by_id("a").status is TaskStatus.CANCELLED
        assert ids(store.ready(["t"], 10)) == []
        assert not store.unfinished(["t"])

    def test_deleted_behind_its_back(self, store, add, clock):
        """The id may be used again, once."""
        add("a", owner="node")
        store.inner.delete("a")
        add("a")
        assert ids(store.owned("node")) == []
        assert ids(store.ready(["t"], 10)) == ["a"]
        store.inner.delete("a")
        assert store.get_many(["a"]) == {}
        assert ids(store.ready(["t"], 10)) == []

    @pytest.mark.parametrize("option", ["priority", "timeout", "max_attempts", "max_crashes"])
    def test_an_option_that_is_not_kept_is_refused(self, tmp_path, clock, option):
        store = MAKERS["adapter-13"](tmp_path, clock)
        with pytest.raises(ConfigurationError, match=f"does not keep {option}"):
            store.apply([insert("a", clock, **{option: 7})])
        assert store.count(TaskFilter()) == 0

    def test_less_than_eight_methods_are_refused(self):
        class Seven:
            create = get_by_id = update = update_status = update_progress = list = count = print

        with pytest.raises(ConfigurationError, match="lacks delete"):
            MAKERS["adapter"].__globals__["EightMethodAdapter"](Seven())


class Careless(MemoryRepository):
    """Deliberately broken: looks and changes without a lock, as find-then-replace does."""

    def apply(self, writes, *, all_or_nothing=False):
        results = []
        for write in writes:
            if isinstance(write, Update):
                row = json.loads(json.dumps(self._rows[write.id]))
                if matches(row, write.guard):
                    self._rows[write.id] = {**row, **write.changes}
                    results.append(True)
                else:
                    results.append(False)
            else:
                results += super().apply([write])
        return results


between_tasks = pytest.mark.parametrize("store", ["memory", "sqlite", *MONGO], indirect=True)


class TestEnded:
    """Tasks that ended before a moment, of one status: what retention removes."""

    def end(self, store, run, clock, task_id, **ending):
        task = run(task_id)
        clock.advance(10)
        ending = {"returned": True, **ending}
        store.apply(lifecycle.conclude(task, Ending(**ending), clock.now_ms()))
        return clock.now_ms()

    def test_those_that_ended_before_it(self, store, run, add, clock):
        ended = [self.end(store, run, clock, name) for name in "abc"]
        run("running")
        add("pending")
        for before, names in [
            (ended[0], []),
            (ended[0] + 1, ["a"]),
            (ended[2], ["a", "b"]),
            (ended[2] + 1, ["a", "b", "c"]),
        ]:
            assert sorted(ids_of_ended(store.ended("completed", before, 10))) == names
        assert len(store.ended("completed", ended[2] + 1, 2)) == 2

    def test_of_each_status(self, store, run, add, clock):
        self.end(store, run, clock, "completed")
        self.end(store, run, clock, "failed", returned=False, error="broke")
        add("cancelled")
        store.apply([lifecycle.cancel("cancelled", clock.now_ms())[0]])
        clock.advance(1)
        for status in ("completed", "failed", "cancelled"):
            assert ids_of_ended(store.ended(status, clock.now_ms(), 10)) == [status]

    def test_one_that_lasted_long_is_young(self, store, run, clock):
        """It is the end that counts, not when it was created."""
        run("long")
        clock.advance(3600)
        self.end(store, run, clock, "short")
        before = clock.now_ms() + 1
        store.apply(
            lifecycle.conclude(
                store.get_by_id("long"), Ending(returned=True), clock.now_ms() + 1000
            )
        )
        assert ids_of_ended(store.ended("completed", before, 10)) == ["short"]

    def test_is_removed_unless_it_runs_again(self, store, run, clock):
        self.end(store, run, clock, "a", returned=False, error="broke")
        self.end(store, run, clock, "b", returned=False, error="broke")
        stubs = [task.stub for task in store.ended("failed", clock.now_ms() + 1, 10)]
        assert sorted(ids(stubs)) == ["a", "b"]
        store.apply([lifecycle.requeue(store.get_by_id("b"), clock.now_ms())])
        removed = list(store.apply([lifecycle.prune(stub) for stub in stubs]))
        assert removed == [stub.id == "a" for stub in stubs]
        assert set(store.get_many(["a", "b"])) == {"b"}

    def test_ended_tasks_are_read_page_by_page_from_the_newest_on(self, store, run, clock):
        for name in "abcde":
            self.end(store, run, clock, name)
            clock.advance(1)
        found, after = [], None
        while page := store.ended("completed", clock.now_ms(), 2, after):
            found.append(ids_of_ended(page))
            after = page[-1].place
            store.apply([lifecycle.prune(task.stub) for task in page])
        assert found == [["e", "d"], ["c", "b"], ["a"]]

    @between_tasks
    def test_pages_go_on_even_if_all_tasks_ended_at_once_and_some_stay(self, store, run, clock):
        tasks = [run(name) for name in "abcde"]
        clock.advance(10)
        for task in tasks:
            store.apply(lifecycle.conclude(task, Ending(returned=True), clock.now_ms()))
        clock.advance(1)
        found, after = [], None
        while page := store.ended("completed", clock.now_ms(), 2, after):
            found += ids_of_ended(page)
            after = page[-1].place
        assert sorted(found) == list("abcde")

    @between_tasks
    def test_ended_tasks_have_all_that_pruning_decides_by(self, store, run, clock):
        run("p")
        run("a", depends_on=["p"], unique_key="k", unique_scope="60.0")
        clock.advance(10)
        task = store.get_by_id("a")
        store.apply(lifecycle.conclude(task, Ending(returned=True), clock.now_ms()))
        clock.advance(1)
        [found] = store.ended("completed", clock.now_ms(), 10)
        assert [*found.depends_on] == ["p"]
        assert (found.unique_lock, found.unique_scope) == ("k", "60.0")


def race_to_start(store, rounds):
    """How many of eight threads won each round's race to start one task."""
    clock = ManualClock()
    winners = []
    barrier = threading.Barrier(8)
    outcomes = [[False] * 8 for _ in range(rounds)]
    tasks = []
    for number in range(rounds):
        store.apply([insert(str(number), clock)])
        tasks.append(store.get_by_id(str(number)))

    def run(thread):
        for task, outcome in zip(tasks, outcomes, strict=True):
            start = lifecycle.start(task, to_ms(task.created_at), f"node {thread}")
            barrier.wait()
            outcome[thread] = store.apply([start])[0]

    in_threads(run, 8)
    winners += map(sum, outcomes)
    return winners


class TestContention:
    """A start is a compare-and-set: of racing threads exactly one wins."""

    def test_one_winner_each_round(self, store):
        assert race_to_start(store, 50) == [1] * 50

    def test_the_race_finds_a_careless_implementation(self):
        """Else it would prove nothing."""
        assert any(max(race_to_start(Careless(), 100)) > 1 for _ in range(10))


#: Stores that can say something about several tasks at once.


class TestNotes:
    """A text under a name, changed by compare-and-set."""

    @between_tasks
    def test_stored_read_changed_and_removed(self, store):
        assert store.notes("") == {}
        assert store.put_note("a/1", "one", 0)
        version = store.notes("a/1")["a/1"].version
        assert version > 0
        assert store.put_note("a/1", "two", version)
        assert store.notes("a/1")["a/1"] == ("two", version + 1)
        assert store.put_note("a/1", None, version + 1)
        assert store.notes("") == {}

    @between_tasks
    def test_a_stale_version_changes_nothing(self, store):
        assert store.put_note("a", "one", 0)
        version = store.notes("a")["a"].version
        assert not store.put_note("a", "again", 0)
        assert not store.put_note("a", "stale", version + 1)
        assert not store.put_note("a", None, version - 1)
        assert not store.put_note("a", None, 0)
        assert not store.put_note("b", "there is none", version)
        assert store.put_note("b", None, 0)
        assert store.notes("") == {"a": ("one", version)}

    @between_tasks
    def test_each_of_several_notes_is_put_if_its_version_fits(self, store):
        for name in "abc":
            assert store.put_note(name, "old", 0)
        versions = {name: note.version for name, note in store.notes("").items()}
        assert store.put_note("b", "another's", versions["b"])
        changes = [NoteChange(name, f"new {name}", versions[name]) for name in "abc"]
        assert list(store.put_notes(changes)) == [True, False, True]
        notes = store.notes("")
        assert [notes[name].text for name in "abc"] == ["new a", "another's", "new c"]
        assert [notes[name].version - versions[name] for name in "abc"] == [1, 1, 1]
        again = [NoteChange(name, f"newer {name}", notes[name].version) for name in "ca"]
        assert list(store.put_notes(again)) == [True, True]
        mixed = [NoteChange("a", None, notes["a"].version + 1), NoteChange("d", "first", 0)]
        assert list(store.put_notes(mixed)) == [True, True]
        assert sorted(store.notes("")) == ["b", "c", "d"]

    @between_tasks
    def test_made_again_it_has_no_version_that_it_had_before(self, store, clock):
        """Whatever the clock says: it stands still here."""
        store.put_note("a", "one", 0)
        old = store.notes("a")["a"].version
        store.put_note("a", None, old)
        store.put_note("a", "new", 0)
        assert not store.put_note("a", "stale", old)

    @between_tasks
    def test_found_by_the_beginning_of_their_name(self, store):
        for name in ("x/%", "x/_", "x/ü", "y", "x"):
            store.put_note(name, name, 0)
        assert sorted(store.notes("x/")) == ["x/%", "x/_", "x/ü"]
        assert sorted(store.notes("x/_")) == ["x/_"]
        assert len(store.notes("")) == 5

    @between_tasks
    def test_of_racing_changes_one_is_made(self, store):
        store.put_note("a", "0", 0)
        won = []

        def count(thread):
            for _ in range(20):
                note = store.notes("a")["a"]
                if store.put_note("a", str(int(note.text) + 1), note.version):
                    won.append(1)

        in_threads(count, 4)
        assert store.notes("a")["a"].text == str(len(won))
        assert len(won) >= 20

    @pytest.mark.parametrize("store", ["adapter"], indirect=True)
    def test_eight_methods_cannot_keep_them(self, store):
        with pytest.raises(ConfigurationError, match="eight methods"):
            store.put_note("a", "one", 0)
        assert store.notes("") == {}


class TestUnique:
    """No two tasks have the same in a unique column."""

    @between_tasks
    @pytest.mark.parametrize("whole", [False, True])
    def test_the_second_insert_does_not_hold(self, store, add, clock, whole):
        add("a", unique_key="k", unique_scope="ever")
        writes = [insert("b", clock), insert("c", clock, unique_key="k", unique_scope="ever")]
        assert list(store.apply(writes, all_or_nothing=whole)) == [True, False]
        assert sorted(store.get_many(["a", "b", "c"])) == (["a"] if whole else ["a", "b"])
        assert store.unique_holders(["k", "other"]) == {"k": "a"}
        assert store.get_by_id("a").unique_key == "k"

    @between_tasks
    def test_given_up_it_is_free(self, store, add):
        add("a", unique_key="k", unique_scope="ever")
        assert list(store.apply([Update("a", {}, {"unique_lock": None})])) == [True]
        assert store.unique_holders(["k"]) == {}
        add("b", unique_key="k", unique_scope="ever")
        store.delete("b")
        add("c", unique_key="k", unique_scope="ever")

    @between_tasks
    def test_an_update_to_what_another_has_does_not_hold(self, store, add):
        add("a")
        add("b")
        first, second = (
            Update(i, {"turn": None}, {"turn": "t", "message": "has it"}) for i in "ab"
        )
        assert list(store.apply([first, second])) == [True, False]
        assert list(store.apply([second])) == [False]
        assert store.get_by_id("b").message == ""
        freed = Update("a", {"turn": "t"}, {"turn": None})
        assert list(store.apply([freed, second])) == [True, True]

    @between_tasks
    def test_one_winner_among_racing_inserts(self, store, clock):
        won = []

        def submit(thread):
            for key in "abcdefgh":
                task_id = f"{key}{thread}"
                write = insert(task_id, clock, unique_key=key, unique_scope="ever")
                won.extend([key] * store.apply([write])[0])

        in_threads(submit, 4)
        assert sorted(won) == list("abcdefgh")

    @pytest.mark.parametrize("store", ["adapter"], indirect=True)
    @pytest.mark.parametrize(
        "option", [{"unique_key": "k"}, {"depends_on": ["a"]}, {"concurrency_key": "k"}]
    )
    def test_eight_methods_cannot_hold_it(self, store, clock, option):
        with pytest.raises(ConfigurationError, match=f"{next(iter(option))}; nothing was stored"):
            store.apply([insert("b", clock, **option)])
        assert store.get_many(["b"]) == {}


class TestParents:
    @between_tasks
    def test_a_child_is_found_by_the_parent_it_waits_on(self, store, add, clock):
        add("p")
        add("q")
        add("c", depends_on=["p", "q"], waiting_on="q")
        add("d", depends_on=["p"], waiting_on="p", on_parent_failure="run")
        assert store.get_by_id("d").depends_on == ["p"]
        assert store.get_by_id("d").on_parent_failure == "run"
        assert store.awaited("", 10) == ["p", "q"]
        assert store.awaited("p", 10) == ["q"]
        assert store.awaited("", 1) == ["p"]
        assert store.waiting_for(["q", "nobody"]) == ["c"]
        assert ids(store.ready(["t"], 10)) == ["p", "q"]
        assert store.count(TaskFilter(status=TaskStatus.PENDING)) == 4
        moved = Update("c", {"waiting_on": "q", "held": 2}, {"waiting_on": "p"})
        freed = Update("d", {"waiting_on": "p", "held": 2}, {"waiting_on": None, "held": 0})
        assert list(store.apply([moved, freed])) == [True, True]
        assert (store.awaited("", 10), store.waiting_for(["p"])) == (["p"], ["c"])
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
        assert store.needed(["p", "q", "a", "b", "nobody"]) == {"a"}, (
            "by c: the others go with them"
        )
        assert store.needed(["p", "q"]) == {"p", "q"}
        assert store.needed(["gone"]) == {"gone"}, "a hint for nobody: it is not there"
        store.apply(lifecycle.cancel("b", 1))
        assert store.needed(["q"]) == {"q"}
        store.delete("b")
        assert store.needed(["q"]) == set()

    @between_tasks
    def test_children_of_several_tasks_are_listed_once(self, store, add):
        add("p")
        for child, parents in {"a": ["p"], "b": ["p", "q"], "c": ["a"]}.items():
            add(child, depends_on=parents, waiting_on=parents[0])
        assert sorted(store.children(["p", "q"])) == ["a", "b"]
        assert list(store.children(["a", "nobody"])) == ["c"]
        store.apply(lifecycle.cancel("c", 1))
        assert list(store.children(["a"])) == ["c"]
        store.delete("c")
        assert list(store.children(["a"])) == list(store.children([])) == []


class TestLines:
    @between_tasks
    def test_first_come_first_in_line(self, store, add):
        for task_id in "cab":
            add(task_id, concurrency_key="k")
        add("x", concurrency_key="other")
        assert store.next_in_line("k") == "c"
        assert store.next_in_line("nobody") is None
        assert store.lines("", 10) == {"k": True, "other": True}
        assert store.ready(["t"], 10) == []
        turn = Update("c", {"held": 4}, {"held": 0, "turn": "k"})
        assert list(store.apply([turn])) == [True]
        assert (store.next_in_line("k"), store.lines("", 10)) == ("a", {"k": False, "other": True})
        assert ids(store.ready(["t"], 10)) == ["c"]
        store.delete("c")
        assert store.lines("", 10) == {"k": True, "other": True}
        assert store.lines("k", 10) == {"other": True}


class TestStuck:
    @between_tasks
    def test_found_by_node_whatever_its_status(self, store, run, clock):
        for task_id, status in (("a", "failed"), ("b", "pending")):
            run(task_id)
            changes = {"status": status, "owner": "", "stuck_on": "node", "held": 3}
            if status == "failed":
                changes["completed_at"] = clock.now_ms()
            assert list(store.apply([Update(task_id, {}, changes)])) == [True]
        assert sorted(ids(store.stuck_on("node"))) == ["a", "b"]
        assert store.stuck_on("other") == []
        assert store.owners() == ["node"]
        assert (store.owned("node"), store.ready(["t"], 10)) == ([], [])
        assert store.get_by_id("a").stuck_on == "node"
        over = [Update(i, {"stuck_on": "node"}, {"stuck_on": "", "held": 0}) for i in "ab"]
        assert list(store.apply(over)) == [True, True]
        assert (store.stuck_on("node"), store.owners()) == ([], [])
        assert ids(store.ready(["t"], 10)) == ["b"]

    GIVEN_UP = Ending(
        returned=False, stuck=True, reason=CancelReason.TIMEOUT, error="timed out", traceback="tb"
    )

    def nothing_starts(self, store, clock):
        now = clock.now_ms() + 10**9
        assert (store.ready(["t"], 10), store.due(now, 10), store.next_due()) == ([], [], None)
        assert store.owned("node") == []
        assert store.unfinished(["t"]) is False
        start = lifecycle.start(store.get_by_id("a"), now, "other")
        assert start is None or list(store.apply([start])) == [False]

    def lift(self, store, clock):
        task = store.get_by_id("a")
        assert list(store.apply(lifecycle.lift_bar(task, clock.now_ms()))).count(True) == 1
        assert (store.stuck_on("node"), store.owners()) == ([], [])
        assert store.get_by_id("a").stuck_on == ""
        assert not any(store.apply(lifecycle.lift_bar(task, clock.now_ms())))

    @pytest.mark.parametrize("delay", [0.0, 60.0])
    def test_a_retry_is_barred_until_that_is_lifted(self, store, run, clock, delay):
        task = run("a")
        task.max_attempts = 2
        ending = attrs.evolve(self.GIVEN_UP, delay=delay)
        given_up = lifecycle.conclude(task, ending, clock.now_ms())
        assert list(store.apply(given_up)) == [True, False]
        self.nothing_starts(store, clock)
        assert ids(store.stuck_on("node")) == ["a"]
        self.lift(store, clock)
        assert ids(store.ready(["t"], 10)) == ([] if delay else ["a"])
        assert store.next_due() == (clock.now_ms() + 60_000 if delay else None)

    def test_a_requeue_is_barred_until_that_is_lifted(self, store, run, clock):
        task = run("a")
        assert list(store.apply(lifecycle.conclude(task, self.GIVEN_UP, clock.now_ms()))) == [True]
        failed = store.get_by_id("a")
        assert (failed.status, failed.stuck_on, failed.traceback) == ("failed", "node", "tb")
        requeue = lifecycle.requeue(failed, clock.now_ms())
        assert list(store.apply([requeue])) == [True]
        self.nothing_starts(store, clock)
        self.lift(store, clock)
        assert ids(store.ready(["t"], 10)) == ["a"]

    def test_lifted_while_it_has_failed_it_is_requeued_as_any_other(self, store, run, clock):
        task = run("a")
        store.apply(lifecycle.conclude(task, self.GIVEN_UP, clock.now_ms()))
        early = lifecycle.requeue(store.get_by_id("a"), clock.now_ms())
        self.lift(store, clock)
        assert list(store.apply([early])) == [False]  # it would be barred for ever
        assert list(store.apply([lifecycle.requeue(store.get_by_id("a"), clock.now_ms())])) == [
            True
        ]
        assert ids(store.ready(["t"], 10)) == ["a"]

    @between_tasks
    def test_it_keeps_its_turn_until_that_is_lifted(self, store, run, add, clock):
        add("a", concurrency_key="k")
        assert any(store.apply(lifecycle.give_turn("a", "k")))
        store.apply([lifecycle.start(store.get_by_id("a"), clock.now_ms(), "node")])
        add("b", concurrency_key="k")
        task = store.get_by_id("a")
        assert list(store.apply(lifecycle.conclude(task, self.GIVEN_UP, clock.now_ms()))) == [True]
        assert not any(store.apply(lifecycle.give_turn("b", "k")))
        self.lift(store, clock)
        assert any(store.apply(lifecycle.give_turn("b", "k")))
