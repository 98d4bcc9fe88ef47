"""A TCP proxy on the loopback interface that can cut, delay and swallow traffic."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

#: Decides about each piece of traffic, by its direction ("ask" or "answer") and bytes. True passes it on.
Judge = Callable[[str, bytes], bool]


def _let_through(direction: str, piece: bytes) -> bool:
    return True


class Proxy:
    """A proxy for a port of this machine.

    Args:
        target: the port.
        listener: a socket that listens; by default it has a free port on 127.0.0.1.

    Attributes:
        port: the port on which the proxy listens.
        judge: called with each piece of traffic; if it returns False, the piece is swallowed.
    """

    def __init__(self, target: int, listener: socket.socket | None = None) -> None:
        self.target = target
        self.judge: Judge = _let_through
        self._refusing = False
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._refusing:
                    raise ConnectionRefusedError
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                _reset(client)
                continue
            with self._lock:
                if not self._refusing:
                    self._pairs.append((client, server))
            if self._refusing:  # cut() was called while this connection came in
                _reset(client)
                _reset(server)
                continue
            for source, sink, direction in ((client, server, "ask"), (server, client, "answer")):
                threading.Thread(
                    target=self._pump, args=(source, sink, direction), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 20):
                if self.judge(direction, piece):
                    sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with ``refuse``, also future ones."""
        with self._lock:
            self._refusing = refuse
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _reset(end)

    def heal(self) -> None:
        """Pass all traffic again, and cut the connections that hang."""
        self.judge = _let_through
        self.cut(refuse=False)

    def close(self) -> None:
        self._listener.close()
        self.cut(refuse=True)


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def swallowing(direction: str, words: Sequence[bytes], seen: threading.Event) -> Judge:
    """Return a judge that swallows all traffic of a direction after a request with one of these words."""

    def judge(way: str, piece: bytes) -> bool:
        if way == "ask" and any(word in piece for word in words):
            seen.set()
        return not (seen.is_set() and way == direction)

    return judge
