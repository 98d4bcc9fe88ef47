"""What a user's eight-method repository lacks, given to it by this process's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs

from taskx.core import lifecycle
from taskx.core.clock import SYSTEM_CLOCK, Clock, to_datetime
from taskx.core.errors import (
    ConfigurationError,
    DuplicateTask,
    RepositoryError,
    TaskNotFound,
    TaskxError,
)
from taskx.core.lifecycle import FINISHED, PENDING, RUNNING
from taskx.core.model import TASK_FIELDS, Task, TaskFilter, TaskStatus
from taskx.core.record import (
    COLUMNS,
    DEFAULTS,
    FREE,
    INTERNAL,
    Stub,
    row_from_task,
    stub_from_row,
    task_from_row,
)
from taskx.core.writes import Delete, Insert, Update, Write, matches
from taskx.storage.base import Node, Repository, TaskRepository
from taskx.storage.memory import MemoryRepository, Row

#: The owner given to what is found running at start.
LEFT_BEHIND = "a process before this one"

#: The fields of the original's task: all that an eight-method repository must keep. They are read
#: from it; the rest is remembered here as long as the task is unfinished.
ORIGINAL_FIELDS = COLUMNS[: COLUMNS.index("duration") + 1]
_OPTIONS = ("priority", "run_at", "timeout", "max_attempts", "max_crashes", "retry")
_NOT_STORED = frozenset({"owner", "stuck_on", *INTERNAL})
_BETWEEN_TASKS = ("unique_key", "depends_on", "concurrency_key")
_PAGE = 500

EIGHT_METHODS = (
    "create",
    "get_by_id",
    "update",
    "update_status",
    "update_progress",
    "list",
    "count",
    "delete",
)


class EightMethodAdapter(MemoryRepository):
    """Runs a queue on a :class:`TaskRepository`: guards and indexes are kept in this process.

    So it must be the only process that runs tasks from it. What takes more than eight methods raises
    ``ConfigurationError`` when it is asked for: several tasks in one transaction, and options that
    the repository does not keep.
    """

    def __init__(self, inner: TaskRepository, clock: Clock = SYSTEM_CLOCK) -> None:
        missing = [name for name in EIGHT_METHODS if not callable(getattr(inner, name, None))]
        if missing:
            raise ConfigurationError(
                f"{type(inner).__name__} is no TaskRepository: it lacks {', '.join(missing)}; "
                "use SQLiteRepository(path), MemoryRepository() or open_repository(url)"
            )
        super().__init__(clock)
        self.inner = inner

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes one by one, each in memory and in the repository."""
        if all_or_nothing and len(writes) > 1:
            raise ConfigurationError(
                f"{type(self.inner).__name__} has eight methods and no transaction: several tasks "
                "cannot be stored all or nothing; submit them one by one"
            )
        with self._lock:
            return [self._mirror(write) for write in writes]

    def settle(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Say for each write whether it took place."""
        with self._lock:
            for write in writes:
                self._refresh(write.id)
            return super().settle(writes)

    def _mirror(self, write: Write) -> bool:
        if isinstance(write, Insert):
            return self._create(write)
        row = self._refresh(write.id)
        if row is None or not matches(row, write.guard):
            self._forget_finished(write.id)
            return False
        with self._errors():
            if isinstance(write, Delete):
                self.inner.delete(write.id)
            else:
                self._update(row, write)
        self._apply_one(write)
        self._forget_finished(write.id)
        return True

    def _create(self, write: Insert) -> bool:
        row = {**DEFAULTS, **write.row}
        for name in _BETWEEN_TASKS:
            if row[name] is not None:
                raise ConfigurationError(
                    f"{type(self.inner).__name__} has eight methods and nothing that could hold "
                    f"{name}; nothing was stored"
                )
        with self._errors():
            try:
                self.inner.create(_task(row))
            except DuplicateTask:
                return False
            self._check_options_kept(row)
        self._forget(write.id)  # it had this id and was deleted behind our back
        return self._apply_one(write)

    def _check_options_kept(self, row: Row) -> None:
        asked = [name for name in _OPTIONS if row[name] != DEFAULTS[name]]
        if not asked:
            return
        kept = row_from_task(self.inner.get_by_id(row["id"]))
        lost = [name for name in asked if kept[name] != row[name]]
        if lost:
            self.inner.delete(row["id"])
            raise ConfigurationError(
                f"{type(self.inner).__name__} does not keep {', '.join(lost)}: store every field "
                "of the task, or do without; nothing was stored"
            )

    def _update(self, row: Row, write: Update) -> None:
        if write.changes.keys() <= _NOT_STORED:
            return
        if write.changes.keys() == {"progress", "message"}:
            self.inner.update_progress(
                write.id, write.changes["progress"], write.changes["message"]
            )
        else:
            self.inner.update(_task({**row, **write.changes}))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TaskxError:
            raise
        except Exception as error:
            raise RepositoryError(f"{type(self.inner).__name__}: {error!r}") from error

    # --- the row of a task: the original's fields as the repository has them, the rest from here

    def _refresh(self, task_id: str) -> Row | None:
        with self._errors():
            try:
                stored = row_from_task(self.inner.get_by_id(task_id))
            except TaskNotFound:
                self._forget(task_id)
                return None
        known = self._rows.get(task_id)
        if known is None:
            self._adopt(stored)
        else:
            self._put(task_id, {**known, **{name: stored[name] for name in ORIGINAL_FIELDS}})
        return self._rows[task_id]

    def _adopt(self, row: Row) -> None:
        """Take up what this process neither created nor has met: if it runs, it was left behind."""
        self._sequence += 1
        row["sequence"] = self._sequence
        row["owner"] = LEFT_BEHIND if row["status"] == RUNNING else ""
        now = self.clock.now_ms()
        row["held"] = lifecycle.until_due(row["run_at"], now) if row["status"] == PENDING else FREE
        row["stuck_on"] = ""  # threads end with their process
        self._put(row["id"], row)

    def _forget_finished(self, task_id: str) -> None:
        row = self._rows.get(task_id)
        if row is not None and row["status"] in FINISHED and not row["stuck_on"]:
            self._put(task_id, None)

    def _forget(self, task_id: str) -> None:
        if task_id in self._rows:
            self._put(task_id, None)

    def _put(self, task_id: str, row: Row | None) -> None:
        """Each change is a transaction of its own."""
        try:
            super()._put(task_id, row)
        except BaseException:
            self._undo(0)
            raise
        self._changed.clear()

    # --- reading

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        found = {}
        with self._lock:
            for task_id in task_ids:
                row = self._refresh(task_id)
                if row is not None:
                    found[task_id] = _task(row)
                    self._forget_finished(task_id)
        return found

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        return {task_id: task.status.value for task_id, task in self.get_many(task_ids).items()}

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """As the repository lists them."""
        with self._errors():
            return self.inner.list(filter)

    def count(self, filter: TaskFilter) -> int:
        """As the repository counts them."""
        with self._errors():
            return self.inner.count(filter)

    def ended(self, status: str, before: int, limit: int) -> Sequence[Stub]:
        """Tasks of a finished status that ended before a moment, of those that the repository lists."""
        found: list[Stub] = []
        end = to_datetime(before)
        for page in self._pages(TaskFilter(status=TaskStatus(status), end_date=end, limit=_PAGE)):
            over = (t for t in page if t.completed_at is not None and t.completed_at < end)
            free = (t for t in over if t.id not in self._rows or not self._rows[t.id]["stuck_on"])
            found += (stub_from_row(row_from_task(task)) for task in free)
            if len(found) >= limit:
                break
        return found[:limit]

    def put_note(self, name: str, text: str | None, version: int) -> bool:
        """Raises: there is no place for it that outlives this process."""
        raise ConfigurationError(
            f"{type(self.inner).__name__} has eight methods and nothing that could keep this over a "
            "restart; nothing was stored"
        )

    def changed(self) -> bool:
        """Never: there is no other process."""
        return False

    # --- starting

    def join(self, node: Node) -> None:
        """Read what is unfinished; what runs was left behind, as this is the only process."""
        with self._lock:
            super().join(node)
            for task in self._unfinished_tasks():
                if task.id not in self._rows:
                    self._adopt(row_from_task(task))

    def _unfinished_tasks(self) -> Sequence[Task]:
        found: list[Task] = []
        for status in (TaskStatus.PENDING, TaskStatus.RUNNING):
            for page in self._pages(TaskFilter(status=status, limit=_PAGE)):
                found += page
        return sorted(found, key=lambda task: row_from_task(task)["created_at"])

    def _pages(self, filter: TaskFilter) -> Iterator[Sequence[Task]]:
        """All that meet a filter, as many at a time as its limit says."""
        offset = 0
        while True:
            with self._errors():
                page = self.inner.list(attrs.evolve(filter, offset=offset))
            yield page
            offset += len(page)
            if len(page) < filter.limit:
                break


def refuse_eight_methods(repository: Repository, what: str) -> None:
    """Refuse, with a ``ConfigurationError``, what a repository of eight methods has no place for."""
    if isinstance(repository, EightMethodAdapter):
        raise ConfigurationError(
            f"{type(repository.inner).__name__} has eight methods and no place for {what}: use "
            "SQLiteRepository, MongoRepository or MemoryRepository"
        )


def _task(row: Row) -> Task:
    return task_from_row([row[name] for name in TASK_FIELDS])
