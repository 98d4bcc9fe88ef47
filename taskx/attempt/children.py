"""Children: tasks that a run submits, and whose results its task waits for without a thread.

What is stored says all: see :mod:`taskx.tasks.children`. So an attempt that repeats a call finds the tasks
that an earlier one has submitted, and a call costs no more than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from taskx.attempt.waiting import Parked, Waits, error_in, failed, outcome_of
from taskx.stores import lists, queries
from taskx.stores.door import Door
from taskx.tasks import children, lifecycle
from taskx.tasks.creation import new_record
from taskx.tasks.errors import ConfigurationError, DuplicateTask
from taskx.tasks.lifecycle import Park
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.tags import without_trace
from taskx.tasks.token import CancelToken
from taskx.tasks.values import Values, encoded
from taskx.tasks.writes import Insert, Update

# Attempts to change tasks that move between the read and the write.
_TRIES = 20

#: Stores tasks of at least this priority and the record of their list, all or none.
Submit = Callable[[Sequence[Task], int, Insert], object]


class Children:
    """The children of a queue's runs.

    Args:
        moves: the door to the repository.
        submit: the door for new tasks.
        waits: what else these runs wait for.
        values: the annotations of the executors that are known here, by type.
    """

    def __init__(
        self, moves: Door, submit: Submit, waits: Waits, values: Mapping[str, Values]
    ) -> None:
        self._moves = moves
        self._values = values
        self._submit = submit
        self._patiently = waits.patiently
        self._batch = moves.repository.timing.batch

    def wait(
        self,
        parent: Task,
        name: str,
        tasks: Sequence[Task],
        needed: int | None,
        taken: list[int] | None,
        token: CancelToken,
    ) -> list[int] | None:
        """Submit the children of a list, unless that was done, and wait until enough of them have ended.

        ``taken`` has the numbers of those that were enough in an earlier call; None if none were.

        Returns:
            if some are needed, the numbers of those that have completed; None if too few can.

        Raises:
            Parked: the task waits.
        """
        key = parent.concurrency_key
        if key is not None and any(task.concurrency_key == key for task in tasks):
            raise ConfigurationError(
                f"children with the concurrency key {key!r} of their parent would wait for it, as it keeps "
                "the turn: give one of them another key"
            )
        listed = self._listed(parent, name, tasks, needed, token, again=taken is None)
        if taken is not None:
            return taken
        statuses = self._patiently(
            token, lambda: self._moves.repository.statuses(listed.depends_on)
        )
        if (awaited := children.awaited(listed, statuses)) is not None:
            raise Parked(Park(awaited, None), name)
        if needed is None:
            return None
        ids = enumerate(listed.depends_on)
        completed = [n for n, child in ids if statuses.get(child) == lifecycle.COMPLETED]
        return completed if len(completed) >= needed else None

    def outcomes(
        self, parent: Task, name: str, some: bool, taken: Sequence[int] | None, token: CancelToken
    ) -> list[Any]:
        """Return how the children of a list have ended, in order, as values of steps.

        Args:
            parent: the parent.
            name: the name of the list.
            some: cancel those that have not ended.
            taken: the numbers of those whose results count; None for all.
            token: the token of the run.
        """
        list_id = children.list_id(parent.id, name)
        listed = self._patiently(token, lambda: self._moves.repository.get_by_id(list_id))
        if some:
            now = self._moves.now_ms()
            self._patiently(
                token, lambda: lists.cancel(self._moves.repository, self._moves.commit, listed, now)
            )
        found: list[Any] = []
        for start in range(0, len(listed.depends_on), self._batch):
            page = listed.depends_on[start : start + self._batch]
            read = self._patiently(token, lambda page=page: self._moves.repository.get_many(page))  # type: ignore[misc]
            found += (_outcome(read.get(child), child) for child in page)
        if taken is not None:
            for number in {*range(len(found))}.difference(taken):
                if not _is_error(found[number]):
                    found[number] = _not_needed(listed.depends_on[number])
        return found

    def fork(
        self, parent: Task, name: str, tasks: Sequence[Task], token: CancelToken
    ) -> Sequence[str]:
        """Submit the children of a list, and let the dependents of their parent wait for them, too.

        Returns:
            the ids of the children.
        """
        ids = self._listed(parent, name, tasks, None, token, again=True).depends_on
        for _ in range(_TRIES):
            late = self._patiently(token, lambda: self._late_dependents(parent, ids))
            if not late:
                break
            if len(late) * len(ids) > children.MOST_PAIRS:
                raise ConfigurationError(
                    f"{len(late)} tasks would depend on {len(ids)} more tasks, in more than "
                    f"{children.MOST_PAIRS:,} pairs: let only one task depend on this one"
                )
            writes = [lifecycle.wait_for_more(task, ids) for task in late]
            self._patiently(token, lambda writes=writes: self._moves.commit(writes))  # type: ignore[misc]
        return ids

    def _late_dependents(self, parent: Task, ids: Sequence[str]) -> list[Task]:
        """Return the tasks that depend on a parent, and not yet on these children of it.

        Those that failed or were cancelled are among them: they may be requeued.
        """
        pairs = queries.families(self._moves.repository, [parent.id])
        found, wanted = list[Task](), set(ids)
        for start in range(0, len(pairs), self._batch):
            some = [child for _, child in pairs[start : start + self._batch]]
            found += self._moves.repository.get_many(some).values()
        return [
            task
            for task in found
            if task.status.value in (lifecycle.PENDING, *lifecycle.REQUEUEABLE)
            and not lifecycle.is_parked(task)
            and not wanted.issubset(task.depends_on)
        ]

    # --- submitting

    def _listed(
        self,
        parent: Task,
        name: str,
        tasks: Sequence[Task],
        needed: int | None,
        token: CancelToken,
        *,
        again: bool,
    ) -> Task:
        """Return the record of a list, after it was stored with its children.

        ``again`` says that those which have not completed shall run again after a requeue of the parent.
        """
        list_id = children.list_id(parent.id, name)
        tasks = [encoded(task, self._values) for task in tasks]
        while (listed := self._look(list_id, token)) is None:
            new = children.new_list(parent, name, tasks, needed, self._depth(parent, token))
            insert = lifecycle.opened(new_record(new, self._moves.now_ms()), parent.id)
            pairs = zip(tasks, new.depends_on, strict=True)
            made = [_inherits(task, child, parent) for task, child in pairs]
            try:
                self._patiently(
                    token,
                    lambda made=made, insert=insert: self._submit(made, parent.priority, insert),  # type: ignore[misc]
                )
            except DuplicateTask:
                if self._look(list_id, token) is None:  # no earlier attempt has stored it
                    raise
        if not children.is_of(listed, parent.id):
            raise ConfigurationError(f"task {list_id} has the id of a list of children")
        if listed.params.get("digest") != children.digest_of_list(tasks, needed):
            before, now = len(listed.depends_on), len(tasks)
            raise ConfigurationError(
                f"the list {name!r} was submitted with {before} tasks in an earlier call, and has {now} now"
                + (", others or with another need" if before == now else "")
                + ": what decides about the list must be the same in each attempt, as the result of a step"
            )
        if again and listed.status.finished:  # with the parent, which was requeued
            if (child := self._patiently(token, lambda: self._stopping(listed))) is not None:
                raise Parked(Park(child, None), name)
            self._patiently(token, lambda: self._reopen(listed, parent))
        return listed

    def _look(self, list_id: str, token: CancelToken) -> Task | None:
        return self._patiently(token, lambda: self._moves.repository.get_many([list_id])).get(
            list_id
        )

    def _depth(self, parent: Task, token: CancelToken) -> int:
        above = children.list_of(parent.id)
        found = self._look(above, token) if above else None
        if found is None or parent.id not in found.depends_on:
            return 1
        depth: int = found.params["depth"] + 1
        if depth > children.MAX_DEPTH:
            raise ConfigurationError(
                f"tasks have children within children at more than {children.MAX_DEPTH} levels: does a "
                "task submit itself?"
            )
        return depth

    def _stopping(self, listed: Task) -> str | None:
        """Return the id of a child that was asked to stop, and still runs; None if none does."""
        fields = ("id", "status", "cancel_requested_at")
        for start in range(0, len(listed.depends_on), self._batch):
            some = listed.depends_on[start : start + self._batch]
            for child, status, asked_at in self._moves.repository.find("id", some, fields):
                if status == lifecycle.RUNNING and asked_at is not None:
                    return str(child)
        return None

    def _reopen(self, listed: Task, parent: Task) -> None:
        """Let the children run again that have not completed, and open the list again.

        All in one transaction: a child may wait for any other one.
        """
        now, repository, writes = self._moves.now_ms(), self._moves.repository, list[Update]()
        statuses = repository.statuses(listed.depends_on)
        bad = [i for i in listed.depends_on if statuses.get(i) in lifecycle.REQUEUEABLE]
        statuses.update(dict.fromkeys(bad, lifecycle.PENDING))
        for start in range(0, len(bad), self._batch):
            tasks = repository.get_many(bad[start : start + self._batch]).values()
            if others := {i for task in tasks for i in task.depends_on} - statuses.keys():
                statuses.update(repository.statuses([*others]))
            for task in tasks:
                if task.status.value in lifecycle.REQUEUEABLE:
                    on = lifecycle.unfinished_parent(task.depends_on, statuses)
                    writes.append(lifecycle.requeue(task, now, on))
        self._moves.commit([*writes, lifecycle.listed_again(listed, parent.id)])


def _inherits(task: Task, child_id: str, parent: Task) -> Task:
    """Return a task as a child: it has the flow, the tags and the creator of its parent, too."""
    return attrs.evolve(
        task,
        id=child_id,
        flow=task.flow or parent.flow,
        tags=[*dict.fromkeys((*task.tags, *without_trace(parent.tags)))],
        created_by=task.created_by or parent.created_by,
    )


def _outcome(child: Task | None, child_id: str) -> Any:
    if child is None:
        return failed("gone", child_id)
    return outcome_of(child) if child.status.finished else _not_needed(child_id)


def _not_needed(child_id: str) -> Mapping[str, Any]:
    return failed("cancelled", f"task {child_id} was not needed any more")


def _is_error(value: Any) -> bool:
    return error_in(value) is not None


def check_tasks(tasks: Any, needed: int | None, what: str) -> list[Task]:
    """Return the tasks for a list. Raises ``ConfigurationError`` if they cannot be children."""
    made = [*tasks]
    for task in made:
        if not isinstance(task, Task):
            raise ConfigurationError(
                f"{what} requires tasks, not {task!r:.80}; an executor makes one: executor.task(…)"
            )
        if task.id or task.status is not TaskStatus.PENDING:
            raise ConfigurationError(
                f"{what} gives each task an id: give it new tasks, without ids"
            )
    if needed is not None and not (type(needed) is int and 0 < needed <= len(made)):
        raise ConfigurationError(
            f"needed must be a whole number from 1 to the number of tasks, {len(made)}, not {needed!r}"
        )
    return made
