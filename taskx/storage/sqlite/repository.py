"""The repository on one SQLite file."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar, get_args

from taskx.core import lifecycle
from taskx.core.checks import check_number
from taskx.core.clock import SYSTEM_CLOCK, Clock
from taskx.core.codec import Codec, Codecs
from taskx.core.errors import (
    ConfigurationError,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
)
from taskx.core.model import Task, TaskFilter
from taskx.core.record import Ended, Stub, parents_from_text, task_from_row
from taskx.core.writes import CREATED, Delete, Insert, Update, Write, shows, traces
from taskx.storage.base import (
    OLDEST,
    Node,
    Note,
    NoteChange,
    Reentered,
    Repository,
    new_version,
)
from taskx.storage.began import Began
from taskx.storage.sqlite import schema, statements, turnstile
from taskx.storage.sqlite.connections import Connections, translated
from taskx.storage.sqlite.file import DatabaseFile
from taskx.storage.sqlite.liveness import NodeLocks
from taskx.storage.sqlite.turnstile import Turnstile

Durability = Literal["accepted", "full", "process"]
T = TypeVar("T")

_MOST_TOGETHER = 32  # updates in one statement
_FORK_PATIENCE = 5.0  # seconds that a fork waits for other threads' transactions to end
_FEW = 32  # rows that may be read while others would write
_SHORT_WAIT = 0.05  # waits of fewer seconds than this are not deducted from the time-out
_KEPT_PAGES = 1000  # free pages of 4 KiB that are worth no vacuum
_PAGES_AT_ONCE = 200
_MOST_VARIABLES = 500  # ids in one SELECT; SQLite's own limit is 32,766


class SQLiteRepository(Repository):
    """Keeps tasks in one SQLite file, which any number of processes on this host may share.

    The file is opened, and made if need be, at the first operation. It is in WAL mode: readers never
    wait for writers. It must be on a local file system. While it is open it is known by its real path
    and its inode: every operation raises ``RepositoryUnavailable`` once it is moved, deleted or replaced.

    Args:
        path: the file. A relative path is made absolute at once.
        durability: what a power cut may undo. ``"accepted"``: nothing that a caller was told
            (submit, cancel, requeue, delete), at most outcomes of the last moments, which are then
            reached again. ``"full"``: nothing. ``"process"``: commits of the last moments. The death
            of the process undoes nothing at any setting.
        busy_timeout: seconds to wait for another process's write before giving up.
        create: whether to make the file if there is none. With False an operation then raises
            ``RepositoryUnavailable``, and nothing is made.
        clock: what the eight methods stamp records with.
        codec: what params, results and checkpoints are stored with; of several, the first one writes.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        durability: Durability = "accepted",
        *,
        busy_timeout: float = 10.0,
        create: bool = True,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> None:
        super().__init__(clock, codec)
        self.path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not isinstance(self.path, str) or self.path in ("", ":memory:") or "\0" in self.path:
            raise ConfigurationError(
                f"SQLiteRepository needs the path of a file, not {path!r}; "
                "for tasks in memory there is MemoryRepository"
            )
        if durability not in get_args(Durability):
            raise ConfigurationError(
                f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}"
            )
        self.durability = durability
        check_number(busy_timeout, "busy_timeout")
        if not isinstance(create, bool):
            raise ConfigurationError(f"create must be True or False, not {create!r}")
        self._file = DatabaseFile(self.path, create)
        self._connections = Connections(self._file, busy_timeout)
        self._turnstile = Turnstile(self._file)
        self._joined: set[str] = set()
        self._write_lock = threading.RLock()
        self._forking = False
        self._synchronous = "NORMAL"
        # Commits of other connections, as the writing one counts them; the number of writing
        # connections so far; and our own commits.
        self._others, self._writers, self._commits = -1, 0, 0
        self._newer: SchemaMismatch | None = None
        _repositories.add(self)

    def __repr__(self) -> str:
        return f"SQLiteRepository({self.path!r}, durability={self.durability!r})"

    @property
    def _locks(self) -> NodeLocks:
        """The lock files of the nodes. Open the file first: only then its real path is known."""
        return NodeLocks(self._file.path)

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction; says for each whether its guard held.

        Raises:
            RepositoryError: nothing was applied.
        """
        durable = True in [write.durable for write in writes]
        writes = self.codecs.coded(writes)
        if all_or_nothing:
            return self._apply_whole(writes, durable)
        try:
            return self._transact(lambda cursor: _apply_in_groups(cursor, writes), durable, writes)
        except _Uneven:
            return self._transact(
                lambda cursor: [_apply_one(cursor, write) for write in writes], durable, writes
            )

    def _apply_whole(self, writes: Sequence[Write], durable: bool) -> Sequence[bool]:
        ordinary = all(isinstance(write, Insert) and _is_ordinary(write) for write in writes)

        def work(cursor: sqlite3.Cursor) -> Sequence[bool]:
            if ordinary:
                rows = (tuple(write.row.values()) for write in writes)  # type: ignore[union-attr]
                cursor.executemany(statements.insert(CREATED), rows)
                return [True] * len(writes)
            results = [_apply_one(cursor, write) for write in writes]
            if not all(results):
                raise _Refused(results)
            return results

        try:
            return self._transact(work, durable)
        except _Refused as refused:
            return refused.results
        except RepositoryError as error:
            if not isinstance(error.__cause__, sqlite3.IntegrityError):
                raise
            taken = set(self.get_many([write.id for write in writes]))
            results = []
            for write in writes:
                results.append(write.id not in taken)
                taken.add(write.id)
            if all(results):  # it was no id that was refused
                raise
            return results

    def settle(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Say for each write whether it took place."""
        return self._transact(
            lambda cursor: [_took_place(cursor, write, self.codecs) for write in writes],
            durable=False,
            writes=(),
        )

    @property
    def entered(self) -> bool:
        """True if the calling thread holds the lock of the writing connection."""
        return self._write_lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def _transact(
        self,
        work: Callable[[sqlite3.Cursor], T],
        durable: bool,
        writes: Sequence[Write] | None = None,
    ) -> T:
        """Do work in one transaction.

        Args:
            work: what to do; none of it is committed if it raises.
            durable: whether a power cut must not undo it.
            writes: the writes that it applies. Where another process has brought the file to a newer
                schema, they must all let go of what this one holds; None is refused there.
        """
        if self._write_lock._is_owned():  # type: ignore[attr-defined]
            raise Reentered
        with self._write_lock:
            connection = self._connections.writer()
            if connection.in_transaction:  # the last one was struck twice by signals
                self._roll_back(connection)
            self._file.check()
            cursor = connection.cursor()
            try:
                left = self._turnstile.enter(self._connections.busy_timeout)
                self._set_synchronous(cursor, durable)
                self._begin(cursor, left)
                result = work(cursor)
                if self._connections.compiling.seen:
                    self._look_at_version(connection)
                if self._newer is not None and not _let_go(writes):
                    raise SchemaMismatch(*self._newer.args)
                cursor.execute("COMMIT")
                self._commits += 1
                return result
            except BaseException as error:
                # A full disk makes SQLite roll back by itself.
                if connection.in_transaction:
                    self._roll_back(connection)
                if isinstance(error, (sqlite3.Error, OverflowError, UnicodeEncodeError)):
                    raise translated(
                        error, self._file.path, self._connections.busy_timeout
                    ) from error
                raise
            finally:
                self._turnstile.leave()

    def _begin(self, cursor: sqlite3.Cursor, left: float) -> None:
        """Begin a transaction within the seconds that are left of the time-out."""
        timeout = self._connections.busy_timeout
        if timeout - left < _SHORT_WAIT:
            cursor.execute("BEGIN IMMEDIATE")
            return
        cursor.execute(f"PRAGMA busy_timeout = {left * 1000:.0f}")
        try:
            cursor.execute("BEGIN IMMEDIATE")
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {timeout * 1000:.0f}")

    def _look_at_version(self, connection: sqlite3.Connection) -> None:
        try:
            self._newer = schema.newer(connection, self._file.path)
        except sqlite3.Error as error:
            raise translated(error, self._file.path, self._connections.busy_timeout) from error
        self._connections.compiling.forget()

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:  # a new connection finds the file as it was before
            self._discard_writer()

    def _discard_writer(self) -> None:
        self._connections.discard_writer()
        self._forget_writer()

    def _forget_writer(self) -> None:
        """Forget the writing connection; the next one counts commits anew."""
        self._synchronous = "NORMAL"
        self._writers, self._others = self._writers + 1, -1

    def _set_synchronous(self, cursor: sqlite3.Cursor, durable: bool) -> None:
        full = self.durability == "full" or (durable and self.durability == "accepted")
        wanted = "FULL" if full else "NORMAL"
        if wanted != self._synchronous:
            self._synchronous = ""  # unknown, should an interrupt come between the next two lines
            cursor.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted

    # --- reading

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        self._open()
        with self._connections.reader() as connection:
            return _fetch(connection, sql, values)

    def _rows_near(self, sql: str, values: Sequence[Any]) -> list[Any]:
        """A few rows, read on the writing connection if that is free.

        It has the pages that it wrote last in memory; another one reads them anew after each commit.
        """
        self._open()
        if self._write_lock._is_owned():  # type: ignore[attr-defined]
            return self._rows(sql, values)
        got: list[bool] = []
        try:
            # The lock and the note of it in one step: the exception of a signal handler may come between
            # any two, in `finally` after each call but the last, too.
            got.extend(map(self._write_lock.acquire, (False,)))
            if got == [True]:
                return self._connections.writer().execute(sql, values).fetchall()
        except sqlite3.Error:
            pass  # the other connection meets it again, and says what it means
        finally:
            if got == [True]:
                self._write_lock.release()
        return self._rows(sql, values)

    def _open(self) -> None:
        """Have the file made and checked before the first reader sees it, and later on still there."""
        if self._connections.opened:
            self._file.check()
        else:
            with self._write_lock:
                self._connections.writer()

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        found = {}
        for some in _chunks(task_ids):
            read = self._rows_near if len(some) <= _FEW else self._rows
            for row in read(statements.select_many(len(some)), some):
                found[row[0]] = task_from_row(row, self.codecs)
        return found

    def _rows_of(self, columns: str, key: str, values: Sequence[str]) -> Iterator[Any]:
        for some in _chunks(values):
            read = self._rows_near if len(some) <= _FEW else self._rows
            yield from read(statements.select_many(len(some), columns, key), some)

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        return dict(self._rows_of("id, status", "id", task_ids))

    def asked_to_cancel(self, task_ids: Sequence[str]) -> Collection[str]:
        """Return the ids of these tasks whose cancel was requested, even if the record is damaged."""
        asked = dict(self._rows_of("id, cancel_requested_at IS NOT NULL", "id", task_ids))
        return [task_id for task_id, is_asked in asked.items() if is_asked]

    def unique_holders(self, keys: Sequence[str]) -> dict[str, str]:
        """Which task holds each of these unique keys, by key."""
        return dict(self._rows_of("unique_lock, id", "unique_lock", keys))

    def awaited(self, after: str, limit: int) -> Sequence[str]:
        """The ids that waiting tasks wait on, in order, from the one after ``after``."""
        return [parent for (parent,) in self._rows(statements.AWAITED, (after, limit))]

    def waiting_for(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that wait on one of these."""
        return [child for (child,) in self._rows_of("id", "waiting_on", task_ids)]

    def next_in_line(self, key: str) -> str | None:
        """The first task of a concurrency key that waits for its turn."""
        rows = self._rows(statements.NEXT_IN_LINE, (key,))
        return rows[0][0] if rows else None

    def lines(self, after: str, limit: int) -> dict[str, bool]:
        """Concurrency keys of tasks that wait for their turn, and whether each stands still."""
        return {key: bool(still) for key, still in self._rows(statements.LINES, (after, limit))}

    def stuck_on(self, node: str) -> Sequence[Stub]:
        """The tasks that a thread of an ended attempt still runs on a node."""
        return [_stub(row) for row in self._rows(statements.STUCK, (node,))]

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first."""
        sql, values = statements.list_tasks(filter)
        return [task_from_row(row, self.codecs) for row in self._rows(sql, values)]

    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter."""
        ((count,),) = self._rows(*statements.count_tasks(filter))
        return int(count)

    def page(self, filter: TaskFilter) -> tuple[Sequence[Task], int]:
        """The tasks that meet the filter, and how many do in all, as one transaction sees them."""
        self._open()
        with self._connections.reader() as connection:
            connection.execute("BEGIN")
            rows = _fetch(connection, *statements.list_tasks(filter))
            ((count,),) = _fetch(connection, *statements.count_tasks(filter))
            connection.execute("COMMIT")
        return [task_from_row(row, self.codecs) for row in rows], int(count)

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Pending tasks of these types and this owner that may start now, best first."""
        if ageing:
            return self._ready_by_age(types, limit, owner, ageing)
        rows = [row for kind in types for row in self._rows(statements.READY, (owner, kind, limit))]
        rows.sort(key=lambda row: (-row[3], row[-1]))
        return [_stub(row) for row in rows[:limit]]

    def _ready_by_age(
        self, types: Iterable[str], limit: int, owner: str, ageing: int
    ) -> Sequence[Stub]:
        levels = [
            (owner, kind, priority, limit)
            for kind in types
            for (priority,) in self._rows(statements.PRIORITIES, (owner, kind) * 2)
        ]
        rows = [row for level in levels for row in self._rows(statements.READY_AT, level)]
        rows.sort(key=lambda row: (_stub(row).rank(ageing), row[-1]))
        return [_stub(row) for row in rows[:limit]]

    def due(self, now: int, limit: int) -> Sequence[str]:
        """Ids of held back pending tasks whose time has come."""
        return [task_id for (task_id,) in self._rows(statements.DUE, (now, limit))]

    def next_due(self) -> int | None:
        """The earliest ``run_at`` of the held back pending tasks."""
        ((earliest,),) = self._rows(statements.NEXT_DUE)
        return None if earliest is None else int(earliest)

    def oldest_ready(self) -> int | None:
        """Since when the pending task has waited, of those that may start now, that waits longest."""
        ((since,),) = self._rows(statements.OLDEST_READY, (OLDEST,))
        return None if since is None else int(since)

    def owned(self, node: str, limit: int | None = None) -> Sequence[Stub]:
        """The running tasks that a node holds, and then the pending ones; at most ``limit``."""
        most = -1 if limit is None else limit
        return [_stub(row) for row in self._rows(statements.OWNED, (node, node, most))]

    def owners(self) -> Sequence[str]:
        """The ids of all nodes that hold tasks."""
        queries = (
            statements.OWNERS_OF_READY,
            statements.OWNERS_OF_RUNNING,
            statements.OWNERS_OF_STUCK,
        )
        return list({owner for query in queries for (owner,) in self._rows(query)})

    def unfinished(self, types: Iterable[str]) -> bool:
        """Whether a task of these types runs on a node, or is pending and not held back."""
        kinds = list(types)
        self._open()
        with self._connections.reader() as connection:
            connection.execute("BEGIN")  # one snapshot: a task that starts meanwhile is in it once
            running = {kind for (kind,) in connection.execute(statements.UNFINISHED_RUNNING)}
            found = not running.isdisjoint(kinds) or any(
                connection.execute(statements.UNFINISHED_READY, (kind,)).fetchone()
                for kind in kinds
            )
            connection.execute("COMMIT")
        return found

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Tasks of a finished status that ended before a moment, newest first."""
        rows = self._rows(statements.ENDED.format(status), (*(after or (before, 0)), before, limit))
        return [
            Ended(_stub(row), parents_from_text(parents), lock, scope, place)
            for *row, parents, lock, scope, created_at, seq in rows
            if (place := (created_at, seq))
        ]

    def needed(self, task_ids: Sequence[str]) -> set[str]:
        """Return the ids of these on which a stored task depends that is not one of these."""
        rows = self._rows(statements.needed(len(task_ids)), task_ids)
        return {parent for (parent,) in rows}

    def children(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that depend on one of these, each once."""
        found = dict[str, None]()
        for some in _chunks(task_ids):
            rows = self._rows(statements.children(len(some)), some)
            found.update((child, None) for (child,) in rows)
        return list(found)

    def shrink(self) -> bool:
        """Cut a few pages off the file, if a good part of it is free; whether there are more.

        What is free is used again, and to move pages costs: so some stay.
        """
        self._open()
        ((free, pages),) = self._rows(statements.FREE_PAGES)
        spare = free - max(_KEPT_PAGES, pages // 4)
        if spare <= 0:
            return False
        few = min(spare, _PAGES_AT_ONCE)
        sql = f"PRAGMA incremental_vacuum({few})"
        self._transact(lambda cursor: cursor.execute(sql).fetchall(), durable=False)
        return bool(spare > few)

    def version(self) -> object:
        """Return counters of commits: those of other connections, and our own if several queues share us.

        Reads counters in memory. SQLite's is read on the writing connection, which does not count its
        own commits.
        """
        self._open()
        # If the lock is taken for longer, a write is under way; the next call reads the counter.
        if self._write_lock.acquire(timeout=0.005):
            try:
                self._others = self._read_data_version()
            finally:
                self._write_lock.release()
        return (self._writers, self._others, self._commits if len(self.queues) > 1 else 0)

    def _read_data_version(self) -> int:
        try:
            connection = self._connections.writer()
            ((others,),) = connection.execute("PRAGMA data_version").fetchall()
        except sqlite3.Error as error:
            raise translated(error, self._file.path, self._connections.busy_timeout) from error
        if others != self._others:
            self._look_at_version(connection)
        return int(others)

    # --- notes

    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""
        rows = self._rows(statements.NOTES, (prefix, f"{prefix}\U0010ffff"))
        return {name: Note(text, version) for name, text, version in rows}

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store notes, or remove them, each if its version is still that one, in one transaction."""
        return self._transact(
            lambda cursor: [_put_note(cursor, *change) for change in changes], durable=True
        )

    # --- nodes

    def join(self, node: Node) -> None:
        """Record a node, and prove it alive until :meth:`leave` or process death."""
        self._open()
        file = self._file.inode
        lock = self._locks.hold(node.id, file)
        row = (node.id, node.name, json.dumps(node.types), file, lock)
        try:
            self._transact(
                lambda cursor: cursor.execute(
                    "INSERT INTO nodes (id, name, types, file, lock) VALUES (?, ?, ?, ?, ?)", row
                ),
                durable=False,
            )
        except BaseException:
            self._locks.release(node.id)
            raise
        self._joined.add(node.id)
        with suppress(RepositoryError):  # the next node does it
            self._locks.clear_orphans(self._file.inode, self._on_record)

    def _on_record(self) -> set[str]:
        return {*turnstile.NAMES, *(node for (node,) in self._rows("SELECT id FROM nodes"))}

    def began(self, node: str) -> Began | None:
        """Return the tasks that the threads of a node began last."""
        return self._locks.began(node)

    def record_types(self, node: str, types: Sequence[str]) -> None:
        """Record the types that a node runs now."""
        row = (json.dumps(types), node)
        self._transact(
            lambda cursor: cursor.execute("UPDATE nodes SET types = ? WHERE id = ?", row),
            durable=False,
        )

    def mark_stopping(self, node: str) -> None:
        """Record that a node is stopping."""
        self._transact(
            lambda cursor: cursor.execute("UPDATE nodes SET stopping = 1 WHERE id = ?", (node,)),
            durable=False,
            writes=(),
        )

    def leave(self, node: str) -> None:
        """Forget a node that holds nothing any more."""
        try:
            self._transact(
                lambda cursor: cursor.execute("DELETE FROM nodes WHERE id = ?", (node,)),
                durable=False,
                writes=(),
            )
        except BaseException:
            self._locks.let_go(node)  # still on record, it is a dead one from now on
            raise
        finally:
            self._joined.discard(node)
        self._locks.release(node)

    def nodes(self) -> Sequence[Node]:
        """Return all recorded nodes. In a copy of a file, the nodes of the original are dead.

        A node that holds its lock beside this file lives: the copy was put in the original's place.
        """
        self._open()
        nodes = [
            Node(
                id=node,
                name=name,
                types=tuple(json.loads(types)),
                stopping=bool(stopping),
                alive=self._alive(node, file, lock),
            )
            for node, name, types, file, lock, stopping in self._rows(
                "SELECT id, name, types, file, lock, stopping FROM nodes ORDER BY id"
            )
        ]
        if any(node.alive is None for node in nodes):
            # One that leaves goes from the record before its lock file goes.
            still = self._on_record()
            nodes = [node for node in nodes if node.alive is not None or node.id in still]
        return nodes

    def _alive(self, node: str, file: int, lock: int) -> bool | None:
        alive = self._locks.alive(node, lock)
        return False if alive is None and file != self._file.inode else alive

    def ensure_there(self) -> None:
        """Raise if the file was moved, deleted, replaced or migrated since it was opened.

        Raises:
            RepositoryUnavailable: it is another one now; the message says what to do.
            SchemaMismatch: a newer TaskX migrated it; the message says what to do.
        """
        self._file.check()
        if self._newer is not None:
            raise SchemaMismatch(*self._newer.args)

    # --- opening and closing

    def close(self) -> None:
        """Close the file; a later operation opens it again.

        It opens what is at the path by then, unless a node of this repository is still at work.
        """
        if self.entered:
            raise Reentered
        with self._write_lock:
            try:
                self._turnstile.close()
                self._connections.close()
                if not self._joined:
                    self._file.forget()
            except sqlite3.Error as error:
                raise RepositoryUnavailable(f"{self.path} could not be closed: {error}") from error
            finally:
                self._forget_writer()
                self._newer = None

    def before_fork(self) -> None:
        """Have no transaction and no connection open, so that a forked child inherits none."""
        # Not on a thread in the middle of a transaction: it would wait for itself, or end it.
        self._forking = not self.entered and self._write_lock.acquire(timeout=_FORK_PATIENCE)
        if self._forking:
            self._discard_writer()
        self._connections.close_before_fork(_FORK_PATIENCE)

    def after_fork(self) -> None:
        """In the parent: connections are opened again when they are needed."""
        self._connections.reopen()
        if self._forking:
            self._write_lock.release()

    def renew_after_fork(self) -> None:
        """In a forked child: connections of its own, opened at the next operation."""
        self._write_lock = threading.RLock()
        self._connections.renew_after_fork()
        self._turnstile.leave = dict
        self._joined.clear()
        self._forget_writer()


_repositories: weakref.WeakSet[SQLiteRepository] = weakref.WeakSet()
_one_fork = threading.Lock()
_prepared: list[SQLiteRepository] = []


def _before_fork() -> None:
    _one_fork.acquire()
    for repository in list(_repositories):
        repository.before_fork()
        _prepared.append(repository)


def _after_fork() -> None:
    while _prepared:
        _prepared.pop().after_fork()
    _one_fork.release()


def _renew_all_after_fork() -> None:
    global _one_fork
    _one_fork = threading.Lock()
    _prepared.clear()
    for repository in list(_repositories):
        repository.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_renew_all_after_fork
    )


def _let_go(writes: Sequence[Write] | None) -> bool:
    return writes is not None and all(map(lifecycle.lets_go, writes))


class _Refused(Exception):
    def __init__(self, results: Sequence[bool]) -> None:
        super().__init__(results)
        self.results = results


class _Uneven(Exception):
    """Of several updates in one statement some held and some did not: which, it does not tell."""


def _apply_in_groups(cursor: sqlite3.Cursor, writes: Sequence[Write]) -> Sequence[bool]:
    """Apply writes in order; neighbours that differ in nothing but the id, such as starts, together."""
    results: list[bool] = []
    while (position := len(results)) < len(writes):
        group = _alike(writes, position)
        if len(group) == 1:
            results.append(_apply_one(cursor, writes[position]))
            continue
        first = writes[position]
        cursor.execute(*statements.update(group, first.guard, first.changes))  # type: ignore[union-attr]
        if 0 < cursor.rowcount < len(group):
            raise _Uneven
        results += [cursor.rowcount > 0] * len(group)
    return results


def _alike(writes: Sequence[Write], position: int) -> list[str]:
    """The ids of the updates from ``position`` on that make the same change under the same guard."""
    first = writes[position]
    group = [first.id]
    if isinstance(first, Update):
        for write in writes[position + 1 : position + _MOST_TOGETHER]:
            if write[1:] != first[1:]:
                break
            group.append(write.id)
    return group


def _apply_one(cursor: sqlite3.Cursor, write: Write) -> bool:
    if isinstance(write, Update):
        cursor.execute(*statements.update((write.id,), write.guard, write.changes))
    elif isinstance(write, Insert):
        ordinary = _is_ordinary(write)
        sql = _INSERT_ORDINARY if ordinary else statements.insert_if_new(tuple(write.row))
        cursor.execute(sql, tuple(write.row.values()))
        if (parents := write.row.get("depends_on")) and cursor.rowcount == 1:
            pairs = [(parent, write.id) for parent in json.loads(parents)]
            cursor.executemany(statements.NEW_PARENT, pairs)
            return True
    else:
        cursor.execute(*statements.delete(write.id, write.guard))
    return cursor.rowcount == 1


def _put_note(cursor: sqlite3.Cursor, name: str, text: str | None, version: int) -> bool:
    if text is None and not version:
        return cursor.execute("SELECT 1 FROM notes WHERE name = ?", (name,)).fetchone() is None
    if text is None:
        cursor.execute(statements.GONE_NOTE, (name, version))
    elif version:
        cursor.execute(statements.CHANGED_NOTE, (text, name, version))
    else:
        cursor.execute(statements.NEW_NOTE, (name, text, new_version()))
    return cursor.rowcount == 1


_INSERT_ORDINARY = statements.insert_if_new(CREATED)


def _is_ordinary(insert: Insert) -> bool:
    """Whether it has no columns but those that every creation sets, which come in their order."""
    return len(insert.row) == len(CREATED)


def _took_place(cursor: sqlite3.Cursor, write: Write, codecs: Codecs) -> bool:
    if isinstance(write, Delete):
        return cursor.execute("SELECT 1 FROM tasks WHERE id = ?", (write.id,)).fetchone() is None
    wanted = traces(write)
    sql = f"SELECT {', '.join(wanted)} FROM tasks WHERE id = ?"
    stored = cursor.execute(sql, (write.id,)).fetchone()
    return stored is not None and shows(dict(zip(wanted, stored, strict=True)), write, codecs.same)


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _MOST_VARIABLES):
        yield values[start : start + _MOST_VARIABLES]


def _fetch(connection: sqlite3.Connection, sql: str, values: Sequence[Any]) -> list[Any]:
    try:
        return connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
        return _fetch_broken_text(connection, sql, values)


def _fetch_broken_text(
    connection: sqlite3.Connection, sql: str, values: Sequence[Any]
) -> list[Any]:
    """The rows, with what is no UTF-8 as bytes: one damaged record must not hide the others."""
    connection.text_factory = _text_or_bytes
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.text_factory = str


def _text_or_bytes(stored: bytes) -> str | bytes:
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored


def _stub(row: Sequence[Any]) -> Stub:
    task_id, status, starts, priority, created_at, cancel_requested, kind, run_at = row[:8]
    return Stub(task_id, status, starts, priority, created_at, bool(cancel_requested), kind, run_at)
