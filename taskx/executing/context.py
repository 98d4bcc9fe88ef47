"""What an executor is given beside its params."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from taskx.core.checks import check_number
from taskx.core.errors import CancelReason, ConfigurationError, RepositoryCorrupt, TaskNotFound
from taskx.core.model import Task, TaskStatus
from taskx.core.record import check_progress
from taskx.core.token import CancelToken
from taskx.executing.checkpoints import Checkpoints, Keeper

if TYPE_CHECKING:
    from taskx.executing.alarms import Alarms

P = ParamSpec("P")
T = TypeVar("T")


def log_prefix(task_id: str, type: str) -> str:
    """What the lines of a task's logger begin with."""
    return f"[{type} {task_id}] "


class TaskLogger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """The queue's logger, with the task's id and type in front of every line and in ``extra``."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        extra = dict(self.extra or {})
        kwargs["extra"] = {**extra, **(kwargs.get("extra") or {})}
        return f"{log_prefix(str(extra['task_id']), str(extra['task_type']))}{msg}", kwargs


class Shared(NamedTuple):
    """The tools that all contexts of a queue share."""

    alarms: Alarms  #: fires tokens at their deadlines
    log: logging.Logger  #: what ``ctx.logger`` logs to
    keeper: Keeper  #: stores checkpoints
    fetch: Callable[[Sequence[str]], Mapping[str, Task]]  #: reads tasks, by their ids


class Context:
    """An executor's way to tell its progress, and to hear that it should stop.

    Attributes:
        logger: logs with the task's id and type.
    """

    __slots__ = (
        *("_copy", "_shared", "_task", "_token"),
        *("_message", "_percent", "_unwritten"),
        *("_checkpoints", "_run_token", "_stored"),
    )

    def __init__(self, task: Task, token: CancelToken, shared: Shared) -> None:
        self._task = task
        self._shared = shared
        self._copy: Task | None = None  # made when it is first asked for: most never do
        self._token = self._run_token = token
        self._percent: float | None = None
        self._message = ""
        self._unwritten = False
        self._checkpoints: Checkpoints | None = None
        self._stored: str | None = None  # the checkpoints that were stored last

    @property
    def task(self) -> Task:
        """This run's copy of the task: the executor may do to it what it likes."""
        if self._copy is None:
            self._copy = copy(self._task)
            self._copy.earlier_attempts = list(self._task.earlier_attempts)
        return self._copy

    @property
    def parents(self) -> list[Task]:
        """The tasks that this one depends on, in the order given, as they ended; read at every access.

        Raises:
            TaskNotFound: one was deleted.
            RepositoryCorrupt: the record of one that completed is damaged: its result is not to be had.
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
    def token(self) -> CancelToken:
        """The token of this run; inside ``with ctx.timeout(…)``, the narrower one."""
        return self._token

    @property
    def logger(self) -> TaskLogger:
        """A logger that names the task."""
        extra = {"task_id": self._task.id, "task_type": self._task.type}
        return TaskLogger(self._shared.log, extra)

    def progress(self, percent: float, message: str = "") -> None:
        """Tell how far the task is: percent from 0 to 100 (clamped) and a short text.

        It only notes the values; they are written every tenth of a second or so and at the end, so
        that calling it in a tight loop costs next to nothing.

        Raises:
            PayloadError: percent is no number, or message no text.
        """
        if type(percent) is not int or type(message) is not str:
            percent, message = check_progress(percent, message)
        self._percent = percent
        self._message = message
        self._unwritten = True

    def latest_progress(self) -> tuple[int, str] | None:
        """The last progress told, as it is stored; None if none was."""
        if self._percent is None:
            return None
        return check_progress(self._percent, self._message)

    def new_progress(self) -> tuple[int, str] | None:
        """The last progress told, if it was told since this was last asked."""
        if not self._unwritten:
            return None
        self._unwritten = False  # before looking: what is told from now on sets it again
        return self.latest_progress()

    def progress_unwritten(self) -> None:
        """Have :meth:`new_progress` return the same progress again, as it could not be stored."""
        self._unwritten = True

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` once for the task, whatever the number of attempts; returns what it returned.

        That is stored before this returns, and a later attempt of the task gets it without a call, as
        JSON gives it back (so does this one: a tuple is a list). If the process dies before it is
        stored, ``fn`` is called again. While the repository is away, this waits.

        Args:
            name: of this step among those of the task; each is called once in an attempt.
            fn: what to do; it must return a JSON value.

        Raises:
            PayloadError: what it returned is not JSON, or too large with what is stored already.
            TaskCancelled: the token had fired, and ``fn`` was not called; or this run has lost its
                task to another one, and nothing was stored.
            ConfigurationError: the name was used before in this attempt; or the repository has eight
                methods and no place to store this; or this is a forked child.
            RepositoryError: it could not be stored.
        """
        return self._kept().step(name, self._token, lambda: fn(*args, **kwargs))  # type: ignore[no-any-return]

    @property
    def cursor(self) -> Any:
        """How far a loop has come: the JSON value that was set last in any attempt; None if none was.

        It is stored when it is set. A power cut, unlike the death of the process, may undo the last ones.

        Raises:
            ConfigurationError: the repository has eight methods and no place to store this.
            PayloadError: what is set is not JSON, or too large with what is stored already.
            TaskCancelled: it was set, and the token has fired; or this run has lost its task to another
                one, and nothing was stored.
            RepositoryError: what is set could not be stored.
        """
        return self._kept().cursor

    @cursor.setter
    def cursor(self, value: Any) -> None:
        self._kept().set_cursor(value, self._token)

    def shown(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Changes of the record as others see them: with the checkpoints that were stored before."""
        if self._checkpoints is not None:
            self._stored = self._checkpoints.stored
        return changes if self._stored is None else {**changes, "checkpoints": self._stored}

    def _kept(self) -> Checkpoints:
        with self._shared.keeper.lock:
            if self._checkpoints is None:
                self._checkpoints = Checkpoints(self._task, self._run_token, self._shared.keeper)
            return self._checkpoints

    def checkpoints_refused(self) -> str:
        """Why no checkpoints can be stored; empty where they can."""
        try:
            self._shared.keeper.check()
        except ConfigurationError as error:
            return str(error)
        return ""

    def keep_checkpoints(self, text: str, *, durable: bool) -> bool:
        """Store the checkpoints that were made in a child process: see :meth:`Keeper.store`."""
        if not self._shared.keeper.store(self._task, text, durable=durable, token=self._run_token):
            return False
        self._stored = text
        return True

    def remaining(self) -> float | None:
        """Seconds until the deadline, to hand on as a time-out: above zero; None without a deadline.

        Raises:
            TaskCancelled: the deadline has passed, or the token has fired for another reason.
        """
        return self._token.remaining()

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until the token fires.

        Raises:
            TaskCancelled: the token has fired.
        """
        self._token.wait(seconds)
        self._token.raise_if_cancelled()

    def on_cancel(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have ``callback()`` called on a thread of its own when the token fires.

        Returns:
            a function that takes the callback back.

        Raises:
            ConfigurationError: it cannot be called.
        """
        return self._token.on_cancel(callback)

    @contextmanager
    def timeout(self, seconds: float) -> Iterator[CancelToken]:
        """A narrower deadline for a part of the task: ``with ctx.timeout(5) as token: …``.

        Inside, ``ctx.token`` and everything built on it go by this deadline, too.

        Raises:
            TimeoutError: the block raised something after its own deadline had passed, while the
                task as a whole may go on. What it raised is the ``__cause__``.
            ConfigurationError: ``seconds`` is not a finite number from 0.
        """
        outer = self._token
        inner = outer.child(check_number(seconds, "timeout"))
        self._shared.alarms.add(inner)
        self._token = inner
        try:
            yield inner
        except BaseException as error:
            if inner.reason is CancelReason.TIMEOUT and not outer.cancelled:
                raise TimeoutError(f"not done within {seconds:g} s") from error
            raise
        finally:
            self._token = outer
            self._shared.alarms.remove(inner)
            outer.disown(inner)

    @contextmanager
    def closing(self, resource: T) -> Iterator[T]:
        """Close ``resource`` at the end of the block, and wake whoever blocks on it on a cancel.

        If the token has fired already, the resource is closed at once.

        Closing a file descriptor does not wake a thread that reads from it, so each kind is woken in
        its own way first: a socket by ``shutdown``, an ``sqlite3`` connection by ``interrupt``, an HTTP
        connection by its socket, anything else by its own ``abort()`` or ``shutdown()``. A ``Popen`` is
        killed, with the programs that it has started, which may hold its pipes open; outside of Linux
        only with those in a process group that it leads.

        Raises:
            ConfigurationError: there is no way to wake it.
            TaskCancelled: the token fired; at the end of the block too, since what was read from a
                resource that was cut off is not to be trusted.
        """
        from taskx.executing.wakers import Waker

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
