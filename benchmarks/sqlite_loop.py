"""The floors on SQLite: TaskX's own statements and schema, and the fewest on a minimal schema."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from typing import Any

from benchmarks.loops import Loop, created, started_and_finished
from taskx.stores.sqlite.connections import Connections
from taskx.stores.sqlite.dialect import statements
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.ids import key_of, new_id
from taskx.tasks.model import TASK_FIELDS
from taskx.tasks.writes import CREATED

Rows = Sequence[Sequence[Any]]


class Statements:
    """The statements of one task's life, with their values for many ids."""

    def __init__(self, ids: Sequence[str]) -> None:
        start, finish = started_and_finished(ids[0])
        self.starting, self.starts = self._update(start, ids)
        self.finishing, self.finishes = self._update(finish, ids)
        self.inserting = statements().insert(("seq", *CREATED))
        self.inserts = [(key_of(id_), *created(id_).row.values()) for id_ in ids]
        self.selecting, _ = statements().find("id", ids[:1], TASK_FIELDS, False)
        self.selects = [(key_of(id_), id_) for id_ in ids]

    @staticmethod
    def _update(update: Any, ids: Sequence[str]) -> tuple[str, Rows]:
        named = "seq = ?", (update.id,)
        sql, values = statements().update((), update.guard, update.changes, place=named)
        position = list(values).index(update.id)
        before, after = tuple(values[:position]), tuple(values[position + 1 :])
        return sql, [(*before, key_of(id_), *after) for id_ in ids]


class LeanStatements:
    """The statements for a minimal record, which has only a task's status and result."""

    table = (
        "CREATE TABLE tasks (id TEXT PRIMARY KEY, type TEXT, params TEXT, status TEXT, result TEXT)"
        " WITHOUT ROWID"
    )
    index = "CREATE INDEX pending ON tasks (type) WHERE status = 'pending'"
    inserting = "INSERT INTO tasks VALUES (?, 'noop', '{}', 'pending', NULL)"
    selecting = "SELECT type, params FROM tasks WHERE id = ?"
    starting = "UPDATE tasks SET status = 'running' WHERE id = ? AND status = 'pending'"
    finishing = "UPDATE tasks SET status = 'completed', result = '1' WHERE id = ?"

    def __init__(self, ids: Sequence[str]) -> None:
        self.inserts: Rows = [(id_,) for id_ in ids]
        self.selects = self.starts = self.finishes = self.inserts


class SQLiteLoop(Loop):
    """A file with TaskX's schema, and a connection like TaskX's writer."""

    statements_of: type[Statements] | type[LeanStatements] = Statements

    def __init__(self, folder: str, durability: str, count: int) -> None:
        self.cursor = self.opened(os.path.join(folder, "floor.db")).cursor()
        self.accepting = "NORMAL" if durability == "process" else "FULL"
        self.running = "FULL" if durability == "full" else "NORMAL"
        self.count = count
        self.statements = self.statements_of([new_id() for _ in range(count)])

    def opened(self, path: str) -> sqlite3.Connection:
        """Create the file and return a connection."""
        self._connections = Connections(DatabaseFile(path, create=True), 10.0)
        return self._connections.writer()

    def close(self) -> None:
        """Close the file."""
        self._connections.close()

    def synchronous(self, level: str) -> None:
        self.cursor.execute(f"PRAGMA synchronous = {level}")

    def insert(self) -> None:
        """Store all tasks with one commit per task."""
        execute, sql = self.cursor.execute, self.statements.inserting
        self.synchronous(self.accepting)
        for row in self.statements.inserts:
            execute("BEGIN IMMEDIATE")
            execute(sql, row)
            execute("COMMIT")

    def insert_many(self) -> None:
        """Store all tasks with one commit."""
        self.synchronous(self.accepting)
        self.cursor.execute("BEGIN IMMEDIATE")
        self.cursor.executemany(self.statements.inserting, self.statements.inserts)
        self.cursor.execute("COMMIT")

    def start_and_finish(self) -> None:
        """Start and finish all tasks with one commit per task."""
        execute, own = self.cursor.execute, self.statements
        self.synchronous(self.running)
        for select, start, finish in zip(own.selects, own.starts, own.finishes, strict=True):
            execute("BEGIN IMMEDIATE")
            execute(own.selecting, select).fetchall()
            execute(own.starting, start)
            execute(own.finishing, finish)
            execute("COMMIT")

    def insert_start_finish(self) -> None:
        """Run all tasks with two commits per task: an accepted task must be safe before it starts."""
        execute, own = self.cursor.execute, self.statements
        switch = self.accepting != self.running
        self.synchronous(self.accepting)
        for row, select, start, finish in zip(
            own.inserts, own.selects, own.starts, own.finishes, strict=True
        ):
            if switch:
                self.synchronous(self.accepting)
            execute("BEGIN IMMEDIATE")
            execute(own.inserting, row)
            execute("COMMIT")
            if switch:
                self.synchronous(self.running)
            execute("BEGIN IMMEDIATE")
            execute(own.selecting, select).fetchall()
            execute(own.starting, start)
            execute(own.finishing, finish)
            execute("COMMIT")

    def commit(self, level: str, sql: str, values: Sequence[Any]) -> None:
        """Run one statement with a commit."""
        if self.accepting != self.running:
            self.synchronous(level)
        self.cursor.execute("BEGIN IMMEDIATE")
        self.cursor.execute(sql, values)
        self.cursor.execute("COMMIT")

    def store(self, index: int) -> None:
        """Store a task with one commit."""
        self.commit(self.accepting, self.statements.inserting, self.statements.inserts[index])

    def start(self, index: int) -> None:
        """Start a task with a read and a commit."""
        own = self.statements
        self.cursor.execute(own.selecting, own.selects[index]).fetchall()
        self.commit(self.running, own.starting, own.starts[index])

    def finish(self, index: int) -> None:
        """Finish a task with one commit."""
        self.commit(self.running, self.statements.finishing, self.statements.finishes[index])

    def one_at_a_time(self) -> tuple[list[float], list[float]]:
        """Measure as the base class does, with three commits per task."""
        self.synchronous(self.accepting)
        return super().one_at_a_time()


class LeanLoop(SQLiteLoop):
    """A file with one table, one partial index, and SQLite's defaults except WAL."""

    statements_of = LeanStatements

    def opened(self, path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute(LeanStatements.table)
        connection.execute(LeanStatements.index)
        return connection

    def close(self) -> None:
        self.cursor.connection.close()
