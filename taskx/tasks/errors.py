"""Every error TaskX raises, in one tree.

.. code-block:: text

    TaskxError
    ├── ConfigurationError (ValueError)   an option, an executor or their combination is invalid
    ├── PayloadError (ValueError)         params or a result are not JSON, too large, or do not fit
    ├── UnknownTaskType (LookupError)     the type has no executor and was not declared
    ├── TaskNotFound (LookupError)        no task has this id
    ├── ScheduleNotFound (LookupError)    no schedule has this name
    ├── NodeNotFound (LookupError)        no live node has this id
    ├── DuplicateTask                     another task has this id or holds this unique key
    ├── InvalidTransition                 the task's status does not allow the change
    ├── QueueFull                         the buffer has no room
    ├── QueueStopped                      the queue was stopped
    ├── TaskFailed                        raised by ``TaskHandle.result()``
    └── RepositoryError                   the repository failed
        ├── RepositoryUnavailable         locked, full or unreachable now; may work later
        ├── RepositoryCorrupt             the stored data is damaged, or it is not a database
        └── SchemaMismatch                the database belongs to another program or version

    Retry                                 raised by an executor: the attempt failed, try again
    Permanent                             raised by an executor: the task failed, do not try again
    Snooze                                raised by an executor: too early, run the task later
    TaskCancelled (BaseException)         raised by a token inside an executor

``TaskCancelled`` is outside the tree on purpose: ``except Exception`` in user code must not
catch a cancellation. So is ``Parked``, by which a task waits without a thread: see
:mod:`taskx.attempt.waiting`. ``Retry``, ``Permanent`` and ``Snooze`` are in :mod:`taskx.tasks.retry`.
"""

from __future__ import annotations

import threading
from enum import Enum

# From Python 3.11 on, an exception has notes, which its traceback shows.
_HAS_NOTES = hasattr(BaseException, "add_note")


class TaskxError(Exception):
    """The base class of all errors that TaskX raises."""


class ConfigurationError(TaskxError, ValueError):
    """An option, an executor or a combination of them is invalid. The message says which one and why."""


class PayloadError(TaskxError, ValueError):
    """Params or a result cannot be stored.

    Attributes:
        path: the place of the invalid value, for example ``params.items[3].price``.
        problem: what is wrong with the value, as text.
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
    """The repository has no task with the given id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id

    def __str__(self) -> str:
        return f"no task with id {self.task_id!r} in the repository"


class ScheduleNotFound(TaskxError, LookupError):
    """The repository has no schedule with the given name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"no schedule named {self.name!r} in the repository"


class NodeNotFound(TaskxError, LookupError):
    """No node with the given id is alive."""

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)
        self.node_id = node_id

    def __str__(self) -> str:
        return f"no live node with id {self.node_id!r} on the repository"


class DuplicateTask(TaskxError):
    """A task with the same id, or one that holds the same unique key, already exists. Nothing was stored.

    Attributes:
        task_id: the id of the existing task.
        unique_key: the key that the existing task holds; None if the id is the duplicate.
    """

    def __init__(self, task_id: str, unique_key: str | None = None) -> None:
        super().__init__(task_id, unique_key)
        self.task_id = task_id
        self.unique_key = unique_key

    def __str__(self) -> str:
        if self.unique_key is None:
            return f"a task with id {self.task_id!r} already exists; nothing was stored"
        return (
            f"task {self.task_id} already holds the unique key {self.unique_key!r}; "
            "nothing was stored"
        )


class InvalidTransition(TaskxError):
    """The task's current status does not allow the operation. Nothing was changed."""


class QueueFull(TaskxError):
    """The buffer has no room for the submitted tasks. Nothing was stored."""


class QueueStopped(TaskxError):
    """The queue was stopped and accepts no more tasks. Nothing was stored."""


class TaskFailed(TaskxError):
    """Raised by ``TaskHandle.result()`` when the task failed.

    Its ``str`` and ``repr`` are a single line. An uncaught one shows the task's traceback, too, which is
    one of its ``__notes__`` (Python 3.11 or newer).

    Attributes:
        task_id: the id of the task.
        error: the error text of its last attempt.
        attempt: the number of that attempt, from 1.
        remote_traceback: the task's traceback as text; empty if there was none.
        error_type: the full class name of the exception, as ``Task.error_type``; empty if there was none.
    """

    def __init__(
        self,
        task_id: str,
        error: str,
        attempt: int,
        remote_traceback: str = "",
        error_type: str = "",
    ) -> None:
        super().__init__(task_id, error, attempt, remote_traceback, error_type)
        self.task_id = task_id
        self.error = error
        self.attempt = attempt
        self.remote_traceback = remote_traceback
        self.error_type = error_type
        if remote_traceback and _HAS_NOTES:
            self.add_note(f"The task's traceback:\n\n{remote_traceback}")  # type: ignore[attr-defined]

    @property
    def traceback(self) -> str:
        """The same as :attr:`remote_traceback`."""
        return self.remote_traceback

    def __str__(self) -> str:
        first, *more = self.error.strip().splitlines() or [""]
        text = f"task {self.task_id} failed in attempt {self.attempt}: {first}"
        if more:
            text += " …"
        if self.remote_traceback and not _HAS_NOTES:
            text += " (see the error's attribute traceback)"
        return text

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"


class RepositoryError(TaskxError):
    """The repository failed. The driver's own error is the ``__cause__``.

    Attributes:
        in_doubt: True if the write may have happened anyway: a server did not answer, or a repository
            that has only the eight methods failed and could not be read afterwards. False if nothing
            was changed.
        task_id: the id of the task whose submit is in doubt, else empty. Submit the same id again: this
            stores the task or raises ``DuplicateTask``. For ``submit_many`` it is the id of the first
            task; either all tasks are stored or none.
    """

    in_doubt: bool = False
    task_id: str = ""


class RepositoryUnavailable(RepositoryError):
    """The repository cannot be used now. Try again later.

    Possible reasons: it was locked for too long, it is unreachable, the disk is full, or the SQLite file
    is missing or was moved, deleted or replaced.
    """


class RepositoryCorrupt(RepositoryError):
    """The stored data is damaged, or the file is not a database."""


class SchemaMismatch(RepositoryError):
    """The database belongs to another program, or to a newer version of TaskX. Nothing was stored."""


def is_interrupt(error: BaseException) -> bool:
    """Return True if an exception must reach the program: Ctrl-C or an exit, in the main thread.

    Extensions can raise other exceptions that are not derived from ``Exception``, such as a panic. Such an
    error belongs to the called code. The same is true for any error in another thread.
    """
    kind = type(error)  # isinstance would also ask the object for its __class__
    return issubclass(kind, (KeyboardInterrupt, SystemExit)) and on_main_thread()


def on_main_thread() -> bool:
    """Return True in the main thread, where signal handlers run and raise."""
    return threading.current_thread() is threading.main_thread()


class CancelReason(str, Enum):
    """The reason why a token fired."""

    CANCEL = "cancel"  #: the task was cancelled
    TIMEOUT = "timeout"  #: the deadline passed
    STOP = "stop"  #: the queue is stopping; the task is handed back
    LEASE_LOST = "lease lost"  #: this process may no longer run the task

    def __str__(self) -> str:
        return self.value


class TaskCancelled(BaseException):
    """Raised inside an executor by its token. Do not catch it: the reason decides how the task ends.

    Attributes:
        reason: the reason why the token fired.
    """

    def __init__(self, reason: CancelReason) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        if not hasattr(self, "reason"):  # a subclass whose __init__ does not call this one
            return super().__str__()
        return f"the task was told to stop: {self.reason}"
