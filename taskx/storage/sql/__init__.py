"""Tasks in SQL: the statements in several dialects, and a repository over any connections.

Other packages use these names.
"""

from taskx.storage.sql.dialects import Dialect, MySQL, Postgres, SQLite
from taskx.storage.sql.link import Apart, Link, Taken
from taskx.storage.sql.repository import Sent, SQLRepository
from taskx.storage.sql.statements import Statements

__all__ = [
    "Apart",
    "Dialect",
    "Link",
    "MySQL",
    "Postgres",
    "SQLRepository",
    "SQLite",
    "Sent",
    "Statements",
    "Taken",
]
