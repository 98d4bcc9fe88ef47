"""Handles on tasks, and the watcher that resolves those that somebody waits on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from taskx.core.errors import (
    InvalidTransition,
    QueueStopped,
    RepositoryCorrupt,
    RepositoryError,
    TaskFailed,
    TaskNotFound,
)
from taskx.core.log import GuardedLogger
from taskx.core.model import Task, TaskStatus
from taskx.runtime.complaint import Complaint
from taskx.storage.base import Repository

R = TypeVar("R")

_LAZY = frozenset({"_condition", "_waiters", "_done_callbacks"})
# How often a waiter in a process that runs no queue looks for changes, in seconds.
_POLL = 0.02
_LOOK_ANYWAY = 1.0


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def cancel_task(self, task_id: str, /) -> bool: ...
    def watch(self, handle: TaskHandle[Any], /) -> None: ...


class TaskHandle(Future[R]):
    """A task as a ``concurrent.futures.Future``, made by ``submit`` or, anywhere, by ``queue.handle``.

    Works with ``wait``, ``as_completed`` and ``asyncio.wrap_future``. ``result()`` returns what the
    executor returned as JSON gives it back; it raises ``TaskFailed`` for a failed task,
    ``concurrent.futures.CancelledError`` for a cancelled one, and ``RepositoryCorrupt`` for one whose
    record is damaged.

    Attributes:
        id: the task's id.
    """

    def __init__(self, task_id: str, owner: _Owner) -> None:
        # Not super().__init__(): its condition costs more than the rest of a submit. It is made, and
        # the task watched, when somebody first looks (__getattr__).
        self.id = task_id
        self._owner = owner
        self._state = "PENDING"
        self._result = None
        self._exception = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in _LAZY:
                raise AttributeError(name)
            if self._activate():
                self._owner.watch(self)
            return self.__dict__[name]

    def _activate(self) -> bool:
        with _activation:
            if "_condition" in self.__dict__:
                return False
            state, result, exception = self._state, self._result, self._exception
            super().__init__()
            self._state, self._result, self._exception = state, result, exception
            return True

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"

    @property
    def ended_badly(self) -> bool:
        """Whether it is known already, without a look, that the task did not complete."""
        return self._exception is not None or self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def task(self) -> Task:
        """The task's record as it is now; ``TaskNotFound`` if it was deleted."""
        return self._owner.get_task_status(self.id)

    def cancel(self) -> bool:
        """Cancel the task: True if it never runs, False if it runs (it is asked to stop) or has ended.

        Raises:
            TaskNotFound: it was deleted.
        """
        try:
            cancelled = self._owner.cancel_task(self.id)
        except InvalidTransition:
            return False
        if cancelled:
            self.conclude_cancelled()
        return cancelled

    def running(self) -> bool:
        """Whether an executor works on it now."""
        return self.task().status is TaskStatus.RUNNING

    # --- for the watcher

    def conclude(self, task: Task | None) -> bool:
        """Resolve the handle if the task has ended; None stands for a deleted one."""
        if task is not None and not task.status.finished:
            return False
        if task is None:
            self._conclude(lambda: self.set_exception(TaskNotFound(self.id)))
        elif task.status is TaskStatus.COMPLETED and task.damage:
            self._conclude(lambda: self.set_exception(RepositoryCorrupt(task.damage)))
        elif task.status is TaskStatus.COMPLETED:
            self._conclude(lambda: self.set_result(task.result))
        elif task.status is TaskStatus.FAILED:
            failed = TaskFailed(task.id, task.error, _last_attempt(task), task.traceback)
            self._conclude(lambda: self.set_exception(failed))
        else:
            self.conclude_cancelled()
        return True

    def conclude_cancelled(self) -> None:
        """Resolve the handle as cancelled, callbacks included."""
        self._conclude(self._set_cancelled)

    def _set_cancelled(self) -> None:
        super().cancel()
        super().set_running_or_notify_cancel()

    def conclude_closed(self) -> None:
        """Resolve the handle as one that nobody looks after any more."""
        closed = QueueStopped(
            f"the queue was closed before task {self.id} had ended; another queue's handle tells"
        )
        self._conclude(lambda: self.set_exception(closed))

    def _conclude(self, conclude: Callable[[], None]) -> None:
        self._activate()
        me = object()
        if self.__dict__.setdefault("_concluded_by", me) is me:  # atomic: only one gets through
            conclude()

    def _invoke_callbacks(self) -> None:
        """Call what ``add_done_callback`` was given, on a thread of its own: it may block."""
        if self._done_callbacks:  # type: ignore[attr-defined]
            call = super()._invoke_callbacks  # type: ignore[misc]
            try:
                threading.Thread(target=call, name="taskx-callbacks", daemon=True).start()
            except RuntimeError:
                call()  # no new thread can be had while the interpreter shuts down


_activation = threading.Lock()


def _renew_after_fork() -> None:
    global _activation
    _activation = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def _last_attempt(task: Task) -> int:
    """The number of a failed task's last attempt: one that crashed is in no count of errors."""
    crashed = bool(task.attempts) and task.attempts[-1].outcome == "crashed"
    return max(1, task.errors + crashed)


class Watcher:
    """Resolves the handles that somebody looks at, when their tasks have ended.

    In a started queue the workers and the scheduler tell it to look; else it has a thread of its
    own as long as there is something to watch.
    """

    def __init__(self, repository: Repository, log: GuardedLogger) -> None:
        self._repository = repository
        self._log = log
        self._lock = threading.Lock()
        self._handles: dict[str, list[TaskHandle[Any]]] = {}
        self._driven = False
        self._polling = False
        self._closed = False

    @property
    def watching(self) -> bool:
        """Whether somebody waits for a task."""
        return bool(self._handles)

    def watch(self, handle: TaskHandle[Any]) -> None:
        """Resolve the handle when its task has ended, at once if it has.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        with self._lock:
            self._handles.setdefault(handle.id, []).append(handle)
        try:
            self.look([handle.id])
        finally:
            self._ensure_polling()
        if self._closed:
            self.close()

    def close(self) -> None:
        """Resolve no more: who waits for a task that has not ended is told so."""
        self._closed = True
        with self._lock:
            left = [handle for handles in self._handles.values() for handle in handles]
            self._handles.clear()
        for handle in left:
            handle.conclude_closed()

    def drive(self, driven: bool) -> None:
        """Say whether a started queue tells when to look."""
        self._driven = driven
        if not driven:
            self._ensure_polling()

    def look_if_watched(self, task_id: str) -> None:
        """Look at a task that just ended, if somebody waits for it.

        What it ended by is committed, so a failure to read is none of that: it is looked at again soon.
        """
        if task_id in self._handles:
            try:
                self.look([task_id])
            except RepositoryError as error:
                self._log.debug("who waits for task %s is told later: %s", task_id, error)

    def look(self, task_ids: Sequence[str] | None = None) -> None:
        """Look at these tasks, or at all that are watched, and resolve what has ended.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        ids = list(self._handles) if task_ids is None else task_ids
        if not ids:
            return
        found = self._repository.get_many(ids)
        for task_id in ids:
            task = found.get(task_id)
            if task is None or task.status.finished:
                with self._lock:
                    handles = self._handles.pop(task_id, [])
                for handle in handles:
                    handle.conclude(task)

    def _ensure_polling(self) -> None:
        with self._lock:
            if self._driven or self._polling or self._closed or not self._handles:
                return
            self._polling = True
        threading.Thread(target=self._poll, name="taskx-watch", daemon=True).start()

    def _poll(self) -> None:
        looked = time.monotonic()
        complaint = Complaint(self._log)
        while True:
            with self._lock:
                if self._driven or not self._handles:
                    self._polling = False
                    return
            try:
                if self._repository.changed() or time.monotonic() - looked > _LOOK_ANYWAY:
                    looked = time.monotonic()
                    self.look()
                    complaint.over()
            except RepositoryError as error:
                complaint.make("cannot see whether tasks have ended: %s", error)
                time.sleep(1.0)
            time.sleep(_POLL)

    def renew_after_fork(self) -> None:
        """In a forked child: nothing is watched."""
        self._lock = threading.Lock()
        self._handles.clear()
        self._driven = self._polling = False
