"""What a store must do so that queues can run on it: the primitives."""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

from taskx.core.clock import SYSTEM_CLOCK, Clock
from taskx.core.codec import Codec, Codecs
from taskx.core.errors import ConfigurationError, RepositoryUnavailable
from taskx.core.model import Task, TaskFilter
from taskx.core.record import Ended, Stub
from taskx.core.writes import Note, NoteChange, Write
from taskx.liveness.base import InProcess, Liveness, Node
from taskx.liveness.leases import LEASE, Leases
from taskx.liveness.locks import HostLocks
from taskx.storage.eight import ByMoves

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


class Repository(ByMoves):
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

    # --- reading: what is committed when the call begins, by whichever process

    @abstractmethod
    def find(
        self,
        column: Lookup,
        values: Sequence[str],
        fields: tuple[str, ...],
        limit: int | None = None,
    ) -> Sequence[tuple[Any, ...]]:
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
    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first, from its offset, at most its limit."""

    @abstractmethod
    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter, whatever its offset and limit."""

    @abstractmethod
    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""

    @abstractmethod
    def version(self) -> object:
        """A value that is another one when others may have changed something; cheap.

        Others are other processes, and other queues in this one. It is asked for many times a second.
        It may be late by a second, and be another one for nothing; it never misses a commit for good.
        """

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

    def renew_after_fork(self) -> None:
        """In a forked child: drop what belongs to the parent, without touching it."""

    def close(self) -> None:
        """Release what the repository holds open; a later operation opens it again."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
