"""The methods of a queue that change stored tasks, and steer the queues of all processes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from taskx.attempt.waiting import AGAIN_TEXT
from taskx.node import requests
from taskx.node.retention import prune_all
from taskx.queue.bulk import Bulk, OnProgress, Terms
from taskx.queue.parts import Parts
from taskx.stores.controls import Controls
from taskx.stores.selecting import Chosen, dead, deliberate, given
from taskx.tasks import payload
from taskx.tasks.checks import Duration
from taskx.tasks.creation import MAX_TEXT
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import TaskFilter, TaskStatus, check_key, check_name, check_part
from taskx.tasks.options import FilterOptions, TuneOptions, filter_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.insight.failures import FailureGroup


def _again(done: Bulk) -> int:
    """Return the number of tasks that run again."""
    return done.changed + done.more


class Steering(Parts):
    """Changes to stored tasks, pauses, overrides, and requests to nodes. The queue need not be started."""

    def cancel_task(self, task_id: str, *, connection: object = None) -> bool:
        """Cancel a task.

        Args:
            task_id: the task's id.
            connection: cancel it in your transaction on this connection: see :meth:`submit`. A running
                task is asked to stop after your commit.

        Returns:
            True if the task will never run; False if it is running and was asked to stop.

        Raises:
            TaskNotFound: no task has this id.
            InvalidTransition: the task has ended, or is the list of another one's children.
            RepositoryCorrupt: the record is so damaged that it cannot be cancelled.
        """
        with self._changing(connection) as operations:
            return operations.cancel_one(check_name(task_id, "id"))

    def finish(
        self,
        task_id: str,
        result: Any = None,
        *,
        error: str = "",
        again: bool = False,
        by: str = "",
    ) -> bool:
        """End an answer, for which a task may wait: see :meth:`Context.ask`.

        Nobody needs to have asked for it: the id must begin with the id of an unfinished task and ``/``, or
        with ``event/``.

        Args:
            task_id: the id of the answer.
            result: a JSON value.
            error: a text, instead of a result: the answer has failed.
            again: True, instead of a result: what :meth:`Context.once` asks about shall be done again.
            by: who has given it, for the record and the log of changes.

        Returns:
            True for the first call; False if the answer has ended, also by its time-out.

        Raises:
            TaskNotFound: there is no such answer, and no task that could ask for it.
            InvalidTransition: the task is no answer, or the answer waits for other tasks, or the task that
                could ask for it has ended; or with ``again``, it is not about a call.
            PayloadError: the result is not JSON, or is too large.
            ConfigurationError: another argument is not valid, or the repository has only eight methods.
            RepositoryError: the repository failed.
        """
        check_key(task_id, "id")
        if (result is not None) + bool(error) + again > 1:
            raise ConfigurationError("an answer has a result or an error: give only one of them")
        text = AGAIN_TEXT if again else None
        if result is not None:
            text = payload.encode(result, "result", self._registry.max_payload_size)
        words = payload.clean_text(error, MAX_TEXT) if isinstance(error, str) else error
        check_part(words, "error")
        with self._changing() as operations:
            done = operations.finish_one(task_id, text, words, check_name(by, "by"), again=again)
        if done and by:
            self.note_change(by, "finish", task_id)
        return done

    def wake(self, task_id: str) -> bool:
        """Let a task start now that waits for a time: a sleep, a retry or a delay ends.

        It still waits for its parents and for its turn.

        Returns:
            False if the task does not wait for a time.

        Raises:
            TaskNotFound: no task has this id.
            RepositoryCorrupt: the record is damaged.
        """
        with self._changing() as operations:
            return operations.wake_one(check_name(task_id, "id"))

    def cancel_many(self, task_ids: Iterable[str]) -> int:
        """Cancel the given tasks in a few transactions; tasks that have ended stay unchanged.

        Returns:
            the number of tasks that will never run. Running tasks do not count: they were asked to
            stop.

        Raises:
            RepositoryError: the repository failed; some tasks may have been cancelled.
        """
        with self._changing() as operations:
            bulk = operations.cancel(given(task_ids))
        return bulk.changed - bulk.asked

    def requeue(
        self,
        task_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        from_step: str | None = None,
    ) -> None:
        """Run a failed or cancelled task again; its attempts and crashes are counted from zero.

        Tasks that failed or were cancelled because of it, such as the rest of a chain, wait for it
        again. The task waits for parents that have not ended. It runs even if parents have failed.

        The results of its steps and its cursor are kept, also with other params: the task goes on where it
        was. What the requeue changes is noted in ``task.attempts``, with the outcome ``requeued``.

        Args:
            task_id: the id of the task.
            params: other params, checked as by :meth:`submit` if the type is registered here; None to keep
                them.
            from_step: run from this step on: its result is removed, with those of all steps that were
                stored after it, answers that the task has not seen yet, and the cursor. None to keep them.

        Raises:
            TaskNotFound: no task has this id.
            InvalidTransition: the task is neither failed nor cancelled.
            DuplicateTask: another task holds its unique key now.
            PayloadError: params are not JSON, are too large, do not fit the function, or a codec refuses
                them.
            ConfigurationError: the task has stored no such step.
            RepositoryCorrupt: the record is damaged, and the requeue would change it.
            QueueStopped: the queue was stopped.
        """
        with self._changing() as operations:
            operations.requeue_one(check_name(task_id, "id"), params, from_step)

    def requeue_many(self, task_ids: Iterable[str]) -> int:
        """Requeue the given tasks if they failed or were cancelled, in a few transactions.

        Each task waits again for its parents among them. A task whose unique key is now held by another
        task stays unchanged.

        Returns:
            the number of tasks that run again, including those that had ended because of the given
            tasks.

        Raises:
            TaskxError: as in :meth:`requeue_all`.
        """
        with self._changing() as operations:
            return _again(operations.requeue(given(task_ids)))

    def requeue_all(
        self,
        filter: TaskFilter | None = None,
        *,
        rate: str | tuple[int, Duration] | None = None,
        dry_run: bool = False,
        at_most: int | None = None,
        on_progress: OnProgress | None = None,
        **fields: Unpack[FilterOptions],
    ) -> Bulk:
        """Requeue all tasks that match, newest first, in batches; without a status, the failed ones.

        Tasks that failed or were cancelled because of them run again after them. A task that fails again
        in the meantime is not requeued a second time. After an error or an interrupt, the batches before it
        are done: call it again to go on.

        Args:
            filter, fields: as in :meth:`list_tasks`. All that match are requeued, or ``limit`` of them.
            rate: the tasks start one by one at this rate, such as ``"100/m"``, each at its ``run_at``: the
                calling process need not stay alive for that. Later calls with the same conditions (dates
                do not count) and the same rate continue after the last of these tasks.
            dry_run: only count the tasks.
            at_most: the largest number that a dry run counts, as in :meth:`count_tasks`; only with
                ``dry_run``.
            on_progress: a function that gets a :class:`Bulk` after each batch. If it raises, no further
                batch is changed.

        Raises:
            ConfigurationError: an argument is not valid, or the status is neither failed nor cancelled.
            QueueStopped: the queue was stopped.
            RepositoryError: the repository failed; some batches may have been requeued.
        """
        wanted = filter_of(filter, fields, "requeue_all", self.clock)
        terms = Terms(dry_run, at_most, on_progress)
        with self._changing() as operations:
            return operations.requeue(Chosen(filter=wanted), terms, rate=rate)

    def requeue_failures(
        self,
        group: FailureGroup,
        *,
        rate: str | tuple[int, Duration] | None = None,
        dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Bulk:
        """Requeue all failed tasks of a group of :meth:`failures`, also those that it has not read.

        They are the failed tasks of the same type, class of error and place in the code. For that, all
        failed tasks of this type and class of error are read, a batch at a time. On a repository with only
        the eight methods, they are the ``task_ids`` of the group.

        Args:
            group: the group.
            rate, dry_run, on_progress: as in :meth:`requeue_all`.

        Raises:
            TaskxError: as in :meth:`requeue_all`.
        """
        from taskx.insight.failures import tasks_of

        terms = Terms(dry_run, None, on_progress)
        with self._changing() as operations:
            return operations.requeue(tasks_of(group, self.repository), terms, rate=rate)

    def cancel_all(
        self,
        filter: TaskFilter | None = None,
        *,
        everything: bool = False,
        dry_run: bool = False,
        at_most: int | None = None,
        on_progress: OnProgress | None = None,
        **fields: Unpack[FilterOptions],
    ) -> Bulk:
        """Cancel all pending tasks that match and ask the running ones to stop, in batches.

        Args:
            filter, fields: as in :meth:`list_tasks`. All that match are cancelled, or ``limit`` of them.
            everything: must be True if there is no condition.
            dry_run, at_most, on_progress: as in :meth:`requeue_all`.

        Raises:
            ConfigurationError: an argument is not valid, or the status is that of ended tasks.
            RepositoryError: the repository failed; some batches may have been cancelled.
        """
        wanted = filter_of(filter, fields, "cancel_all", self.clock)
        chosen = deliberate(wanted, "cancel_all", everything=everything)
        with self._changing() as operations:
            return operations.cancel(chosen, Terms(dry_run, at_most, on_progress))

    def delete_all(
        self,
        filter: TaskFilter | None = None,
        *,
        everything: bool = False,
        dry_run: bool = False,
        at_most: int | None = None,
        on_progress: OnProgress | None = None,
        **fields: Unpack[FilterOptions],
    ) -> Bulk:
        """Delete the records of all tasks that match, in batches: also of those that have not run.

        These stay: running tasks, tasks with a thread that still runs, and tasks on which an unfinished
        task depends that stays.

        Args:
            filter, fields: as in :meth:`list_tasks`. All that match are deleted, or ``limit`` of them.
            everything: must be True if there is no condition.
            dry_run, at_most, on_progress: as in :meth:`requeue_all`. A dry run also counts tasks that stay.

        Raises:
            ConfigurationError: an argument is not valid, or the status is running.
            RepositoryError: the repository failed; some batches may have been deleted.
        """
        wanted = filter_of(filter, fields, "delete_all", self.clock)
        chosen = deliberate(wanted, "delete_all", everything=everything)
        with self._changing() as operations:
            return operations.delete(chosen, Terms(dry_run, at_most, on_progress))

    def delete(self, task_id: str) -> None:
        """Delete the record of a task that is not running.

        Raises:
            TaskNotFound: no task has this id.
            InvalidTransition: the task is running, or a thread of an ended attempt still runs
                (``stuck_on``); or it is the list of the children of an unfinished task.
        """
        with self._changing() as operations:
            operations.delete_one(check_name(task_id, "id"))

    def delete_many(self, task_ids: Iterable[str]) -> int:
        """Delete the records of the given tasks that are not running, in a few transactions.

        Returns:
            the number of tasks that were deleted. The others run, have a thread that still runs, or do not
            exist.

        Raises:
            RepositoryError: the repository failed; some tasks may have been deleted.
        """
        with self._changing() as operations:
            return operations.delete(given(task_ids)).changed

    def prune(self, before: datetime, status: TaskStatus | str | None = None) -> int:
        """Delete tasks that ended before a given time, a few in each transaction.

        A task stays while a task that depends on it is stored, and while it holds a unique key for a
        number of seconds.

        Args:
            before: an aware datetime.
            status: delete only completed, failed or cancelled tasks; by default all three.

        Returns:
            the number of deleted tasks.

        Raises:
            ConfigurationError: an argument is not valid, or this thread is in a transaction of its own.
            RepositoryError: the repository failed; some tasks may have been deleted.
        """
        self._joining.refuse()
        return prune_all(self._moves, self._timing, before, status)

    # --- dead letters

    def requeue_dead_letters(
        self, filter: TaskFilter | None = None, **fields: Unpack[FilterOptions]
    ) -> int:
        """Requeue dead letters, as :meth:`requeue_all` does.

        Without a limit all matches are requeued, although :meth:`dead_letters` lists only 100.

        Args:
            filter, fields: as in :meth:`list_tasks`. The newest ones are requeued if they have a limit.

        Returns:
            the number of tasks that run again, including those that had ended because of the dead
            letters.

        Raises:
            ConfigurationError: the filter is not valid, or it has another status.
            QueueStopped: the queue was stopped.
        """
        wanted = filter_of(filter, fields, "requeue_dead_letters", self.clock)
        with self._changing() as operations:
            return _again(operations.requeue(Chosen(filter=dead(wanted))))

    def discard_dead_letters(
        self, filter: TaskFilter | None = None, **fields: Unpack[FilterOptions]
    ) -> int:
        """Delete dead letters, as :meth:`delete_all` does.

        Args:
            filter, fields: as in :meth:`requeue_dead_letters`.

        Returns:
            the number of deleted tasks.

        Raises:
            ConfigurationError: the filter is not valid, or it has another status.
        """
        wanted = filter_of(filter, fields, "discard_dead_letters", self.clock)
        with self._changing() as operations:
            return operations.delete(Chosen(filter=dead(wanted))).changed

    # --- pausing, tuning and stopping

    def pause(self, type: str | None = None) -> None:
        """Pause a type in all processes: none of its tasks starts. With None, pause all types.

        The pause lasts until :meth:`resume`, even after restarts. Running tasks go on, and submitted
        tasks are stored. In this process the pause is in effect when the call returns, except for a
        start that is being written at that moment; in other processes within a second.

        A type that is not registered, not declared, and not run by any running queue is paused, too, but
        a warning is logged: the type may be misspelt.

        Raises:
            ConfigurationError: the type is not a valid name, or the repository has only the eight
                methods.
            RepositoryError: the repository failed.
        """
        with self._joining.changing() as door:
            Controls(door.repository).pause(type)
            door.after(self._check_controls)
        self._warn_if_misspelt(type, "paused")

    def _warn_if_misspelt(self, type: str | None, what: str) -> None:
        if type is not None and not self._registry.knows(type) and self._nobody_runs(type):
            self._log.warning(
                "type %r is %s, but no running queue has an executor for it; is it misspelt? This queue "
                "knows: %s",
                type,
                what,
                self._registry.known,
            )

    def resume(self, type: str | None = None) -> None:
        """End the :meth:`pause` of the same type. With None, types paused by name stay paused.

        Raises:
            ConfigurationError: the type is not a valid name.
            RepositoryError: the repository failed.
        """
        with self._joining.changing() as door:
            Controls(door.repository).resume(type)
            door.after(self._check_controls)

    def _check_controls(self) -> None:
        if self._pool is not None:
            self._pool.tuning.refresh()
            self._agenda.wake_from_long_sleep()

    def tune(
        self,
        type: str | None = None,
        *,
        limit: str | None = None,
        workers: int | None = None,
        node: str | None = None,
        **limits: Unpack[TuneOptions],
    ) -> None:
        """Override the limits of a type, a limit with a name, or the number of workers, in all processes.

        The overrides are stored: they last until :meth:`untune`, even after restarts. In this process they
        are in effect when the call returns, in other processes within a second. Overrides that were set
        before and are not named here stay.

        If a limit is lowered, running tasks go on, and none starts until enough have ended. Workers that
        are added start within moments. Surplus workers end after their current task.

        A type that no queue runs is tuned, too, but a warning is logged: it may be misspelt.

        Args:
            type: the type whose limits to override.
            limit: the name of the limit to override, of which ``concurrency``, ``rate``, ``burst`` and
                ``share`` are given as for :meth:`Queue.limit`; not together with a type.
            workers: the number of workers of each node; not together with a type.
            node: the id of a node: only this one gets ``workers``, whatever the others have.
            max_concurrency: most tasks of the type that run at the same time; None for no limit.
            rate: most tasks that start in a period, as ``"100/m"`` or ``(count, seconds)``; None for no
                limit.
            burst: most tasks that may start at once after a quiet period; None for the count of ``rate``.
            limit_scope: ``"node"`` or ``"global"``; None for ``"node"``.
            concurrency: most tasks that run at the same time under the limit with this name.
            share: the weight with which each key of this limit shares the workers; None for no shares.

        Raises:
            ConfigurationError: an argument is not valid, the repository has only the eight methods, or this
                thread is in a transaction of its own.
            NodeNotFound: no live node has this id.
            RepositoryError: the repository failed.
        """
        from taskx.queue.tuning import tune

        self._joining.refuse()
        tune(self.repository, self._controls, type, limit, limits, workers, node)
        self._check_controls()
        self._warn_if_misspelt(type, "tuned")

    def untune(
        self,
        type: str | None = None,
        *,
        limit: str | None = None,
        only: Collection[str] | None = None,
        workers: bool = False,
        node: str | None = None,
    ) -> None:
        """Remove overrides: the values of the executors and programs apply again.

        Args:
            type: the type whose limits are no longer overridden.
            limit: the name of the limit that is no longer overridden.
            only: the names of the limits, such as ``["rate"]``, if not all of the type's.
            workers: True: the number of workers is no longer overridden; not together with a type.
            node: with ``workers``, the id of a node: only the number of this node is removed.

        Raises:
            ConfigurationError: an argument is not valid, the repository has only the eight methods, or this
                thread is in a transaction of its own.
            RepositoryError: the repository failed.
        """
        from taskx.queue.tuning import untune

        self._joining.refuse()
        untune(self.repository, self._controls, type, limit, only, workers, node)
        self._check_controls()

    def hold(self, name: str, until: datetime | Duration) -> None:
        """Let nothing start under a limit until then, in all processes; running tasks go on.

        A hold begins at once in this process, in other processes within a second. When it ends, tasks start
        at the limit's rate, without a burst. ``Snooze(…, limit=True)`` holds limits from an executor.

        Args:
            name: the name of a limit; ``type/`` and a type for all tasks of the type; or a key that has a
                colon, or the beginning of keys that ends in one.
            until: an aware datetime, or seconds (or a ``timedelta``) from now. A limit that is held longer
                stays held: :meth:`release` it first.

        Raises:
            ConfigurationError: an argument is not valid, the repository has only the eight methods, or this
                thread is in a transaction of its own.
            RepositoryError: the repository failed.
        """
        from taskx.queue.tuning import hold

        self._joining.refuse()
        hold(self.repository, self._controls, self._registry, self.clock, self._log, name, until)
        self._check_controls()

    def release(self, name: str) -> bool:
        """End the :meth:`hold` of a limit: its tasks start at its rate from now on, without a burst.

        The tasks of a key that was held may take ten seconds to notice it.

        Returns:
            False if the limit was not held.

        Raises:
            ConfigurationError: as for :meth:`hold`.
            RepositoryError: the repository failed.
        """
        from taskx.queue.tuning import release

        self._joining.refuse()
        was_held = release(self.repository, self._controls, self.clock, name)
        self._check_controls()
        return was_held

    def stop_node(self, node_id: str) -> None:
        """Ask a node to stop, in this or another process, and return at once.

        The node gets the request within about a second. It then takes no more tasks, and its running tasks
        can go on as after :meth:`stop` with 30 seconds. A program that :func:`taskx.run` or a supervisor
        runs ends as after SIGTERM. In other programs only the queue stops.

        Args:
            node_id: the id of the node, from :meth:`nodes`.

        Raises:
            NodeNotFound: no live node has this id.
            ConfigurationError: the node belongs to a worker of Celery or Dramatiq, which is stopped in
                their way; the repository has only the eight methods; or this thread is in a transaction of
                its own.
            RepositoryError: the repository failed.
        """
        requests.stop_node(self.repository, self._controls, self._timing, node_id)

    def note_change(self, by: str, action: str, target: str, detail: Any = None) -> None:
        """Add an entry to the log of changes.

        The command line and the dashboard call this for each change. The methods of the queue do not,
        because they do not know who calls.

        Args:
            by: the person or program that made the change.
            action: the name of the action, such as ``"cancel"``.
            target: the thing that was changed: a task's id, a type, a filter.
            detail: more about the change: a JSON value of at most 10,000 bytes.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            PayloadError: ``detail`` is not JSON or too large.
            RepositoryError: the repository failed.
        """
        from taskx.insight.changelog import note_change

        with self._joining.changing() as door:
            note_change(door.repository, self.clock, self._timing, by, action, target, detail)
