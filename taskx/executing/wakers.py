"""How to wake a thread that blocks on a resource, kind by kind.

Closing a file descriptor does not wake a thread that reads from it; it may hang the closer instead.
A module of its own, so that what it imports is loaded by the programs that use it alone.
"""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskx.core.errors import ConfigurationError
from taskx.executing.process.processes import kill_family

# A query or a connection that begins just after a wake-up must be woken, too: repeat it, in seconds.
_REPEAT = 0.05


class Waker:
    """Wakes whoever blocks on ``resource`` when called, and goes on until :meth:`close`.

    Raises:
        ConfigurationError: nothing would wake them.
    """

    def __init__(self, resource: Any) -> None:
        self._resource = resource
        self._wake, self._again = _way_to_wake(resource)
        self._closed = threading.Event()

    def __call__(self) -> None:
        """Wake, on a thread that may be kept."""
        self._wake()
        while self._again and not self._closed.wait(_REPEAT):
            with suppress(Exception):  # closed between the look and the call
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
    """What to call, and whether it has to be called again for what begins later."""
    if isinstance(resource, socket.socket):
        return lambda: _shut_down(resource), False
    if isinstance(resource, sqlite3.Connection):
        return resource.interrupt, True
    if isinstance(resource, subprocess.Popen):
        return lambda: _kill(resource), False
    for name in ("abort", "shutdown"):
        method = getattr(resource, name, None)
        if callable(method):
            return method, False
    missing = object()
    if isinstance(getattr(resource, "sock", missing), (socket.socket, type(None))):
        # http.client, ftplib, smtplib and their like, which connect when they please.
        return lambda: _shut_down(resource.sock), True
    raise ConfigurationError(
        f"closing() cannot wake a thread that blocks on a {type(resource).__name__}: closing it "
        "would not. Give it a time-out of ctx.remaining(), or register what does wake it with "
        "ctx.on_cancel(…)"
    )


def _kill(program: subprocess.Popen[Any]) -> None:
    """Kill a program and what it has started, which may hold the other ends of its pipes.

    A shell is killed alone by ``Popen.kill``; whoever reads what its command writes would block on.
    """
    if program.poll() is None:
        kill_family(program.pid)


def _shut_down(sock: socket.socket | None) -> None:
    if sock is not None:
        with suppress(OSError):  # not connected, or closed already: nobody can be blocked on it
            sock.shutdown(socket.SHUT_RDWR)
