"""Every error TaskX raises, in one tree.

.. code-block:: text

    TaskxError
    ├── ConfigurationError (ValueError)   asked for what this set-up cannot do
    ├── PayloadError (ValueError)         params or result are not JSON, too large, or do not fit
    ├── UnknownTaskType (LookupError)     no executor for the type, and it was not declared
    ├── TaskNotFound (LookupError)        no record with that id
    ├── ScheduleNotFound (LookupError)    no schedule of that name
    ├── DuplicateTask                     a record with that id, or that unique key, exists
    ├── InvalidTransition                 the task's status does not allow the move
    ├── QueueFull                         the buffer has no room
    ├── QueueStopped                      the queue was stopped
    ├── TaskFailed                        raised by ``TaskHandle.result()``
    └── RepositoryError                   the store could not do it
        ├── RepositoryUnavailable         … now: locked, full, unreachable; may work later
        ├── RepositoryCorrupt             … because what it holds is damaged or no database
        └── SchemaMismatch                … because it belongs to another program or version

    Retry                                 raised by an executor: it failed, try again
    Permanent                             … it failed, and to try again would be pointless
    Snooze                                … it is too early, run it again later
    TaskCancelled (BaseException)         what a token raises inside an executor

``TaskCancelled`` stands outside the tree on purpose: ``except Exception`` in user code must not
swallow a cancellation. ``Retry``, ``Permanent`` and ``Snooze`` are in
:mod:`taskx.core.retry`.
"""

from __future__ import annotations

import threading
from enum import Enum


class TaskxError(Exception):
    """Root of all errors that TaskX raises."""


class ConfigurationError(TaskxError, ValueError):
    """An option, an executor or a combination of them cannot work; the message says which and why."""


class PayloadError(TaskxError, ValueError):
    """Params or a result cannot be stored.

    Attributes:
        path: where the offending value is, for example ``params.items[3].price``.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class UnknownTaskType(TaskxError, LookupError):
    """The type has no registered executor and was not declared on this queue."""


class TaskNotFound(TaskxError, LookupError):
    """No task with the given id is in the repository."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id

    def __str__(self) -> str:
        return f"no task with id {self.task_id!r} in the repository"


class ScheduleNotFound(TaskxError, LookupError):
    """No schedule of the given name is in the repository."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"no schedule {self.name!r} is in the repository"


class DuplicateTask(TaskxError):
    """A task with the given id, or one that holds its unique key, is there already; nothing was stored.

    Attributes:
        task_id: the id of the one that is there.
        unique_key: the key that it holds; None where the id is what was given twice.
    """

    def __init__(self, task_id: str, unique_key: str | None = None) -> None:
        super().__init__(task_id, unique_key)
        self.task_id = task_id
        self.unique_key = unique_key

    def __str__(self) -> str:
        if self.unique_key is None:
            return f"a task with id {self.task_id!r} exists already; nothing was stored"
        return f"task {self.task_id} holds the unique key {self.unique_key!r}; nothing was stored"


class InvalidTransition(TaskxError):
    """The task's present status does not allow what was asked for; nothing was changed."""


class QueueFull(TaskxError):
    """The buffer has no room for what was submitted; nothing was stored."""


class QueueStopped(TaskxError):
    """The queue was stopped and takes no more tasks; nothing was stored."""


class TaskFailed(TaskxError):
    """Raised by ``TaskHandle.result()`` when the task failed.

    Attributes:
        task_id: the task.
        error: the error text of its last attempt.
        attempt: the number of that attempt, from 1.
        remote_traceback: the traceback as text; empty when there was none.
    """

    def __init__(self, task_id: str, error: str, attempt: int, remote_traceback: str = "") -> None:
        super().__init__(task_id, error, attempt, remote_traceback)
        self.task_id = task_id
        self.error = error
        self.attempt = attempt
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = f"task {self.task_id} failed in attempt {self.attempt}: {self.error}"
        return f"{text}\n\n{self.remote_traceback}" if self.remote_traceback else text


class RepositoryError(TaskxError):
    """The repository could not do what was asked; the driver's own error is the ``__cause__``.

    Attributes:
        in_doubt: True if the write may have taken place all the same, because a server did not answer, or
            a repository of eight methods failed and could not be read back. False if nothing was changed.
        task_id: the id of the task whose submit is in doubt, else empty. Submit the same id again: that
            stores the task or raises ``DuplicateTask``. For ``submit_many`` it is the first task; all are
            stored or none.
    """

    in_doubt: bool = False
    task_id: str = ""


class RepositoryUnavailable(RepositoryError):
    """The repository cannot be used now; try again later.

    It is locked for too long, or unreachable; or the disk is full; or the SQLite file is absent, or was
    moved, deleted or replaced.
    """


class RepositoryCorrupt(RepositoryError):
    """What the repository holds is damaged, or is no database at all."""


class SchemaMismatch(RepositoryError):
    """The database belongs to another program, or to a newer version of TaskX; nothing was stored."""


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception is for the program to see: Ctrl-C, or an exit in the main thread.

    Extensions may raise other classes that are no ``Exception``, such as a panic. Such an error belongs to
    the code that was called, and so does any error in another thread.
    """
    kind = type(error)  # as isinstance, which would also ask the object for its __class__
    return issubclass(kind, (KeyboardInterrupt, SystemExit)) and on_main_thread()


def on_main_thread() -> bool:
    """Return whether the calling thread is the one that signal handlers, and what they raise, strike."""
    return threading.current_thread() is threading.main_thread()


class CancelReason(str, Enum):
    """Why a token fired."""

    CANCEL = "cancel"  #: somebody cancelled the task
    TIMEOUT = "timeout"  #: its deadline passed
    STOP = "stop"  #: the queue is stopping; the task is handed back
    LEASE_LOST = "lease lost"  #: this process may no longer run it

    def __str__(self) -> str:
        return self.value


class TaskCancelled(BaseException):
    """Raised inside an executor by its token. Let it pass: the reason decides how the task ends.

    Attributes:
        reason: why the token fired.
    """

    def __init__(self, reason: CancelReason) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        if not hasattr(self, "reason"):  # of a class whose __init__ does not call ours
            return super().__str__()
        return f"the task was told to stop: {self.reason}"
