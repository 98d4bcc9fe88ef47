"""Tasks in one SQLite file, for any number of processes on one host.

Other packages use ``SQLiteRepository`` only.
"""

from taskx.stores.sqlite.repository import SQLiteRepository

__all__ = ["SQLiteRepository"]
