"""Locks that the kernel releases when the process of a node dies.

Never an age, never a host name or process id: a stopped or overloaded process still holds its lock,
and a dead one does not. The locks are ``flock`` locks on one small file per node, in a folder. A lock
belongs to the open file description, which a forked child shares; so a child closes its copies at once,
which unlocks nothing.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from taskx.core.errors import RepositoryError, RepositoryUnavailable
from taskx.liveness.base import PREFIX, Node, Own, Recorded, Store, described
from taskx.liveness.began import Began

try:
    import fcntl
except ImportError:  # not a POSIX system: whether a node lives can't be told there
    fcntl = None  # type: ignore[assignment]

#: Seconds that a new node waits for a process that holds its lock file to see whether it is orphaned.
PATIENCE = 1.0
#: Most lock files that are checked together; each is open meanwhile.
MOST_ORPHANS = 100

_held: dict[str, int] = {}


class NodeLocks:
    """The lock files of nodes in one folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def _path(self, node: str, kind: str = "lock") -> str:
        return os.path.join(self.folder, f"{node}.{kind}")

    def hold(self, node: str, file: int = 0) -> int:
        """Take a new node's lock, until :meth:`release` or process death; return its inode.

        ``file`` is the inode of the database that the node is to be recorded in.
        """
        if fcntl is None:
            return 0
        try:
            os.makedirs(self.folder, exist_ok=True)
            fd = self._new_lock(self._path(node))
        except BlockingIOError as error:
            raise RepositoryUnavailable(
                f"{self._path(node)} cannot be locked: another process holds the lock; try again"
            ) from error
        except OSError as error:
            raise RepositoryUnavailable(
                f"no lock file can be made in {self.folder} ({error}): TaskX needs a local file system, "
                "and a folder that this user may write to"
            ) from error
        _held[node] = fd
        with suppress(OSError):  # no room: then the record, too, will fail
            os.write(fd, str(file).encode())
        return os.fstat(fd).st_ino

    def _new_lock(self, path: str) -> int:
        """Make and lock a file; try again where one who clears orphans away came between."""
        deadline = time.monotonic() + PATIENCE
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
        """Return whether the process of a node lives.

        None if that is unknown: its lock file is gone, was replaced, or must not be read.
        """
        if fcntl is None:
            return None
        try:
            # Another user may only be allowed to read; that is enough for a shared lock.
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
        """Remove the lock files of processes that died just before they recorded a node, or just after.

        Such a lock file is locked by nobody, and no record of the database that it names is about it. A
        node records itself only while it holds its lock, and makes sure that the file is still there when
        it has the lock. So whoever holds the lock and finds no record may remove the file.
        ``recorded`` reads the names that have a record, or are no node's.
        """
        if fcntl is None:
            return
        locked: dict[str, int] = {}
        try:
            for node in sorted(self._named() - recorded())[:MOST_ORPHANS]:
                with suppress(OSError):  # somebody's, or gone meanwhile
                    locked[node] = _locked(self._path(node))
            still = recorded() if locked else set()
            for node in locked.keys() - still:
                fd = locked[node]
                # Nothing is written in it where the process died at once.
                if os.read(fd, 32) in (b"", str(file).encode()) and _is_at(self._path(node), fd):
                    self._remove(node)
        finally:
            for fd in locked.values():
                os.close(fd)

    def _named(self) -> set[str]:
        """The names that have a lock file."""
        with suppress(OSError):  # it may not be read
            parts = map(os.path.splitext, os.listdir(self.folder))
            return {name for name, extension in parts if extension == ".lock"}
        return set()

    def began(self, node: str) -> Began | None:
        """Return the tasks that a node's threads began last: writable for a node of this process."""
        path = self._path(node, "began")
        return Began.make(path) if node in _held else Began.read(path)

    def release(self, node: str) -> None:
        """Give up one's own lock, or clear away a dead node's files."""
        self._remove(node)
        self.let_go(node)

    def _remove(self, node: str) -> None:
        # The lock file last: as long as it is there, the next node that joins sees what is left.
        for path in (self._path(node, "began"), self._path(node)):
            with suppress(OSError):  # gone already, or in another user's folder
                os.unlink(path)

    def let_go(self, node: str) -> None:
        """Give up one's own lock and leave the file: the node counts as dead."""
        fd = _held.pop(node, None)
        if fd is not None:
            os.close(fd)


class HostLocks:
    """The lock files of this user's nodes on this host, where nodes may be on several.

    A node's record says which folder on which boot of which machine its lock file is in. Where that is
    another one (another host, another container) nothing is told. They are in a folder of this user's among
    the temporary ones unless ``folder`` is given.
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
        """Give up one's own lock, or clear away that of a dead node of this host."""
        if self._opened is not None:
            self._opened[0].release(node)

    def _open(self) -> tuple[NodeLocks, str]:
        if self._opened is None:
            base = os.path.abspath(self._given) if self._given else _private_folder()
            locks = NodeLocks(os.path.join(base, "nodes"))
            os.makedirs(locks.folder, exist_ok=True)
            seen = os.stat(locks.folder)
            self._opened = locks, f"{_boot_id()} {seen.st_dev} {seen.st_ino}"
        return self._opened


class KernelLocks(Recorded[Own]):
    """Nodes that live as long as their processes hold their locks.

    ``place`` returns the folder of lock files, and the inode of the file that nodes share: known once notes
    were read, which opens that file. ``others`` are the names of lock files that are no node's.
    """

    def __init__(
        self, store: Store, place: Callable[[], tuple[str, int]], others: Collection[str]
    ) -> None:
        super().__init__(store)
        self._place = place
        self._others = others

    @property
    def _locks(self) -> NodeLocks:
        return NodeLocks(self._place()[0])

    def join(self, node: Node) -> None:
        self._on_record()
        _, file = self._place()
        own = Own(node, {"file": file, "lock": self._locks.hold(node.id, file)})
        try:
            self._write(node.id, own)
            self._own[node.id] = own
        except BaseException:
            self._own.pop(node.id, None)
            self._locks.release(node.id)
            raise
        with suppress(RepositoryError):  # the next node does it
            self._locks.clear_orphans(file, lambda: {*self._others, *self._on_record()})

    def leave(self, node: str) -> None:
        try:
            self._remove(node)
        except BaseException:
            self._locks.let_go(node)  # still on record, it is a dead one from now on
            raise
        self._locks.release(node)

    def began(self, node: str) -> Began | None:
        return self._locks.began(node)

    def nodes(self) -> Sequence[Node]:
        """Return all recorded nodes. In a copy of a file, the nodes of the original are dead.

        A node that holds its lock beside this file lives: the copy was put in the original's place.
        """
        nodes = []
        for name, note in sorted(self._store.notes(PREFIX).items()):
            facts = json.loads(note.text)
            nodes.append(described(name, facts, self._alive(name, facts)))
        if any(node.alive is None for node in nodes):
            # One that leaves goes from the record before its lock file goes.
            still = self._on_record()
            nodes = [node for node in nodes if node.alive is not None or node.id in still]
        return nodes

    def _alive(self, name: str, facts: dict[str, Any]) -> bool | None:
        alive = self._locks.alive(name.removeprefix(PREFIX), facts["lock"])
        return False if alive is None and facts["file"] != self._place()[1] else alive

    def _on_record(self) -> set[str]:
        return {name.removeprefix(PREFIX) for name in self._store.notes(PREFIX)}


def _locked(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file and lock it; ``BlockingIOError`` if somebody holds the lock."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_at(path: str, fd: int) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _private_folder() -> str:
    """A folder that only this user can write to; ``OSError``: another user's is in its place."""
    import tempfile  # not needed where the lock files are beside a file

    folder = os.path.join(tempfile.gettempdir(), f"taskx-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    seen = os.lstat(folder)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        raise OSError(f"{folder} is not this user's alone")
    return folder


def _boot_id() -> str:
    """Which boot of which machine this is; ``OSError``: the system does not say, as it is no Linux."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _drop_in_child() -> None:
    for fd in _held.values():
        os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
