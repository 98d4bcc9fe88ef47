"""Permission to use queues in this process. The child process of an executor restricts it.

A process of ``taskx worker`` does so, too, while it imports the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from taskx.tasks.errors import ConfigurationError

#: The reason why queues may not be started or given tasks in this process now; empty if they may.
forbidden = ""
#: True while a process of ``taskx worker`` loads its queue, which it starts itself.
loading = False
#: True in the child process of an executor: tasks that its queues keep in memory are lost with it.
in_child = False


class StartRefused(ConfigurationError):
    """The program starts a queue while a process of ``taskx worker`` loads it."""


@contextmanager
def loading_queue() -> Iterator[None]:
    """Refuse to start queues within a block: the program is imported that makes one."""
    global loading
    loading = True
    try:
        yield
    finally:
        loading = False


@contextmanager
def importing(why: str) -> Iterator[None]:
    """Forbid the use of queues within a block: this is a child process that imports an executor."""
    global forbidden, in_child
    in_child, forbidden = True, why
    try:
        yield
    finally:
        forbidden = ""


def refuse_if_forbidden() -> None:
    """Raise ``ConfigurationError`` if queues may not be used in this process."""
    if forbidden:
        raise ConfigurationError(forbidden)


def refuse_start() -> None:
    """Raise ``ConfigurationError`` if queues may not be started in this process now."""
    refuse_if_forbidden()
    if loading:
        raise StartRefused(
            "the worker starts the queue itself; remove this line, or put it under "
            "if __name__ == '__main__':"
        )
