"""Processes that the benchmark starts and always ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
#: Time limit for each answer of a child, in seconds.
PATIENCE = 120.0


class ChildFailed(Exception):
    """A child ended with an error, or did not answer in time."""


def environment(tree: str | None = None, **more: str) -> dict[str, str]:
    """Return the environment of children, in which they find this package from any folder.

    Args:
        tree: the folder from which they import TaskX; the default is that of this process.
        more: additional variables.
    """
    path = os.pathsep.join(filter(None, (tree, os.environ.get("PYTHONPATH"), str(ROOT))))
    made = {**os.environ, "PYTHONPATH": path, **more}
    made.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each child would compile its imports
    return made


@contextmanager
def _started(
    args: tuple[str, ...], tree: str | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Start a Python program. At the end of the block, kill it and all processes that it started."""
    # A session of its own: Ctrl-C reaches only the benchmark, and a kill of the group its grandchildren.
    process = subprocess.Popen(
        [sys.executable, *args],
        cwd=tree,  # the first place from which Python imports
        env=environment(tree),
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def run(*args: str, seconds: float = PATIENCE, tree: str | None = None) -> str:
    """Run a Python program with the TaskX of a tree. Return its output.

    Raises:
        ChildFailed: the program ended with an error, or not within ``seconds``.
    """
    theirs, ours = os.pipe()
    try:
        with _started(
            args, tree, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            printed, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"{' '.join(args)}: not done within {seconds:g} s") from None
    finally:
        os.close(theirs)
        os.close(ours)
    if process.returncode != 0:
        raise ChildFailed(f"{' '.join(args)}: ended with {process.returncode}\n{complaints}")
    return printed


def end_with_parent() -> None:
    """Make this child kill itself and all processes that it started when the benchmark has ended."""

    def kill_when_alone() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # otherwise the group may include a user's shell
        threading.Thread(target=kill_when_alone, daemon=True).start()


class Child:
    """A Python program that prints lines, and ends when its standard input ends.

    Attributes:
        pid: the id of its process.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout

    def tell(self, line: str) -> None:
        """Write a line to the program."""
        self._stdin.write(f"{line}\n")
        self._stdin.flush()

    def hear(self, word: str) -> str:
        """Return the rest of the program's next line, which must begin with ``word``.

        Raises:
            ChildFailed: the program printed something else, or nothing.
        """
        watchdog = threading.Timer(PATIENCE, self.kill)
        watchdog.daemon = True  # after an interrupt during start(), the exit must not wait for it
        try:
            watchdog.start()
            line = self._stdout.readline()
        finally:
            watchdog.cancel()
        said, _, rest = line.strip().partition(" ")
        if said != word:
            raise ChildFailed(f"a child should have printed {word!r}, but printed {line!r}")
        return rest

    def kill(self) -> None:
        """Kill the program with SIGKILL."""
        self._process.kill()


@contextmanager
def talking(*args: str) -> Iterator[Child]:
    """Run a :class:`Child` during the block."""
    with _started(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Child(process)
