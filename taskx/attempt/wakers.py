"""Waking a thread that blocks on a resource, in a way that depends on the kind of resource.

Closing a file descriptor does not wake a thread that reads from it; the close may even hang. This is a
separate module, so that only programs that use it load its imports.
"""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskx.attempt.process.processes import kill_family
from taskx.tasks.errors import ConfigurationError

# Seconds between two wake-ups: a query or connection may begin just after the first one.
_REPEAT = 0.05


class Waker:
    """Wakes the threads that block on ``resource`` when called, again and again until :meth:`close`.

    Raises:
        ConfigurationError: the resource has no method that wakes a blocked thread.
    """

    def __init__(self, resource: Any) -> None:
        self._resource = resource
        self._wake, self._again = _way_to_wake(resource)
        self._closed = threading.Event()

    def __call__(self) -> None:
        """Wake the threads. This may block until :meth:`close`, so call it on its own thread."""
        self._wake()
        while self._again and not self._closed.wait(_REPEAT):
            with suppress(Exception):  # closed between the check and the call
                self._wake()

    def close(self) -> None:
        """End the waking, and close the resource."""
        self._closed.set()
        if isinstance(self._resource, subprocess.Popen):
            _kill(self._resource)
            with self._resource:
                return  # closes its pipes and waits for it
        close = getattr(self._resource, "close", None)
        if callable(close):
            close()


def _way_to_wake(resource: Any) -> tuple[Callable[[], object], bool]:
    """Return the function that wakes, and True if it must be called again for calls that begin later."""
    if isinstance(resource, socket.socket):
        return lambda: _shut_down(resource), False
    if isinstance(resource, sqlite3.Connection):
        return resource.interrupt, True
    if isinstance(resource, subprocess.Popen):
        return lambda: _kill(resource), False
    missing = object()
    if isinstance(getattr(resource, "sock", missing), (socket.socket, type(None))):
        # http.client, ftplib, smtplib and similar classes, which connect at any time. Not the abort() of
        # ftplib: that waits for the server.
        return lambda: _shut_down(resource.sock), True
    for name in ("abort", "shutdown"):
        method = getattr(resource, name, None)
        if callable(method):
            return method, False
    raise ConfigurationError(
        f"closing() cannot wake a thread that blocks on a {type(resource).__name__}; give it the "
        "time-out ctx.remaining(), or register a function that wakes it with ctx.on_cancel(…)"
    )


def _kill(program: subprocess.Popen[Any]) -> None:
    """Kill a program and the programs it has started, which may hold the other ends of its pipes.

    ``Popen.kill`` would kill only a shell, and a thread that reads the output of the shell's command would
    stay blocked.
    """
    if program.poll() is None:
        kill_family(program.pid)


def _shut_down(sock: socket.socket | None) -> None:
    if sock is not None:
        with suppress(OSError):  # not connected or already closed: no thread can block on it
            sock.shutdown(socket.SHUT_RDWR)
