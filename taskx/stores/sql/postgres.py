"""What PostgreSQL needs, whichever driver leads to it."""

from __future__ import annotations

import math
from typing import Any

from taskx.stores.sql.link import Link
from taskx.stores.sql.pool import LOCK_TIMEOUT, PooledLink

#: The transactions in progress. Each one that writes is in it as long as others do not see what it wrote.
SNAPSHOT = "SELECT txid_current_snapshot()::text"
#: The seconds since the begin of the oldest transaction, which keeps rows that were removed since then.
OLDEST = (
    "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8 "
    "FROM pg_stat_activity WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) "
    "AND pid <> pg_backend_pid() AND datname = current_database()"
)
#: Codes of errors: the table is missing; an error before has ended the transaction; the server takes no
#: writes.
NO_TABLE, ABORTED, READ_ONLY = "42P01", "25P02", "25006"


def without_nul(value: Any) -> Any:
    """Return a value that PostgreSQL can store: its texts have no NUL characters."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in value else value
    return [without_nul(item) for item in value] if isinstance(value, (list, tuple)) else value


def limits(timeout: float) -> dict[str, int]:
    """Return options by which a connection fails if its network loses all packets for ``timeout`` seconds.

    The time-outs of statements are the server's. Without these options the driver would wait for 15 minutes
    or more.
    """
    seconds = max(2, round(timeout))
    return {
        "connect_timeout": seconds,
        "tcp_user_timeout": round(1000 * timeout),
        "keepalives_idle": seconds,
        "keepalives_interval": max(1, seconds // 3),
        "keepalives_count": 3,
    }


def set_timeouts(link: Link, seconds: float, lock: float = math.inf) -> None:
    """Limit the statements of a session to some seconds, and their waits for locks to milliseconds."""
    milliseconds = max(1, round(seconds * 1000))
    # The second one releases the locks of a connection that was cut amid a transaction.
    names = ("statement_timeout", "idle_in_transaction_session_timeout")
    wanted = [f"SET {name} = {milliseconds}" for name in names]
    link.execute("; ".join([*wanted, f"SET lock_timeout = {min(milliseconds, lock)}"]))


def begin(link: PooledLink, durable: bool, timeout: float) -> None:
    """Begin a transaction, whose commit waits for the disk if it is ``durable``."""
    wanted = "BEGIN"
    if not durable:
        wanted += "; SET LOCAL synchronous_commit = off"
    elif not (link.durable or link.pooled):  # set_durable may have switched it off for the session
        wanted += "; SET LOCAL synchronous_commit = DEFAULT"
    if link.pooled:
        milliseconds = max(1, round(timeout * 1000))
        wanted += f"; SET LOCAL lock_timeout = {LOCK_TIMEOUT}"
        wanted += f"; SET LOCAL statement_timeout = {milliseconds}"
        wanted += f"; SET LOCAL idle_in_transaction_session_timeout = {milliseconds}"
    link.execute(wanted)


def set_durable(link: Any, durable: bool) -> None:
    """Choose if the next statement that commits itself waits until it is on the disk."""
    if link.durable is not durable:
        link.durable = None  # unknown if an interrupt comes after the next line
        link.execute(f"SET synchronous_commit = {'DEFAULT' if durable else 'off'}")
        link.durable = durable
