"""The database file: which one it is, and whether it is still there."""

from __future__ import annotations

import os

from taskx.core.errors import ConfigurationError, RepositoryUnavailable


class DatabaseFile:
    """One file, known by its real path and its inode from the moment it is opened.

    A later ``chdir`` or change of a symlink leads to no other file, and a file that takes its place is
    not mistaken for it. The file is looked at by its path and never opened here: a process that closes a
    file loses the locks that SQLite holds on it.

    Attributes:
        create: whether opening makes the file if there is none.
        path: absolute; the real path from the opening on.
        identity: device and inode of the file that was opened; None if none is.
    """

    def __init__(self, path: str, create: bool) -> None:
        try:
            self._given = os.path.abspath(path)
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{path!r} is relative, and the working folder was deleted: give an absolute path"
            ) from error
        self.create = create
        self.path = self._given
        self.identity: tuple[int, int] | None = None
        self._found: tuple[int, int] | None = None  # what was there just before the opening

    @property
    def known(self) -> bool:
        """True if the file was opened: from then on no other file is accepted."""
        return self.identity is not None

    @property
    def inode(self) -> int:
        """Its inode number; 0 until it is opened."""
        return 0 if self.identity is None else self.identity[1]

    @property
    def folder(self) -> str:
        """The folder beside it with the lock files."""
        return f"{self.path}-nodes"

    def find(self) -> None:
        """Settle which file is meant, before it is opened; raise if there is none and none may be made."""
        if self.known:
            self.check()
            return
        self.path = os.path.realpath(self._given)
        self._found = self._look()
        if self._found is None and not self.create:
            raise RepositoryUnavailable(
                f"there is no file {self._given}, and create=False: check the path; nothing was made"
            )

    def opened(self) -> None:
        """Note that a connection to it was opened just now; raise if it is not the one found before."""
        self.identity = self.identity or self._found or self._look()
        if self.identity is None:
            raise self._gone()
        self.check()

    def check(self) -> None:
        """Raise ``RepositoryUnavailable`` if it was moved, deleted or replaced since it was opened."""
        identity = self.identity
        if identity is None or (seen := self._look()) == identity:
            return
        if seen is None:
            raise self._gone()
        raise RepositoryUnavailable(
            f"{self.path} was replaced by another file while it was in use; nothing was stored. "
            "Restart this program to use the new file, or put the old one back"
        )

    def forget(self) -> None:
        """Have the next opening find the file anew."""
        self.path, self.identity = self._given, None

    def _look(self) -> tuple[int, int] | None:
        try:
            seen = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RepositoryUnavailable(
                f"{self.path} cannot be looked at ({error}); nothing was stored. "
                "Check the path, and the permissions of its folder"
            ) from error
        return seen.st_dev, seen.st_ino

    def _gone(self) -> RepositoryUnavailable:
        return RepositoryUnavailable(
            f"{self.path} was moved or deleted while it was in use; nothing was stored. "
            "Put it back, or restart this program to begin with a new file"
        )
