"""A service manager that reads what a supervisor tells it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from helpers import PATIENCE


class Manager:
    """The socket of a service manager."""

    def __init__(self):
        self.address = f"@taskx-test-{os.urandom(8).hex()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{self.address[1:]}")
        self._socket.settimeout(PATIENCE)

    def read(self):
        return self._socket.recv(4096).decode()

    def close(self):
        self._socket.close()


@pytest.fixture
def manager() -> Iterator[Manager]:
    made = Manager()
    yield made
    made.close()
