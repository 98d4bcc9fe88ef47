"""MariaDB servers for the tests, from the system's packages."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pymysql
from mongo_server import PATIENCE, free_port
from server_folders import RUN, new_folder

_PREFIX = "taskx-mariadb-"
_RUN = [sys.executable, "-I", "-c", RUN, str(int(signal.SIGKILL)), "{}"]
#: The audit event of a test that uses a shared server, which an earlier test may have started.
SERVER_USED = "taskx.tests.mariadb_used"
# A system's servers are often in a folder that only root's PATH has.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
#: True if the server, and what makes its tables, is installed.
INSTALLED = all(
    shutil.which(name, path=_PATH)
    for name in ("mariadbd", "mariadb-install-db", "my_print_defaults")
)
# Killed processes lose nothing that the system has got, so no file is synced: it guards against power cuts.
_OPTIONS = {
    "bind_address": "127.0.0.1",
    "innodb_buffer_pool_size": "32M",
    "innodb_flush_method": "nosync",
    "innodb_log_file_size": "16M",
    "max_connections": "200",
}


class Server:
    """A separate server, which a test can kill and start again on the same port and data.

    Attributes:
        port: the port on 127.0.0.1. The user is ``root``, without a password.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # A server that starts removes the temporary tables of others from the folder for such files.
        self._environment = {**os.environ, "TMPDIR": str(folder)}
        options = ["--skip-test-db", "--skip-log-bin", "--auth-root-authentication-method=normal"]
        command = ["mariadb-install-db", *self._where, *options]
        made = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=self._environment
        )
        assert made.returncode == 0, f"MariaDB makes no tables: {made.stdout}{made.stderr}"

    @property
    def _where(self) -> list[str]:
        user = [] if os.geteuid() else ["--user=root"]
        return ["--no-defaults", f"--datadir={self.folder / 'data'}", *user]

    def start(self) -> Server:
        command = [str(shutil.which("mariadbd", path=_PATH)), *self._where]
        options = {**_OPTIONS, "port": self.port, "socket": "socket", "pid_file": "pid"}
        command += [f"--{name}={value}" for name, value in options.items()]
        with open(self.folder / "output", "ab") as output:
            self._process = subprocess.Popen(
                [*_RUN, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=self._environment,
            )
        self._wait_until_up()
        return self

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.connect().close()
                return
            except pymysql.OperationalError:
                said = (self.folder / "output").read_text(errors="replace")
                assert self._process.poll() is None, f"MariaDB ended: {said[-2000:]}"
                assert time.monotonic() < deadline, f"MariaDB does not start: {said[-2000:]}"
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)

    def connect(self, database: str | None = None) -> pymysql.Connection[Any]:
        """Return a connection in autocommit mode."""
        return pymysql.connect(
            host="127.0.0.1", port=self.port, user="root", database=database, autocommit=True
        )

    def execute(self, sql: str, database: str | None = None) -> tuple[tuple[Any, ...], ...]:
        """Execute a statement on a connection of its own, and return its rows."""
        with self.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def url(self, database: str) -> str:
        """Return the URL of a database, as the project of the tests takes it."""
        return f"mysql://root@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database, and return its name."""
        name = f"taskx_{uuid.uuid4().hex[:16]}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database."""
        self.execute(f"DROP DATABASE IF EXISTS {name}")

    def break_connections(self, name: str) -> None:
        """End the connections to a database."""
        found = f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"
        for (number,) in self.execute(found):
            self.execute(f"KILL {number}")

    def kill(self) -> None:
        """Kill the server without a warning, in the middle of what it does."""
        if self._process is not None:
            self._process.communicate(timeout=PATIENCE)  # the end of its input ends it
            self._process = None


def shared() -> Server:
    """Return a server that all tests of this process share. Make a database of your own on it."""
    sys.audit(SERVER_USED)
    return _started()


@contextmanager
def private() -> Iterator[Server]:
    """Start a server that a test can kill and start again."""
    with new_folder(_PREFIX, "data/pid") as folder:
        server = Server(folder)
        try:
            yield server.start()
        finally:
            server.kill()


@functools.cache
def _started() -> Server:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(private())
