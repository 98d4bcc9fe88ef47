"""The examination of a SQLite file: its permissions, its disk and its locks. It changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from taskx.stores.sqlite import schema
from taskx.stores.sqlite.connections import MINIMUM_SQLITE, require_log, unwritable
from taskx.stores.sqlite.file import DatabaseFile
from taskx.stores.sqlite.schema import Schema
from taskx.stores.sqlite.turnstile import NAMES
from taskx.tasks.errors import TaskxError
from taskx.tasks.findings import Check, Problem, fail, ok, warn

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

#: Free bytes below which tasks may soon not be stored, and below which there is a warning.
_LEAST_FREE, _FEW_FREE = 64 << 20, 1 << 30
#: Bytes of a write-ahead log that a reader must be holding back.
LARGE_LOG = 256 << 20

# File systems on which the locks of several hosts do not work, or not at once.
_NETWORK = re.compile(
    "(nfs4?|cifs|smb[23]|smbfs|9p|afs|ceph|glusterfs|lustre|beegfs|gpfs|ocfs2|gfs2|virtiofs|ncpfs|"
    "fuse[.](sshfs|s3fs|glusterfs|ceph|rclone|gcsfuse))"
)
_IN_MEMORY = ("tmpfs", "ramfs")
_CREATES = "The first program that submits a task creates the file"


def examine(file: DatabaseFile, tables: Schema, patience: float) -> Iterator[Check]:
    """Yield what is right and wrong with a file. It is not created, migrated or changed.

    The check of the contents, and the wait for the write lock, take at most ``patience`` seconds.
    """
    path = os.path.realpath(file.path)
    yield _library()
    yield from _folder(path)
    yield disk(path)
    if (system := _file_system(path)) is not None:
        yield system
    found = _file(path, "The application creates it" if tables.prefix else _CREATES)
    yield found
    if found.level == "fail":
        return
    yield _permissions(path, file.folder)
    yield _log(path)
    yield from _contents(path, tables, patience)
    if (locks := _locks(file.folder)) is not None:
        yield locks


def _library() -> Check:
    version, least = sqlite3.sqlite_version, ".".join(map(str, MINIMUM_SQLITE[:2]))
    if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
        return fail(
            "sqlite",
            f"Python uses SQLite {version}, which is too old.",
            f"Use a Python with SQLite {least} or later.",
            version=version,
        )
    return ok("sqlite", f"Python uses SQLite {version}.", version=version)


def _folder(path: str) -> Iterator[Check]:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        yield fail("folder", f"There is no folder {folder}.", "Create it, or check the path.")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield fail(
            "folder",
            f"This user cannot write to {folder}.",
            "SQLite creates its log there: give this user write access to the folder.",
        )


def full_disk(path: str) -> Iterator[Problem]:
    """Yield a problem if the disk of a file is full, or nearly so."""
    with suppress(OSError):  # other checks tell of a folder that cannot be read
        if (found := disk(path)).level == "fail":
            yield Problem("disk", str(found), found.facts)


def disk(path: str) -> Check:
    """Return how full the disk of a file is."""
    folder = os.path.dirname(path)
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    inodes = os.statvfs(folder)
    words, advice = f"{_amount(free)} are free on the disk of {folder}.", "Free some space."
    if free < _LEAST_FREE:
        return fail("disk", words, f"{advice} Soon no task can be stored.", free=free)
    if inodes.f_files and not inodes.f_favail:
        words = f"The disk of {folder} has no free inode."
        return fail("disk", words, "Delete some files.", free=free)
    size = _size(path)
    if free < size:
        advice = f"{advice} A copy of the file ({_amount(size)}) does not fit."
    if free < max(_FEW_FREE, size):
        return warn("disk", words, advice, free=free)
    return ok("disk", words, free=free)


def _file_system(path: str) -> Check | None:
    kind = file_system_of(path)
    if kind is None:
        return None
    words = f"{path} is on a file system of the type {kind}."
    if _NETWORK.fullmatch(kind):
        return warn(
            "file system",
            words,
            "Locks on network file systems fail, which damages the file: move it to a local disk, and use "
            "MongoDB for several hosts.",
            type=kind,
        )
    if kind in _IN_MEMORY:
        return warn(
            "file system",
            words,
            "It is in memory: a restart of the machine loses all tasks.",
            type=kind,
        )
    if kind in ("overlay", "aufs"):
        return warn(
            "file system",
            words,
            "It is in a container, and is lost with it: put the file on a volume.",
            type=kind,
        )
    return ok("file system", words, type=kind)


def file_system_of(path: str, mounts: str = "/proc/self/mounts") -> str | None:
    """Return the type of the file system of a path; None if the system does not tell."""
    best, kind = -1, None
    with suppress(OSError), open(mounts, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            _, point, found, *_ = line.split(" ")
            point = point.replace("\\040", " ").rstrip("/")
            inside = path == point or path.startswith(f"{point}/")
            if inside and len(point) >= best:  # of two mounts on one point, the later counts
                best, kind = len(point), found
    return kind


def _file(path: str, creates: str) -> Check:
    try:
        seen = os.stat(path)
    except FileNotFoundError:
        return fail(
            "file",
            f"There is no file {path}.",
            f"Check the path. {creates}.",
        )
    except OSError as error:
        return fail("file", f"{path} cannot be accessed: {error}.", "Check the permissions.")
    if not stat.S_ISREG(seen.st_mode):
        return fail("file", f"{path} is not a file.", "Check the path.")
    if not os.access(path, os.R_OK):
        return fail("file", f"This user cannot read {path}.", "Give it access.")
    if seen.st_size == 0:
        return warn(
            "file", f"{path} is empty.", "Check the path. A program that opens it fills it."
        )
    return ok("file", f"{path} has {_amount(seen.st_size)}.", path=path, size=seen.st_size)


def _permissions(path: str, folder: str) -> Check:
    own, strange = os.stat(path).st_uid, []
    for each in (path, f"{path}-wal", f"{path}-shm", folder):
        with suppress(FileNotFoundError):
            owner = os.stat(each).st_uid
            if not os.access(each, os.W_OK):
                return fail(
                    "permissions",
                    f"This user cannot write to {each}.",
                    "Give this user write access, or run as the user of the other processes.",
                )
            if owner != own:
                strange.append(each)
    if strange:
        return warn(
            "permissions",
            f"{' and '.join(strange)} and {path} belong to different users.",
            "Run all processes as one user, and change the owner of these files.",
        )
    return ok("permissions", "This user can read and write the file.")


def _log(path: str) -> Check:
    size = _size(f"{path}-wal")
    words = f"The write-ahead log has {_amount(size)}."
    if size > LARGE_LOG:
        return warn(
            "log",
            words,
            "A process that reads for a long time keeps it from being emptied: find it, for example with "
            f"fuser {path}, and end it.",
            size=size,
        )
    return ok("log", words, size=size)


def _contents(path: str, tables: Schema, patience: float) -> Iterator[Check]:
    """Yield the checks that need a connection."""
    if _size(path) == 0 and not tables.prefix:
        return
    try:
        # A read-only connection would leave an empty log behind where there is none.
        mode = "ro" if _size(f"{path}-wal") or not os.access(path, os.W_OK) else "rw"
        with closing(connect(path, mode, patience)) as connection:
            version = tables.check(connection, path)
            if tables.prefix:
                require_log(connection, path)
            yield _schema(version)
            yield _integrity(connection, path, patience)
    except TaskxError as error:
        yield fail("schema", f"{error}.", "")
        return
    except sqlite3.Error as error:
        folder = os.path.dirname(os.path.abspath(path))
        advice = "Check the path, or restore a backup."
        if not os.access(folder, os.W_OK):
            advice = f"{unwritable(folder)}: copy it to another folder."
        yield fail("file", f"SQLite cannot read {path}: {error}.", advice)
        return
    if version == schema.VERSION and os.access(path, os.W_OK):
        yield _write_lock(path, patience)


def connect(path: str, mode: str, patience: float) -> sqlite3.Connection:
    """Open a file in a mode of SQLite's URIs, such as ``rw``, which creates nothing."""
    return sqlite3.connect(address(path, mode), uri=True, timeout=patience, isolation_level=None)


def address(path: str, mode: str) -> str:
    """Return the URI of a file that is opened in a mode."""
    from urllib.parse import quote  # slow to load, and not needed to run tasks

    return f"file://{quote(os.fsencode(path))}?mode={mode}"


def _schema(version: int) -> Check:
    facts: dict[str, Any] = {"version": version, "known": schema.VERSION}
    if version == schema.VERSION:
        return ok("schema", f"The file has schema version {version}.", **facts)
    if not version:
        words = "The file has no tables of TaskX yet."
        return warn("schema", words, "Check the path. The first program makes them.", **facts)
    return warn(
        "schema",
        f"The file has schema version {version}, and this TaskX uses {schema.VERSION}.",
        "The next program of this TaskX migrates it: stop those of the older one first.",
        **facts,
    )


def _integrity(connection: sqlite3.Connection, path: str, patience: float) -> Check:
    deadline = time.monotonic() + patience
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        damage = [text for (text,) in connection.execute("PRAGMA quick_check(3)") if text != "ok"]
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        return ok(
            "integrity",
            f"The first {patience:g} s of a check found no damage; the file is too large for a whole one.",
            whole=False,
        )
    finally:
        connection.set_progress_handler(None, 0)
    if damage:
        return fail(
            "integrity",
            f"{path} is damaged: {'; '.join(damage)}.",
            "Stop all processes, keep a copy, and restore a backup.",
        )
    return ok("integrity", "SQLite finds no damage.", whole=True)


def _write_lock(path: str, patience: float) -> Check:
    """Take SQLite's write lock once, and write nothing."""
    began = time.monotonic()
    try:
        with closing(connect(path, "rw", patience)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        return warn(
            "write lock",
            f"The write lock was not free for {patience:g} s: {error}.",
            "Another process is in the middle of a transaction: find it, for example with "
            f"fuser {path}.",
        )
    waited = time.monotonic() - began
    return ok(
        "write lock", f"The write lock was free after {waited * 1000:.0f} ms.", seconds=waited
    )


def _locks(folder: str) -> Check | None:
    """Check on an existing lock file if the kernel keeps two processes apart."""
    path = os.path.join(folder, f"{NAMES[0]}.lock")
    if fcntl is None or not os.path.exists(path):
        return None
    try:
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for _ in range(2)]
    except OSError as error:
        return fail("locks", f"{path} cannot be opened: {error}.", "Check the permissions.")
    try:
        first, second = (_locked(fd) for fd in fds)
    except OSError as error:
        return fail("locks", f"{path} cannot be locked: {error}.", "Use a local file system.")
    finally:
        for fd in fds:
            os.close(fd)
    if first and second:
        return fail(
            "locks",
            f"Two locks on {path} were given at the same time.",
            "Use a local file system: tasks may run twice here.",
        )
    return ok("locks", "Locks keep processes apart.")


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _amount(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} bytes"
