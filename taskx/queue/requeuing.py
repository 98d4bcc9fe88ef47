"""Requeuing: one task, corrected or not, or all that are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

import attrs

from taskx.attempt.registry import Registry
from taskx.node.pool import State
from taskx.queue.bulk import PLAIN, Action, Bulk, Stagger, Tally, Terms, counted
from taskx.queue.intake import new_params
from taskx.stores import queries
from taskx.stores.door import Door
from taskx.stores.selecting import (
    Chosen,
    Given,
    Page,
    Selection,
    Statuses,
    conditions,
    count,
    selections,
)
from taskx.tasks import lifecycle
from taskx.tasks.errors import ConfigurationError, InvalidTransition, QueueStopped
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task, TaskFilter, TaskStatus, check_name
from taskx.tasks.rate import rate_of
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Update

_REQUEUEABLE = (TaskStatus.FAILED, TaskStatus.CANCELLED)


def _waits(task: Task, parents: Mapping[str, Task]) -> bool:
    # A list of children waits for its parent.
    others = lifecycle.is_parked(task) or task.type == lifecycle.CHILDREN
    pending = task.status is TaskStatus.PENDING and not others
    return pending and not parents.keys().isdisjoint(task.depends_on)


class Requeues:
    """Requeues stored tasks; the queue need not be started.

    Args:
        moves: the door through which it reads and writes.
        state: tells if the queue is started, and if it was stopped.
        registry: the executors.
        log: the logger of the queue.
        timing: the sizes of batches.
    """

    def __init__(
        self,
        moves: Door,
        state: State,
        registry: Registry,
        log: GuardedLogger,
        timing: Timing,
    ) -> None:
        self._moves = moves
        self._state = state
        self._registry = registry
        self._log = log
        self._batch, self._whole = timing.batch, timing.requeue_batch

    def requeue_one(self, task_id: str, params: Any = None, from_step: str | None = None) -> None:
        """Requeue a task; raise if it cannot be: see ``Queue.requeue``."""
        self._refuse_if_stopped()
        if from_step is not None:
            check_name(from_step, "from_step")
        task = self._moves.repository.get_by_id(task_id)
        lifecycle.check_requeue(task)
        correction: dict[str, Any] = {}
        if params is not None or from_step is not None:
            text = None if params is None else new_params(self._registry, task.type, params)
            now = self._moves.now_ms()
            correction = lifecycle.corrected(task, now, text, from_step)
        family = self._family({task_id: task}, Given(self._moves.repository, (), ()))
        if from_step is not None:
            self._moves.repository.refuse_if_key_held(task)  # first: then nothing is removed
            self._forget_answers(task, from_step)
        if task_id not in self._requeue_family(family, {}, {task_id: correction}):
            self._moves.repository.refuse_if_key_held(task)
            raise InvalidTransition(
                f"task {task_id} was changed while it was being requeued; try again"
            )

    def _forget_answers(self, task: Task, from_step: str) -> None:
        """Remove the answers to what the task asks again, before it starts."""
        gone = {write.id: write for write in lifecycle.forgotten_answers(task, from_step)}
        found = self._moves.repository.find("id", [*gone], ("id", "type")) if gone else ()
        writes = [gone[i] for i, type in found if type == lifecycle.ANSWER]
        writes += map(lifecycle.forget_answer, self._unseen_answers(task))
        if writes:
            self._moves.commit(writes)

    def _unseen_answers(self, task: Task) -> list[str]:
        """Return the ids of answers to what a task has asked that no step has: it has not run since."""
        steps = (task.checkpoints or {}).get("steps", {})
        start, answers = f"{task.id}/", list[str]()
        asked = TaskFilter(id_prefix=start, type=lifecycle.ANSWER, limit=self._batch)
        for page in queries.pages(self._moves.repository, asked):
            ids = [answer.id for answer in page if answer.params and lifecycle.was_asked(answer)]
            answers += (i for i in ids if i.removeprefix(start) not in steps)
        askers = {answer: lifecycle.askers(answer) for answer in answers}
        # Those with a longer id are its children, which may ask, too.
        others = {i for ids in askers.values() for i in ids if i.startswith(start)}
        known = self._moves.repository.statuses([*others]) if others else {}
        return [answer for answer, ids in askers.items() if known.keys().isdisjoint(ids)]

    def requeue(self, chosen: Chosen, terms: Terms = PLAIN, *, rate: Any = None) -> Bulk:
        """Requeue the chosen tasks: the failed and cancelled ones with these ids, or those that match."""
        status = chosen.filter.status or TaskStatus.FAILED
        if status not in _REQUEUEABLE:
            raise ConfigurationError(
                "only failed and cancelled tasks can be requeued: the filter must not have status "
                f"{status}"
            )
        filter = attrs.evolve(chosen.filter, status=status)
        by_ids = chosen.ids is not None
        stagger = self._stagger(rate, "" if by_ids else (conditions(filter), chosen.also.name))
        if not terms.dry_run:
            self._refuse_if_stopped()
        change = partial(self._requeue_page, stagger)
        return self._change("requeue", chosen, _REQUEUEABLE if by_ids else (status,), terms, change)

    def _change(
        self,
        action: Action,
        chosen: Chosen,
        statuses: Statuses,
        terms: Terms,
        change: Callable[[Page, Selection, Tally], object],
    ) -> Bulk:
        """Change the chosen tasks that have one of the statuses, a page at a time, or only count them."""
        if terms.dry_run:
            return counted(action, count(self._moves.repository, chosen, statuses, terms.at_most))
        tally = Tally(action, terms)
        for selection in selections(self._moves.repository, chosen, statuses):
            for page in selection.pages():
                change(page, selection, tally)
        return tally.bulk

    def _stagger(self, rate: Any, what: object) -> Stagger | None:
        allowed = rate_of(rate, None)
        if allowed is None:
            return None
        if allowed.unit:
            raise ConfigurationError(f"the rate of a requeue counts tasks, not {allowed.unit}")
        return Stagger(self._moves.repository, self._moves.now_ms, allowed, what)

    def _refuse_if_stopped(self) -> None:
        if self._state.closed:
            raise QueueStopped("the queue was stopped: create a new queue; nothing was requeued")

    def _requeue_page(
        self, stagger: Stagger | None, page: Page, selection: Selection, tally: Tally
    ) -> None:
        """Requeue a page, in parts if too many tasks would be requeued with it at once."""
        if asked := {i: task for i, task in page[1].items() if lifecycle.was_asked(task)}:
            tally.add(len(asked), asked, changed=0, skipped=["answer"] * len(asked))
        parts = [{i: task for i, task in page[1].items() if i not in asked}]
        while parts:
            tasks = parts.pop()
            family = self._family(tasks, selection)
            if family.cut_short:
                items, half = [*tasks.items()], len(tasks) // 2
                parts += [dict(items[half:]), dict(items[:half])]
                continue
            own = family.own | (family.tasks.keys() & page[1].keys())
            order = family.in_order()
            times = stagger.take(len(own)) if stagger is not None else []
            run_at = dict(zip((task.id for task in order if task.id in own), times, strict=False))
            done = self._requeue_family(family, run_at)
            selection.passed(family.tasks, family.parents)
            tally.add(
                len(own),
                tasks,
                changed=len(done & own),
                more=len(done - own),
                skipped=self._why_not([family.tasks[i] for i in own - done]),
                starts_until=max(times, default=None),
            )
            parts = [{i: t for i, t in part.items() if i not in own} for part in parts]
            parts = [part for part in parts if part]

    def _family(self, tasks: Mapping[str, Task], selection: Selection) -> _Family:
        """Return these tasks, with those that must be requeued with them.

        These are all tasks that ended because of them, directly or through other tasks, and the parents in
        the selection, for which they wait. Of several tasks, the search is cut short if it finds too many.
        """
        family = _Family(own=set(tasks))
        new: Mapping[str, Task] = tasks
        while new:
            family.tasks.update(new)
            parents = self._parents(new, family, selection)
            orphans = self._orphans(new, family)
            family.own |= parents.keys() | selection.of(orphans)
            new = {**parents, **orphans}
            family.cut_short = len(tasks) > 1 and len(family.tasks) + len(new) > self._whole
            if family.cut_short:
                break
        return family

    def _parents(
        self, tasks: Mapping[str, Task], family: _Family, selection: Selection
    ) -> dict[str, Task]:
        """Return the parents of these tasks that the selection would requeue later."""
        parents = {parent for task in tasks.values() for parent in task.depends_on}
        some = [i for i in parents - family.tasks.keys() if selection.may_have(i)]
        found: dict[str, Task] = {}
        for start in range(0, len(some), self._batch):
            read = self._moves.repository.get_many(some[start : start + self._batch])
            found.update((task_id, read[task_id]) for task_id in selection.of(read))
        return found

    def _orphans(self, tasks: Mapping[str, Task], family: _Family) -> dict[str, Task]:
        """Return the tasks that ended because of these; note those that still wait for these."""
        pairs = queries.families(self._moves.repository, tasks)
        family.parents.update(parent for parent, _ in pairs)
        some = [*{child for _, child in pairs} - family.tasks.keys() - family.waiting.keys()]
        found: dict[str, Task] = {}
        for start in range(0, len(some), self._batch):
            read = self._moves.repository.get_many(some[start : start + self._batch])
            found.update((i, task) for i, task in read.items() if lifecycle.ended_with(task, tasks))
            family.waiting.update((i, task) for i, task in read.items() if _waits(task, tasks))
            if len(family.own) > 1 and len(found) > self._whole:
                break  # the search is cut short anyway
        return found

    def _requeue_family(
        self,
        family: _Family,
        run_at: Mapping[str, int],
        corrections: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> set[str]:
        """Requeue the tasks of a family, and those that have ended because of them since they were read.

        Returns:
            the ids of the tasks that run again.
        """
        done = set[str]()
        tasks = [*family.in_order(), *family.waiting.values()]
        while tasks:
            requeued = self._requeue(tasks, family, run_at, corrections or {})
            done |= requeued.keys()
            family.tasks.update(requeued)
            known = set(family.waiting)
            orphans = self._orphans(requeued, family)
            family.tasks.update(orphans)
            tasks = [*orphans.values(), *(family.waiting[i] for i in family.waiting.keys() - known)]
        self._moves.process_if_unattended()
        return done

    def _requeue(
        self,
        tasks: Sequence[Task],
        family: _Family,
        run_at: Mapping[str, int],
        corrections: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Task]:
        """Requeue tasks in this order; each one waits for its unfinished parents, and pending ones go on.

        Returns:
            the tasks that run again.
        """
        requeued: dict[str, Task] = {}
        for start in range(0, len(tasks), self._whole):
            some = {task.id: task for task in tasks[start : start + self._whole]}
            parents = list({parent: None for task in some.values() for parent in task.depends_on})
            statuses = self._moves.repository.statuses(parents) if parents else {}
            statuses.update(dict.fromkeys(some, TaskStatus.PENDING))  # in this transaction
            now = self._moves.now_ms()
            writes: list[Update] = []
            for task_id, task in some.items():
                if task.status is TaskStatus.PENDING:
                    writes += lifecycle.wait_again(task, family.tasks, now)
                    continue
                waiting_on = lifecycle.unfinished_parent(task.depends_on, statuses)
                at, correction = run_at.get(task_id), corrections.get(task_id)
                writes.append(
                    lifecycle.requeue(task, now, waiting_on, run_at=at, correction=correction)
                )
            results = self._moves.commit(writes, some)
            done = (write.id for write in compress(writes, results) if write.move == "requeue")
            requeued.update((task_id, some[task_id]) for task_id in done)
        return requeued

    def _why_not(self, tasks: Sequence[Task]) -> list[str]:
        """Return the reason for each of these tasks why it was not requeued."""
        keys = [*{task.unique_key for task in tasks if task.unique_key is not None}]
        found = (
            self._moves.repository.find("unique_lock", keys, ("unique_lock", "id")) if keys else ()
        )
        holders: dict[str | None, str] = dict(found)
        return [
            "changed" if holders.get(task.unique_key, task.id) == task.id else "unique_key"
            for task in tasks
        ]


@attrs.define(eq=False, repr=False)
class _Family:
    """Tasks that are requeued together."""

    #: All of them, by id.
    tasks: dict[str, Task] = attrs.field(factory=dict)
    #: The ids of those that belong to the selection, as against those that ended because of these.
    own: set[str] = attrs.field(factory=set)
    #: Pending tasks that depend on some of them, by id.
    waiting: dict[str, Task] = attrs.field(factory=dict)
    #: The ids of those that other tasks depend on.
    parents: set[str] = attrs.field(factory=set)
    #: True if some of the tasks are missing, because they are too many.
    cut_short: bool = False

    def in_order(self) -> list[Task]:
        """Return the tasks with parents before their children."""
        from graphlib import TopologicalSorter  # seldom needed

        tasks = self.tasks
        parents = {i: [p for p in task.depends_on if p in tasks] for i, task in tasks.items()}
        return [tasks[task_id] for task_id in TopologicalSorter(parents).static_order()]
