"""The tables, the check that a file is TaskX's, and the migration of older files."""

from __future__ import annotations

import re
import sqlite3

from taskx.tasks.errors import ConfigurationError, SchemaMismatch

#: ``PRAGMA application_id`` of our files: "TskX".
APPLICATION_ID = 0x54736B58

#: The allowed values of a status; and the same condition in a form that is faster. For ``IN``, SQLite
#: builds a small tree at each write. New files have the second form. An old file keeps the first one, as
#: changing it would mean copying the whole file.
CHECK = "CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled'))"
QUICK_CHECK = (
    "CHECK (status = 'pending' OR status = 'running' OR status = 'completed' OR status = 'failed' "
    "OR status = 'cancelled')"
)

# Indexes are partial, so that finished tasks do not make the indexes larger that are used to run tasks.
# Every index ends with seq, the rowid, which keeps the order of submission.
_VERSION_1 = (
    f"""
    CREATE TABLE tasks (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        type TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'pending'
            {CHECK},
        params TEXT NOT NULL DEFAULT '{{}}',
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
        retry TEXT,
        unique_key TEXT,
        unique_scope TEXT,
        depends_on TEXT,
        on_parent_failure TEXT,
        concurrency_key TEXT,
        errors INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        interruptions INTEGER NOT NULL DEFAULT 0,
        snoozes INTEGER NOT NULL DEFAULT 0,
        starts INTEGER NOT NULL DEFAULT 0,
        cancel_requested_at INTEGER,
        dead_letter INTEGER NOT NULL DEFAULT 0,
        traceback TEXT NOT NULL DEFAULT '',
        owner TEXT NOT NULL DEFAULT '',
        worker TEXT NOT NULL DEFAULT '',
        earlier_attempts TEXT NOT NULL DEFAULT '',
        stuck_on TEXT NOT NULL DEFAULT '',
        checkpoints TEXT,
        log TEXT NOT NULL DEFAULT '',
        held INTEGER NOT NULL DEFAULT 0,
        waiting_on TEXT,
        unique_lock TEXT,
        turn TEXT
    )
    """,
    "CREATE INDEX tasks_created ON tasks (created_at)",
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
    # One for each status, so that the status need not be read: counting a million takes a quarter of the
    # time.
    "CREATE INDEX tasks_completed ON tasks (created_at) WHERE status = 'completed'",
    "CREATE INDEX tasks_failed ON tasks (created_at) WHERE status = 'failed'",
    "CREATE INDEX tasks_cancelled ON tasks (created_at) WHERE status = 'cancelled'",
    # The dependencies between tasks, found by the parent. Most tasks have no row here.
    """
    CREATE TABLE parents (
        parent TEXT NOT NULL,
        child TEXT NOT NULL,
        PRIMARY KEY (parent, child)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX parents_child ON parents (child)",
    """
    CREATE TRIGGER tasks_child_gone AFTER DELETE ON tasks WHEN OLD.depends_on IS NOT NULL
    BEGIN DELETE FROM parents WHERE child = OLD.id; END
    """,
    """
    CREATE TABLE notes (
        name TEXT PRIMARY KEY,
        text TEXT NOT NULL,
        version INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE nodes (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        types TEXT NOT NULL,
        file INTEGER NOT NULL,
        lock INTEGER NOT NULL,
        stopping INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID
    """,
)

# ``tags`` is a reserved column, which is neither read nor written yet: a JSON list of texts to filter by.
# This version did not use ``expires_at`` either. Most rows will have NULL in both.
_VERSION_2 = (
    "ALTER TABLE tasks ADD COLUMN error_type TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE tasks ADD COLUMN tags TEXT",
    "ALTER TABLE tasks ADD COLUMN expires_at INTEGER",
    # From this version on a start writes the node's name. Before, this column named the worker of the
    # attempt before.
    """
    UPDATE tasks SET worker = coalesce((SELECT name FROM nodes WHERE id = tasks.owner), owner)
    WHERE status = 'running'
    """,
)

# Nodes become notes, with the prefix ``node/`` in their names. The index of ``expires_at`` has no condition
# on the status, so changes of the status do not touch it. The end of the first attempt clears the column.
_VERSION_3 = (
    """
    INSERT INTO notes (name, text, version)
    SELECT 'node/' || id, json_object(
        'name', name, 'types', json(types),
        'stopping', json(CASE stopping WHEN 0 THEN 'false' ELSE 'true' END),
        'file', file, 'lock', lock
    ), 1 FROM nodes
    """,
    "DROP TABLE nodes",
    "CREATE INDEX tasks_expiring ON tasks (expires_at) WHERE expires_at IS NOT NULL",
)

# The tags of tasks and the labels of their flows, each with ``created_at`` and ``seq`` of the task. So the
# tasks of a tag are one span of this table, in the order of lists. An untagged task has no row here.
# Damaged tags count as none.
_EACH = "json_each(CASE WHEN json_valid({0}.tags) THEN {0}.tags ELSE '[]' END)"
_UNTAG = f"""
    DELETE FROM tagged
    WHERE at = OLD.created_at AND task = OLD.seq AND tag IN (SELECT value FROM {_EACH.format("OLD")})
"""
_VERSION_4 = (
    """
    CREATE TABLE tagged (
        tag TEXT NOT NULL,
        at INTEGER NOT NULL,
        task INTEGER NOT NULL,
        PRIMARY KEY (tag, at, task)
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
        INSERT OR IGNORE INTO tagged
        SELECT value, NEW.created_at, NEW.seq FROM {_EACH.format("NEW")};
    END
    """,
)

#: The statements that lead from each schema version to the next. The first entry creates a new file. A
#: released entry is never edited. A new entry only adds, and changes nothing in which tasks are stored: a
#: process of the previous version still writes the outcomes of its tasks.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4)
VERSION = len(MIGRATIONS)

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

    def check(self, connection: Executes, path: str) -> int:
        """Return the schema version of a file, 0 if it has none yet.

        Raises:
            SchemaMismatch: the file belongs to another program or to a newer TaskX.
        """
        # One statement, so that all values are of one moment: another process may be creating the file.
        application, version, objects = connection.execute(_HEADER).fetchone()
        if application == APPLICATION_ID:
            return _known(int(version), path)
        if objects or application or version:
            raise SchemaMismatch(
                f"{path} is the database of another program (application_id {application:#x}); "
                "it was not changed. Use another file for TaskX, or a prefix for the tables in this one"
            )
        return 0

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
            for statements in MIGRATIONS[self.check(connection, path) :]:
                for statement in statements:
                    connection.execute(self.named(statement.replace(CHECK, QUICK_CHECK)))
            connection.execute(f"CREATE TABLE {self.prefix}migrated (version)")
            connection.execute(f"DROP TABLE {self.prefix}migrated")
            self._set_version(connection)
            connection.execute("COMMIT")
            return True
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

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

    def check(self, connection: Executes, path: str) -> int:
        version, others = connection.execute(
            f"SELECT (SELECT +name FROM sqlite_master WHERE name = '{self.prefix}schema' COLLATE NOCASE), "
            f"(SELECT +name FROM sqlite_master WHERE name = '{self.prefix}tasks' COLLATE NOCASE)"
        ).fetchone()
        if version is not None:
            self._refuse_other_case(version.removesuffix("schema"), path)
            return _known(self.version(connection), path)
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


def _known(version: int, path: str) -> int:
    if version > VERSION:
        raise SchemaMismatch(
            f"{path} has schema version {version}, but this TaskX knows only {VERSION}; "
            "the file was not changed. Upgrade taskx-queue"
        )
    return version


def older(version: int, path: str) -> SchemaMismatch:
    """Return the error for a file of an earlier version that must not be migrated."""
    return SchemaMismatch(
        f"{path} has schema version {version}, and this TaskX needs {VERSION}; the file was not changed. "
        "Start a queue or a worker of this version, which migrates it"
    )
