"""The repository in a Django database."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, TypeVar, get_args

from django.db import connections
from django.db.utils import IntegrityError

from taskx.contrib.django import statements, writing
from taskx.contrib.django.blocks import (
    BesideBlocks,
    OnCommit,
    check_on_commit,
    has_begun,
    is_elsewhere,
    is_open,
)
from taskx.contrib.django.connections import Connections, Link, Rows, is_failure, may_be_repeated
from taskx.contrib.django.sqlite import Turns
from taskx.core.checks import check_number
from taskx.core.clock import SYSTEM_CLOCK, Clock
from taskx.core.codec import Codec
from taskx.core.errors import ConfigurationError
from taskx.core.lifecycle import FINISHED
from taskx.core.model import CONDITIONS, TASK_FIELDS, Task, TaskFilter
from taskx.core.record import (
    COLUMNS,
    STUB,
    Ended,
    Stub,
    parents_from_text,
    stub_from_values,
    task_from_row,
)
from taskx.core.tags import FLOW
from taskx.core.verdict import Check
from taskx.core.writes import Delete, Note, NoteChange, Write, shows
from taskx.liveness.base import PREFIX as NODES
from taskx.liveness.base import Liveness
from taskx.liveness.locks import KernelLocks
from taskx.storage.base import (
    Fields,
    Listed,
    Listener,
    Lookup,
    Reentered,
    Repository,
    Then,
    Timed,
    check_place,
    tell_of_forks,
)
from taskx.storage.sqlite import turnstile
from taskx.storage.sqlite.wakeups import Wakeups

Durability = Literal["accepted", "full"]
T = TypeVar("T")

_TRIES = 5  # of a transaction that others make impossible, such as by a deadlock
_MOST_VALUES = 500
_MOST_TYPES = 50  # in one query
_SHORTEST_LEASE = 0.5
_FORK_PATIENCE = 5.0
_CREATED_AT = TASK_FIELDS.index("created_at")
_ANY_TIME = 2**63 - 1


class DjangoRepository(BesideBlocks):
    """A repository in a database of Django, which any number of processes and hosts may share.

    The tables are those of the app ``taskx.contrib.django``, made by ``manage.py migrate``. It has
    connections of its own for what nodes do, so these neither wait for a thread's transaction nor are part
    of it. What a thread does to tasks inside ``atomic()`` is part of that block.

    Args:
        using: the alias of the database in ``DATABASES``.
        durability: the commits that a power cut, or the death of the database server, may undo. The death
            of your own processes never undoes a commit. On MySQL, the server's settings decide.

            - ``"accepted"``: nothing that a caller was told (submit, cancel, requeue, delete). The outcomes
              of the last second may be undone, and on SQLite the starts; those tasks run again.
            - ``"full"``: nothing.
        lease_timeout: seconds without a heartbeat after which a node is dead and other nodes run its tasks.
            All processes on the database must use the same value. On SQLite, locks show at once if a
            process lives.
        timeout: seconds that a statement, or the wait for a lock, may take before
            ``RepositoryUnavailable`` is raised.
        on_commit: what a submit does inside ``atomic()`` of another database only: ``"wait"``: the task is
            stored after its commit; ``"refuse"``: it raises ``ConfigurationError``.
        run_folder: the folder for the lock files of this host's nodes; the default is a temporary folder.
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    conditions = CONDITIONS - {"params"}
    #: The commits that a power cut may undo.
    durability: Durability = "accepted"

    def __init__(
        self,
        using: str = "default",
        durability: Durability = "accepted",
        *,
        lease_timeout: float | timedelta = 30.0,
        timeout: float | timedelta = 10.0,
        on_commit: OnCommit = "wait",
        run_folder: str | os.PathLike[str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> None:
        super().__init__(clock, codec)
        if not isinstance(using, str) or not using:
            raise ConfigurationError(f"using must be an alias in DATABASES, not {using!r}")
        if durability not in get_args(Durability):
            raise ConfigurationError(
                f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}"
            )
        self.using = using
        self.durability = durability
        self.lease_timeout = check_number(lease_timeout, "lease_timeout", minimum=_SHORTEST_LEASE)
        self.timeout = check_number(timeout, "timeout", minimum=0.01)
        self.on_commit = check_on_commit(on_commit)
        self.run_folder = None if run_folder is None else os.fspath(run_folder)
        self._connections = Connections(using, self.timeout)
        self.vendor = self._connections.vendor
        self._file = self._connections.file
        self._turns = Turns(self._file) if self._file else None
        self._wakeups = Wakeups(self._file) if self._file else None
        self._commits = 0
        # The writes of which nobody knows if they took place, by identity, each as it was sent.
        self._doubtful: dict[int, tuple[Write, Write]] = {}
        self._seen: tuple[object, object] = (None, 0)
        tell_of_forks(self)

    def __repr__(self) -> str:
        return f"DjangoRepository({self.using!r})"

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction."""
        coded = self.codecs.coded(writes)
        durable = any(map(self._is_durable, writes))
        known = self._took_place(writes)
        new = [number for number in range(len(writes)) if number not in known]
        if not new:
            return [True] * len(writes)
        sent = [coded[number] for number in new]
        pairs = {id(writes[n]): (writes[n], coded[n]) for n in new}
        if all_or_nothing:
            told = self._apply_whole(sent, durable, pairs)
        else:
            told = self._apply_singly(sent, durable, pairs)
        results = [True] * len(writes)
        for number, held in zip(new, told, strict=True):
            results[number] = held
        self.tell_others([write for write, held in zip(writes, results, strict=True) if held])
        return results

    def _is_durable(self, write: Write) -> bool:
        """Return True if a write must survive a power cut, or the death of the server.

        Runs live on when a server dies. A start that it forgets would be made again, and two runs would
        have the same fence.
        """
        if self.durability == "full" or write.durable:
            return True
        return self._file is None and not isinstance(write, Delete) and "starts" in write.changes

    def _apply_singly(
        self, writes: Sequence[Write], durable: bool, sent: dict[int, tuple[Write, Write]]
    ) -> Sequence[bool]:
        together = self.vendor == "postgresql"
        single = together and len(writes) == 1 and writing.is_single(writes[0])
        apply = writing.apply_groups if together else writing.apply_each
        try:
            return self._transact(lambda link: apply(link, writes), durable, sent, single=single)
        except IntegrityError:
            return self._transact(lambda link: writing.apply_each(link, writes), durable, sent)

    def _apply_whole(
        self, writes: Sequence[Write], durable: bool, sent: dict[int, tuple[Write, Write]]
    ) -> Sequence[bool]:
        apply = writing.apply_groups if self.vendor == "postgresql" else writing.apply_each

        def work(link: Link) -> Sequence[bool]:
            results = apply(link, writes)
            if not all(results):
                raise _Refused(results)
            return results

        try:
            return self._transact(work, durable, sent)
        except _Refused as refused:
            return refused.results

    def _took_place(self, writes: Sequence[Write]) -> set[int]:
        """Return the places of the writes in doubt that the records show."""
        doubtful = self._doubtful
        again = [n for n, write in enumerate(writes) if id(write) in doubtful] if doubtful else []
        if not again:
            return set()
        stored = {
            row[0]: dict(zip(COLUMNS, row, strict=True))
            for row in self.find("id", list({writes[n].id for n in again}), COLUMNS)
        }
        same = lambda name, value, sent: value == sent  # noqa: E731
        return {
            n for n in again if shows(stored.get(writes[n].id), doubtful[id(writes[n])][1], same)
        }

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        # After a power cut all nodes are dead, so their notes need no sync.
        durable = not all(change.name.startswith(NODES) for change in changes)
        return self._transact(
            lambda link: [writing.put_note(link, change) for change in changes],
            durable,
            single=self.vendor == "postgresql" and len(changes) == 1,
        )

    @property
    def entered(self) -> bool:
        return self._connections.entered

    def _transact(
        self,
        work: Callable[[Link], T],
        durable: bool,
        sent: dict[int, tuple[Write, Write]] | None = None,
        *,
        single: bool = False,
    ) -> T:
        """Do work in one transaction. Nothing is committed if it raises, unless the error is in doubt.

        ``sent`` are the writes that the work applies. ``single`` is True if the work is one statement.
        """
        for last in (False,) * (_TRIES - 1) + (True,):
            try:
                with self._connections.writing() as link:
                    return self._once(link, work, durable, sent or {}, single and not link.pooled)
            except BaseException as error:  # also one of opening the connection
                if last or not may_be_repeated(error):
                    self._raise(error)
                    raise
        raise AssertionError

    def _once(
        self,
        link: Link,
        work: Callable[[Link], T],
        durable: bool,
        sent: dict[int, tuple[Write, Write]],
        single: bool,
    ) -> T:
        committing = False
        try:
            if self._file is not None:
                self._file.check()
            if single:
                self._set_durable(link, durable)
                committing = True
                self._doubtful.update(sent)
                result = work(link)
            else:
                self._begin(link, durable)
                result = work(link)
                committing = True
                self._doubtful.update(sent)
                link.execute("COMMIT")
            self._commits += 1
            self._forget(sent)
            return result
        except BaseException as error:
            if not self._rolled_back(link, error) and committing and self._may_commit_unseen:
                if is_failure(error):
                    raise self._connections.translated(error, in_doubt=True) from error
            elif isinstance(error, Exception):
                self._forget(sent)
            raise
        finally:
            if self._turns is not None:
                self._turns.leave()

    @property
    def _may_commit_unseen(self) -> bool:
        return self.vendor != "sqlite"

    def _forget(self, sent: Iterable[int]) -> None:
        for number in sent:
            self._doubtful.pop(number, None)

    def _raise(self, error: BaseException) -> None:
        """Raise TaskX's error for one of Django. If a unique value is taken, writes are sent one by one."""
        if is_failure(error) and not isinstance(error, IntegrityError):
            raise self._connections.translated(error) from error

    def _begin(self, link: Link, durable: bool) -> None:
        if self._turns is not None:
            self._turns.set_durable(link, durable)
            self._turns.begin(link, self.timeout)
        elif self.vendor == "sqlite":
            link.execute("BEGIN IMMEDIATE")
        elif self.vendor == "postgresql":
            wanted = "" if durable else "; SET LOCAL synchronous_commit = off"
            link.execute(f"BEGIN{wanted}")
        else:
            link.execute("START TRANSACTION")

    def _set_durable(self, link: Link, durable: bool) -> None:
        """Choose if the next statement of PostgreSQL waits until its commit is on the disk."""
        if link.durable is not durable:
            link.durable = None  # unknown if an interrupt comes after the next line
            to = "DEFAULT" if durable else "off"
            link.execute(f"SET synchronous_commit = {to}")
            link.durable = durable

    def _rolled_back(self, link: Link, error: BaseException) -> bool:
        """Undo a transaction. Return True if the database has certainly done so.

        The connection is closed if it cannot be used any more.
        """
        try:
            if isinstance(error, Exception) or self.vendor == "sqlite":
                if self.vendor != "sqlite" or link.django.connection.in_transaction:
                    link.execute("ROLLBACK")
                return True
        except Exception as second:
            if not is_failure(second) and not isinstance(second, AttributeError):
                raise
        self._connections.drop_writer()
        return False

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of committed writes, if the database is an SQLite file."""
        if self._wakeups is not None:
            self._wakeups.send(writes, [True] * len(writes), to_own=len(self.queues) > 1)

    # --- inside a transaction of the caller

    #: It knows the transactions of all threads.
    joins = True

    def own_transaction(self, *, submits: bool = False) -> object | None:
        own = connections[self.using]
        return own if is_open(own) else super().own_transaction(submits=submits)

    def refuse_own_transaction(self) -> None:
        if has_begun(connections[self.using]):
            raise ConfigurationError(
                f"this thread is inside atomic() of {self.using!r}, and what this call does would neither "
                "be committed nor be rolled back with that block; nothing was stored. Leave it before, or "
                "use ctx.transaction() in an executor"
            )

    def refuse_wait(self) -> None:
        if self.vendor == "sqlite" and self._has_begun(connections[self.using]):
            raise ConfigurationError(
                f"this thread is in a transaction on {self.using!r}, and on SQLite nobody else can write "
                "before it ends, so this call would wait for itself: leave atomic(), or commit, before it"
            )

    def _has_begun(self, own: Any) -> bool:
        """Return True if a connection may be in a transaction."""
        if self.vendor == "sqlite":
            return own.connection is not None and bool(own.connection.in_transaction)
        return own.connection is not None

    def uncommitted(self, task_id: str) -> bool:
        own = connections[self.using]
        if own.in_atomic_block or not (is_open(own) and self._has_begun(own)):
            return super().uncommitted(task_id)
        # Without autocommit Django keeps no callbacks, but this thread sees what others do not see yet.
        with self.joined(own, None) as inside:
            seen = inside.statuses([task_id])
        known = self.statuses([task_id])
        return any(
            task_id not in known or (status in FINISHED and known[task_id] not in FINISHED)
            for status in seen.values()
        )

    def joined(self, connection: object, then: Then | None) -> AbstractContextManager[Repository]:
        if is_elsewhere(connection):
            return super().joined(connection, then)
        made: AbstractContextManager[Repository] = _joining().join(
            self, self._connections, connection, then
        )
        return made

    def transaction(self) -> AbstractContextManager[Any]:
        block: AbstractContextManager[Any] = _joining().executor_block(
            self._connections, self._take_lock
        )
        return block

    def _take_lock(self, link: Link) -> None:
        """Make the open transaction of an SQLite file one that writes, when it is this process's turn."""
        if self._turns is None:
            return
        ((before,),) = link.rows("PRAGMA busy_timeout")
        with self._connections.lock:
            try:
                self._turns.begin(
                    link, self.timeout, f"UPDATE {writing.NOTE} SET version = 0 WHERE 0"
                )
            finally:
                self._turns.leave()
                link.rows(f"PRAGMA busy_timeout = {before}")

    # --- reading

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        return self._connections.read(lambda link: link.rows(sql, values))

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        found: Rows = []
        for start in range(0, len(values), _MOST_VALUES):
            some = values[start : start + _MOST_VALUES]
            sql = statements.find(column, len(some), fields, limit is not None)
            found += self._rows(sql, some if limit is None else [*some, limit - len(found)])
        return found

    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        return [value for (value,) in self._rows(statements.DISTINCT[column], (after, limit))]

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        return self.list_after(filter)[0]

    def list_after(self, filter: TaskFilter, after: Any = None) -> tuple[Sequence[Task], Any]:
        self.refuse_unknown_conditions(filter)
        place = () if after is None else check_place(after, int, int)
        query = statements.list_tasks(filter, self.vendor, place, self._rarest(filter))
        rows = self._rows(*query)
        tasks = [task_from_row(row, self.codecs) for *row, _ in rows]
        return tasks, (rows[-1][_CREATED_AT], rows[-1][-1]) if rows else after

    def count(self, filter: TaskFilter) -> int:
        return self._count(filter, None)

    def count_to(self, filter: TaskFilter, most: int) -> int:
        return self._count(filter, most)

    def _count(self, filter: TaskFilter, most: int | None) -> int:
        self.refuse_unknown_conditions(filter)
        query = statements.count_tasks(filter, self.vendor, most, self._rarest(filter))
        ((count,),) = self._rows(*query)
        return int(count)

    def count_by_status(self, filter: TaskFilter, most: int) -> dict[str, int]:
        self.refuse_unknown_conditions(filter)
        query = statements.count_by_status(filter, self.vendor, most, self._rarest(filter))
        return {status: int(count) for status, count in self._rows(*query)}

    def _rarest(self, filter: TaskFilter) -> str:
        """Return the label of the filter that the fewest tasks have; empty if another index is better."""
        labels = filter.labels
        if not labels or filter.id_prefix or filter.parent is not None:
            return ""
        if len(labels) == 1:
            return labels[0]
        [counts] = self._rows(*statements.fewest(labels))
        return labels[counts.index(min(counts))]

    def flows(self, before: str, limit: int) -> Sequence[str]:
        found = self._rows(statements.FLOWS, (FLOW + (before or statements.LAST), limit))
        return [label[len(FLOW) :] for (label,) in found]

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        kinds = list(types)
        if ageing:
            rows = self._ready_by_age(kinds, limit, owner)
            rows.sort(key=lambda row: (_stub(row).rank(ageing), row[-1]))
        else:
            rows = []
            for start in range(0, len(kinds), _MOST_TYPES):
                some = kinds[start : start + _MOST_TYPES]
                values = [value for kind in some for value in (owner, kind, limit)]
                rows += self._rows(statements.ready(len(some)), values)
            if len(kinds) > 1:
                rows.sort(key=lambda row: (-_stub(row).priority, row[-1]))
        return [_stub(row) for row in rows[:limit]]

    def _ready_by_age(self, kinds: Sequence[str], limit: int, owner: str) -> Rows:
        rows: Rows = []
        for kind in kinds:
            for (priority,) in self._rows(statements.PRIORITIES, (owner, kind) * 2):
                rows += self._rows(statements.READY_AT, (owner, kind, priority, limit))
        return rows

    def count_ready(self, type: str, owner: str, at_most: int) -> int:
        ((count,),) = self._rows(statements.COUNT_READY, (owner, type, at_most))
        return int(count)

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        latest = _ANY_TIME if before is None else before
        return [(i, at) for i, at in self._rows(statements.DUE[column], (latest, limit))]

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        rows = self._rows(statements.ENDED.format(status), (*(after or (before, 0)), before, limit))
        return [
            Ended(_stub(row), parents_from_text(parents), lock, scope, (created_at, seq))
            for *row, parents, lock, scope, created_at, seq in rows
        ]

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        return self._rows(statements.NEWEST.format(", ".join(fields), status), (limit,))

    def notes(self, prefix: str) -> dict[str, Note]:
        return _notes(self._rows(statements.NOTES, (prefix, prefix + statements.LAST)))

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        found: dict[str, Note] = {}
        for start in range(0, len(names), _MOST_VALUES):
            some = names[start : start + _MOST_VALUES]
            found.update(_notes(self._rows(statements.notes_named(len(some)), some)))
        return found

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        values = (after, prefix + statements.LAST, limit)
        return _notes(self._rows(statements.NOTES_AFTER, values))

    # --- changes by others

    def version(self) -> object:
        """Return a value that changes when others commit.

        PostgreSQL tells which transactions are in progress, and SQLite counts commits. For another
        database, the value changes twice a second.
        """
        seen, own = self._seen_commits()
        return (seen, own if len(self.queues) > 1 else 0) if self.vendor == "sqlite" else seen

    def revision(self) -> object | None:
        return self._seen_commits() if self.vendor in ("postgresql", "sqlite") else None

    def _seen_commits(self) -> tuple[object, object]:
        if self.vendor == "postgresql":
            # Each transaction that writes is in this list as long as others do not see what it wrote.
            ((snapshot,),) = self._rows("SELECT txid_current_snapshot()::text")
            return snapshot, 0
        if self.vendor != "sqlite":
            return int(time.monotonic() * 2), 0
        if (seen := self._connections.try_writing(0.005, _data_version)) is not None:
            self._seen = seen, self._commits
        return self._seen[0], self._commits

    def listen(self, news: str) -> Listener | None:
        return None if self._wakeups is None else self._wakeups.listen(news)

    # --- opening and closing

    @property
    def one_host(self) -> bool:
        """True if the database is an SQLite file."""
        return self._file is not None

    def _make_liveness(self) -> Liveness[Any]:
        """Choose locks for an SQLite file, which is on this host, and leases for every other database."""
        file = self._file
        if file is None:
            return super()._make_liveness()
        return KernelLocks(self, lambda: (file.folder, file.inode), turnstile.NAMES)

    def prepare(self) -> None:
        """Raise an error if the tables are missing."""
        self._rows(f"SELECT {', '.join(COLUMNS)}, seq FROM {writing.TASK} WHERE seq = 0")
        for table in (writing.PARENT, writing.TAG, writing.NOTE):
            self._rows(f"SELECT 1 FROM {table} WHERE 1 = 0")

    def ensure_there(self) -> None:
        """Raise an error if the SQLite file was moved, deleted or replaced since it was opened."""
        if self._file is not None:
            self._file.check()

    def examine(self) -> Iterator[Check]:
        from taskx.contrib.django.examination import examine  # not needed to run tasks

        return examine(self, self._connections)

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes that an SQLite file and its log take, by path. The site's data is in it, too."""
        return {} if self._file is None else self._file.sizes()

    def within(self, seconds: float) -> AbstractContextManager[object]:
        return self._connections.within(seconds)

    def close(self) -> None:
        if self.entered:
            raise Reentered
        self._connections.close()
        if self._turns is not None:
            self._turns.close()
        if self._file is not None and not self.liveness.at_work:
            self._file.forget()

    def before_fork(self) -> None:
        # A child must not inherit an open SQLite file: see "How to corrupt an SQLite database file".
        lock = self._connections.lock
        self._forking = not self.entered and lock.acquire(timeout=_FORK_PATIENCE)
        if self.vendor == "sqlite":
            if self._forking:
                self._connections.drop_writer()
            self._connections.close_idle()

    def after_fork(self) -> None:
        if self._forking:
            self._connections.lock.release()

    def renew_after_fork(self) -> None:
        self._connections.renew_after_fork()
        if self._turns is not None:
            self._turns.renew_after_fork()
        if self._wakeups is not None:
            self._wakeups.renew_after_fork()


class _Refused(Exception):
    def __init__(self, results: Sequence[bool]) -> None:
        super().__init__(results)
        self.results = results


def _joining() -> Any:
    """Return the module that derives classes from the repository."""
    return import_module("taskx.contrib.django.joining")


def _data_version(link: Link) -> object:
    ((others,),) = link.rows("PRAGMA data_version")
    return link.number, others


def _notes(rows: Iterable[Sequence[Any]]) -> dict[str, Note]:
    return {name: Note(text, int(version)) for name, text, version in rows}


def _stub(row: Sequence[Any]) -> Stub:
    return stub_from_values(row[: len(STUB)])
