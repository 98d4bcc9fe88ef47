"""Errors as answers: one line that says what was wrong, as a page or as JSON."""

from __future__ import annotations

import logging

from werkzeug.exceptions import HTTPException

from taskx.tasks import errors

_log = logging.getLogger("taskx")

#: HTTP statuses of our errors; the first class that fits decides.
_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (errors.TaskNotFound, 404),
    (errors.ScheduleNotFound, 404),
    (errors.NodeNotFound, 404),
    (errors.InvalidTransition, 409),
    (errors.DuplicateTask, 409),
    (errors.PayloadError, 400),
    (errors.UnknownTaskType, 400),
    (errors.ConfigurationError, 400),
    (errors.RepositoryCorrupt, 500),
    (errors.TaskxError, 503),  # the repository is away, or the queue was stopped or is full
)


def status_and_sentence(error: Exception) -> tuple[int, str]:
    """Return the HTTP status of an error, and what to tell the user. Log an error that is a defect."""
    if isinstance(error, HTTPException):
        return error.code or 500, error.description or error.name
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status, str(error)
    _log.error("the dashboard failed", exc_info=error)
    return 500, "The dashboard failed. The log of the process has the traceback."
