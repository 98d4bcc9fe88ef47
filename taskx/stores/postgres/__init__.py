"""The repository in a PostgreSQL database; requires psycopg 3, the extra ``postgres``.

Other packages use only ``PostgresRepository``.
"""

from typing import Any

from taskx.tasks.errors import ConfigurationError

try:
    from taskx.stores.postgres.repository import PostgresRepository
except ImportError as error:  # psycopg itself raises it if it finds no libpq
    if "psycopg" not in str(error) and "libpq" not in str(error):
        raise

    class PostgresRepository:  # type: ignore[no-redef]
        """A stand-in that raises an error: psycopg is not installed."""

        def __init__(self, *args: Any, **options: Any) -> None:
            raise ConfigurationError(
                "PostgresRepository requires psycopg 3: pip install 'taskx-queue[postgres]'"
            )

        from_url = __init__


__all__ = ["PostgresRepository"]
