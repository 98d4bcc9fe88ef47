"""Handles on tasks, and the watcher that resolves those that somebody looks at.

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
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import attrs

from taskx.core.errors import (
    InvalidTransition,
    QueueStopped,
    RepositoryCorrupt,
    RepositoryError,
    TaskFailed,
    TaskNotFound,
)
from taskx.core.lifecycle import FINISHED as ENDED
from taskx.core.log import GuardedLogger
from taskx.core.model import Task, TaskStatus
from taskx.runtime.complaint import Complaint
from taskx.storage.base import Changes, Repository

R = TypeVar("R")

# How often a waiter in a process that runs no queue looks for changes, in seconds.
_POLL = 0.02
_LOOK_ANYWAY = 1.0
# Of its time such a process spends at most a tenth on looking.
_REST = 9
# Ended tasks that are read at once: a record may be large.
_MOST_READ = 50
# Seconds that a close waits for those who wait to be told.
_CLOSING = 1.0


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def cancel_task(self, task_id: str, /) -> bool: ...
    def watch(self, handle: TaskHandle[Any], /) -> None: ...


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
    watched_by: Watcher | None = None

    def __init__(self, task_id: str, owner: _Owner) -> None:
        # Not super().__init__(): its condition costs more than the rest of a submit.
        self.id = task_id
        self._owner = owner

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"

    @property
    def ended_badly(self) -> bool:
        """Whether it is known already, without a look, that the task did not complete."""
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
            self._settle(_CANCELLED)
        return cancelled

    def running(self) -> bool:
        """Whether an executor works on it now."""
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
                raise CancelledError
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
            raise CancelledError
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
            except BaseException:
                self._unlisten(callback)
                raise
            self._tell_if_ended(callback)

    def _wait(self, timeout: float | None) -> _Outcome:
        if self._outcome is None:
            self._owner.watch(self)
        if self._outcome is None:
            self._sleep(timeout)
        if self._outcome is None:
            raise TimeoutError
        return self._outcome

    def _sleep(self, timeout: float | None) -> None:
        bell = _Bell()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._listen(bell)
        try:
            while self._outcome is None:
                left = _LOOK_ANYWAY if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return
                if not bell.wait(min(left, _LOOK_ANYWAY)):
                    self._owner.watch(self)  # renewed: whoever should ring may be gone
        finally:
            self._unlisten(bell)

    # --- who waits for its end

    @property
    def listeners(self) -> list[Listener]:
        """Who is to be told of the end."""
        found: list[Listener] = self.__dict__.setdefault("_listeners", [])
        return found

    @property
    def has_callbacks(self) -> bool:
        """Whether callbacks wait, for which the handle is kept."""
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
        """In a forked child: those who wait are the parent's."""
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
            self._settle(_Outcome(FINISHED, exception=TaskNotFound(self.id)))
        elif not task.status.finished:
            return False
        elif task.status is TaskStatus.COMPLETED and task.damage:
            self._settle(_Outcome(FINISHED, exception=RepositoryCorrupt(task.damage)))
        elif task.status is TaskStatus.COMPLETED:
            self._settle(_Outcome(FINISHED, task.result))
        elif task.status is TaskStatus.FAILED:
            failed = TaskFailed(task.id, task.error, _last_attempt(task), task.traceback)
            self._settle(_Outcome(FINISHED, exception=failed))
        else:
            self._settle(_CANCELLED)
        return True

    def conclude_closed(self) -> None:
        """Note that nobody looks after the handle any more."""
        closed = QueueStopped(
            f"the queue was closed before task {self.id} had ended; another queue's handle tells"
        )
        self._settle(_Outcome(FINISHED, exception=closed))

    def _settle(self, outcome: _Outcome) -> None:
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
        """Whether the end of the task is known; asks nobody."""
        return self._outcome is not None

    @property
    def state_now(self) -> str:
        """The state, as a ``Future`` names it."""
        return PENDING if self._outcome is None else self._outcome.state

    def stand_still(self) -> None:
        """Have this thread see the state as it is now until :meth:`move_on`."""
        self.done()
        self.__dict__.setdefault("_seen", {})[_thread.get_ident()] = self.state_now

    def move_on(self) -> None:
        """Undo :meth:`stand_still`."""
        self.__dict__.get("_seen", {}).pop(_thread.get_ident(), None)


class _Stand:
    """In place of a Future's condition: for a thread that has it the handle's state stands still.

    No lock: ``wait`` and ``as_completed`` leave theirs locked when an exception strikes, and whoever
    ends the handle would wait for ever.
    """

    def __init__(self, handle: TaskHandle[Any]) -> None:
        self._handle = handle

    def acquire(self) -> bool:
        self._handle.stand_still()
        return True

    def release(self) -> None:
        self._handle.move_on()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class _Waiters:
    """In place of a Future's list of waiters: each becomes a listener."""

    def __init__(self, handle: TaskHandle[Any]) -> None:
        self._handle = handle

    def append(self, waiter: Any) -> None:
        if not isinstance(waiter.event, _Bell):
            # Nobody sets it yet: of Futures that are none of ours, wait() has the locks.
            waiter.event = _Bell()
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


class _Bell:
    """An ``Event`` for one thread that waits, made of a raw lock.

    An exception that strikes in an ``Event`` may leave it locked; then whoever sets it waits for ever.
    """

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self.clear()

    def clear(self) -> None:
        """Have the next wait wait."""
        self._lock.acquire(blocking=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it rings; False if ``timeout`` seconds passed before."""
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    def set(self) -> None:
        """Ring."""
        with suppress(RuntimeError):  # it rings already
            self._lock.release()

    def __call__(self, handle: TaskHandle[Any]) -> None:
        self.set()


def _last_attempt(task: Task) -> int:
    """The number of a failed task's last attempt: one that crashed is in no count of errors."""
    crashed = bool(task.attempts) and task.attempts[-1].outcome == "crashed"
    return max(1, task.errors + crashed)


class Watcher:
    """Resolves the handles that somebody looks at, when their tasks have ended.

    In a started queue the workers and the scheduler tell it to look; else it has a thread of its
    own as long as there is something to watch. It holds handles weakly, but for those with callbacks.

    Args:
        repository: where the tasks are.
        log: what it logs to.
    """

    def __init__(self, repository: Repository, log: GuardedLogger) -> None:
        self._repository = repository
        self._log = log
        # The live handles of each task, by their ids as objects. Changed without a lock, one step of a
        # dict at a time: a handle may be dropped, and an exception strike, anywhere.
        self._handles: dict[str, dict[int, Callable[[], TaskHandle[Any] | None]]] = {}
        self._ended: deque[str] = deque()  # tasks that ended, whose handles are to be told of it
        self._wake: Callable[[], object] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def watching(self) -> bool:
        """Whether somebody looks at a task that has not ended."""
        return bool(self._handles)

    def watch(self, handle: TaskHandle[Any]) -> None:
        """Resolve the handle when its task has ended, at once if it has; may be called again and again.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        new = handle.watched_by is not self
        if new or handle.has_callbacks:
            self._register(handle)
        try:
            if new:
                self._look([handle.id])
                handle.watched_by = self
        finally:
            self._ensure_polling()
        if self._closed:
            handle.conclude_closed()

    def close(self) -> None:
        """Resolve no more: who waits for a task that has not ended is told so."""
        self._closed = True
        self._ensure_polling()
        if (thread := self._thread) is not None and thread is not threading.current_thread():
            thread.join(_CLOSING)

    def drive(self, wake: Callable[[], object] | None) -> None:
        """Say how to wake the thread of a started queue that tells when to look; None where none is."""
        self._wake = wake
        self._ensure_polling()

    # --- the handles

    def _register(self, handle: TaskHandle[Any]) -> None:
        task_id, key = handle.id, id(handle)
        ref: Callable[[], TaskHandle[Any] | None]
        if handle.has_callbacks:
            ref = lambda: handle  # noqa: E731
        else:
            ref = weakref.ref(handle, lambda gone: self._drop(task_id, key, gone))
        while True:
            refs = self._handles.setdefault(task_id, {})
            refs[key] = ref
            if self._handles.get(task_id) is refs:  # else it was dropped meanwhile
                return

    def _drop(self, task_id: str, key: int, ref: object = None) -> None:
        refs = self._handles.get(task_id, {})
        if ref is None or refs.get(key) is ref:
            refs.pop(key, None)
        if not refs:
            for late in list(self._handles.pop(task_id, {}).values()):  # registered in between
                if (handle := late()) is not None:
                    self._register(handle)

    def _live(self, task_id: str) -> list[TaskHandle[Any]]:
        live = []
        refs = self._handles.get(task_id, {})
        for key in list(refs):
            if (ref := refs.get(key)) is None:
                continue
            if (handle := ref()) is not None:
                live.append(handle)
            else:  # an exception struck when it should have been dropped
                self._drop(task_id, key, ref)
        return live

    # --- looking

    def look_if_watched(self, task_id: str) -> None:
        """Tell who waits for a task that just ended.

        What it ended by is committed, so a failure to read is none of that: it is looked at again soon.
        """
        if task_id in self._handles:
            try:
                self._resolve([task_id])
            except RepositoryError as error:
                self._log.debug("who waits for task %s is told later: %s", task_id, error)

    def tell(self) -> None:
        """Tell who waits for the tasks whose end was found on the main thread.

        Raises:
            RepositoryError: the repository cannot be read; they are told later.
        """
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        if ended:
            try:
                self._resolve(ended)
            except BaseException:
                self._ended.extend(ended)
                raise

    def look(self) -> None:
        """Look at all tasks that are watched, and resolve what has ended.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        self._look([task_id for task_id in list(self._handles) if self._live(task_id)])

    def _look(self, task_ids: Sequence[str]) -> None:
        if task_ids:
            statuses = self._repository.statuses(task_ids)  # and no records, which may be large
            self._resolve([i for i in task_ids if i not in statuses or statuses[i] in ENDED])

    def _resolve(self, task_ids: Sequence[str]) -> None:
        """Resolve the handles of tasks that have ended, or were deleted."""
        for start in range(0, len(task_ids), _MOST_READ):
            some = task_ids[start : start + _MOST_READ]
            found = self._repository.get_many(some)
            for task_id in some:
                for handle in self._live(task_id):
                    handle.conclude(found.get(task_id))
                    if handle.has_ended:
                        self._tell(handle)

    def _tell(self, handle: TaskHandle[Any]) -> None:
        """Tell who waits for a handle that has ended, or leave that to another thread."""
        if handle.listeners and _may_be_struck() and self._has_teller():
            self._ended.append(handle.id)
            if (wake := self._wake) is not None:
                wake()
        else:
            self._drop(handle.id, id(handle))
            handle.tell()

    # --- in a queue that is not started

    def _has_teller(self) -> bool:
        """Whether a thread goes on telling: the scheduler, or one of our own."""
        return (self._wake is not None and not self._closed) or self._polls

    @property
    def _polls(self) -> bool:
        return (thread := self._thread) is not None and thread.is_alive()

    def _ensure_polling(self) -> None:
        """Have a thread look, if there is anything to look at and nobody else does."""
        if self._handles and (self._closed or self._wake is None) and not self._polls:
            thread = threading.Thread(target=self._poll, name="taskx-watch", daemon=True)
            self._thread = thread  # first: it goes on only as long as it is that one
            try:
                thread.start()
            except RuntimeError:  # no new thread can be had: whoever waits looks
                with suppress(RepositoryError):
                    self._close_all() if self._closed else self.look()

    def _poll(self) -> None:
        me = threading.current_thread()
        changed, looked = Changes(self._repository), -math.inf
        complaint = Complaint(self._log)
        while self._thread is me and self._handles and (self._closed or self._wake is None):
            pause = _POLL
            try:
                self.tell()
                if self._closed:
                    self._close_all()
                elif changed() or time.monotonic() - looked > _LOOK_ANYWAY:
                    began = time.monotonic()
                    self.look()
                    looked = time.monotonic()
                    pause = min(max(_POLL, _REST * (looked - began)), _LOOK_ANYWAY)
                    complaint.over()
            except RepositoryError as error:
                complaint.make("cannot see whether tasks have ended: %s", error)
                pause = _LOOK_ANYWAY
            except BaseException:  # noqa: BLE001  (without this thread, who waits would wait for ever)
                self._log.exception("the watcher stumbled; it goes on")
                pause = _LOOK_ANYWAY
            time.sleep(pause)
        if self._thread is me:
            self._thread = None
            self._ensure_polling()  # a handle came in between

    def _close_all(self) -> None:
        for task_id in list(self._handles):
            for handle in self._live(task_id):
                handle.conclude_closed()
                self._tell(handle)

    def renew_after_fork(self) -> None:
        """In a forked child: nobody waits; the threads that did are the parent's."""
        for task_id in list(self._handles):
            for handle in self._live(task_id):
                handle.forget_listeners()


def _may_be_struck() -> bool:
    """Whether a signal may raise an exception here: between two steps that belong together."""
    return threading.current_thread() is threading.main_thread()
