"""What the moves of ``lifecycle`` make of a record, the same on every repository."""

import json
from datetime import timedelta

import attrs
import pytest
from helpers import earliest_due, held_on, those_with

from taskx import (
    CancelReason,
    ConfigurationError,
    InvalidTransition,
    PayloadError,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.core import lifecycle
from taskx.core.lifecycle import Ending
from taskx.storage.queries import owners, shown
from taskx.upkeep.housekeeper import unfinished

from .repositories import between_tasks, ids, keeping_time, whole_batches


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
        assert list(shown(store, [write])) == [True]

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


@keeping_time
class TestDue:
    """Tasks that are held back until their time has come."""

    def test_a_held_task_does_not_start(self, store, add, now):
        task = add("a", run_at=now + 1000)
        assert list(store.apply([lifecycle.start(task, now, "node")])) == [False]

    def test_released_it_is_ready(self, store, add, now):
        add("a", run_at=now + 1000)
        assert list(store.apply([lifecycle.release("a")])) == [True]
        assert list(store.apply([lifecycle.release("a")])) == [False]
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == (["a"], None)

    def test_of_the_past_is_never_held(self, store, add, now):
        add("past", run_at=now - 1)
        add("present", run_at=now)
        assert ids(store.ready(["t"], 10)) == ["past", "present"]
        assert earliest_due(store) is None

    def test_cancelled_it_is_never_due(self, store, add, now):
        add("a", run_at=now + 1000)
        store.apply([lifecycle.cancel("a", now)[0]])
        assert list(store.due(now + 1000, 10)) == []
        assert earliest_due(store) is None

    def test_a_time_that_is_changed_by_hand_counts(self, store, add, clock, now):
        task = add("a")
        task.run_at = clock.now() + timedelta(seconds=5)
        store.update(task)
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == ([], now + 5000)
        task.run_at = None
        store.update(task)
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == (["a"], None)

    def test_started_by_hand_before_its_time_it_is_held_no_more(self, store, add, now):
        add("a", run_at=now + 1000)
        store.update_status("a", TaskStatus.RUNNING)
        assert earliest_due(store) is None
        store.update_status("a", TaskStatus.PENDING)
        assert ids(store.ready(["t"], 10)) == ["a"]


def test_a_running_task_is_not_deleted(store, run):
    run("a")
    assert list(store.apply([lifecycle.delete("a"), lifecycle.delete("b")])) == [False, False]
    assert store.get_by_id("a").status is TaskStatus.RUNNING


def test_an_ended_task_is_pruned_unless_it_runs_again(store, run, clock):
    for name in "ab":
        failed = Ending(returned=False, error="broke")
        store.apply(lifecycle.conclude(run(name), failed, clock.now_ms()))
    stubs = [task.stub for task in store.ended("failed", clock.now_ms() + 1, 10)]
    assert sorted(ids(stubs)) == ["a", "b"]
    store.apply([lifecycle.requeue(store.get_by_id("b"), clock.now_ms())])
    removed = list(store.apply([lifecycle.prune(stub) for stub in stubs]))
    assert removed == [stub.id == "a" for stub in stubs]
    assert set(store.get_many(["a", "b"])) == {"b"}


class TestStuck:
    """A task that was given up while its thread still runs."""

    GIVEN_UP = Ending(
        returned=False, stuck=True, reason=CancelReason.TIMEOUT, error="timed out", traceback="tb"
    )

    def nothing_starts(self, store, clock):
        now = clock.now_ms() + 10**9
        assert (store.ready(["t"], 10), store.due(now, 10), earliest_due(store)) == ([], [], None)
        assert held_on(store, "node") == []
        assert unfinished(store, ["t"]) is False
        start = lifecycle.start(store.get_by_id("a"), now, "other")
        assert start is None or list(store.apply([start])) == [False]

    def lift(self, store, clock):
        task = store.get_by_id("a")
        assert list(store.apply(lifecycle.lift_bar(task, clock.now_ms()))).count(True) == 1
        assert (those_with(store, "stuck_on", "node"), owners(store)) == ([], [])
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
        assert those_with(store, "stuck_on", "node") == ["a"]
        self.lift(store, clock)
        assert ids(store.ready(["t"], 10)) == ([] if delay else ["a"])
        assert earliest_due(store) == (clock.now_ms() + 60_000 if delay else None)

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
        assert not unfinished(store, ["t"])

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
            ("priority", None, ConfigurationError),
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

    def test_a_record_that_no_submit_would_make_can_be_changed(self, store, add):
        """Earlier versions took such options, from ``create``."""
        task = attrs.evolve(add("a"), priority=2_000_000, timeout=0)
        store.update(task)
        assert store.get_by_id("a").priority == 2_000_000
        store.update(attrs.evolve(task, message="later"))
        assert store.get_by_id("a").message == "later"

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
        with pytest.raises(InvalidTransition, match="changed while it"):
            store.update(attrs.evolve(stale, status=TaskStatus.COMPLETED))
        with pytest.raises(InvalidTransition, match="changed while its status"):
            store.update_status("a", TaskStatus.COMPLETED)
