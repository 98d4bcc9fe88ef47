"""What a repository is: eight methods for users, a few primitives for the runtime.

:class:`TaskRepository` is all that a user has to implement. :class:`Repository` adds what the runtime
builds its guarantees on; it gives the eight in terms of the primitives, so that the rules of
``lifecycle`` hold whichever way a record is changed.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import attrs

from taskx.core import lifecycle, payload
from taskx.core.checks import check_int, check_number
from taskx.core.clock import SYSTEM_CLOCK, Clock, to_ms
from taskx.core.codec import Codec, Codecs
from taskx.core.errors import (
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    RepositoryUnavailable,
    TaskNotFound,
)
from taskx.core.model import (
    MAX_NAME,
    TIME_FIELDS,
    Task,
    TaskFilter,
    TaskStatus,
    check_moment,
    check_name,
    check_status,
)
from taskx.core.payload import clean_text
from taskx.core.record import Ended, Stub, optional_ms, policy_to_text
from taskx.core.retry import check_policy
from taskx.core.writes import Write
from taskx.storage.began import Began

#: Among how many tasks that may start, those stored first, the one is sought that waits longest.
OLDEST = 1000
#: Longest progress message, in characters.
MAX_MESSAGE = 1000
#: Longest error or traceback that is written by hand, in characters.
MAX_TEXT = 100_000


class TaskRepository(ABC):
    """The eight methods of a repository; implement them and ``Queue`` works with it.

    Such a queue takes itself for the only process on the repository: what it finds running when it
    starts counts as left behind by a process that died. Calls come from several threads. Keep every
    field of the task (``to_dict``/``from_dict`` help); give back copies, not what is stored.

    A method that raises, before or after it has changed something, is called once more if the change is
    not there. Raise ``RepositoryUnavailable`` or an ``OSError`` for what may work later.
    """

    @abstractmethod
    def create(self, task: Task) -> None:
        """Store a new task; ``DuplicateTask`` if one has its id."""

    @abstractmethod
    def get_by_id(self, task_id: str) -> Task:
        """The task with that id; ``TaskNotFound`` if there is none."""

    @abstractmethod
    def update(self, task: Task) -> None:
        """Replace the stored task that has this one's id; ``TaskNotFound`` if there is none."""

    @abstractmethod
    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        """Set status and message; ``TaskNotFound`` if there is no such task."""

    @abstractmethod
    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set progress (0 to 100) and message; ``TaskNotFound`` if there is no such task."""

    @abstractmethod
    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first, from its offset, at most its limit."""

    @abstractmethod
    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter, whatever its offset and limit."""

    @abstractmethod
    def delete(self, task_id: str) -> None:
        """Remove the task; ``TaskNotFound`` if there is none."""


@attrs.frozen(kw_only=True)
class Node:
    """One started queue in one process, as the repository knows it.

    Attributes:
        id: unique for every start.
        name: for people: host, process and start.
        types: the task types it runs.
        stopping: True once it was asked to stop.
        alive: True while its process lives, False once it is known to be dead, None where neither
            can be told.
    """

    id: str
    name: str
    types: tuple[str, ...] = ()
    stopping: bool = False
    alive: bool | None = None


class Note(NamedTuple):
    """A short text kept under a name.

    Attributes:
        text: what was stored.
        version: rises with every change; never 0, and never one that an earlier note of its name had.
    """

    text: str
    version: int


class NoteChange(NamedTuple):
    """A change of a note, which holds if the note still has a version.

    Attributes:
        name: its name.
        text: what to store; None to remove it.
        version: the one that it must have now; 0 if there must be none.
    """

    name: str
    text: str | None
    version: int


def new_version() -> int:
    """The version of a new note: by chance, as a clock may be set back."""
    return 1 + int.from_bytes(os.urandom(7), "big")


class Changes:
    """Tells one that asks whether others changed something since it last asked; true at first.

    Args:
        repository: what others may have changed.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._seen: object = None

    def __call__(self) -> bool:
        """Return whether something may have changed since the last call.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        before, self._seen = self._seen, self._repository.version()
        return bool(self._seen != before)


R = TypeVar("R", bound="Repository")


class Reentered(RepositoryUnavailable):
    """The calling thread was in the middle of a write already: a finalizer or the like called.

    Raised instead of waiting for oneself. Nothing was changed.
    """

    def __init__(self) -> None:
        super().__init__(
            "called by a finalizer or the like in the middle of another write of this thread; nothing "
            "was changed. Have another thread do it, or submit a task that does"
        )


class Repository(TaskRepository):
    """A repository with the primitives that the runtime needs; ours all are.

    Args:
        clock: what the eight methods stamp records with.
        codec: what params, results and checkpoints are stored with; of several, the first one writes.
    """

    def __init__(
        self, clock: Clock = SYSTEM_CLOCK, codec: Codec | Iterable[Codec] | None = None
    ) -> None:
        self.clock = clock
        self.codecs = Codecs(codec)
        #: The queues on this object. If there are several, each must hear of the others' commits.
        self.queues: weakref.WeakSet[object] = weakref.WeakSet()

    # --- the primitives

    @property
    def entered(self) -> bool:
        """True if the calling thread holds a lock for which :meth:`apply` would wait for ever."""
        return False

    @abstractmethod
    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction; says for each whether its guard held.

        When it returns they are committed. With ``all_or_nothing`` none is applied unless every
        guard holds.

        Raises:
            Reentered: the calling thread is :attr:`entered`; nothing was applied.
            RepositoryError: nothing was applied, unless its ``in_doubt`` is True. Sent again then, as the
                same objects, a write that took place is not done twice.
        """

    @abstractmethod
    def settle(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Say for each write whether it took place, after ``apply`` was cut short by an interrupt."""

    @abstractmethod
    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""

    def page(self, filter: TaskFilter) -> tuple[Sequence[Task], int]:
        """The tasks that meet the filter, newest first, and how many meet it in all.

        Both of one moment, where the repository can tell; else such as do not contradict each other.
        """
        tasks, count = self.list(filter), self.count(filter)
        return tasks, max(count, filter.offset + len(tasks)) if tasks else count

    @abstractmethod
    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Pending tasks of these types that may start now, best first.

        Best: highest priority, then earliest stored; with ``ageing``, so many milliseconds of waiting
        count as one priority more. Those that no node holds or, with ``owner``, those that wait in that
        node's buffer.
        """

    @abstractmethod
    def due(self, now: int, limit: int) -> Sequence[str]:
        """Ids of held back pending tasks whose ``run_at`` has come, earliest first."""

    @abstractmethod
    def next_due(self) -> int | None:
        """The earliest ``run_at`` of the held back pending tasks, in milliseconds."""

    @abstractmethod
    def oldest_ready(self) -> int | None:
        """Since when the pending task has waited, of those that may start now, that waits longest.

        In milliseconds; None if there is none. Of all types, and whoever holds it. It waits since it was
        stored or, if that was later, since its ``run_at``. At least the :data:`OLDEST` are looked at that
        were stored first: so many may be read whatever waits.
        """

    @abstractmethod
    def owned(self, node: str, limit: int | None = None) -> Sequence[Stub]:
        """The running tasks that a node holds, and then the pending ones; at most ``limit``."""

    @abstractmethod
    def owners(self) -> Sequence[str]:
        """The ids of all nodes that hold tasks, or on which one is stuck."""

    @abstractmethod
    def unfinished(self, types: Iterable[str]) -> bool:
        """Whether a task of these types runs on a node, or is pending and not held back."""

    @abstractmethod
    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Tasks of a finished status that ended before a moment, in milliseconds, newest first.

        Tasks of which a thread still runs are left out. ``after`` is the ``place`` of the task where the
        last call stopped.
        """

    @abstractmethod
    def needed(self, task_ids: Sequence[str]) -> set[str]:
        """Return the ids of these on which a stored task depends that is not one of these."""

    @abstractmethod
    def children(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that depend on one of these, whatever their status, each once."""

    @abstractmethod
    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""

    def asked_to_cancel(self, task_ids: Sequence[str]) -> Collection[str]:
        """Return the ids of these tasks whose cancel was requested."""
        tasks = self.get_many(task_ids).values()
        return [task.id for task in tasks if task.cancel_requested_at is not None]

    @abstractmethod
    def unique_holders(self, keys: Sequence[str]) -> dict[str, str]:
        """Which task holds each of these unique keys, by key."""

    @abstractmethod
    def awaited(self, after: str, limit: int) -> Sequence[str]:
        """The ids that waiting tasks wait on, in order, from the one after ``after``.

        At most ``limit``, and fewer only for speed: empty where there are none, and only there.
        """

    @abstractmethod
    def waiting_for(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that wait on one of these."""

    @abstractmethod
    def next_in_line(self, key: str) -> str | None:
        """The first task of a concurrency key that waits for its turn."""

    @abstractmethod
    def lines(self, after: str, limit: int) -> dict[str, bool]:
        """Concurrency keys of tasks that wait for their turn, in order, from the one after ``after``.

        For each, whether it stands still: no task has its turn. At most ``limit``, and fewer only for
        speed: empty where there are none, and only there.
        """

    @abstractmethod
    def stuck_on(self, node: str) -> Sequence[Stub]:
        """The tasks, whatever their status, that a thread of an ended attempt still runs on a node."""

    @abstractmethod
    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""

    @abstractmethod
    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store notes, or with None remove them, each if its version is still that one; says for each.

        Version 0: if there is none. They survive a power cut. Of several, one that was stored by another
        process with the same text may count as stored.

        Raises:
            RepositoryError: none was stored; or, where its ``in_doubt`` is True, some may have been.
        """

    def put_note(self, name: str, text: str | None, version: int) -> bool:
        """Store or remove a single note: see :meth:`put_notes`."""
        return self.put_notes([NoteChange(name, text, version)])[0]

    def shrink(self) -> bool:
        """Give a little of the space that nothing uses back to the disk; whether there is more."""
        return False

    @abstractmethod
    def version(self) -> object:
        """A value that is another one when others may have changed something; cheap.

        Others are other processes, and other queues in this one. See :class:`Changes`.
        """

    def ensure_there(self) -> None:
        """Raise if what the repository opened is not there any more; cheap, changes and opens nothing.

        Raises:
            RepositoryError: it is gone; the message says what happened, and what to do.
        """

    @abstractmethod
    def join(self, node: Node) -> None:
        """Record a node, and prove it alive from now on until :meth:`leave` or process death."""

    @abstractmethod
    def record_types(self, node: str, types: Sequence[str]) -> None:
        """Record the types that a node runs now, in place of those that it joined with."""

    def watch_lease(self, node: str, lost: Callable[[], object]) -> None:
        """Have ``lost()`` called when a node of this process may be taken for dead.

        That is before others may take over what it runs. Where only the death of the process lets
        them, it is never called.
        """

    def is_dead(self, node: str) -> bool:
        """Whether a node that was seen to be dead is so still; asked after its tasks were read."""
        return True

    def began(self, node: str) -> Began | None:
        """Return the tasks that the threads of a node began last: to note them, or to read a dead node's.

        None if they are not kept, or cannot be read here; then it may have executed any of its tasks.
        """
        return None

    @abstractmethod
    def mark_stopping(self, node: str) -> None:
        """Record that a node is stopping: what it still runs when it ends was interrupted."""

    @abstractmethod
    def leave(self, node: str) -> None:
        """Forget a node that holds nothing any more: one's own, or a dead one."""

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """All recorded nodes."""

    def renew_after_fork(self) -> None:
        """In a forked child: drop what belongs to the parent, without touching it."""

    def close(self) -> None:
        """Release what the repository holds open; a later operation opens it again."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the eight, through lifecycle

    def create(self, task: Task) -> None:
        """Store a new pending task.

        Raises:
            DuplicateTask: one has its id, or holds its unique key.
            InvalidTransition: it is not pending.
            PayloadError: its params break the JSON rules.
            ConfigurationError: another field holds what it may not.
        """
        task = _storable(task)
        if task.status is not TaskStatus.PENDING:
            raise InvalidTransition(f"a new task is pending, not {task.status}")
        now = self.clock.now_ms()
        between = lifecycle.between_tasks(task)
        insert = lifecycle.create(
            task_id=task.id,
            type=task.type,
            params=payload.encode_params(task.params),
            created_by=task.created_by,
            now=now if task.created_at is None else to_ms(task.created_at, "created_at"),
            priority=task.priority,
            run_at=optional_ms(task.run_at, "run_at"),
            timeout=task.timeout,
            max_attempts=task.max_attempts,
            max_crashes=task.max_crashes,
            retry=policy_to_text(task.retry),
            **between,
        )
        if parents := between.get("depends_on"):  # whether they have ended is seen by whoever runs
            lifecycle.wait_for(insert, parents[-1])
        if not self.apply([insert])[0]:
            key = task.unique_key
            holder = None if key is None else self.unique_holders([key]).get(key)
            raise DuplicateTask(holder or task.id, key if holder else None)

    def get_by_id(self, task_id: str) -> Task:
        """The task with that id; ``TaskNotFound`` if there is none."""
        found = self.get_many([check_name(task_id, "id")])
        if task_id not in found:
            raise TaskNotFound(task_id)
        return found[task_id]

    def update(self, task: Task) -> None:
        """Replace what may be replaced of the stored task: not its identity, fence and owner.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: its status may not move as asked, or it moved meanwhile.
            DuplicateTask: it would take a unique key again that another task holds.
            PayloadError: params or result break the JSON rules.
            ConfigurationError: another field holds what it may not.
        """
        task = _storable(task)
        stored = self.get_by_id(task.id)
        if not any(self.apply(lifecycle.amend(stored, task, self.clock.now_ms()))):
            if task.status is TaskStatus.PENDING:
                self.refuse_if_key_held(stored)
            raise InvalidTransition(f"task {task.id} moved on while it was being updated")

    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        """Set status and message.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: no move leads there, or it moved meanwhile.
            DuplicateTask: it would take a unique key again that another task holds.
        """
        stored = self.get_by_id(task_id)
        write = lifecycle.set_status(
            stored, check_status(status), clean_text(message, MAX_MESSAGE), self.clock.now_ms()
        )
        if not self.apply([write])[0]:
            if status == TaskStatus.PENDING:
                self.refuse_if_key_held(stored)
            raise InvalidTransition(f"task {task_id} moved on while its status was being set")

    def refuse_if_key_held(self, task: Task) -> None:
        """``DuplicateTask`` where another task holds the unique key that this one would take again."""
        key = task.unique_key
        holder = None if key is None else self.unique_holders([key]).get(key)
        if holder is not None and holder != task.id:
            raise DuplicateTask(holder, key)

    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set progress, clamped to 0 to 100, and message of a running task; of another, nothing.

        Raises:
            TaskNotFound: there is no such task.
        """
        percent, text = check_progress(progress, message)
        if not self.apply([lifecycle.progress(task_id, None, percent, text)])[0]:
            self.get_by_id(task_id)

    def delete(self, task_id: str) -> None:
        """Remove a task that is not running.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: it is running, or a thread of an ended attempt still runs.
        """
        if not self.apply([lifecycle.delete(check_name(task_id, "id"))])[0]:
            raise lifecycle.not_deleted(self.get_by_id(task_id))


def _storable(task: Task) -> Task:
    """The task with every value such as a database can hold; the caller's own stays as it is."""
    for what in ("id", "type", "created_by"):
        check_name(getattr(task, what), what)
    check_int(task.priority, "priority", -(2**31))
    check_number(task.duration, "duration")
    if task.timeout is not None:
        check_number(task.timeout, "timeout")
    for what in ("max_attempts", "max_crashes"):
        if getattr(task, what) is not None:
            check_int(getattr(task, what), what, 1)
    check_policy(task.retry)
    for what in TIME_FIELDS:
        check_moment(getattr(task, what), what)
    progress, message = check_progress(task.progress, task.message)
    return attrs.evolve(
        task,
        status=check_status(task.status),
        progress=progress,
        message=message,
        error=clean_text(task.error, MAX_TEXT),
        error_type=clean_text(task.error_type, MAX_NAME),
        traceback=clean_text(task.traceback, MAX_TEXT),
        worker=clean_text(task.worker, MAX_MESSAGE),
    )


def check_progress(percent: float, message: str) -> tuple[int, str]:
    """Progress as it is stored: a whole percentage from 0 to 100 and a bounded text.

    Raises:
        PayloadError: the percentage is no number, or the message no text.
    """
    if isinstance(percent, bool) or not isinstance(percent, (int, float)) or percent != percent:
        raise PayloadError("progress", f"must be a number from 0 to 100, not {percent!r}")
    if not isinstance(message, str):
        raise PayloadError("message", f"must be a str, not {type(message).__name__}")
    return int(min(max(percent, 0), 100)), clean_text(message, MAX_MESSAGE)
