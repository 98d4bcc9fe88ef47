"""Objects for that which only some stores can do: news of others' commits, a house, forks.

A repository has one object of each, which does nothing unless its class puts another in its place.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from taskx.tasks.in_use import InUse

if TYPE_CHECKING:
    from taskx.tasks.findings import Check, Problem


class Listener(ABC):
    """A receiver of news about the commits of other processes: see :meth:`News.listen`."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> str:
        """Wait for news, at most ``timeout`` seconds (None: for ever), and return the kinds received.

        It returns when there is news, when the time is over, or when the listener is closed. It must not
        return earlier, as callers call it again at once. Callers ignore unknown kinds.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening, and make a waiting thread return."""


class News:
    """Tells of commits, sooner or more exactly than ``version``. This class is for stores that cannot."""

    def revision(self) -> object | None:
        """Return a value that is different after every commit, also after those of this object's queues.

        It is compared as its ``repr``. Return None if the store cannot tell of all commits. The method must
        be cheap. The value may change a second late or without a reason.
        """
        return None

    def listen(self, news: str) -> Listener | None:
        """Return a listener that learns of others' commits sooner than polling ``version`` would.

        ``news`` holds the kinds of news that are wanted, a letter each: see ``lifecycle.news_of``. News may
        come late, twice or not at all. Return None if the store cannot tell of commits.
        """
        return None


class House:
    """Looks after the place where a store keeps its data: a file, a server. Every method may stay as it is.

    Attributes:
        one_host: True if only processes on one host can use the repository.
    """

    one_host = False

    def prepare(self) -> None:
        """Get ready for a node that is about to join.

        Raises:
            RepositoryError: no node can join.
        """

    def only_existing(self) -> AbstractContextManager[object]:
        """Never create or migrate the store during a ``with`` block: operations raise ``RepositoryError``.

        It is for programs that only look, or that must not make a file at a misspelt path.
        """
        return _NOTHING

    def examine(self) -> Iterator[Check]:
        """Yield what is right and wrong with the store and what is around it: disk, locks, server.

        It changes nothing, and raises no error of the store: the checks say what fails.
        """
        return iter(())

    def ensure_there(self) -> None:
        """Raise an error if the opened store does not exist any more.

        The method is cheap. It changes nothing and opens nothing.

        Raises:
            RepositoryError: the store is gone. The message says what happened and what to do.
        """

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes that each of the store's files takes, by path; empty if it has no file."""
        return {}

    def problems(self) -> Iterator[Problem]:
        """Yield what will soon keep tasks from being stored, if it costs nearly nothing to know."""
        return iter(())

    def held_back(self) -> float:
        """Return the seconds for which a transaction has kept removed rows from being cleaned up."""
        return 0.0

    def within(self, seconds: float) -> AbstractContextManager[object]:
        """Limit the operations inside to ``seconds``: they raise ``RepositoryUnavailable`` after that.

        Override it if the store can hang. This version sets no limit.
        """
        return _NOTHING

    def without_waiting(self) -> AbstractContextManager[object]:
        """Have ``apply`` raise :class:`Locked` to this thread soon, for a ``with`` block.

        Without it ``apply`` waits for locks of other transactions. This version is for stores in which
        nobody else locks single records.
        """
        return _NOTHING

    def shrink(self) -> bool:
        """Give a little unused space back to the disk. Return True if there is more to give back."""
        return False


@contextmanager
def looking(lookers: list[None]) -> Iterator[None]:
    """Have an item in the list during a ``with`` block: other threads may be in one, too."""
    lookers.append(None)
    try:
        yield
    finally:
        lookers.pop()


# --- forks


class Forks:
    """Keeps a parent's connections and locks out of its forked children. This class has none to keep.

    A store whose methods must be called around every fork passes its object to :func:`at_forks`. Without
    that, only queues call :meth:`renew_after_fork`.
    """

    def before_fork(self) -> None:
        """End all transactions and close all connections that a forked child would inherit."""

    def after_fork(self) -> None:
        """Continue as before, in the parent."""

    def renew_after_fork(self) -> None:
        """Drop, in a forked child, everything that belongs to the parent, without changing it."""


F = TypeVar("F", bound=Forks)
_NOTHING = nullcontext()
_told = InUse[Forks]()
_one_fork = threading.Lock()
_prepared: list[Forks] = []


def at_forks(forks: F) -> F:
    """Call the methods of this object at every fork, as long as it is in use, and return it."""
    _told.add(forks)
    return forks


def _before_fork() -> None:
    _one_fork.acquire()
    for forks in _told:
        forks.before_fork()
        _prepared.append(forks)


def _after_fork() -> None:
    while _prepared:
        _prepared.pop().after_fork()
    _one_fork.release()


def _renew_all_after_fork() -> None:
    global _one_fork
    _one_fork = threading.Lock()
    _prepared.clear()
    for forks in _told:
        forks.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_renew_all_after_fork
    )
