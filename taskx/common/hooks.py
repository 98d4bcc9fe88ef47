"""Hooks: what a program is told of its tasks, and the thread that tells it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from taskx.common import forks
from taskx.common.bell import Bell, Signal
from taskx.core.checks import check_plain
from taskx.core.errors import ConfigurationError
from taskx.core.log import GuardedLogger
from taskx.core.model import Task

#: Events that may wait to be told before those who make more of them are held up.
MOST_WAITING = 10_000
#: Seconds that each of them is held up at most: a hook that hangs must not stop the queue.
LONGEST_HOLD = 1.0
# Seconds that the thread waits for another event before it ends.
_KEEP = 2.0


class Hook:
    """Is told what happens to the tasks of a queue: ``Queue(..., hooks=[...])``.

    Override what is of interest; the rest costs nothing. All hooks of a queue are called on one
    thread of their own, one call after the other, once the change is committed: they need no locks
    and may block for a while. What they raise is logged. ``task`` is a copy of the record as the
    event left it, the same one for all hooks. Each event is told by the process that caused it, once.
    """

    def queue_started(self, queue: Any) -> None:
        """The :class:`Queue` runs tasks from now on."""

    def queue_stopped(self, queue: Any) -> None:
        """The :class:`Queue` has stopped, and its last executor has returned."""

    def submitted(self, task: Task) -> None:
        """A task was stored."""

    def started(self, task: Task) -> None:
        """A worker has taken up an attempt at a task; what it ends with is told by one of those below."""

    def progressed(self, task: Task, progress: int, message: str) -> None:
        """The progress of a running task was written, which happens every tenth of a second or so."""

    def finished(self, task: Task) -> None:
        """A task is completed, failed or cancelled; also one that was cancelled before it ran."""

    def retried(self, task: Task, error: str, delay: float) -> None:
        """An attempt raised ``error``, and there is another one in ``delay`` seconds."""

    def snoozed(self, task: Task, delay: float) -> None:
        """An attempt asked to run again in ``delay`` seconds."""

    def interrupted(self, task: Task) -> None:
        """An attempt was cut short by the stop of the queue; the task is pending again."""

    def stuck(self, task: Task) -> None:
        """An attempt has timed out, and its thread runs on; what becomes of the task is told next."""

    def rescued(self, task: Task) -> None:
        """A task was taken back from a process, or a child process of its own, that had died.

        It is pending again; or it was failed or cancelled, and ``finished`` is called, too.
        """

    def requeued(self, task: Task) -> None:
        """A failed or cancelled task is pending again, as somebody asked for it."""


#: Those of one event: name for the log, and what to call.
Listeners = tuple[tuple[str, Callable[..., object]], ...]

_EVENTS = tuple(name for name in vars(Hook) if not name.startswith("_"))
_OF_MOVES = set(_EVENTS) - {"queue_started", "queue_stopped", "submitted", "started"}


class Hooks:
    """Tells hooks what happened, on a thread that lives as long as there is something to tell.

    The listeners of each event are an attribute of its name, empty where no hook overrides it: ask
    before telling. They are told in the order that they are given in.

    Raises:
        ConfigurationError: one of them is no :class:`Hook`, or has an event that is async.
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

    def __init__(self, hooks: Iterable[Hook], log: GuardedLogger) -> None:
        known = list(hooks)
        for hook in known:
            if not isinstance(hook, Hook):
                raise ConfigurationError(f"hooks must be instances of Hook, not {hook!r}")
        for event in _EVENTS:
            setattr(self, event, _listeners(known, event))
        #: Whether any hook is told of moves of tasks.
        self.moves = any(getattr(self, event) for event in _OF_MOVES)
        self._log = log
        #: Events that no hook was told yet.
        self.waiting: deque[tuple[Listeners, Callable[[], Any], tuple[Any, ...]]] = deque()
        #: How many hooks were told so far.
        self.told = 0
        self._telling = False
        self._wake_up = Signal()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._quiet = Bell()

    # --- what happened

    def tell(self, listeners: Listeners, make: Callable[[], Any], *facts: Any) -> None:
        """Have listeners called with what ``make()`` returns, and these facts; returns at once."""
        self.waiting.append((listeners, make, facts))
        if self._thread is None:
            self._start()
        else:
            self._wake_up.set()

    # --- for those who wait

    @property
    def quiet(self) -> bool:
        """True if all that happened has been told."""
        return not (self.waiting or self._telling)

    @property
    def inside(self) -> bool:
        """True if a hook calls this."""
        return self._thread is threading.current_thread()

    def wait(self, timeout: float) -> bool:
        """Wait until all has been told; False if not within ``timeout`` seconds, or inside a hook."""
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
        """Hold up who makes more events, a little, where the hooks are far behind."""
        if len(self.waiting) > MOST_WAITING:
            self.wait(LONGEST_HOLD)

    # --- the thread

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="taskx-hooks", daemon=True)
            self._thread = thread
            try:
                thread.start()
                return
            except RuntimeError:  # the interpreter is shutting down
                self._thread = None
            except BaseException:  # an interrupt: perhaps it began, and perhaps it never will
                if not thread.is_alive():
                    self._thread = None
                raise
        self._tell_all()

    def _run(self) -> None:
        while True:
            self._tell_all()
            if not self._wake_up.wait(_KEEP):
                break
        self._thread = None
        if self.waiting:  # told between the wait and the line above
            self._start()

    def _tell_all(self) -> None:
        self._telling = True
        while self.waiting:
            try:
                event = self.waiting.popleft()
            except IndexError:  # while the interpreter shuts down there may be several at it
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
                except BaseException as error:  # noqa: BLE001  (user code, which hurts nobody here)
                    forks.end_in_child(before, error)
                    self._log.exception("hook %s failed", name)
                forks.end_in_child(before)
        except BaseException:  # noqa: BLE001  (the next event must be told in any case)
            self._log.exception("hook %s failed", name)


def _listeners(hooks: Iterable[Hook], event: str) -> Listeners:
    """The hooks that override an event."""
    found = ((f"{type(hook).__name__}.{event}", getattr(hook, event)) for hook in hooks)
    listeners = tuple(
        (name, method)
        for name, method in found
        if getattr(method, "__func__", None) is not getattr(Hook, event)
    )
    for name, method in listeners:
        check_plain(method, f"hook {name}")
    return listeners
