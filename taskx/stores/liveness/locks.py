"""Locks that the kernel releases when the process of a node dies.

Liveness does not depend on an age, a host name or a process id: a stopped or overloaded process still
holds its lock, and a dead one does not. The locks are ``flock`` locks on one small file per node, in a
folder. A lock belongs to the open file description, which a forked child shares. So a child closes its
copies at once, which unlocks nothing.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from taskx.stores.liveness.base import PREFIX, Node, Own, Recorded, Store, described
from taskx.stores.liveness.began import Began, boot
from taskx.tasks.errors import RepositoryError, RepositoryUnavailable
from taskx.tasks.timing import DEFAULT_TIMING

try:
    import fcntl
except ImportError:  # not a POSIX system: the liveness of a node is unknown there
    fcntl = None  # type: ignore[assignment]

#: The most lock files that are checked, and open, at a time.
MOST_ORPHANS = 100

_held: dict[str, int] = {}


class NodeLocks:
    """The lock files of nodes in one folder.

    A new node waits at most ``patience`` seconds for a process that locked its file to check if it is an
    orphan.
    """

    def __init__(self, folder: str, patience: float = DEFAULT_TIMING.orphan_within) -> None:
        self.folder = folder
        self._patience = patience

    def _path(self, node: str, kind: str = "lock") -> str:
        return os.path.join(self.folder, f"{node}.{kind}")

    def hold(self, node: str, file: int = 0) -> int:
        """Take a new node's lock, until :meth:`release` or process death; return its inode.

        ``file`` is the inode of the database that will record the node.
        """
        if fcntl is None:
            return 0
        try:
            os.makedirs(self.folder, exist_ok=True)
            fd = self._new_lock(self._path(node))
        except BlockingIOError as error:
            raise RepositoryUnavailable(
                f"cannot lock {self._path(node)}: another process holds the lock; try again"
            ) from error
        except OSError as error:
            raise RepositoryUnavailable(
                f"cannot create a lock file in {self.folder} ({error}): TaskX requires a local file "
                "system and a folder that this user can write to"
            ) from error
        _held[node] = fd
        with suppress(OSError):  # the disk is full: recording the node will fail, too
            os.write(fd, str(file).encode())
        return os.fstat(fd).st_ino

    def _new_lock(self, path: str) -> int:
        """Create and lock a file; try again if a process that clears orphans removed it in between."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fd = _locked(path, os.O_CREAT | os.O_RDWR)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
                continue
            if _is_at(path, fd):
                return fd
            os.close(fd)

    def alive(self, node: str, inode: int) -> bool | None:
        """Return True if the process of a node lives, and False if it is dead.

        Return None if that is unknown: the lock file is gone, was replaced, or cannot be read.
        """
        if fcntl is None:
            return None
        try:
            # Another user may have permission only to read, which is enough for a shared lock.
            fd = os.open(self._path(node), os.O_RDONLY | os.O_CLOEXEC)
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

    def clear_orphans(self, file: int, recorded: Callable[[], set[str]]) -> None:
        """Remove lock files of processes that died just before they recorded a node, or just after.

        No process holds the lock of such a file, and the database that it names has no record of its node.
        A node records itself only while it holds its lock, and only after it checked that the file is still
        there. So a process that holds the lock and finds no record may remove the file. ``recorded``
        returns the names that have a record or belong to no node.
        """
        if fcntl is None:
            return
        locked: dict[str, int] = {}
        try:
            for node in sorted(self._named() - recorded())[:MOST_ORPHANS]:
                with suppress(OSError):  # a process holds the lock, or the file is gone
                    locked[node] = _locked(self._path(node))
            still = recorded() if locked else set()
            for node in locked.keys() - still:
                fd = locked[node]
                # The file is empty if the process died before it wrote the inode.
                if os.read(fd, 32) in (b"", str(file).encode()) and _is_at(self._path(node), fd):
                    self._remove(node)
        finally:
            for fd in locked.values():
                os.close(fd)

    def held(self) -> bool:
        """Return True if a process holds a lock of the folder: that of a node, or another one."""
        for name in self._named() if fcntl is not None else ():
            try:
                os.close(_locked(self._path(name)))
            except BlockingIOError:
                return True
            except OSError:  # the file is gone, or another user's
                continue
        return False

    def _named(self) -> set[str]:
        """Return the names that have a lock file."""
        with suppress(OSError):  # no permission to read the folder
            parts = map(os.path.splitext, os.listdir(self.folder))
            return {name for name, extension in parts if extension == ".lock"}
        return set()

    def began(self, node: str) -> Began | None:
        """Return the tasks that a node's threads began last; writable for a node of this process."""
        path = self._path(node, "began")
        return Began.make(path) if node in _held else Began.read(path)

    def release(self, node: str) -> None:
        """Release the lock of a node of this process and remove its files, or those of a dead node."""
        self._remove(node)
        self.let_go(node)

    def _remove(self, node: str) -> None:
        # The lock file last: while it exists, the next node that joins finds the remaining files.
        for path in (self._path(node, "began"), self._path(node)):
            with suppress(OSError):  # gone already, or in another user's folder
                os.unlink(path)

    def let_go(self, node: str) -> None:
        """Release the lock of a node of this process and keep the file: the node counts as dead."""
        fd = _held.pop(node, None)
        if fd is not None:
            os.close(fd)


class HostLocks:
    """The lock files of this user's nodes on this host, for stores that several hosts share.

    The record of a node names the folder of its lock file, with the machine and its boot. If that is a
    different folder (another host, another container), the liveness of the node is unknown. ``folder`` is
    the folder for the lock files; the default is a folder of this user among the temporary ones.
    """

    def __init__(self, folder: str | None, patience: float = DEFAULT_TIMING.orphan_within) -> None:
        self._given = folder
        self._patience = patience
        self._opened: tuple[NodeLocks, str] | None = None

    def hold(self, node: str) -> tuple[str, int]:
        """Take a new node's lock; return this host's id and the lock's inode, or ``("", 0)`` on failure."""
        try:
            locks, host = self._open()
            return host, locks.hold(node)
        except (OSError, RepositoryUnavailable):
            return "", 0

    def alive(self, node: str, host: str, inode: int) -> bool | None:
        """Return True if the process of a node lives, False if it is dead, None if that is unknown here."""
        with suppress(OSError):
            if inode and (opened := self._open())[1] == host:
                return opened[0].alive(node, inode)
        return None

    def began(self, node: str) -> Began | None:
        """Return the tasks that the threads of a node on this host began last."""
        with suppress(OSError):
            return self._open()[0].began(node)
        return None

    def release(self, node: str) -> None:
        """Release the lock of a node of this process and remove its files, or those of a dead node here."""
        if self._opened is not None:
            self._opened[0].release(node)

    def _open(self) -> tuple[NodeLocks, str]:
        if self._opened is None:
            if fcntl is None:
                raise OSError("this system has no flock")
            base = os.path.abspath(self._given) if self._given else _private_folder()
            locks = NodeLocks(os.path.join(base, "nodes"), self._patience)
            os.makedirs(locks.folder, exist_ok=True)
            seen = os.stat(locks.folder)
            self._opened = locks, f"{_boot_id()} {seen.st_dev} {seen.st_ino}"
        return self._opened


class KernelLocks(Recorded[Own]):
    """The strategy that uses locks: a node lives as long as its process holds its lock.

    ``place`` returns the folder of the lock files and the inode of the file that the nodes share. The inode
    is known after notes were read, which opens that file. ``others`` are the names of lock files that do
    not belong to nodes.
    """

    def __init__(
        self,
        store: Store,
        place: Callable[[], tuple[str, int]],
        others: Collection[str],
        patience: float,
    ) -> None:
        super().__init__(store)
        self._patience = patience
        self._place = place
        self._others = others

    @property
    def _locks(self) -> NodeLocks:
        return NodeLocks(self._place()[0], self._patience)

    def join(self, node: Node, *, tended: bool = False) -> None:
        self._on_record()
        _, file = self._place()
        lock = self._locks.hold(node.id, file)
        own = Own(node, {"file": file, "lock": lock, "boot": boot()})
        try:
            self._write(node.id, own)
            self._own[node.id] = own
        except BaseException:
            self._own.pop(node.id, None)
            self._locks.release(node.id)
            raise
        with suppress(RepositoryError):  # the next node that joins does it
            self._locks.clear_orphans(file, lambda: {*self._others, *self._on_record()})

    def leave(self, node: str) -> None:
        try:
            self._remove(node)
        except BaseException:
            self._locks.let_go(node)  # still recorded, the node counts as dead from now on
            raise
        self._locks.release(node)

    def began(self, node: str) -> Began | None:
        return self._locks.began(node)

    def nodes(self) -> Sequence[Node]:
        """Return all recorded nodes. Those of an earlier boot are dead.

        In a copy of a database file, those of the original are dead, too. But a node that holds its lock in
        this folder lives: the copy has replaced the original.
        """
        nodes = []
        for name, note in sorted(self._store.notes(PREFIX).items()):
            facts = json.loads(note.text)
            nodes.append(described(name, facts, self._alive(name, facts)))
        if any(node.alive is None for node in nodes):
            # A node that leaves removes its record before its lock file.
            still = self._on_record()
            nodes = [node for node in nodes if node.alive is not None or node.id in still]
        return nodes

    def _alive(self, name: str, facts: dict[str, Any]) -> bool | None:
        alive = self._locks.alive(name.removeprefix(PREFIX), facts["lock"])
        if alive is not None:
            return alive
        # A power cut may have kept the record, and not the lock file, which is never synced.
        here = facts["file"] == self._place()[1] and facts.get("boot", boot()) == boot()
        return None if here else False

    def _on_record(self) -> set[str]:
        return {name.removeprefix(PREFIX) for name in self._store.notes(PREFIX)}


def _locked(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file and lock it; raise ``BlockingIOError`` if another process holds the lock."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_at(path: str, fd: int) -> bool:
    """Return True if an open file is still the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _private_folder() -> str:
    """Return a folder that only this user can write to; raise ``OSError`` if others can."""
    import tempfile  # not needed if the lock files are next to a database file

    folder = os.path.join(tempfile.gettempdir(), f"taskx-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    seen = os.lstat(folder)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        raise OSError(f"{folder} must be a folder that only this user can write to")
    return folder


def _boot_id() -> str:
    """Return an id of this boot of this machine; raise ``OSError`` if the system is not Linux."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _drop_in_child() -> None:
    for fd in _held.values():
        os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
