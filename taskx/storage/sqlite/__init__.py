"""Tasks in one SQLite file, for any number of processes on one host.

Only ``SQLiteRepository`` is used from outside.
"""

from taskx.storage.sqlite.repository import SQLiteRepository

__all__ = ["SQLiteRepository"]
