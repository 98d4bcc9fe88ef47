"""Messages to systemd: the protocol of ``sd_notify``, over a datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping


class Notifier:
    """Sends messages to the service manager that started this program, if there is one.

    The variables are removed from the environment, so that child processes send none.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        micros = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        #: Most seconds between two beats for the watchdog: half of what it allows; None: there is none.
        self.watchdog: float | None = None
        if micros.isdigit() and int(micros) and pid in ("", str(os.getpid())):
            self.watchdog = int(micros) / 2e6
        self._socket: socket.socket | None = None
        self._status = ""
        # Messages that the manager had no room for, by their kind: it reads slowly while a system boots.
        self._unsent: dict[str, str] = {}
        if address:
            self._connect(address)

    def _connect(self, address: str) -> None:
        # An address in the abstract namespace is written with "@" in place of the zero byte.
        path = f"\0{address[1:]}" if address.startswith("@") else address
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            made.connect(path)
            made.setblocking(False)
        except OSError:
            made.close()
        else:
            self._socket = made

    def _send(self, *lines: str) -> None:
        """Send a message, or keep it until the manager has room for it: the last one of each kind."""
        kind = lines[0].partition("=")[0]
        self._unsent.pop(kind, None)
        self._unsent[kind] = "\n".join(lines)
        self.flush()

    def flush(self) -> None:
        """Send the messages that the manager had no room for."""
        while self._unsent:
            kind, message = next(iter(self._unsent.items()))
            if self._socket is not None:
                try:
                    self._socket.send(message.encode())
                except BlockingIOError:
                    return
                except OSError:  # the manager is gone
                    pass
            del self._unsent[kind]

    def ready(self) -> None:
        """Say that the service has started, or has loaded its configuration again."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that the service loads its configuration again; :meth:`ready` ends it."""
        self._send(
            "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
        )

    def stopping(self) -> None:
        """Say that the service stops."""
        self._send("STOPPING=1")

    def beat(self) -> None:
        """Tell the watchdog that the service is alive."""
        self._send("WATCHDOG=1")

    def status(self, words: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        if words != self._status:
            self._status = words
            self._send(f"STATUS={words}")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
