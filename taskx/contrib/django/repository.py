"""The repository in a Django database."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from django.db import connections

from taskx.contrib.django import joining
from taskx.contrib.django.blocks import (
    BesideBlocks,
    OnCommit,
    after_commit,
    check_on_commit,
    has_begun,
    is_elsewhere,
    is_open,
)
from taskx.contrib.django.connections import Connections, statements_of
from taskx.contrib.django.link import Link
from taskx.contrib.django.sqlite import Turns
from taskx.stores import queries
from taskx.stores.base import Reentered, Repository
from taskx.stores.liveness.base import Liveness
from taskx.stores.liveness.locks import KernelLocks
from taskx.stores.parts import Listener, at_forks
from taskx.stores.sql import postgres
from taskx.stores.sql.pool import Durability, PooledRepository, PoolLinks
from taskx.stores.sqlite import turnstile
from taskx.stores.sqlite.examination import full_disk
from taskx.stores.sqlite.wakeups import Wakeups
from taskx.stores.transactions import Then, Transactions
from taskx.tasks.checks import Duration
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.codec import Codec
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Check, Problem
from taskx.tasks.record import COLUMNS
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Write


class DjangoRepository(PooledRepository):
    """A repository in a database of Django, which any number of processes and hosts may share.

    The tables are those of the app ``taskx.contrib.django``, made by ``manage.py migrate``. It has
    connections of its own for what nodes do, so these neither wait for a thread's transaction nor are part
    of it. What a thread does to tasks inside ``atomic()`` is part of that block.

    Args:
        using: the alias of the database in ``DATABASES``.
        durability: the commits that a power cut, or the death of the database server, may undo. The death
            of your own processes never undoes a commit. On MariaDB and MySQL, the server's settings decide.

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

    def __init__(
        self,
        using: str = "default",
        durability: Durability = "accepted",
        *,
        lease_timeout: Duration = 30.0,
        timeout: Duration = 10.0,
        on_commit: OnCommit = "wait",
        run_folder: str | os.PathLike[str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        if not isinstance(using, str) or not using:
            raise ConfigurationError(f"using must be an alias in DATABASES, not {using!r}")
        self.using = using
        self.on_commit = check_on_commit(on_commit)
        connections = self._connections = Connections(using, timeout, timing)
        several = lambda: len(self.queues) > 1  # noqa: E731
        pool = self._django_pool = DjangoLinks(connections, several, timing)
        statements = statements_of(connections.vendor)
        leases = lease_timeout, run_folder
        super().__init__(statements, pool, durability, *leases, clock, codec, timing)
        self.vendor, self._file = connections.vendor, connections.file
        self.transactions = BlockTransactions(self, pool, on_commit)
        self.news = self.house = self.forks = at_forks(pool)

    def __repr__(self) -> str:
        return f"DjangoRepository({self.using!r})"

    # --- changes by others

    def version(self) -> object:
        """Return a value that changes when others commit.

        PostgreSQL tells which transactions are in progress, and SQLite counts commits. For another
        database, the value changes twice a second.
        """
        seen, own = self._django_pool.seen_commits()
        return (seen, own if len(self.queues) > 1 else 0) if self.vendor == "sqlite" else seen

    # --- opening and closing

    def _make_liveness(self) -> Liveness[Any]:
        """Choose locks for an SQLite file, which is on this host, and leases for every other database."""
        file = self._file
        if file is None:
            return super()._make_liveness()
        return KernelLocks(
            self, lambda: (file.folder, file.inode), turnstile.NAMES, self.timing.orphan_within
        )

    def close(self) -> None:
        if self.entered:
            raise Reentered
        self._pool.close()
        if self._file is not None and not self.liveness.at_work:
            self._file.forget()


class DjangoLinks(PoolLinks[Link]):
    """The repository's own connections to its database.

    Args:
        connections: the connections.
        several: tells if several queues of this process must hear of each other's commits.
        timing: the intervals of its work.
    """

    connections: Connections

    def __init__(
        self, connections: Connections, several: Callable[[], bool], timing: Timing
    ) -> None:
        super().__init__(connections, timing)
        self.vendor = connections.vendor
        self._file = file = connections.file
        self.turns = Turns(file, timing) if file else None
        self.wakeups = Wakeups(file, timing) if file else None
        self._several = several
        self.one_host = file is not None
        self.may_commit_unseen = self.vendor != "sqlite"
        self._seen: tuple[object, object] = (None, 0)

    def _begin(self, link: Link, durable: bool) -> None:
        if self.turns is not None:
            self.turns.set_durable(link, durable)
            self.turns.begin(
                link, self.connections.timeout, lambda: link.execute("BEGIN IMMEDIATE")
            )
        elif self.vendor == "sqlite":
            link.execute("BEGIN IMMEDIATE")
        elif self.vendor == "postgresql":
            postgres.begin(link, durable, self.connections.timeout)
        else:
            link.execute("START TRANSACTION")

    def _commits_itself(self, link: Link) -> bool:
        return self.vendor == "postgresql" and not link.pooled

    def _set_durable(self, link: Link, durable: bool) -> None:
        postgres.set_durable(link, durable)

    def _is_undone(self, link: Link, error: BaseException) -> bool:
        if self.vendor != "sqlite":
            return super()._is_undone(link, error)
        if link.django.connection.in_transaction:
            link.execute("ROLLBACK")
        return True

    def _ended(self) -> None:
        if self.turns is not None:
            self.turns.leave()

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of committed writes, if the database is an SQLite file."""
        if self.wakeups is not None:
            self.wakeups.send(writes, self._several)

    def enter_block(self, link: Link, enter: Callable[[], object]) -> None:
        """Enter a block of an executor. In an SQLite file it then holds the write lock.

        That lock comes last, also if ``BEGIN`` itself takes it: while it is held, this thread waits for no
        other lock.
        """
        if self.turns is None:
            enter()
            return
        # Takes the write lock of the file in a transaction that has begun without it.
        notes = statements_of(self.vendor).dialect.notes
        first = f"UPDATE {notes} SET version = 0 WHERE 0"
        ((before,),) = link.rows("PRAGMA busy_timeout")
        with self.connections.lock:
            try:
                self.turns.begin(link, self.connections.timeout, enter, lambda: link.execute(first))
            finally:
                self.turns.leave()
                link.rows(f"PRAGMA busy_timeout = {before}")

    # --- reading

    def seen_commits(self) -> tuple[object, object]:
        """Return what was seen of others' commits, and of our own."""
        if self.vendor == "postgresql":
            ((snapshot,),) = self.rows(postgres.SNAPSHOT)
            return snapshot, 0
        if self.vendor != "sqlite":
            return int(time.monotonic() * 2), 0
        if (seen := self.connections.try_writing(0.005, _data_version)) is not None:
            self._seen = seen, self.commits
        return self._seen[0], self.commits

    def revision(self) -> object | None:
        return self.seen_commits() if self.vendor in ("postgresql", "sqlite") else None

    def listen(self, news: str) -> Listener | None:
        return None if self.wakeups is None else self.wakeups.listen(news)

    # --- opening and closing

    def prepare(self) -> None:
        """Raise an error if the tables are missing."""
        tables = statements_of(self.vendor).dialect
        first = f"SELECT {', '.join(COLUMNS)}, seq FROM {tables.tasks} WHERE seq = 0"
        others = (tables.parents, tables.tags, tables.notes)
        for sql in (first, *(f"SELECT 1 FROM {table} WHERE 1 = 0" for table in others)):
            self.rows(sql)

    def examine(self) -> Iterator[Check]:
        from taskx.contrib.django.examination import examine  # not needed to run tasks

        return examine(self, self.connections, self.timing)

    def problems(self) -> Iterator[Problem]:
        return iter(()) if self._file is None else full_disk(self._file.path)

    def held_back(self) -> float:
        return float(self.rows(postgres.OLDEST)[0][0]) if self.vendor == "postgresql" else 0.0

    def ensure_there(self) -> None:
        """Raise an error if the SQLite file was moved, deleted or replaced since it was opened."""
        if self._file is not None:
            self._file.check()

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes that an SQLite file and its log take, by path. The site's data is in it, too."""
        return {} if self._file is None else self._file.sizes()

    def close(self) -> None:
        super().close()
        if self.turns is not None:
            self.turns.close()

    def before_fork(self) -> None:
        # A child must not inherit an open SQLite file: see "How to corrupt an SQLite database file".
        super().before_fork()
        if self.vendor == "sqlite":
            if self._forking:
                self.connections.drop_writer()
            self.connections.close_idle()

    def renew_after_fork(self) -> None:
        super().renew_after_fork()
        if self.turns is not None:
            self.turns.renew_after_fork()
        if self.wakeups is not None:
            self.wakeups.renew_after_fork()


def _data_version(link: Link) -> object:
    ((others,),) = link.rows("PRAGMA data_version")
    return link.number, others


class BlockTransactions(BesideBlocks):
    """The transactions of callers and executors on Django's connections to the tasks' own database."""

    def __init__(self, outer: DjangoRepository, pool: DjangoLinks, on_commit: OnCommit) -> None:
        super().__init__(
            outer, Transactions("DjangoRepository", outer.timing), on_commit, outer.using
        )
        self._outer = outer
        self._pool = pool
        self._links = pool.connections

    @contextmanager
    def join(self, connection: object, then: Then | None) -> Iterator[Repository]:
        if is_elsewhere(connection):
            with super().join(connection, then) as waiting:
                yield waiting
            return
        own = joining.own_connection(self._links.alias, connection)
        block = joining.BlockLinks(self._links, Link(own))
        with block.begun(), block.savepoint():
            yield self._outer.over(block)
        if block.wrote and then is not None and own.in_atomic_block:
            applied = block.applied

            def follow() -> None:
                self._pool.tell_others(applied)
                then(applied)

            after_commit(own, self._outer, applied, follow)

    def begin(self) -> AbstractContextManager[Any]:
        return joining.executor_block(self._links, self._pool.enter_block)

    def current(self, *, submits: bool = False) -> object | None:
        own = connections[self._outer.using]
        return own if is_open(own) else super().current(submits=submits)

    def tell_others(self, writes: Sequence[Write]) -> None:
        self._pool.tell_others(writes)

    def refuse_write(self) -> None:
        if has_begun(connections[self._outer.using]):
            raise ConfigurationError(
                f"this thread is inside atomic() of {self._outer.using!r}, and this call cannot be part of "
                "that block; nothing was stored. Call it before or after the block, or use "
                "ctx.transaction() in an executor instead of the block"
            )

    def refuse_wait(self) -> None:
        using = self._outer.using
        if self._outer.vendor == "sqlite" and self._has_begun(connections[using]):
            raise ConfigurationError(
                f"this thread is in a transaction on {using!r}, and on SQLite nobody else can write "
                "before it ends, so this call would wait for itself: leave atomic(), or commit, before it"
            )

    def _has_begun(self, own: Any) -> bool:
        """Return True if a connection may be in a transaction."""
        if self._outer.vendor == "sqlite":
            return own.connection is not None and bool(own.connection.in_transaction)
        return own.connection is not None

    def changed(self, task_id: str) -> bool:
        own = connections[self._outer.using]
        if own.in_atomic_block or not (is_open(own) and self._has_begun(own)):
            return super().changed(task_id)
        # Without autocommit Django keeps no callbacks, but this thread sees what others do not see yet.
        with self.join(own, None) as inside:
            return queries.is_uncommitted(inside, self._outer, task_id)

    def postpone(self, task_id: str, key: int, call: Callable[[], object]) -> bool:
        # Without autocommit there is nothing that calls after the commit.
        return super().postpone(task_id, key, call) or self.changed(task_id)
