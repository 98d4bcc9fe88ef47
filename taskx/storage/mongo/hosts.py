"""Locks by which nodes of one host tell at once that another one died.

The technique is that of the SQLite repository: a lock that the kernel releases at process death. Here
the lock files are in a folder of this host's, and a node's record says which folder on which boot of
which machine that was. Where that is another one (another host, another container) nothing is told.
"""

from __future__ import annotations

import os
import stat
import tempfile

from taskx.core.errors import RepositoryUnavailable
from taskx.storage.began import Began
from taskx.storage.sqlite.liveness import NodeLocks


class HostLocks:
    """The lock files of this user's nodes on this host.

    Args:
        folder: where they are; a folder of this user's among the temporary ones unless given.
    """

    def __init__(self, folder: str | None) -> None:
        self._given = folder
        self._opened: tuple[NodeLocks, str] | None = None

    def hold(self, node: str) -> tuple[str, int]:
        """Take a new node's lock; says which host this is, and the lock's inode. Empty where it can't."""
        try:
            locks, host = self._open()
            return host, locks.hold(node)
        except (OSError, RepositoryUnavailable):
            return "", 0

    def alive(self, node: str, host: str, inode: int) -> bool | None:
        """Whether the process of a node lives; None where that cannot be told here."""
        if not inode:
            return None
        try:
            locks, here = self._open()
        except OSError:
            return None
        return locks.alive(node, inode) if host == here else None

    def began(self, node: str) -> Began | None:
        """Return the tasks that the threads of a node on this host began last."""
        try:
            return self._open()[0].began(node)
        except OSError:
            return None

    def release(self, node: str) -> None:
        """Give up one's own lock, or clear away that of a dead node of this host."""
        if self._opened is not None:
            self._opened[0].release(node)

    def _open(self) -> tuple[NodeLocks, str]:
        if self._opened is None:
            base = os.path.abspath(self._given) if self._given else _private_folder()
            locks = NodeLocks(os.path.join(base, "mongo"))
            os.makedirs(locks.folder, exist_ok=True)
            seen = os.stat(locks.folder)
            self._opened = locks, f"{_boot_id()} {seen.st_dev} {seen.st_ino}"
        return self._opened


def _private_folder() -> str:
    """A folder that only this user can write to.

    Raises:
        OSError: another user's folder is in its place.
    """
    folder = os.path.join(tempfile.gettempdir(), f"taskx-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    seen = os.lstat(folder)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        raise OSError(f"{folder} is not this user's alone")
    return folder


def _boot_id() -> str:
    """Which boot of which machine this is.

    Raises:
        OSError: the system does not say (it is no Linux); then nothing can be told.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
