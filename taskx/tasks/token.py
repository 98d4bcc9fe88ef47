"""The cancellation token: it tells an executor to stop, even one that waits for blocking IO."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from taskx.tasks.checks import Duration, in_seconds
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.errors import CancelReason, ConfigurationError, TaskCancelled, on_main_thread
from taskx.tasks.log import log
from taskx.tasks.timing import DEFAULT_TIMING


class _Child(Protocol):
    """The parts that fire together with a token."""

    def fire(self, reason: CancelReason) -> object: ...


class CancelToken:
    """A signal to stop. It fires once, for one reason, and stays fired.

    The token is cooperative: firing never interrupts Python code. An executor checks the token
    (``cancelled``, ``raise_if_cancelled()``), waits for it (``wait(seconds)``), passes ``remaining()`` as
    the time-out of its calls, or has a callback close the object that it blocks on (``on_cancel``).

    Args:
        deadline: the time at which to fire with ``TIMEOUT``, in seconds of ``clock.monotonic()``; None for
            never.
        clock: the clock of the deadline.
    """

    # Each run has a token, and few are ever used: the rest of their parts is made when it is needed.
    _reason: CancelReason | None = None
    _waiters: Sequence[_thread.LockType] = ()
    _callbacks: Sequence[Callable[[], object]] = ()
    _children: Sequence[_Child] = ()
    #: True after ``_leave``.
    _over = False

    def __init__(self, deadline: float | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.deadline = deadline
        self._clock = clock

    def _part(self, name: str, make: Callable[[], Any] = list) -> Any:
        """Return a part of this token, which is made before its first use, in one step."""
        return vars(self).setdefault(name, make())

    def __repr__(self) -> str:
        return f"<CancelToken {self._reason or 'not fired'}>"

    @property
    def reason(self) -> CancelReason | None:
        """The reason why the token fired; None if it has not fired."""
        deadline = self.deadline
        if self._reason is None and deadline is not None and self._clock.monotonic() >= deadline:
            self.fire(CancelReason.TIMEOUT)
        return self._reason

    @property
    def cancelled(self) -> bool:
        """True if the token has fired."""
        return self.reason is not None

    def raise_if_cancelled(self) -> None:
        """Raise ``TaskCancelled`` if the token has fired."""
        if (reason := self.reason) is not None:
            raise TaskCancelled(reason)

    def remaining(self) -> float | None:
        """Return the seconds until the deadline, always more than zero; None without a deadline.

        Raises:
            TaskCancelled: the deadline has passed, or the token has fired for another reason.
        """
        self.raise_if_cancelled()
        if self.deadline is None:
            return None
        left = self.deadline - self._clock.monotonic()
        if left <= 0:
            self.fire(CancelReason.TIMEOUT)
            self.raise_if_cancelled()
        return left

    def wait(self, timeout: Duration | None = None) -> bool:
        """Block until the token fires, at most ``timeout`` seconds. Return True if it has fired."""
        limit = threading.TIMEOUT_MAX if timeout is None else max(0.0, in_seconds(timeout))
        if self.deadline is not None:
            limit = min(limit, max(0.0, self.deadline - self._clock.monotonic()))
        waiter = _thread.allocate_lock()
        waiter.acquire()
        waiters = self._part("_waiters")
        waiters.append(waiter)
        try:
            if self.reason is None:
                _acquire(waiter, min(limit, threading.TIMEOUT_MAX))
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
        return self.cancelled

    def on_cancel(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback()`` when the token fires, or at once if it has fired. Return its remover.

        The callback runs in a thread of its own, so it may block. Its exceptions are logged. The remover is
        a function; it takes the callback off the token.

        Raises:
            ConfigurationError: ``callback`` is not callable.
        """
        if not callable(callback):
            raise ConfigurationError(f"callback must be a function, not {callback!r}")
        self._part("_callbacks").append(callback)
        if self.reason is not None:
            self._run_callbacks()

        def remove() -> None:
            with suppress(ValueError):  # it has been called, or was removed before
                self._part("_callbacks").remove(callback)

        return remove

    def _child(self, seconds: float) -> CancelToken:
        """Return a token that fires with this one, and with ``TIMEOUT`` after ``seconds`` at the latest."""
        deadline = self._clock.monotonic() + seconds
        if self.deadline is not None:
            deadline = min(deadline, self.deadline)
        child = type(self)(deadline, self._clock)
        self._part("_children").append(child)
        if self.reason is not None:
            child.fire(self.reason)
        return child

    def _fire_after(self, tokens: Sequence[CancelToken]) -> None:
        """Fire this token once all of these have fired, at the latest with the last of their deadlines."""
        deadlines = [token.deadline for token in tokens if token.deadline is not None]
        if len(deadlines) == len(tokens):
            self.deadline = max(deadlines)
        last = _Last(self, tokens)
        for token in tokens:
            token._part("_children").append(last)
        if any(token._reason is not None for token in tokens):
            last.fire(CancelReason.CANCEL)

    def _leave(self, parent: CancelToken) -> None:
        """Note that this token is no longer needed, and fires no more with its parent."""
        self._over = True
        parent._part("_children").remove(self)

    def fire(self, reason: CancelReason) -> bool:
        """Fire the token. Return False if it had already fired; it then keeps its first reason."""
        # Raw locks, here and in wait(): fire() may be called from a signal handler that interrupted a
        # method of this object. The condition inside an Event would deadlock then.
        # The reason comes first, in one step that keeps an earlier one: a thread that finds the token just
        # being fired must see why.
        if vars(self).setdefault("_reason", reason) is not reason:
            return False
        if not self._part("_once", _thread.allocate_lock).acquire(False):
            return False
        for child in list(self._children):
            child.fire(reason)
        for waiter in list(self._waiters):
            if waiter.locked():
                waiter.release()
        self._run_callbacks()
        return True

    def _run_callbacks(self) -> None:
        due = []
        # pop() is atomic: with two callers at the same time, each callback still runs once.
        while self._callbacks:
            try:
                due.append(self._part("_callbacks").pop())
            except IndexError:
                break
        for callback in due:  # a thread for each, as each may block
            try:
                threading.Thread(
                    target=_call, args=(callback,), name="taskx-cancel", daemon=True
                ).start()
            except RuntimeError:
                _call(callback)  # no thread can be started while the interpreter shuts down


class _Last:
    """A child of several tokens, which fires another token together with the last of them."""

    def __init__(self, token: CancelToken, tokens: Sequence[CancelToken]) -> None:
        self._token, self._tokens = token, tokens

    def fire(self, reason: CancelReason) -> object:
        reasons = {token._reason for token in self._tokens}
        if None in reasons:
            return False
        # After a time-out the call has its grace period, and then it is abandoned.
        timed_out = CancelReason.TIMEOUT in reasons
        return self._token.fire(CancelReason.TIMEOUT if timed_out else reason)


def _acquire(waiter: _thread.LockType, seconds: float) -> None:
    """Wait for a lock, at most so many seconds.

    A signal that strikes just before the main thread blocks does not wake it, and its handler, which may
    fire the token, runs only when the thread wakes.
    """
    if not on_main_thread():
        waiter.acquire(timeout=seconds)
        return
    until, every = time.monotonic() + seconds, DEFAULT_TIMING.signals_every
    while (left := until - time.monotonic()) > 0 and not waiter.acquire(timeout=min(left, every)):
        continue


def _call(callback: Callable[[], object]) -> None:
    try:
        callback()
    except BaseException:  # noqa: BLE001  (no caller is left; the log is the only place to report it)
        log.exception("a cancel callback raised: %r", callback)
