"""The PostgreSQL part of a worker process of the campaign."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskx import PostgresRepository, RepositoryUnavailable
from taskx.stores.base import Repository
from taskx.stores.liveness.leases import Leases
from taskx.stores.sql.groups import GroupWriter
from taskx.tasks.timing import Timing

from . import hooks
from .hooks import after, before
from .sidelog import SideLog
from .stores import Store

if TYPE_CHECKING:
    from .worker import Options

#: The time-out of a statement, in seconds.
TIMEOUT = 2.0

KILL_POINTS: hooks.Points = {
    **hooks.COMMON_POINTS,
    "inside a commit": lambda strike: after(GroupWriter, "together", strike),
    "after a commit": lambda strike: after(PostgresRepository, "apply", strike),
    "before leaving": lambda strike: before(Leases, "leave", strike),
}


class OnPostgres(Store):
    """Tables in a PostgreSQL database; each process has its own connections.

    The server may be killed, so all commits wait for the disk: otherwise outcomes could be undone.
    """

    repository = PostgresRepository
    points = KILL_POINTS
    outages = (RepositoryUnavailable,)
    broken = hooks.BROKEN_LEASES

    def open(self, options: Options) -> Repository:
        url, deaf, _ = options.database.partition("?listen=false")
        return PostgresRepository(
            url,
            "full",
            listen=not deaf,
            run_folder=options.host,
            lease_timeout=options.lease,
            timeout=TIMEOUT,
            timing=Timing(lease_margin=options.margin),
        )

    def prepare(self, log: SideLog) -> None:
        hooks.tell_lost_leases(log)
