"""The line between a process and the child process of an executor: messages as lines of JSON."""

from __future__ import annotations

import json
import select
import socket
import threading
from typing import Any

_CHUNK = 1 << 18


class Channel:
    """Says and hears messages, each a list of JSON values, over one end of a pair of sockets.

    It never blocks but in :meth:`hear` and :meth:`flush`: a partner that does not listen holds up
    nobody. Any thread may say something; one hears.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._saying = threading.Lock()
        self._unsent = bytearray()
        self._incomplete: list[bytes] = []  # what came of a line that is not complete

    def say(self, *message: Any) -> None:
        """Send a message, or what of it can be sent now; the rest follows."""
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
            except OSError:  # the other one is gone, as who hears will be told
                self._unsent.clear()
                return
            del self._unsent[:sent]

    def flush(self) -> None:
        """Wait until all is sent, or the other end is closed."""
        while self._unsent:
            self._wait(select.POLLOUT, None)
            with self._saying:
                self._send()

    def hear(self, timeout: float) -> list[list[Any]] | None:
        """The messages that came; none within ``timeout`` seconds, None when the other end is closed."""
        self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), timeout)
        with self._saying:
            self._send()
        data = self._received()
        if data is None:
            return []
        return self._messages(data) if data else None

    def hear_rest(self) -> list[list[Any]] | None:
        """All that is left to be heard of one who has ended; None for nothing."""
        messages: list[list[Any]] = []
        while data := self._received():
            messages += self._messages(data)
        return messages or None

    def _received(self) -> bytes | None:
        """What came; None for nothing yet, empty when the other end is closed."""
        try:
            return self._socket.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _wait(self, events: int, timeout: float | None) -> None:
        poll = select.poll()  # select() knows no high numbers
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
