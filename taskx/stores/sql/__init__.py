"""Tasks in SQL: the statements in several dialects, and a repository over any connections.

Other packages use these names.
"""

from taskx.stores.sql.dialects import Dialect, MySQL, Postgres, SQLite
from taskx.stores.sql.link import Apart, Link, Links, Sent, Taken
from taskx.stores.sql.repository import SQLRepository
from taskx.stores.sql.statements import Statements

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
