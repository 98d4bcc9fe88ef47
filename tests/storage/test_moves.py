"""The effect of ``lifecycle``'s moves on a record, which is the same on every repository."""

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
from taskx.core.log import Once
from taskx.storage import base
from taskx.storage.queries import owners, shown
from taskx.upkeep.housekeeper import unfinished

from .repositories import between_tasks, ids


class TestMessages:
    """Progress messages, as the repository's own methods store them."""

    @pytest.fixture(autouse=True)
    def told(self, monkeypatch):
        """Return the types of which the log says that their messages are cut."""
        types = []
        monkeypatch.setattr(base, "_cut", Once(types.append))
        return types

    @pytest.mark.parametrize("length", [10_000, 10_001])
    @pytest.mark.parametrize("how", ["update_progress", "update", "update_status"])
    def test_a_message_has_at_most_10000_characters(self, store, run, told, how, length):
        task, message = run("a"), "☃" * length
        for _ in range(2):
            if how == "update":
                store.update(attrs.evolve(task, message=message))
            else:
                given = 50 if how == "update_progress" else TaskStatus.RUNNING
                getattr(store, how)("a", given, message)
        cut = length > 10_000
        assert store.get_by_id("a").message == "☃" * (9_999 if cut else 10_000) + "…" * cut
        assert told == [task.type] * cut


@between_tasks
class TestCheckpoints:
    """Values that a run stores while it executes."""

    TEXT = '{"steps":{"a.$b":[1,null,{"":2.5}]},"cursor":"ä"}'

    def test_checkpoints_are_read_as_they_were_stored(self, store, run):
        task = run("a")
        assert task.checkpoints is None
        write = lifecycle.checkpoint(task, self.TEXT, durable=True)
        assert list(store.apply([write])) == [True]
        assert store.get_by_id("a").checkpoints == json.loads(self.TEXT)
        assert list(shown(store, [write])) == [True]

    def test_only_the_current_run_stores_checkpoints(self, store, add, run, clock, now):
        """An earlier run and an ended run store nothing."""
        waiting, task = add("b"), run("a")
        stale = attrs.evolve(task, starts=0)
        for other in (waiting, stale):
            write = lifecycle.checkpoint(other, self.TEXT, durable=False)
            assert list(store.apply([write])) == [False]
        store.apply(lifecycle.conclude(task, Ending(returned=True), now))
        assert list(store.apply([lifecycle.checkpoint(task, "{}", durable=True)])) == [False]
        assert store.get_by_id("a").checkpoints is None

    def test_checkpoints_survive_retries_requeues_and_updates(self, store, run, now):
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


@between_tasks
def test_a_task_read_before_an_update_does_not_start(store, now):
    """Otherwise it would run with the old params."""
    store.create(Task(id="a", type="t", params={"n": 1}))
    read = store.get_by_id("a")
    store.update(attrs.evolve(read, params={"n": 2}))
    assert list(store.apply([lifecycle.start(read, now, "node")])) == [False]
    again = store.get_by_id("a")
    assert (again.status, again.params) == (TaskStatus.PENDING, {"n": 2})
    assert list(store.apply([lifecycle.start(again, now, "node")])) == [True]


@between_tasks
def test_the_logs_of_attempts_are_kept_in_order(store, run, now):
    """They survive a requeue and an update. An attempt that logs nothing changes nothing."""
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
    # In between there were two starts, and two updates while the task was pending.
    expected = "--- attempt 1, start 1\nä\n--- attempt 1, start 5\ntwo\nthree\n"
    assert store.get_by_id("a").log == expected
    assert store.list(TaskFilter())[0].log == expected


class TestDue:
    """Tasks that wait for their ``run_at``."""

    def test_a_delayed_task_does_not_start_early(self, store, add, now):
        task = add("a", run_at=now + 1000)
        assert list(store.apply([lifecycle.start(task, now, "node")])) == [False]

    def test_a_released_task_is_ready(self, store, add, now):
        add("a", run_at=now + 1000)
        assert list(store.apply([lifecycle.release("a")])) == [True]
        assert list(store.apply([lifecycle.release("a")])) == [False]
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == (["a"], None)

    def test_a_task_whose_time_has_passed_is_ready_at_once(self, store, add, now):
        add("past", run_at=now - 1)
        add("present", run_at=now)
        assert ids(store.ready(["t"], 10)) == ["past", "present"]
        assert earliest_due(store) is None

    def test_a_cancelled_task_is_never_due(self, store, add, now):
        add("a", run_at=now + 1000)
        store.apply([lifecycle.cancel("a", now)[0]])
        assert list(store.due(now + 1000, 10)) == []
        assert earliest_due(store) is None

    def test_an_updated_run_at_takes_effect(self, store, add, clock, now):
        task = add("a")
        task.run_at = clock.now() + timedelta(seconds=5)
        store.update(task)
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == ([], now + 5000)
        task.run_at = None
        store.update(task)
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == (["a"], None)

    def test_a_task_started_by_hand_no_longer_waits_for_its_time(self, store, add, now):
        add("a", run_at=now + 1000)
        store.update_status("a", TaskStatus.RUNNING)
        assert earliest_due(store) is None
        store.update_status("a", TaskStatus.PENDING)
        assert ids(store.ready(["t"], 10)) == ["a"]


class TestExpiry:
    """A pending task that can expire, and its start."""

    def expiring(self, add, now):
        return add("a", expires_at=now + 1000)

    def ending(self, store):
        task = store.get_by_id("a")
        return task.status.value, task.error, task.expires_at, task.completed_at

    @pytest.mark.parametrize("returned", [True, False])
    def test_the_moment_is_kept_until_the_end_of_the_first_attempt(
        self, store, add, now, clock, returned
    ):
        task = self.expiring(add, now)
        assert task.expires_at == clock.now() + timedelta(seconds=1)
        assert store.list(TaskFilter()) == [task]
        assert list(store.apply([lifecycle.start(task, now + 999, "node")])) == [True]
        running = store.get_by_id("a")
        assert running.expires_at == task.expires_at
        assert list(store.due(None, 9, "expires_at")) == []
        running.max_attempts = 2
        ending = Ending(returned=returned, error="" if returned else "broke")
        assert any(store.apply(lifecycle.conclude(running, ending, now)))
        assert store.get_by_id("a").expires_at is None

    def test_an_expired_task_does_not_start(self, store, add, now, clock):
        task = self.expiring(add, now)
        assert lifecycle.start(task, now + 1000, "node") is None
        clock.advance(1)
        assert list(store.apply(lifecycle.expire(task, clock.now_ms()))).count(True) == 1
        error = "expired at 2024-01-01T00:00:01Z before its first start"
        assert self.ending(store) == ("cancelled", error, None, clock.now())
        assert not any(store.apply(lifecycle.expire(task, clock.now_ms())))

    @pytest.mark.parametrize("first", ["start", "expire"])
    def test_of_a_start_and_an_expiry_one_takes_place(self, store, add, now, first):
        task = self.expiring(add, now)
        moves = {
            "start": [lifecycle.start(task, now, "node")],
            "expire": lifecycle.expire(task, now + 1000),
        }
        assert any(store.apply(moves.pop(first)))
        (second,) = moves.values()
        assert not any(store.apply(second))
        status = {"start": "running", "expire": "cancelled"}[first]
        assert store.get_by_id("a").status.value == status

    def test_a_retried_task_does_not_expire(self, store, add, now):
        """Not even by a write that was made before the start."""
        task = self.expiring(add, now)
        task.max_attempts = 2
        expire = lifecycle.expire(task, now + 1000)
        store.apply([lifecycle.start(task, now, "node")])
        broken = Ending(returned=False, error="broke")
        store.apply(lifecycle.conclude(store.get_by_id("a"), broken, now))
        assert self.ending(store) == ("pending", "broke", None, None)
        assert not any(store.apply(expire))

    def test_a_start_that_is_handed_back_can_expire_again(self, store, add, now):
        store.apply([lifecycle.start(self.expiring(add, now), now, "node")])
        assert any(store.apply(lifecycle.hand_back(store.get_by_id("a"), now)))
        assert list(store.due(None, 9, "expires_at")) == [("a", now + 1000)]
        assert any(store.apply(lifecycle.expire(store.get_by_id("a"), now + 1000)))

    def test_a_change_of_the_moment_counts(self, store, add, now, clock):
        task = self.expiring(add, now)
        expire = lifecycle.expire(task, now + 1000)
        task.expires_at += timedelta(seconds=1)
        store.update(task)
        assert not any(store.apply(expire))
        assert list(store.due(None, 9, "expires_at")) == [("a", now + 2000)]

    @pytest.mark.parametrize("status", ["running", "cancelled"])
    def test_a_move_by_hand_ends_it(self, store, add, now, status):
        task = self.expiring(add, now)
        task.status = TaskStatus(status)
        store.update(task)
        assert store.get_by_id("a").expires_at is None
        store.update_status("a", TaskStatus.PENDING)
        assert list(store.due(None, 9, "expires_at")) == []


def test_a_running_task_is_not_deleted(store, run):
    run("a")
    assert list(store.apply([lifecycle.delete("a"), lifecycle.delete("b")])) == [False, False]
    assert store.get_by_id("a").status is TaskStatus.RUNNING


def test_an_ended_task_is_pruned_unless_it_was_requeued(store, run, clock):
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
    """A task that was abandoned while its thread still runs."""

    ABANDONED = Ending(
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
    def test_a_retry_waits_until_the_bar_is_lifted(self, store, run, clock, delay):
        task = run("a")
        task.max_attempts = 2
        ending = attrs.evolve(self.ABANDONED, delay=delay)
        abandoned = lifecycle.conclude(task, ending, clock.now_ms())
        assert list(store.apply(abandoned)) == [True, False]
        self.nothing_starts(store, clock)
        assert those_with(store, "stuck_on", "node") == ["a"]
        self.lift(store, clock)
        assert ids(store.ready(["t"], 10)) == ([] if delay else ["a"])
        assert earliest_due(store) == (clock.now_ms() + 60_000 if delay else None)

    def test_a_requeued_task_waits_until_the_bar_is_lifted(self, store, run, clock):
        task = run("a")
        assert list(store.apply(lifecycle.conclude(task, self.ABANDONED, clock.now_ms()))) == [True]
        failed = store.get_by_id("a")
        assert (failed.status, failed.stuck_on, failed.traceback) == ("failed", "node", "tb")
        requeue = lifecycle.requeue(failed, clock.now_ms())
        assert list(store.apply([requeue])) == [True]
        self.nothing_starts(store, clock)
        self.lift(store, clock)
        assert ids(store.ready(["t"], 10)) == ["a"]

    def test_lifted_while_it_has_failed_it_is_requeued_as_any_other(self, store, run, clock):
        task = run("a")
        store.apply(lifecycle.conclude(task, self.ABANDONED, clock.now_ms()))
        early = lifecycle.requeue(store.get_by_id("a"), clock.now_ms())
        self.lift(store, clock)
        assert list(store.apply([early])) == [False]  # it would be barred for ever
        assert list(store.apply([lifecycle.requeue(store.get_by_id("a"), clock.now_ms())])) == [
            True
        ]
        assert ids(store.ready(["t"], 10)) == ["a"]

    @between_tasks
    def test_a_stuck_task_keeps_its_turn_until_the_bar_is_lifted(self, store, run, add, clock):
        add("a", concurrency_key="k")
        assert any(store.apply(lifecycle.give_turn("a", "k")))
        store.apply([lifecycle.start(store.get_by_id("a"), clock.now_ms(), "node")])
        add("b", concurrency_key="k")
        task = store.get_by_id("a")
        assert list(store.apply(lifecycle.conclude(task, self.ABANDONED, clock.now_ms()))) == [True]
        assert not any(store.apply(lifecycle.give_turn("b", "k")))
        self.lift(store, clock)
        assert any(store.apply(lifecycle.give_turn("b", "k")))


class TestByHand:
    """Limits of a caller's ``update`` on a record that the runtime uses."""

    def test_a_cancel_request_survives_an_update(self, store, run, now):
        """The caller read the task before the request."""
        task = run("a")
        store.apply([lifecycle.cancel("a", now)[-1]])
        task.message = "by hand"
        store.update(task)
        stored = store.get_by_id("a")
        assert (stored.message, stored.cancel_requested_at is None) == ("by hand", False)

    def test_an_update_keeps_identity_fence_and_counters(self, store, run):
        task = run("a")
        wanted = attrs.evolve(
            task, type="other", starts=9, owner="me", errors=9, crashes=9, interruptions=9
        )
        store.update(wanted)
        assert store.get_by_id("a") == task

    def test_completed_at_on_a_pending_task_is_ignored(self, store, add, clock):
        task = add("a")
        task.completed_at = clock.now()
        store.update(task)
        assert ids(store.ready(["t"], 10)) == ["a"]

    def test_a_finished_task_keeps_its_completed_at(self, store, run):
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
    def test_a_value_that_no_store_can_hold_is_refused(self, store, add, field, value, error):
        """Both update and create refuse it, and nothing is changed."""
        task = add("a")
        with pytest.raises(error):
            store.update(attrs.evolve(task, **{field: value}))
        if field != "result":  # a new task has none
            with pytest.raises(error):
                store.create(attrs.evolve(task, id="b", **{field: value}))
        assert store.get_by_id("a") == task
        assert store.count(TaskFilter()) == 1

    def test_a_record_with_options_that_submit_refuses_can_be_updated(self, store, add):
        """Earlier versions took such options in ``create``."""
        task = attrs.evolve(add("a"), priority=2_000_000, timeout=0)
        store.update(task)
        assert store.get_by_id("a").priority == 2_000_000
        store.update(attrs.evolve(task, message="later"))
        assert store.get_by_id("a").message == "later"

    def test_text_is_made_storable(self, store, run):
        task = run("a")
        task.error, task.message = "lone \ud800 surrogate", "m" * 20_000
        store.update(task)
        stored = store.get_by_id("a")
        assert stored.error == "lone \\ud800 surrogate"
        assert len(stored.message) == 10_000

    def test_an_update_is_refused_if_the_task_changed_in_the_meantime(
        self, store, run, monkeypatch
    ):
        stale = run("a")
        store.update_status("a", TaskStatus.FAILED, "meanwhile")
        monkeypatch.setattr(store, "get_by_id", lambda task_id: stale)
        with pytest.raises(InvalidTransition, match="changed while it"):
            store.update(attrs.evolve(stale, status=TaskStatus.COMPLETED))
        with pytest.raises(InvalidTransition, match="changed while its status"):
            store.update_status("a", TaskStatus.COMPLETED)
