"""MongoDB servers for the tests: small servers with its protocol (SecantusDB), or a real one.

If ``TASKX_TEST_MONGO_URL`` (``mongodb://host:port``) is set, tests with the shared server use that one.
Each test has its own database there, which is dropped at the end.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pymongo

PATIENCE = 120.0
#: The audit event of a test that uses a shared server, which an earlier test may have started.
SERVER_USED = "taskx.tests.server_used"
REAL = os.environ.get("TASKX_TEST_MONGO_URL", "")

# The server ends when its parent process ends, in any way.
_PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from secantus.cli import main
main()
"""
#: The command line of each kind of server: a replica set of one, or a standalone server.
OPTIONS = {"set": ["--sync-on-commit"], "standalone": ["--sync-on-commit", "--standalone"]}


#: The first of the ports of this process: processes that run tests at a time do not share ports.
_FIRST_PORT = 15_000 + 2_500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 6)


_given: set[int] = set()  # a client of a server that is gone may still try to reach it


def free_port() -> int:
    """Return a free port outside the system's own range, so that it stays free while a server is down."""
    while True:
        port = random.choice([*{*range(_FIRST_PORT, _FIRST_PORT + 2_500)} - _given])
        _given.add(port)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A separate server, which a test can kill and start again on the same port and data."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.port = free_port()
        self.url = f"mongodb://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "ERROR"]
        arguments += ["--storage-path", str(self.folder / "data"), *OPTIONS[self.kind]]
        with open(self.folder / "output", "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _PROGRAM, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self.folder,
            )
        self._wait_until_up()
        return self

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE
        pause = threading.Event()
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                assert self.process is not None
                said = (self.folder / "output").read_text(errors="replace")
                assert self.process.poll() is None, f"{self.kind} ended: {said[-2000:]}"
                assert time.monotonic() < deadline, f"{self.kind} does not start: {said[-2000:]}"
            pause.wait(0.02)

    def kill(self) -> None:
        """Kill the server without a warning, like a power cut."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate(timeout=PATIENCE)
            self.process = None


def shared(kind: str) -> str:
    """Return the URL of a server that all tests of this process share."""
    sys.audit(SERVER_USED)
    return REAL or _started(kind)


@functools.cache
def _started(kind: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="taskx-mongo-"))
    server = Server(kind, folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    return server.start().url


@functools.cache
def client(url: str) -> pymongo.MongoClient[dict[str, Any]]:
    """Return a client that the tests of this process share."""
    made: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    atexit.register(made.close)
    return made


def new_database(url: str) -> Any:
    """Return a new, empty database."""
    return client(url)[f"taskx_{uuid.uuid4().hex[:16]}"]
