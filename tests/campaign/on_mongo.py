"""The MongoDB part of a worker process of the campaign."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pymongo
from pymongo.client_session import ClientSession

from taskx import MongoRepository, RepositoryUnavailable
from taskx.stores.base import Repository
from taskx.stores.liveness.leases import Leases
from taskx.stores.mongo import sender
from taskx.stores.mongo.batches import Batches
from taskx.stores.mongo.connection import Connection
from taskx.stores.mongo.sender import Sender
from taskx.tasks.timing import Timing

from . import hooks
from .hooks import Strike, after, before, wrap
from .sidelog import SideLog
from .stores import Store

if TYPE_CHECKING:
    from .worker import Options

#: The time-out of an operation, in seconds.
TIMEOUT = 2.0


def _without_transactions(point: Callable[[Strike], None]) -> Callable[[Strike], None]:
    """Return a point of a process that hides batches, as if its server did not support transactions."""

    def at(strike: Strike) -> None:
        _hide_batches()
        point(strike)

    return at


def _hide_batches() -> None:
    Connection.transacts = property(lambda self: False)  # type: ignore[assignment,method-assign]


KILL_POINTS: hooks.Points = {
    **hooks.COMMON_POINTS,
    "inside a commit": lambda strike: after(Sender, "_bulk_write", strike),
    "after a commit": lambda strike: after(MongoRepository, "apply", strike),
    "before a transaction": lambda strike: before(Sender, "_transact", strike),
    "inside a transaction": lambda strike: before(ClientSession, "commit_transaction", strike),
    "after a transaction": lambda strike: after(ClientSession, "commit_transaction", strike),
    "inside a batch": _without_transactions(lambda strike: after(Sender, "_bulk_write", strike)),
    "before a batch is committed": _without_transactions(
        lambda strike: before(Batches, "_commit", strike)
    ),
    "before a batch is shown": _without_transactions(
        lambda strike: before(Batches, "_reveal", strike)
    ),
    "before leaving": lambda strike: before(Leases, "leave", strike),
}


def _marks_ignored() -> None:
    wrap(Sender, "_confirm_by_marks", lambda inner, self, ops: None)


def _transactions_in_pieces() -> None:
    def transact(inner: Any, self: Sender, documents: Any, sent: Any) -> None:
        for document in documents:
            inner(self, [document], sent)

    wrap(Sender, "_transact", transact)


def _commit_left_out() -> None:
    wrap(ClientSession, "commit_transaction", lambda inner, self: None)


def _lost_commit_treated_as_rolled_back() -> None:
    wrap(sender, "_was_rolled_back", lambda inner, error: True)


def _batches_in_pieces() -> None:
    _hide_batches()

    def insert(inner: Any, self: Batches, writes: Any, store: Any) -> list[bool]:
        return [store([write], "")[0] for write in writes]

    wrap(Batches, "insert", insert)


class OnMongo(Store):
    """A MongoDB collection; each process has its own connection."""

    repository = MongoRepository
    points = KILL_POINTS
    outages = (RepositoryUnavailable,)
    pile = 20
    broken: hooks.Parts = {  # noqa: RUF012  (constant)
        **hooks.BROKEN_LEASES,
        "marks ignored": _marks_ignored,
        "transactions in pieces": _transactions_in_pieces,
        "commit left out": _commit_left_out,
        "lost commit treated as rolled back": _lost_commit_treated_as_rolled_back,
        "batches in pieces": _batches_in_pieces,
    }

    def open(self, options: Options) -> Repository:
        client: Any = pymongo.MongoClient(options.database, heartbeatFrequencyMS=500)
        return MongoRepository(
            client.get_default_database(),
            run_folder=options.host,
            lease_timeout=options.lease,
            timeout=TIMEOUT,
            timing=Timing(lease_margin=options.margin),
        )

    def prepare(self, log: SideLog) -> None:
        hooks.tell_lost_leases(log)
