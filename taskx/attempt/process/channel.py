"""The channel between a process and the child process of an executor: messages as lines of JSON."""

from __future__ import annotations

import json
import select
import socket
import threading
from typing import Any

_CHUNK = 1 << 18


class Channel:
    """Sends and receives messages, each a list of JSON values, over one end of a pair of sockets.

    Only :meth:`hear` and :meth:`flush` block, so a partner that does not read blocks no other call. Any
    thread may call :meth:`say`; only one thread may call :meth:`hear`.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._saying = threading.Lock()
        self._unsent = bytearray()
        self._incomplete: list[bytes] = []  # the received parts of a message that is not complete

    def say(self, *message: Any) -> None:
        """Send a message. What cannot be sent now is sent by a later call."""
        line = json.dumps(message).encode() + b"\n"
        with self._saying:
            self._unsent += line
            self._send()

    def _send(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:  # the other end is gone: hear() will say so
                self._unsent.clear()
                return
            del self._unsent[:sent]

    @property
    def unsent(self) -> bool:
        """True if the other end has not taken all messages yet."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Wait until all messages are sent, or the other end is closed."""
        while self._unsent:
            self._wait(select.POLLOUT, None)
            with self._saying:
                self._send()

    def hear(self, timeout: float) -> list[list[Any]] | None:
        """Wait up to ``timeout`` seconds and return the new messages; None if the other end is closed."""
        self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), timeout)
        with self._saying:
            self._send()
        data = self._received()
        if data is None:
            return []
        return self._messages(data) if data else None

    def hear_rest(self) -> list[list[Any]] | None:
        """Return all remaining messages of a process that has ended; None if there are none."""
        messages: list[list[Any]] = []
        while data := self._received():
            messages += self._messages(data)
        return messages or None

    def _received(self) -> bytes | None:
        """Return the bytes received; None if there are none yet, empty if the other end is closed."""
        try:
            return self._socket.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _wait(self, events: int, timeout: float | None) -> None:
        poll = select.poll()  # select() does not support high file descriptors
        poll.register(self._socket, events)
        poll.poll(None if timeout is None else timeout * 1000)

    def _messages(self, data: bytes) -> list[list[Any]]:
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._incomplete, lines[0]))
            self._incomplete = []
        self._incomplete.append(rest)
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close this end."""
        with self._saying:
            self._socket.close()
