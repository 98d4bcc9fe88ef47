"""What the driver raises, as what TaskX raises."""

from __future__ import annotations

from bson.errors import BSONError
from pymongo import errors

from taskx.core.errors import (
    ConfigurationError,
    PayloadError,
    RepositoryError,
    RepositoryUnavailable,
    TaskxError,
)

DUPLICATE_KEY = 11000
_TOO_LARGE = frozenset((10334, 17280, 17419, 17420))
_TOO_DEEP = 15
#: Not primary any more, shutting down, interrupted, out of time, out of disk: may work later.
_PASSING = frozenset(
    (
        *(6, 7, 24, 46, 50, 64, 79, 89, 91, 112, 134, 189, 262, 317, 358),
        *(9001, 10107, 11600, 11602, 13388, 13435, 13436, 14031),
    )
)
_NEVER_SENT = (errors.ServerSelectionTimeoutError, errors.WaitQueueTimeoutError)


def is_passing(error: Exception) -> bool:
    """Whether the same operation may succeed later."""
    if isinstance(error, errors.BulkWriteError):
        details = error.details or {}
        codes = {failure.get("code") for failure in details.get("writeErrors", ())}
        codes.discard(DUPLICATE_KEY)
        return codes <= _PASSING if codes else bool(details.get("writeConcernErrors"))
    if isinstance(error, errors.OperationFailure):
        return isinstance(error, errors.WriteConcernError) or error.code in _PASSING
    return isinstance(
        error, (errors.ConnectionFailure, errors.ExecutionTimeout, errors.InvalidOperation)
    )


def may_have_been_sent(error: Exception) -> bool:
    """Whether the server may have carried it out all the same."""
    return not isinstance(error, (*_NEVER_SENT, errors.InvalidOperation))


def translated(error: Exception, where: str, *, in_doubt: bool = False) -> TaskxError:
    """The error of ours for one of the driver's."""
    text = f"{where}: {str(error)[:500]}"
    if is_passing(error):
        doubt = "; whether it was written is not known" if in_doubt else ""
        unavailable = RepositoryUnavailable(text + doubt)
        unavailable.in_doubt = in_doubt
        return unavailable
    code = _first_code(error)
    if isinstance(error, errors.DocumentTooLarge) or code in _TOO_LARGE:
        return PayloadError("document", "too large for MongoDB, which keeps 16 MiB for a task")
    if code == _TOO_DEEP:
        return PayloadError("document", "nested too deep for MongoDB")
    if isinstance(error, (BSONError, OverflowError, RecursionError, UnicodeEncodeError)):
        return PayloadError("document", f"MongoDB cannot keep it: {error}")
    if isinstance(error, errors.ConfigurationError):
        return ConfigurationError(text)
    return RepositoryError(text)


def _first_code(error: Exception) -> int | None:
    if isinstance(error, errors.BulkWriteError):
        failures = (error.details or {}).get("writeErrors", ())
        return next((f["code"] for f in failures if f.get("code") != DUPLICATE_KEY), None)
    return error.code if isinstance(error, errors.OperationFailure) else None
