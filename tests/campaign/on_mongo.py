"""The MongoDB side of a process of the campaign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pymongo

from taskx import CancelReason, MongoRepository, RepositoryUnavailable
from taskx.liveness.leases import Leases
from taskx.running.pool import WorkerPool
from taskx.storage.base import Repository
from taskx.storage.mongo.batches import Batches
from taskx.storage.mongo.sender import Sender

from . import hooks
from .hooks import after, before, wrap
from .sidelog import SideLog
from .stores import Store

if TYPE_CHECKING:
    from .worker import Options

#: Seconds that an operation may take.
TIMEOUT = 2.0

KILL_POINTS: hooks.Points = {
    **hooks.COMMON_POINTS,
    "inside a commit": lambda strike: after(Sender, "_bulk_write", strike),
    "after a commit": lambda strike: after(MongoRepository, "apply", strike),
    "before a batch is committed": lambda strike: before(Batches, "_commit", strike),
    "before a batch is shown": lambda strike: before(Batches, "_reveal", strike),
    "before leaving": lambda strike: before(Leases, "leave", strike),
}


def _beats_not_looked_at() -> None:
    wrap(Leases, "_lives_yet", lambda inner, self, name, notes, asked: False)


def _lost_lease_ignored() -> None:
    wrap(Leases, "lost", lambda inner, self, node: False)


def _marks_not_looked_at() -> None:
    wrap(Sender, "_look_for_marks", lambda inner, self, ops: None)


def _batches_in_pieces() -> None:
    def insert(inner: Any, self: Batches, writes: Any, store: Any) -> list[bool]:
        return [store([write], "")[0] for write in writes]

    wrap(Batches, "insert", insert)


class OnMongo(Store):
    """A collection, through a connection of the process's own."""

    repository = MongoRepository
    points = KILL_POINTS
    outages = (RepositoryUnavailable,)
    pile = 20
    broken: hooks.Parts = {  # noqa: RUF012  (constant)
        "beats not looked at": _beats_not_looked_at,
        "lost lease ignored": _lost_lease_ignored,
        "marks not looked at": _marks_not_looked_at,
        "batches in pieces": _batches_in_pieces,
    }

    def open(self, options: Options) -> Repository:
        client: Any = pymongo.MongoClient(options.database, heartbeatFrequencyMS=500)
        return MongoRepository(
            client.get_default_database(),
            run_folder=options.host,
            lease_timeout=options.lease,
            timeout=TIMEOUT,
        )

    def prepare(self, log: SideLog) -> None:
        def fire(inner: Any, self: WorkerPool, reason: CancelReason) -> None:
            if reason is CancelReason.LEASE_LOST:
                log.tell("lease lost")
            inner(self, reason)

        wrap(WorkerPool, "fire_all", fire)
