"""The repository on one SQLite file."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from typing import get_args

from taskx.stores.liveness.locks import KernelLocks
from taskx.stores.parts import at_forks
from taskx.stores.sql import SQLRepository
from taskx.stores.sqlite import schema, turnstile
from taskx.stores.sqlite.dialect import statements
from taskx.stores.sqlite.file import DatabaseFile
from taskx.stores.sqlite.joining import FileTransactions
from taskx.stores.sqlite.links import Durability, FileLinks
from taskx.stores.sqlite.writing import OwnWriter
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.codec import Codec
from taskx.tasks.errors import (
    ConfigurationError,
)
from taskx.tasks.timing import DEFAULT_TIMING, Timing


class SQLiteRepository(SQLRepository):
    """A repository in one SQLite file, which any number of processes on this host may share.

    The file is opened at the first operation, and created if it is missing. It is in WAL mode, so readers
    never wait for writers. It must be on a local file system. While it is open, it is identified by its
    real path and its inode. If it is moved, deleted or replaced, every operation raises
    ``RepositoryUnavailable``.

    Args:
        path: the path of the file. A relative path is made absolute at once.
        durability: the commits that a power cut may undo. The death of the process never undoes a commit.

            - ``"accepted"``: a power cut undoes nothing that a caller was told (submit, cancel, requeue,
              delete). It may undo the last outcomes; those tasks run again.
            - ``"full"``: a power cut undoes nothing.
            - ``"process"``: a power cut may undo the last commits.
        prefix: what the names of the tables begin with, such as ``"taskx_"``, to have them in the
            application's own file. That must exist and be in WAL mode. TaskX changes nothing else in it.
            Empty: the file is TaskX's own.
        busy_timeout: seconds to wait for another process's write before an error is raised.
        create: True to create a missing file; with a prefix, missing tables. With False, operations raise
            ``RepositoryUnavailable`` if something is missing, and nothing is created.
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.
        connect: a function that opens the ``sqlite3.Connection`` of each ``ctx.transaction()``, with
            settings such as ``PRAGMA foreign_keys``. It is closed after the transaction.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        durability: Durability = "accepted",
        *,
        prefix: str = "",
        busy_timeout: Duration = 10.0,
        create: bool = True,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
        connect: Callable[[], sqlite3.Connection] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not isinstance(self.path, str) or self.path in ("", ":memory:") or "\0" in self.path:
            raise ConfigurationError(
                f"path must be the path of a file, not {path!r}; "
                "use MemoryRepository to keep tasks in memory"
            )
        if durability not in get_args(Durability):
            raise ConfigurationError(
                f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}"
            )
        self.durability = durability
        seconds = check_number(busy_timeout, "busy_timeout")
        if not isinstance(create, bool):
            raise ConfigurationError(f"create must be True or False, not {create!r}")
        if connect is not None and not (callable(connect) and prefix):
            raise ConfigurationError(
                f"connect must be a function, and requires a prefix, not {connect!r:.80}"
            )
        self.connect = connect
        self.prefix = prefix
        self.schema = schema.of(prefix)
        file = DatabaseFile(self.path, create, prefix)
        several = lambda: len(self.queues) > 1  # noqa: E731
        links = FileLinks(file, self.schema, durability, seconds, several, timing)
        super().__init__(statements(prefix), links, clock, codec, timing, writer=OwnWriter)
        self.file, self._file_links = file, links
        #: The transactions as this class uses them, also if others put something in their place.
        self.transactions = self.callers = at_forks(FileTransactions(self, links, connect))
        self.news = self.house = self.forks = at_forks(links)

    def __repr__(self) -> str:
        prefix = f", prefix={self.prefix!r}" if self.prefix else ""
        return f"SQLiteRepository({self.path!r}, durability={self.durability!r}{prefix})"

    @property
    def busy_timeout(self) -> float:
        """Seconds to wait for another process's write before an error is raised."""
        return self._file_links.connections.busy_timeout

    def version(self) -> object:
        """Return counters of commits: those of others, and our own if several queues share this object.

        SQLite counts in memory, for each connection, the commits of other connections. A new connection
        starts a new count, so its number is part of the value.
        """
        seen, own = self._file_links.revision()
        return (*seen, own if len(self.queues) > 1 else 0)

    def _make_liveness(self) -> KernelLocks:
        place = lambda: (self.file.folder, self.file.inode)  # noqa: E731
        return KernelLocks(self, place, turnstile.NAMES, self.timing.orphan_within)

    def close(self) -> None:
        """Close the file. A later operation opens it again.

        It then opens the file that is at the path at that time. But if a node on this repository is still
        at work, it accepts only the same file.
        """
        self._file_links.close(forget=not self.liveness.at_work)
