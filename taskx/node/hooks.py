"""Hooks: calls into a program when something happens to its tasks, and the thread that makes them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from taskx.tasks import forks
from taskx.tasks.bell import Bell, Signal
from taskx.tasks.checks import check_plain
from taskx.tasks.errors import ConfigurationError, TaskxError
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.timing import Timing


class Hook:
    """A listener for the events of a queue: ``Queue(..., hooks=[...])``.

    Override the methods of the events that you need; the others cost nothing. All hooks of a queue are
    called on one separate thread, one call at a time, after the change is committed. So they need no
    locks and may block for a while. Exceptions from hooks are logged. ``task`` is a copy of the record
    after the event, and all hooks get the same copy. Each event is reported once, by the process that
    caused it.
    """

    def queue_started(self, queue: Any) -> None:
        """The :class:`Queue` has started: it runs tasks from now on."""

    def queue_stopped(self, queue: Any) -> None:
        """The :class:`Queue` has stopped, and its last executor has returned."""

    def submitted(self, task: Task) -> None:
        """A task was stored."""

    def started(self, task: Task) -> None:
        """A worker has started an attempt at a task. One of the events below reports how it ended."""

    def progressed(self, task: Task, progress: int, message: str) -> None:
        """The progress of a running task was stored, which happens about every 0.1 seconds."""

    def finished(self, task: Task) -> None:
        """A task has completed, failed or been cancelled, even if it was cancelled before it ran."""

    def retried(self, task: Task, error: str, delay: float) -> None:
        """An attempt raised ``error``, and the task is retried in ``delay`` seconds."""

    def snoozed(self, task: Task, delay: float) -> None:
        """An attempt asked to run again in ``delay`` seconds."""

    def interrupted(self, task: Task) -> None:
        """An attempt was interrupted by the stop of the queue; the task is pending again."""

    def stuck(self, task: Task) -> None:
        """An attempt has timed out, and its thread still runs. The next event says what follows."""

    def rescued(self, task: Task) -> None:
        """A task was rescued after its process, or its own child process, had died.

        It is pending again; or it was failed or cancelled, and then ``finished`` is called, too.
        """

    def requeued(self, task: Task) -> None:
        """A failed or cancelled task was requeued: it is pending again."""

    def refused(self, task: Task, error: TaskxError) -> None:
        """A submit of one valid task raised ``error``: the buffer is full, its key is taken, …"""

    def lease_lost(self, node: str) -> None:
        """This node, with this id, lost its lease; the tokens of its running tasks fire."""

    def ticks_missed(self, schedule: str, since: datetime) -> None:
        """No queue ran at ticks of a schedule, the first one at ``since``; told when one runs again."""


#: The listeners of one event: for each its name in the log, and the method to call.
Listeners = tuple[tuple[str, Callable[..., object]], ...]

_EVENTS = tuple(name for name in vars(Hook) if not name.startswith("_"))
_OF_MOVES = set(_EVENTS) - {
    *("queue_started", "queue_stopped", "submitted", "started"),
    *("refused", "lease_lost", "ticks_missed"),
}


class Hooks:
    """Calls hooks, on a thread that lives as long as there are events to report.

    The attribute with an event's name holds the event's listeners. It is empty if no hook overrides the
    event: check it before :meth:`tell`. Hooks are called in the given order.

    Raises:
        ConfigurationError: an item is not a :class:`Hook`, or one of its methods is async.
    """

    queue_started: Listeners
    queue_stopped: Listeners
    submitted: Listeners
    started: Listeners
    progressed: Listeners
    finished: Listeners
    retried: Listeners
    snoozed: Listeners
    interrupted: Listeners
    stuck: Listeners
    rescued: Listeners
    requeued: Listeners
    refused: Listeners
    lease_lost: Listeners
    ticks_missed: Listeners

    def __init__(
        self, hooks: Iterable[Hook], log: GuardedLogger, timing: Timing, *, threaded: bool = True
    ) -> None:
        known = list(hooks)
        for hook in known:
            if not isinstance(hook, Hook):
                raise ConfigurationError(f"hooks must be instances of Hook, not {hook!r}")
        for event in _EVENTS:
            setattr(self, event, _listeners(known, event))
        #: True if a hook listens to any event that moves a task.
        self.moves = any(getattr(self, event) for event in _OF_MOVES)
        self._log = log
        self._timing = timing
        self._threaded = threaded
        #: The events that were not reported yet.
        self.waiting: deque[tuple[Listeners, Callable[[], Any], tuple[Any, ...]]] = deque()
        #: The number of events reported so far.
        self.told = 0
        self._telling = False
        self._wake_up = Signal()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._quiet = Bell()

    # --- for the threads that cause events

    def tell(self, listeners: Listeners, make: Callable[[], Any], *facts: Any) -> None:
        """Call listeners with the result of ``make()`` and these facts later, on the thread for hooks."""
        self.waiting.append((listeners, make, facts))
        if self._thread is None:
            self._start()
        else:
            self._wake_up.set()

    # --- for the threads that wait

    @property
    def quiet(self) -> bool:
        """True if all events were reported."""
        return not (self.waiting or self._telling)

    @property
    def inside(self) -> bool:
        """True if a hook is the caller."""
        return self._thread is threading.current_thread() if self._threaded else self._telling

    def wait(self, timeout: float) -> bool:
        """Wait until all events were reported. Return False after ``timeout`` seconds or inside a hook."""
        if self.inside:
            return False
        deadline = time.monotonic() + timeout
        while True:
            ear = self._quiet.listen()
            left = deadline - time.monotonic()
            if self.quiet or left <= 0:
                self._quiet.leave(ear)
                return self.quiet
            self._quiet.wait(ear, left)

    def let_catch_up(self) -> None:
        """Delay the calling thread a little if the hooks are far behind."""
        if len(self.waiting) > self._timing.most_events:
            self.wait(self._timing.hold_within)

    # --- the thread

    def _start(self) -> None:
        if not self._threaded:
            if not self._telling:
                self._tell_all()
            return
        with self._starting:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="taskx-hooks", daemon=True)
            self._thread = thread
            try:
                thread.start()
                return
            except BaseException as error:
                if not thread.is_alive():  # after an interrupt, it may run or not
                    self._thread = None
                if not isinstance(error, RuntimeError):
                    raise
        self._tell_all()  # the interpreter is shutting down

    def _run(self) -> None:
        while True:
            self._tell_all()
            if not self._wake_up.wait(self._timing.keep_thread):
                break
        self._thread = None
        if self.waiting:  # an event came between the wait and the line above
            self._start()

    def _tell_all(self) -> None:
        self._telling = True
        while self.waiting:
            try:
                event = self.waiting.popleft()
            except IndexError:  # during the shutdown of the interpreter several threads may do this
                break
            self._tell_one(*event)
            self.told += 1
        self._telling = False
        self._quiet.ring_all()

    def _tell_one(
        self, listeners: Listeners, make: Callable[[], Any], facts: tuple[Any, ...]
    ) -> None:
        name = listeners[0][0]
        before = forks.generation
        try:
            subject = make()
            for name, call in listeners:
                try:
                    call(subject, *facts)
                except BaseException as error:  # noqa: BLE001  (user code must do no harm here)
                    forks.end_in_child(before, error)
                    self._log.exception("hook %s failed", name)
                forks.end_in_child(before)
        except BaseException:  # noqa: BLE001  (the next event must be reported in any case)
            self._log.exception("hook %s failed", name)


def _listeners(hooks: Iterable[Hook], event: str) -> Listeners:
    """Return the listeners of an event: the methods of the hooks that override it."""
    found = ((f"{type(hook).__name__}.{event}", getattr(hook, event)) for hook in hooks)
    listeners = tuple(
        (name, method)
        for name, method in found
        if getattr(method, "__func__", None) is not getattr(Hook, event)
    )
    for name, method in listeners:
        check_plain(method, f"hook {name}")
    return listeners
