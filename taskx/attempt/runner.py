"""Running one task from its start to its ending, without threads or storage of its own."""

from __future__ import annotations

import _thread
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from taskx.attempt.alarms import Alarms, Overdue
from taskx.attempt.capture import Capture, CapturedLogger, capturing
from taskx.attempt.context import Context, Shared, log_prefix
from taskx.attempt.current import awaited, current
from taskx.attempt.executors import Registered
from taskx.attempt.failures import (
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
from taskx.attempt.waiting import Parked
from taskx.tasks import forks, payload
from taskx.tasks.clock import Clock
from taskx.tasks.errors import (
    CancelReason,
    RepositoryCorrupt,
    TaskCancelled,
    is_interrupt,
    on_main_thread,
)
from taskx.tasks.lifecycle import Ending
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.retry import Permanent, Retry, RetryPolicy, Snooze
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.token import CancelToken

if TYPE_CHECKING:
    from taskx.attempt.coroutines import Loop

#: The state of a run:
#: "starting": no worker has it yet, or a worker has just taken it;
#: "ahead": it was started ahead, and any worker may take it;
#: "executing": a thread calls its executor;
#: "concluding": the executor has returned, and the outcome is not stored yet;
#: "stuck": it was abandoned after its time-out, and its thread still runs.
State = Literal["starting", "ahead", "executing", "concluding", "stuck"]


class Run:
    """One attempt at a started task, with the token that tells it to stop."""

    __slots__ = (
        *("capture", "context", "decided", "executor", "overdue", "resumes", "state", "task"),
        "token",
    )

    def __init__(
        self, task: Task, executor: Registered, token: CancelToken, shared: Shared
    ) -> None:
        self.task = task
        #: True if it goes on with an attempt that has waited in between: then this is no new start.
        self.resumes = task.started_at is not None
        self.executor = executor
        self.token = token
        #: Only with a time-out: the call to make if the run does not end then, and the lock that a thread
        #: takes to decide the ending of the run.
        self.overdue: Overdue | None = None
        self.decided: _thread.LockType | None = None
        self.state: State = "starting"
        self.capture: Capture | None = None
        if executor.log_level is not None:
            self.capture = Capture(executor.log_level, log_prefix(task.id, task.type))
            shared = shared._replace(log=CapturedLogger(shared.log, self.capture))
        self.context = Context(task, self.token, shared)

    @property
    def what_goes_on(self) -> str:
        """What goes on if the run is stuck: its thread, or its coroutine, whose thread is free."""
        return "thread" if self.context._awaited is None else "coroutine"


def inside_executor() -> bool:
    """Return True if the calling thread is inside an executor."""
    return current.context is not None or awaited.get() is not None


class Runner:
    """Calls the executors of started tasks, and returns their endings.

    Args:
        clock: measures durations and deadlines.
        alarms: fires the tokens of tasks with a time-out.
        max_payload_size: most bytes of JSON of a result.
        process_ends: returns True if a signal ends this process: its handler raised an exception in the
            main thread.
        chance: draws the random part of the wait before a retry: a number from 0 to 1.
        timing: the times of the event loop.
    """

    #: Makes the token of a run, which gets no deadline yet.
    make_token: Callable[[None, Clock], CancelToken] = CancelToken

    def __init__(
        self,
        clock: Clock,
        alarms: Alarms,
        max_payload_size: int,
        process_ends: Callable[[], bool] = lambda: False,
        chance: Callable[[], float] = random.random,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.alarms = alarms
        self.clock = self._clock = clock
        self._max_payload_size = max_payload_size
        self._process_ends = process_ends
        self._chance = chance
        self._timing = timing
        self._making = threading.Lock()
        #: The event loop of executors that are coroutines; None before the first one.
        self.loop: Loop | None = None

    def own_loop(self) -> Loop:
        """Return the event loop, which is made at the first call."""
        from taskx.attempt.coroutines import Loop  # here: most programs need no asyncio

        with self._making:
            if self.loop is None:
                self.loop = Loop(self._timing)
            return self.loop

    def run(self, run: Run, worker: str) -> Ending:
        """Call the executor and return its ending, whatever the executor does."""
        task, token, executor = run.task, run.token, run.executor
        started = self._clock.monotonic()
        before = forks.generation
        outer, current.context = current.context, run.context
        try:
            if task.timeout is not None:
                token.deadline = started + task.timeout
                self.alarms.add(token, run.overdue)
            if token._reason is not None or task.timeout is not None:
                token.raise_if_cancelled()  # cancelled or stopped before a worker was free
            if task.damage:
                raise RepositoryCorrupt(task.damage)
            given = (run.context,) if executor.takes_context else ()
            if run.capture is None:
                value = executor.function(*given, **task.params)
            else:
                with capturing(run.capture):
                    value = executor.function(*given, **task.params)
            if forks.generation != before:
                forks.end_in_child(before)
            if run.context._parked is not None:  # the executor has caught the exception
                raise run.context._parked
            text = (
                None if value is None else payload.encode(value, "result", self._max_payload_size)
            )
            ending = Ending(returned=True, result=text)
        except BaseException as error:  # noqa: BLE001  (an error must affect no other task)
            forks.end_in_child(before, error)
            ending = self.ending_of(error, run)
        finally:
            current.context = outer
            if task.timeout is not None:
                self.alarms.remove(token)
        ending.worker, ending.duration = worker, max(0.0, self._clock.monotonic() - started)
        if run.capture is not None or run.context._told is not None:
            self._add_told(ending, run)
        return ending

    def ending_of(self, error: BaseException, run: Run) -> Ending:
        """Return how a run ends whose executor has raised an error."""
        reason = run.token.reason
        # With caller_runs the submitting thread runs the task, and Ctrl-C is meant for the program.
        interrupt = error if is_a(error, KeyboardInterrupt) and on_main_thread() else None
        if self._process_ends() and on_main_thread():
            # The executor's clean-up may have raised another error than the handler's.
            interrupt = error if is_a(error, SystemExit) else SystemExit(1)
        if interrupt is not None:
            reason = CancelReason.STOP
        crashed = is_a(error, ChildDied)
        timed_out = reason is CancelReason.TIMEOUT and not crashed
        # After a time-out any error counts as the time-out: for example, a closed connection raises its own
        # error. A Snooze does not prevent a time-out.
        cause = TimeoutError() if timed_out and not is_a(error, Permanent, Retry) else error
        if (parked := run.context._parked) is not None and not timed_out:
            if error is not parked:
                log = GuardedLogger(run.context.logger)
                log.warning("it waits, so what followed is ignored: %s", error_text(error))
            park = run.context._sealed()
            return Ending(returned=False, reason=reason, parked=park, interrupt=interrupt)
        return Ending(
            returned=False,
            reason=reason,
            error=_timed_out(error, run.task) if timed_out else error_text(error),
            error_type=error_type(cause),
            traceback=traceback_text(error, skip=1),
            crashed=crashed,
            interrupt=interrupt,
            **self._what_next(cause, run),
        )

    def abandon(self, run: Run, worker: str, stack: str) -> Ending:
        """Return the ending of a run whose thread goes on after its time-out; ``stack`` is where it is."""
        assert run.task.timeout is not None
        assert run.token.deadline is not None
        ending = Ending(
            returned=False,
            stuck=True,
            reason=CancelReason.TIMEOUT,
            error=f"timed out after {run.task.timeout:g} s; its {run.what_goes_on} still runs",
            error_type=error_type(TimeoutError()),
            traceback=shortened(stack),
            **self._what_next(TimeoutError(), run),
        )
        ending.worker = worker
        ending.duration = self._clock.monotonic() - run.token.deadline + run.task.timeout
        self._add_told(ending, run)
        return ending

    def _what_next(self, error: BaseException, run: Run) -> dict[str, Any]:
        """Return what the error, or else the retry policy, asks for, as fields of an ``Ending``."""
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
            return {"delay": policy.delay(run.task.attempt, self._chance())}
        except BaseException:  # user code: a back-off function, or the error's class
            log = GuardedLogger(run.context.logger)
            log.exception("the retry policy failed; the task is retried in %g s", policy.base)
            return {"delay": policy.base}

    def _add_told(self, ending: Ending, run: Run) -> None:
        """Add the progress and the lines of the log that the executor has told."""
        if (told := run.context._latest_progress()) is not None:
            ending.progress, ending.message = told
        if run.capture is not None:
            ending.log = run.capture.text()


def broken(error: BaseException, worker: str) -> Ending:
    """Return the ending of an attempt from which an error escaped unexpectedly: it failed.

    This calls no user code, so it cannot raise an exception.
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
    """Return a smaller ending, to store after the repository refused ``ending``; None if there is none.

    If the executor returned a result, the attempt becomes failed. Else its traceback and log are dropped.
    """
    if ending.result is not None:
        text = f"the result could not be stored: {error_text(error)}"
        kind = error_type(error)
        return ending.changed(returned=False, result=None, error=text, error_type=kind)
    if ending.traceback or ending.log:
        return ending.changed(traceback="", log="")
    return None


def _timed_out(error: BaseException, task: Task) -> str:
    text = f"timed out after {task.timeout:g} s"
    if is_a(error, ChildKilled):
        return f"{text}; {error}"
    if is_a(error, TaskCancelled, Parked):
        return text
    return payload.clean_text(f"{text}: {error_text(error)}", MAX_ERROR)


def _worth_another(error: BaseException, policy: RetryPolicy) -> bool:
    if is_a(error, Remote):
        return policy._allows(error.names)  # type: ignore[attr-defined]
    return policy.retries(type(error))
