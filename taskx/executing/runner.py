"""One task from its start to its ending; knows no thread and no store."""

from __future__ import annotations

import _thread
import os
import random
import threading
from typing import Any, Literal

import attrs

from taskx.common import forks
from taskx.core import payload
from taskx.core.clock import Clock
from taskx.core.errors import (
    CancelReason,
    RepositoryCorrupt,
    TaskCancelled,
    is_interrupt,
    on_main_thread,
)
from taskx.core.lifecycle import Ending
from taskx.core.log import GuardedLogger
from taskx.core.model import Task
from taskx.core.retry import Permanent, Retry, RetryPolicy, Snooze
from taskx.core.token import CancelToken
from taskx.executing.alarms import Alarms, Overdue
from taskx.executing.capture import Capture, CapturedLogger, capturing
from taskx.executing.context import Context, Shared, log_prefix
from taskx.executing.executors import Registered
from taskx.executing.failures import (
    MAX_ERROR,
    ChildDied,
    ChildKilled,
    Remote,
    error_text,
    error_type,
    is_a,
    seconds_asked,
    shortened,
    traceback_text,
)

#: How far a run is: no worker has it yet, or has just taken it; it lies there for any worker; a thread
#: calls its executor; that has returned, and its outcome is on its way; it was given up, and its thread
#: runs on.
State = Literal["starting", "ahead", "executing", "concluding", "stuck"]

_current = threading.local()


class Run:
    """One attempt at a task that was started, with the token that tells it to stop."""

    __slots__ = ("capture", "context", "decided", "executor", "overdue", "state", "task", "token")

    def __init__(self, task: Task, executor: Registered, clock: Clock, shared: Shared) -> None:
        self.task = task
        self.executor = executor
        self.token = CancelToken(None, clock)
        #: Where it has a time-out: what to call when it does not end then, and a lock that is taken by
        #: whoever decides how it ends.
        self.overdue: Overdue | None = None
        self.decided: _thread.LockType | None = None
        self.state: State = "starting"
        self.capture: Capture | None = None
        if executor.log_level is not None:
            self.capture = Capture(executor.log_level, log_prefix(task.id, task.type))
            shared = shared._replace(log=CapturedLogger(shared.log, self.capture))
        self.context = Context(task, self.token, shared)


def _renew_after_fork() -> None:
    global _current
    _current = threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def inside_executor() -> bool:
    """Whether the calling thread is inside an executor."""
    return getattr(_current, "depth", 0) > 0


class Runner:
    """Runs executors and says how they ended; a result has at most ``max_payload_size`` bytes of JSON."""

    def __init__(self, clock: Clock, alarms: Alarms, max_payload_size: int) -> None:
        self._clock = clock
        self._alarms = alarms
        self._max_payload_size = max_payload_size

    def run(self, run: Run, worker: str) -> Ending:
        """Call the executor; whatever it does, this returns how it ended."""
        task, token, executor = run.task, run.token, run.executor
        started = self._clock.monotonic()
        before = forks.generation
        _current.depth = getattr(_current, "depth", 0) + 1
        try:
            if task.timeout is not None:
                token.deadline = started + task.timeout
                self._alarms.add(token, run.overdue)
            if token.cancelled:  # cancelled or stopped before a worker had a hand free
                token.raise_if_cancelled()
            if task.damage:
                raise RepositoryCorrupt(task.damage)
            given = (run.context,) if executor.takes_context else ()
            if run.capture is None:
                value = executor.function(*given, **task.params)
            else:
                with capturing(run.capture):
                    value = executor.function(*given, **task.params)
            forks.end_in_child(before)
            text = (
                None if value is None else payload.encode(value, "result", self._max_payload_size)
            )
            ending = Ending(returned=True, result=text)
        except BaseException as error:  # noqa: BLE001  (a task hurts only itself)
            forks.end_in_child(before, error)
            ending = _raised(error, run)
        finally:
            _current.depth -= 1
            if task.timeout is not None:
                self._alarms.remove(token)
        return self._completed(ending, run, worker, started)

    def abandon(self, run: Run, worker: str, stack: str) -> Ending:
        """Return the ending of a run whose thread goes on after its time-out, at that ``stack``."""
        assert run.task.timeout is not None
        assert run.token.deadline is not None
        ending = Ending(
            returned=False,
            stuck=True,
            reason=CancelReason.TIMEOUT,
            error=f"timed out after {run.task.timeout:g} s; its thread still runs",
            error_type=error_type(TimeoutError()),
            traceback=shortened(stack),
            **_what_next(TimeoutError(), run),
        )
        return self._completed(ending, run, worker, run.token.deadline - run.task.timeout)

    def _completed(self, ending: Ending, run: Run, worker: str, started: float) -> Ending:
        """With all that is known whatever the way it ended."""
        ending.worker = worker
        ending.duration = max(0.0, self._clock.monotonic() - started)
        if (told := run.context.latest_progress()) is not None:
            ending.progress, ending.message = told
        if run.capture is not None:
            ending.log = run.capture.text()
        return ending


def _raised(error: BaseException, run: Run) -> Ending:
    reason = run.token.reason
    # Where the submitting thread runs the task (caller_runs), Ctrl-C is meant for the program.
    interrupt = is_a(error, KeyboardInterrupt) and on_main_thread()
    if interrupt:
        reason = CancelReason.STOP
    crashed = is_a(error, ChildDied)
    timed_out = reason is CancelReason.TIMEOUT and not crashed
    # Whatever it surfaces as: a connection that was closed by it raises errors of its own.
    # To snooze is no answer to a time-out.
    cause = TimeoutError() if timed_out and not is_a(error, Permanent, Retry) else error
    return Ending(
        returned=False,
        reason=reason,
        error=_timed_out(error, run.task) if timed_out else error_text(error),
        error_type=error_type(cause),
        traceback=traceback_text(error, skip=1),
        crashed=crashed,
        interrupt=error if interrupt else None,
        **_what_next(cause, run),
    )


def broken(error: BaseException, worker: str) -> Ending:
    """Return how an attempt ends where an error escaped that nothing was there to take: it failed.

    Nothing of the user's is asked, so that this raises nothing.
    """
    interrupt = is_interrupt(error)
    return Ending(
        returned=False,
        reason=CancelReason.STOP if interrupt else None,
        error=error_text(error),
        error_type=error_type(error),
        traceback=traceback_text(error, skip=0),
        worker=worker,
        interrupt=error if interrupt else None,
    )


def lesser(ending: Ending, error: BaseException) -> Ending | None:
    """Return what is left to store of an ending that the repository refused; None for nothing less.

    Where the executor returned something, the attempt failed.
    """
    if ending.result is not None:
        text = f"the result could not be stored: {error_text(error)}"
        kind = error_type(error)
        return attrs.evolve(ending, returned=False, result=None, error=text, error_type=kind)
    if ending.traceback or ending.log:
        return attrs.evolve(ending, traceback="", log="")
    return None


def _timed_out(error: BaseException, task: Task) -> str:
    text = f"timed out after {task.timeout:g} s"
    if is_a(error, ChildKilled):
        return f"{text}; {error}"
    if is_a(error, TaskCancelled):
        return text
    return payload.clean_text(f"{text}: {error_text(error)}", MAX_ERROR)


def _what_next(error: BaseException, run: Run) -> dict[str, Any]:
    """What the error, or else the retry policy, asks for."""
    if is_a(error, Snooze) and (seconds := seconds_asked(error, "seconds")) is not None:
        return {"snooze": seconds}
    if is_a(error, Permanent) or run.task.damage:
        return {"permanent": True}
    asked = is_a(error, Retry)
    if asked and (delay := seconds_asked(error, "delay")) is not None:
        return {"delay": delay}
    policy = run.task.retry or run.executor.options.retry
    if policy is None:
        return {}
    try:
        if not asked and not _worth_another(error, policy):
            return {"permanent": True}
        return {"delay": policy.delay(run.task.attempt, random.random())}
    except BaseException:  # a backoff of the user's own; or a class that cannot be looked at
        log = GuardedLogger(run.context.logger)
        log.exception("the retry policy failed; the task waits %g s", policy.base)
        return {"delay": policy.base}


def _worth_another(error: BaseException, policy: RetryPolicy) -> bool:
    if is_a(error, Remote):
        return policy.allows(error.names)  # type: ignore[attr-defined]
    return policy.retries(type(error))
