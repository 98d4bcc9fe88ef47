"""Handles on tasks: Futures that the watcher resolves.

An exception can strike the main thread between any two steps. So no code here takes a lock that it could
leave locked, and no step is marked as done before it is: a handle has ended once its one attribute
``_outcome`` is set, and is watched as long as the watcher has it. A step that was cut short is repeated
by the next thread that checks the handle. Listeners are told by threads that no such exception reaches.
"""

from __future__ import annotations

import _thread
import logging
import math
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from taskx.tasks import payload
from taskx.tasks.bell import Signal
from taskx.tasks.checks import Duration, in_seconds, optional_seconds
from taskx.tasks.display import Display
from taskx.tasks.errors import (
    ConfigurationError,
    InvalidTransition,
    PayloadError,
    QueueStopped,
    RepositoryCorrupt,
    TaskFailed,
    TaskNotFound,
)
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.streams import Source, Stream
from taskx.tasks.timing import Timing
from taskx.tasks.values import Values

if TYPE_CHECKING:
    from taskx.tasks.findings import Reason

R = TypeVar("R")


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def cancel_task(self, task_id: str, /) -> bool: ...
    def why(self, task_id: str, /) -> list[Reason]: ...
    def watch(self, *handles: TaskHandle[Any]) -> None: ...
    def _uncommitted(self, task_id: str, /) -> bool: ...
    def _refuse_wait(self) -> None: ...
    def _check(self, task_id: str, /) -> None: ...
    def _source(self, task: Task, after: str | None, /) -> Source: ...
    @property
    def _values(self) -> Mapping[str, Values]: ...
    @property
    def _timing(self) -> Timing: ...


class _Watches(Protocol):
    signal: Callable[[], Signal]


class _Outcome(NamedTuple):
    state: str
    result: Any = None
    exception: BaseException | None = None
    type: str = ""  # the task's type, if it has completed
    reason: str | None = None  # the task's error, if it was cancelled because of something


_CANCELLED = _Outcome(CANCELLED_AND_NOTIFIED)

#: A function that is called once with a handle that has ended.
Listener = Callable[["TaskHandle[Any]"], None]


class TaskHandle(Future[R]):
    """A task as a ``concurrent.futures.Future``. ``submit`` returns it; so does ``queue.handle``, anywhere.

    It works with ``wait``, ``as_completed`` and ``asyncio.wrap_future``. ``result()`` returns the
    executor's result, decoded by its return annotation if this queue has the executor, else as JSON gives
    it back. It raises ``TaskFailed`` for a failed task,
    ``concurrent.futures.CancelledError`` for a cancelled task, and ``RepositoryCorrupt`` for a task with
    a damaged record.

    Attributes:
        id: the task's id.
    """

    _outcome: _Outcome | None = None
    #: The watcher that has registered the handle and checked its task since. In a forked child the
    #: queue has another watcher.
    _watched_by: _Watches | None = None

    def __init__(self, task_id: str, owner: _Owner) -> None:
        # Without super().__init__(), whose condition costs more than the rest of a submit.
        self.id = task_id
        self._owner = owner

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"

    def __dir__(self) -> list[str]:
        # Without the methods of a Future that are for the maker of its result.
        return [name for name in super().__dir__() if not name.startswith("set_")]

    @property
    def _ended_badly(self) -> bool:
        """True if the task is known to have failed or been cancelled; reads memory only."""
        outcome = self._outcome
        return outcome is not None and (outcome.state != FINISHED or outcome.exception is not None)

    def task(self) -> Task:
        """Return the task's current record; raise ``TaskNotFound`` if it was deleted."""
        return self._owner.get_task_status(self.id)

    def why(self) -> list[Reason]:
        """Return the reasons why the task waits, runs or has ended, the decisive one first.

        Raises:
            TaskNotFound: the task was deleted.
        """
        return self._owner.why(self.id)

    def cancel(self) -> bool:
        """Cancel the task. Return True if it will never run.

        Return False if it runs, and is asked to stop, or if it has ended.

        Raises:
            TaskNotFound: the task was deleted.
        """
        try:
            cancelled = self._owner.cancel_task(self.id)
        except InvalidTransition:
            return False
        if cancelled and not self._owner._uncommitted(self.id):
            self._resolve(_CANCELLED)
        return cancelled

    def running(self) -> bool:
        """Return True if an executor works on the task now."""
        return self.task().status is TaskStatus.RUNNING

    def done(self) -> bool:
        """Return True if the task has ended.

        The first call reads the repository; later calls read memory only.

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
        return self.done() and self._state == CANCELLED_AND_NOTIFIED

    def result(self, timeout: Duration | None = None) -> R:
        """Wait until the task has ended, and return its executor's result.

        Args:
            timeout: the longest wait, in seconds or as a ``timedelta``; None waits for ever.

        Raises:
            TaskFailed: the task failed.
            concurrent.futures.CancelledError: the task was cancelled.
            concurrent.futures.TimeoutError: the task has not ended within ``timeout`` seconds.
            TaskNotFound: the task was deleted.
            RepositoryCorrupt: the task's record is damaged.
            PayloadError: the stored result does not fit the return annotation of the executor.
            QueueStopped: the queue was closed before the task had ended.
            ConfigurationError: the task waits for the commit of a transaction that this thread has open, or
                for a lock that this transaction holds.
            RepositoryError: the repository cannot be read.
        """
        outcome = self._wait(timeout)
        try:
            if outcome.state != FINISHED:
                raise self._cancelled(outcome)
            if outcome.exception is not None:
                raise outcome.exception
            return self._value(outcome)
        finally:
            del self, outcome  # else the exception's traceback would keep them alive

    def exception(self, timeout: Duration | None = None) -> BaseException | None:
        """Wait until the task has ended. Return the exception that :meth:`result` raises, None if none.

        Raises:
            concurrent.futures.CancelledError: the task was cancelled.
            concurrent.futures.TimeoutError: the task has not ended within ``timeout`` seconds.
            RepositoryError: the repository cannot be read.
        """
        outcome = self._wait(timeout)
        if outcome.state != FINISHED:
            raise self._cancelled(outcome)
        try:
            self._value(outcome)
        except PayloadError as error:
            return error
        return outcome.exception

    def _cancelled(self, outcome: _Outcome) -> CancelledError:
        why = f": {outcome.reason}" if outcome.reason else ""
        return CancelledError(f"task {self.id} was cancelled{why}")

    def _value(self, outcome: _Outcome) -> R:
        """Return the result, decoded if this queue has an executor that annotates it."""
        value: R = outcome.result
        if (values := self._owner._values.get(outcome.type)) is not None:
            if "_decoded" not in self.__dict__:
                self.__dict__.setdefault("_decoded", values.decode_result(value))
            value = self.__dict__["_decoded"]
        return value

    def stream(self, after: str | None = None) -> Stream[R]:
        """Return an iterator over what the executor emits, for ``for`` and for ``async for``.

        It yields each chunk about 0.1 seconds after :meth:`Context.emit`, also in other processes. It ends
        when the task has ended and all chunks were read: then it raises what :meth:`result` raises, or ends
        the loop.

        A chunk has a ``value`` and a ``position``. Its ``restart`` is True if the executor was called anew,
        for a retry or after a wait: forget the chunks that came before. What completed steps have emitted
        comes again.

        Args:
            after: the position of the last chunk that is known, such as ``"3-17"``: the stream goes on
                there.

        Raises:
            TaskNotFound: the task was deleted.
            ConfigurationError: ``after`` is no position; or the task waits for a transaction that this
                thread has open.
            RepositoryError: the repository cannot be read.
        """
        if self._outcome is None:
            self._refuse_uncommitted()
        source = self._owner._source(self.task(), after)
        return Stream(self, source, self._owner._timing.progress_every)

    def follow(self, timeout: Duration | None = None) -> R:
        """Show the task's progress to a person until the task has ended, and return its result.

        The display is a bar in a terminal or a notebook if the package rich is installed, else a line
        on ``sys.stderr`` every five seconds. Ctrl-C ends the display only; the task goes on.

        Args:
            timeout: seconds to wait at most; None waits for ever.

        Raises:
            TaskxError, concurrent.futures.CancelledError, concurrent.futures.TimeoutError: as
                :meth:`result`.
        """
        seconds = math.inf if timeout is None else in_seconds(timeout)
        if not self.done():
            self._refuse_uncommitted()
        bell = self._signal()
        deadline = bell.now() + seconds
        # A task that was deleted after its end may have a known result.
        timing = self._owner._timing
        with (
            suppress(TaskNotFound),
            Display(f"{self.task().type} {self.id}", 100, timing) as display,
        ):
            while True:
                done = self.done()
                task = self.task()  # read after that, so that the last state shown is the last one
                display.update(task.progress, task.message or task.status)
                left = deadline - bell.now()
                if done or left <= 0:
                    break
                self._sleep(left if bell.virtual else min(left, timing.display_every))
        # Its outcome may be told in a moment, although the task was deleted in the meantime.
        left = deadline - bell.now()
        if left <= 0 and not self.done():
            raise self._late(seconds)
        return self.result(None if left == math.inf else max(0.0, left))

    def __await__(self) -> Generator[Any, None, R]:
        """Wait in async code until the task has ended, and return its result as :meth:`result` does.

        A caller that is cancelled or runs into a time-out leaves the task alone.
        """
        import asyncio  # at first use: the core needs no event loop

        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def ring(_: object) -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(wake)

        def done() -> Generator[Any, None, bool]:
            if self._outcome is not None or self._signal().virtual:
                return self.done()
            # The read may block, and Django refuses reads of a thread that runs an event loop.
            return (yield from asyncio.to_thread(self.done).__await__())

        if self._outcome is None:
            self._refuse_uncommitted()  # in this thread, which has the transaction
        if not (yield from done()):
            self._owner._refuse_wait()
        self._listen(ring)
        try:
            while not (yield from done()):
                virtual = self._signal().virtual
                pause = 0.0 if virtual else self._owner._timing.handles_every
                yield from asyncio.wait((ended,), timeout=pause).__await__()
                if virtual:
                    self._sleep(None)
        finally:
            self._unlisten(ring)
        return self.result(0)

    def add_done_callback(self, fn: Callable[[Future[R]], object]) -> None:
        """Call ``fn(handle)`` once, on its own thread, when the task has ended.

        If the task has already ended, ``fn`` is called at once, on this thread. The handle is kept until
        the call, even without other references.

        Raises:
            RepositoryError: the repository cannot be read; ``fn`` is not called.
        """
        callback = _Callback(fn)
        self._listen(callback)
        if self._outcome is None:
            try:
                self._owner.watch(self)
            except BaseException:  # the caller gets an exception, so fn must not be called later
                self._unlisten(callback)
                raise
            self._tell_if_ended(callback)

    def _wait(self, timeout: Duration | None) -> _Outcome:
        if self._outcome is None:
            self._owner.watch(self)
        if self._outcome is None:
            seconds = optional_seconds(timeout)
            self._sleep(seconds)
            if self._outcome is None:
                raise self._late(seconds)
        return self._outcome

    def _late(self, seconds: float | None) -> TimeoutError:
        return TimeoutError(f"task {self.id} has not ended within {seconds:g} s")

    def _refuse_endless_wait(self) -> None:
        """Raise ``ConfigurationError`` if the task cannot go on before the calling thread has committed.

        Its own transaction may have written the task, or hold the lock that the task's end needs.
        """
        self._refuse_uncommitted()
        try:
            self._owner._refuse_wait()
        except ConfigurationError:
            self._owner._check(self.id)  # it may have ended, and nobody was told yet
            if self._outcome is None:
                raise

    def _refuse_uncommitted(self) -> None:
        if self._owner._uncommitted(self.id):
            raise ConfigurationError(
                f"task {self.id} was submitted or changed in a transaction that this thread has open, so "
                "it does not go on before the commit: wait for it after that"
            )

    def _sleep(self, timeout: float | None) -> None:
        self._refuse_endless_wait()
        bell = self._signal()
        deadline = None if timeout is None else bell.now() + timeout
        every = self._owner._timing.handles_every
        self._listen(bell)
        try:
            while self._outcome is None:
                left = math.inf if deadline is None else deadline - bell.now()
                if left <= 0:
                    return
                if not bell.wait(left if bell.virtual else min(left, every)):
                    # Watch it again: the thread that should wake this one may be gone.
                    self._owner.watch(self)
        finally:
            self._unlisten(bell)

    def _signal(self) -> Signal:
        """Return a signal to wait with for the end of the task."""
        return Signal() if self._watched_by is None else self._watched_by.signal()

    def _note_watched(self, watcher: _Watches) -> None:
        """Note that a watcher has registered this handle and checked its task."""
        self._watched_by = watcher

    # --- the threads and callbacks that wait for the end

    @property
    def _listeners(self) -> list[Listener]:
        """The listeners to tell when the task has ended."""
        found: list[Listener] = self.__dict__.setdefault("_listeners", [])
        return found

    @property
    def _has_callbacks(self) -> bool:
        """True if callbacks wait. The watcher then keeps the handle."""
        return _Callback in map(type, self._listeners)

    def _listen(self, listener: Listener) -> None:
        """Call the listener once when the end of the task is known; ``watch`` makes it known."""
        self._listeners.append(listener)  # first: a thread that ends the handle now will see it
        self._tell_if_ended(listener)

    def _tell_if_ended(self, listener: Listener) -> None:
        if self._outcome is not None and self._unlisten(listener):
            listener(self)

    def _unlisten(self, listener: Listener) -> bool:
        """Remove a listener. Return False if another thread has taken it, and tells it."""
        try:
            self._listeners.remove(listener)
        except ValueError:
            return False
        return True

    def _tell(self) -> None:
        """Tell all listeners that the handle has ended. The watcher calls this."""
        callbacks: list[_Callback] = []
        listeners = self._listeners
        while listeners:
            try:
                listener = listeners.pop(0)
            except IndexError:  # another thread tells, too
                break
            if isinstance(listener, _Callback):
                callbacks.append(listener)
            else:
                listener(self)
        if callbacks:
            _call_on_a_thread(self, callbacks)

    # --- for the watcher

    def _conclude(self, task: Task | None) -> bool:
        """End the handle if its task has ended. ``task`` is None if the task was deleted."""
        if task is None:
            self._resolve(_Outcome(FINISHED, exception=TaskNotFound(self.id)))
        elif not task.status.finished:
            return False
        elif task.status is TaskStatus.COMPLETED and task.damage:
            self._resolve(_Outcome(FINISHED, exception=RepositoryCorrupt(task.damage)))
        elif task.status is TaskStatus.COMPLETED:
            self._resolve(_Outcome(FINISHED, task.result, None, task.type))
        elif task.status is TaskStatus.FAILED:
            last = _last_attempt(task)
            failed = TaskFailed(task.id, task.error, last, task.traceback, task.error_type)
            self._resolve(_Outcome(FINISHED, exception=failed))
        else:
            self._resolve(_CANCELLED._replace(reason=task.error))
        return True

    def _complete(self, type: str, result: str | None) -> None:
        """End the handle of a completed task of this type, with its result as JSON text."""
        value = None if result is None else payload.loads(result)
        self._resolve(_Outcome(FINISHED, value, None, type))

    def _conclude_closed(self) -> None:
        """End the handle with ``QueueStopped``: its queue was closed."""
        closed = QueueStopped(
            f"the queue was closed before task {self.id} had ended; use handle() of an open queue"
        )
        self._resolve(_Outcome(FINISHED, exception=closed))

    def _resolve(self, outcome: _Outcome) -> None:
        self.__dict__.setdefault("_outcome", outcome)  # in one step, and the first outcome stays

    # --- the attributes of a Future that ``wait`` and ``as_completed`` use

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
            return seen.get(ident, self._state_now)

        @property
        def _result(self):
            return None if self._outcome is None else self._outcome.result

        @property
        def _exception(self):
            return None if self._outcome is None else self._outcome.exception

    @property
    def _has_ended(self) -> bool:
        """True if the end of the task is known; reads memory only."""
        return self._outcome is not None

    @property
    def _state_now(self) -> str:
        """The state, under the name that a ``Future`` gives it."""
        return PENDING if self._outcome is None else self._outcome.state


class _Stand:
    """A stand-in for a Future's condition: the thread that holds it sees the handle's state unchanged.

    It is not a lock. When an exception strikes, ``wait`` and ``as_completed`` would leave a real lock
    locked, and the thread that ends the handle would wait for ever.
    """

    def __init__(self, handle: TaskHandle[Any]) -> None:
        self._handle = handle

    def acquire(self) -> bool:
        handle = self._handle
        handle.done()
        handle.__dict__.setdefault("_seen", {})[_thread.get_ident()] = handle._state_now
        return True

    def release(self, *exc_info: object) -> None:
        self._handle.__dict__.get("_seen", {}).pop(_thread.get_ident(), None)

    __enter__, __exit__ = acquire, release


class _Waiters:
    """A stand-in for a Future's list of waiters; each waiter becomes a listener."""

    def __init__(self, handle: TaskHandle[Any]) -> None:
        self._handle = handle

    def append(self, waiter: Any) -> None:
        self._handle._refuse_endless_wait()
        if not isinstance(waiter.event, Signal):
            # No thread sets it yet: wait() still holds the locks of Futures of other classes.
            waiter.event = self._handle._signal()
        if self._handle._state == PENDING:  # else wait() has already counted the handle as ended
            self._handle._listen(_Waiter(waiter))

    def remove(self, waiter: Any) -> None:
        for listener in list(self._handle._listeners):
            if isinstance(listener, _Waiter) and listener.waiter is waiter:
                self._handle._unlisten(listener)


class _Waiter:
    # Without ``__eq__``, as each listener: Python code could run in the middle of ``list.remove``.
    def __init__(self, waiter: Any) -> None:
        self.waiter = waiter

    def __call__(self, handle: TaskHandle[Any]) -> None:
        if handle._state_now == CANCELLED_AND_NOTIFIED:
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
            except BaseException:  # noqa: BLE001  (the next callback must be called in any case)
                _log.exception("exception calling callback for %r", handle)

    try:
        threading.Thread(target=call, name="taskx-callbacks", daemon=True).start()
    except RuntimeError:  # the system cannot start a thread
        call()


def _last_attempt(task: Task) -> int:
    """Return the number of a failed task's last attempt. A crash does not count as an error."""
    crashed = bool(task.attempts) and task.attempts[-1].outcome == "crashed"
    return max(1, task.errors + crashed)
