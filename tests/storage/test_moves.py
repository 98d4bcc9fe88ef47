"""The effect of ``lifecycle``'s moves on a record, which is the same on every repository."""

from datetime import timedelta

import attrs
import pytest
from helpers import earliest_due

from taskx import (
    ConfigurationError,
    InvalidTransition,
    PayloadError,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.node.housekeeper import unfinished
from taskx.stores import base
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending
from taskx.tasks.log import Once

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

    def test_an_updated_run_at_takes_effect(self, store, add, clock, now):
        task = add("a")
        task.run_at = clock.now() + timedelta(seconds=5)
        store.update(task)
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == ([], now + 5000)
        task.run_at = None
        store.update(task)
        assert (ids(store.ready(["t"], 10)), earliest_due(store)) == (["a"], None)


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
