"""The primitives: the methods that a store must have so that queues can run on it."""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import attrs

from taskx.stores.eight import TaskRepository
from taskx.stores.liveness.base import InProcess, Liveness, Node
from taskx.stores.liveness.leases import LEASE, Leases
from taskx.stores.liveness.locks import HostLocks
from taskx.stores.parts import Forks, House, News
from taskx.stores.transactions import Transactions
from taskx.tasks import lifecycle, payload
from taskx.tasks.clock import LAST, SYSTEM_CLOCK, Clock, to_datetime, to_ms, within_calendar
from taskx.tasks.codec import Codec, Codecs
from taskx.tasks.creation import new_record, storable
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    RepositoryUnavailable,
    TaskNotFound,
)
from taskx.tasks.log import Once, log
from taskx.tasks.model import TASK_FIELDS, Task, TaskFilter, TaskStatus, check_name, check_status
from taskx.tasks.payload import clean_text
from taskx.tasks.record import (
    CUT,
    MAX_MESSAGE,
    Ended,
    Stub,
    add_parts,
    check_progress,
    known_status,
    parents_from_text,
    parts_of,
    task_from_row,
)
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Note, NoteChange, Write

_Both = Literal["waiting_on", "line", "running_on", "buffered_on", "stuck_on"]
#: The lookup columns. :meth:`Repository.find` finds rows by their values, each through an index:
#:
#: ``id``, ``unique_lock``, ``turn``
#:     A value is in one row at most.
#: ``waiting_on``
#:     The parent that a pending task waits for.
#: ``parent``
#:     A row is a pair of a task and one of its parents. It has the fields ``parent`` and ``id`` and no
#:     others. The pairs may be stored before the task.
#: ``line``
#:     The ``concurrency_key`` of the tasks that wait for their turn. The rows come in the order in which
#:     they get their turn.
#: ``running_on``
#:     The ``owner`` of a running task. Tasks without an owner are left out.
#: ``buffered_on``
#:     The ``owner`` of a pending task that may start. Tasks without an owner are left out.
#: ``stuck_on``
#:     The node on which a thread of the task is stuck. Rows with an empty value are left out.
Lookup = Literal["id", "unique_lock", "turn", "parent", _Both]
#: The columns whose values :meth:`Repository.distinct` lists: some lookup columns, and
#:
#: ``ready_type``
#:     The ``type`` of the pending tasks that may start.
Listed = Literal[_Both, "ready_type"]

#: The times by which :meth:`Repository.due` finds pending tasks, each through an index:
#:
#: ``run_at``
#:     The tasks that wait for their ``run_at``.
#: ``expires_at``
#:     The tasks that have an ``expires_at``, whatever they wait for.
Timed = Literal["run_at", "expires_at"]

#: Names of columns, and rows that have these columns.
Fields = tuple[str, ...]
Rows = Sequence[tuple[Any, ...]]

#: The conditions of a filter that every repository applies.
BASIC_CONDITIONS = frozenset({"type", "status", "created_by", "start_date", "end_date"})

# Newest tasks that are searched for flows if the store has no index of them.
_MOST_SEARCHED = 10_000

R = TypeVar("R", bound="Repository")


def new_version() -> int:
    """Return a random version for a new note. A clock would not do, as it may be set back."""
    return 1 + int.from_bytes(os.urandom(7), "big")


class Reentered(RepositoryUnavailable):
    """The calling thread is in the middle of another write, and would wait for itself. Nothing was changed.

    It happens in finalizers and log handlers, which Python may call anywhere.
    """

    def __init__(self) -> None:
        super().__init__(
            "this thread is in the middle of another write, so this one cannot be stored, and nothing was "
            "changed. Python may call a finalizer or a log handler at such a moment: make the call from "
            "another thread, or later"
        )


class Locked(RepositoryUnavailable):
    """Another transaction has locked what a write changes, and keeps it. Nothing was changed.

    Args:
        text: what the store says.
        patience: seconds for which the write should be tried again before the caller is told.
    """

    def __init__(self, text: str, patience: float) -> None:
        super().__init__(text)
        self.patience = patience


class Repository(TaskRepository):
    """A store of tasks: subclasses implement eleven primitives and inherit everything else.

    The eight methods of ``TaskRepository`` and all rules about tasks are inherited.

    A task is a row with the columns ``COLUMNS`` of ``taskx.tasks.record``. Params, results and checkpoints
    are stored in the form that ``self.codecs.coded(writes)`` returns. The store knows no rules: each
    write carries its own guard.

    Every method must keep these promises:

    - Several threads may call at the same time.
    - A signal handler may raise an exception between any two bytecodes. The next call must find the store
      as it was before or after the interrupted call.
    - No error of a driver leaves the method. Raise ``RepositoryUnavailable`` if the call may succeed later,
      otherwise another ``RepositoryError``.
    - A read changes nothing, so it can be repeated after an error.

    Args:
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.

    Attributes:
        conditions: the fields of a ``TaskFilter`` that ``list`` and ``count`` apply. A queue applies the
            others itself, task by task.
    """

    conditions: frozenset[str] = BASIC_CONDITIONS

    def __init__(
        self,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | Codecs | None = None,
        timing: Timing = DEFAULT_TIMING,
        liveness: Liveness[Any] | None = None,
    ) -> None:
        self.clock = clock
        self.codecs = codec if isinstance(codec, Codecs) else Codecs(codec)
        self.timing = timing
        if liveness is not None:
            self._liveness = liveness
        #: What only some stores can do: subclasses put objects of their own in the place of these.
        self.reads = Reads(self)
        self.transactions = Transactions(type(self).__name__, timing)
        self.news = News()
        self.house = House()
        self.forks = Forks()
        #: The queues that use this object. If there are several, each must be told of the others' commits.
        self.queues: weakref.WeakSet[object] = weakref.WeakSet()

    def _extend_transactions(self, extend: Callable[[Transactions], Transactions]) -> None:
        """Have other transactions respected, too: ``extend`` makes the object from the present one."""
        self.transactions = extend(self.transactions)

    # --- writing

    @abstractmethod
    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in order. Return for each one True if its guard held.

        Checking a guard and applying its change is one atomic step. When the method returns, the writes
        are committed. They also survive a power cut if one of them is ``durable``. Apply them in one
        transaction if the store has transactions. Otherwise keep the order of the writes of each task.
        With ``all_or_nothing``, no write is applied unless every guard holds.

        Raises:
            Reentered: :attr:`entered` is True for the calling thread; nothing was applied.
            RepositoryError: nothing was applied, unless the error's ``in_doubt`` is True. In that case, and
                after an interrupt that may have come in the middle, the caller may send the same objects
                again. A write that took place then counts as held and is not applied twice.
        """

    @property
    def entered(self) -> bool:
        """True if the calling thread holds a lock for which :meth:`apply` would wait for ever."""
        return False

    @abstractmethod
    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store notes, or remove them (text None). Return for each change True if it was made.

        A change is made if the stored note has the version that the change names. Version 0 means that no
        such note exists. A changed note gets its version + 1, and a new one :func:`new_version`. The
        changes survive a power cut. If there are several changes, a note that another process stored with
        the same text may count as stored.

        Raises:
            RepositoryError: nothing was stored. If the error's ``in_doubt`` is True, some notes may have
                been.
        """

    def put_note(self, name: str, text: str | None, version: int) -> bool:
        """Store or remove a single note: see :meth:`put_notes`."""
        return self.put_notes([NoteChange(name, text, version)])[0]

    # --- reading. Each read, also ``list`` and ``count``, sees all that any process had committed before it

    @abstractmethod
    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        """Return the given fields of the rows that have one of these values in a lookup column.

        The values are all different. There may be more of them than one query takes: then make several
        queries. The rows hold exactly what is stored, even if it is damaged, and coded values stay coded.
        Their order does not matter, except for the column ``line``. At most ``limit`` rows are returned.
        """

    @abstractmethod
    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        """Return the different values of a column that come after ``after``, sorted.

        The first ``limit`` of them are returned: fewer only if no more are left. The cost must depend on
        the number of values, not on the number of rows: use one step in an index for each value.
        """

    @abstractmethod
    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Return at most ``limit`` pending tasks of these types that may start now, best first.

        The best task has the highest priority; of equal priority, the one stored first. With ``ageing``,
        every ``ageing`` milliseconds of waiting count as one more priority. Without ``owner``, the tasks
        are those that no node holds. With ``owner``, they are those in that node's buffer. The cost must
        depend on the number of tasks returned, not on the number that wait. Another process may start
        them at any moment: a start is a write with a guard.
        """

    @abstractmethod
    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        """Return at most ``limit`` pending tasks for which a time comes, earliest first.

        Each item is a task's id and its value of the column, in milliseconds. Only tasks with a value of at
        most ``before`` are returned; None means all.
        """

    @abstractmethod
    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Return at most ``limit`` tasks of a finished status that ended before a moment, newest first.

        ``before`` is in milliseconds. Tasks that still have a running thread are left out. ``after`` is the
        ``place`` of the last task of the call before. Tasks that were removed since then do not make this
        call miss others.
        """

    @abstractmethod
    def notes(self, prefix: str) -> dict[str, Note]:
        """Return all notes whose name begins with ``prefix``, by name."""

    @abstractmethod
    def version(self) -> object:
        """Return a value that is different from the last one if others may have changed something.

        Others are other processes, and other queues in this process. The method must be cheap, as it is
        called many times a second. The value may change a second late or without a reason, but every commit
        must change it in the end.
        """

    def refuse_unknown_conditions(self, filter: TaskFilter) -> None:
        """Raise ConfigurationError if a filter has a condition that this repository cannot apply."""
        if unknown := filter.given - self.conditions:
            raise ConfigurationError(
                f"{type(self).__name__} cannot filter by {', '.join(sorted(unknown))}; call list_tasks, "
                "iter_tasks or count_tasks of the queue"
            )
        if filter.params is not None and self.codecs.given:
            raise ConfigurationError(
                "params cannot be searched: a codec hides them. List the tasks by other conditions, and "
                "look at task.params"
            )

    # --- the eight methods. They use the moves of ``lifecycle``, so that its rules hold for every change

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Return the tasks with these ids that exist, by id."""
        found = self.find("id", task_ids, TASK_FIELDS)
        tasks = {row[0]: task_from_row(row, self.codecs) for row in found}
        if divided := [task for task in tasks.values() if task.checkpoints]:
            self._add_parts(divided)
        return tasks

    def _add_parts(self, tasks: Sequence[Task]) -> None:
        """Add the steps to tasks that are stored in notes."""
        if names := [name for task in tasks for name in parts_of(task.checkpoints)]:
            notes = self.reads.notes_named(names)
            texts = {name: note.text for name, note in notes.items()}
            for task in tasks:
                if parts_of(task.checkpoints):
                    add_parts(task, texts, self.codecs)

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """Return the status of each of these tasks that exists, by id."""
        found = self.find("id", task_ids, ("id", "status"))
        return {task_id: known_status(status) for task_id, status in found}

    def create(self, task: Task) -> None:
        """Store a new pending task.

        Raises:
            DuplicateTask: another task has its id, or holds its unique key.
            InvalidTransition: the task is not pending.
            PayloadError: its params break the JSON rules.
            ConfigurationError: another field has a value that is not allowed.
        """
        task = storable(task)
        now = self.clock.now_ms()
        insert = new_record(task, now if task.created_at is None else to_ms(task.created_at))
        # A running queue finds out whether the parents have ended.
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
        """Replace the stored task's fields, except its identity, its fence and its owner.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: its status cannot change like this, or it changed in the meantime.
            DuplicateTask: the task would take its unique key again, and another task holds that.
            PayloadError: params or result break the JSON rules.
            ConfigurationError: another field has a value that is not allowed.
        """
        message = task.message
        task = storable(task)
        stored = self.get_by_id(task.id)
        _tell_if_cut(message, stored)
        if not any(self.apply(lifecycle.amend(stored, task, self.clock.now_ms()))):
            if task.status is TaskStatus.PENDING:
                self.refuse_if_key_held(stored)
            raise InvalidTransition(
                f"task {task.id} changed while it was being updated: read it again and retry"
            )

    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        """Set status and message.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: its status cannot change to this one, or it changed in the meantime.
            DuplicateTask: the task would take its unique key again, and another task holds that.
        """
        stored = self.get_by_id(task_id)
        _tell_if_cut(message, stored)
        write = lifecycle.set_status(
            stored, check_status(status), clean_text(message, MAX_MESSAGE), self.clock.now_ms()
        )
        if not self.apply([write])[0]:
            if status == TaskStatus.PENDING:
                self.refuse_if_key_held(stored)
            raise InvalidTransition(
                f"task {task_id} changed while its status was being set: read it again and retry"
            )

    def refuse_if_key_held(self, task: Task) -> None:
        """Raise ``DuplicateTask`` if another task holds this task's unique key."""
        holder = self._holder(task.unique_key)
        if holder is not None and holder != task.id:
            raise DuplicateTask(holder, task.unique_key)

    def _holder(self, key: str | None) -> str | None:
        """Return the id of the task that holds a unique key."""
        found = () if key is None else self.find("unique_lock", [key], ("id",))
        return next((task_id for (task_id,) in found), None)

    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set the progress, clamped to 0 to 100, and the message of a task if it is running.

        A message of more than 10,000 characters is cut and ends in "…"; the log says so once for each type.

        Raises:
            TaskNotFound: there is no such task.
        """
        percent, text = check_progress(progress, message)
        done = self.apply([lifecycle.progress(task_id, None, percent, text)])[0]
        if not done or len(message) > MAX_MESSAGE:
            _tell_if_cut(message, self.get_by_id(task_id))

    def delete(self, task_id: str) -> None:
        """Remove a task that is not running.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: it is running, or a thread of an earlier attempt still runs.
        """
        if not self.apply([lifecycle.delete(check_name(task_id, "id"))])[0]:
            raise lifecycle.not_deleted(self.get_by_id(task_id))

    # --- capabilities

    #: True if other processes see the same tasks.
    shared = True
    #: The reason why the repository stores plain tasks only, worded as the beginning of an error message.
    #: It is empty if the repository stores everything that a queue needs: notes, checkpoints, logs, unique
    #: keys, parents, turns, and several new tasks in one transaction.
    shortcoming = ""
    #: Seconds without a heartbeat after which a node counts as dead, if leases are used.
    lease_timeout = LEASE
    #: The folder of this host's lock files, if leases are used; None: a temporary folder.
    run_folder: str | None = None

    def require(self, what: str) -> None:
        """Raise ``ConfigurationError`` if the repository cannot store ``what``: see :attr:`shortcoming`."""
        if self.shortcoming:
            raise ConfigurationError(
                f"{self.shortcoming} and cannot store {what}: use SQLiteRepository, PostgresRepository or "
                "MongoRepository"
            )

    @property
    def liveness(self) -> Liveness[Any]:
        """The object that knows the nodes on this repository, and which of them are alive."""
        made: Liveness[Any] | None = vars(self).get("_liveness")
        return made or vars(self).setdefault("_liveness", self._make_liveness())

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that run on this repository, and dead ones that were not cleaned up yet."""
        return self.liveness.nodes()

    def _make_liveness(self) -> Liveness[Any]:
        """Choose how to find out which nodes are alive: by leases, unless all are in this process."""
        if not self.shared:
            return InProcess(self)
        locks = HostLocks(self.run_folder, self.timing.orphan_within)
        clock = self.clock
        return Leases(self, self.lease_timeout, locks, clock.monotonic, clock.now_ms, self.timing)

    def close(self) -> None:
        """Close everything that is open. A later operation opens it again."""

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Reads:
    """The reads that can be made of the primitives, and that stores can often make faster.

    Each method of this class uses the primitives. Override those for which your store has a better way.

    Args:
        repository: the repository to read.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def count_ready(self, type: str, owner: str, at_most: int) -> int:
        """Return the number of tasks that :meth:`Repository.ready` would return, at most ``at_most``.

        This version reads them. Override it if the store can count.
        """
        return len(self._repository.ready([type], at_most, owner))

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        """Return the given fields of the newest ``limit`` tasks of a finished status.

        The rows come in any order, with values as :meth:`Repository.find` returns them. This version leaves
        out tasks that still have a running thread, and finds each task by its id. Override it if the store
        can read the rows at once.
        """
        ended = self._repository.ended(status, LAST, limit)
        return self._repository.find("id", [one.stub.id for one in ended], fields)

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        """Return those notes with these names that exist, by name.

        This version reads every note with their common prefix. Override it if the store can do better.
        """
        found = self._repository.notes(os.path.commonprefix([*names]))  # noqa: RUF071  (of letters, not of folders)
        return {name: found[name] for name in names if name in found}

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        """Return at most ``limit`` notes, sorted by name: the first with ``prefix`` that follow ``after``.

        ``after`` begins with ``prefix``, too. This version reads every note with the prefix. Override it if
        the store can do better.
        """
        found = self._repository.notes(prefix)
        names = sorted(name for name in found if name > after)
        return {name: found[name] for name in names[:limit]}

    def list_after(self, filter: TaskFilter, after: Any = None) -> tuple[Sequence[Task], Any]:
        """Return the tasks that follow a place in a filter's list, and the place after the last of them.

        ``after`` is the place that the call before returned; None is the beginning. A place is a JSON
        value. It may come back from JSON text: a tuple is a list then. The filter's limit is that of one
        call, and its offset is 0, except at the beginning. No tasks are returned only if the list ends
        there. Tasks that were stored or removed since the call before neither hide nor repeat other tasks.

        This version calls ``list`` with the date of the last task as the filter's end, and leaves out the
        tasks of that date that it has returned already. Override it if the store can do better: the cost
        must not depend on the number of tasks before the place.
        """
        end, listed = (
            (filter.end_date, []) if after is None else check_place(after, (int, type(None)), list)
        )
        end = to_datetime(within_calendar(end)) if isinstance(end, int) else end
        known = {task_id for task_id in listed if isinstance(task_id, str)}
        some = self._repository.list(
            attrs.evolve(filter, end_date=end, limit=filter.limit + len(known))
        )
        tasks = [task for task in some if task.id not in known]
        if not tasks:
            return [], after
        # A task without a date, or with a damaged one, may be listed by any date.
        date = end if _dateless(tasks[-1]) else tasks[-1].created_at
        listed_again = [
            task.id for task in some if date == end or task.created_at == date or _dateless(task)
        ]
        return tasks, (None if date is None else to_ms(date), listed_again)

    def count_to(self, filter: TaskFilter, most: int) -> int:
        """Return the number of tasks that match the filter, or ``most`` if there are more.

        This version counts all of them. Override it if the store can stop earlier.
        """
        return min(most, self._repository.count(filter))

    def count_by_status(self, filter: TaskFilter, most: int) -> dict[str, int]:
        """Return how many of at most ``most`` tasks that match the filter have each status.

        Statuses that none has may be left out. This version counts the tasks of each status. Override it if
        the store can count all at once.
        """
        counts: dict[str, int] = {}
        for status in TaskStatus:
            if filter.status in (None, status) and (left := most - sum(counts.values())) > 0:
                counts[status.value] = self.count_to(attrs.evolve(filter, status=status), left)
        return counts

    def flows(self, before: str, limit: int) -> Sequence[str]:
        """Return the ids of at most ``limit`` flows that have tasks, in the reverse order of their ids.

        Only ids that come before ``before`` are returned; empty means all. This version looks at the newest
        tasks only. Override it if the store has an index: use one step in it for each id.
        """
        tasks = self._repository.list(TaskFilter(limit=_MOST_SEARCHED))
        ids = {task.flow for task in tasks if task.flow and (not before or task.flow < before)}
        return sorted(ids, reverse=True)[:limit]


def check_place(after: Any, *kinds: type | tuple[type, ...]) -> tuple[Any, ...]:
    """Return a place that :meth:`Reads.list_after` was given, as a tuple.

    Raises ConfigurationError if its values are not of these types: it is of another repository, or was
    changed.
    """
    values = tuple(after) if isinstance(after, (list, tuple)) else ()
    try:
        payload.encode(values, "after", payload.NO_LIMIT)
        valid = len(values) == len(kinds) and all(map(isinstance, values, kinds))
    except PayloadError:
        valid = False
    if not valid:
        raise ConfigurationError(
            f"after is not a place in a list of this repository: {after!r:.100}"
        )
    return values


def _dateless(task: Task) -> bool:
    return task.created_at is None or bool(task.damage)


_cut = Once(partial(log.warning, CUT))


def _tell_if_cut(message: str, task: Task) -> None:
    """Let the log say, once for each type, that a message was too long to be stored as it is."""
    if len(message) > MAX_MESSAGE:
        _cut(task.type)
