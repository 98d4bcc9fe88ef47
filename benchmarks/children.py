"""Processes that the benchmark starts, and ends whatever happens."""

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
#: Seconds after which a child that has not said or done what it should is ended.
PATIENCE = 120.0


class ChildFailed(Exception):
    """A child ended with an error, or did not do what it should in time."""


def environment(tree: str | None = None, **more: str) -> dict[str, str]:
    """Return the environment of children: they find this package wherever they run.

    Args:
        tree: where they find TaskX; where this process does, unless given.
        more: variables beside those of this process.
    """
    path = os.pathsep.join(filter(None, (tree, os.environ.get("PYTHONPATH"), str(ROOT))))
    made = {**os.environ, "PYTHONPATH": path, **more}
    made.pop("PYTHONDONTWRITEBYTECODE", None)  # or each would compile all that it imports
    return made


@contextmanager
def _started(
    args: tuple[str, ...], tree: str | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A Python program; at the end of the block it and all that it started are killed."""
    # A session of its own: Ctrl-C strikes the benchmark alone, and a kill reaches grandchildren.
    process = subprocess.Popen(
        [sys.executable, *args],
        cwd=tree,  # where Python looks first
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
    """Run a Python program to its end, with the TaskX of that tree; returns what it printed.

    Raises:
        ChildFailed: it ended with an error, or not within ``seconds``.
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
    """In a child: kill all that it started, and itself, once the benchmark is gone, however it went."""

    def kill_when_alone() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # else the group is somebody's shell
        threading.Thread(target=kill_when_alone, daemon=True).start()


class Child:
    """A Python program that prints lines, and ends when its standard input does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout

    def tell(self, line: str) -> None:
        """Write it a line."""
        self._stdin.write(f"{line}\n")
        self._stdin.flush()

    def hear(self, word: str) -> str:
        """The rest of its next line, which begins with that word.

        Raises:
            ChildFailed: it printed something else, or nothing.
        """
        watchdog = threading.Timer(PATIENCE, self.kill)
        watchdog.daemon = True  # an interrupt while it starts must not leave it to be waited for
        try:
            watchdog.start()
            line = self._stdout.readline()
        finally:
            watchdog.cancel()
        said, _, rest = line.strip().partition(" ")
        if said != word:
            raise ChildFailed(f"a child should have said {word!r}, but said {line!r}")
        return rest

    def kill(self) -> None:
        """``kill -9`` it."""
        self._process.kill()


@contextmanager
def talking(*args: str) -> Iterator[Child]:
    """A :class:`Child` for the time of the block."""
    with _started(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Child(process)
