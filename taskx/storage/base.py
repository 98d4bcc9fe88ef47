"""What a store must do so that queues can run on it: the primitives."""

from __future__ import annotations

import os
import threading
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
from taskx.core.model import TASK_FIELDS, Task, TaskStatus, check_name, check_status
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
from taskx.liveness.base import InProcess, Liveness, Node
from taskx.liveness.leases import LEASE, Leases
from taskx.liveness.locks import HostLocks
from taskx.storage.eight import TaskRepository

_Both = Literal["waiting_on", "line", "running_on", "buffered_on", "stuck_on"]
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
Lookup = Literal["id", "unique_lock", "turn", "parent", _Both]
#: The columns whose values can be listed: some of those, and
#:
#: ``ready_type``
#:     the ``type`` of the pending tasks that may start.
Listed = Literal[_Both, "ready_type"]

#: Names of columns, and rows of these.
Fields = tuple[str, ...]
Rows = Sequence[tuple[Any, ...]]

R = TypeVar("R", bound="Repository")


def new_version() -> int:
    """The version of a new note: by chance, as a clock may be set back."""
    return 1 + int.from_bytes(os.urandom(7), "big")


class Reentered(RepositoryUnavailable):
    """The calling thread was in the middle of a write already: a finalizer or the like called.

    Raised instead of waiting for oneself. Nothing was changed.
    """

    def __init__(self) -> None:
        super().__init__(
            "called by a finalizer or the like in the middle of another write of this thread; nothing "
            "was changed. Have another thread do it, or submit a task that does"
        )


class Listener(ABC):
    """Hears of commits of other processes: see :meth:`Repository.listen`."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> str:
        """Wait for news, at most ``timeout`` seconds (None: for ever); return the kinds of all that came.

        It returns when something is heard, the time is over or it is closed, and not before: the callers
        call it again at once. It may also return what is no kind of news.
        """

    @abstractmethod
    def close(self) -> None:
        """Listen no more, and have a thread that waits go on."""


class Repository(TaskRepository):
    """A store of tasks, in eleven primitives; the eight methods and all rules about tasks come with it.

    A task is a row of the columns ``COLUMNS`` of ``taskx.core.record``. Params, results and checkpoints are
    kept as ``self.codecs.coded(writes)`` gives them. The store knows no rules: each write says itself
    under which condition it takes place.

    Of every method: calls come from several threads. The exception of a signal handler may strike between
    any two bytecodes; the next call must find the store as it was before that call or after it. No error
    of a driver gets out: raise ``RepositoryUnavailable`` for what may work later, and another
    ``RepositoryError`` for what will not. A read changes nothing and may be made again after an error.

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

    # --- writing

    @abstractmethod
    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes, in order; say for each whether its guard held.

        A guard and its change are one step, whoever else writes. When it returns they are committed, and
        survive a power cut where one of them is ``durable``. One transaction is best; a store without must
        keep the order for each task. With ``all_or_nothing`` none is applied unless every guard holds.

        Raises:
            Reentered: the calling thread is :attr:`entered`; nothing was applied.
            RepositoryError: nothing was applied, unless its ``in_doubt`` is True. Sent again then, as the
                same objects, a write that took place counts as held and is not done twice; so it is after
                an interrupt, if it may have taken place in part.
        """

    @property
    def entered(self) -> bool:
        """True if the calling thread holds a lock for which :meth:`apply` would wait for ever."""
        return False

    @abstractmethod
    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store notes, or with None remove them, each if its version is still that one; say for each.

        Version 0: if there is none. They survive a power cut. Of several, one that was stored by another
        process with the same text may count as stored.

        Raises:
            RepositoryError: none was stored; or, where its ``in_doubt`` is True, some may have been.
        """

    def put_note(self, name: str, text: str | None, version: int) -> bool:
        """Store or remove a single note: see :meth:`put_notes`."""
        return self.put_notes([NoteChange(name, text, version)])[0]

    # --- reading, by ``list`` and ``count``, too: what is committed when the call begins, by any process

    @abstractmethod
    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        """Rows that have one of these values, all different, in a lookup column: the fields asked for.

        They hold what is stored, however damaged: coded values stay coded. In any order, but for
        ``line``; at most ``limit``. There may be more values than a query takes: then make several.
        """

    @abstractmethod
    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        """The values that a column has, in order, each once, from the one after ``after``.

        At most ``limit``, and fewer only for speed: empty where there are none, and only there. However
        many rows have a value, it costs no more: an index is looked into for each value.
        """

    @abstractmethod
    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Pending tasks of these types that may start now, best first.

        Best: highest priority, then earliest stored; with ``ageing``, so many milliseconds of waiting
        count as one priority more. Those that no node holds or, with ``owner``, those that wait in that
        node's buffer. It costs as much as there are in the answer, however many wait. They may be gone
        the next moment: a start is a write with a guard.
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
        last call stopped: what was removed since makes it miss none.
        """

    @abstractmethod
    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        """The notes with these names that exist, by name; a store that can reads no others."""
        found = self.notes(os.path.commonprefix([*names]))  # noqa: RUF071  (of letters, not of folders)
        return {name: found[name] for name in names if name in found}

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        """The first notes whose name begins so and comes after ``after``, which begins so, too.

        At most ``limit``, in the order of names; a store that can reads no others.
        """
        found = self.notes(prefix)
        names = sorted(name for name in found if name > after)
        return {name: found[name] for name in names[:limit]}

    @abstractmethod
    def version(self) -> object:
        """A value that is another one when others may have changed something; cheap.

        Others are other processes, and other queues in this one. It is asked for many times a second.
        It may be late by a second, and be another one for nothing; it never misses a commit for good.
        """

    def listen(self, news: str) -> Listener | None:
        """Hear at once of what others commit, sooner than by a look at :meth:`version`.

        ``news`` has the kinds that are wanted: see ``lifecycle.news``. What is heard may be old, and some
        is never heard. None if nothing can be heard.
        """
        return None

    # --- the eight methods, by the moves of ``lifecycle``: its rules hold whichever way a record changes

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        found = self.find("id", task_ids, TASK_FIELDS)
        return {row[0]: task_from_row(row, self.codecs) for row in found}

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        found = self.find("id", task_ids, ("id", "status"))
        return {task_id: known_status(status) for task_id, status in found}

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

    # --- what it can do

    #: Whether other processes see the same tasks.
    shared = True
    #: Why it holds no more than tasks by themselves, as an error says it; empty if it holds all that a
    #: queue stores: notes, checkpoints, logs, unique keys, parents, turns, several new tasks at once.
    shortcoming = ""
    #: Seconds after which a node that shows no life is dead, where leases tell.
    lease_timeout = LEASE
    #: Where this host's nodes have their lock files then; a temporary folder unless given.
    run_folder: str | None = None

    def require(self, what: str) -> None:
        """Refuse, with a ``ConfigurationError``, what a :attr:`shortcoming` leaves no place for."""
        if self.shortcoming:
            raise ConfigurationError(
                f"{self.shortcoming} and no place for {what}: use SQLiteRepository, MongoRepository or "
                "MemoryRepository"
            )

    @property
    def liveness(self) -> Liveness[Any]:
        """The nodes on this repository, and which of them live."""
        made: Liveness[Any] | None = vars(self).get("_liveness")
        return made or vars(self).setdefault("_liveness", self._make_liveness())

    def nodes(self) -> Sequence[Node]:
        """The nodes that are started on this repository, or have died and were not seen to yet."""
        return self.liveness.nodes()

    def _make_liveness(self) -> Liveness[Any]:
        """Choose what tells which nodes live: leases, unless all nodes are in this process."""
        if not self.shared:
            return InProcess(self)
        locks = HostLocks(self.run_folder)
        return Leases(self, self.lease_timeout, locks, self.clock.monotonic)

    # --- opening and closing

    def prepare(self) -> None:
        """Get ready for a node, which is about to join.

        Raises:
            RepositoryError: none may join.
        """

    def ensure_there(self) -> None:
        """Raise if what the repository opened is not there any more; cheap, changes and opens nothing.

        Raises:
            RepositoryError: it is gone; the message says what happened, and what to do.
        """

    def within(self, seconds: float) -> AbstractContextManager[object]:
        """Have the operations inside raise ``RepositoryUnavailable`` after so long, if the store can."""
        return nullcontext()

    def shrink(self) -> bool:
        """Give a little of the space that nothing uses back to the disk; whether there is more."""
        return False

    def before_fork(self) -> None:
        """Have no transaction and no connection open that a forked child would inherit."""

    def after_fork(self) -> None:
        """In the parent: go on as before."""

    def renew_after_fork(self) -> None:
        """In a forked child: drop what belongs to the parent, without touching it."""

    def close(self) -> None:
        """Release what the repository holds open; a later operation opens it again."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_told: weakref.WeakSet[Repository] = weakref.WeakSet()
_one_fork = threading.Lock()
_prepared: list[Repository] = []


def tell_of_forks(repository: Repository) -> None:
    """Have a repository's methods about forks called: the last thing that its constructor does."""
    _told.add(repository)


def _before_fork() -> None:
    _one_fork.acquire()
    for repository in list(_told):
        repository.before_fork()
        _prepared.append(repository)


def _after_fork() -> None:
    while _prepared:
        _prepared.pop().after_fork()
    _one_fork.release()


def _renew_all_after_fork() -> None:
    global _one_fork
    _one_fork = threading.Lock()
    _prepared.clear()
    for repository in list(_told):
        repository.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_renew_all_after_fork
    )
