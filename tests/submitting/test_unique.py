"""Unique keys: at most one task holds a key at a time."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from helpers import (
    PATIENCE,
    eventually,
    frequent_checks,
    housekeeper_of,
    ids,
    key_holders,
    no_batches,
    no_rounds,
    parts_of,
    pool_of,
    run_in_thread,
    those_with,
)
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Paused,
    Queue,
    QueueFull,
    RetryPolicy,
    Task,
    TaskFilter,
    TaskStatus,
    open_repository,
)
from taskx.testing import ManualClock

KEY = {"unique_key": "report"}


@pytest.fixture
def quiet(queue):
    """A queue that is not started, with an executor ``fine`` that takes a number."""
    queue.executor("fine")(lambda n=0: n)
    return queue


class TestScope:
    def test_a_second_task_is_refused_and_the_error_names_the_first(self, quiet):
        first = quiet.submit("fine", **KEY)
        with pytest.raises(
            DuplicateTask, match=f"task {first.id} already holds the unique key 'report'"
        ) as e:
            quiet.submit("fine", **KEY)
        assert (e.value.task_id, e.value.unique_key) == (first.id, "report")
        quiet.submit("fine", unique_key="another")
        assert len(ids(quiet)) == 2
        assert (first.task().unique_key, first.task().unique_scope) == ("report", "unfinished")

    def test_scope_pending_releases_the_key_at_the_start(self, queue, gate):
        queue.executor("hold")(lambda: gate())
        first = queue.submit("hold", **KEY, unique_scope="pending")
        with pytest.raises(DuplicateTask):
            queue.submit("hold", **KEY)
        queue.start()
        gate.wait_for(1)
        second = queue.submit("hold", **KEY, unique_scope="pending")
        gate.open()
        for handle in (first, second):
            handle.result(PATIENCE)

    @pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
    def test_scope_unfinished_releases_the_key_at_the_end(self, queue, gate, how):
        @queue.executor("end", max_attempts=2)
        def end(ctx):
            gate()
            if how == "failed":
                raise ValueError(how)
            if how == "cancelled":
                ctx.sleep(PATIENCE)

        queue.start()
        first = queue.submit("end", **KEY)
        gate.wait_for(1)
        with pytest.raises(DuplicateTask):
            queue.submit("end", **KEY)
        gate.open()
        if how == "cancelled":
            first.cancel()
        eventually(lambda: first.task().status == how)
        queue.submit("end", **KEY)

    def test_scope_ever_holds_the_key_as_long_as_the_record_exists(self, quiet):
        quiet.start()
        first = quiet.submit("fine", **KEY, unique_scope="ever")
        first.result(PATIENCE)
        with pytest.raises(DuplicateTask):
            quiet.submit("fine", **KEY, unique_scope="ever")
        quiet.delete(first.id)
        quiet.submit("fine", **KEY, unique_scope="ever").result(PATIENCE)

    def test_a_scope_in_seconds_counts_from_the_submit(self, make_queue):
        clock = ManualClock()
        queue = make_queue(clock=clock)
        queue.executor("fine")(lambda: None)
        queue.submit("fine", **KEY, unique_scope=10)
        clock.advance(9.999)
        with pytest.raises(DuplicateTask):
            queue.submit("fine", **KEY, unique_scope=10)
        clock.advance(0.001)
        second = queue.submit("fine", **KEY, unique_scope=10)
        with pytest.raises(DuplicateTask) as e:
            queue.submit_many([Task(type="fine", **KEY)])
        assert e.value.task_id == second.id

    @pytest.mark.parametrize("scope", ["ever", 3600])
    @pytest.mark.parametrize("culprit", ["its executor", "its parent"])
    def test_a_dead_letter_keeps_its_unique_key_even_if_its_parent_failed(
        self, queue, scope, culprit
    ):
        queue.executor("bad")(lambda: 1 / 0)
        queue.start()
        parents = [queue.submit("bad")] if culprit == "its parent" else []
        first = queue.submit(
            "bad", **KEY, unique_scope=scope, depends_on=parents, on_parent_failure="fail"
        )
        assert first.exception(PATIENCE)
        with pytest.raises(DuplicateTask) as error:
            queue.submit("bad", **KEY)
        assert error.value.task_id == first.id
        queue.requeue(first.id)  # no other task has taken its key

    def test_scope_unfinished_releases_the_key_if_the_parent_failed(self, queue):
        queue.executor("bad")(lambda: 1 / 0)
        queue.start()
        parent = queue.submit("bad")
        first = queue.submit("bad", **KEY, depends_on=[parent], on_parent_failure="fail")
        assert first.exception(PATIENCE)
        queue.submit("bad", **KEY, delay=3600)

    @pytest.mark.parametrize("by_hand", [True, False])
    @pytest.mark.parametrize("scope", ["pending", "unfinished", "ever", 3600])
    def test_a_cancelled_pending_task_releases_its_key_in_any_scope(self, quiet, scope, by_hand):
        first = quiet.submit("fine", **KEY, unique_scope=scope)
        if by_hand:
            quiet.repository.update_status(first.id, TaskStatus.CANCELLED)
        else:
            first.cancel()
        quiet.submit("fine", **KEY, unique_scope=scope)

    @pytest.mark.parametrize(
        "option", [{"unique_scope": "ever"}, {"on_conflict": "return"}, {"on_conflict": "reject"}]
    )
    def test_options_for_unique_keys_require_a_key(self, quiet, option):
        """A caller who gives this option expects that there is at most one task."""
        with pytest.raises(ConfigurationError, match=f"{next(iter(option))} requires unique_key"):
            quiet.submit("fine", **option)
        assert ids(quiet) == set()

    @pytest.mark.parametrize("scope", ["always", -1, float("nan"), True, [], "-3"])
    def test_an_invalid_scope_is_refused(self, quiet, scope):
        with pytest.raises(ConfigurationError, match="unique_scope"):
            quiet.submit("fine", **KEY, unique_scope=scope)
        assert ids(quiet) == set()

    @pytest.mark.parametrize("key", ["", "x" * 256, 5, "a\0"])
    def test_an_invalid_key_is_refused(self, quiet, key):
        with pytest.raises(ConfigurationError, match="unique_key"):
            quiet.submit("fine", unique_key=key)
        assert ids(quiet) == set()

    def test_a_key_is_held_through_a_retry(self, queue, gate):
        @queue.executor("again", max_attempts=2)
        def again(ctx):
            if ctx.task.attempt == 1:
                raise ValueError("first")
            gate()

        queue.start()
        first = queue.submit("again", **KEY)
        gate.wait_for(1)
        with pytest.raises(DuplicateTask):
            queue.submit("again", **KEY)
        gate.open()
        first.result(PATIENCE)


class TestConflict:
    def test_return_gives_the_handle_of_the_existing_task(self, quiet):
        first = quiet.submit("fine", {"n": 1}, **KEY)
        second = quiet.submit("fine", {"n": 2}, **KEY, on_conflict="return")
        assert second.id == first.id
        quiet.start()
        assert second.result(PATIENCE) == 1
        third = quiet.submit("fine", {"n": 3}, **KEY, on_conflict="return")
        assert third.result(PATIENCE) == 3

    def test_replace_gives_the_pending_task_new_params_and_options(self, quiet):
        first = quiet.submit("fine", {"n": 1}, **KEY, delay=3600, created_by="a")
        again = quiet.submit("fine", {"n": 2}, **KEY, on_conflict="replace", priority=3, timeout=9)
        task = first.task()
        assert again.id == first.id
        assert (task.params, task.priority, task.timeout, task.created_by) == ({"n": 2}, 3, 9, "")
        assert (task.run_at, len(ids(quiet))) == (None, 1)
        quiet.start()
        assert first.result(PATIENCE) == 2

    def test_replace_changes_the_delay_of_a_task(self, quiet):
        """The last of many calls runs, some time after it was made (debouncing)."""
        quiet.start()
        first = quiet.submit("fine", {"n": 1}, **KEY, delay=3600)
        quiet.submit("fine", {"n": 2}, **KEY, delay=7200, on_conflict="replace")
        assert (first.task().run_at - first.task().created_at).total_seconds() >= 7200
        quiet.submit("fine", {"n": 3}, **KEY, on_conflict="replace")
        assert first.result(PATIENCE) == 3

    def test_a_replaced_task_with_a_delay_leaves_its_node(self, busy, gate):
        """Else the node would be the owner when the delay has passed, without having it in its buffer."""
        queue = busy()
        first = queue.submit("note", {"n": 1}, **KEY)
        assert first.task().owner
        queue.submit("note", {"n": 2}, **KEY, on_conflict="replace", delay=3600)
        assert first.task().owner == ""
        gate.open()
        assert queue.drain(PATIENCE)
        assert queue.ran == []

    def test_a_task_that_releases_its_key_meanwhile_is_not_replaced(self, quiet):
        """The task started after it was read, and is pending again when the write comes."""
        first = quiet.submit("fine", {"n": 1}, **KEY, unique_scope="pending")
        repository = quiet.repository

        def start_and_back(writes):
            if any(write.id == first.id for write in writes):
                repository.before = lambda writes: None
                for status in (TaskStatus.RUNNING, TaskStatus.PENDING):
                    repository.update_status(first.id, status)

        repository.before = start_and_back
        second = quiet.submit("fine", {"n": 2}, **KEY, on_conflict="replace")
        assert second.id != first.id
        assert (first.task().params, second.task().params) == ({"n": 1}, {"n": 2})

    @frequent_checks
    def test_a_task_replaced_during_its_start_runs_with_the_new_params(
        self, make_queue, repository
    ):
        """The params are replaced after the worker has read the old ones."""
        queue, other = make_queue(worker_num=1), Queue(repository)
        ran = []
        for one in (queue, other):
            one.executor("note")(lambda n: ran.append(n))
        first = other.submit("note", {"n": 1}, **KEY)

        def replace(writes):
            if any(write.id == first.id for write in writes):
                repository.before = lambda writes: None
                other.submit("note", {"n": 2}, **KEY, on_conflict="replace")

        repository.before = replace
        queue.start()
        first.result(PATIENCE)
        assert ran == [2]

    @no_batches
    def test_a_replaced_task_in_the_buffer_gets_its_new_place(self, busy, gate):
        queue = busy()
        queue.submit("note", {"n": 1}, priority=1)
        first = queue.submit("note", {"n": 2}, **KEY)
        queue.submit("note", {"n": 3}, **KEY, on_conflict="replace", priority=5)
        eventually(lambda: first.id in pool_of(queue).buffer)
        gate.open()
        assert queue.drain(PATIENCE)
        assert queue.ran == [3, 1]

    def test_replace_changes_the_scope(self, quiet):
        first = quiet.submit("fine", **KEY)
        quiet.submit("fine", **KEY, unique_scope="ever", on_conflict="replace")
        quiet.start()
        first.result(PATIENCE)
        with pytest.raises(DuplicateTask):
            quiet.submit("fine", **KEY)

    def test_return_and_replace_work_with_a_full_buffer(self, busy):
        queue = busy(buffer_size=1)
        first = queue.submit("note", {"n": 1}, **KEY, delay=3600)
        queue.submit("note", {"n": 0})
        assert queue.submit("note", {"n": 2}, **KEY, on_conflict="return").id == first.id
        again = queue.submit("note", {"n": 3}, **KEY, on_conflict="replace", delay=3600)
        assert (again.id, first.task().params) == (first.id, {"n": 3})
        with pytest.raises(DuplicateTask):
            queue.submit("hold", **KEY, on_conflict="replace")
        for conflict in ("reject", "return"):
            with pytest.raises(QueueFull):
                queue.submit("note", unique_key="other", on_conflict=conflict)

    @pytest.mark.timing(recover_every=3600)
    def test_a_replaced_task_is_noticed_at_once(self, make_queue):
        """No slow duty and no change by others helps to notice it."""
        clock = ManualClock()
        queue = make_queue(clock=clock)
        queue.repository.version = lambda: 0
        queue.executor("fine")(lambda n: n)
        queue.start()
        first = queue.submit("fine", {"n": 1}, **KEY, delay=3600)
        eventually(lambda: housekeeper_of(queue)._release.next is not None)
        queue.submit("fine", {"n": 2}, **KEY, on_conflict="replace", delay=10)
        clock.advance(11)
        assert first.result(PATIENCE) == 2
        first = queue.submit("fine", {"n": 3}, **KEY, delay=3600)
        queue.submit("fine", {"n": 4}, **KEY, on_conflict="replace")
        assert first.result(PATIENCE) == 4

    @pytest.mark.timing(recover_every=3600)
    def test_a_task_stored_at_the_second_try_has_no_owner_without_a_buffer(self, make_queue, gate):
        """The first try was for the buffer; before the second try the type was paused."""
        clock = ManualClock()
        queue = make_queue(clock=clock, worker_num=1)
        queue.executor("hold")(lambda: gate())
        queue.start()
        queue.submit("hold", **KEY, unique_scope=1)
        gate.wait_for(1)
        clock.advance(2)

        def pause(writes):
            parts_of(queue).controls.paused = Paused(everything=True)

        queue.repository.after = pause
        with no_rounds(queue):  # a round would read the pauses that are stored
            assert queue.submit("hold", **KEY).task().owner == ""

    def test_a_running_task_is_not_replaced(self, queue, gate):
        queue.executor("hold")(lambda n=0: gate())
        queue.start()
        queue.submit("hold", **KEY)
        gate.wait_for(1)
        with pytest.raises(DuplicateTask):
            queue.submit("hold", {"n": 2}, **KEY, on_conflict="replace")

    def test_a_task_of_another_type_is_not_replaced(self, quiet):
        quiet.executor("other")(lambda: None)
        first = quiet.submit("fine", **KEY)
        with pytest.raises(DuplicateTask):
            quiet.submit("other", **KEY, on_conflict="replace")
        assert first.task().type == "fine"

    @pytest.mark.parametrize("what", ["depends_on", "on_parent_failure", "concurrency_key"])
    def test_a_task_that_waits_for_others_is_not_replaced(self, quiet, what):
        """Nor does a task that waits replace one that does not: it would start without waiting."""
        parent = quiet.submit("fine", delay=3600)
        waits = {
            "depends_on": {"depends_on": [parent]},
            "on_parent_failure": {"depends_on": [parent], "on_parent_failure": "run"},
            "concurrency_key": {"concurrency_key": "a"},
        }[what]
        other = {"depends_on": [parent]} if what == "on_parent_failure" else {}
        for one, two, key in ((waits, other, "x"), (other, waits, "y")):
            first = quiet.submit("fine", {"n": 1}, unique_key=key, **one)
            same = quiet.submit("fine", {"n": 2}, unique_key=key, **one, on_conflict="replace")
            with pytest.raises(DuplicateTask):
                quiet.submit("fine", {"n": 3}, unique_key=key, **two, on_conflict="replace")
            assert (same.id, first.task().params) == (first.id, {"n": 2})
            assert those_with(quiet.repository, "waiting_on", parent.id).count(first.id) == (
                "depends_on" in one
            )

    def test_a_replaced_task_repeats_steps_done_with_old_params(self, make_queue):
        clock = ManualClock()
        queue = make_queue(clock=clock)

        @queue.executor("steps", retry=RetryPolicy(max_attempts=2, base=100, max_delay=100))
        def steps(ctx, n):
            done = ctx.step("first", lambda: n)
            if ctx.task.attempt == 1:
                raise ValueError("once more")
            return done

        queue.start()
        first = queue.submit("steps", {"n": 1}, **KEY)
        eventually(lambda: first.task().errors)
        assert first.task().checkpoints
        queue.submit("steps", {"n": 2}, **KEY, on_conflict="replace")
        assert first.result(PATIENCE) == 2

    def test_an_unknown_on_conflict_is_refused(self, quiet):
        with pytest.raises(ConfigurationError, match="on_conflict"):
            quiet.submit("fine", **KEY, on_conflict="ignore")

    def test_on_conflict_does_not_apply_to_a_duplicate_id(self, quiet):
        quiet.submit("fine", id="x")
        with pytest.raises(DuplicateTask, match="id 'x'") as e:
            quiet.submit("fine", id="x", **KEY, on_conflict="return")
        assert e.value.unique_key is None

    def test_a_refused_task_frees_its_slot_in_the_buffer(self, make_queue, gate):
        queue = make_queue(worker_num=1, buffer_size=1)
        queue.executor("hold")(lambda: gate())
        queue.start()
        queue.submit("hold", **KEY)
        gate.wait_for(1)
        for _ in range(3):
            with pytest.raises(DuplicateTask):
                queue.submit("hold", **KEY)
        queue.submit("hold")

    def test_submit_many_is_refused_as_a_whole(self, quiet):
        quiet.submit("fine", **KEY)
        with pytest.raises(DuplicateTask, match="report"):
            quiet.submit_many([Task(type="fine"), Task(type="fine", **KEY)])
        with pytest.raises(DuplicateTask, match="twin"):
            quiet.submit_many([Task(type="fine", unique_key="twin") for _ in range(2)])
        for keys in (("a", "b"), (None, "b"), ("a", None)):
            with pytest.raises(DuplicateTask, match="id 'one'"):
                quiet.submit_many(Task(id="one", type="fine", unique_key=key) for key in keys)
        assert len(ids(quiet)) == 1


class TestRequeue:
    @pytest.fixture
    def cancelled(self, quiet):
        handle = quiet.submit("fine", **KEY)
        handle.cancel()
        return handle

    def test_a_requeued_task_takes_its_key_again(self, quiet, cancelled):
        quiet.requeue(cancelled.id)
        with pytest.raises(DuplicateTask):
            quiet.submit("fine", **KEY)

    def test_a_requeue_is_refused_if_another_task_holds_the_key(self, quiet, cancelled):
        other = quiet.submit("fine", **KEY)
        with pytest.raises(DuplicateTask) as e:
            quiet.requeue(cancelled.id)
        assert e.value.task_id == other.id
        assert cancelled.task().status is TaskStatus.CANCELLED

    @pytest.mark.parametrize("passed", [59, 60])
    def test_a_key_for_some_seconds_is_taken_again_while_they_last(self, make_queue, clock, passed):
        queue = make_queue(clock=clock)
        queue.executor("fine")(lambda: None)
        handle = queue.submit("fine", **KEY, unique_scope=60)
        handle.cancel()
        clock.advance(passed)
        queue.requeue(handle.id)
        held = {"report": handle.id} if passed < 60 else {}
        assert key_holders(queue.repository, ["report"]) == held

    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
    @pytest.mark.parametrize("scope", ["pending", "unfinished", "ever", 3600])
    def test_an_end_by_hand_releases_the_key_like_any_other(self, quiet, status, scope):
        first = quiet.submit("fine", **KEY, unique_scope=scope)
        repository = quiet.repository
        repository.update_status(first.id, TaskStatus.RUNNING)
        repository.update_status(first.id, TaskStatus(status))
        held = {} if scope in ("pending", "unfinished") else {"report": first.id}
        assert key_holders(repository, ["report"]) == held

    def test_a_requeue_by_hand_is_refused_if_the_key_is_held(self, quiet, cancelled):
        other = quiet.submit("fine", **KEY)
        task = cancelled.task()
        task.status = TaskStatus.PENDING
        for by_hand in (
            lambda: quiet.repository.update(task),
            lambda: quiet.repository.update_status(task.id, TaskStatus.PENDING),
        ):
            with pytest.raises(DuplicateTask) as e:
                by_hand()
            assert (e.value.task_id, e.value.unique_key) == (other.id, "report")
        other.cancel()
        quiet.repository.update_status(task.id, TaskStatus.PENDING)
        assert key_holders(quiet.repository, ["report"]) == {"report": task.id}


def test_a_repository_of_eight_methods_refuses_a_unique_key():
    queue = Queue(TinyRepository())
    queue.executor("fine")(lambda: None)
    with pytest.raises(ConfigurationError, match="unique_key; nothing was stored"):
        queue.submit("fine", **KEY)
    assert queue.list_tasks() == ([], 0)


def test_only_one_of_several_threads_gets_a_key(quiet):
    """All threads get the same task, whether they reject, return or replace."""
    barrier = threading.Barrier(4)

    def submit(number):
        barrier.wait(PATIENCE)
        how = ["reject", "return", "replace"][number % 3]
        try:
            return quiet.submit("fine", {"n": number}, **KEY, on_conflict=how).id
        except DuplicateTask as error:
            return error.task_id

    results = [run_in_thread(partial(submit, number)) for number in range(4)]
    assert {result() for result in results} == ids(quiet)
    assert len(ids(quiet)) == 1


RACER = """
    import sys
    from taskx import DuplicateTask, Queue, open_repository

    queue = Queue(open_repository(sys.argv[1]))
    queue.executor("fine")(lambda: None)
    print("ready", flush=True)
    input()
    won = []
    for number in range(50):
        try:
            queue.submit("fine", unique_key=f"key {number}", unique_scope=sys.argv[2])
            won.append(number)
        except DuplicateTask:
            pass
    print(*won, flush=True)
"""


@pytest.mark.parametrize("scope", ["unfinished", "3600"])
def test_only_one_of_several_processes_gets_a_key(url, spawn, scope):
    """A constraint of the database ensures it."""
    children = [spawn(RACER, url, scope) for _ in range(3)]
    for child in children:
        assert child.read() == "ready"
    for child in children:
        child.tell()
    won = [int(number) for child in children for number in child.read().split()]
    assert sorted(won) == list(range(50))
    with open_repository(url) as repository:
        keys = [f"key {number}" for number in range(50)]
        assert repository.count(TaskFilter()) == 50
        assert sorted(key_holders(repository, keys)) == sorted(keys)
