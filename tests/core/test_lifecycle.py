"""The life of a task: every row of the table of moves, and no other moves."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import product
from typing import get_args

import attrs
import pytest

from taskx import CancelReason, InvalidTransition, Task, TaskStatus
from taskx.tasks import lifecycle
from taskx.tasks.clock import to_datetime
from taskx.tasks.lifecycle import Ending
from taskx.tasks.model import TASK_FIELDS
from taskx.tasks.moves import MOVES
from taskx.tasks.options import OnParentFailure
from taskx.tasks.record import (
    BY_THREAD,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNTIL_DUE,
    row_from_task,
    task_from_row,
)
from taskx.tasks.writes import Delete, Insert, matches

NOW = 1_700_000_000_000
LATER = NOW + 5000


def make(status="pending", **fields) -> Task:
    running = {"starts": 1, "started_at": to_datetime(NOW), "owner": "node"}
    defaults = {
        "pending": {},
        "running": running,
        "completed": {**running, "owner": "", "completed_at": to_datetime(NOW + 1)},
        "failed": {**running, "owner": "", "completed_at": to_datetime(NOW + 1), "errors": 1},
        "cancelled": {"completed_at": to_datetime(NOW + 1)},
    }[status]
    values = {"id": "a", "type": "t", "created_at": to_datetime(NOW), **defaults, **fields}
    return Task(status=TaskStatus(status), **values)


def apply(task: Task, *writes) -> Task | None:
    """Return the task after the one write whose guard holds; None if no guard holds."""
    row = row_from_task(task)
    row["held"] = int(task.run_at is not None and task.status is TaskStatus.PENDING)
    if task.depends_on:
        row["held"] = FOR_PARENTS
    holding = [write for write in writes if matches(row, write.guard)]
    assert len(holding) <= 1, "alternatives exclude one another"
    if not holding:
        return None
    if isinstance(holding[0], Delete):
        return Task(id="deleted")
    row.update(holding[0].changes)
    return task_from_row([row[name] for name in TASK_FIELDS])


def end(task: Task, **ending) -> Task | None:
    return apply(task, *lifecycle.conclude(task, Ending(**{"returned": False, **ending}), LATER))


def request_cancel(task: Task) -> Task:
    asked = apply(task, *lifecycle.cancel(task.id, LATER))
    assert asked is not None
    return asked


class TestTable:
    """``MOVES`` lists all changes of status that can happen, and no others."""

    def test_every_move_of_the_table_and_no_other_is_possible(self):
        # An answer is finished whatever it waits for; the queue has looked whether it is one.
        reached = {("pending", "completed"), ("pending", "failed")}
        for status, asked, errors, parents in product(
            TaskStatus, (False, True), (0, 1), ([], ["p"])
        ):
            cancel_requested_at = to_datetime(NOW) if asked else None
            facts = {"cancel_requested_at": cancel_requested_at, "depends_on": parents}
            task = make(status.value, errors=errors, **facts)
            task.max_attempts = task.max_crashes = 2
            for move in self.all_writes(task):
                after = apply(task, *move)
                if after is not None and after.status is not task.status:
                    reached.add((task.status.value, after.status.value))
        assert reached == {edge for move in MOVES for edge in move.edges}

    def all_writes(self, task):
        for returned, permanent, crashed, stuck, reason in product(
            (True, False), (True, False), (True, False), (True, False), (None, *CancelReason)
        ):
            ending = Ending(
                returned=returned, permanent=permanent, crashed=crashed, stuck=stuck, reason=reason
            )
            yield lifecycle.conclude(task, ending, LATER)
        for crashes, stopping in product((0, 1), (True, False)):
            crashed = attrs.evolve(task, crashes=crashes)
            yield lifecycle.rescue([crashed], LATER, stopping=stopping)[0]
        yield lifecycle.cancel(task.id, LATER)
        yield lifecycle.hand_back(task, LATER)
        for policy in get_args(OnParentFailure):
            child = attrs.evolve(task, on_parent_failure=policy)
            yield [lifecycle.parents_moved(child, {"p": "failed"}, LATER)]
        yield [lifecycle.progress(task.id, task.starts, 1, "")]
        yield [lifecycle.checkpoint(task, "{}", durable=True)]
        yield [lifecycle.release(task.id)]
        yield lifecycle.lift_bar(attrs.evolve(task, stuck_on="node"), LATER)
        yield [lifecycle.take(task.id, "n")]
        yield [lifecycle.free(task.id, "n")]
        if (start := lifecycle.start(task, LATER, "n")) is not None:
            yield [start]
        for status in TaskStatus:
            wanted = attrs.evolve(task, status=status)
            for by_hand in (
                lambda: [lifecycle.requeue(task, LATER)],
                lambda s=status: [lifecycle.set_status(task, s, "", LATER)],
                lambda w=wanted: lifecycle.amend(task, w, LATER),
            ):
                with suppress(InvalidTransition):
                    yield by_hand()

    def test_changes_by_hand_follow_the_table_of_moves(self):
        edges = {edge for m in MOVES if m.name not in ("orphan", "finish") for edge in m.edges}
        for source, target in product(TaskStatus, TaskStatus):
            task = make(source.value)
            if source is target or (source.value, target.value) in edges:
                after = apply(task, lifecycle.set_status(task, target, "by hand", LATER))
                assert after is not None
                assert (after.status, after.message) == (target, "by hand")
            else:
                with pytest.raises(InvalidTransition, match=f"is {source} and cannot"):
                    lifecycle.set_status(task, target, "", LATER)
                with pytest.raises(InvalidTransition):
                    lifecycle.amend(task, attrs.evolve(task, status=target), LATER)


class TestCreate:
    @pytest.mark.parametrize(("run_at", "held"), [(None, 0), (NOW - 1, 0), (NOW, 0), (NOW + 1, 1)])
    def test_a_new_task_is_held_back_only_before_its_time(self, run_at, held):
        write = lifecycle.create(
            task_id="a", type="t", params="{}", created_by="u", now=NOW, run_at=run_at
        )
        assert isinstance(write, Insert)
        assert write.durable
        assert (write.id, write.row["created_at"], write.row["held"]) == ("a", NOW, held)


class TestStart:
    def test_a_start_raises_the_fence_and_names_the_owner(self):
        task = make(starts=3, max_attempts=2, max_crashes=4, timeout=1.5)
        update = lifecycle.start(task, LATER, "node")
        after = apply(task, update)
        assert after.status is TaskStatus.RUNNING
        assert (after.starts, after.owner, after.started_at) == (4, "node", to_datetime(LATER))
        assert (after.max_attempts, after.max_crashes, after.timeout) == (2, 4, 1.5)
        lifecycle.mark_started([task], [update])
        assert task == after

    def test_the_second_start_of_the_same_record_fails(self):
        task = make()
        first, second = (lifecycle.start(task, LATER, node) for node in ("one", "two"))
        started = apply(task, first)
        assert apply(started, second) is None
        back = apply(started, *lifecycle.hand_back(started, LATER))
        assert back.status is TaskStatus.PENDING
        assert apply(back, second) is None

    def test_a_task_does_not_start_before_its_time(self):
        task = make(run_at=to_datetime(LATER))
        assert apply(task, lifecycle.start(task, NOW, "node")) is None

    @pytest.mark.parametrize("status", ["running", "completed", "failed", "cancelled"])
    def test_only_a_pending_task_can_start(self, status):
        assert lifecycle.start(make(status), LATER, "node") is None

    @pytest.mark.parametrize(("max_crashes", "durable"), [(None, False), (1, True), (2, False)])
    def test_a_start_that_must_not_be_repeated_is_durable(self, max_crashes, durable):
        assert lifecycle.start(make(max_crashes=max_crashes), LATER, "n").durable is durable


class TestFence:
    """A run can change its task only while it is the task's current run."""

    @pytest.mark.parametrize("other", [{"starts": 2}, {"status": TaskStatus.PENDING}])
    def test_a_run_that_lost_its_fence_writes_nothing(self, other):
        task = make("running")
        now = attrs.evolve(task, **other)
        writes = [
            lifecycle.conclude(task, Ending(returned=returned, reason=reason), LATER)
            for returned, reason in product((True, False), (None, *CancelReason))
        ]
        writes.append([lifecycle.progress("a", task.starts, 50, "late")])
        writes.append([lifecycle.checkpoint(task, "{}", durable=True)])
        writes.append(lifecycle.hand_back(task, LATER))
        assert [apply(now, *alternatives) for alternatives in writes] == [None] * len(writes)

    def test_progress_without_a_fence_is_that_of_the_current_run(self):
        after = apply(make("running", starts=9), lifecycle.progress("a", None, 50, "half"))
        assert (after.progress, after.message) == (50, "half")


class TestConclude:
    @pytest.mark.parametrize("reason", [None, *CancelReason])
    def test_a_normal_return_completes_even_if_the_token_fired(self, reason):
        task = request_cancel(make("running", errors=1, error="before", traceback="tb"))
        after = end(task, returned=True, result='{"n":1}', reason=reason, duration=2.5, worker="w")
        assert after.status is TaskStatus.COMPLETED
        assert (after.result, after.progress, after.duration) == ({"n": 1}, 100, 2.5)
        assert (after.completed_at, after.owner, after.worker) == (to_datetime(LATER), "", "w")
        assert (after.error, after.traceback, after.errors) == ("", "", 1)

    def test_the_last_progress_is_kept(self):
        task = make("running", progress=10, message="old")
        assert end(task, returned=True, progress=60, message="last").message == "last"
        failed = end(task, progress=60, message="last")
        assert (failed.progress, failed.message) == (60, "last")
        assert end(task).progress == 10

    @pytest.mark.parametrize(
        ("errors", "max_attempts", "permanent", "status", "dead_letter"),
        [
            (0, None, False, "failed", True),
            (0, 1, False, "failed", True),
            (0, 2, False, "pending", False),
            (1, 2, False, "failed", True),
            (0, 2, True, "failed", True),
            (5, 2, False, "failed", True),
        ],
    )
    def test_an_error_uses_up_an_attempt(
        self, errors, max_attempts, permanent, status, dead_letter
    ):
        """A failed task is a dead letter, whether it has attempts left or not."""
        task = make("running", errors=errors, max_attempts=max_attempts)
        after = end(task, error="broke", traceback="tb", permanent=permanent)
        assert (after.status.value, after.dead_letter) == (status, dead_letter)
        assert (after.errors, after.error, after.traceback) == (errors + 1, "broke", "tb")
        assert (after.crashes, after.interruptions) == (0, 0)

    def test_a_retry_stays_with_its_node_and_starts_afresh(self):
        task = make("running", max_attempts=2, progress=40, message="m")
        after = end(task, error="broke", worker="w")
        assert (after.owner, after.progress, after.message) == ("node", 0, "")
        assert (after.started_at, after.completed_at, after.attempt) == (None, None, 2)
        [attempt] = after.attempts
        assert (attempt.outcome, attempt.error, attempt.worker) == ("retried", "broke", "w")
        assert attempt.ended_at == to_datetime(LATER)

    def test_an_undone_start_keeps_the_worker_of_the_last_attempt(self):
        task = end(make("running", max_attempts=2), error="broke", worker="w/1")
        started = apply(task, lifecycle.start(task, LATER, "node", "w"))
        assert started.worker == "w"
        assert apply(started, *lifecycle.hand_back(started, LATER)).worker == "w/1"

    def test_a_waiting_retry_has_no_owner(self):
        task = make("running", max_attempts=2)
        [write, _] = lifecycle.conclude(
            task, Ending(returned=False, error="broke", delay=1.5), LATER
        )
        row = {**row_from_task(task), **write.changes}
        assert (row["status"], row["held"], row["owner"]) == ("pending", 1, "")
        assert row["run_at"] == LATER + 1500
        assert row["errors"] == 1

    def test_a_wait_beyond_the_calendar_is_shortened(self):
        after = end(make("running", max_attempts=2), delay=1e300)
        assert 2090 < after.run_at.year < 2200

    @pytest.mark.parametrize(("seconds", "owner"), [(60.0, ""), (0.0, "node")])
    def test_a_snooze_uses_up_no_attempt(self, seconds, owner):
        after = end(make("running", max_attempts=1), snooze=seconds, error="again in 60 s")
        assert (after.status, after.owner, after.snoozes) == (TaskStatus.PENDING, owner, 1)
        assert (after.errors, after.error, after.attempt) == (0, "", 1)
        assert after.run_at == (to_datetime(LATER + 60_000) if seconds else None)
        assert [attempt.outcome for attempt in after.attempts] == ["snoozed"]

    @pytest.mark.parametrize(
        ("reason", "status"),
        [
            (CancelReason.CANCEL, "cancelled"),
            (CancelReason.TIMEOUT, "failed"),
            (CancelReason.STOP, "pending"),
        ],
    )
    def test_a_fired_token_wins_over_a_snooze(self, reason, status):
        after = end(make("running"), snooze=60.0, reason=reason)
        assert (after.status.value, after.snoozes, after.run_at) == (status, 0, None)

    def test_a_timeout_is_an_error(self):
        assert end(make("running"), reason=CancelReason.TIMEOUT).status is TaskStatus.FAILED
        retried = end(make("running", max_attempts=2), reason=CancelReason.TIMEOUT)
        assert (retried.status, retried.errors) == (TaskStatus.PENDING, 1)

    def test_a_cancelled_task_ends_as_cancelled_whatever_it_raised(self):
        after = end(make("running", max_attempts=5), reason=CancelReason.CANCEL, error="broke")
        assert after.status is TaskStatus.CANCELLED
        assert (after.errors, after.completed_at) == (0, to_datetime(LATER))

    @pytest.mark.parametrize("reason", [CancelReason.STOP, CancelReason.LEASE_LOST])
    def test_a_stop_interrupts_and_uses_up_no_attempt(self, reason):
        after = end(make("running", errors=0), reason=reason, error="broke")
        assert (after.status, after.owner) == (TaskStatus.PENDING, "")
        assert (after.interruptions, after.errors, after.crashes, after.error) == (1, 0, 0, "")
        assert [attempt.outcome for attempt in after.attempts] == ["interrupted"]

    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"delay": 5.0},
            {"snooze": 5.0},
            {"reason": CancelReason.TIMEOUT},
            {"reason": CancelReason.STOP},
            {"crashed": True},
        ],
    )
    def test_a_cancel_request_wins_over_another_run(self, how):
        """Also if the request came after the task was read."""
        task = make("running", max_attempts=3)
        asked = request_cancel(task)
        writes = lifecycle.conclude(task, Ending(returned=False, **how), LATER)
        assert apply(asked, *writes).status is TaskStatus.CANCELLED
        assert apply(task, *writes).status is TaskStatus.PENDING

    def test_a_crash_of_a_child_process_uses_up_no_attempt(self):
        task = make("running", errors=1, max_attempts=2, progress=40)
        after = end(task, crashed=True, error="killed", traceback="tb", worker="w")
        assert (counts(after), after.errors) == (("pending", 1, 0), 1)
        assert (after.owner, after.progress, after.started_at) == ("node", 0, None)
        [attempt] = after.attempts
        assert (attempt.outcome, attempt.error, attempt.traceback) == ("crashed", "killed", "tb")
        assert attempt.worker == "w"

    @pytest.mark.parametrize(
        ("crashes", "max_crashes", "status"),
        [(0, 1, "failed"), (1, None, "pending"), (2, None, "failed"), (2, 4, "pending")],
    )
    def test_the_last_allowed_crash_fails_a_task_for_good(self, crashes, max_crashes, status):
        task = make("running", crashes=crashes, max_crashes=max_crashes)
        after = end(task, crashed=True, error="killed", traceback="tb", worker="w")
        assert counts(after) == (status, crashes + 1, 0)
        assert after.dead_letter is (status == "failed")
        assert [attempt.outcome for attempt in after.attempts] == ["crashed"]
        if status == "failed":
            assert after.error == f"killed ({crashes + 1} of max_crashes={crashes + 1})"
            assert (after.traceback, after.worker) == ("tb", "w")

    @pytest.mark.parametrize("max_crashes", [1, 3])
    def test_a_crash_after_a_cancel_request_cancels_the_task(self, max_crashes):
        task = make("running", max_crashes=max_crashes)
        writes = lifecycle.conclude(task, Ending(returned=False, crashed=True), LATER)
        assert counts(apply(request_cancel(task), *writes)) == ("cancelled", 1, 0)

    @pytest.mark.parametrize(
        ("reason", "status"),
        [
            (CancelReason.CANCEL, "cancelled"),
            (CancelReason.TIMEOUT, "failed"),
            (CancelReason.STOP, "pending"),
        ],
    )
    def test_a_fired_token_wins_over_a_crash(self, reason, status):
        """The process may have been killed because the token fired."""
        after = end(make("running"), crashed=True, reason=reason)
        assert (after.status.value, after.crashes) == (status, 0)

    def test_a_start_that_was_never_executed_is_undone(self):
        task = make("running", errors=1, max_attempts=3)
        after = apply(task, *lifecycle.hand_back(task, LATER))
        assert (after.status, after.owner, after.starts) == (TaskStatus.PENDING, "node", 1)
        assert (after.started_at, after.errors, after.interruptions) == (None, 1, 0)
        asked = apply(request_cancel(task), *lifecycle.hand_back(task, LATER))
        assert asked.status is TaskStatus.CANCELLED


class TestAttemptLog:
    def test_attempts_within_one_millisecond_are_all_kept(self):
        task = make("running", max_attempts=2)
        again = apply(task, *lifecycle.conclude(task, Ending(returned=False, error="1"), NOW))
        again = apply(again, lifecycle.start(again, NOW, "node"))
        assert [attempt.outcome for attempt in again.attempts] == ["retried", ""]
        done = apply(again, *lifecycle.conclude(again, Ending(returned=False, error="2"), NOW))
        assert [attempt.outcome for attempt in done.attempts] == ["retried", "failed"]

    def test_the_number_of_kept_attempts_is_limited(self):
        task = make("running", max_attempts=10**6)
        for number in range(lifecycle.MAX_KEPT_ATTEMPTS + 5):
            task = end(task, error=str(number))
            task = apply(task, lifecycle.start(task, NOW + number, "node"))
        assert len(task.earlier_attempts) == lifecycle.MAX_KEPT_ATTEMPTS
        assert task.earlier_attempts[0].error == "5"

    def test_attempts_of_older_and_newer_versions_can_be_read(self):
        old, new = ["retried", 1, 2, "w", "broke", "tb"], ["retried", 1, 2, "w", "x", "", "E", "?"]
        row = {**row_from_task(make()), "earlier_attempts": json.dumps([old, new])}
        task = task_from_row([row[name] for name in TASK_FIELDS])
        assert not task.damage
        assert [attempt.error_type for attempt in task.attempts] == ["", "E"]

    def test_the_crash_that_ended_a_task_is_listed_once(self):
        task = make("running", max_crashes=1)
        [writes] = lifecycle.rescue([task], LATER, stopping=False)
        failed = apply(task, *writes)
        assert [attempt.outcome for attempt in failed.attempts] == ["crashed"]
        again = apply(failed, lifecycle.requeue(failed, LATER))
        assert [attempt.outcome for attempt in again.attempts] == ["crashed"]


class TestCancel:
    def test_a_pending_task_is_cancelled_at_once(self):
        after = apply(make(owner="node"), *lifecycle.cancel("a", LATER))
        assert (after.status, after.owner) == (TaskStatus.CANCELLED, "")
        assert after.completed_at == to_datetime(LATER)

    def test_a_running_task_is_asked_to_stop_once(self):
        asked = request_cancel(make("running"))
        assert asked.status is TaskStatus.RUNNING
        assert asked.cancel_requested_at == to_datetime(LATER)
        assert apply(asked, *lifecycle.cancel("a", LATER + 1)) is None

    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
    def test_an_ended_task_cannot_be_cancelled(self, status):
        assert apply(make(status), *lifecycle.cancel("a", LATER)) is None

    def test_a_cancel_is_durable(self):
        assert all(write.durable for write in lifecycle.cancel("a", LATER))


def rescue(*tasks: Task, **how) -> list[Task]:
    rescues = lifecycle.rescue(list(tasks), LATER, **{"stopping": False, **how})
    return [apply(task, *writes) for task, writes in zip(tasks, rescues, strict=True)]


def counts(task: Task) -> tuple[str, int, int]:
    return task.status.value, task.crashes, task.interruptions


class TestRescue:
    """Tasks that ran on a node that died are taken back."""

    def test_a_task_that_no_thread_executed_is_not_suspected(self):
        suspect, culprit, waited = (
            make("running", id="suspect", crashes=2),
            make("running", id="culprit"),
            make("running", id="waited"),
        )
        afterwards = rescue(suspect, culprit, waited, executing={"culprit"})
        assert [(t.crashes, t.interruptions) for t in afterwards] == [(2, 1), (1, 0), (0, 1)]

    def test_no_task_crashed_if_no_thread_executed_any(self):
        [after] = rescue(make("running"), executing=set())
        assert (after.crashes, after.interruptions) == (0, 1)

    def test_a_task_that_allows_one_crash_fails_even_if_not_executed(self):
        [after] = rescue(make("running", max_crashes=1), executing=set())
        assert (after.status, after.crashes) == (TaskStatus.FAILED, 1)

    def test_without_suspects_every_task_counts_a_crash(self):
        assert [counts(t) for t in rescue(make("running"), make("running"))] == [
            ("pending", 1, 0),
            ("pending", 1, 0),
        ]

    def test_a_task_with_chances_left_and_its_neighbours_count_a_crash(self):
        assert [counts(t) for t in rescue(make("running", crashes=1), make("running"))] == [
            ("pending", 2, 0),
            ("pending", 1, 0),
        ]

    def test_a_crash_of_the_node_uses_up_no_attempt(self):
        [after] = rescue(make("running", max_attempts=1))
        assert (after.status, after.errors, after.owner) == (TaskStatus.PENDING, 0, "")
        [attempt] = after.attempts
        assert (attempt.outcome, attempt.error) == ("crashed", "the process that ran it died")

    def test_the_log_names_the_process_that_died(self):
        [after] = rescue(make("running", owner="0123", worker="host:7:abc"))
        assert after.attempts[-1].worker == "host:7:abc"

    @pytest.mark.parametrize(("crashes", "max_crashes"), [(1, 2), (2, None), (2, 3), (4, 5)])
    def test_a_task_on_its_last_chance_is_the_culprit(self, crashes, max_crashes):
        suspect, fresh, other = rescue(
            make("running", crashes=crashes, max_crashes=max_crashes),
            make("running"),
            make("running", crashes=1),
        )
        assert counts(suspect) == ("failed", crashes + 1, 0)
        assert (counts(fresh), counts(other)) == (("pending", 0, 1), ("pending", 1, 1))
        assert fresh.attempts[0].outcome == "interrupted"

    @pytest.mark.parametrize(
        ("max_crashes", "status"), [(None, "failed"), (3, "failed"), (4, "pending")]
    )
    def test_a_task_is_a_dead_letter_after_its_last_crash(self, max_crashes, status):
        [after] = rescue(make("running", crashes=2, max_crashes=max_crashes))
        assert counts(after) == (status, 3, 0)
        assert after.dead_letter is (status == "failed")
        assert ("max_crashes=3" in after.error) is (status == "failed")

    def test_the_death_of_a_stopping_node_only_interrupts(self):
        assert [
            counts(t) for t in rescue(make("running"), make("running", crashes=2), stopping=True)
        ] == [
            ("pending", 0, 1),
            ("pending", 2, 1),
        ]

    @pytest.mark.parametrize("stopping", [True, False])
    def test_a_task_that_allows_one_crash_never_runs_again(self, stopping):
        """It does not matter which task was the culprit."""
        after, _ = rescue(
            make("running", max_crashes=1), make("running", crashes=1), stopping=stopping
        )
        assert counts(after) == ("failed", 1, 0)

    def test_tasks_in_child_processes_are_not_suspected_if_another_ran(self):
        """They cannot kill the node, even if they have crashed before."""
        child, other = rescue(
            make("running", type="child", crashes=2), make("running"), isolated={"child"}
        )
        assert (counts(child), counts(other)) == (("pending", 2, 1), ("pending", 1, 0))
        once, suspect = rescue(
            make("running", type="child", max_crashes=1),
            make("running", crashes=2),
            isolated={"child"},
        )
        assert (counts(once), counts(suspect)) == (("failed", 1, 0), ("failed", 3, 0))

    def test_tasks_in_child_processes_are_judged_if_no_other_ran(self):
        """For example, if memory runs out, the kernel may kill a node and its children."""
        first, second = rescue(
            make("running", type="child", crashes=1), make("running", type="child"),
            isolated={"child"},
        )  # fmt: skip
        assert (counts(first), counts(second)) == (("pending", 2, 0), ("pending", 1, 0))

    @pytest.mark.parametrize("max_crashes", [1, 3])
    def test_a_rescued_task_with_a_cancel_request_is_cancelled(self, max_crashes):
        [after] = rescue(request_cancel(make("running", max_crashes=max_crashes)))
        assert counts(after) == ("cancelled", 1, 0)

    @pytest.mark.parametrize(
        "change", [{"owner": "another"}, {"starts": 2}, {"status": TaskStatus.COMPLETED}]
    )
    def test_a_task_that_moved_on_is_not_rescued(self, change):
        task = make("running")
        [writes] = lifecycle.rescue([task], LATER, stopping=False)
        assert apply(attrs.evolve(task, **change), *writes) is None


def row_after(task: Task, *writes, **held) -> dict:
    """Return the row of a task after the one write whose guard holds."""
    row = {**row_from_task(task), **held}
    [write] = [write for write in writes if matches(row, write.guard)]
    return {**row, **write.changes}


class TestStuck:
    """An attempt is abandoned while its thread still runs on its node."""

    ABANDONED = Ending(
        returned=False, stuck=True, reason=CancelReason.TIMEOUT, error="timed out", traceback="tb"
    )

    def test_a_failed_task_names_the_node_of_its_thread(self):
        row = row_after(
            make("running"), *lifecycle.conclude(make("running"), self.ABANDONED, LATER)
        )
        assert (row["status"], row["stuck_on"], row["owner"]) == ("failed", "node", "")
        assert (row["error"], row["traceback"]) == ("timed out", "tb")

    @pytest.mark.parametrize("delay", [0.0, 5.0])
    def test_a_retry_waits_for_the_abandoned_thread(self, delay):
        task = make("running", max_attempts=2)
        ending = self.ABANDONED.changed(delay=delay)
        row = row_after(task, *lifecycle.conclude(task, ending, LATER))
        assert (row["status"], row["held"], row["stuck_on"]) == ("pending", BY_THREAD, "node")
        assert (row["owner"], row["errors"]) == ("", 1)
        assert row["run_at"] == (LATER + 5000 if delay else None)

    def test_a_cancelled_task_names_the_node_of_its_thread(self):
        task = make("running", max_attempts=2)
        writes = lifecycle.conclude(task, self.ABANDONED, LATER)
        row = row_after(request_cancel(task), *writes)
        assert (row["status"], row["stuck_on"]) == ("cancelled", "node")

    def test_other_ends_do_not_write_stuck_on(self):
        """It would only cost them time."""
        task = make("running", max_attempts=2)
        for returned, reason in product((True, False), (None, *CancelReason)):
            ending = Ending(returned=returned, reason=reason)
            writes = lifecycle.conclude(task, ending, LATER)
            assert not any("stuck_on" in write.changes for write in writes)

    def test_a_stuck_task_keeps_the_turn_of_its_key(self):
        task = make("running", concurrency_key="k")
        [write] = lifecycle.conclude(task, self.ABANDONED, LATER)
        assert "turn" not in write.changes
        [other] = lifecycle.conclude(task, Ending(returned=False), LATER)
        assert other.changes["turn"] is None

    @pytest.mark.parametrize(
        ("fields", "held", "after"),
        [
            ({}, BY_THREAD, FREE),
            ({"run_at": to_datetime(NOW)}, BY_THREAD, FREE),
            ({"run_at": to_datetime(LATER + 1)}, BY_THREAD, UNTIL_DUE),
            ({"run_at": to_datetime(LATER + 1)}, UNTIL_DUE, UNTIL_DUE),
            ({}, FOR_PARENTS, FOR_PARENTS),
            ({}, FOR_TURN, FOR_TURN),
        ],
    )
    def test_after_its_thread_a_task_waits_for_its_other_conditions(self, fields, held, after):
        task = make("pending", stuck_on="node", **fields)
        row = row_after(task, *lifecycle.lift_bar(task, LATER), held=held)
        assert (row["held"], row["stuck_on"], row["status"]) == (after, "", "pending")

    @pytest.mark.parametrize(("turn", "held"), [("k", FREE), (None, FOR_TURN)])
    def test_after_its_thread_a_task_has_or_awaits_its_turn(self, turn, held):
        task = make("pending", stuck_on="node", concurrency_key="k")
        writes = lifecycle.lift_bar(task, LATER)
        row = row_after(task, *writes, held=BY_THREAD, turn=turn)
        assert (row["held"], row["stuck_on"], row["turn"]) == (held, "", turn)

    @pytest.mark.parametrize("held", [FOR_PARENTS, FOR_TURN])
    def test_a_task_that_waits_for_others_passes_its_turn_on(self, held):
        """Otherwise it would hold the turn back from tasks that come before it."""
        task = make("pending", stuck_on="node", concurrency_key="k")
        row = row_after(task, *lifecycle.lift_bar(task, LATER), held=held, turn="k")
        assert (row["held"], row["stuck_on"], row["turn"]) == (held, "", None)

    @pytest.mark.parametrize(
        ("held", "turn"),
        [(FREE, None), (UNTIL_DUE, None), (FOR_TURN, None), (FOR_PARENTS, "k"), (BY_THREAD, "k")],
    )
    def test_a_cancelled_task_keeps_its_turn_while_its_thread_runs(self, held, turn):
        task = make("pending", stuck_on="node", concurrency_key="k")
        row = row_after(task, *lifecycle.cancel(task.id, LATER), held=held, turn="k")
        assert (row["status"], row["turn"], row["stuck_on"]) == ("cancelled", turn, "node")

    @pytest.mark.parametrize(("stuck_on", "turn"), [("node", "k"), ("", None)])
    def test_a_task_ended_by_hand_keeps_its_turn_while_its_thread_runs(self, stuck_on, turn):
        task = make("pending", stuck_on=stuck_on, concurrency_key="k")
        row = row_after(task, lifecycle.set_status(task, TaskStatus.CANCELLED, "", LATER), turn="k")
        assert (row["status"], row["turn"]) == ("cancelled", turn)

    @pytest.mark.parametrize("status", ["running", "completed", "failed", "cancelled"])
    def test_the_end_of_the_thread_is_noted_on_an_ended_task(self, status):
        task = make(status, stuck_on="node", concurrency_key="k")
        row = row_after(task, *lifecycle.lift_bar(task, LATER), turn="k")
        assert (row["status"], row["stuck_on"]) == (status, "")
        assert row["turn"] == ("k" if status == "running" else None)

    def test_the_end_of_another_nodes_thread_changes_nothing(self):
        writes = lifecycle.lift_bar(make("failed", stuck_on="node"), LATER)
        assert apply(make("failed", stuck_on="other"), *writes) is None

    @pytest.mark.parametrize("stuck_on", ["", "node"])
    def test_a_task_made_pending_by_hand_waits_for_its_turn(self, stuck_on):
        task = make("failed", stuck_on=stuck_on, concurrency_key="k")
        wanted = attrs.evolve(task, status=TaskStatus.PENDING)
        row = row_after(task, *lifecycle.amend(task, wanted, LATER), held=FREE)
        assert row["held"] == (BY_THREAD if stuck_on else FOR_TURN)

    @pytest.mark.parametrize("key", [None, "k"])
    def test_a_requeued_task_waits_for_the_abandoned_thread(self, key):
        task = make("failed", stuck_on="node", concurrency_key=key)
        row = row_after(task, lifecycle.requeue(task, LATER), turn=key)
        assert (row["held"], row["stuck_on"], row["turn"]) == (BY_THREAD, "node", key)
        row = row_after(task, lifecycle.requeue(task, LATER, "parent"), turn=key)
        assert (row["held"], row["waiting_on"], row["turn"]) == (FOR_PARENTS, "parent", key)

    def test_a_requeue_fails_if_the_thread_has_ended_since(self):
        """It would wait for ever for a thread that has ended."""
        write = lifecycle.requeue(make("failed", stuck_on="node"), LATER)
        assert apply(make("failed"), write) is None

    def test_after_its_parents_it_waits_for_the_thread(self):
        task = make("pending", stuck_on="node", depends_on=["p"])
        moved = lifecycle.parents_moved(task, {"p": "completed"}, LATER)
        row = row_after(task, moved, held=FOR_PARENTS, waiting_on="p")
        assert (row["held"], row["waiting_on"]) == (BY_THREAD, None)
        assert not matches(
            {**row_from_task(task), "held": FOR_PARENTS, "stuck_on": ""}, moved.guard
        )

    @pytest.mark.parametrize("status", ["pending", "failed"])
    def test_a_task_made_pending_by_hand_waits_for_the_thread(self, status):
        task = make(status, stuck_on="node")
        wanted = attrs.evolve(task, status=TaskStatus.PENDING)
        held = BY_THREAD if status == "pending" else FREE
        row = row_after(task, *lifecycle.amend(task, wanted, LATER), held=held)
        assert (row["status"], row["held"], row["stuck_on"]) == ("pending", BY_THREAD, "node")


class TestRequeue:
    @pytest.mark.parametrize("status", ["failed", "cancelled"])
    def test_a_requeue_resets_errors_and_crashes(self, status):
        task = make(
            status, starts=7, errors=2, crashes=2, interruptions=2, error="broke", dead_letter=True,
            cancel_requested_at=to_datetime(NOW), progress=50, message="m", priority=4,
            max_attempts=3, timeout=1.0, params={"x": 1},
        )  # fmt: skip
        update = lifecycle.requeue(task, LATER)
        after = apply(task, update)
        assert update.durable
        assert (after.status, after.attempt, after.crashes, after.interruptions) == (
            "pending",
            1,
            0,
            0,
        )
        assert (after.error, after.dead_letter, after.cancel_requested_at) == ("", False, None)
        assert (after.progress, after.message, after.completed_at) == (0, "", None)
        assert after.starts == 7, "the fence is never lowered"
        assert (after.priority, after.max_attempts, after.timeout, after.params) == (
            4,
            3,
            1.0,
            {"x": 1},
        )

    @pytest.mark.parametrize("run_at", [None, NOW - 5000, LATER + 5000])
    def test_a_requeued_task_waits_since_its_requeue(self, run_at):
        """Its waiting time does not count from when it was stored or due: it has been dead since."""
        task = make("failed", run_at=None if run_at is None else to_datetime(run_at))
        row = row_after(task, lifecycle.requeue(task, LATER))
        assert (row["run_at"], row["held"]) == (LATER, FREE)

    @pytest.mark.parametrize("why", ["parent", "key", "thread"])
    def test_a_requeued_task_that_is_held_back_has_no_run_at(self, why):
        """A host whose clock is behind would hold it back until then."""
        options = {"key": {"concurrency_key": "k"}, "thread": {"stuck_on": "node"}}.get(why, {})
        task = make("failed", run_at=to_datetime(NOW), **options)
        update = lifecycle.requeue(task, LATER, "parent" if why == "parent" else None)
        assert update.changes["held"] != FREE
        assert update.changes["run_at"] is None

    def test_a_requeue_keeps_earlier_attempts(self):
        again = apply(task := make("failed", error="broke"), lifecycle.requeue(task, LATER))
        [attempt] = again.attempts
        assert (attempt.outcome, attempt.error) == ("failed", "broke")

    @pytest.mark.parametrize("status", ["pending", "running", "completed"])
    def test_only_failed_and_cancelled_tasks_can_be_requeued(self, status):
        with pytest.raises(InvalidTransition, match=f"is {status}"):
            lifecycle.requeue(make(status), LATER)


@pytest.mark.parametrize("status", list(TaskStatus))
def test_all_but_running_tasks_can_be_deleted(status):
    deleted = apply(make(status.value), lifecycle.delete("a"))
    assert (deleted is None) == (status is TaskStatus.RUNNING)


def test_the_owner_of_a_pending_task_is_only_a_note():
    """A node takes free tasks and disowns its own. Neither changes a running task."""
    free, ours = make(), make(owner="us")
    assert apply(free, lifecycle.take("a", "us")).owner == "us"
    assert apply(ours, lifecycle.take("a", "them")) is None
    assert apply(ours, lifecycle.free("a", "us")).owner == ""
    assert apply(ours, lifecycle.free("a", "them")) is None
    assert apply(make("running", owner="us"), lifecycle.free("a", "us")) is None
    assert apply(make(owner="them"), lifecycle.start(make(owner="them"), LATER, "us")).owner == "us"
