"""What a repository is: eight methods for users, a few primitives for the runtime.

:class:`TaskRepository` is all that a user has to implement. :class:`Repository` adds what the runtime
builds its guarantees on; it gives the eight in terms of the primitives, so that the rules of
``lifecycle`` hold whichever way a record is changed.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

from taskx.core import lifecycle
from taskx.core.clock import SYSTEM_CLOCK, Clock, to_ms
from taskx.core.codec import Codec, Codecs
from taskx.core.creation import new_record, storable
from taskx.core.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    RepositoryUnavailable,
    TaskNotFound,
)
from taskx.core.model import (
    TASK_FIELDS,
    Task,
    TaskFilter,
    TaskStatus,
    check_name,
    check_status,
)
from taskx.core.payload import clean_text
from taskx.core.record import (
    MAX_MESSAGE,
    Ended,
    Stub,
    check_progress,
    known_status,
    parents_from_text,
    task_from_row,
)
from taskx.core.writes import Note, NoteChange, Write
from taskx.liveness.base import InProcess, Liveness
from taskx.liveness.leases import LEASE, Leases
from taskx.liveness.locks import HostLocks

#: The columns of a row by whose value rows are found, all through an index:
#:
#: ``id``, ``unique_lock``, ``turn``
#:     in one row at most.
#: ``waiting_on``
#:     of the tasks that wait for their parents.
#: ``parent``
#:     of pairs of a task and one of its parents, which have the fields ``parent`` and ``id`` and no other.
#:     They may be there before the task is.
#: ``line``
#:     the ``concurrency_key`` of the tasks that wait for its turn. Rows come in the order in which they
#:     get it.
#: ``running_on``, ``buffered_on``
#:     the ``owner``, if there is one, of the running tasks; and of the pending ones that may start.
#: ``stuck_on``
#:     not empty.
Lookup = Literal[
    "id",
    "unique_lock",
    "turn",
    "waiting_on",
    "parent",
    "line",
    "running_on",
    "buffered_on",
    "stuck_on",
]
#: The columns whose values can be listed: some of those, and
#:
#: ``ready_type``
#:     the ``type`` of the pending tasks that may start.
Listed = Literal["waiting_on", "line", "running_on", "buffered_on", "stuck_on", "ready_type"]


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

    #: Why it holds no more than tasks by themselves, as an error says it; empty if it holds all that a
    #: queue stores: notes, checkpoints, logs, unique keys, parents, turns, several new tasks at once.
    shortcoming = ""

    def require(self, what: str) -> None:
        """Refuse, with a ``ConfigurationError``, what a :attr:`shortcoming` leaves no place for."""
        if self.shortcoming:
            raise ConfigurationError(
                f"{self.shortcoming} and no place for {what}: use SQLiteRepository, MongoRepository or "
                "MemoryRepository"
            )

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
    def find(
        self,
        column: Lookup,
        values: Sequence[str],
        fields: tuple[str, ...],
        limit: int | None = None,
    ) -> Sequence[tuple[Any, ...]]:
        """Rows that have one of these values in a lookup column: of each the fields asked for.

        They hold what is stored, however damaged: coded values stay coded. In any order, but for
        ``line``; at most ``limit``.
        """

    @abstractmethod
    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        """The values that a column has, in order, each once, from the one after ``after``.

        At most ``limit``, and fewer only for speed: empty where there are none, and only there.
        """

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        found = self.find("id", task_ids, TASK_FIELDS)
        return {row[0]: task_from_row(row, self.codecs) for row in found}

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
    def due(self, before: int | None, limit: int) -> Sequence[tuple[str, int]]:
        """The held back pending tasks whose ``run_at`` has come by then, earliest first.

        Of each its id and its ``run_at``, in milliseconds; with None those of any ``run_at``.
        """

    @abstractmethod
    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Tasks of a finished status that ended before a moment, in milliseconds, newest first.

        Tasks of which a thread still runs are left out. ``after`` is the ``place`` of the task where the
        last call stopped.
        """

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        found = self.find("id", task_ids, ("id", "status"))
        return {task_id: known_status(status) for task_id, status in found}

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

    def within(self, seconds: float) -> AbstractContextManager[object]:
        """Have the operations inside raise ``RepositoryUnavailable`` after so long, if the store can."""
        return nullcontext()

    # --- nodes

    #: Whether other processes see the same tasks.
    shared = True
    #: Seconds after which a node that shows no life is dead, where leases tell.
    lease_timeout = LEASE
    #: Where this host's nodes have their lock files then; a temporary folder unless given.
    run_folder: str | None = None

    @property
    def liveness(self) -> Liveness:
        """The nodes on this repository, and which of them live."""
        made: Liveness | None = vars(self).get("_liveness")
        return made or vars(self).setdefault("_liveness", self._make_liveness())

    def _make_liveness(self) -> Liveness:
        """Choose what tells which nodes live: leases, unless all nodes are in this process."""
        if not self.shared:
            return InProcess(self)
        locks = HostLocks(self.run_folder)
        return Leases(self, self.lease_timeout, locks, self.clock.monotonic)

    def prepare(self) -> None:
        """Get ready for a node, which is about to join.

        Raises:
            RepositoryError: none may join.
        """

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
        task = storable(task)
        now = self.clock.now_ms()
        insert = new_record(task, now if task.created_at is None else to_ms(task.created_at))
        # Whether they have ended is seen by whoever runs.
        if parents := parents_from_text(insert.row.get("depends_on")):
            lifecycle.wait_for(insert, parents[-1])
        if not self.apply([insert])[0]:
            holder = self._holder(task.unique_key)
            raise DuplicateTask(holder or task.id, task.unique_key if holder else None)

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
        task = storable(task)
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
        holder = self._holder(task.unique_key)
        if holder is not None and holder != task.id:
            raise DuplicateTask(holder, task.unique_key)

    def _holder(self, key: str | None) -> str | None:
        """The task that holds a unique key."""
        found = () if key is None else self.find("unique_lock", [key], ("id",))
        return next((task_id for (task_id,) in found), None)

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
