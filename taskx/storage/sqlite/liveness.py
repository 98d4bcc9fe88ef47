"""Which nodes live: each holds a lock that the kernel releases when its process dies.

Never an age, never a host name or process id: a stopped or overloaded process still holds its lock,
and a dead one does not. The locks are ``flock`` locks on one small file per node, in a folder beside
the database. A lock belongs to the open file description, which a forked child shares; so a child
closes its copies at once, which unlocks nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress

from taskx.core.errors import RepositoryUnavailable

try:
    import fcntl
except ImportError:  # not a POSIX system: whether a node lives can't be told there
    fcntl = None  # type: ignore[assignment]

_held: dict[str, int] = {}


class NodeLocks:
    """The lock files of the nodes on one database file."""

    def __init__(self, database: str) -> None:
        self.folder = f"{os.path.abspath(database)}-nodes"

    def _path(self, node: str) -> str:
        return os.path.join(self.folder, f"{node}.lock")

    def hold(self, node: str) -> int:
        """Take a new node's lock, until :meth:`release` or process death; returns its inode."""
        if fcntl is None:
            return 0
        try:
            os.makedirs(self.folder, exist_ok=True)
            fd = os.open(self._path(node), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RepositoryUnavailable(f"no lock file in {self.folder}: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise RepositoryUnavailable(
                f"{self._path(node)} cannot be locked ({error}); TaskX needs a local file system"
            ) from error
        _held[node] = fd
        return os.fstat(fd).st_ino

    def alive(self, node: str, inode: int) -> bool | None:
        """Whether the process of a node lives; None where its lock file is gone or another's."""
        if fcntl is None:
            return None
        try:
            fd = os.open(self._path(node), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(fd).st_ino != inode:
                return None
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(fd)
        return False

    def release(self, node: str) -> None:
        """Give up one's own lock, or clear away a dead node's file."""
        with suppress(OSError):  # gone already: another process cleared it away
            os.unlink(self._path(node))
        self.let_go(node)

    def let_go(self, node: str) -> None:
        """Give up one's own lock and leave the file: the node counts as dead."""
        fd = _held.pop(node, None)
        if fd is not None:
            os.close(fd)


def _drop_in_child() -> None:
    for fd in _held.values():
        os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
