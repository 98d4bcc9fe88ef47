"""Tasks in SQL: the statements in several dialects, and a repository over any connections.

Other packages use these names.
"""

from taskx.storage.sql.dialects import Dialect, MySQL, Postgres, SQLite
from taskx.storage.sql.link import Apart, Link, Links, Sent, Taken
from taskx.storage.sql.repository import SQLRepository
from taskx.storage.sql.statements import Statements

__all__ = [
    "Apart",
    "Dialect",
    "Link",
    "Links",
    "MySQL",
    "Postgres",
    "SQLRepository",
    "SQLite",
    "Sent",
    "Statements",
    "Taken",
]
