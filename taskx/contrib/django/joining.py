"""Transactions of Django that tasks are part of: those of callers, and those of executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import (
    Error,
    InterfaceError,
    InternalError,
    OperationalError,
)

from taskx.contrib.django.blocks import has_begun, is_open
from taskx.contrib.django.connections import Connections
from taskx.contrib.django.link import Link, code
from taskx.stores.sql.callers import CallersLinks
from taskx.stores.sql.postgres import ABORTED
from taskx.tasks.errors import ConfigurationError, RepositoryError, TaskxError


class BlockLinks(CallersLinks):
    """A link over a thread's own connection, inside its transaction."""

    def __init__(self, links: Connections, link: Link) -> None:
        self._connections, self._own = links, link.django
        super().__init__(link, self._of_django, self._break)

    def _of_django(self, error: Exception) -> TaskxError | None:
        if code(error) == ABORTED:
            return _broken()
        links = self._connections
        return links.translated(error) if links.is_failure(error) else None

    def _break(self) -> None:
        self._own.needs_rollback = True

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Begin a transaction if none is open, as SQLite's driver does so only before it changes rows.

        If nothing was written in it, it ends here: it would keep the write lock.
        """
        driver: Any = self._own.connection
        begins = self._connections.vendor == "sqlite" and not (driver and driver.in_transaction)
        if begins:
            self.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if begins:
                self.execute("ROLLBACK")
            raise
        if begins and not self.wrote:
            self.execute("ROLLBACK")


def own_connection(using: str, given: object) -> Any:
    """Return this thread's connection to a database, if it is the given one and in a transaction.

    Raises:
        ConfigurationError: it is not.
    """
    found: Any = connections[DEFAULT_DB_ALIAS] if given is connection else given
    if not isinstance(found, BaseDatabaseWrapper):
        raise ConfigurationError(
            f"connection must be connections[{using!r}] of django.db, not {given!r:.80}; nothing was stored"
        )
    if found.alias != using:
        raise ConfigurationError(
            f"connection leads to the database {found.alias!r}, but the tasks are in {using!r}; nothing "
            "was stored"
        )
    if found is not connections[using]:
        raise ConfigurationError(
            f"connection belongs to another thread; nothing was stored. Use connections[{using!r}] there"
        )
    if not is_open(found):
        raise ConfigurationError(
            "connection is in no transaction; nothing was stored. Call inside "
            f"transaction.atomic(using={using!r})"
        )
    if found.needs_rollback:
        raise _broken()
    return found


def _broken() -> ConfigurationError:
    return ConfigurationError(
        "an error has broken the transaction of this block, so it will be rolled back; nothing was "
        "stored. Put the statements that may fail into an atomic() block of their own"
    )


# --- executors

# The savepoint at the beginning of a block: it is gone if the database itself has ended the transaction.
_WHOLE = "taskx_whole"


@contextmanager
def executor_block(
    links: Connections, begin: Callable[[Link, Callable[[], object]], object]
) -> Iterator[Any]:
    """Do what :meth:`Transactions.begin` describes.

    Args:
        links: the repository's own connections, which translate errors.
        begin: calls its second argument, which enters the block, after the locks that come before it.
    """
    own = connections[links.alias]
    block = transaction.atomic(using=links.alias, durable=True)
    with ExitStack() as stack:
        try:
            _renew(own)
            stack.enter_context(_in_autocommit(own))
            begin(Link(own), lambda: stack.enter_context(block))
            Link(own).execute(f"SAVEPOINT {_WHOLE}")
        except RuntimeError as error:
            raise ConfigurationError(
                f"this thread is inside atomic() of {links.alias!r}, and ctx.transaction() is a "
                "transaction of its own: leave that block before"
            ) from error
        except Error as error:
            if not own.in_atomic_block:  # perhaps it broke while Django opened it, and is half open
                with suppress(Error):
                    own.close()
            raise links.translated(error) from error
        yield own
        _require_whole(links, own)
        commit = stack.pop_all()
    try:
        commit.close()
    except (OperationalError, InterfaceError, InternalError) as error:
        raise links.translated(error, in_doubt=True) from error


def _require_whole(links: Connections, own: Any) -> None:
    """Raise RepositoryError if the transaction of a block has ended already."""
    try:
        Link(own).execute(f"RELEASE SAVEPOINT {_WHOLE}")
    except Error as error:
        raise RepositoryError(
            f"{links.translated(error)}: the database itself has ended the transaction of this block, "
            "mostly because of an error that the executor has caught. Let such an error end the block"
        ) from error


@contextmanager
def _in_autocommit(own: Any) -> Iterator[None]:
    """Have ``atomic()`` commit also on a connection with ``AUTOCOMMIT: False``, where it would not."""
    if own.in_atomic_block or own.get_autocommit():
        yield
        return
    own.set_autocommit(True)
    try:
        yield
    finally:
        with suppress(Error):  # it is lost, and Django opens another one
            own.set_autocommit(False)


def _renew(own: Any) -> None:
    """Close a connection that has broken since its last use. Django opens it again."""
    if own.connection is None or own.in_atomic_block:
        return
    before = has_begun(own)
    if not own.is_usable():
        own.close()
    elif not before and has_begun(own):  # the look itself has begun a transaction
        own.rollback()
