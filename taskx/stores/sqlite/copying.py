"""The copy of all tasks of a file, also of one with an earlier schema, into tables of today's schema."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import attrs

from taskx.stores.liveness.base import PREFIX as NODES
from taskx.stores.liveness.locks import NodeLocks
from taskx.stores.sqlite import schema
from taskx.stores.sqlite.connections import FAILURES, PAGE_SIZE, Connections
from taskx.stores.sqlite.examination import address, connect
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.errors import ConfigurationError, RepositoryUnavailable, TaskxError
from taskx.tasks.ids import key_at

#: Seconds to wait for a program that is about to close one of the files.
PATIENCE = 2.0
#: Tasks that are copied in one call of SQLite. An interrupt is noticed between two calls.
BATCH = 5_000

# The tables of all schema versions; not every version has each of them.
_TABLES = ("tasks", "parents", "notes", "tagged", "nodes")

#: Called with the number of tasks that were copied, and of all tasks.
Progress = Callable[[int, int], object]


@attrs.frozen
class Copied:
    """The result of a copy.

    Attributes:
        tasks: the number of tasks.
        version: the schema version that they had.
    """

    tasks: int
    version: int


def copy_tasks(
    old: str, new: str, prefix: str = "", progress: Progress = lambda done, total: None
) -> Copied:
    """Copy all tasks and notes of a file into another file, or into new tables in the same one.

    It is one transaction: after an error, or the death of the process, the files are as they were. No other
    program may have them open. The tasks keep their order. A task that a killed process left running is
    running in the copy, too, where the next node takes it back, because notes about nodes are not copied.
    Damaged values are copied as they are.

    Args:
        old: the path of the file with the tasks.
        new: the path of a file without tasks, which is created if it is missing; with a prefix, that of an
            application's file. If both paths are the same, new tables replace the old ones.
        prefix: what the names of the tables begin with, in both files.
        progress: a function that is called again and again.

    Raises:
        ConfigurationError: there is nothing to copy, or the other file has tasks already.
        RepositoryUnavailable: a program uses one of the files, or a file is missing.
        SchemaMismatch: a file belongs to another program or to a newer TaskX.
    """
    tables = schema.of(prefix)
    source, target = DatabaseFile(old, create=False, prefix=prefix), DatabaseFile(new, True, prefix)
    source.find()
    target.find()
    copy = _Copy(source, target, tables)
    version = copy.read_version()
    try:
        with copy.begun() as connection:
            return Copied(copy.copy_all(connection, version, progress), version)
    except FAILURES as error:
        raise copy.translated(error) from error


class _Copy:
    """One call of :func:`copy_tasks`."""

    def __init__(self, source: DatabaseFile, target: DatabaseFile, tables: schema.Schema) -> None:
        self._source, self._target, self._tables = source, target, tables
        self._same = source.path == target.path

    def read_version(self) -> int:
        """Return the schema version of the tasks. Raise an error if they cannot be copied."""
        path, prefix = self._source.path, self._tables.prefix
        if not os.access(path, os.W_OK):
            raise RepositoryUnavailable(
                f"{path} is read-only, so it cannot be locked; nothing was copied. Give this process write "
                "access, or make a copy of the file first"
            )
        # As it closes, a connection that may write changes the file of another program that has a log.
        mode = "ro" if os.path.exists(f"{path}-wal") else "rw"
        try:
            with closing(connect(path, mode, PATIENCE)) as connection:
                version = self._tables.check(connection, path, oldest=1)
        except FAILURES as error:
            raise Connections(self._source, PATIENCE).translated(error) from error
        if not version:
            names = f" with the prefix {prefix}" if prefix else ""
            raise ConfigurationError(f"{path} has no tables of TaskX{names}: check the path")
        if self._same and version >= schema.FIRST:
            raise ConfigurationError(
                f"{path} has schema version {version}, which need not be migrated; nothing was changed"
            )
        return version

    @contextmanager
    def begun(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection to the other file, in a transaction that only an error does not commit.

        In SQLite's exclusive mode, a file is open in this connection or in others. A lock for writers would
        let another program store a task in the old file, right after the copy.
        """
        path, missing = self._target.path, not os.path.exists(self._target.path)
        with closing(connect(path, "rwc", PATIENCE)) as connection:
            try:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
                # The old file may be deleted next: no power cut must undo the copy then.
                connection.execute("PRAGMA synchronous = EXTRA")
                if not self._same:
                    connection.execute("ATTACH ? AS old", (address(self._source.path, "rw"),))
                    if not self._tables.check(connection, path) and not self._tables.prefix:
                        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
                        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute("BEGIN EXCLUSIVE")
                if any(NodeLocks(file.folder).held() for file in (self._source, self._target)):
                    raise self._in_use()
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if alone := connection.in_transaction:
                    connection.execute("ROLLBACK")
                if missing and (alone or not os.path.getsize(path)):
                    os.unlink(path)
                raise

    def copy_all(self, connection: sqlite3.Connection, version: int, progress: Progress) -> int:
        """Make the tables, and copy all rows into them. Return the number of tasks."""
        own = self._tables.prefix
        if self._same:
            old, made = f"{own}old_", 0
            aside = self._set_aside(connection, old)
        else:
            old, made, aside = f"old.{own}", self._tables.check(connection, self._target.path), []
        self._tables.advance(connection, made)
        ((tasks,),) = connection.execute(f"SELECT EXISTS (SELECT 1 FROM {own}tasks)")
        if tasks:
            raise ConfigurationError(
                f"{self._target.path} has tasks already; nothing was copied. Name a file without tasks"
            )
        done = self._copy_tasks(connection, old, version, progress)
        self._copy_others(connection, old, version)
        for table in aside:
            connection.execute(f"DROP TABLE {table}")
        return done

    def _set_aside(self, connection: sqlite3.Connection, old: str) -> list[str]:
        """Rename the tables, and remove their indexes and triggers, whose names are needed for new ones.

        Return the new names of the tables.
        """
        names = [f"{self._tables.prefix}{name}" for name in _TABLES]
        marks = ", ".join("?" * len(names))
        found = connection.execute(
            f"SELECT type, name FROM sqlite_master WHERE tbl_name IN ({marks}) AND sql IS NOT NULL",
            names,
        ).fetchall()
        # The application's views go on naming the tables as before.
        connection.execute("PRAGMA legacy_alter_table = ON")
        for kind, name in found:
            if kind != "table":
                connection.execute(f'DROP {kind} "{name}"')
        there = [name for name in _TABLES if ("table", f"{self._tables.prefix}{name}") in found]
        for name in there:
            connection.execute(f"ALTER TABLE {self._tables.prefix}{name} RENAME TO {old}{name}")
        return [f"{old}{name}" for name in there]

    def _copy_tasks(
        self, connection: sqlite3.Connection, old: str, version: int, progress: Progress
    ) -> int:
        new = f"{self._tables.prefix}tasks"
        known = _columns(connection, new)
        columns = ", ".join(
            name for name in _columns(connection, f"{old}tasks") if name in known and name != "seq"
        )
        insert = (
            f"INSERT INTO {new} (seq, {columns}) SELECT ?, {columns} FROM {old}tasks WHERE seq = ?"
        )
        if version < schema.FIRST:
            # A damaged time may be a text or a fraction.
            number = "typeof(created_at) IN ('integer', 'real')"
            moment = f"CASE WHEN {number} THEN CAST(created_at AS INTEGER) END"
            ordered = f"SELECT seq, {moment} FROM {old}tasks ORDER BY created_at, seq"
            keys = _new_keys(connection.execute(ordered))
        else:
            keys = connection.execute(f"SELECT seq, seq FROM {old}tasks ORDER BY seq")
        ((total,),) = connection.execute(f"SELECT count(*) FROM {old}tasks")
        done = 0
        while batch := list(islice(keys, BATCH)):
            connection.executemany(insert, batch)
            done += len(batch)
            progress(done, total)
        return done

    def _copy_others(self, connection: sqlite3.Connection, old: str, version: int) -> None:
        own = self._tables.prefix
        if version < schema.FIRST:
            # The term with the bit of the key is that of the index of ids.
            connection.execute(
                f"INSERT INTO {own}parents SELECT parent, seq FROM {old}parents AS pairs "
                f"CROSS JOIN {own}tasks AS new ON new.seq & 1 AND new.id = pairs.child"
            )
        else:
            connection.execute(f"INSERT INTO {own}parents SELECT parent, child FROM {old}parents")
        connection.execute(
            f"INSERT OR IGNORE INTO {own}tagged SELECT value, seq "
            f"FROM {own}tasks AS new, {schema.EACH.format('new')} WHERE new.tags IS NOT NULL"
        )
        connection.execute(
            f"INSERT OR REPLACE INTO {own}notes SELECT name, text, version FROM {old}notes "
            f"WHERE name NOT GLOB '{NODES}*'"
        )

    # --- errors

    def translated(self, error: Exception) -> TaskxError:
        """Return TaskX's error for an error of SQLite."""
        text = str(error)
        if "locked" in text or "busy" in text:
            return self._in_use()
        damaged = "malformed" in text or "corrupt" in text
        file = self._source if damaged else self._target
        return Connections(file, PATIENCE).translated(error)

    def _in_use(self) -> RepositoryUnavailable:
        files = " or ".join(dict.fromkeys((self._source.path, self._target.path)))
        return RepositoryUnavailable(
            f"another program uses {files}; nothing was copied. Stop all programs that have it open"
        )


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [name for name, *_ in connection.execute(f"SELECT * FROM {table} LIMIT 0").description]


def _new_keys(rows: Iterable[tuple[int, int | None]]) -> Iterator[tuple[int, int]]:
    """Yield a key for each task, and its number so far. The tasks are sorted by time, then by number.

    A key is odd, as those of all tasks whose ids have no key in them.
    """
    last = -1
    for number, created_at in rows:
        last = max(last + 2, 0 if created_at is None else key_at(created_at) | 1)
        yield last, number
