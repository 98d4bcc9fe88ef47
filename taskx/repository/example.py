"""A repository that implements only the primitives, on plain :mod:`sqlite3`: an example for authors.

It is written to be read, not to be fast: it has one connection and one lock, and checks guards in Python.
Everything else is inherited from :class:`taskx.repository.Repository`: the eight methods, the rules about
tasks, and the leases that show which processes are alive. Comments say what to consider for another store.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from taskx.repository import (
    COLUMNS,
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    SYSTEM_CLOCK,
    TASK_FIELDS,
    UNTIL_DUE,
    Clock,
    Codec,
    Delete,
    Ended,
    Forks,
    House,
    Insert,
    Note,
    NoteChange,
    PayloadError,
    Reentered,
    Repository,
    RepositoryError,
    RepositoryUnavailable,
    Stub,
    Task,
    TaskFilter,
    Timed,
    Write,
    matches,
    new_version,
    parents_from_text,
    stub_from_row,
    task_from_row,
    to_ms,
)

T = TypeVar("T")

# A column without a type keeps values unchanged. Rows hold only text, whole numbers, floats and None.
# ``seq`` is the order of submission, by which many results are sorted.
SCHEMA = (
    f"CREATE TABLE tasks (seq INTEGER PRIMARY KEY AUTOINCREMENT, {', '.join(COLUMNS)})",
    # The id and the two unique columns: the store itself must refuse a second row with the same value,
    # also from another process. None may occur in many rows, like NULL in SQL.
    "CREATE UNIQUE INDEX by_id ON tasks (id)",
    "CREATE UNIQUE INDEX by_lock ON tasks (unique_lock)",
    "CREATE UNIQUE INDEX by_turn ON tasks (turn)",
    # One index for each frequent query. They hold unfinished tasks only, so that a million finished ones
    # cost nothing.
    f"CREATE INDEX ready ON tasks (owner, type) WHERE status = 'pending' AND held = {FREE}",
    f"CREATE INDEX due ON tasks (run_at) WHERE status = 'pending' AND held = {UNTIL_DUE}",
    "CREATE INDEX expiring ON tasks (expires_at) WHERE expires_at IS NOT NULL",
    f"CREATE INDEX line ON tasks (concurrency_key) WHERE status = 'pending' AND held = {FOR_TURN}",
    "CREATE INDEX waiting ON tasks (waiting_on) WHERE waiting_on IS NOT NULL",
    "CREATE INDEX running ON tasks (owner) WHERE status = 'running'",
    "CREATE INDEX stuck ON tasks (stuck_on) WHERE stuck_on <> ''",
    "CREATE INDEX ended ON tasks (status, completed_at, seq) WHERE completed_at IS NOT NULL",
    "CREATE INDEX created ON tasks (created_at, seq)",
    # ``depends_on`` is a list in a column. This table finds children by their parents.
    "CREATE TABLE parents (parent, id, PRIMARY KEY (parent, id)) WITHOUT ROWID",
    "CREATE INDEX parents_of ON parents (id)",
    "CREATE TABLE notes (name PRIMARY KEY, text, version) WITHOUT ROWID",
)

_READY = f"status = 'pending' AND held = {FREE}"
#: For each lookup column: its table, its column in that table, and the condition for the rows.
LOOKUPS = {
    "id": ("tasks", "id", "1"),
    "unique_lock": ("tasks", "unique_lock", "1"),
    "turn": ("tasks", "turn", "1"),
    "parent": ("parents", "parent", "1"),
    "waiting_on": ("tasks", "waiting_on", f"status = 'pending' AND held = {FOR_PARENTS}"),
    "line": ("tasks", "concurrency_key", f"status = 'pending' AND held = {FOR_TURN}"),
    "running_on": ("tasks", "owner", "status = 'running' AND owner <> ''"),
    "buffered_on": ("tasks", "owner", f"{_READY} AND owner <> ''"),
    "stuck_on": ("tasks", "stuck_on", "stuck_on <> ''"),
    "ready_type": ("tasks", "type", _READY),
}
#: Values in one query: SQLite has a limit.
MOST_VALUES = 500


class ExampleRepository(Repository, House, Forks):
    """A repository in a SQLite file with tables of its own, which any number of processes may share.

    Args:
        path: the path of the file, which is created at the first operation.
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> None:
        super().__init__(clock, codec)
        self.path = os.path.abspath(path)  # a later chdir changes nothing
        # All processes are on one host: lock files next to the file show at once that a process has died.
        self.run_folder = f"{self.path}-nodes"
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._commits = 0
        # What only some stores can do is in objects. A small store is its own house.
        self.house = self.forks = self

    # --- opening and closing: the constructor does no IO, and a closed repository opens again

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            # Autocommit: a transaction begins only with our BEGIN.
            connection = sqlite3.connect(
                self.path, timeout=10.0, isolation_level=None, check_same_thread=False
            )
            try:
                # By default SQLite syncs every commit, so that what a caller was told survives a power cut.
                # A faster store syncs only the writes that are marked ``durable``.
                connection.execute("BEGIN IMMEDIATE")
                # A repository for production first checks the file's owner and the version of its tables.
                if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in SCHEMA:
                        connection.execute(statement)
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def ensure_there(self) -> None:
        """Raise ``RepositoryUnavailable`` if the file is gone."""
        if self._connection is not None and not os.path.exists(self.path):
            raise RepositoryUnavailable(f"{self.path} is gone: restart the program")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def renew_after_fork(self) -> None:
        """Leave the parent's connection unchanged, and do not take over its locks.

        A child that runs for a long time must not inherit a transaction, either: see ``Forks.before_fork``.
        """
        _inherited.append(self._connection)
        self._connection = None
        self._lock = threading.RLock()  # another thread may have held the old one

    # --- writing

    @property
    def entered(self) -> bool:
        """True inside a call: a finalizer that writes then would deadlock or join our transaction."""
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do work in one transaction, which is undone if the work raises."""
        if self.entered:
            raise Reentered
        with self._lock:
            try:
                connection = self._opened()
                if connection.in_transaction:  # two interrupts in a row struck the last transaction
                    connection.execute("ROLLBACK")
                # IMMEDIATE: no other process can change the rows between our reads and our commit.
                connection.execute("BEGIN IMMEDIATE")
                try:
                    result = work(connection)
                    if connection.in_transaction:
                        connection.execute("COMMIT")
                finally:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                # After an error of SQLite, nothing was committed for certain. A store on a network often
                # cannot know: it sets ``in_doubt`` on the error, and recognises the same writes if they are
                # sent again.
                raise _translated(error, self.path) from error
            self._commits += 1
            return result

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction. Return for each one True if its guard held."""
        coded = self.codecs.coded(writes)

        def work(connection: sqlite3.Connection) -> Sequence[bool]:
            results = [_apply_one(connection, write) for write in coded]
            if all_or_nothing and not all(results):
                connection.execute("ROLLBACK")
            return results

        return self._transact(work)

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store or remove notes, each only if its version is unchanged."""
        return self._transact(
            lambda connection: [_put_note(connection, change) for change in changes]
        )

    # --- reading: each result comes from one statement, so it shows one moment

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._opened().execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise _translated(error, self.path) from error

    def _rows(self, where: str, values: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows that meet a condition, each as a dict by column, with ``seq``."""
        names = ("seq", *COLUMNS)
        for row in self._query(f"SELECT {', '.join(names)} FROM tasks WHERE {where}", values):
            yield dict(zip(names, row, strict=True))

    def find(
        self, column: str, values: Sequence[str], fields: Sequence[str], limit: int | None = None
    ) -> list[tuple[Any, ...]]:
        """Return fields of the rows with one of these values in a lookup column, in order of submission."""
        table, name, which = LOOKUPS[column]
        order = "seq" if table == "tasks" else "parent, id"
        found: list[tuple[Any, ...]] = []
        for some in _chunks(values):
            places = ", ".join("?" * len(some))
            found += self._query(
                f"SELECT {', '.join(fields)} FROM {table} WHERE {name} IN ({places}) AND {which} "
                f"ORDER BY {order} LIMIT ?",
                (*some, -1 if limit is None else limit - len(found)),
            )
        return found

    def distinct(self, column: str, after: str, limit: int) -> list[str]:
        """Return the values of a lookup column that come after ``after``, sorted."""
        table, name, which = LOOKUPS[column]
        sql = f"SELECT DISTINCT {name} FROM {table} WHERE {name} > ? AND {which} ORDER BY 1 LIMIT ?"
        return [value for (value,) in self._query(sql, (after, limit))]

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Return pending tasks of these types and this owner that may start now, best first."""
        # The same order as Stub.rank, which a store that sorts in Python would call.
        waiting_since = "max(created_at, coalesce(run_at, 0))" if ageing else "0"
        kinds = list(types)
        places = ", ".join("?" * len(kinds))
        rows = self._rows(
            f"{_READY} AND owner = ? AND type IN ({places}) "
            f"ORDER BY {waiting_since} - priority * ?, seq LIMIT ?",
            (owner, *kinds, ageing or 1, limit),
        )
        return list(map(stub_from_row, rows))

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> list[tuple[str, int]]:
        """Return the ids and times of pending tasks for which a time comes, earliest first."""
        waiting = f"held = {UNTIL_DUE}" if column == "run_at" else "expires_at IS NOT NULL"
        latest = "" if before is None else f"AND {column} <= {before:d} "
        return self._query(
            f"SELECT id, {column} FROM tasks WHERE status = 'pending' AND {waiting} {latest}"
            f"ORDER BY {column}, seq LIMIT ?",
            (limit,),
        )

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Return tasks of a finished status that ended before a moment, newest first."""
        rows = self._rows(
            "status = ? AND completed_at IS NOT NULL AND (completed_at, seq) < (?, ?) "
            "AND stuck_on = '' ORDER BY completed_at DESC, seq DESC LIMIT ?",
            # A place must lead back to the same point, even if tasks were removed in the meantime.
            (status, *(after or (before, 0)), limit),
        )
        return [
            Ended(
                stub_from_row(row),
                parents_from_text(row["depends_on"]),
                row["unique_lock"],
                row["unique_scope"],
                (row["completed_at"], row["seq"]),
            )
            for row in rows
        ]

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """Return the tasks that match the filter, newest first."""
        where, values = _condition(filter)
        rows = self._query(
            f"SELECT {', '.join(TASK_FIELDS)} FROM tasks WHERE {where} "
            "ORDER BY created_at DESC, seq DESC LIMIT ? OFFSET ?",
            (*values, filter.limit, filter.offset),
        )
        return [task_from_row(row, self.codecs) for row in rows]

    def count(self, filter: TaskFilter) -> int:
        """Return the number of tasks that match the filter."""
        where, values = _condition(filter)
        ((count,),) = self._query(f"SELECT count(*) FROM tasks WHERE {where}", values)
        return int(count)

    def notes(self, prefix: str) -> dict[str, Note]:
        """Return all notes whose name begins with ``prefix``, by name."""
        rows = self._query(
            "SELECT name, text, version FROM notes WHERE name >= ? AND substr(name, 1, ?) = ?",
            (prefix, len(prefix), prefix),
        )
        return {name: Note(text, version) for name, text, version in rows}

    def version(self) -> object:
        """Return counters of commits: others', and our own if several queues share this object."""
        ((others,),) = self._query("PRAGMA data_version")
        return self._connection, others, self._commits if len(self.queues) > 1 else 0


#: Connections of a parent process, kept here because the garbage collector would close them.
_inherited: list[sqlite3.Connection | None] = []


def _apply_one(connection: sqlite3.Connection, write: Write) -> bool:
    """Apply one write. The transaction locks the store, so the guard may be checked here in Python.

    A store without such a transaction must check and change in one step: ``UPDATE ... WHERE`` with the
    guard, or a compare-and-set of the document.
    """
    if isinstance(write, Insert):
        return _insert(connection, {**DEFAULTS, **write.row})
    cursor = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM tasks WHERE id = ?", (write.id,))
    stored = cursor.fetchone()
    if stored is None or not matches(dict(zip(COLUMNS, stored, strict=True)), write.guard):
        return False
    if isinstance(write, Delete):
        connection.execute("DELETE FROM parents WHERE id = ?", (write.id,))
        connection.execute("DELETE FROM tasks WHERE id = ?", (write.id,))
        return True
    settings = ", ".join(f"{name} = ?" for name in write.changes)
    try:
        connection.execute(
            f"UPDATE tasks SET {settings} WHERE id = ?", (*write.changes.values(), write.id)
        )
    except sqlite3.IntegrityError:  # another row has the value of a unique column
        return False
    if "depends_on" in write.changes:
        _add_parents(connection, write.id, write.changes["depends_on"])
    return True


def _insert(connection: sqlite3.Connection, row: Mapping[str, Any]) -> bool:
    sql = f"INSERT INTO tasks ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
    try:
        connection.execute(sql, tuple(row.values()))
    except sqlite3.IntegrityError:  # the id or a unique value is taken
        return False
    _add_parents(connection, row["id"], row["depends_on"])
    return True


def _add_parents(connection: sqlite3.Connection, task_id: str, parents: str | None) -> None:
    pairs = [(parent, task_id) for parent in parents_from_text(parents)]
    connection.executemany("INSERT OR IGNORE INTO parents VALUES (?, ?)", pairs)


def _put_note(connection: sqlite3.Connection, change: NoteChange) -> bool:
    name, text, version = change
    values: tuple[Any, ...] = (name, version)
    if text is None and not version:  # True if no such note exists
        return not connection.execute("SELECT 1 FROM notes WHERE name = ?", (name,)).fetchone()
    if text is None:
        sql = "DELETE FROM notes WHERE name = ? AND version = ?"
    elif version:
        sql = "UPDATE notes SET text = ?, version = version + 1 WHERE name = ? AND version = ?"
        values = (text, name, version)
    else:  # a random version: a reader of an earlier note with this name must not mistake this one for it
        sql = "INSERT OR IGNORE INTO notes VALUES (?, ?, ?)"
        values = (name, text, new_version())
    return connection.execute(sql, values).rowcount == 1


def _condition(filter: TaskFilter) -> tuple[str, list[Any]]:
    """Return the SQL condition of a filter, and its values."""
    wanted = {
        "type = ?": filter.type,
        "status = ?": None if filter.status is None else filter.status.value,
        "created_by = ?": filter.created_by,
        "created_at >= ?": None if filter.start_date is None else to_ms(filter.start_date),
        "created_at <= ?": None if filter.end_date is None else to_ms(filter.end_date),
    }
    given = {sql: value for sql, value in wanted.items() if value is not None}
    return " AND ".join(given) or "1", list(given.values())


def _chunks(values: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the values in chunks of at most :data:`MOST_VALUES`."""
    left = iter(values)
    while some := tuple(islice(left, MOST_VALUES)):
        yield some


def _translated(error: Exception, path: str) -> Exception:
    """Return TaskX's error for an error of the driver, which must never reach a caller."""
    if isinstance(error, sqlite3.OperationalError):
        # Locked for too long, or the disk is full: the call may succeed later.
        return RepositoryUnavailable(f"{path}: {error}")
    if isinstance(error, sqlite3.Error):
        return RepositoryError(f"{path}: {error}")
    return PayloadError("row", f"SQLite cannot store it: {error}")
