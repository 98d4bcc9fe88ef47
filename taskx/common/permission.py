"""Permission to use queues in this process. The child process of an executor restricts it."""

from __future__ import annotations

from taskx.core.errors import ConfigurationError

#: The reason why queues may not be started or given tasks in this process now; empty if they may.
forbidden = ""
#: True in the child process of an executor: tasks that its queues keep in memory are lost with it.
in_child = False


def refuse_if_forbidden() -> None:
    """Raise ``ConfigurationError`` if queues may not be used in this process."""
    if forbidden:
        raise ConfigurationError(forbidden)
