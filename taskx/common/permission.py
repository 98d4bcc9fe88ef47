"""Whether queues may be used in this process; the child process of an executor says so of itself."""

from __future__ import annotations

from taskx.core.errors import ConfigurationError

#: Why no queue may be started now in this process, nor given tasks; empty where it may.
forbidden = ""
#: Whether this is the child process of an executor: what its queues keep in memory is lost with it.
in_child = False


def refuse_if_forbidden() -> None:
    """Raise ``ConfigurationError`` where no queue may be used."""
    if forbidden:
        raise ConfigurationError(forbidden)
