"""Wake-ups between the processes on one file: a named pipe for each listener, in the folder of the nodes.

A process that commits something others may wait for writes a byte into their pipes. No process depends on
it, as each one also polls. So errors here are ignored.
"""

from __future__ import annotations

import errno
import os
import select
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from taskx.stores.parts import Listener
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks import lifecycle
from taskx.tasks.ids import new_id
from taskx.tasks.in_use import InUse
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Write

_EXTENSION = ".pipe"
_MOST_READ = 4096
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW if hasattr(os, "mkfifo") else 0


class Pipe(Listener):
    """The pipe of one listener. One thread waits at a time; any thread may close it.

    The end of the pipe's name holds the kinds of news that its process listens for.
    """

    def __init__(self, folder: str, name: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self._process = os.getpid()
        self._path = os.path.join(folder, f"{name}{_EXTENSION}")
        made = os.path.join(folder, f"{name}.new")
        os.mkfifo(made)
        try:
            # Also for writing: otherwise a reader sees the end of file while no other process has it open.
            self._fd = os.open(made, os.O_RDWR | _FLAGS)
            # A thread may wait on the pipe when it is closed or when the program ends. So the descriptor is
            # closed with the last reference only: another file may get its number at once.
            self._close_fd = weakref.finalize(self, os.close, self._fd)
            self._close_fd.atexit = False
            weakref.finalize(self, _unlink, self._path, self._process)
            # Renamed last: a pipe of this name that no process has open for reading is a dead one's.
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
        """Close, in a forked child, its copy of the pipe. The parent's stays open."""
        self._close_fd()

    def close(self) -> None:
        if not self._close_fd.alive:
            return
        _unlink(self._path, self._process)
        with suppress(OSError):  # it is full, so no thread is waiting
            os.write(self._fd, b"\n")


class Wakeups:
    """The pipes of this process, and a sender that writes into the pipes of others."""

    def __init__(self, file: DatabaseFile, timing: Timing) -> None:
        self._file = file
        self._every = timing.listeners_every
        self._made = InUse[Pipe]()
        self.renew_after_fork()

    def renew_after_fork(self) -> None:
        """Start over, in a forked child, without the parent's pipes."""
        for pipe in self._made:
            pipe.drop()
        self._made = InUse()
        # The prefix of the names of this process's pipes. No new id: at the fork, another thread of the
        # parent may have been making one, and the child would wait for its lock.
        self._own = os.urandom(8).hex()
        self._scan_at = 0.0
        self._pipes: Sequence[tuple[str, str]] = ()  # others' pipes, and what they listen for

    def listen(self, news: str) -> Listener | None:
        """Return a listener for some kinds of news, or None if pipes cannot be created."""
        if not _FLAGS:
            return None
        try:
            pipe = Pipe(self._file.folder, f"{self._own}-{new_id()}.{news}")
        except OSError:
            return None
        self._made.add(pipe)
        self._remove_dead()
        return pipe

    def send(self, writes: Sequence[Write], to_own: Callable[[], bool]) -> None:
        """Tell the listeners of committed writes; also those of this process if ``to_own`` says so."""
        stale = (now := time.monotonic()) >= self._scan_at
        if not (stale or self._pipes):
            return
        news = lifecycle.news_of(writes)
        if news and stale:  # just before sending, so that the newest listeners are included
            self._pipes = [*self._others(to_own=to_own())]
            self._scan_at = now + self._every
        for path, wanted in self._pipes:
            if heard := news.intersection(wanted):
                _write(path, "".join(heard).encode())

    def _others(self, *, to_own: bool = False) -> Iterator[tuple[str, str]]:
        """Yield the paths of others' pipes, and what they listen for."""
        folder = self._file.folder
        with suppress(OSError):  # the folder does not exist
            for name in os.listdir(folder):
                if name.endswith(_EXTENSION) and (to_own or not name.startswith(self._own)):
                    _, _, wanted = name.removesuffix(_EXTENSION).rpartition(".")
                    yield os.path.join(folder, name), wanted

    def _remove_dead(self) -> None:
        """Remove the pipes of dead processes, which no process has open for reading."""
        for path, _ in self._others():
            try:
                os.close(os.open(path, os.O_WRONLY | _FLAGS))
            except OSError as error:
                if error.errno == errno.ENXIO:
                    with suppress(OSError):
                        os.unlink(path)


def _write(path: str, heard: bytes) -> None:
    # The pipe may be gone, belong to another user, or be full. If it is full, its owner wakes up anyway.
    with suppress(OSError):
        # Also for reading: a write to a pipe without a reader would raise SIGPIPE.
        fd = os.open(path, os.O_RDWR | _FLAGS)
        try:
            os.write(fd, heard)
        finally:
            os.close(fd)


def _unlink(path: str, process: int) -> None:
    """Remove a pipe, unless this process is a forked child and the pipe is its parent's."""
    if os.getpid() == process:
        with suppress(OSError):
            os.unlink(path)
