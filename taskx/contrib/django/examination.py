"""The examination of a Django database: its answer, its tables and its settings. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from taskx.stores.postgres.examination import examined, settings
from taskx.stores.sqlite.examination import disk
from taskx.tasks.findings import Check, ok, warn

if TYPE_CHECKING:
    from taskx.contrib.django.connections import Connections
    from taskx.contrib.django.link import Link
    from taskx.stores.parts import House
    from taskx.tasks.timing import Timing


def examine(house: House, connections: Connections, timing: Timing) -> Iterator[Check]:
    """Yield what is right and wrong with a database."""

    def more(link: Link) -> Iterator[Check]:
        house.prepare()
        yield ok("tables", "The database has TaskX's tables.")
        if connections.file is not None:
            yield disk(connections.file.path)
        yield from _settings(link)

    advice = "Check DATABASES and the server, and run manage.py migrate."
    server = f"{connections.vendor} database"
    return examined(connections, timing, "database", server, more, advice)


def _settings(link: Link) -> Iterator[Check]:
    if link.vendor == "sqlite":
        ((mode,),) = link.rows("PRAGMA journal_mode")
        if mode == "wal":
            yield ok("journal", "The file has a write-ahead log.", mode=mode)
        else:
            yield warn(
                "journal",
                f"The file has journal_mode={mode}, so reads and writes wait for each other.",
                'Set OPTIONS["init_command"] to "PRAGMA journal_mode=WAL" (Django 5.1 or later), or run '
                "that statement once: the file keeps it.",
                mode=mode,
            )
    elif link.vendor == "postgresql":
        yield from settings(link, "taskx_task")
    elif link.vendor == "mysql":
        ((flush, mode),) = link.rows("SELECT @@innodb_flush_log_at_trx_commit, @@sql_mode")
        if int(flush) == 1:
            yield ok("durability", "A commit is on the disk when a caller is told of it.")
        else:
            yield warn(
                "durability",
                f"innodb_flush_log_at_trx_commit is {flush}, so a power cut may undo the commits of the "
                "last second, also of tasks that a caller was told are stored.",
                "Set it to 1 on the server.",
            )
        if "STRICT_" in mode:
            yield ok("strict mode", "The server refuses values that are too long.")
        else:
            yield warn(
                "strict mode",
                f"The server cuts values that are too long, as sql_mode is {mode!r}.",
                "Add STRICT_TRANS_TABLES to sql_mode.",
            )
