"""The examination of a PostgreSQL server: its answer, its tables and its settings. It changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from taskx.stores.sql import Link, pool
from taskx.stores.sql.postgres import OLDEST
from taskx.tasks.errors import RepositoryError
from taskx.tasks.findings import Check, fail, ok, warn

if TYPE_CHECKING:
    from taskx.stores.postgres.link import Connections
    from taskx.stores.postgres.schema import Schema
    from taskx.tasks.timing import Timing

L = TypeVar("L", bound=pool.PooledLink)

_DEAD = "SELECT n_dead_tup, n_live_tup FROM pg_stat_user_tables WHERE relname = ?"
_SETTINGS = (
    "SELECT current_setting('server_version'), current_setting('fsync'), "
    "current_setting('synchronous_commit'), current_setting('full_page_writes'), "
    "(SELECT reset_val FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'), "
    "pg_is_in_recovery()"
)
# The dead rows that make the search for the next task slow, and the seconds of a long transaction.
_MANY_DEAD, _LONG = 50_000, 600.0


def examine(connections: Connections, schema: Schema, timing: Timing) -> Iterator[Check]:
    """Yield what is right and wrong with a database."""

    def more(link: Link) -> Iterator[Check]:
        yield from _tables(link, schema)
        yield from settings(link, schema.statements.dialect.tasks)

    advice = "Check the URL, the network and the server."
    return examined(connections, timing, "server", "PostgreSQL server", more, advice)


def examined(
    connections: pool.Connections[L],
    timing: Timing,
    name: str,
    server: str,
    more: Callable[[L], Iterable[Check]],
    advice: str,
) -> Iterator[Check]:
    """Yield how soon a server answers, and what ``more`` yields; if it fails, the ``advice``."""
    began = time.monotonic()
    try:
        with connections.within(timing.answer_within):
            connections.read(lambda link: link.rows("SELECT 1"))
        took = (time.monotonic() - began) * 1000
        yield ok(name, f"The {server} has answered in {took:.0f} ms.", ms=took)
        yield from connections.read(lambda link: [*more(link)])
    except RepositoryError as error:
        yield fail(name, f"The database cannot be used: {str(error).rstrip('.')}.", advice)


def _tables(link: Link, schema: Schema) -> Iterator[Check]:
    if schema.version(link) is None:
        yield ok("tables", "The database has the tables of a Django project, which migrates them.")
    else:
        yield ok("tables", "The database has TaskX's tables.")


def settings(link: Link, table: str) -> Iterator[Check]:
    """Yield what is right and wrong with a server for a table of tasks, whichever driver leads to it."""
    ((version, fsync, commit, pages, idle, replica),) = link.rows(_SETTINGS)
    yield ok("version", f"The server is PostgreSQL {version}.", version=version)
    if replica:
        yield warn("primary", "The server is a replica, which takes no writes.", "Use the primary.")
    yield _durability(fsync, commit, pages)
    if int(idle) == 0:
        yield warn(
            "idle transactions",
            "idle_in_transaction_session_timeout is 0, so a program that leaves a transaction open keeps "
            "the rows of finished tasks from being cleaned up, without an end.",
            "Set it on the server, for example to 10min.",
        )
    else:
        yield ok("idle transactions", "The server ends transactions that are idle for long.")
    yield _oldest(link)
    for dead, live in link.rows(_DEAD, (table,)):
        if dead > max(_MANY_DEAD, live):
            yield warn(
                "dead rows",
                f"The table of tasks has {dead:,} dead rows, which make it slow to find a task.",
                "Look for a transaction that stays open (pg_stat_activity.xact_start), and for "
                "autovacuum.",
                dead=dead,
            )
        else:
            yield ok("dead rows", f"The table of tasks has {dead:,} dead rows.", dead=dead)


def _durability(fsync: str, commit: str, pages: str) -> Check:
    wrong = [
        f"{name} is off"
        for name, value in (("fsync", fsync), ("full_page_writes", pages))
        if value == "off"
    ]
    if commit == "off":
        wrong.append("synchronous_commit is off")
    if not wrong:
        return ok("durability", "A commit is on the disk when a caller is told of it.")
    return warn(
        "durability",
        f"{' and '.join(wrong)}, so a power cut may undo tasks that a caller was told are stored.",
        "Switch it on for this server, or for the role of TaskX.",
    )


def _oldest(link: Link) -> Check:
    """Return what is known of the oldest transaction, which keeps dead rows from being removed."""
    ((seconds,),) = link.rows(OLDEST)
    if seconds > _LONG:
        return warn(
            "oldest transaction",
            f"A transaction has been open for {seconds:,.0f} s. Until it ends, no row that was removed or "
            "changed since then is cleaned up, and it gets slower to find a task.",
            "Find it in pg_stat_activity (xact_start), and end it with pg_terminate_backend.",
            seconds=seconds,
        )
    return ok("oldest transaction", "No transaction has been open for long.", seconds=seconds)
