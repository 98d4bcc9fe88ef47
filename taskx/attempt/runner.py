"""Running one task from its start to its ending, without threads or storage of its own."""

from __future__ import annotations

import _thread
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal

from taskx.attempt.alarms import Alarms, Overdue, Pulse
from taskx.attempt.capture import Capture, CapturedLogger, capturing
from taskx.attempt.context import Context, Shared, Watched, log_prefix
from taskx.attempt.current import awaited, current
from taskx.attempt.executors import Registered
from taskx.attempt.failures import (
    MAX_ERROR,
    ChildDied,
    ChildKilled,
    Remote,
    error_text,
    error_type,
    hold_asked,
    is_a,
    seconds_asked,
    shortened,
    traceback_text,
)
from taskx.attempt.together import BatchContext, results_of
from taskx.attempt.waiting import Parked
from taskx.tasks import forks, payload
from taskx.tasks.clock import Clock
from taskx.tasks.errors import (
    CancelReason,
    RepositoryCorrupt,
    TaskCancelled,
    TaskxError,
    is_interrupt,
    on_main_thread,
)
from taskx.tasks.lifecycle import TOGETHER, Ending
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.retry import Permanent, Retry, RetryPolicy, Snooze
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.token import CancelToken

if TYPE_CHECKING:
    from taskx.attempt.coroutines import Awaited, Loop

#: The state of a run:
#: "starting": no worker has it yet, or a worker has just taken it;
#: "ahead": it was started ahead, and any worker may take it;
#: "executing": a thread calls its executor;
#: "concluding": the executor has returned, and the outcome is not stored yet;
#: "stuck": it was abandoned after its time-out, and its thread still runs.
State = Literal["starting", "ahead", "executing", "concluding", "stuck"]


class Run:
    """One attempt at a started task, with the token that tells it to stop."""

    state: State = "starting"
    #: Only with a time-out: the call to make if the run does not end then, and the lock that a thread
    #: takes to decide the ending of the run.
    overdue: Overdue | None = None
    decided: _thread.LockType | None = None
    #: The time at which it was called, on the clock of the runner; only with a time-out.
    began: float
    pulse: Pulse | None = None
    capture: Capture | None = None

    def __init__(
        self, task: Task, executor: Registered, token: CancelToken, shared: Shared, seq: int = 0
    ) -> None:
        self.task = task
        #: The number of the record; 0 if it is not known.
        self.seq = seq
        #: True if it goes on with an attempt that has waited in between: then this is no new start.
        self.resumes = task.started_at is not None
        self.executor = executor
        self.token = token
        if (stall := executor.options.stall) is not None:
            self.pulse = Pulse(stall, token._clock)
        if executor.log_level is not None:
            prefix = log_prefix(task.id, task.type)
            self.capture = Capture(executor.log_level, prefix, self.beat)
            shared = shared._replace(log=CapturedLogger(shared.log, self.capture))
        if stall is None:
            self.context = Context(task, self.token, shared)
        else:
            self.context = Watched(task, self.token, shared, self.beat)

    @property
    def beat(self) -> Callable[[], object]:
        """The function to call at each sign of life."""
        return int if self.pulse is None else self.pulse.beat

    @property
    def coroutine(self) -> Awaited | None:
        """The coroutine of the run, if that alone goes on: its thread just waits for it, or has left it."""
        awaited = self.context._awaited
        return awaited if awaited is not None and awaited.thread.waits else None

    @property
    def what_goes_on(self) -> str:
        """The part that goes on if the run is stuck: its thread, or its coroutine (its thread is free)."""
        return "thread" if self.coroutine is None else "coroutine"


class Call:
    """Several runs of one type, for which its executor is called once.

    Args:
        runs: the runs.
        runner: the runner that makes the call.
    """

    __slots__ = ("decided", "executor", "runs", "token")

    def __init__(self, runs: Sequence[Run], runner: Runner) -> None:
        self.runs = runs
        self.executor = runs[0].executor
        #: Fires when those of all runs have fired.
        self.token = runner.make_token(None, runner.clock)
        #: The lock that a thread takes to decide the endings of the runs.
        self.decided = _thread.allocate_lock()


def runs_of(call: Run | Call) -> Sequence[Run]:
    """Return the runs of a call, which may be that of a single one."""
    return (call,) if isinstance(call, Run) else call.runs


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
        timed = task.timeout is not None or run.pulse is not None
        outer, current.context = current.context, run.context
        try:
            if timed:
                self._watch(run, started)
            if token._reason is not None or timed:
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
            if run.context._emitted is not None:
                run.context._save_emitted()
            text = (
                None if value is None else payload.encode(value, "result", self._max_payload_size)
            )
            ending = Ending(returned=True, result=text)
        except BaseException as error:  # noqa: BLE001  (an error must affect no other task)
            forks.end_in_child(before, error)
            if run.context._emitted is not None:
                with suppress(TaskxError):  # the error of the executor counts
                    run.context._save_emitted()
            ending = self.ending_of(error, run)
        finally:
            current.context = outer
            if timed:
                self.alarms.remove(token)
        ending.worker, ending.duration = worker, max(0.0, self._clock.monotonic() - started)
        if run.capture is not None or run.context._told is not None:
            self._add_told(ending, run)
        return ending

    def _watch(self, run: Run, now: float) -> None:
        """Fire the token of a run at its time-out, and when it gives no sign of life."""
        token, run.began = run.token, now
        if run.task.timeout is not None:
            token.deadline = now + run.task.timeout
        if run.pulse is not None:
            run.pulse.beat()
        self.alarms.add(token, run.overdue, run.pulse)

    def run_call(self, call: Call, worker: str, overdue: Overdue | None = None) -> list[Ending]:
        """Call the executor for many runs and return the ending of each, whatever the executor does.

        ``overdue`` is the call to make if the executor does not end after the time-out of all runs.
        """
        started, runs = self._clock.monotonic(), call.runs
        timed = [run for run in runs if run.task.timeout is not None]
        try:
            for run in timed:
                token, run.began = run.token, started
                token.deadline = started + (run.task.timeout or 0.0)
                self.alarms.add(token)
            call.token._fire_after([run.token for run in runs])
            if call.token.deadline is not None:
                self.alarms.add(call.token, overdue)
            endings = self._ask(call)
        finally:
            for run in timed:
                self.alarms.remove(run.token)
            self.alarms.remove(call.token)
        duration = max(0.0, self._clock.monotonic() - started)
        for run, ending in zip(runs, endings, strict=True):
            ending.worker, ending.duration = worker, duration
            self._add_told(ending, run)
        return endings

    def _ask(self, call: Call) -> list[Ending]:
        """Call the executor for many runs, and return their endings."""
        runs, together, before = call.runs, call.executor.together, forks.generation
        assert together is not None
        shared, capture = runs[0].context._shared, None
        if (
            isinstance(shared.log, CapturedLogger)
            and (level := call.executor.log_level) is not None
        ):
            capture = Capture(level, "")
            shared = shared._replace(log=shared.log.captured_by(capture))
        context = BatchContext([run.context for run in runs], call.token, shared)
        outer, current.context = current.context, context
        try:
            params = [run.task.params for run in runs]
            with nullcontext() if capture is None else capturing(capture):
                results = results_of(together(context, params), len(runs))
            if forks.generation != before:
                forks.end_in_child(before)
        except BaseException as error:  # noqa: BLE001  (an error must affect no other task)
            forks.end_in_child(before, error)
            for run in runs:
                with suppress(TaskxError):  # the error of the executor counts
                    run.context._save_emitted()
            return self._endings_of_call(error, runs, context)
        finally:
            current.context = outer
            for run in runs:
                if run.capture is not None and capture is not None:
                    run.capture.add_all(capture)
        return [
            self._ending_of_result(result, run) for run, result in zip(runs, results, strict=True)
        ]

    def _ending_of_result(self, result: Any, run: Run) -> Ending:
        if isinstance(result, BaseException):
            with suppress(TaskxError):  # the error of the executor counts
                run.context._save_emitted()
            return self.ending_of(result, run)
        try:
            run.context._save_emitted()
            if (values := run.executor.values) is not None:
                result = values.encode_result(result)
            limit = self._max_payload_size
            text = None if result is None else payload.encode(result, "result", limit)
            return Ending(returned=True, result=text)
        except BaseException as error:  # noqa: BLE001  (user code: it affects no other task)
            return self.ending_of(error, run)

    def _endings_of_call(
        self, error: BaseException, runs: Sequence[Run], context: BatchContext
    ) -> list[Ending]:
        """Return how runs end whose common call has raised an error: each runs again in one of its own.

        One that was cancelled, or is stopped, is not to blame. A ``Snooze`` is for all of them.
        """
        apart = len(runs) > 1 and not is_a(error, Snooze) and self._interrupt_of(error) is None
        blameless = (CancelReason.CANCEL, CancelReason.STOP, CancelReason.LEASE_LOST)
        stays = [not apart or run.token.reason in blameless for run in runs]
        if not all(stays):
            GuardedLogger(context.logger).warning(
                "the call for %d tasks failed, so each of them runs again in a call of its own: %s\n%s",
                len(runs),
                error_text(error),
                traceback_text(error, skip=1),
            )
        return [
            self.ending_of(error, run)
            if stay
            else set_apart(error, run.token.reason, len(runs) - 1)
            for run, stay in zip(runs, stays, strict=True)
        ]

    def _interrupt_of(self, error: BaseException) -> BaseException | None:
        """Return the exception to raise in the main thread, if an executor was ended by one for it."""
        # With caller_runs the submitting thread runs the task, and Ctrl-C is meant for the program.
        interrupt = error if is_a(error, KeyboardInterrupt) and on_main_thread() else None
        if self._process_ends() and on_main_thread():
            # The executor's clean-up may have raised another error than the handler's.
            interrupt = error if is_a(error, SystemExit) else SystemExit(1)
        return interrupt

    def ending_of(self, error: BaseException, run: Run) -> Ending:
        """Return how a run ends whose executor has raised an error."""
        reason = run.token.reason
        interrupt = self._interrupt_of(error)
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
        facts = {
            "error": _timed_out(error, run) if timed_out else error_text(error),
            "error_type": error_type(cause),
            "traceback": traceback_text(error, skip=1),
            "hold": hold_asked(error),
            **self._what_next(cause, run),
        }
        return Ending(returned=False, reason=reason, crashed=crashed, interrupt=interrupt, **facts)

    def abandon(self, run: Run, worker: str, stack: str, others: int = 0) -> Ending:
        """Return the ending of a run whose thread goes on after its time-out; ``stack`` is where it is.

        ``others`` is the number of the other runs of its call.
        """
        ending = Ending(
            returned=False,
            stuck=True,
            reason=CancelReason.TIMEOUT,
            error=f"{_of_timeout(run)}; its {run.what_goes_on} still runs",
            error_type=error_type(TimeoutError()),
            traceback=shortened(stack),
            **self._what_next(TimeoutError(), run),
        )
        if others:
            ending = ending.changed(
                apart=True, error=f"{TOGETHER}{others} other tasks: {ending.error}", traceback=""
            )
        ending.worker = worker
        ending.duration = self._clock.monotonic() - run.began
        self._add_told(ending, run)
        return ending

    def _what_next(self, error: BaseException, run: Run) -> dict[str, Any]:
        """Return what the error, or else the retry policy, asks for, as fields of an ``Ending``."""
        if is_a(error, Snooze) and (seconds := seconds_asked(error, "seconds")) is not None:
            most, before = run.executor.options.max_snoozes, run.task.snoozes
            if most is None or before < most:
                return {"snooze": seconds}
            words = f"{error_text(error)}: it has snoozed {before} times, and max_snoozes is {most}"
            return {"permanent": True, "error": words}
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


def set_apart(error: BaseException, reason: CancelReason | None, others: int) -> Ending:
    """Return the ending of an attempt whose call, with ``others``, raised an error: it runs again alone."""
    why = payload.clean_text(f"{TOGETHER}{others} other tasks: {error_text(error)}", MAX_ERROR)
    return Ending(
        returned=False, apart=True, reason=reason, error=why, error_type=error_type(error)
    )


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


def _timed_out(error: BaseException, run: Run) -> str:
    text = _of_timeout(run)
    if is_a(error, ChildKilled):
        return f"{text}; {error}"
    if is_a(error, TaskCancelled, Parked):
        return text
    return payload.clean_text(f"{text}: {error_text(error)}", MAX_ERROR)


def _of_timeout(run: Run) -> str:
    pulse = run.pulse
    if pulse is not None and pulse.silent:
        return f"timed out: no sign of life for {pulse.stall:g} s"
    return f"timed out after {run.task.timeout:g} s"


def _worth_another(error: BaseException, policy: RetryPolicy) -> bool:
    if is_a(error, Remote):
        return policy._allows(error.names)  # type: ignore[attr-defined]
    return policy.retries(type(error))
