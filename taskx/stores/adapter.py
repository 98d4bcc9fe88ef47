"""An adapter that adds to a user's eight-method repository, in this process's memory, what it lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import Any, TypeVar

import attrs

from taskx.stores.base import BASIC_CONDITIONS, Fields, Lookup, Reads, Rows
from taskx.stores.eight import TaskRepository
from taskx.stores.memory import MemoryRepository, Row
from taskx.stores.parts import House
from taskx.tasks import lifecycle
from taskx.tasks.clock import SYSTEM_CLOCK, Clock, to_datetime
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    PayloadError,
    RepositoryError,
    RepositoryUnavailable,
    TaskNotFound,
    TaskxError,
)
from taskx.tasks.lifecycle import FINISHED, PENDING, RUNNING
from taskx.tasks.model import TASK_FIELDS, Task, TaskFilter, TaskStatus
from taskx.tasks.options import CHECKS
from taskx.tasks.record import (
    COLUMNS,
    DEFAULTS,
    FREE,
    INTERNAL,
    Ended,
    row_from_task,
    stub_from_row,
    task_from_row,
)
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Delete, Insert, NoteChange, Update, Write, matches, traces

#: The owner of a task that is found running at start.
LEFT_BEHIND = "a process before this one"

#: The fields of the original's task: an eight-method repository must keep these. They are read from it.
#: The other fields are remembered here until the task has ended.
ORIGINAL_FIELDS = COLUMNS[: COLUMNS.index("duration") + 1]
_NOT_STORED = frozenset({"owner", "stuck_on", *INTERNAL})
_BETWEEN_TASKS = ("unique_key", "depends_on", "concurrency_key")
_PAGE = 500
#: Calls of a failing method before its error is raised.
_TRIES = 2
#: Most writes that are remembered, to recognise them if they are sent again; and most ended tasks.
_MOST_KNOWN = 1000

E = TypeVar("E", bound=RepositoryError)

EIGHT_METHODS = [
    name for name in vars(TaskRepository) if name in TaskRepository.__abstractmethods__
]


class EightMethodAdapter(MemoryRepository, House):
    """A repository on a :class:`TaskRepository`, with guards and indexes in this process's memory.

    So this must be the only process that runs tasks from it. Features that need more than the eight methods
    raise ``ConfigurationError`` when they are used: several tasks in one transaction, and options that the
    repository does not keep.
    """

    conditions = BASIC_CONDITIONS

    def __init__(
        self, inner: TaskRepository, clock: Clock = SYSTEM_CLOCK, timing: Timing = DEFAULT_TIMING
    ) -> None:
        if isinstance(inner, type):
            raise ConfigurationError(
                f"expected a repository object, got the class {inner.__name__}: "
                f"use Queue({inner.__name__}(...))"
            )
        missing = [name for name in EIGHT_METHODS if not callable(getattr(inner, name, None))]
        if missing:
            raise ConfigurationError(
                f"expected a TaskRepository, got {type(inner).__name__}, which lacks "
                f"{', '.join(missing)}; use SQLiteRepository(path), MemoryRepository() or "
                "open_repository(url)"
            )
        super().__init__(clock, timing=timing)
        self.inner = inner
        self.shortcoming = f"{type(inner).__name__} has only the eight methods"
        # Writes whose outcome is unknown, by task.
        self._doubts: dict[str, Write] = {}
        # Writes that took place and may be sent again.
        self._known: dict[int, Write] = {}
        # The ended tasks that have a row here, in the order in which they ended.
        self._ended: dict[str, None] = {}
        self._late_writes = 0
        self.reads = AdapterReads(self)
        self.house = self

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes one by one, each in the repository and in memory.

        If the repository fails, the record is read back. If the write did not take place, it is tried once
        more.
        """
        if all_or_nothing and len(writes) > 1:
            raise ConfigurationError(
                f"{self.shortcoming} and no transactions, so it cannot store several tasks at once: "
                "submit them one by one"
            )
        with self._lock:
            self._refresh_all(writes)
            results: list[bool] = []
            try:
                for write in writes:
                    results.append(self._mirror(write))  # noqa: PERF401  (up to an error)
            except BaseException as error:
                self._remember(write for write, done in zip(writes, results, strict=False) if done)
                if any(results) and isinstance(error, RepositoryError):
                    raise _doubt(RepositoryError(str(error))) from error  # some writes took place
                raise
            finally:
                self._forget_ended()
            return results

    def _refresh_all(self, writes: Sequence[Write]) -> None:
        """Read the records before the first write: if a read fails, nothing was changed."""
        for task_id in {w.id: None for w in writes if not isinstance(w, Insert)}:
            self._refresh(task_id)
        for write in writes:
            if isinstance(write, Insert) and write.id in self._doubts:
                self._refresh(write.id)

    def _remember(self, writes: Iterable[Write]) -> None:
        """Remember writes that took place, to recognise them if they are sent again."""
        self._known.update((id(write), write) for write in writes)
        while len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]

    def _mirror(self, write: Write) -> bool:
        if self._known.pop(id(write), None) is not None:
            return True
        if isinstance(write, Insert):
            self._refuse_between_tasks(write)
            return self._carry_out(write, {**DEFAULTS, **write.row})
        row = self._rows.get(write.id)
        if row is None or not matches(row, write.guard):
            return False
        if isinstance(write, Update):
            if write.changes.keys() <= _NOT_STORED:
                return self._apply_one(write)
            row = {**row, **write.changes}
        return self._carry_out(write, row)

    def _carry_out(self, write: Write, row: Row) -> bool:
        """Make a write in the repository, which may fail before or after its effect, and in memory."""
        for _ in range(_TRIES):
            # In doubt until memory agrees with the repository: an interrupt may come in between.
            self._doubts[write.id] = write
            problem: Exception | None = None
            try:
                done = self._send(write, row)
            except Exception as error:  # noqa: BLE001  (a user's code: the record is read back)
                problem = error
            if problem is None and not (done and isinstance(write, Insert) and _options(write)):
                self._confirm(write, done)
                return done
            if self._read_back(write, problem):
                return True
        assert problem is not None
        raise self._translated(problem) from problem

    def _send(self, write: Write, row: Row) -> bool:
        """Call the repository. Return False if a new record already exists or an old one is gone."""
        try:
            if isinstance(write, Insert):
                self.inner.create(_task(row))
            elif isinstance(write, Delete):
                self.inner.delete(write.id)
            elif write.changes.keys() == {"progress", "message"}:
                self.inner.update_progress(write.id, row["progress"], row["message"])
            else:
                task = _task(row)
                if task.damage:  # what cannot be read stays as it is
                    task.params = self.inner.get_by_id(write.id).params
                self.inner.update(task)
        except (DuplicateTask, TaskNotFound):
            return False
        return True

    def _read_back(self, write: Write, problem: Exception | None) -> bool:
        """Read a record back, and return True if a write took place.

        If the stored record lacks an option of the task, remove the record and raise
        ``ConfigurationError``.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._resolve(write, self._read(write.id))
            except RepositoryError as error:
                if not left:
                    text = (
                        f"{problem or error!r}; the write may have taken place: read the task again"
                    )
                    unknown = RepositoryUnavailable(f"{type(self.inner).__name__}: {text}")
                    raise _doubt(unknown) from problem or error
        raise AssertionError

    def _resolve(self, write: Write, stored: Row | None) -> bool:
        """Bring memory in line with the stored record after a write whose outcome was unknown."""
        if took_place := _shown(write, stored):
            self._refuse_lost_options(write, stored)
        self._confirm(write, took_place)
        return took_place

    def _confirm(self, write: Write, done: bool) -> None:
        """Apply a write in memory if it took place. Its outcome is then no longer in doubt."""
        if done:
            if isinstance(write, Insert):
                # An earlier task with this id was deleted without our knowledge.
                self._forget(write.id)
            self._apply_one(write)
        del self._doubts[write.id]

    def _refuse_between_tasks(self, write: Insert) -> None:
        for name in _BETWEEN_TASKS:
            if write.row.get(name) is not None:
                raise ConfigurationError(
                    f"{self.shortcoming} and does not support {name}; nothing was stored. Use "
                    "SQLiteRepository, PostgresRepository or MongoRepository, or omit the option"
                )

    def _refuse_lost_options(self, write: Write, stored: Row | None) -> None:
        if stored is None or not isinstance(write, Insert):
            return
        lost = [name for name in _options(write) if stored[name] != write.row[name]]
        if lost:
            with self._errors(), suppress(TaskNotFound):
                self.inner.delete(write.id)
            self._confirm(write, done=False)
            raise ConfigurationError(
                f"{type(self.inner).__name__} does not keep {', '.join(lost)}; nothing was stored. "
                "Store every field of the task, or omit the option"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TaskxError:
            raise
        except Exception as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> TaskxError:
        """Return an error of the repository as one of TaskX. An ``OSError`` may go away by itself."""
        if isinstance(error, TaskxError):
            return error
        kind = RepositoryUnavailable if isinstance(error, OSError) else RepositoryError
        return kind(f"{type(self.inner).__name__}: {error!r}")

    # --- the row of a task: the original's fields come from the repository, the others from memory

    def _read(self, task_id: str) -> Row | None:
        with self._errors():
            try:
                return _row(self.inner.get_by_id(task_id))
            except TaskNotFound:
                return None

    def _refresh(self, task_id: str) -> None:
        """Bring memory in line with the stored record."""
        stored = self._read(task_id)
        if (doubtful := self._doubts.get(task_id)) is not None:
            try:
                if self._resolve(doubtful, stored):
                    self._remember([doubtful])
                    self._late_writes += 1
            except ConfigurationError:  # the caller of submit was told that the write was in doubt
                stored = None
        known = self._rows.get(task_id)
        if stored is None:
            self._forget(task_id)
        elif known is None:
            self._adopt(stored)
        else:
            self._put(task_id, {**known, **{name: stored[name] for name in ORIGINAL_FIELDS}})

    def _adopt(self, row: Row) -> None:
        """Add a stored task that is new to this process. If it is running, it was left behind."""
        self._sequence += 1
        row["sequence"] = self._sequence
        row["owner"] = LEFT_BEHIND if row["status"] == RUNNING else ""
        now = self.clock.now_ms()
        row["held"] = lifecycle.until_due(row["run_at"], now) if row["status"] == PENDING else FREE
        row["stuck_on"] = ""  # threads end with their process
        self._put(row["id"], row)

    def _forget_ended(self) -> None:
        """Forget ended tasks, except the last ones: callers may still ask if their writes took place."""
        while len(self._ended) > _MOST_KNOWN:
            task_id = next(iter(self._ended))
            row = self._rows.get(task_id)
            if row is not None and not row["stuck_on"]:
                self._put(task_id, None)
            self._ended.pop(task_id, None)

    def _forget(self, task_id: str) -> None:
        if task_id in self._rows:
            self._put(task_id, None)

    def _put(self, task_id: str, row: Row | None) -> None:
        """Replace the row with this id, in a transaction of its own. None removes it."""
        self._ended.pop(task_id, None)
        if row is not None and row["status"] in FINISHED:
            self._ended[task_id] = None
        try:
            super()._put(task_id, row)
        except BaseException:
            self._undo(0)
            raise
        self._changed.clear()

    # --- reading

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        """Return rows: by id, as they are stored now; by another column, as this memory knows them.

        Writes in doubt are resolved first.
        """
        with self._lock:
            for task_id in values if column == "id" else [*self._doubts]:
                self._refresh(task_id)
            found = super().find(column, values, fields, limit)
            self._forget_ended()
            return found

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        self.refuse_unknown_conditions(filter)
        with self._errors():
            return self.inner.list(filter)

    def count(self, filter: TaskFilter) -> int:
        self.refuse_unknown_conditions(filter)
        with self._errors():
            return self.inner.count(filter)

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Return the listed tasks of a finished status that ended before a moment, newest first."""
        found: list[Ended] = []
        end, passed = to_datetime(before), after or 0
        filter = TaskFilter(status=TaskStatus(status), end_date=end, limit=_PAGE)
        for page in self.pages(filter, passed):
            for task in page:
                if task.completed_at is not None and task.completed_at < end and not task.stuck_on:
                    # The next call skips ``passed`` tasks. The tasks found before this one do not count:
                    # they are removed by then, and no longer listed.
                    stub = stub_from_row(self._rows.get(task.id) or _row(task))
                    found.append(Ended(stub, (), None, None, passed))
                else:
                    passed += 1
            if len(found) >= limit:
                break
        return found[:limit]

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Raise ``ConfigurationError``: the eight methods cannot store notes that outlive this process."""
        raise ConfigurationError(
            f"{self.shortcoming} and cannot store this across restarts; nothing was stored. Use "
            "SQLiteRepository, PostgresRepository or MongoRepository"
        )

    def version(self) -> object:
        """Return the number of writes in doubt that turned out to be stored. No other process writes."""
        return self._late_writes

    # --- starting

    def prepare(self) -> None:
        """Read the unfinished tasks. Running ones were left behind, as this is the only process."""
        with self._lock:
            for task in self._unfinished_tasks():
                if task.id not in self._rows:
                    self._adopt(_row(task))

    def _unfinished_tasks(self) -> Sequence[Task]:
        found: list[Task] = []
        for status in (TaskStatus.PENDING, TaskStatus.RUNNING):
            for page in self.pages(TaskFilter(status=status, limit=_PAGE)):
                found += page
        return sorted(found, key=lambda task: _row(task)["created_at"])

    def pages(self, filter: TaskFilter, offset: int = 0) -> Iterator[Sequence[Task]]:
        """Yield all tasks that match a filter, in pages of at most its limit."""
        while True:
            with self._errors():
                page = self.inner.list(attrs.evolve(filter, offset=offset))
            yield page
            offset += len(page)
            if len(page) < filter.limit:
                break


class AdapterReads(Reads):
    """The reads by ``list`` and ``count``; what is ready, and notes, are in memory."""

    def __init__(self, store: EightMethodAdapter) -> None:
        super().__init__(store)
        self._store = store

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        filter = TaskFilter(status=TaskStatus(status), limit=min(limit, _PAGE))
        tasks = islice(chain.from_iterable(self._store.pages(filter)), limit)
        rows = (self._store._rows.get(task.id) or _row(task) for task in tasks)
        return [tuple(row[name] for name in fields) for row in rows]


def _options(insert: Insert) -> list[str]:
    """Return the names of a new task's options that a repository might not keep."""
    row = {**DEFAULTS, **insert.row}
    return [name for name in (*CHECKS, "expires_at", "tags") if row[name] != DEFAULTS[name]]


def _shown(write: Write, stored: Row | None) -> bool:
    """Return True if a stored record shows that a write took place.

    Only the fields that every repository keeps are compared. If a write changes none of them, the result is
    False. Such a write can be repeated without harm.
    """
    if isinstance(write, Delete):
        return stored is None
    if stored is None:
        return False
    kept = {name: value for name, value in traces(write).items() if name in ORIGINAL_FIELDS}
    return bool(kept) and all(stored[name] == value for name, value in kept.items())


def _doubt(error: E) -> E:
    error.in_doubt = True
    return error


def _task(row: Row) -> Task:
    return task_from_row([row[name] for name in TASK_FIELDS])


def _row(task: Task) -> Row:
    """Return the row of a stored task; that of a damaged one if its values are not JSON."""
    try:
        return row_from_task(task)
    except PayloadError:
        sound = attrs.evolve(task, params={}, result=None, checkpoints=None)
        return {**row_from_task(sound), "params": '"not JSON"'}
