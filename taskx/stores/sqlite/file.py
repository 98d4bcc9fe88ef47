"""The database file: its identity, and the check that it still exists."""

from __future__ import annotations

import os
from contextlib import suppress

from taskx.tasks.errors import ConfigurationError, RepositoryUnavailable


class DatabaseFile:
    """A file that is identified by its real path and its inode from the moment it is opened.

    A later ``chdir`` or a changed symlink does not lead to another file. A file that replaces this one is
    recognised as another one. This class checks the file by its path and never opens it: a process that
    closes a file loses the locks that SQLite holds on it.

    Attributes:
        lookers: one item for each block that forbids to create or migrate the file.
        path: the absolute path; once the file is opened, its real path.
        identity: device and inode of the opened file; None if it is not open.
    """

    def __init__(self, path: str, create: bool, prefix: str = "") -> None:
        try:
            self._given = os.path.abspath(path)
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{path!r} is relative, but the working folder was deleted: use an absolute path"
            ) from error
        self._create = create
        self.lookers: list[None] = []
        self._prefix = prefix
        self.path = self._given
        self.identity: tuple[int, int] | None = None
        self._found: tuple[int, int] | None = None  # the identity just before the file is opened

    @property
    def create(self) -> bool:
        """True if opening creates a missing file; with a prefix, missing tables."""
        return self._create and not self.lookers

    @property
    def known(self) -> bool:
        """True once the file was opened: no other file is accepted from then on."""
        return self.identity is not None

    @property
    def inode(self) -> int:
        """Its inode number; 0 until it is opened."""
        return 0 if self.identity is None else self.identity[1]

    @property
    def folder(self) -> str:
        """The folder of the lock files, next to the database file."""
        return f"{self.path}-{self._prefix}nodes"

    def is_at(self, path: str) -> bool:
        """Return True if this file is at a path. It need not be open."""
        try:
            seen, own = os.stat(path), self.identity
            return (own or _identity(os.stat(self._given))) == _identity(seen)
        except OSError:
            return False

    def find(self) -> None:
        """Resolve the path, before the file is opened. Raise if it is missing and must not be created."""
        if self.known:
            self.check()
            return
        self.path = os.path.realpath(self._given)
        self._found = self._read_identity()
        if self._found is None and self._prefix:
            raise RepositoryUnavailable(
                f"there is no file {self._given}: with a prefix, the application creates its file, in WAL "
                "mode; nothing was created"
            )
        if self._found is None and not self.create:
            raise RepositoryUnavailable(
                f"there is no file {self._given}: start the application or a worker first, or check the "
                "path; nothing was created"
            )

    def opened(self) -> None:
        """Record that the file was just opened. Raise if it is not the file that was found before."""
        self.identity = self.identity or self._found or self._read_identity()
        if self.identity is None:
            raise self._gone()
        self.check()

    def check(self) -> None:
        """Raise ``RepositoryUnavailable`` if the file was moved, deleted or replaced since its opening."""
        if (identity := self.identity) is None:
            return
        try:
            found = os.stat(self.path)
            if (found.st_dev, found.st_ino) == identity:
                return
        except OSError:
            pass  # it is explained below
        if (seen := self._read_identity()) == identity:
            return
        if seen is None:
            raise self._gone()
        raise RepositoryUnavailable(
            f"{self.path} was replaced by another file while it was in use; nothing was stored. "
            "Restart this program to use the new file, or put the old one back"
        )

    def forget(self) -> None:
        """Forget the file. The next opening resolves its path again."""
        self.path, self.identity = self._given, None

    def sizes(self) -> dict[str, int]:
        """Return the bytes that the file and its write-ahead log take, by path."""
        self.check()
        found = {}
        for path in (self.path, f"{self.path}-wal"):
            with suppress(OSError):  # the last connection that closes removes the log
                found[path] = os.stat(path).st_size
        return found

    def _read_identity(self) -> tuple[int, int] | None:
        try:
            seen = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RepositoryUnavailable(
                f"{self.path} cannot be accessed ({error}); nothing was stored. "
                "Check the path, and the permissions of its folder"
            ) from error
        return seen.st_dev, seen.st_ino

    def _gone(self) -> RepositoryUnavailable:
        return RepositoryUnavailable(
            f"{self.path} was moved or deleted while it was in use; nothing was stored. "
            "Put it back, or restart this program to start with a new file"
        )


def _identity(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_dev, seen.st_ino
