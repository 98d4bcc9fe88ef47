"""Ports for servers that the tests start."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port that the system gives to nobody by itself: it stays free while a server is down."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
