"""The repository on a MongoDB collection; requires pymongo, the extra ``mongo``.

Other packages use only ``MongoRepository``.
"""

from typing import Any

from taskx.tasks.errors import ConfigurationError

try:
    from taskx.stores.mongo.repository import MongoRepository
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("pymongo", "bson"):
        raise

    class MongoRepository:  # type: ignore[no-redef]
        """A stand-in that raises an error: pymongo is not installed."""

        def __init__(self, *args: Any, **options: Any) -> None:
            raise ConfigurationError(
                "MongoRepository requires pymongo: pip install 'taskx-queue[mongo]'"
            )

        from_url = __init__


__all__ = ["MongoRepository"]
