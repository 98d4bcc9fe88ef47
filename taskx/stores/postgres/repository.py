"""The repository in a PostgreSQL database."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskx.stores.liveness.base import PREFIX as NODES
from taskx.stores.options import seconds_of, split, truth_of
from taskx.stores.parts import at_forks
from taskx.stores.postgres.joining import DriverTransactions
from taskx.stores.postgres.links import PostgresLinks
from taskx.stores.postgres.news import NOTED
from taskx.stores.postgres.schema import Schema
from taskx.stores.sql.pool import Durability, PooledRepository
from taskx.tasks.checks import Duration
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.codec import Codec
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import NoteChange


class PostgresRepository(PooledRepository):
    """A repository in a PostgreSQL database, which any number of processes and hosts may share.

    The first connection makes the tables. If a Django project has made them, Django also migrates them;
    such a project and this repository share the tasks.

    Args:
        url: a URL, such as ``postgresql://user@host/database``, or a connection string of libpq.
        durability: the commits that a power cut, or the death of the server, may undo. The death of your
            own processes never undoes a commit.

            - ``"accepted"``: nothing that a caller was told (submit, cancel, requeue, delete). The outcomes
              of the last second may be undone; those tasks run again.
            - ``"full"``: nothing.
        prefix: what the names of the tables begin with. Each prefix is a store of its own.
        listen: False if a pooler gives each transaction another connection, as PgBouncer does in its mode
            "transaction": then nodes poll for the tasks of others, and no statement is prepared.
        lease_timeout: seconds without a heartbeat after which a node is dead and other nodes run its
            tasks. All processes on the tables must use the same value.
        timeout: seconds that a statement may take before ``RepositoryUnavailable`` is raised.
        run_folder: the folder for the lock files of this host's nodes; the default is a temporary folder.
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.

    Raises:
        ConfigurationError: an argument is not valid, or psycopg is not installed.
    """

    def __init__(
        self,
        url: str,
        durability: Durability = "accepted",
        *,
        prefix: str = "taskx_",
        listen: bool = True,
        lease_timeout: Duration = 30.0,
        timeout: Duration = 10.0,
        run_folder: str | os.PathLike[str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        if not isinstance(url, str) or not url:
            raise ConfigurationError(
                f"url must be a str, such as 'postgresql://user@host/database', not {type(url).__name__}"
            )
        if not isinstance(listen, bool):
            raise ConfigurationError(f"listen must be True or False, not {listen!r}")
        self.prefix = prefix
        schema = Schema(prefix)
        several = lambda: len(self.queues) > 1  # noqa: E731
        links = self._server = PostgresLinks(url, schema, timeout, listen, several, timing)
        leases = lease_timeout, run_folder
        super().__init__(schema.statements, links, durability, *leases, clock, codec, timing)
        self.transactions = DriverTransactions(self, links)
        self.news = self.house = self.forks = at_forks(links)

    @classmethod
    def from_url(
        cls,
        url: str,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> PostgresRepository:
        """Return the repository for a ``postgresql://`` URL.

        The query may have the options of libpq, and ``durability``, ``prefix``, ``listen=false``,
        ``lease_timeout`` and ``timeout``.

        Raises:
            ConfigurationError: the URL names no database, or an option is not valid.
        """
        rest, options = split(url, _OPTIONS)
        return cls(rest, clock=clock, codec=codec, **options)

    def __repr__(self) -> str:
        return f"PostgresRepository({self._server.connections.name!r}, prefix={self.prefix!r})"

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        results = super().put_notes(changes)
        if any(results) and not all(change.name.startswith(NODES) for change in changes):
            self._server.tell(NOTED)
        return results

    def version(self) -> object:
        """Return a value that changes when others commit.

        It is read from the server, and once a second while news of others are heard.
        """
        return self._server.seen_commits()

    def close(self) -> None:
        self.transactions.close()  # its thread would open the connections again
        self._server.close()


_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "durability": str,
    "prefix": str,
    "listen": truth_of,
    "lease_timeout": seconds_of,
    "timeout": seconds_of,
}
