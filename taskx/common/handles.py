"""Handles on tasks: Futures that the watcher resolves.

An exception can strike the main thread between any two steps. So nothing here takes a lock that it could
leave locked, and nothing is marked as done before it is: a handle has ended once its one attribute
``_outcome`` is set, and is watched as long as the watcher has it. What was cut short is done again by
whoever looks next. Others are told by threads that no such exception reaches.
"""

from __future__ import annotations

import _thread
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import attrs

from taskx.common.bell import Signal
from taskx.core.errors import (
    InvalidTransition,
    QueueStopped,
    RepositoryCorrupt,
    TaskFailed,
    TaskNotFound,
)
from taskx.core.model import Task, TaskStatus

R = TypeVar("R")

#: Polling interval, in seconds, of a thread that waits: the thread that should wake it may be gone.
POLL_INTERVAL = 1.0


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def cancel_task(self, task_id: str, /) -> bool: ...
    def watch(self, handle: TaskHandle[Any], /) -> None: ...


class _Watches(Protocol):
    signal: Callable[[], Signal]


class _Outcome(NamedTuple):
    state: str
    result: Any = None
    exception: BaseException | None = None


_CANCELLED = _Outcome(CANCELLED_AND_NOTIFIED)

#: Is called once with a handle that has ended.
Listener = Callable[["TaskHandle[Any]"], None]


class TaskHandle(Future[R]):
    """A task as a ``concurrent.futures.Future``, made by ``submit`` or, anywhere, by ``queue.handle``.

    Works with ``wait``, ``as_completed`` and ``asyncio.wrap_future``. ``result()`` returns what the
    executor returned as JSON gives it back; it raises ``TaskFailed`` for a failed task,
    ``concurrent.futures.CancelledError`` for a cancelled one, and ``RepositoryCorrupt`` for one whose
    record is damaged.

    Attributes:
        id: the task's id.
    """

    _outcome: _Outcome | None = None
    #: The watcher that has registered the handle and looked at its task since; in a forked child the
    #: queue has another one.
    watched_by: _Watches | None = None

    def __init__(self, task_id: str, owner: _Owner) -> None:
        # Not super().__init__(): its condition costs more than the rest of a submit.
        self.id = task_id
        self._owner = owner

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"

    @property
    def ended_badly(self) -> bool:
        """True if memory says, without a look, that the task did not complete."""
        outcome = self._outcome
        return outcome is not None and (outcome is _CANCELLED or outcome.exception is not None)

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
            self._resolve(_CANCELLED)
        return cancelled

    def running(self) -> bool:
        """Return True if an executor works on it now."""
        return self.task().status is TaskStatus.RUNNING

    def done(self) -> bool:
        """Return True if the task has ended.

        The first call looks at the repository; later ones look at memory only.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        if self._outcome is None:
            self._owner.watch(self)
        return self._outcome is not None

    def cancelled(self) -> bool:
        """Return True if the task was cancelled.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        return self.done() and self._outcome is _CANCELLED

    def result(self, timeout: float | None = None) -> R:
        """Wait until the task has ended, and return what its executor returned.

        Args:
            timeout: seconds to wait at most; None waits for ever.

        Raises:
            TaskFailed: the task failed.
            concurrent.futures.CancelledError: it was cancelled.
            concurrent.futures.TimeoutError: it has not ended within ``timeout`` seconds.
            TaskNotFound: it was deleted.
            RepositoryCorrupt: its record is damaged.
            QueueStopped: the queue was closed before the task had ended.
            RepositoryError: the repository cannot be read.
        """
        outcome = self._wait(timeout)
        try:
            if outcome.state != FINISHED:
                raise CancelledError(f"task {self.id} was cancelled")
            if outcome.exception is not None:
                raise outcome.exception
            result: R = outcome.result
            return result
        finally:
            del self, outcome  # or the exception would hold them by its traceback

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until the task has ended, and return what :meth:`result` raises; None if it completed.

        Raises:
            concurrent.futures.CancelledError: it was cancelled.
            concurrent.futures.TimeoutError: it has not ended within ``timeout`` seconds.
            RepositoryError: the repository cannot be read.
        """
        outcome = self._wait(timeout)
        if outcome.state != FINISHED:
            raise CancelledError(f"task {self.id} was cancelled")
        return outcome.exception

    def add_done_callback(self, fn: Callable[[Future[R]], object]) -> None:
        """Have ``fn(handle)`` called once when the task has ended, on a thread of its own.

        It is called at once, on this thread, if the task has ended already. The handle is kept until
        then, though nobody else has it.

        Raises:
            RepositoryError: the repository cannot be read; ``fn`` is not called.
        """
        callback = _Callback(fn)
        self._listen(callback)
        if self._outcome is None:
            try:
                self._owner.watch(self)
            except BaseException:  # the caller is told that it was not added
                self._unlisten(callback)
                raise
            self._tell_if_ended(callback)

    def _wait(self, timeout: float | None) -> _Outcome:
        if self._outcome is None:
            self._owner.watch(self)
        if self._outcome is None:
            self._sleep(timeout)
        if self._outcome is None:
            raise TimeoutError(f"task {self.id} has not ended within {timeout:g} s")
        return self._outcome

    def _sleep(self, timeout: float | None) -> None:
        bell = self.signal()
        deadline = None if timeout is None else bell.now() + timeout
        self._listen(bell)
        try:
            while self._outcome is None:
                left = math.inf if deadline is None else deadline - bell.now()
                if left <= 0:
                    return
                if not bell.wait(left if bell.virtual else min(left, POLL_INTERVAL)):
                    self._owner.watch(self)  # renewed: whoever should ring may be gone
        finally:
            self._unlisten(bell)

    def signal(self) -> Signal:
        """Return a signal to wait with for the end of the task."""
        return Signal() if self.watched_by is None else self.watched_by.signal()

    # --- who waits for its end

    @property
    def listeners(self) -> list[Listener]:
        """The listeners to tell when the task has ended."""
        found: list[Listener] = self.__dict__.setdefault("_listeners", [])
        return found

    @property
    def has_callbacks(self) -> bool:
        """True if callbacks wait; the watcher then keeps the handle."""
        return _Callback in map(type, self.listeners)

    def _listen(self, listener: Listener) -> None:
        self.listeners.append(listener)  # first: who ends the handle meanwhile sees it
        self._tell_if_ended(listener)

    def _tell_if_ended(self, listener: Listener) -> None:
        if self._outcome is not None and self._unlisten(listener):
            listener(self)

    def _unlisten(self, listener: Listener) -> bool:
        """Remove a listener; False if another thread has taken it, and tells it."""
        try:
            self.listeners.remove(listener)
        except ValueError:
            return False
        return True

    def forget_listeners(self) -> None:
        """Drop the listeners in a forked child: they belong to the parent."""
        self.__dict__.pop("_listeners", None)

    def tell(self) -> None:
        """Tell all who wait that the handle has ended; the watcher calls this."""
        callbacks: list[_Callback] = []
        while self.listeners:
            try:
                listener = self.listeners.pop(0)
            except IndexError:  # another thread tells, too
                break
            if isinstance(listener, _Callback):
                callbacks.append(listener)
            else:
                listener(self)
        if callbacks:
            _call_on_a_thread(self, callbacks)

    # --- for the watcher

    def conclude(self, task: Task | None) -> bool:
        """Note the end of the task if it has ended; None stands for a deleted one."""
        if task is None:
            self._resolve(_Outcome(FINISHED, exception=TaskNotFound(self.id)))
        elif not task.status.finished:
            return False
        elif task.status is TaskStatus.COMPLETED and task.damage:
            self._resolve(_Outcome(FINISHED, exception=RepositoryCorrupt(task.damage)))
        elif task.status is TaskStatus.COMPLETED:
            self._resolve(_Outcome(FINISHED, task.result))
        elif task.status is TaskStatus.FAILED:
            failed = TaskFailed(task.id, task.error, _last_attempt(task), task.traceback)
            self._resolve(_Outcome(FINISHED, exception=failed))
        else:
            self._resolve(_CANCELLED)
        return True

    def conclude_closed(self) -> None:
        """End the handle with ``QueueStopped``: its queue was closed."""
        closed = QueueStopped(
            f"the queue was closed before task {self.id} had ended; another queue's handle tells"
        )
        self._resolve(_Outcome(FINISHED, exception=closed))

    def _resolve(self, outcome: _Outcome) -> None:
        self.__dict__.setdefault("_outcome", outcome)  # in one step, and the first one holds

    # --- what ``wait`` and ``as_completed`` take hold of in a Future

    if not TYPE_CHECKING:

        @property
        def _condition(self):
            return _Stand(self)

        @property
        def _waiters(self):
            return _Waiters(self)

        @property
        def _state(self):
            ident = _thread.get_ident()
            seen = self.__dict__.get("_seen", {})
            return seen.get(ident, self.state_now)

        @property
        def _result(self):
            return None if self._outcome is None else self._outcome.result

        @property
        def _exception(self):
            return None if self._outcome is None else self._outcome.exception

    @property
    def has_ended(self) -> bool:
        """True if the end of the task is known; reads memory only."""
        return self._outcome is not None

    @property
    def state_now(self) -> str:
        """The state, as a ``Future`` names it."""
        return PENDING if self._outcome is None else self._outcome.state


class _Stand:
    """A stand-in for a Future's condition: while a thread has it, the thread sees one state of the handle.

    It is no lock. ``wait`` and ``as_completed`` leave a real one locked when an exception strikes, and
    the thread that ends the handle would then wait for ever.
    """

    def __init__(self, handle: TaskHandle[Any]) -> None:
        self._handle = handle

    def acquire(self) -> bool:
        handle = self._handle
        handle.done()
        handle.__dict__.setdefault("_seen", {})[_thread.get_ident()] = handle.state_now
        return True

    def release(self, *exc_info: object) -> None:
        self._handle.__dict__.get("_seen", {}).pop(_thread.get_ident(), None)

    __enter__, __exit__ = acquire, release


class _Waiters:
    """A stand-in for a Future's list of waiters; each waiter becomes a listener."""

    def __init__(self, handle: TaskHandle[Any]) -> None:
        self._handle = handle

    def append(self, waiter: Any) -> None:
        if not isinstance(waiter.event, Signal):
            # Nobody sets it yet: of Futures that are none of ours, wait() has the locks.
            waiter.event = self._handle.signal()
        if self._handle._state == PENDING:  # else it has been counted among those that have ended
            self._handle._listen(_Waiter(waiter))

    def remove(self, waiter: Any) -> None:
        self._handle._unlisten(_Waiter(waiter))


@attrs.frozen
class _Waiter:
    waiter: Any

    def __call__(self, handle: TaskHandle[Any]) -> None:
        if handle.state_now == CANCELLED_AND_NOTIFIED:
            self.waiter.add_cancelled(handle)
        elif handle._exception is not None:
            self.waiter.add_exception(handle)
        else:
            self.waiter.add_result(handle)


class _Callback:
    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function = function

    def __call__(self, handle: TaskHandle[Any]) -> None:
        try:
            self.function(handle)
        except Exception:  # noqa: BLE001  (as a Future does)
            _log.exception("exception calling callback for %r", handle)


_log = logging.getLogger("concurrent.futures")


def _call_on_a_thread(handle: TaskHandle[Any], callbacks: list[_Callback]) -> None:
    def call() -> None:
        for callback in callbacks:
            try:
                callback(handle)
            except BaseException:  # noqa: BLE001  (one must not keep the next from being called)
                _log.exception("exception calling callback for %r", handle)

    try:
        threading.Thread(target=call, name="taskx-callbacks", daemon=True).start()
    except RuntimeError:  # no new thread can be had
        call()


def _last_attempt(task: Task) -> int:
    """The number of a failed task's last attempt: one that crashed is in no count of errors."""
    crashed = bool(task.attempts) and task.attempts[-1].outcome == "crashed"
    return max(1, task.errors + crashed)
