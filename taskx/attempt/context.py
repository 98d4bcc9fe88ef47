"""The context of a run: the tools that an executor gets in addition to its params."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import (
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar

from taskx.attempt.capture import CapturedLogger, in_coroutine
from taskx.attempt.checkpoints import Checkpoints, Keeper
from taskx.attempt.children import check_tasks
from taskx.attempt.emitted import Emitted
from taskx.attempt.transactions import Completed, Transaction
from taskx.attempt.waiting import (
    AGAIN,
    SHORT,
    NotDone,
    Parked,
    Uncertain,
    answer_of,
    error_in,
    moment_after,
    outcome,
    seconds_of,
)
from taskx.tasks import payload
from taskx.tasks.checks import Duration, check_number, check_plain, is_async
from taskx.tasks.clock import to_ms
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    RepositoryCorrupt,
    RepositoryError,
    TaskFailed,
    TaskNotFound,
    is_interrupt,
)
from taskx.tasks.lifecycle import Ending, Park
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.options import check_time, one_of
from taskx.tasks.rate import NOTHING, Cost, check_cost
from taskx.tasks.record import MAX_MESSAGE, check_progress
from taskx.tasks.token import CancelToken

if TYPE_CHECKING:
    from taskx.attempt.alarms import Alarms
    from taskx.attempt.coroutines import Awaited, Loop

# Seconds between two looks if progress is still being stored.
_MOMENT = 0.001

#: What :meth:`Context.run_all` does with the errors of children.
OnChildFailure = Literal["raise", "return"]
_check_on_failure = one_of(OnChildFailure)

P = ParamSpec("P")
T = TypeVar("T")

# The blocks of ``ctx.timeout`` that this thread or coroutine is in: each as a context and its token.
_narrower: ContextVar[tuple[tuple[Context, CancelToken], ...]] = ContextVar("narrower", default=())


def log_prefix(task_id: str, type: str) -> str:
    """Return the beginning of each line that a task's logger writes."""
    return f"[{type} {task_id}] "


def _without_stop(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function. A future takes no ``StopIteration``: before Python 3.12, it would never be done."""
    try:
        return fn(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError(f"{fn!r} raised StopIteration") from error


class _Line(str):
    """A message after a prefix with a percent sign, which is no format."""

    __slots__ = ("_parts",)

    def __new__(cls, prefix: str, message: str) -> _Line:
        return super().__new__(cls, prefix + message)

    def __init__(self, prefix: str, message: str | None = None) -> None:
        if message is not None:  # else ``str(line)`` calls this again, before Python 3.13
            self._parts = prefix, message

    def __str__(self) -> str:  # logging formats what this returns
        return self

    def __mod__(self, args: Any) -> str:
        prefix, message = self._parts
        return f"{prefix}{message % args}"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:  # a handler may send it to other programs
        return str, ("".join(self._parts),)


class TaskLogger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """The queue's logger, with the task's id and type at the start of each line and in ``extra``."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        extra = dict(self.extra or {})
        kwargs["extra"] = {**extra, **(kwargs.get("extra") or {})}
        prefix = log_prefix(str(extra["task_id"]), str(extra["task_type"]))
        return _Line(prefix, str(msg)) if "%" in prefix else f"{prefix}{msg}", kwargs


class Shared(NamedTuple):
    """The tools that all contexts of a queue share."""

    alarms: Alarms  #: fires tokens at their deadlines
    log: logging.Logger  #: the logger behind ``ctx.logger``
    keeper: Keeper  #: stores checkpoints
    fetch: Callable[[Sequence[str]], Mapping[str, Task]]  #: reads tasks, by their ids
    #: Stores the progress of a run, by its task's id; None in a child process.
    store_progress: Callable[[str], object] | None = None
    #: Returns the loop of coroutines; None in a test that calls none.
    loop: Callable[[], Loop] | None = None
    #: Is told the type of a task whose progress message was cut.
    cut: Callable[[str], object] = lambda type: None


class Context:
    """The tools of an executor: report progress, notice a cancel, log, and store checkpoints.

    Attributes:
        logger: logs with the task's id and type.
    """

    __slots__ = (
        *("_copy", "_shared", "_task"),
        *("_missed", "_quiet", "_storing", "_told", "_unwritten"),
        *("_checkpoints", "_emitted", "_run_token", "_stored"),
        *("_awaited", "_completed", "_parked", "_spent"),
    )
    _copy: Task | None  # made on first use: most executors never ask for it
    _told: tuple[float, str] | None  # the last progress that was reported
    _checkpoints: Checkpoints | None
    _emitted: Emitted | None
    _stored: str | None  # the checkpoints that were stored last
    #: Raised by a call that has parked the run; None if none has.
    _parked: Parked | None
    #: The coroutine of the run, if its executor is one.
    _awaited: Awaited | None

    def __init__(self, task: Task, token: CancelToken, shared: Shared) -> None:
        self._task = task
        self._shared = shared
        self._run_token = token
        self._copy = self._told = self._checkpoints = self._emitted = self._stored = None
        self._parked = self._awaited = None
        # See ``transaction`` and ``_new_progress``.
        self._unwritten = self._missed = self._quiet = self._storing = False
        self._spent: Cost = NOTHING
        #: The completion of the task, if a transaction of the run has stored one.
        self._completed: list[Completed] = []

    @property
    def task(self) -> Task:
        """This run's copy of the task. The executor may change it freely."""
        if self._copy is None:
            self._copy = copy(self._task)
            self._copy.earlier_attempts = list(self._task.earlier_attempts)
        return self._copy

    @property
    def parents(self) -> list[Task]:
        """The tasks that this task depends on, in the given order, as they ended.

        Each access reads them from the repository.

        Raises:
            TaskNotFound: a parent was deleted.
            RepositoryCorrupt: the record of a completed parent is damaged, so its result cannot be read.
            RepositoryError: the repository failed.
        """
        ids = self._task.depends_on
        found = self._shared.fetch(ids) if ids else {}
        for parent in ids:
            if parent not in found:
                raise TaskNotFound(parent)
            if found[parent].damage and found[parent].status is TaskStatus.COMPLETED:
                raise RepositoryCorrupt(f"parent {parent}: {found[parent].damage}")
        return [found[parent] for parent in ids]

    @property
    def _token(self) -> CancelToken:
        for context, token in reversed(_narrower.get()):
            if context is self and not token._over:  # a coroutine that was begun inside may go on
                return token
        return self._run_token

    @property
    def token(self) -> CancelToken:
        """The token of this run; inside ``with ctx.timeout(…)``, the narrower one."""
        return self._token

    @property
    def _known_as(self) -> tuple[str, str]:
        """The id and the type of the task, for log lines."""
        return self._task.id, self._task.type

    @property
    def logger(self) -> TaskLogger:
        """A logger that writes the task's id and type into each line."""
        extra = dict(zip(("task_id", "task_type"), self._known_as, strict=True))
        return TaskLogger(self._shared.log, extra)

    def progress(self, percent: float, message: str = "") -> None:
        """Report progress: percent from 0 to 100 (clamped) and a text of at most 10,000 characters.

        This only keeps the values in memory, so it is cheap even in a tight loop. They are stored about
        every 0.1 seconds, and at the end. A longer text is cut and ends in "…"; the log says so once for
        each type of task.

        Raises:
            PayloadError: ``percent`` is not a number, or ``message`` is not a string.
        """
        # A number that is too small or too large is limited when it is stored.
        if type(percent) not in (int, float) or percent != percent or type(message) is not str:
            percent, _ = check_progress(percent, message)
        if len(message) > MAX_MESSAGE:
            self._message_was_cut()
        self._told = percent, message
        self._unwritten = True

    def alive(self) -> None:
        """Say that the run goes on, although it has no progress to report: see the option ``stall``.

        Without that option, this does nothing.
        """

    def spent(self, **units: int) -> None:
        """Say what this run has taken of the units of its cost, which was only an estimate.

        ``ctx.spent(tokens=1840)`` corrects the rates of its limits, up or down, when the run ends. The last
        value of a unit counts.

        Raises:
            ConfigurationError: a value is not a whole number of at least 0.
        """
        self._spent = {**self._spent_in_truth(), **(check_cost(units) or {})}

    def emit(self, value: Any) -> None:
        """Show a part of the result to those who read :meth:`TaskHandle.stream`, while the run goes on.

        This keeps the value in memory; it is stored about every 0.1 seconds, at the end, and before the
        result of a step. What a step has emitted, by the thread or the coroutine that runs its function,
        stays when a later call of the executor skips the step. All else is emitted anew.

        Args:
            value: a JSON value of at most 64 KB.

        Raises:
            PayloadError: the value is not JSON, or is too large; or this run has emitted more than 16 times
                ``max_payload_size``.
            TaskCancelled: the token has fired.
            ConfigurationError: this is inside ``ctx.transaction()``; the repository has only eight methods;
                or this is a forked child process.
        """
        self._token.raise_if_cancelled()
        if (kept := self._checkpoints) is not None:
            kept.refuse_emit()
        elif self._parked is not None:
            raise self._parked
        self._shared.keeper.refuse_fork()
        self._stream().add(value, self._task.starts)

    def _stream(self) -> Emitted:
        """Return what this run emits."""
        keeper = self._shared.keeper
        keeper.check()
        with keeper.lock:
            if self._emitted is None:
                self._emitted = Emitted(keeper.max_payload_size)
            return self._emitted

    def _save_emitted(self) -> None:
        """Store what this run has emitted. Raises as :meth:`Keeper.save`."""
        if self._emitted is not None:
            self._shared.keeper.save(self._task, self._emitted, self._run_token)

    def _take_emitted(self, notes: Sequence[tuple[int, str]]) -> None:
        """Add what this run has emitted in a child process: notes with the numbers of their last chunks."""
        self._stream().take_in(dict(notes))

    def _spent_in_truth(self) -> Cost:
        """Return what the run has said to have taken; empty if it has said nothing."""
        return self._spent

    def _message_was_cut(self) -> None:
        """Let the log say that progress messages of this task's type are cut."""
        self._shared.cut(self._task.type)

    def _latest_progress(self) -> tuple[int, str] | None:
        """Return the last progress reported, as it is stored; None if there was no report."""
        return None if (told := self._told) is None else check_progress(*told)

    def _new_progress(self) -> tuple[int, str] | None:
        """Return the last progress to store it, if it was reported after the previous call; else None.

        After it was stored, call :meth:`_progress_written`. Inside a transaction of the run, this returns
        None: a change of the record would make the transaction fail.
        """
        if not self._unwritten:
            return None
        if not self._may_write():
            self._missed = True
            return None
        self._unwritten = False  # before reading: a report from now on sets it again
        return self._latest_progress()

    def _may_write(self) -> bool:
        """Return True if the record may be changed now; after that, call :meth:`_progress_written`.

        It may until that call, also if a transaction of the run begins to wait for it in between.
        """
        if not self._storing:
            self._storing = (
                True  # before the next line: the other order could overlook a transaction
            )
            if self._quiet:
                self._storing = False
        return self._storing

    def _progress_written(self, *, stored: bool) -> None:
        """Note that the progress was stored, or else make :meth:`_new_progress` return it again."""
        if self._storing and not stored:
            self._unwritten = True
        self._storing = False

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` once for the task, however many attempts the task needs, and return its result.

        The result is stored before this method returns. A later attempt of the task gets the stored result
        without a call. Each attempt gets the value as JSON gives it back: a tuple becomes a list. If the
        process dies before the result is stored, ``fn`` is called again. While the repository is
        unavailable, this method waits.

        Args:
            name: the step's name, unique within the task. Use each name once in an attempt.
            fn: the function to call. It must return a JSON value.

        Raises:
            PayloadError: the result is not JSON, or is too large together with what is already stored.
            TaskCancelled: the token had fired, and ``fn`` was not called; or this run has lost its
                task to another run, and nothing was stored.
            ConfigurationError: the name was already used in this attempt; or the repository has only
                eight methods and cannot store checkpoints; or this is a forked child process.
            RepositoryError: the result could not be stored.
        """
        return self._kept().step(name, self._token, lambda: fn(*args, **kwargs))  # type: ignore[no-any-return]

    def _wait_for(
        self,
        coroutine: Coroutine[Any, Any, T],
        enter: Callable[[Awaited], object],
        *,
        inside: bool,
    ) -> T:
        """Run the coroutine of the executor on the queue's loop, and return its result.

        ``enter`` is called in the context of variables that the coroutine gets. ``inside`` says if another
        coroutine has called the executor.
        """

        def begin(begun: Awaited) -> None:
            self._awaited = begun
            if isinstance(self._shared.log, CapturedLogger):
                in_coroutine.set(self._shared.log.capture)
            enter(begun)

        assert self._shared.loop is not None
        given = coroutine, self._task, self._token, begin
        return self._shared.loop().run(*given, inside=inside)  # type: ignore[no-any-return]

    async def astep(
        self, name: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        """Do what :meth:`step` does, in a coroutine: the others go on while the result is stored.

        ``fn`` is a coroutine function, or a function, which is called in another thread.

        Raises:
            TaskxError: any error that :meth:`step` raises.
        """
        from asyncio import to_thread  # here: most programs need no coroutines

        made = fn if is_async(fn) else partial(to_thread, _without_stop, fn)
        call = partial(made, *args, **kwargs)
        return await self._kept().astep(name, self._token, call, to_thread)

    # --- waiting without a thread

    def ask(
        self,
        name: str,
        question: Any = None,
        *,
        timeout: Duration | None = None,
        tags: Sequence[str] = (),
    ) -> Any:
        """Ask somebody, and return the answer: the task waits for it without a thread.

        The answer is a task of type ``answer``, with the id ``<id of this task>/<name>``, that somebody
        ends by :meth:`Queue.finish`, perhaps before this call. Otherwise this call ends the run: it raises
        an exception that is no ``Exception``, which the executor must let through. After the answer the
        attempt goes on with a new call of the executor, which skips its steps. The answer is the result of
        the step ``name``.

        Args:
            name: the name of the answer, unique among the steps of the task.
            question: a JSON value that is shown to those who answer.
            timeout: seconds, or a ``timedelta``, from the first call in the life of the task, whatever
                crashes follow.
            tags: short texts to filter answers by.

        Raises:
            TimeoutError: nobody has answered in time; it is raised in later attempts, too.
            TaskFailed: somebody has finished the answer with an error.
            concurrent.futures.CancelledError: the answer was cancelled.
            ConfigurationError: the name was already used in this attempt, or is not valid; this is inside
                ``ctx.transaction()`` or ``ctx.timeout()``; or the repository has only eight methods.
            PayloadError: the question is not JSON or too large.
            RepositoryError: the repository failed.
        """
        self._refuse_wait("ctx.ask()")
        seconds, waits = seconds_of(timeout, "timeout"), self._shared.keeper.waits

        def call(_: int | None) -> Any:
            return waits.ask(self._task, name, question, seconds, tags, self._token)

        return self._waited(name, call, "ctx.ask()")

    def wait(self, task_id: str, *, timeout: Duration | None = None) -> Any:
        """Wait without a thread until another task has ended, and return its result.

        The id may be that of an answer that belongs to no task: it begins with ``event/``. Such an answer
        need not exist yet. All else is as for :meth:`ask`; the result is that of the step ``task_id``.

        Args:
            task_id: the id of the task.
            timeout: seconds, or a ``timedelta``, from the first call in the life of this task.

        Raises:
            TimeoutError: the task has not ended in time.
            TaskFailed: the task failed.
            concurrent.futures.CancelledError: the task was cancelled.
            TaskNotFound: no task has this id.
            ConfigurationError: as :meth:`ask`.
            RepositoryError: the repository failed.
        """
        self._refuse_wait("ctx.wait()")
        seconds, waits = seconds_of(timeout, "timeout"), self._shared.keeper.waits

        def call(until: int | None) -> Any:
            return waits.wait(self._task, task_id, seconds, until, self._token)

        return self._waited(task_id, call, "ctx.wait()")

    def once(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` once for the task, as :meth:`step`, but never again without being told to.

        That it begins is stored before the call. If its outcome is then unknown, because the process died,
        the token fired before ``fn`` returned, or ``fn`` raised ``Uncertain``, the task asks a person as in
        :meth:`ask`: somebody finishes the answer ``<id of this task>/<name>`` by the result of ``fn``, or
        by ``queue.finish(id, again=True)``. Any other ``Exception`` of ``fn`` means that it was not done: a
        later attempt calls it again.

        Raises:
            TaskFailed: somebody has finished the answer with an error.
            PayloadError: the result is not JSON, or is too large.
            ConfigurationError: as :meth:`ask`; or ``fn`` is a coroutine function.
            RepositoryError: the repository failed.
        """
        check_plain(fn, "the function of ctx.once()")
        return self._once(name, lambda: fn(*args, **kwargs), None)  # type: ignore[no-any-return]

    def once_or(
        self,
        name: str,
        fn: Callable[P, T],
        find: Callable[P, T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Do what :meth:`once` does, but call ``find`` with the same arguments before a person is asked.

        ``find`` returns the result of ``fn``; it raises ``NotDone`` if ``fn`` shall be called again, and
        ``Uncertain`` if a person shall be asked.
        """
        for given in (fn, find):
            check_plain(given, "a function of ctx.once_or()")
        found = partial(find, *args, **kwargs)
        return self._once(name, lambda: fn(*args, **kwargs), found)  # type: ignore[no-any-return]

    def _once(self, name: str, call: Callable[[], Any], find: Callable[[], Any] | None) -> Any:
        self._refuse_wait("ctx.once()")
        self.key(name)  # refuses, before the call, a name by which nobody could be asked
        waits, token = self._shared.keeper.waits, self._token

        def unknown() -> Any:
            if find is not None:
                try:
                    return find()
                except NotDone:
                    return AGAIN
                except Uncertain:
                    pass
            return waits.settle(self._task, name, token)

        return outcome(self._parking(lambda kept: kept.once(name, token, call, unknown)))

    # --- children

    def run_all(
        self,
        name: str,
        tasks: Iterable[Task],
        *,
        on_failure: OnChildFailure = "raise",
        needed: int | None = None,
    ) -> list[Any]:
        """Submit tasks, and return their results in order: the task waits for them without a thread.

        They are submitted in one transaction, with the ids ``<id of this task>/<name>/<number>``, and
        otherwise this call is like :meth:`ask`: the attempt goes on with a new call of the executor. It
        must call this with the same tasks. The children have the flow, the tags and the ``created_by`` of
        this task, too, and at least its priority. They are cancelled if it is cancelled, and run again, if
        they did not complete, if it is requeued.

        Args:
            name: the name of the list, unique among the steps of the task, of at most 80 characters.
            tasks: new tasks without ids, such as ``executor.task(n=1)``. A call without tasks returns at
                once, and does not look if an earlier one had some.
            on_failure: ``"raise"``: when all have ended, raise the first error in the order of the tasks,
                that of a failed task before that of a cancelled one; ``"return"``: an exception stands in
                the place of each result that is missing.
            needed: go on when so many have completed, and cancel the rest, in whose places exceptions
                stand; or when so many cannot complete any more.

        Raises:
            TaskFailed: a task failed.
            concurrent.futures.CancelledError: a task was cancelled.
            TaskNotFound: a task was deleted.
            ConfigurationError: as :meth:`ask`; or an earlier call had other tasks; or tasks have children
                within children at more than 100 levels.
            TaskxError: the tasks were refused, as by :meth:`Queue.submit_many`.
        """
        self._refuse_wait("ctx.run_all()")
        _check_on_failure(on_failure, "on_failure")
        given, token = check_tasks(tasks, needed, "ctx.run_all()"), self._token
        if not given:
            return []
        children, task = self._shared.keeper.children, self._task

        def wait(taken: list[int] | None) -> list[int] | None:
            return children.wait(task, name, given, needed, taken, token)

        def outcomes(taken: list[int] | None) -> list[Any]:
            return children.outcomes(task, name, needed is not None, taken, token)

        told, enough = self._parking(
            lambda kept: kept.children(name, token, wait, outcomes, "ctx.run_all()")
        )
        errors = [error_in(value) for value in told]
        missing = [error for error in errors if error is not None]
        if missing and on_failure == "raise" and not enough:
            raise next((error for error in missing if isinstance(error, TaskFailed)), missing[0])
        return [
            value if error is None else error for value, error in zip(told, errors, strict=True)
        ]

    def fork(self, name: str, tasks: Iterable[Task]) -> list[str]:
        """Submit tasks for which all tasks wait, too, that depend on this one; return their ids.

        The dependents that are stored by now, such as the next steps of a chain, find the tasks in
        ``ctx.parents``, after the parents that they had. This task does not wait for the tasks. Otherwise
        they are children as those of :meth:`run_all`, with the same ids.

        Raises:
            ConfigurationError: as :meth:`run_all`; or there would be more than a million pairs of a
                dependent and a child.
            TaskxError: as :meth:`run_all`.
        """
        self._refuse_wait("ctx.fork()")
        given, token = check_tasks(tasks, None, "ctx.fork()"), self._token
        if not given:
            return []
        children, task = self._shared.keeper.children, self._task
        call = partial(children.fork, task, name, given, token)
        return self._parking(lambda kept: kept.fork(name, token, call))  # type: ignore[no-any-return]

    def key(self, name: str) -> str:
        """Return a text that is the same in each attempt of this task, for an idempotency key of others."""
        return answer_of(self._task.id, name)

    def _look(self, what: str, *facts: Any) -> Any:
        """Do for a child process what a method of ``Waits`` or ``Children`` does."""
        waits, children = self._shared.keeper.waits, self._shared.keeper.children
        if what == "children":
            name, told, needed, taken = facts
            tasks = [Task.from_dict(one) for one in told]
            return children.wait(self._task, name, tasks, needed, taken, self._token)
        if what == "outcomes":
            name, some, taken = facts
            return children.outcomes(self._task, name, some, taken, self._token)
        if what == "fork":
            name, told = facts
            tasks = [Task.from_dict(one) for one in told]
            return children.fork(self._task, name, tasks, self._token)
        if what == "forget":
            (name,) = facts
            return bool(waits.forget(self._task, name, self._token))
        if what == "wait":
            awaited, seconds, until = facts
            return waits.wait(self._task, awaited, seconds, until, self._token)
        name, question, timeout, tags, param = facts
        question = payload.loads(question)
        return waits.ask(self._task, name, question, timeout, tags, self._token, param)

    @property
    def _on_loop(self) -> bool:
        """True in the thread of the event loop, which must not wait."""
        return self._awaited is not None and self._awaited.is_here()

    @property
    def _short(self) -> float:
        """The seconds of a wait from which on the task waits without a thread."""
        return 0.001 if self._on_loop else SHORT

    def _refuse_wait(self, what: str) -> None:
        """Raise an error if the task cannot wait here, or waits already."""
        if self._parked is not None:
            raise self._parked
        if self._token is not self._run_token:
            raise ConfigurationError(
                f"{what} cannot be used inside ctx.timeout(), which ends with this run: give it a timeout"
            )

    def _waited(
        self, name: str, call: Callable[[int | None], Any], what: str, *, durable: bool = False
    ) -> Any:
        """Return the outcome of a step that waits; not durable if the record of a task has it, too."""
        token = self._token
        return outcome(
            self._parking(lambda kept: kept.wait_step(name, token, call, what, durable=durable))
        )

    def _parking(self, wait: Callable[[Checkpoints], Any]) -> Any:
        """Wait, and note if the run has parked."""
        try:
            return wait(self._kept())
        except Parked as parked:
            self._note_parked(parked)
            raise

    def _note_parked(self, parked: Parked) -> None:
        """Note that the run has parked: so it does, whatever the executor does now."""
        self._parked = self._parked or parked

    def _sealed(self) -> Park:
        """Return what the run that has parked waits for; from now on its checkpoints stay as they are."""
        assert self._parked is not None
        return self._kept().seal(self._parked)

    @property
    def cursor(self) -> Any:
        """The position of a loop: the JSON value that was last set in any attempt; None if none was set.

        Setting it stores it. The value survives the death of the process; a power cut may undo the last
        changes.

        Raises:
            ConfigurationError: the repository has only eight methods and cannot store checkpoints.
            PayloadError: the new value is not JSON, or is too large together with what is already stored.
            TaskCancelled: the value was stored, but the token has fired; or this run has lost its task to
                another run, and nothing was stored.
            RepositoryError: the new value could not be stored.
        """
        return self._kept().cursor

    @cursor.setter
    def cursor(self, value: Any) -> None:
        self._kept().set_cursor(value, self._token)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Commit writes of your own together with checkpoints, or with the completion of the task.

        ``with ctx.transaction() as tx:`` opens a transaction in the database of the tasks, on
        ``tx.connection``. Inside the block, ``ctx.step`` and ``ctx.cursor`` are part of it. After
        ``tx.complete(result)`` the completion of the task is, too. All of it is committed at the end of the
        block, if this run still has its task. If the block raises, all of it is rolled back, and the
        checkpoints are again what they were.

        On SQLite, other writers of the file wait until the block ends: keep it short. On MongoDB, pass
        ``session=tx.connection`` to each call; a conflict with another writer raises an error.

        Raises:
            ConfigurationError: the repository shares no database with your data; a transaction of this run
                is open; the task was completed; this is a child process; or the thread of the event loop.
            TaskCancelled: the token had fired before the block; or this run has lost its task to another
                run, and nothing was stored.
            RepositoryError: the transaction could not be committed, and nothing was stored.
        """
        if self._completed:
            raise ConfigurationError("this run has completed its task in a transaction")
        if self._on_loop:
            raise ConfigurationError(
                "a transaction belongs to its thread, which all coroutines share: open it in a function, "
                "and call that by await asyncio.to_thread(…)"
            )
        kept, open_transaction = self._kept(), self._shared.keeper.transaction
        kept.refuse_transaction()  # before it waits for progress that waits for this thread's transaction
        self._save_emitted()  # the transaction may complete the task
        with (
            self._without_progress(),
            open_transaction(kept, self._token, self._ending, self._completed) as tx,
        ):
            yield tx

    @contextmanager
    def _without_progress(self) -> Iterator[None]:
        """Keep progress in memory, after what is being stored now is stored."""
        if self._missed and self._shared.store_progress is not None:
            self._missed = False
            with suppress(RepositoryError):  # it is not worth an error
                self._shared.store_progress(self._task.id)
        try:
            self._quiet = True
            while self._storing:
                self._token.wait(_MOMENT)
                self._token.raise_if_cancelled()
            yield
        finally:
            self._quiet = False

    def _ending(self, result: str | None, now: int) -> Ending:
        """Return how this run ends if it completes its task now."""
        task, thread, log = self._task, threading.current_thread().name, self._shared.log
        own = task.worker.endswith(f" {thread}")
        ending = Ending(
            returned=True, result=result, worker=task.worker if own else f"{task.worker} {thread}"
        )
        if task.started_at is not None:
            ending.duration = max(0.0, (now - to_ms(task.started_at)) / 1000)
        if (told := self._latest_progress()) is not None:
            ending.progress, ending.message = told
        if isinstance(log, CapturedLogger):
            ending.log = log.capture.text()
        return ending

    def _shown(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the changes as others see the record: together with the checkpoints stored before."""
        if self._checkpoints is not None:
            self._stored = self._checkpoints.stored
        return changes if self._stored is None else {**changes, "checkpoints": self._stored}

    def _kept(self) -> Checkpoints:
        keeper, emitted = self._shared.keeper, self._stream()
        with keeper.lock:
            if self._checkpoints is None:
                self._checkpoints = Checkpoints(self._task, self._run_token, keeper, emitted)
            return self._checkpoints

    def _checkpoints_refused(self) -> str:
        """Return the reason why checkpoints cannot be stored; empty if they can."""
        try:
            self._shared.keeper.check()
        except ConfigurationError as error:
            return str(error)
        return ""

    def _keep_checkpoints(self, text: str, *, durable: bool) -> bool:
        """Store the checkpoints that were made in a child process: see :meth:`Keeper.store`."""
        self._save_emitted()
        if not self._shared.keeper.store(self._task, text, durable=durable, token=self._run_token):
            return False
        self._stored = text
        return True

    def _file(self, text: str) -> str:
        """Store steps that were made in a child process in a note: see :meth:`Keeper.file`."""
        return self._shared.keeper.file(self._task, text, self._run_token)

    def remaining(self) -> float | None:
        """Return the seconds until the deadline, always above zero; None if there is no deadline.

        Use it as the time-out of a call that blocks.

        Raises:
            TaskCancelled: the deadline has passed, or the token has fired for another reason.
        """
        return self._token.remaining()

    def sleep(
        self,
        seconds: Duration | None = None,
        *,
        until: datetime | None = None,
        step: str | None = None,
    ) -> None:
        """Sleep for some seconds (or a ``timedelta``), or until the token fires.

        With ``step``, the sleep is durable, and holds no thread if it takes a second or longer: the attempt
        ends here as in :meth:`ask`, and goes on at that moment, which crashes and restarts do not change.
        :meth:`Queue.wake` ends it before. A shorter sleep begins anew after a crash. In a coroutine each
        sleep with ``step`` is one without a thread, and others are refused: use ``asyncio.sleep``.

        Args:
            seconds: the time to sleep.
            until: an aware datetime, instead of ``seconds``; only with ``step``.
            step: the name of the sleep, unique among the steps of the task.

        Raises:
            TaskCancelled: the token has fired.
            ConfigurationError: as :meth:`ask`; or both or none of ``seconds`` and ``until`` were given.
            RepositoryError: the repository failed.
        """
        if (seconds is None) == (until is None) or (until is not None and step is None):
            raise ConfigurationError(
                "ctx.sleep() requires seconds, or until together with step: the name of the sleep"
            )
        if step is None:
            if self._on_loop:
                raise ConfigurationError(
                    "ctx.sleep() without a step keeps all coroutines from going on: write await "
                    "asyncio.sleep(…), which a cancel ends, too"
                )
            self._token.wait(seconds)
            self._token.raise_if_cancelled()
            return
        self._refuse_wait("ctx.sleep() with a step")
        now = self._shared.keeper.waits.now_ms
        if until is not None:
            moment = to_ms(check_time(until, "until"))
        else:
            moment = moment_after(now(), max(0.0, check_number(seconds, "seconds", -math.inf)))
        short = self._short
        self._parking(lambda kept: kept.sleep(step, self._token, moment, now, short))

    def poll(
        self,
        name: str,
        look: Callable[[], T | None],
        *,
        every: Duration,
        timeout: Duration | None = None,
    ) -> T:
        """Call ``look()`` until it returns something other than None, and return that.

        The task waits in between; a wait of a second or longer holds no thread, as in :meth:`sleep`. The
        value is the result of the step ``name``.

        Args:
            name: the name of the step, unique within the task.
            look: a function that returns a JSON value, or None.
            every: seconds, or a ``timedelta``, between two calls.
            timeout: seconds, or a ``timedelta``, from the first call in the life of the task.

        Raises:
            TimeoutError: it has returned nothing in time.
            TaskCancelled: the token has fired.
            ConfigurationError: as :meth:`ask`.
            PayloadError: the value is not JSON, or is too large.
            RepositoryError: the repository failed.
        """
        self._refuse_wait("ctx.poll()")
        pause, seconds = check_number(every, "every", 0.001), seconds_of(timeout, "timeout")
        waits, kept, short = self._shared.keeper.waits, self._kept(), self._short

        def call(until: int | None) -> Any:
            def note(moment: int) -> None:
                kept.note(name, moment, self._token)

            return waits.poll(name, look, pause, seconds, until, short, self._token, note)

        return self._waited(name, call, "ctx.poll()", durable=True)  # type: ignore[no-any-return]

    def on_cancel(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback()`` on its own thread when the token fires.

        Returns:
            a function that removes the callback.

        Raises:
            ConfigurationError: ``callback`` is not callable.
        """
        return self._token.on_cancel(callback)

    @contextmanager
    def timeout(self, seconds: Duration) -> Iterator[CancelToken]:
        """Set an earlier deadline for a part of the task: ``with ctx.timeout(5) as token: …``.

        Inside the block, ``ctx.token`` and everything built on it respect this deadline, too: in this
        thread or coroutine, and in what it begins by ``await``. Others open blocks of their own.

        Raises:
            TimeoutError: the block raised an exception after its own deadline, but the task as a
                whole may go on. The exception is the ``__cause__``.
            ConfigurationError: ``seconds`` is not a finite number of at least 0.
        """
        outer = self._token
        limit = check_number(seconds, "timeout")
        inner = outer._child(limit)
        self._shared.alarms.add(inner)
        part = self._awaited.part(outer) if self._awaited and self._on_loop else None
        if part is not None:
            inner.on_cancel(part.cancel)
        _narrower.set((*_narrower.get(), (self, inner)))
        try:
            yield inner
        except BaseException as error:
            timed_out = inner.reason is CancelReason.TIMEOUT and not outer.cancelled
            if timed_out and not is_interrupt(error):
                raise TimeoutError(f"not done within {limit:g} s") from error
            raise
        finally:
            if part is not None:
                part.end()
            _narrower.set(tuple(one for one in _narrower.get() if one[1] is not inner))
            self._shared.alarms.remove(inner)
            inner._leave(outer)

    @contextmanager
    def closing(self, resource: T) -> Iterator[T]:
        """Close ``resource`` at the end of the block; on a cancel, wake the threads that block on it.

        If the token has already fired, the resource is closed at once.

        Closing a file descriptor does not wake a thread that reads from it. So the threads are woken
        first, in a way that depends on the kind of resource: a socket by ``shutdown``, an ``sqlite3``
        connection by ``interrupt``, an HTTP connection by its socket, anything else by its own
        ``abort()`` or ``shutdown()``. A ``Popen`` is killed together with the programs that it has
        started, which may hold its pipes open. Outside Linux, only the programs in a process group
        that it leads are killed.

        Raises:
            ConfigurationError: the resource has no method that wakes a blocked thread.
            TaskCancelled: the token fired. This is also raised at the end of the block, because data that
                was read from an interrupted resource cannot be trusted.
        """
        from taskx.attempt.wakers import Waker

        token = self._token
        waker = Waker(resource)
        try:
            token.raise_if_cancelled()
            remove = token.on_cancel(waker)
            try:
                yield resource
                token.raise_if_cancelled()
            finally:
                remove()
        finally:
            waker.close()


class Watched(Context):
    """The context of a run that times out if it gives no sign of life: ``beat`` is called at each one."""

    __slots__ = ("_beat",)

    def __init__(
        self, task: Task, token: CancelToken, shared: Shared, beat: Callable[[], object]
    ) -> None:
        super().__init__(task, token, shared)
        self._beat = beat

    def alive(self) -> None:
        self._beat()

    def progress(self, percent: float, message: str = "") -> None:
        self._beat()
        super().progress(percent, message)

    def emit(self, value: Any) -> None:
        self._beat()
        super().emit(value)

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return super().step(name, fn, *args, **kwargs)
        finally:
            self._beat()

    async def astep(
        self, name: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        try:
            return await super().astep(name, fn, *args, **kwargs)
        finally:
            self._beat()

    def _parking(self, wait: Callable[[Checkpoints], Any]) -> Any:
        try:
            return super()._parking(wait)
        finally:
            self._beat()

    def _kept(self) -> Checkpoints:
        self._beat()
        return super()._kept()
