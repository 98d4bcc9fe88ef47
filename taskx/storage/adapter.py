"""What a user's eight-method repository lacks, given to it by this process's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import attrs

from taskx.core import lifecycle
from taskx.core.clock import SYSTEM_CLOCK, Clock, to_datetime
from taskx.core.errors import (
    ConfigurationError,
    DuplicateTask,
    RepositoryError,
    RepositoryUnavailable,
    TaskNotFound,
    TaskxError,
)
from taskx.core.lifecycle import FINISHED, PENDING, RUNNING
from taskx.core.model import TASK_FIELDS, Task, TaskFilter, TaskStatus
from taskx.core.options import CHECKS
from taskx.core.record import (
    COLUMNS,
    DEFAULTS,
    FREE,
    INTERNAL,
    Ended,
    row_from_task,
    stub_from_row,
    task_from_row,
)
from taskx.core.writes import Delete, Insert, NoteChange, Update, Write, matches, traces
from taskx.storage.base import Fields, Lookup, Rows
from taskx.storage.eight import TaskRepository
from taskx.storage.memory import MemoryRepository, Row

#: The owner given to what is found running at start.
LEFT_BEHIND = "a process before this one"

#: The fields of the original's task: all that an eight-method repository must keep. They are read
#: from it; the rest is remembered here until the task has ended.
ORIGINAL_FIELDS = COLUMNS[: COLUMNS.index("duration") + 1]
_NOT_STORED = frozenset({"owner", "stuck_on", *INTERNAL})
_BETWEEN_TASKS = ("unique_key", "depends_on", "concurrency_key")
_PAGE = 500
#: Calls of a failing method before its error is raised.
_TRIES = 2
#: Most writes that are remembered to know them again if they are sent again, and most ended tasks.
_MOST_KNOWN = 1000

E = TypeVar("E", bound=RepositoryError)

EIGHT_METHODS = [
    name for name in vars(TaskRepository) if name in TaskRepository.__abstractmethods__
]


class EightMethodAdapter(MemoryRepository):
    """Runs a queue on a :class:`TaskRepository`: guards and indexes are kept in this process.

    So it must be the only process that runs tasks from it. What takes more than eight methods raises
    ``ConfigurationError`` when it is asked for: several tasks in one transaction, and options that
    the repository does not keep.
    """

    def __init__(self, inner: TaskRepository, clock: Clock = SYSTEM_CLOCK) -> None:
        if isinstance(inner, type):
            raise ConfigurationError(
                f"Queue needs a repository, not the class {inner.__name__}: make one, "
                f"as in Queue({inner.__name__}(...))"
            )
        missing = [name for name in EIGHT_METHODS if not callable(getattr(inner, name, None))]
        if missing:
            raise ConfigurationError(
                f"{type(inner).__name__} is no TaskRepository: it lacks {', '.join(missing)}; "
                "use SQLiteRepository(path), MemoryRepository() or open_repository(url)"
            )
        super().__init__(clock)
        self.inner = inner
        self.shortcoming = f"{type(inner).__name__} has eight methods"
        # Writes whose outcome is not known, by task; those that took place, and may be sent again.
        self._doubts: dict[str, Write] = {}
        self._known: dict[int, Write] = {}
        # The tasks of the rows here that have ended, in that order.
        self._ended: dict[str, None] = {}
        self._stirs = 0

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes one by one, each in the repository and in memory.

        Where the repository fails, the record is read back, and the write is tried once more if it
        did not take place.
        """
        if all_or_nothing and len(writes) > 1:
            raise ConfigurationError(
                f"{self.shortcoming} and no transaction: several tasks cannot be stored all or nothing; "
                "submit them one by one"
            )
        with self._lock:
            self._read_anew(writes)
            results: list[bool] = []
            try:
                for write in writes:
                    results.append(self._mirror(write))  # noqa: PERF401  (up to an error)
            except BaseException as error:
                self._remember(write for write, done in zip(writes, results, strict=False) if done)
                if any(results) and isinstance(error, RepositoryError):
                    raise _doubt(RepositoryError(str(error))) from error  # not all is undone
                raise
            finally:
                self._forget_ended()
            return results

    def _read_anew(self, writes: Sequence[Write]) -> None:
        """Read the records before the first write: if that fails, nothing has been changed."""
        for task_id in {w.id: None for w in writes if not isinstance(w, Insert)}:
            self._refresh(task_id)
        for write in writes:
            if isinstance(write, Insert) and write.id in self._doubts:
                self._refresh(write.id)

    def _remember(self, writes: Iterable[Write]) -> None:
        """Remember writes that took place, to know them again if they are sent again."""
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
        """Do a write in the repository, which may fail before or after its effect, and in memory."""
        for _ in range(_TRIES):
            # Until memory says the same as the repository: an interrupt may come in between.
            self._doubts[write.id] = write
            problem: Exception | None = None
            try:
                done = self._send(write, row)
            except Exception as error:  # noqa: BLE001  (a user's code: what it did is read back)
                problem = error
            if problem is None and not (done and isinstance(write, Insert) and _options(write)):
                self._settled(write, done)
                return done
            if self._look_back(write, problem):
                return True
        assert problem is not None
        raise self._translated(problem) from problem

    def _send(self, write: Write, row: Row) -> bool:
        """Call the repository; return False if a new record exists already, or an old one is gone."""
        try:
            if isinstance(write, Insert):
                self.inner.create(_task(row))
            elif isinstance(write, Delete):
                self.inner.delete(write.id)
            elif write.changes.keys() == {"progress", "message"}:
                self.inner.update_progress(write.id, row["progress"], row["message"])
            else:
                self.inner.update(_task(row))
        except (DuplicateTask, TaskNotFound):
            return False
        return True

    def _look_back(self, write: Write, problem: Exception | None) -> bool:
        """Read a record back, and return whether a write took place.

        What is stored and lacks what the task asked for is removed: ``ConfigurationError``.
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
        """Bring memory up to what is stored after a write whose outcome was unknown."""
        if took_place := _shown(write, stored):
            self._refuse_lost_options(write, stored)
        self._settled(write, took_place)
        return took_place

    def _settled(self, write: Write, done: bool) -> None:
        """Apply a write in memory if it took place, and end the doubt about it."""
        if done:
            if isinstance(write, Insert):
                self._forget(write.id)  # it had this id and was deleted behind our back
            self._apply_one(write)
        del self._doubts[write.id]

    def _refuse_between_tasks(self, write: Insert) -> None:
        for name in _BETWEEN_TASKS:
            if write.row.get(name) is not None:
                raise ConfigurationError(
                    f"{self.shortcoming} and nothing that could hold {name}; nothing was stored"
                )

    def _refuse_lost_options(self, write: Write, stored: Row | None) -> None:
        if stored is None or not isinstance(write, Insert):
            return
        lost = [name for name in _options(write) if stored[name] != write.row[name]]
        if lost:
            with self._errors(), suppress(TaskNotFound):
                self.inner.delete(write.id)
            self._settled(write, done=False)
            raise ConfigurationError(
                f"{type(self.inner).__name__} does not keep {', '.join(lost)}: store every field "
                "of the task, or do without; nothing was stored"
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
        """Return an error of the repository as one of ours; an ``OSError`` may pass."""
        if isinstance(error, TaskxError):
            return error
        kind = RepositoryUnavailable if isinstance(error, OSError) else RepositoryError
        return kind(f"{type(self.inner).__name__}: {error!r}")

    # --- the row of a task: the original's fields as the repository has them, the rest from here

    def _read(self, task_id: str) -> Row | None:
        with self._errors():
            try:
                return row_from_task(self.inner.get_by_id(task_id))
            except TaskNotFound:
                return None

    def _refresh(self, task_id: str) -> None:
        """Bring memory up to what is stored."""
        stored = self._read(task_id)
        if (doubtful := self._doubts.get(task_id)) is not None:
            try:
                if self._resolve(doubtful, stored):
                    self._remember([doubtful])
                    self._stirs += 1
            except ConfigurationError:  # whoever submitted it was told that it was in doubt
                stored = None
        known = self._rows.get(task_id)
        if stored is None:
            self._forget(task_id)
        elif known is None:
            self._adopt(stored)
        else:
            self._put(task_id, {**known, **{name: stored[name] for name in ORIGINAL_FIELDS}})

    def _adopt(self, row: Row) -> None:
        """Take up what this process neither created nor has met: if it runs, it was left behind."""
        self._sequence += 1
        row["sequence"] = self._sequence
        row["owner"] = LEFT_BEHIND if row["status"] == RUNNING else ""
        now = self.clock.now_ms()
        row["held"] = lifecycle.until_due(row["run_at"], now) if row["status"] == PENDING else FREE
        row["stuck_on"] = ""  # threads end with their process
        self._put(row["id"], row)

    def _forget_ended(self) -> None:
        """Forget what has ended but for the last of it, as it may be asked whether a write took place."""
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
        """Each change is a transaction of its own."""
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
        """Rows as the repository has them now, found by their id; by other columns, as memory knows them.

        What was in doubt is looked at first.
        """
        with self._lock:
            for task_id in values if column == "id" else [*self._doubts]:
                self._refresh(task_id)
            found = super().find(column, values, fields, limit)
            self._forget_ended()
            return found

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        with self._errors():
            return self.inner.list(filter)

    def count(self, filter: TaskFilter) -> int:
        with self._errors():
            return self.inner.count(filter)

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Tasks of a finished status that ended before a moment, of those that the repository lists."""
        found: list[Ended] = []
        end, passed = to_datetime(before), after or 0
        filter = TaskFilter(status=TaskStatus(status), end_date=end, limit=_PAGE)
        for page in self._pages(filter, passed):
            for task in page:
                if task.completed_at is not None and task.completed_at < end and not task.stuck_on:
                    # Those before it are no longer listed when a look goes on: they are removed.
                    stub = stub_from_row(self._rows.get(task.id) or row_from_task(task))
                    found.append(Ended(stub, (), None, None, passed))
                else:
                    passed += 1
            if len(found) >= limit:
                break
        return found[:limit]

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Raises: there is no place for it that outlives this process."""
        raise ConfigurationError(
            f"{self.shortcoming} and nothing that could keep this over a restart; nothing was stored"
        )

    def version(self) -> object:
        """Return the number of writes in doubt that turned out to be stored; no other process writes."""
        return self._stirs

    # --- starting

    def prepare(self) -> None:
        """Read what is unfinished; what runs was left behind, as this is the only process."""
        with self._lock:
            for task in self._unfinished_tasks():
                if task.id not in self._rows:
                    self._adopt(row_from_task(task))

    def _unfinished_tasks(self) -> Sequence[Task]:
        found: list[Task] = []
        for status in (TaskStatus.PENDING, TaskStatus.RUNNING):
            for page in self._pages(TaskFilter(status=status, limit=_PAGE)):
                found += page
        return sorted(found, key=lambda task: row_from_task(task)["created_at"])

    def _pages(self, filter: TaskFilter, offset: int = 0) -> Iterator[Sequence[Task]]:
        """All that meet a filter, as many at a time as its limit says."""
        while True:
            with self._errors():
                page = self.inner.list(attrs.evolve(filter, offset=offset))
            yield page
            offset += len(page)
            if len(page) < filter.limit:
                break


def _options(insert: Insert) -> list[str]:
    """The options that a new task has and that a repository might not keep."""
    row = {**DEFAULTS, **insert.row}
    return [name for name in CHECKS if row[name] != DEFAULTS[name]]


def _shown(write: Write, stored: Row | None) -> bool:
    """Return whether a stored record shows that a write took place.

    Only the fields that every repository keeps are compared. A write that changes none of them does
    not show; it can be done again without harm.
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
