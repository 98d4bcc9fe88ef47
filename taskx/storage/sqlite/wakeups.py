"""Wake-ups between the processes on one file: a named pipe for each listener, in the folder of the nodes.

Whoever commits something that others may wait for writes a byte into their pipes. Nobody depends on it, as
each process polls, too. So whatever goes wrong here is passed over.
"""

from __future__ import annotations

import errno
import os
import select
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import compress

from taskx.core import lifecycle
from taskx.core.ids import new_id
from taskx.core.writes import Write
from taskx.storage.base import Listener
from taskx.storage.sqlite.file import DatabaseFile

#: Seconds between two looks for listeners.
LOOK_EVERY = 0.01
_EXTENSION = ".pipe"
_MOST_READ = 4096
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW if hasattr(os, "mkfifo") else 0


class Pipe(Listener):
    """The pipe of one listener, and of one thread at a time; any thread may close it.

    Its name says which news its process listens for.
    """

    def __init__(self, folder: str, name: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self._process = os.getpid()
        self._path = os.path.join(folder, f"{name}{_EXTENSION}")
        made = os.path.join(folder, f"{name}.new")
        os.mkfifo(made)
        try:
            # For writing, too: else it would be at its end whenever nobody else has it open.
            self._fd = os.open(made, os.O_RDWR | _FLAGS)
            # A thread may wait at it when it is closed, or when the program ends. So its number is given up
            # with the last reference: another file may have it at once.
            self._give_up = weakref.finalize(self, os.close, self._fd)
            self._give_up.atexit = False
            weakref.finalize(self, _unlink, self._path, self._process)
            # Only now: if nobody reads a pipe of such a name, its process is dead.
            os.rename(made, self._path)
        except BaseException:
            os.unlink(made)
            raise

    def wait(self, timeout: float | None = None) -> str:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return ""
        with suppress(BlockingIOError):
            return os.read(self._fd, _MOST_READ).decode("ascii", "replace")
        return ""

    def drop(self) -> None:
        """In a forked child: close one's copy, and leave the parent's alone."""
        self._give_up()

    def close(self) -> None:
        if not self._give_up.alive:
            return
        _unlink(self._path, self._process)
        with suppress(OSError):  # it is full, so that nobody waits
            os.write(self._fd, b"\n")


class Wakeups:
    """Makes this process's pipes, and writes into those of others."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._made: weakref.WeakSet[Pipe] = weakref.WeakSet()
        self.renew_after_fork()

    def renew_after_fork(self) -> None:
        """Have pipes of one's own in a forked child."""
        for pipe in list(self._made):
            pipe.drop()
        self._made = weakref.WeakSet()
        self._own = new_id()  # the names of one's own pipes begin so
        self._look_at = 0.0
        self._pipes: Sequence[tuple[str, str]] = ()  # those of others, and what they listen for

    def listen(self, news: str) -> Listener | None:
        """Return a listener for some kinds of news; None where pipes cannot be made."""
        if not _FLAGS:
            return None
        try:
            pipe = Pipe(self._file.folder, f"{self._own}-{new_id()}.{news}")
        except OSError:
            return None
        self._made.add(pipe)
        self._remove_dead()
        return pipe

    def send(self, writes: Sequence[Write], results: Sequence[bool], *, to_own: bool) -> None:
        """Tell those who listen of writes that were committed, if their guards held."""
        stale = (now := time.monotonic()) >= self._look_at
        if not (stale or self._pipes):
            return
        news = {*map(lifecycle.news, compress(writes, results))} - {""}
        if news and stale:  # just before it tells: who began to listen a moment ago hears it
            self._pipes = [*self._others(to_own=to_own)]
            self._look_at = now + LOOK_EVERY
        for path, wanted in self._pipes:
            if heard := news.intersection(wanted):
                _write(path, "".join(heard).encode())

    def _others(self, *, to_own: bool = False) -> Iterator[tuple[str, str]]:
        """The paths of the pipes of others, and what they listen for."""
        folder = self._file.folder
        with suppress(OSError):  # no folder
            for name in os.listdir(folder):
                if name.endswith(_EXTENSION) and (to_own or not name.startswith(self._own)):
                    _, _, wanted = name.removesuffix(_EXTENSION).rpartition(".")
                    yield os.path.join(folder, name), wanted

    def _remove_dead(self) -> None:
        """Remove the pipes of dead processes: nobody has them open for reading."""
        for path, _ in self._others():
            try:
                os.close(os.open(path, os.O_WRONLY | _FLAGS))
            except OSError as error:
                if error.errno == errno.ENXIO:
                    with suppress(OSError):
                        os.unlink(path)


def _write(path: str, heard: bytes) -> None:
    # It may be gone, not ours to write to, or full: then it is read in any case.
    with suppress(OSError):
        # For reading, too: with no reader left, a write would raise SIGPIPE.
        fd = os.open(path, os.O_RDWR | _FLAGS)
        try:
            os.write(fd, heard)
        finally:
            os.close(fd)


def _unlink(path: str, process: int) -> None:
    """Remove a pipe, unless it is that of the parent of a forked child."""
    if os.getpid() == process:
        with suppress(OSError):
            os.unlink(path)
