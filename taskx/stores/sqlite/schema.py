"""The tables, the check that a file is TaskX's, and the migration of older files."""

from __future__ import annotations

import re
import shlex
import sqlite3
from itertools import chain

from taskx.tasks.errors import ConfigurationError, SchemaMismatch

#: ``PRAGMA application_id`` of our files: "TskX".
APPLICATION_ID = 0x54736B58

#: The tags of a row, one a row. Damaged tags count as none.
EACH = "json_each(CASE WHEN json_valid({0}.tags) THEN {0}.tags ELSE '[]' END)"
_UNTAG = f"""
    DELETE FROM tagged WHERE task = OLD.seq AND tag IN (SELECT value FROM {EACH.format("OLD")})
"""

# Indexes are partial, so that finished tasks do not make the indexes larger that are used to run tasks.
# Every index ends with seq, the key of the row, which keeps the order of submission: see ``ids``.
_TABLES = (
    """
    CREATE TABLE tasks (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'pending'
            CHECK (status = 'pending' OR status = 'running' OR status = 'completed' OR status = 'failed'
            OR status = 'cancelled'),
        params TEXT NOT NULL DEFAULT '{}',
        result TEXT,
        error TEXT NOT NULL DEFAULT '',
        progress INTEGER NOT NULL DEFAULT 0,
        message TEXT NOT NULL DEFAULT '',
        created_by TEXT NOT NULL DEFAULT '',
        created_at INTEGER NOT NULL,
        started_at INTEGER,
        completed_at INTEGER,
        duration REAL NOT NULL DEFAULT 0,
        priority INTEGER NOT NULL DEFAULT 0,
        run_at INTEGER,
        timeout REAL,
        max_attempts INTEGER,
        max_crashes INTEGER,
        owner TEXT NOT NULL DEFAULT '',
        held INTEGER NOT NULL DEFAULT 0,
        starts INTEGER NOT NULL DEFAULT 0,
        worker TEXT NOT NULL DEFAULT '',
        stuck_on TEXT NOT NULL DEFAULT '',
        errors INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        interruptions INTEGER NOT NULL DEFAULT 0,
        snoozes INTEGER NOT NULL DEFAULT 0,
        cancel_requested_at INTEGER,
        dead_letter INTEGER NOT NULL DEFAULT 0,
        error_type TEXT NOT NULL DEFAULT '',
        traceback TEXT NOT NULL DEFAULT '',
        earlier_attempts TEXT NOT NULL DEFAULT '',
        log TEXT NOT NULL DEFAULT '',
        retry TEXT,
        unique_key TEXT,
        unique_scope TEXT,
        unique_lock TEXT,
        depends_on TEXT,
        on_parent_failure TEXT,
        waiting_on TEXT,
        concurrency_key TEXT,
        turn TEXT,
        checkpoints TEXT,
        tags TEXT,
        expires_at INTEGER,
        cost TEXT,
        version TEXT
    )
    """,
    # The few rows whose keys are not in their ids. This term must be repeated, so that it is used.
    "CREATE UNIQUE INDEX tasks_named ON tasks (id) WHERE seq & 1",
    """
    CREATE INDEX tasks_ready ON tasks (owner, type, priority DESC)
    WHERE status = 'pending' AND held = 0
    """,
    "CREATE INDEX tasks_held ON tasks (held, run_at) WHERE status = 'pending' AND held > 0",
    "CREATE INDEX tasks_waiting ON tasks (waiting_on) WHERE waiting_on IS NOT NULL",
    "CREATE UNIQUE INDEX tasks_unique ON tasks (unique_lock) WHERE unique_lock IS NOT NULL",
    "CREATE UNIQUE INDEX tasks_turn ON tasks (turn) WHERE turn IS NOT NULL",
    "CREATE INDEX tasks_in_line ON tasks (concurrency_key) WHERE status = 'pending' AND held = 4",
    "CREATE INDEX tasks_stuck ON tasks (stuck_on) WHERE stuck_on <> ''",
    "CREATE INDEX tasks_running ON tasks (owner) WHERE status = 'running'",
    # It has no condition on the status, so changes of the status do not touch it. The end of the first
    # attempt clears the column.
    "CREATE INDEX tasks_expiring ON tasks (expires_at) WHERE expires_at IS NOT NULL",
    # Most tasks have no row here.
    "CREATE INDEX tasks_created_by ON tasks (created_by) WHERE created_by <> ''",
    # One for each status, so that the status need not be read: counting a million takes a quarter of the
    # time.
    "CREATE INDEX tasks_completed ON tasks (seq) WHERE status = 'completed'",
    "CREATE INDEX tasks_failed ON tasks (seq) WHERE status = 'failed'",
    "CREATE INDEX tasks_cancelled ON tasks (seq) WHERE status = 'cancelled'",
    # The id of a parent, and the key of a task that depends on it. Most tasks have no row here.
    """
    CREATE TABLE parents (
        parent TEXT NOT NULL,
        child INTEGER NOT NULL,
        PRIMARY KEY (parent, child)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX parents_child ON parents (child)",
    """
    CREATE TRIGGER tasks_child_gone AFTER DELETE ON tasks WHEN OLD.depends_on IS NOT NULL
    BEGIN DELETE FROM parents WHERE child = OLD.seq; END
    """,
    """
    CREATE TABLE notes (
        name TEXT PRIMARY KEY,
        text TEXT NOT NULL,
        version INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    # The tags of tasks and the labels of their flows, each with the key of the task. So the tasks of a tag
    # are one span of this table, in the order of lists. An untagged task has no row here.
    """
    CREATE TABLE tagged (
        tag TEXT NOT NULL,
        task INTEGER NOT NULL,
        PRIMARY KEY (tag, task)
    ) WITHOUT ROWID
    """,
    f"""
    CREATE TRIGGER tasks_tagged_gone AFTER DELETE ON tasks WHEN OLD.tags IS NOT NULL
    BEGIN {_UNTAG}; END
    """,
    f"""
    CREATE TRIGGER tasks_retagged AFTER UPDATE OF tags ON tasks WHEN NEW.tags IS NOT OLD.tags
    BEGIN
        {_UNTAG};
        INSERT OR IGNORE INTO tagged SELECT value, NEW.seq FROM {EACH.format("NEW")};
    END
    """,
)

#: The version of the first schema in which the key of a row is its order in time. The tasks of files of
#: earlier versions are copied by ``taskx migrate``.
FIRST = 5
#: The statements that lead from each schema version to the next. The first entry creates a new file. A
#: released entry is never edited. A new entry only adds, and changes nothing in which tasks are stored: a
#: process of the previous version still writes the outcomes of its tasks.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_TABLES,)
VERSION = FIRST - 1 + len(MIGRATIONS)

_HEADER = (
    "SELECT (SELECT application_id FROM pragma_application_id), "
    "(SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_master)"
)
_PREFIX = re.compile(r"(?!sqlite_)[a-z_][a-z0-9_]{0,39}", re.IGNORECASE)
# The names of the tables, and of everything that is named after one.
_NAMES = re.compile(
    r"\b(sqlite_autoindex_)?((?:tasks|parents|notes|tagged|nodes|migrated)(?:_\w+)?)\b"
)


#: What executes statements.
Executes = sqlite3.Connection | sqlite3.Cursor


class Schema:
    """The schema of TaskX's own file. SQLite's header of the file has its version."""

    #: What the names of all tables, indexes and triggers begin with; empty in a file of our own.
    prefix = ""

    def named(self, sql: str) -> str:
        """Return a statement with the prefix before the names of all tables, indexes and triggers."""
        return _NAMES.sub(rf"\1{self.prefix}\2", sql)

    def check(self, connection: Executes, path: str, oldest: int = FIRST) -> int:
        """Return the schema version of a file, 0 if it has none yet.

        Raises:
            SchemaMismatch: the file belongs to another program, to a newer TaskX, or to one with a schema
                before ``oldest``.
        """
        # One statement, so that all values are of one moment: another process may be creating the file.
        application, version, objects = connection.execute(_HEADER).fetchone()
        if application == APPLICATION_ID:
            return self._known(int(version), path, oldest)
        if objects or application or version:
            raise SchemaMismatch(
                f"{path} is the database of another program (application_id {application:#x}); "
                "it was not changed. Use another file for TaskX, or a prefix for the tables in this one"
            )
        return 0

    def _known(self, version: int, path: str, oldest: int) -> int:
        if version > VERSION:
            raise SchemaMismatch(
                f"{path} has schema version {version}, but this TaskX knows only {VERSION}; "
                "the file was not changed. Upgrade taskx-queue"
            )
        if 0 < version < oldest:
            place = shlex.quote(path)
            call = f"{place} {place} --prefix {self.prefix}" if self.prefix else f"{place} NEW"
            raise SchemaMismatch(
                f"{path} has schema version {version}, and this TaskX needs {VERSION}; the file was not "
                f"changed. Stop all programs that use it, and run `taskx migrate {call}`"
            )
        return version

    def version(self, connection: Executes) -> int:
        """Return the schema version of a file that was checked before."""
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        return int(version)

    def newer(self, connection: sqlite3.Connection, path: str) -> SchemaMismatch | None:
        """Return the error for an open file that another process has migrated, else None."""
        version = self.version(connection)
        if version <= VERSION:
            return None
        return SchemaMismatch(
            f"another process migrated {path} to schema version {version}, but this TaskX knows only "
            f"{VERSION}; nothing was stored. Restart this program with the newer taskx-queue"
        )

    def migrate(self, connection: sqlite3.Connection, path: str) -> bool:
        """Migrate a file to :data:`VERSION` in one transaction. Return False if it had that version.

        Several processes may try at the same time. A process that has the file open notices a migration
        because SQLite compiles its statements again after a change of the schema. So every migration
        changes the schema.
        """
        if self.check(connection, path) == VERSION:
            return False
        connection.execute("BEGIN IMMEDIATE")
        try:
            self.advance(connection, self.check(connection, path))
            connection.execute("COMMIT")
            return True
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def advance(self, connection: sqlite3.Connection, version: int) -> None:
        """Bring the tables from a version, 0 if there are none, to :data:`VERSION`.

        The caller has begun a transaction.
        """
        done = max(version - FIRST + 1, 0)
        for statement in chain.from_iterable(MIGRATIONS[done:]):
            connection.execute(self.named(statement))
        connection.execute(f"CREATE TABLE {self.prefix}migrated (version)")
        connection.execute(f"DROP TABLE {self.prefix}migrated")
        self._set_version(connection)

    def _set_version(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


#: The schema of files that have no other tables.
OWN = Schema()


class PrefixedSchema(Schema):
    """The schema of tables in the file of an application. A table of their own has its version.

    Nothing in the file's header and no other table is changed.

    Raises:
        ConfigurationError: the prefix cannot begin the names of tables.
    """

    def __init__(self, prefix: str) -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                "prefix must be at most 40 ASCII letters, digits and underscores, such as 'taskx_', and "
                f"not begin with a digit or 'sqlite_': {prefix!r:.80}"
            )
        self.prefix = prefix

    def check(self, connection: Executes, path: str, oldest: int = FIRST) -> int:
        version, others = connection.execute(
            f"SELECT (SELECT +name FROM sqlite_master WHERE name = '{self.prefix}schema' COLLATE NOCASE), "
            f"(SELECT +name FROM sqlite_master WHERE name = '{self.prefix}tasks' COLLATE NOCASE)"
        ).fetchone()
        if version is not None:
            self._refuse_other_case(version.removesuffix("schema"), path)
            return self._known(self.version(connection), path, oldest)
        if others is not None:
            raise SchemaMismatch(
                f"{path} has a table {others} that is not TaskX's; it was not changed. Use another prefix"
            )
        return 0

    def _refuse_other_case(self, there: str, path: str) -> None:
        """Raise an error if the tables are there, but with another prefix: each has its own lock files."""
        if there != self.prefix:
            raise SchemaMismatch(
                f"{path} has tables with the prefix {there!r}, and {self.prefix!r} would be the same ones, "
                "because upper and lower case are the same in names of SQLite; nothing was changed. Use "
                f"prefix={there!r}, or one that differs in more than its case"
            )

    def version(self, connection: Executes) -> int:
        found = connection.execute(f"SELECT +version FROM {self.prefix}schema").fetchall()
        return int(found[0][0]) if found else 0

    def _set_version(self, connection: sqlite3.Connection) -> None:
        table = f"{self.prefix}schema"
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (version INTEGER NOT NULL)")
        connection.execute(f"DELETE FROM {table}")
        connection.execute(f"INSERT INTO {table} VALUES ({VERSION})")


def of(prefix: str) -> Schema:
    """Return the schema of tables whose names begin with a prefix."""
    return OWN if prefix == "" else PrefixedSchema(prefix)


def older(version: int, path: str) -> SchemaMismatch:
    """Return the error for a file of an earlier version that must not be migrated."""
    return SchemaMismatch(
        f"{path} has schema version {version}, and this TaskX needs {VERSION}; the file was not changed. "
        "Start a queue or a worker of this version, which migrates it"
    )
