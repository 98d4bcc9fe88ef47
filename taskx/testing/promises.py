"""The promises of TaskX, checked at each write and each execution of a simulation.

The checks know the promises and not the code: they keep a picture of the records of their own, made of the
writes that took place.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskx.attempt.runner import Run
from taskx.node.schedules import PREFIX, tick_id
from taskx.stores.liveness.base import PREFIX as NODE
from taskx.tasks.lifecycle import (
    ANSWER,
    CANCELLED,
    CHILDREN,
    COMPLETED,
    FINISHED,
    PENDING,
    RUNNING,
    key_of,
)
from taskx.tasks.model import Task
from taskx.tasks.rate import Limit, Rate
from taskx.tasks.record import DEFAULTS, FREE, ids_from_text
from taskx.tasks.writes import Delete, Insert, NoteChange, Write
from taskx.testing.simulated import SimulatedNode

Row = dict[str, Any]

#: The moves by which a node ends or gives back a run of its own.
_OWN = frozenset(
    ("complete", "fail", "retry", "snooze", "interrupt", "hand back", "crash", "cancelled", "park")
)
#: What stays as it is when a task begins to wait in the middle of an attempt.
_KEPT = ("turn", "errors", "crashes", "interruptions", "snoozes", "earlier_attempts", "started_at")
_BY_HAND = frozenset(("by hand", "requeue"))
_SECOND = 1_000_000_000


class Promises:
    """The checks of a simulation, at each moment and at its end.

    Args:
        broken: is told of a promise that is broken, in a sentence.
        is_silent: returns True if a node may count as dead.
    """

    def __init__(self, broken: Callable[[str], None], is_silent: Callable[[str], bool]) -> None:
        self._broken, self._is_silent = broken, is_silent
        #: The ids of the nodes that count as dead, and of all that are recorded.
        self.dead: set[str] = set()
        self._recorded: set[str] = set()
        #: The records, and those that were removed.
        self.rows: dict[str, Row] = {}
        self._gone: set[str] = set()
        self._order: dict[str, int] = {}
        # The tasks of each concurrency key, in the order of their submission.
        self._lines: defaultdict[str, list[str]] = defaultdict(list)
        self._requeued: set[str] = set()
        self._ticks: dict[tuple[str, int], str] = {}
        # The tasks of the schedules whose tasks must not overlap.
        self._in_turn: dict[str, list[str]] = {}
        # The answers that somebody has given; and the first time-out of each wait for a task.
        self._answered: set[str] = set()
        self._until: dict[tuple[str, str], int] = {}
        # The executions that go on, without those of nodes that counted as dead: the run, and its node.
        self.open: dict[Run, SimulatedNode] = {}
        # When the begun runs of each rate were decided and began; and when each start was decided.
        self._begun: defaultdict[object, list[tuple[int, int]]] = defaultdict(list)
        self._decided: dict[tuple[str, int], int] = {}
        #: The numbers of starts so far: of attempts, and of those that only went on.
        self.starts = (0, 0)
        # False once a clock was wrong: nobody can promise a time then.
        self._clocks_right = True

    def _require(self, holds: object, text: str) -> None:
        if not holds:
            self._broken(text)

    def a_clock_is_wrong(self) -> None:
        """Check no times from now on."""
        self._clocks_right = False

    # --- writes

    def applied(
        self,
        node: SimulatedNode,
        writes: Sequence[Write],
        now: int,
        decided: int,
        *,
        was_dead: bool,
    ) -> None:
        """Check writes that took place.

        They were decided after the nanosecond ``decided``. The node counted as dead then if ``was_dead``.
        """
        if was_dead:
            for write in writes:
                begins = write.changes.get("status") == RUNNING
                self._require(not begins, f"{node.id} counts as dead, and started task {write.id}")
        for write in writes:
            if isinstance(write, Insert):
                self._created(node, write, now)
                self._decided[write.id, 1] = decided
            elif isinstance(write, Delete):
                row = self.rows.pop(write.id)
                self._gone.add(write.id)
                self._answered.discard(write.id)
                self._require(row["status"] != RUNNING, f"task {write.id} was removed as it ran")
            else:
                before = self.rows[write.id]
                after = {**before, **write.changes}
                self._moved(node, write.move, before, after, now)
                self.rows[write.id] = after
                self._check_row(after)
                if after["starts"] != before["starts"] and not _parked(before):
                    self._decided[write.id, after["starts"]] = decided

    def _created(self, node: SimulatedNode, write: Insert, now: int) -> None:
        row = {**DEFAULTS, **write.row}
        task_id = write.id
        self._require(task_id not in self.rows, f"task {task_id} was stored twice")
        self._order[task_id] = len(self._order)
        if row["concurrency_key"] is not None:
            self._lines[row["concurrency_key"]].append(task_id)
        if row["created_by"].startswith("schedule:"):
            tick = (row["created_by"], row["run_at"])
            self._require(tick not in self._ticks, f"the tick {tick} got two tasks")
            self._ticks[tick] = task_id
            for other in self._in_turn.get(tick[0].removeprefix("schedule:"), ()):
                over = other not in self.rows or self.rows[other]["status"] in FINISHED
                over = over or other in self._requeued
                self._require(over, f"the tasks {other} and {task_id} of a schedule overlap")
            if tick[0].removeprefix("schedule:") in self._in_turn:
                self._in_turn[tick[0].removeprefix("schedule:")].append(task_id)
        self.rows[task_id] = row
        self._check_row(row)
        if row["status"] == RUNNING:
            before = {**row, "status": PENDING, "starts": 0, "started_at": None}
            self._starts(node, before, row, now)

    def _moved(self, node: SimulatedNode, move: str, before: Row, after: Row, now: int) -> None:
        old, new, task = before["status"], after["status"], f"task {before['id']}"
        if new == RUNNING and after["starts"] != before["starts"]:
            self._starts(node, before, after, now)
        elif old == RUNNING and new != RUNNING:
            owner = before["owner"]
            if move in _OWN:
                self._require(owner == node.id, f"{task} runs on {owner}; {node.id} did: {move}")
            elif move == "rescue":
                gone = owner in self.dead or owner not in self._recorded
                self._require(gone, f"{task} was rescued from {owner}, which lives")
            if new == PENDING and before["cancel_requested_at"] is not None:
                self._broken(f"{task} was asked to cancel, and is pending again by: {move}")
        elif old in FINISHED and new != old:
            again = move in _BY_HAND or move == "parents moved"
            self._require(again, f"{task} had ended as {old}, and is {new} by: {move}")
            self._requeued.add(before["id"])
            self._answered.discard(before["id"])
        self._require(move != "finish" or old == PENDING, f"{task} was {old}, and was answered")
        self._require(after["starts"] >= before["starts"], f"the starts of {task} fell")
        if move == "park":
            changed = [name for name in _KEPT if after[name] != before[name]]
            self._require(not changed, f"{task} waits, and has another {', '.join(changed)}")
        elif new in (PENDING, RUNNING) and _parked(before):
            self._require(after["turn"] == before["turn"], f"{task} waited, and lost its turn")
        self._check_wait(task, before, after, now)
        if before["type"] == CHILDREN:
            self._check_list(before, after)
        elif new == COMPLETED != old:
            self._check_needed(task, before)

    def _check_list(self, before: Row, after: Row) -> None:
        """Check that children are cancelled with their parent, and run again with it.

        A list that somebody cancels by hand says nothing about its children.
        """
        by_parent = after["status"] == CANCELLED and after["error"] != before["error"]
        again = before["status"] in FINISHED and after["status"] == PENDING
        for child in ids_from_text(before["depends_on"]):
            if by_parent:
                stopped = self._is_stopped(child)
                self._require(stopped, f"task {child} goes on though its parent was cancelled")
            elif again and child not in self._requeued:
                lost = self._status(child) in ("failed", "cancelled")
                self._require(not lost, f"task {child} does not run again with its parent")

    def _check_needed(self, task: str, before: Row) -> None:
        """Check that those children are cancelled of which a task that has completed needed only some."""
        for row in self.rows.values():
            if row["type"] != CHILDREN or row["waiting_on"] != before["id"]:
                continue
            if json.loads(row["params"])["needed"] is not None:
                for child in ids_from_text(row["depends_on"]):
                    stopped = self._is_stopped(child)
                    self._require(stopped, f"{task} needs task {child} no more, which goes on")

    def _status(self, task_id: str) -> str:
        return self.rows[task_id]["status"] if task_id in self.rows else "gone"

    def _is_stopped(self, task_id: str) -> bool:
        """Return True if a task has ended, was asked to, or runs again because somebody wants it."""
        if task_id in self._requeued or (row := self.rows.get(task_id)) is None:
            return True
        return row["status"] in FINISHED or row["cancel_requested_at"] is not None

    def _check_wait(self, task: str, before: Row, after: Row, now: int) -> None:
        """Check that a wait ends when it should, and that its time-out counts from its begin."""
        awaited, until = before["waiting_on"], before["expires_at"]
        if _parked(before) and awaited and not after["waiting_on"] and after["status"] == PENDING:
            # If some children of a list are enough, the end of each counts.
            row = self.rows.get(awaited, {})
            some = ids_from_text(row["depends_on"]) if row.get("type") == CHILDREN else ()
            over = any(self._has_ended(one) for one in (awaited, *some))
            in_time = self._clocks_right and (until is None or until > now)
            self._require(over or not in_time, f"{task} went on before the end of {awaited}")
        key, until = (after["id"], after["waiting_on"] or ""), after["expires_at"]
        waits = _parked(after) or after["type"] == ANSWER
        if waits and key[1] and until is not None and after["id"] not in self._requeued:
            first = self._until.setdefault(key, until)
            self._require(until == first, f"{task} waits for {key[1]} until {until}, not {first}")

    def _starts(self, node: SimulatedNode, before: Row, after: Row, now: int) -> None:
        task = f"task {before['id']} ({before['type']})"
        new, resumed = self.starts
        self.starts = (new, resumed + 1) if _parked(before) else (new + 1, resumed)
        self._require(before["status"] == PENDING, f"{task} started while {before['status']}")
        self._require(before["held"] == FREE, f"{task} started while it was held back")
        fence = after["starts"] == before["starts"] + 1
        self._require(fence, f"{task} started with {after['starts']} after {before['starts']}")
        self._require(after["owner"] == node.id, f"{node.id} started {task} for {after['owner']}")
        crashes, most = before["crashes"], after["max_crashes"] or 3
        self._require(crashes < most, f"{task} started after {crashes} crashes of {most}")
        if self._clocks_right:
            due = before["run_at"] is None or before["run_at"] <= now
            self._require(due, f"{task} started before its time")
            # A start may be decided in time, and stored later.
            fresh = before["expires_at"] is None or after["started_at"] < before["expires_at"]
            self._require(fresh, f"{task} started after it had expired")
        self._check_key(task, before, after)
        self._check_parents(task, before)

    def _check_key(self, task: str, before: Row, after: Row) -> None:
        if (key := before["concurrency_key"]) is None:
            return
        self._require(
            key_of(after["turn"] or "") == key, f"{task} started without the turn of {key!r}"
        )
        if before["starts"] or before["id"] in self._requeued:
            return
        for other in self._lines[key]:
            if other == before["id"]:
                break
            row = self.rows.get(other)
            if other in self._requeued or row is None:
                continue
            waits = row["status"] == PENDING and not row["starts"]
            if waits and row["turn"] is None and row["depends_on"] is None:
                self._broken(f"{task} overtook task {other} of the key {key!r}")

    def _check_parents(self, task: str, before: Row) -> None:
        if before["depends_on"] is None or before["id"] in self._requeued:
            return
        for parent in ids_from_text(before["depends_on"]):
            status = self._status(parent)
            if parent in self._requeued:
                continue
            fine = status == COMPLETED or (
                before["on_parent_failure"] == "run" and status not in (PENDING, RUNNING)
            )
            self._require(fine, f"{task} started although its parent {parent} is {status}")

    def _check_row(self, row: Row) -> None:
        if row["unique_key"] is not None and row["unique_scope"] == "unfinished":
            holds = row["unique_lock"] == row["unique_key"] or row["status"] in FINISHED
            self._require(holds, f"task {row['id']} has not ended, and holds no unique key")
        if row["status"] == PENDING and row["owner"] and row["held"] != FREE:
            self._broken(f"task {row['id']} is held back, and has an owner")

    def noted(self, changes: Sequence[NoteChange]) -> None:
        """Check changes of notes: a schedule that has ticked has stored the task of the tick."""
        for name, text, _ in changes:
            if name.startswith(NODE) and name.count("/") == 1:
                self._node_noted(name.removeprefix(NODE), text)
            if not name.startswith(PREFIX) or text is None:
                continue
            entry = json.loads(text)
            if entry["overlap"] == "skip":
                self._in_turn.setdefault(entry["name"], [])
            last = entry["last"]
            if last is not None and entry["making"] != last:
                made = tick_id(entry["name"], last)
                there = made in self.rows or made in self._gone
                self._require(there, f"schedule {entry['name']} moved on without task {made}")

    def _node_noted(self, node_id: str, text: str | None) -> None:
        """Check the record of a node: one that lives never counts as dead."""
        self._recorded.discard(node_id)
        self.dead.discard(node_id)
        if text is None:
            return
        self._recorded.add(node_id)
        if json.loads(text).get("dead"):
            self.dead.add(node_id)
            self._require(self._is_silent(node_id), f"node {node_id} lives, and counts as dead")

    def accepted(self, task_ids: Iterable[str]) -> None:
        """Check that tasks are stored whose submit has returned."""
        for task_id in task_ids:
            there = task_id in self.rows or task_id in self._gone
            self._require(there, f"task {task_id} was accepted, and is not stored")

    def _has_ended(self, task_id: str) -> bool:
        return self.rows.get(task_id, {}).get("status") not in (PENDING, RUNNING)

    def answered(self, task_id: str) -> None:
        """Check that an answer is stored which somebody was told to have given, and is the only one."""
        ended = task_id in self._gone or self.rows.get(task_id, {}).get("status") in FINISHED
        self._require(ended, f"the answer {task_id} was given, and is not stored")
        self._require(task_id not in self._answered, f"the answer {task_id} was given twice")
        self._answered.add(task_id)

    # --- executions

    def begins(self, node: SimulatedNode, run: Run, now: int) -> None:
        """Check the begin of an execution."""
        task, type = run.task, run.task.type
        self.open[run] = node
        for other, where in self.open.items():
            if other is run:
                continue
            if other.task.id == task.id:
                self._broken(f"task {task.id} runs twice at once: on {where.id} and {node.id}")
        # One that has waited goes on without a token.
        when = (self._decided.pop((task.id, task.starts), None), now)
        for name in node.queue._registry.limited.get(type, ()):
            if (limit := node.queue._registry.limits.get(name)) is not None:
                limited = node.queue._registry.limited
                shared = limit.scope == "global"
                mine = [
                    other
                    for other, where in self.open.items()
                    if (shared or where is node) and name in limited.get(other.task.type, ())
                ]
                most = len(mine) if limit.max_concurrency is None else limit.max_concurrency
                self._require(
                    len(mine) <= most, f"{len(mine)} tasks of limit {name} run, of {most}"
                )
                self._rates_hold(name, limit, None if shared else node.number, when, task)
        if (key := task.concurrency_key) is not None:
            self._key_holds(key, node.queue._registry.limit_of_key(key), when, task)

    def _key_holds(
        self, key: str, limit: Limit | None, when: tuple[int | None, int], task: Task
    ) -> None:
        """Check that a key lets another task begin: it has one turn, or those of its limit, and a rate."""
        shared = limit is not None and limit.share is not None
        turns = None if limit is None else limit.max_concurrency
        most = turns or (math.inf if shared else 1)
        mine = [run.task.id for run in self.open if run.task.concurrency_key == key]
        self._require(len(mine) <= most, f"{', '.join(mine)} of the key {key!r} run at once")
        if limit is not None:
            self._rates_hold(key, limit, None, when, task)

    def _rates_hold(
        self,
        name: str,
        limit: Limit,
        of_node: int | None,
        when: tuple[int | None, int],
        task: Task,
    ) -> None:
        """Check that rates hold while another task begins; ``when`` it took its token, and begins."""
        decided, now = when
        if decided is None or not self._clocks_right:
            return
        for rate in limit.rates:
            begun = self._begun[name, rate.unit, of_node]
            taken = (task.cost or {}).get(rate.unit, 0) if rate.unit else 1
            begun.extend([(decided, now)] * min(taken, rate.burst))
            self._check_rate(name, rate, begun)

    def went_on(
        self, starts: tuple[int, int], rates: Mapping[str, str], after: Mapping[str, str], now: int
    ) -> None:
        """Check that tasks which only went on took no tokens, by the notes of rates before and after."""
        if self.starts[0] != starts[0] or self.starts[1] == starts[1] or not self._clocks_right:
            return
        for name, text in after.items():
            before = json.loads(rates.get(name, "[0]"))[1:] or [0.0]
            for mark, old in zip(json.loads(text)[1:], before, strict=False):
                taken = mark > max(old, now / 1000)  # a full bucket is full from now on
                self._require(not taken, f"a task that only went on took a token of {name}")

    def _check_rate(self, name: str, rate: Rate, begun: Sequence[tuple[int, int]]) -> None:
        """Check the periods that end now: a run takes its token between its decision and its begin."""
        now = begun[-1][1] if begun else 0
        for number, since in enumerate(sorted((one for one, _ in begun), reverse=True), 1):
            if number > rate.burst + (now - since) / _SECOND / rate.interval + 0.01:
                self._broken(f"{number} of limit {name} in {(now - since) / _SECOND} s")

    def executes(self, node: SimulatedNode, run: Run) -> None:
        """Check the execution itself: the node still has the task, with the params of its record."""
        if self.open.pop(run, None) is None:
            return
        row = self.rows.get(run.task.id)
        fence = None if row is None else (row["status"], row["owner"], row["starts"])
        wanted = (RUNNING, node.id, run.task.starts)
        self._require(fence == wanted, f"{wanted} executes task {run.task.id}, which is {fence}")
        if row is not None and json.loads(row["params"]) != run.task.params:
            self._broken(f"task {run.task.id} is executed with the params of before")

    def forget(self, node: SimulatedNode) -> None:
        """Forget the executions of a node that counts as dead: they may go on beside others."""
        self.open = {run: where for run, where in self.open.items() if where is not node}

    # --- the end

    def ended(self, notes: Iterable[str], left: Iterable[str]) -> None:
        """Check what is stored after all nodes have stopped; ``left`` says what they still held."""
        for text in left:
            self._broken(text)
        for task_id, row in self.rows.items():
            task = f"task {task_id} ({row['type']})"
            self._require(row["status"] in FINISHED, f"{task} is {row['status']} for ever")
            for column in ("owner", "waiting_on", "stuck_on"):
                self._require(not row[column], f"{task} has ended with {column}={row[column]!r}")
            self._require(row["turn"] is None, f"{task} has ended, and keeps its turn")
            scope = row["unique_scope"]
            freed = row["unique_lock"] is None or scope not in ("pending", "unfinished")
            self._require(freed, f"{task} has ended, and holds its unique key")
            if row["depends_on"] is not None and not row["starts"]:
                self._check_orphan(task, row)
        for node_id in self._recorded:
            self._broken(f"node {node_id} is recorded for ever")
        for name in notes:
            left_over = name.startswith(("limit/slots/", NODE))
            self._require(not left_over, f"the note {name} is left over")

    def _check_orphan(self, task: str, row: Row) -> None:
        parents = ids_from_text(row["depends_on"])
        bad = [p for p in parents if p not in self.rows or self.rows[p]["status"] != COMPLETED]
        by_parent = row["error"].startswith("its parent ")
        self._require(not by_parent or bad or self._requeued, f"{task}: {row['error']} is not true")
        if by_parent:
            wanted = "failed" if row["on_parent_failure"] == "fail" else "cancelled"
            self._require(row["status"] == wanted, f"{task} is {row['status']}, not {wanted}")

    def unfinished(self) -> list[str]:
        """Return the ids of the tasks that have not ended."""
        return [task_id for task_id, row in self.rows.items() if row["status"] not in FINISHED]

    def unanswered(self) -> list[str]:
        """Return the ids of the answers without a time-out that tasks wait for."""
        rows, waiting = self.rows, {row["waiting_on"] for row in self.rows.values()}
        pending = (i for i in self.unfinished() if rows[i]["type"] == ANSWER and i in waiting)
        return [i for i in pending if rows[i]["expires_at"] is None]

    def next_moment(self, now: int) -> float:
        """Return the seconds until a task is due, or a wait is over; 0 if there is none."""
        moments = (
            self.rows[i][name] for i in self.unfinished() for name in ("run_at", "expires_at")
        )
        return min((at - now for at in moments if at is not None and at > now), default=0) / 1000


def _parked(row: Row) -> bool:
    """Return True if a pending task waits in the middle of an attempt, or goes on with it."""
    return row["status"] == PENDING and row["started_at"] is not None
