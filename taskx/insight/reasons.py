"""The reasons why a task waits, runs or has ended: the answer to ``Queue.why``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from taskx.attempt.registry import Registry
from taskx.attempt.waiting import step_until
from taskx.insight.limits import Busy, Limits
from taskx.insight.nodes import silence
from taskx.node.pool import WorkerPool
from taskx.node.stuck import stack_of_task
from taskx.stores.base import Repository
from taskx.stores.controls import Controls, Paused
from taskx.stores.liveness.base import Node
from taskx.tasks import children, lifecycle
from taskx.tasks.clock import Clock, to_datetime, to_ms
from taskx.tasks.errors import RepositoryError, TaskNotFound
from taskx.tasks.findings import Reason, counted, duration, first_line, listed, moment
from taskx.tasks.lifecycle import ANSWER, CHILDREN, COMPLETED, NO_WORK, PENDING, UNFINISHED
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import TASK_FIELDS, Task, TaskStatus
from taskx.tasks.rate import MOST_TURNS
from taskx.tasks.record import (
    BY_THREAD,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNTIL_DUE,
    Stub,
    optional_ms,
    rank,
    task_from_row,
)
from taskx.tasks.timing import Timing

#: Most nodes whose buffers are read.
_MOST_BUFFERS = 20
# Most tasks that come first among which one is sought that must run alone.
_NEXT = 20

_SHORTLY = "a started queue lets it go on within moments"


def why(
    repository: Repository,
    registry: Registry,
    clock: Clock,
    log: GuardedLogger,
    timing: Timing,
    pool: WorkerPool | None,
    ageing: int,
    task_id: str,
) -> list[Reason]:
    """Return the reasons why a task waits, runs or has ended: see ``Queue.why``.

    Args:
        repository: the repository, as the caller sees it.
        registry: the executors and their limits.
        clock: tells the time.
        log: the logger of the queue.
        timing: how long it may take, and how much it may read.
        pool: the worker pool of the queue; None if it is not started.
        ageing: the milliseconds of waiting that count as one more priority.
        task_id: the id of the task.
    """
    try:
        with repository.house.within(timing.answer_within):
            inquiry = _Inquiry(repository, registry, clock, log, timing, pool, ageing)
            return [*inquiry.about(task_id)]
    except RepositoryError as error:
        facts = {"error": str(error), "error_type": type(error).__name__}
        return [Reason("repository", f"The repository cannot be read: {error}.", facts)]


class _Inquiry:
    """One question about one task: the nodes, and the parts of the queue that know more."""

    def __init__(
        self,
        repository: Repository,
        registry: Registry,
        clock: Clock,
        log: GuardedLogger,
        timing: Timing,
        pool: WorkerPool | None,
        ageing: int,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._log = log
        self._alone_within = timing.alone_within
        self._repository = repository
        self._pool = pool
        self._ageing = ageing
        self._most = timing.most_explained
        self._now = clock.now_ms()
        self._nodes: Mapping[str, Node] = {}

    def about(self, task_id: str) -> Iterator[Reason]:
        """Yield all reasons, the decisive one first."""
        found = self._repository.find("id", [task_id], (*TASK_FIELDS, "held", "waiting_on"))
        if not found:
            raise TaskNotFound(task_id)
        *row, held, waiting_on = found[0]
        task = task_from_row(row, self._repository.codecs)
        if not task.status.finished or task.stuck_on:
            self._nodes = {node.id: node for node in self._repository.nodes()}
        if task.status is TaskStatus.PENDING:
            yield from self._pending(task, held or FREE, waiting_on)
        elif task.status is TaskStatus.RUNNING:
            yield from self._running(task)
        else:
            yield from self._ended(task)
        if task.damage:
            yield Reason("damaged", f"{_capital(task.damage)}.", {"damage": task.damage})

    # --- pending

    def _pending(self, task: Task, held: int, waiting_on: str | None) -> Iterator[Reason]:
        if task.type in NO_WORK:
            yield from self._held(task, held, waiting_on)
            return
        paused = Controls(self._repository).read_paused()
        able = [node for node in self._nodes.values() if _takes(node, task.type)]
        stopped = [*self._no_node(task, able), *_pauses(task, paused)]
        yield from self._held(task, held, waiting_on)
        yield from stopped
        if held == UNTIL_DUE and not self._is_early(task):
            yield self._due(task)
        if held in (FREE, UNTIL_DUE):
            busy = self._busy()
            known = Limits(self._repository, self._clock, self._log, self._pool, busy)
            holds = [*known.holds(task, able)]
            yield from holds
        if held == FREE:
            first = self._first(task, _competing(task, able, paused))
            limits = [*known.reasons(task, able)] if not holds else []
            if lifecycle.is_parked(task):  # it goes on with its attempt, which takes no token
                limits = [reason for reason in limits if reason.kind != "token"]
            limits += self._alone(task, able, busy, first)
            yield from limits
            yield from self._broker(able)
            yield from _ahead(task, first, self._most)
            if not (stopped or limits or holds):
                yield self._worker(task, able, busy)

    def _held(self, task: Task, held: int, waiting_on: str | None) -> Iterator[Reason]:
        """Yield why the task may not start yet, first the reason for which it is held now."""
        parked = lifecycle.is_parked(task)
        if lifecycle.has_expired(task, self._now) and not parked:
            assert task.expires_at is not None
            words = f"It had not started by {moment(task.expires_at)}: a started queue cancels it."
            yield Reason("expired", words, {"expires_at": task.expires_at})
        if held == BY_THREAD:
            yield self._stuck(task)
        elif held == FOR_PARENTS and task.type == ANSWER and waiting_on not in task.depends_on:
            yield _unanswered(task)
        elif held == FOR_PARENTS and task.type == CHILDREN:
            yield _stands_for(task, str(waiting_on))
        elif held == FOR_PARENTS and parked and waiting_on is not None:
            yield self._waits_for(task, waiting_on)
        elif held == FOR_PARENTS:
            yield self._parents(task)
        elif held == FOR_TURN:
            yield self._turn(task)
        if self._is_early(task):
            yield self._due(task)
        if task.stuck_on and held != BY_THREAD:
            yield self._stuck(task)

    def _is_early(self, task: Task) -> bool:
        return task.run_at is not None and to_ms(task.run_at) > self._now

    def _due(self, task: Task) -> Reason:
        assert task.run_at is not None
        left = (to_ms(task.run_at) - self._now) / 1000
        facts = {"run_at": task.run_at, "seconds": max(0.0, left), "attempt": task.attempt}
        if left <= 0:
            return Reason("due", f"It was due at {moment(task.run_at)}: {_SHORTLY}.", facts)
        if lifecycle.is_parked(task):
            whole = self._repository.get_many([task.id]).get(task.id, task)  # with all its steps
            step = step_until(whole.checkpoints, to_ms(task.run_at))
            facts.update(since=task.started_at, until=task.run_at, step=step)
            words = f"It sleeps in step {step!r}" if step else "It sleeps"
            words += _between(task.started_at, task.run_at)
            return Reason("due", f"{words}, for another {duration(left)}, without a thread.", facts)
        what = f"attempt {task.attempt}" if task.errors else "it"
        words = f"{_capital(what)} is due at {moment(task.run_at)}, in {duration(left)}."
        return Reason("due", words, facts)

    def _stack(self, task_id: str, node: str) -> str:
        """Return where an executor is, if it works in this process."""
        if (pool := self._pool) is not None and pool.node.id == node:
            for run in (*pool.runs.copy().values(), *pool.stuck.runs.copy()):
                if run.task.id == task_id and (awaited := run.context._awaited) is not None:
                    return awaited.stack()
        return stack_of_task(task_id, node)

    def _stuck(self, task: Task) -> Reason:
        facts = {
            "node": task.stuck_on,
            "name": self._name(task.stuck_on),
            "stack": self._stack(task.id, task.stuck_on),
        }
        words = (
            f"A thread of an earlier attempt is stuck on node {facts['name']}: until the thread or its "
            "process ends, the task cannot start again."
        )
        return Reason("stuck", words, facts)

    def _parents(self, task: Task) -> Reason:
        some = list(task.depends_on)[: self._most]
        statuses = self._repository.statuses(some)
        parents = {parent: statuses.get(parent, "gone") for parent in some}
        waits_for = {p: status for p, status in parents.items() if status in UNFINISHED}
        facts = {
            "parents": {p: status for p, status in parents.items() if status != COMPLETED},
            "unfinished": len(waits_for),
            "of": len(task.depends_on),
            "more": len(task.depends_on) > len(some),
        }
        if not waits_for and not facts["more"]:
            return Reason("parents", f"All its parents have ended: {_SHORTLY}.", facts)
        names = listed([f"{parent} ({status})" for parent, status in waits_for.items()])
        number = f"{len(waits_for)} of {counted(len(task.depends_on), 'parent')}"
        number = f"at least {number}" if facts["more"] else number
        return Reason("parents", f"It waits for {number}: {names}.", facts)

    def _waits_for(self, task: Task, awaited: str) -> Reason:
        """Return what a task waits for in the middle of an attempt."""
        list_id = awaited if children.may_be_list(awaited) else children.list_of(awaited)
        records = self._repository.get_many([awaited, *([list_id] if list_id else [])])
        if children.is_of(theirs := records.get(list_id), task.id):
            assert theirs is not None
            return self._waits_for_children(task, theirs)
        found = records.get(awaited)
        since, until = task.started_at, task.expires_at
        facts: dict[str, Any] = {"id": awaited, "type": "", "status": "gone", "since": since}
        if found is None or found.status.finished:
            words = f"What it waits for, {awaited}, has ended: {_SHORTLY}."
            return Reason("waiting", words, {**facts, "until": until})
        facts.update(type=found.type, status=found.status.value)
        what = f"the end of task {awaited} ({found.type}, {found.status})"
        if found.type == ANSWER:
            since, until = found.created_at, until or found.expires_at
            what = f"the answer {awaited}"
        words = f"It waits for {what}{_between(since, until)}, without a thread."
        return Reason("waiting", words, {**facts, "since": since, "until": until})

    def _waits_for_children(self, task: Task, theirs: Task) -> Reason:
        of, needed = len(theirs.depends_on), theirs.params.get("needed")
        statuses = self._repository.statuses(theirs.depends_on)
        left = [child for child in theirs.depends_on if statuses.get(child) in UNFINISHED]
        facts = {
            "id": theirs.id,
            "type": CHILDREN,
            "status": theirs.status.value,
            "since": theirs.created_at,
            "until": None,
            "unfinished": len(left),
            "of": of,
            "needed": needed,
        }
        name = children.name_in(theirs.id)
        words = f"It waits for {len(left)} of {of} children ({name})"
        if needed is not None:
            words += f", until {needed} have completed"
        words += f"{_between(theirs.created_at, None)}, without a thread"
        some = listed([f"{child} ({statuses[child]})" for child in left])
        return Reason("waiting", f"{words}: {some}." if left else f"{words}: {_SHORTLY}.", facts)

    def _turn(self, task: Task) -> Reason:
        key = str(task.concurrency_key)
        fields = ("id", "status", "type", "started_at", "waiting_on", "run_at")
        limit = self._registry.limit_of_key(key)
        turns = [key] if limit is None else lifecycle.turns_of(key, MOST_TURNS)
        holders = self._repository.find("turn", turns, fields)
        waiting = [i for (i,) in self._repository.find("line", [key], ("id",), self._most + 1)]
        place = waiting.index(task.id) + 1 if task.id in waiting[: self._most] else None
        facts: dict[str, Any] = {"key": key, "holder": None, "status": None, "type": None}
        facts["place"] = place
        where = f"number {place} in its queue" if place else f"behind more than {self._most} tasks"
        words = f"It waits for the turn of concurrency key {key!r}, {where}"
        if limit is not None and limit.share is not None:
            facts["share"] = limit.share
            words += f"; the workers are divided between such keys (its weight is {limit.share})"
        if not holders:
            return Reason("turn", f"{words}; no task has the turn: {_SHORTLY}.", facts)
        *who, started_at, awaited, run_at = holders[0]
        facts["holder"], facts["status"], facts["type"] = who
        if len(holders) > 1:
            facts["holders"] = [holder for holder, *_ in holders]
            words += f"; {listed(facts['holders'])} have its {len(holders)} turns"
            return Reason("turn", f"{words}.", facts)
        words += "; task {} ({}, {}) has the turn".format(*who)
        if awaited is not None and started_at is not None:
            facts["waiting_on"] = awaited
            words += f", and keeps it while it waits for {awaited}"
        elif (
            who[1] == PENDING
            and started_at is not None
            and run_at is not None
            and run_at > self._now
        ):
            facts["until"] = to_datetime(run_at)
            words += f", and keeps it while it sleeps until {moment(facts['until'])}"
        return Reason("turn", f"{words}.", facts)

    def _no_node(self, task: Task, able: Sequence[Node]) -> Iterator[Reason]:
        if able:
            return
        live = [node for node in self._nodes.values() if node.lives]
        stopping = [node.name for node in live if node.stopping]
        others = [node.name for node in live if not node.stopping and not node.only_sends]
        words = f"No live node has an executor for type {task.type!r}"
        if stopping:
            words += f" and is not stopping ({listed(stopping)})"
        words += f"; live nodes with other types: {listed(others)}" if others else ""
        facts = {"type": task.type, "nodes": others, "stopping": stopping}
        silent = [node for node in self._nodes.values() if node.silent and task.type in node.types]
        if silent:
            words += f"; {listed([self._silence(node) for node in silent])}"
            facts["silent"] = [node.name for node in silent]
        yield Reason("no_node", f"{words}. Start a queue that has one.", facts)

    def _silence(self, node: Node) -> str:
        """Return the words about a node that may be dead."""
        words = silence(node, self._now, self._repository.lease_timeout)
        return f"node {node.name} may be dead ({words})"

    # --- limits, and tasks that run alone

    def _busy(self) -> list[Busy]:
        """Return the tasks that run on live nodes, or whose threads are stuck there."""
        live = [node.id for node in self._nodes.values() if node.alive is not False]
        if not live:
            return []
        repository, counts = self._repository, ("crashes", "max_crashes", "started_at")
        runs = repository.find(
            "running_on", live, ("id", "type", "owner", *counts), 10 * self._most
        )
        stuck = repository.find("stuck_on", live, ("id", "type", "stuck_on"), self._most)
        return [Busy(*row) for row in runs] + [Busy(*row) for row in stuck]

    def _alone(
        self, task: Task, able: Sequence[Node], busy: Sequence[Busy], first: Sequence[Stub]
    ) -> Iterator[Reason]:
        """Yield a reason if on each node the task must run alone, or another one must."""
        is_suspect = self._is_suspect(task)
        others: dict[str, list[str]] = {}
        waiting = self._waiting_suspects(first) if busy and not is_suspect else []
        for one in busy:
            is_other = self._is_suspect(one)
            if is_suspect and is_other:
                others.setdefault(one.node, []).append(one.id)
            elif (one.started_at or 0) + self._alone_within * 1000 > self._now:
                names = [one.id] if is_suspect or is_other else waiting
                others.setdefault(one.node, []).extend(names)
        names = [name for node in able for name in others.get(node.id, ())]
        if not able or not all(others.get(node.id) for node in able):
            return
        names = [*dict.fromkeys(names)]
        words = f"It waits for {listed(names)}, "
        if is_suspect:
            words += "because it would fail at its next crash, and so runs alone."
        else:
            words += "which would fail at the next crash, and so runs alone, for a minute at most."
        yield Reason("suspect", words, {"crashes": task.crashes, "others": names})

    def _waiting_suspects(self, first: Sequence[Stub]) -> list[str]:
        """Return the id of a suspect that comes next, and waits until nothing else runs."""
        ids = [stub.id for stub in first[:_NEXT]]
        fields = ("id", "type", "owner", "crashes", "max_crashes")
        found = (Busy(*row) for row in self._repository.find("id", ids, fields))
        return [one.id for one in found if self._is_suspect(one)][:1]

    def _is_suspect(self, task: Task | Busy) -> bool:
        return lifecycle.last_chance(task) and task.type not in self._registry.isolated

    def _broker(self, able: Sequence[Node]) -> Iterator[Reason]:
        """Yield a reason for each error that keeps nodes from bringing the task to a worker."""
        engines = {node.about.engine for node in able}
        if not engines or "" in engines:
            return
        failing: dict[tuple[str, str], list[str]] = {}
        for node in self._nodes.values():
            if node.lives and node.broker_error and node.about.engine in engines:
                failing.setdefault((node.about.engine, node.broker_error), []).append(node.name)
        for (engine, error), names in failing.items():
            words = (
                f"{'Node' if len(names) == 1 else 'Nodes'} {listed(names)} cannot use the broker of "
                f"{engine}, which brings the task to a worker: {error}."
            )
            yield Reason("broker", words, {"nodes": names, "error": error})

    # --- tasks that come first

    def _first(self, task: Task, types: Sequence[str]) -> list[Stub]:
        """Return the tasks that start before this one: the first of each buffer, and the free ones."""
        assert task.created_at is not None
        created, run_at = to_ms(task.created_at), optional_ms(task.run_at, "run_at")
        mine = rank(task.priority, created, run_at, self._ageing), created
        buffers = self._repository.distinct("buffered_on", "", _MOST_BUFFERS)
        first: list[Stub] = []
        for owner in ("", *buffers):
            for stub in self._repository.ready(types, self._most + 1, owner, self._ageing):
                if stub.id == task.id or (stub.rank(self._ageing), stub.created_at) > mine:
                    break
                first.append(stub)
        return sorted(first, key=lambda stub: (stub.rank(self._ageing), stub.created_at))

    def _worker(self, task: Task, able: Sequence[Node], busy: Sequence[Busy]) -> Reason:
        nodes = {node.id: node.name for node in able}
        running = sum(one.node in nodes for one in busy)
        facts = {
            "nodes": [*nodes.values()],
            "running": running,
            "buffered_on": self._name(task.owner) if task.owner else "",
        }
        # With a broker, a node that does not run the type owns it.
        what = "its ticket waits" if task.owner and able[0].about.engine else "waits"
        words = (
            f"It may start, and {what} for a free worker on {listed([*nodes.values()])}, where "
            f"{counted(running, 'task')} {'runs' if running == 1 else 'run'}"
        )
        _, wait = self._registry.batches.get(task.type, (1, 0.0))
        if wait and not lifecycle.runs_apart(task):
            words += f", or up to {wait:g} s for more tasks to share its call"
            facts["wait"] = wait
        return Reason("worker", f"{words}.", facts)

    # --- running and ended

    def _running(self, task: Task) -> Iterator[Reason]:
        node = self._nodes.get(task.owner)
        if task.owner and (node is None or node.alive is False):
            if self._has_moved(task):  # its node has left after it handed the task back
                yield from self.about(task.id)
                return
            name = task.worker or self._name(task.owner)
            words = f"The node {name} is dead: a live node takes the task back."
            yield Reason("dead_node", words, {"node": task.owner, "name": name})
        elif node is not None and node.silent:
            words = f"{_capital(self._silence(node))}: if it is, a live node takes the task back."
            beat_at = to_datetime(node.beat_at or 0)
            yield Reason("silent_node", words, {"node": node.id, "name": node.name, "at": beat_at})
        if task.cancel_requested_at is not None:
            at = task.cancel_requested_at
            words = f"It was asked to stop at {moment(at)}, and its executor has not ended yet."
            yield Reason("cancel_requested", words, {"at": at})
        since, seconds = task.started_at, 0.0
        if since is not None:
            seconds = max(0.0, (self._now - to_ms(since)) / 1000)
        if task.timeout is not None and seconds > task.timeout:
            over = seconds - task.timeout
            words = f"Its time-out of {duration(task.timeout)} passed {duration(over)} ago."
            yield Reason("timeout", words, {"timeout": task.timeout, "seconds": over})
        run = None if self._pool is None else self._pool.runs.get(task.id)
        facts = {
            "since": since,
            "seconds": seconds,
            "attempt": task.attempt,
            "node": task.owner,
            "worker": task.worker,
            "progress": task.progress,
            "message": task.message,
            "state": "" if run is None else run.state,
            "stack": self._stack(task.id, task.owner),
        }
        words = f"It has been running for {duration(seconds)} on {task.worker or 'a node'}"
        words += f", in attempt {task.attempt}"
        if run is not None and run.state in ("starting", "ahead"):
            words = (
                f"It was started {duration(seconds)} ago, and waits for a thread of this process"
            )
        words += f"; {task.progress} %" if task.progress else ""
        yield Reason("running", f"{words}.", facts)

    def _has_moved(self, task: Task) -> bool:
        found = self._repository.find("id", [task.id], ("status", "starts"))
        return [*found] != [(task.status.value, task.starts)]

    def _ended(self, task: Task) -> Iterator[Reason]:
        attempts = sum(attempt.outcome != "requeued" for attempt in task.attempts)
        facts = {
            "at": task.completed_at,
            "duration": task.duration,
            "attempts": attempts,
            "worker": task.worker,
            "error": task.error,
            "error_type": task.error_type,
        }
        at = "" if task.completed_at is None else f" at {moment(task.completed_at)}"
        words = f"It {'was ' if task.status is TaskStatus.CANCELLED else ''}{task.status}{at}"
        if attempts:
            words += f" after its executor ran for {duration(task.duration)}, in attempt {attempts}"
            words += f" on {task.worker}" if task.worker else ""
        words += f": {first_line(task.error)}" if task.error else ""
        kind: Any = task.status.value
        yield Reason(kind, f"{words}.", facts)
        if task.stuck_on:
            yield self._stuck(task)

    def _name(self, node: str) -> str:
        """Return the name of a node; its id if it is no longer recorded."""
        known = self._nodes.get(node)
        return node if known is None else known.name


def _unanswered(answer: Task) -> Reason:
    since, until = answer.created_at, answer.expires_at
    facts = {
        "id": answer.id,
        "type": ANSWER,
        "status": answer.status.value,
        "since": since,
        "until": until,
    }
    words = f"It waits for somebody to call queue.finish({answer.id!r}, …){_between(since, until)}."
    return Reason("waiting", words, facts)


def _stands_for(theirs: Task, parent: str) -> Reason:
    facts = {
        "id": parent,
        "type": CHILDREN,
        "status": theirs.status.value,
        "since": theirs.created_at,
        "until": None,
    }
    words = f"It stands for the children of task {parent}, and ends with that."
    return Reason("waiting", words, facts)


def _between(since: datetime | None, until: datetime | None) -> str:
    """Return since when and until when something waits, in words."""
    words = "" if since is None else f" since {moment(since)}"
    return words if until is None else f"{words}, until {moment(until)}"


def _pauses(task: Task, paused: Paused) -> Iterator[Reason]:
    if paused.everything:
        words = "All types are paused, until they are resumed."
        yield Reason("paused", words, {"type": None})
    if task.type in paused.types:
        ends = f"queue.resume({task.type!r}), or `taskx resume {task.type}` in a shell"
        words = f"The type {task.type!r} is paused; {ends}, ends this."
        yield Reason("paused", words, {"type": task.type})


def _ahead(task: Task, first: Sequence[Stub], most: int) -> Iterator[Reason]:
    if not first:
        return
    facts = {
        "ahead": min(len(first), most),
        "higher": min(sum(stub.priority > task.priority for stub in first), most),
        "more": len(first) > most,
    }
    come = "comes" if len(first) == 1 else "come"
    words = f"{_capital(counted(len(first), 'task', most))} {come} first"
    words += f", {facts['higher']} with a higher priority" if facts["higher"] else ""
    yield Reason("ahead", f"{words}.", facts)


def _competing(task: Task, able: Sequence[Node], paused: Paused) -> list[str]:
    """Return the types whose tasks may take the workers that a task waits for."""
    types = {
        type: None
        for node in able
        for type in node.types
        if type not in node.limited and type not in paused
    }
    return [*{**types, task.type: None}]


def _takes(node: Node, type: str) -> bool:
    """Return True if a node may start tasks of a type."""
    return node.lives and not node.stopping and type in node.types


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
