"""Changes to stored tasks on request: cancel, requeue, delete, one task or many, and dead letters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from heapq import merge
from itertools import islice
from typing import Any

import attrs

from taskx.core import lifecycle
from taskx.core.checks import check_int
from taskx.core.errors import (
    ConfigurationError,
    InvalidTransition,
    QueueStopped,
    RepositoryCorrupt,
    TaskNotFound,
)
from taskx.core.lifecycle import REQUEUEABLE
from taskx.core.model import Task, TaskFilter, TaskStatus, check_name
from taskx.core.rate import rate_of
from taskx.core.writes import Delete, Update
from taskx.moving import Services
from taskx.running.pool import State
from taskx.storage import queries
from taskx.storage.base import Repository
from taskx.submitting import bulk
from taskx.submitting.bulk import (
    ANY,
    PLAIN,
    Action,
    Also,
    Bulk,
    Given,
    Matching,
    Selection,
    Stagger,
    Tally,
    Terms,
    conditions,
    created_at,
)
from taskx.submitting.intake import new_params

# Attempts to cancel a task that moves between the write and the read.
_TRIES = 20
#: Most tasks that are requeued in one transaction: a page, and the tasks that ended because of it.
WHOLE = 1000
_NO_LIMIT = TaskFilter().limit


def dead(filter: TaskFilter) -> TaskFilter:
    """Return the filter, limited to dead letters. Raises ConfigurationError if it has another status."""
    if filter.status not in (None, TaskStatus.FAILED):
        raise ConfigurationError(
            f"dead letters are failed tasks: the filter must not have status {filter.status}"
        )
    return attrs.evolve(filter, status=TaskStatus.FAILED)


def _check_deliberate(wanted: TaskFilter, what: str, *, everything: bool) -> None:
    """Raise ConfigurationError if a filter of all tasks was given by mistake."""
    if not (wanted.given or everything):
        raise ConfigurationError(
            f"{what}() without a condition is for every task in the repository: give a condition, such as "
            "type='report', or say everything=True"
        )
    if wanted.given and everything:
        raise ConfigurationError(
            f"{what}() takes conditions or everything=True, not both: {', '.join(sorted(wanted.given))}"
        )


def children(repository: Repository, task_ids: Iterable[str]) -> list[str]:
    """Return the ids of the tasks that depend on the given ones, in any status, each once."""
    return [*dict.fromkeys(child for _, child in _families(repository, task_ids))]


def _families(repository: Repository, task_ids: Iterable[str]) -> Sequence[tuple[Any, ...]]:
    """Return pairs of one of these tasks and a task that depends on it."""
    return repository.find("parent", [*task_ids], ("parent", "id"))


def _requeueable(task: Task) -> bool:
    return task.status.value in REQUEUEABLE


class Operations:
    """Changes stored tasks; the queue need not be started.

    Its public methods implement the methods of ``Queue`` with the same names (``cancel``: ``cancel_task``).

    Args:
        services: the shared parts of the queue.
        state: tells if the queue is started, and if it was stopped.
    """

    def __init__(self, services: Services, state: State) -> None:
        self._services = services
        self._repository = services.repository
        self._consequences = services.consequences
        self._state = state

    @property
    def keeps_no_errors(self) -> bool:
        """True if the repository may not keep tracebacks: it has only the eight methods."""
        return bool(self._repository.shortcoming)

    # --- cancel

    def cancel(self, task_id: str) -> bool:
        for _ in range(_TRIES):
            *cancelled, asked = self._commit(
                lifecycle.cancel(task_id, self._services.clock.now_ms())
            )
            if any(cancelled):
                return True
            if asked:
                return False
            task = self._repository.get_by_id(task_id)
            if task.status.finished:
                raise InvalidTransition(f"task {task_id} is already {task.status}")
            if queries.asked_to_cancel(self._repository, [task_id]):
                if self._state.engine is not None:
                    self._state.engine.fire(task_id)
                return False
            # else it moved between the write and the read: try again
        raise RepositoryCorrupt(
            f"task {task_id} cannot be cancelled: its stored record is damaged; delete it with "
            "delete(), or repair it by hand"
        )

    def cancel_many(self, task_ids: Sequence[str]) -> int:
        return sum(
            len(self._cancel_some(task_ids[start : start + bulk.BATCH])[0])
            for start in range(0, len(task_ids), bulk.BATCH)
        )

    def cancel_all(
        self, filter: TaskFilter, terms: Terms = PLAIN, *, everything: bool = False
    ) -> Bulk:
        _check_deliberate(filter, "cancel_all", everything=everything)
        if filter.status is not None and filter.status.finished:
            raise ConfigurationError(
                f"cancel_all() cancels pending and running tasks: the filter must not have status "
                f"{filter.status}"
            )
        # A pending task may start before its page is read; a running one may be retried.
        some = (TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.PENDING)
        wanted = [
            attrs.evolve(filter, status=status)
            for status in ((filter.status,) if filter.status else some)
        ]
        if terms.dry_run:
            return self._counted("cancel", wanted[:2], terms.at_most)
        tally = Tally("cancel", terms)
        for selection in self._selections(wanted):
            for tasks in selection.pages():
                self._cancel_page(tasks, tally)
        return tally.bulk

    def _cancel_page(self, tasks: Mapping[str, Task], tally: Tally) -> None:
        new = [i for i, task in tasks.items() if task.cancel_requested_at is None]
        cancelled, asked = self._cancel_some(new, tasks)
        changed = len(cancelled) + len(asked)
        tally.add(
            len(tasks),
            changed=changed,
            asked=len(asked),
            skipped=["asked"] * (len(tasks) - len(new)) + ["changed"] * (len(new) - changed),
            reached=[*tasks.values()][-1].created_at,
        )

    def _cancel_some(
        self, task_ids: Sequence[str], tasks: Mapping[str, Task] | None = None
    ) -> tuple[set[str], set[str]]:
        """Cancel tasks; return the ids of those that will never run, and of those asked to stop."""
        now = self._services.clock.now_ms()
        writes = [write for task_id in task_ids for write in lifecycle.cancel(task_id, now)]
        done = [w for w, held in zip(writes, self._commit(writes, tasks), strict=True) if held]
        cancelled = {write.id for write in done if "status" in write.changes}
        asked = {write.id for write in done} - cancelled
        left = [i for i in task_ids if i not in cancelled and i not in asked]
        rest = self._repository.statuses(left) if left else {}
        for task_id, status in rest.items():
            # An unfinished task moved in the meantime, or was already asked to stop.
            if status not in lifecycle.FINISHED:
                try:
                    (cancelled if self.cancel(task_id) else asked).add(task_id)
                except RepositoryCorrupt as error:
                    self._services.log.warning("%s", error)
                except (InvalidTransition, TaskNotFound):
                    continue
        return cancelled, asked

    # --- delete

    def delete(self, task_id: str) -> None:
        if not self._commit([lifecycle.delete(task_id)])[0]:
            raise lifecycle.not_deleted(self._repository.get_by_id(task_id))

    def delete_all(
        self, filter: TaskFilter, terms: Terms = PLAIN, *, everything: bool = False
    ) -> Bulk:
        _check_deliberate(filter, "delete_all", everything=everything)
        if filter.status is TaskStatus.RUNNING:
            raise ConfigurationError("delete_all() deletes no running tasks: cancel them first")
        if terms.dry_run:
            return self._counted("delete", [filter], terms.at_most)
        tally = Tally("delete", terms)
        for selection in self._selections([filter]):
            for tasks in selection.pages():
                self._delete_page(tasks, tally)
        return tally.bulk

    def discard_dead_letters(self, filter: TaskFilter) -> int:
        return self.delete_all(dead(filter)).changed

    def _delete_page(self, tasks: Mapping[str, Task], tally: Tally) -> None:
        reasons = {i: "running" for i, t in tasks.items() if t.status is TaskStatus.RUNNING}
        reasons.update((i, "thread") for i, task in tasks.items() if task.stuck_on)
        free = {i: task for i, task in tasks.items() if i not in reasons}
        needed = self._needed(free)
        reasons.update(dict.fromkeys(needed, "needed"))
        writes = [lifecycle.discard(task) for i, task in free.items() if i not in needed]
        results = self._commit(writes, {}) if writes else []
        deleted = sum(results)
        skipped = [*reasons.values(), *["changed"] * (len(results) - deleted)]
        reached = [*tasks.values()][-1].created_at
        tally.add(len(tasks), changed=deleted, skipped=skipped, reached=reached)

    def _needed(self, tasks: Mapping[str, Task]) -> set[str]:
        """Return the tasks on which unfinished tasks depend that are not deleted with them.

        An executor may still ask for the results of its parents.
        """
        families = _families(self._repository, tasks)
        others = [*{child for _, child in families}]
        statuses = self._repository.statuses(others) if others else {}
        needed = set[str]()
        before = -1
        while len(needed) > before:
            before = len(needed)
            needed |= {
                parent
                for parent, child in families
                if statuses.get(child) in lifecycle.UNFINISHED
                and (child not in tasks or child in needed)
            }
        return needed

    def _commit(
        self, writes: Sequence[Update | Delete], tasks: Mapping[str, Task] | None = None
    ) -> Sequence[bool]:
        results = self._consequences.commit(writes, tasks)
        self._consequences.process_if_unattended()
        return results

    # --- requeue

    def requeue(self, task_id: str, params: Any = None, from_step: str | None = None) -> None:
        self._refuse_if_stopped()
        if from_step is not None:
            check_name(from_step, "from_step")
        task = self._repository.get_by_id(task_id)
        lifecycle.check_requeue(task)
        correction: dict[str, Any] = {}
        if params is not None or from_step is not None:
            text = None if params is None else new_params(self._services, task.type, params)
            now = self._services.clock.now_ms()
            correction = lifecycle.corrected(task, now, text, from_step)
        family = self._family({task_id: task}, Given(self._repository, (), _requeueable))
        if task_id not in self._requeue(family.in_order(), {}, {task_id: correction}):
            self._repository.refuse_if_key_held(task)
            raise InvalidTransition(
                f"task {task_id} was changed while it was being requeued; try again"
            )

    def requeue_many(self, task_ids: Iterable[str]) -> int:
        done = self.requeue_given(task_ids)
        return done.changed + done.more

    def requeue_dead_letters(self, filter: TaskFilter) -> int:
        done = self.requeue_all(dead(filter))
        return done.changed + done.more

    def requeue_given(
        self, task_ids: Iterable[str], terms: Terms = PLAIN, *, rate: Any = None
    ) -> Bulk:
        """Requeue the tasks with these ids that failed or were cancelled."""
        selection, stagger = (
            Given(self._repository, task_ids, _requeueable),
            self._stagger(rate, ""),
        )
        if terms.dry_run:
            return Bulk(action="requeue", dry_run=True, matched=sum(map(len, selection.pages())))
        return self._requeue_selections([selection], terms, stagger)

    def requeue_all(
        self, filter: TaskFilter, terms: Terms = PLAIN, *, also: Also = ANY, rate: Any = None
    ) -> Bulk:
        if filter.status is not None and filter.status.value not in REQUEUEABLE:
            raise ConfigurationError(
                "requeue_all() runs failed or cancelled tasks again: the filter must not have status "
                f"{filter.status}"
            )
        wanted = [attrs.evolve(filter, status=filter.status or TaskStatus.FAILED)]
        stagger = self._stagger(rate, (conditions(wanted[0]), also.name))
        if terms.dry_run:
            return self._counted("requeue", wanted, terms.at_most, also)
        return self._requeue_selections(self._selections(wanted, also), terms, stagger)

    def _stagger(self, rate: Any, what: object) -> Stagger | None:
        allowed = rate_of(rate, None)
        if allowed is None:
            return None
        return Stagger(self._repository, self._services.clock, allowed, what)

    def _requeue_selections(
        self, selections: Iterable[Selection], terms: Terms, stagger: Stagger | None
    ) -> Bulk:
        self._refuse_if_stopped()
        tally = Tally("requeue", terms)
        for selection in selections:
            for page in selection.pages():
                self._requeue_page(page, selection, tally, stagger)
        return tally.bulk

    def _refuse_if_stopped(self) -> None:
        if self._state.stopped:
            raise QueueStopped("the queue was stopped: create a new queue; nothing was requeued")

    def _requeue_page(
        self,
        page: Mapping[str, Task],
        selection: Selection,
        tally: Tally,
        stagger: Stagger | None,
    ) -> None:
        """Requeue a page, in parts if more than ``WHOLE`` tasks would be requeued with it at once."""
        parts = [page]
        while parts:
            tasks = parts.pop()
            family = self._family(tasks, selection)
            if family.cut_short:
                items, half = [*tasks.items()], len(tasks) // 2
                parts += [dict(items[half:]), dict(items[:half])]
                continue
            own = family.own | (family.tasks.keys() & page.keys())
            order = family.in_order()
            times = stagger.take(len(own)) if stagger is not None else []
            run_at = dict(zip((task.id for task in order if task.id in own), times, strict=False))
            done = self._requeue(order, run_at)
            selection.passed(family.tasks, family.parents)
            tally.add(
                len(own),
                changed=len(done & own),
                more=len(done - own),
                skipped=self._why_not([family.tasks[i] for i in own - done]),
                reached=[*tasks.values()][-1].created_at,
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
            family.cut_short = len(tasks) > 1 and len(family.tasks) + len(new) > WHOLE
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
        for start in range(0, len(some), bulk.BATCH):
            read = self._repository.get_many(some[start : start + bulk.BATCH])
            found.update((task_id, read[task_id]) for task_id in selection.of(read))
        return found

    def _orphans(self, tasks: Mapping[str, Task], family: _Family) -> dict[str, Task]:
        """Return the tasks that ended because of these."""
        pairs = _families(self._repository, tasks)
        family.parents.update(parent for parent, _ in pairs)
        some = [*{child for _, child in pairs} - family.tasks.keys()]
        found: dict[str, Task] = {}
        for start in range(0, len(some), bulk.BATCH):
            read = self._repository.get_many(some[start : start + bulk.BATCH])
            found.update((i, task) for i, task in read.items() if lifecycle.ended_with(task, tasks))
            if len(family.own) > 1 and len(found) > WHOLE:
                break  # the search is cut short anyway
        return found

    def _requeue(
        self,
        tasks: Sequence[Task],
        run_at: Mapping[str, int],
        corrections: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> set[str]:
        """Requeue tasks in this order; each one waits for its unfinished parents.

        Returns:
            the ids of the tasks that run again.
        """
        requeued = set[str]()
        for start in range(0, len(tasks), WHOLE):
            some = tasks[start : start + WHOLE]
            parents = list({parent: None for task in some for parent in task.depends_on})
            statuses = self._repository.statuses(parents) if parents else {}
            statuses.update((task.id, TaskStatus.PENDING) for task in some)  # in this transaction
            now = self._services.clock.now_ms()
            writes = [
                lifecycle.requeue(
                    task,
                    now,
                    lifecycle.unfinished_parent(task.depends_on, statuses),
                    run_at=run_at.get(task.id),
                    correction=(corrections or {}).get(task.id),
                )
                for task in some
            ]
            results = self._consequences.commit(writes, {task.id: task for task in some})
            requeued.update(task.id for task, held in zip(some, results, strict=True) if held)
        self._consequences.process_if_unattended()
        return requeued

    def _why_not(self, tasks: Sequence[Task]) -> list[str]:
        """Return the reason for each of these tasks why it was not requeued."""
        keys = [*{task.unique_key for task in tasks if task.unique_key is not None}]
        found = self._repository.find("unique_lock", keys, ("unique_lock", "id")) if keys else ()
        holders: dict[str | None, str] = dict(found)
        return [
            "changed" if holders.get(task.unique_key, task.id) == task.id else "unique_key"
            for task in tasks
        ]

    # --- what a bulk change is of

    def _selections(self, filters: Sequence[TaskFilter], also: Also = ANY) -> Iterator[Selection]:
        """Return the tasks that match one of the filters, which differ in their status only.

        A limit and an offset are those of all of them together. Then all ids are read before the first task
        is changed.
        """
        first = filters[0]
        if not (first.limited or first.offset):
            yield from (Matching(self._repository, wanted, also) for wanted in filters)
            return
        statuses = {wanted.status for wanted in filters}
        newest = merge(
            *(self._matching(first, status) for status in statuses), key=created_at, reverse=True
        )
        most = first.offset + first.limit if first.limited else None
        chosen = islice((task for task in newest if also.meets(task)), first.offset, most)
        task_ids = [task.id for task in chosen]
        yield Given(
            self._repository, task_ids, lambda task: None in statuses or task.status in statuses
        )

    def _matching(self, wanted: TaskFilter, status: TaskStatus | None) -> Iterator[Task]:
        """Iterate over all tasks with a status that match the conditions of a filter, newest first."""
        every = attrs.evolve(wanted, status=status, offset=0, limit=_NO_LIMIT)
        return queries.matching(self._repository, every)

    def _counted(
        self,
        action: Action,
        filters: Sequence[TaskFilter],
        at_most: int | None,
        also: Also = ANY,
    ) -> Bulk:
        """Return the number of tasks that match one of the filters, and change nothing."""
        first, exact = filters[0], True
        if also is ANY:
            counts = [queries.count(self._repository, wanted, at_most) for wanted in filters]
            number, exact = sum(map(int, counts)), all(count.exact for count in counts)
        else:
            found = filter(also.meets, self._matching(first, first.status))
            most = None if at_most is None else check_int(at_most, "at_most", 1) + 1
            number = sum(1 for _ in islice(found, most))
        if at_most is not None and number > at_most:
            number, exact = at_most, False
        number = max(0, number - first.offset)
        if first.limited and number >= first.limit:
            number, exact = first.limit, True
        return Bulk(action=action, dry_run=True, matched=number, exact=exact)


@attrs.define
class _Family:
    """Tasks that are requeued together."""

    #: All of them, by id.
    tasks: dict[str, Task] = attrs.field(factory=dict)
    #: The ids of those that belong to the selection, as against those that ended because of these.
    own: set[str] = attrs.field(factory=set)
    #: The ids of those that other tasks depend on.
    parents: set[str] = attrs.field(factory=set)
    #: True if some of the tasks are missing, because they are too many.
    cut_short: bool = False

    def in_order(self) -> list[Task]:
        """Return the tasks with parents before their children."""
        tasks = self.tasks
        parents = {i: [p for p in task.depends_on if p in tasks] for i, task in tasks.items()}
        return [tasks[task_id] for task_id in TopologicalSorter(parents).static_order()]
