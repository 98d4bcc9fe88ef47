"""Changes to stored tasks on request: cancel, delete and requeue, one task or all that are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from taskx.attempt.waiting import ONCE, awake
from taskx.queue.bulk import PLAIN, Bulk, Tally, Terms
from taskx.queue.requeuing import Requeues
from taskx.stores import queries
from taskx.stores.selecting import Chosen, Page, Selection, Statuses
from taskx.tasks import children, lifecycle
from taskx.tasks.clock import to_ms
from taskx.tasks.creation import new_record
from taskx.tasks.errors import (
    ConfigurationError,
    InvalidTransition,
    RepositoryCorrupt,
    RepositoryError,
    TaskNotFound,
)
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.writes import Write

# Attempts to cancel a task that moves between the write and the read.
_TRIES = 20


class Operations(Requeues):
    """Cancels, deletes and requeues stored tasks; the queue need not be started.

    ``cancel_one``, ``delete_one`` and ``requeue_one`` raise an error if the task cannot be changed. The
    others change the chosen tasks in batches, and skip those that cannot be changed.
    """

    # --- cancel

    def cancel_one(self, task_id: str) -> bool:
        """Cancel a task; return False if it is running and was asked to stop: see ``Queue.cancel_task``."""
        if self._lists([task_id]):
            raise InvalidTransition(
                f"{task_id} is the list of a task's children: cancel that task, which cancels them, too"
            )
        for _ in range(_TRIES):
            *cancelled, asked = self._commit(lifecycle.cancel(task_id, self._moves.now_ms()))
            if any(cancelled):
                return True
            if asked:
                return False
            task = self._moves.repository.get_by_id(task_id)
            if task.status.finished:
                raise InvalidTransition(f"task {task_id} is already {task.status}")
            if queries.asked_to_cancel(self._moves.repository, [task_id]):
                if self._state.pool is not None and not self._moves.inside:
                    self._state.pool.fire(task_id)
                return False
            # else it moved between the write and the read: try again
        raise RepositoryCorrupt(
            f"task {task_id} cannot be cancelled: its stored record is damaged; delete it, or "
            "repair it by hand"
        )

    def cancel(self, chosen: Chosen, terms: Terms = PLAIN) -> Bulk:
        """Cancel the chosen pending tasks, and ask the running ones to stop."""
        status = chosen.filter.status
        if status is not None and status.finished:
            raise ConfigurationError(
                "only pending and running tasks can be cancelled: the filter must not have status "
                f"{status}"
            )
        # A pending task may start before its page is read; a running one may be retried.
        some: Statuses = (TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.PENDING)
        if chosen.ids is not None:
            some = ()
        elif status is not None:
            some = (status,)
        return self._change("cancel", chosen, some, terms, self._cancel_page)

    def _cancel_page(self, page: Page, _: Selection, tally: Tally) -> None:
        ids, tasks = page
        lists = self._lists(ids)
        ids = [i for i in ids if i not in lists]
        new = [i for i in ids if i not in tasks or tasks[i].cancel_requested_at is None]
        cancelled, asked = self._cancel_some(new, tasks)
        changed = len(cancelled) + len(asked)
        skipped = ["asked"] * (len(ids) - len(new)) + ["changed"] * (len(new) - changed)
        tally.add(len(ids), tasks, changed=changed, asked=len(asked), skipped=skipped)

    def _lists(self, task_ids: Sequence[str]) -> set[str]:
        """Return those of these ids that are of lists of children, which end with their parents.

        A parent that has just been cancelled could not find its children after the end of their list.
        """
        some = [task_id for task_id in task_ids if children.may_be_list(task_id)]
        found = self._moves.repository.find("id", some, ("id", "type")) if some else ()
        return {task_id for task_id, type in found if type == lifecycle.CHILDREN}

    def _cancel_some(
        self, task_ids: Sequence[str], tasks: Mapping[str, Task]
    ) -> tuple[set[str], set[str]]:
        """Cancel tasks; return the ids of those that will never run, and of those asked to stop."""
        now = self._moves.now_ms()
        writes = [write for task_id in task_ids for write in lifecycle.cancel(task_id, now)]
        done = [
            w for w, held in zip(writes, self._commit(writes, tasks or None), strict=True) if held
        ]
        cancelled = {write.id for write in done if "status" in write.changes}
        asked = {write.id for write in done} - cancelled
        left = [i for i in task_ids if i not in cancelled and i not in asked]
        rest = self._moves.repository.statuses(left) if left else {}
        for task_id, status in rest.items():
            # An unfinished task moved in the meantime, or was already asked to stop.
            if status not in lifecycle.FINISHED:
                try:
                    (cancelled if self.cancel_one(task_id) else asked).add(task_id)
                except RepositoryCorrupt as error:
                    self._log.warning("%s", error)
                except (InvalidTransition, TaskNotFound):
                    continue
        return cancelled, asked

    # --- answers, and tasks that sleep

    def finish_one(
        self, answer_id: str, result: str | None, error: str, by: str, *, again: bool
    ) -> bool:
        """End an answer; return False if it has ended: see ``Queue.finish``."""
        self._moves.repository.require("answers")
        for _ in range(_TRIES):
            now = self._moves.now_ms()
            answer, waiting_on = self._answer(answer_id)
            if again and (answer is None or ONCE not in answer.params):
                raise InvalidTransition(
                    f"{answer_id} is not about a call that can be made again: give a result or an error"
                )
            if answer is None:
                new = new_record(Task(id=answer_id, type=lifecycle.ANSWER), now)
                finish = lifecycle.finish(Task(id=answer_id), now, result, error, by)
                write: Write = lifecycle.created_finished(new, finish)
            elif answer.type != lifecycle.ANSWER:
                raise InvalidTransition(
                    f"task {answer_id} is no answer, but a task of type {answer.type!r}, which an executor "
                    "runs: nobody can finish it by hand"
                )
            elif answer.status.finished:
                return False
            elif lifecycle.has_expired(answer, now):  # no node has looked since
                self._commit(lifecycle.expire(answer, now), {answer_id: answer})
                continue
            elif waiting_on in answer.depends_on:
                raise InvalidTransition(
                    f"the answer {answer_id} cannot be given yet: it waits for {waiting_on} first"
                )
            else:
                write = lifecycle.finish(answer, now, result, error, by)
            if self._commit([write], {} if answer is None else {answer_id: answer})[0]:
                if answer is None:
                    self._warn_of_early(answer_id)
                return True
        raise RepositoryCorrupt(f"the answer {answer_id} cannot be finished: its record is damaged")

    def _warn_of_early(self, answer_id: str) -> None:
        """Warn if the task that may ask for an early answer waits for another one: it may be misspelt."""
        askers = [] if answer_id.startswith(lifecycle.EVENT) else lifecycle.askers(answer_id)
        with suppress(RepositoryError):  # the answer is stored
            for asker, on in self._moves.repository.find("id", askers, ("id", "waiting_on")):
                if on is not None and on.startswith(f"{asker}/"):
                    self._log.warning(
                        "nobody has asked for %s yet; it is stored, but task %s waits for %s",
                        answer_id,
                        asker,
                        on,
                    )

    def _answer(self, answer_id: str) -> tuple[Task | None, str | None]:
        """Return an answer and what it waits for. None if it may be stored: nobody has asked for it yet.

        Raises:
            TaskNotFound: it does not exist, and no unfinished task can ask for it.
            InvalidTransition: the task that could ask for it has ended.
        """
        if (answer := self._moves.repository.get_many([answer_id]).get(answer_id)) is not None:
            fields = ("waiting_on",)
            found = self._moves.repository.find("id", [answer_id], fields)
            return answer, next((on for (on,) in found), None)
        if not answer_id.startswith(lifecycle.EVENT):
            askers = lifecycle.askers(answer_id)
            statuses = self._moves.repository.statuses(askers)
            asker = next((one for one in askers if one in statuses), None)
            if asker is None:
                raise TaskNotFound(answer_id)
            if statuses[asker] in lifecycle.FINISHED:
                raise InvalidTransition(
                    f"nobody can ask for the answer {answer_id}: task {asker} is {statuses[asker]}"
                )
        return None, None

    def wake_one(self, task_id: str) -> bool:
        """Let a task start now that waits for its time: see ``Queue.wake``."""
        task = self._moves.repository.get_by_id(task_id)
        if task.status is not TaskStatus.PENDING or task.run_at is None:
            return False
        now, checkpoints = self._moves.now_ms(), None
        if lifecycle.is_parked(task):
            if task.damage:
                raise RepositoryCorrupt(f"task {task_id} cannot be woken: {task.damage}")
            checkpoints = awake(task.checkpoints, to_ms(task.run_at), now)
        writes = [lifecycle.wake_early(task, now, checkpoints)]
        if to_ms(task.run_at) > now and not lifecycle.is_parked(task):
            writes.append(lifecycle.end_delay(task, now))
        return any(self._commit(writes, {task_id: task}))

    # --- delete

    def delete_one(self, task_id: str) -> None:
        """Delete a task; raise if it runs: see ``Queue.delete``."""
        lists = [*self._lists([task_id])]
        if lists and self._moves.repository.statuses(lists).get(task_id) in lifecycle.UNFINISHED:
            raise InvalidTransition(
                f"{task_id} is the list of a task's children, by which that task finds them: it cannot be "
                "deleted before that task has ended"
            )
        if not self._commit([lifecycle.delete(task_id)])[0]:
            raise lifecycle.not_deleted(self._moves.repository.get_by_id(task_id))

    def delete(self, chosen: Chosen, terms: Terms = PLAIN) -> Bulk:
        """Delete the chosen tasks; of those that match, the ones stay that unfinished tasks need."""
        if (status := chosen.filter.status) is TaskStatus.RUNNING:
            raise ConfigurationError("running tasks cannot be deleted: cancel them first")
        statuses = (status,) if chosen.ids is None else ()
        return self._change("delete", chosen, statuses, terms, self._delete_page)

    def _delete_page(self, page: Page, _: Selection, tally: Tally) -> None:
        ids, tasks = page
        reasons = {i: "running" for i, t in tasks.items() if t.status is TaskStatus.RUNNING}
        reasons.update((i, "thread") for i, task in tasks.items() if task.stuck_on)
        free = {i: task for i, task in tasks.items() if i not in reasons}
        if free:
            reasons.update(dict.fromkeys(self._needed(free), "needed"))
        writes = [
            lifecycle.discard(tasks[i]) if i in tasks else lifecycle.delete(i)
            for i in ids
            if i not in reasons
        ]
        results = self._commit(writes, {} if tasks else None) if writes else []
        deleted = sum(results)
        skipped = [*reasons.values(), *["changed"] * (len(results) - deleted)]
        tally.add(len(ids), tasks, changed=deleted, skipped=skipped)

    def _needed(self, tasks: Mapping[str, Task]) -> set[str]:
        """Return the tasks on which unfinished tasks depend that are not deleted with them.

        An executor may still ask for the results of its parents, and for those of the children in a list.
        """
        families = [*queries.families(self._moves.repository, tasks)]
        lists = [task for task in tasks.values() if task.type == lifecycle.CHILDREN]
        families += [(listed.id, listed.params.get("parent", "")) for listed in lists]
        others = [*{child for _, child in families}]
        statuses = self._moves.repository.statuses(others) if others else {}
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
        self, writes: Sequence[Write], tasks: Mapping[str, Task] | None = None
    ) -> Sequence[bool]:
        self._moves.repository.transactions.refuse_write()
        results = self._moves.commit(writes, tasks)
        self._moves.process_if_unattended()
        return results
