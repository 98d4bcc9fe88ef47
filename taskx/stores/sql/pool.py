"""A process's own connections to a server, and transactions on them, whose commits may be in doubt."""

from __future__ import annotations

import itertools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from taskx.stores.base import Locked, Reentered, Rows
from taskx.stores.parts import Forks, House, News
from taskx.stores.patience import try_again
from taskx.stores.sql.link import Link, Links, Sent
from taskx.stores.sql.repository import SQLRepository
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.codec import Codec, Codecs
from taskx.tasks.errors import (
    ConfigurationError,
    PayloadError,
    RepositoryError,
    RepositoryUnavailable,
    TaskxError,
)
from taskx.tasks.record import COLUMNS
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Insert, NoteChange, Write, shows


class PooledLink(Link, Protocol):
    """A connection of the pool.

    Attributes:
        number: a number that no other connection of this process has.
        used: the time of its last use.
        pooled: True if a pooler may give each transaction another connection of its own: no setting of
            the session is changed then.
        durable: True if a commit survives a power cut by this session's setting; None if it is unknown.
    """

    number: int
    used: float
    pooled: bool
    durable: bool | None

    @property
    def usable(self) -> bool:
        """True if the connection still works."""
        ...

    def close(self) -> None:
        """Close the connection, whatever state it is in."""
        ...


#: The commits that a power cut, or the death of the server, may undo.
Durability = Literal["accepted", "full"]

T = TypeVar("T")
L = TypeVar("L", bound=PooledLink)
#: Writes by identity, each as it was given and as it is stored.
Pairs = dict[int, tuple[Write, Write]]

#: Numbers of connections, and of moments between them.
numbers = itertools.count(1)
#: Codes of PostgreSQL and MySQL for a transaction that another one made impossible, so that it may be sent
#: again, and for a lock that another transaction has kept.
AGAIN, LOCKED = frozenset({"40001", "40P01", "1213"}), frozenset({"55P03", "1205"})
#: Milliseconds for which a write waits for a lock on a server: other writes wait for its connection.
LOCK_TIMEOUT = 100

_SHORTEST_LEASE = 0.5
_SLOW_LOOK = 0.001  # seconds of a look for ready tasks after which the next ones begin further on
_LONG_OPEN = 5.0  # seconds after which an open transaction is one that keeps dead rows
_ASK_EVERY = 1.0
_REST = 10  # times as long as a slow look until the next one over all
_KEPT = 4  # idle connections for reads that stay open
_TRIES = 5  # of a transaction that others make impossible, such as by a deadlock
_MOST_IN_DOUBT = 10_000  # writes, many times a batch: older ones are not sent again


class Connections(ABC, Generic[L]):
    """One connection that writes, and others that read, each used by one thread at a time.

    Args:
        where: what names the database in messages.
        timeout: seconds that a statement, or the wait for a lock, may take.
        timing: the intervals of its own work.

    Attributes:
        errors: the module with the driver's exceptions, which have the names of PEP 249.
    """

    errors: Any

    def __init__(self, where: str, timeout: Duration, timing: Timing) -> None:
        self._where = where
        self._timing = timing
        self.timeout = check_number(timeout, "timeout", minimum=0.01)
        self.lock = threading.RLock()
        self._limit = threading.local()
        self._writer: L | None = None
        self._idle: list[L] = []
        self._closed = 0  # the number of the last close: older connections are not kept
        self._inherited: list[object] = []  # the parent's, which a forked child never closes

    @property
    def entered(self) -> bool:
        """True if the calling thread is in the middle of a write."""
        return self.lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    # --- what a driver does

    @abstractmethod
    def _open(self, *, writes: bool = False) -> L:
        """Return a new connection."""

    @abstractmethod
    def _set_timeout(self, link: L, seconds: float) -> None:
        """Limit the statements of a connection."""

    @abstractmethod
    def code(self, error: BaseException) -> str:
        """Return the code that the database gave for an error; empty if it gave none."""

    def _advised(self, error: BaseException, text: str) -> TaskxError | None:
        """Return the error for one whose cause is known; None if it is not. ``text`` says what failed."""
        return None

    def _has_broken(self, link: L) -> bool:
        """Return True if a connection broke while it was idle."""
        idle = time.monotonic() - link.used
        return idle > self._timing.check_connection_after and not link.usable

    # --- errors

    def is_failure(self, error: BaseException) -> bool:
        """Return True for errors of the driver, and for values that a database cannot store."""
        failures = (self.errors.Error, OverflowError, ValueError)
        return isinstance(error, failures) and not isinstance(error, TaskxError)

    def is_lost(self, error: BaseException) -> bool:
        """Return True for an error after which the connection may be broken."""
        return isinstance(error, (self.errors.OperationalError, self.errors.InterfaceError))

    def may_be_repeated(self, error: BaseException) -> bool:
        """Return True for a conflict of two transactions: nothing was stored, and a repeat may succeed."""
        return self.code(error) in AGAIN

    def translated(self, error: BaseException, *, in_doubt: bool = False) -> TaskxError:
        """Return TaskX's error for an error of the driver, or of a value."""
        said = "; ".join(map(str.strip, str(error).strip().splitlines()))[:500]
        text = f"{self._where}: {said or type(error).__name__}"
        if (advised := self._advised(error, text)) is not None:
            return advised
        if self.code(error) in LOCKED:
            return Locked(f"{self._where}: another transaction keeps a lock: {said}", self.timeout)
        if self.is_lost(error) or isinstance(error, self.errors.InternalError):
            doubt = "; the write may have happened" if in_doubt else ""
            unavailable = RepositoryUnavailable(text + doubt)
            unavailable.in_doubt = in_doubt
            return unavailable
        if isinstance(error, self.errors.Error) and not isinstance(error, self.errors.DataError):
            return RepositoryError(text)
        return PayloadError("record", f"{self._where} cannot store it: {said}")

    # --- using

    def read(self, work: Callable[[L], T]) -> T:
        """Call ``work`` with a connection for reading, and raise its errors as TaskX's.

        If a connection broke while it was idle, ``work`` is called again with another one.
        """
        link = self._take()
        idle = link is not None
        try:
            link = link or self._open()
            with self._within(link):
                found = work(link)
            self._put_back(link)
            return found
        except BaseException as error:
            broke = idle and self.is_lost(error) and link is not None and not link.usable
            if link is not None:
                link.close()
            if self.is_failure(error) and not broke:
                raise self.translated(error) from error
            if not broke:
                raise
        self.close_idle()  # the others broke, too, if the server was started again
        return self.read(work)

    def _take(self) -> L | None:
        """Return an idle connection that works; None if there is none."""
        try:
            link = self._idle.pop()
        except IndexError:
            return None
        return self._checked(link)

    def _put_back(self, link: L) -> None:
        link.used = time.monotonic()
        if len(self._idle) >= _KEPT:
            link.close()
            return
        self._idle.append(link)
        if (
            link.number <= self._closed
        ):  # read last: a close before that did not see this connection
            self.close_idle()

    def _checked(self, link: L) -> L | None:
        """Return a connection that works; None if it broke while it was idle."""
        if self._has_broken(link):
            link.close()
            return None
        return link

    @contextmanager
    def writing(self) -> Iterator[L]:
        """Give the connection for writing to this thread, which must not have it already."""
        if self.entered:
            raise Reentered
        with self.lock, self._opened_writer() as link:
            yield link

    @contextmanager
    def _opened_writer(self) -> Iterator[L]:
        if self._writer is not None:
            self._writer = self._checked(self._writer)
        if self._writer is None:
            self._writer = self._open(writes=True)
        link = self._writer
        try:
            with self._within(link):
                yield link
            link.used = time.monotonic()
        except BaseException:
            if getattr(self._limit, "seconds", None) is not None:
                self.drop_writer()
            raise

    def try_writing(self, patience: float, work: Callable[[L], T]) -> T | None:
        """Call ``work`` with the connection for writing; None if another thread keeps it too long."""
        if self.entered or not self.lock.acquire(timeout=patience):
            return None
        try:
            with self._opened_writer() as link:
                return work(link)
        finally:
            self.lock.release()

    def drop_writer(self) -> None:
        """Close the connection for writing. The next write opens another one."""
        link, self._writer = self._writer, None
        if link is not None:
            link.close()

    # --- the time limit

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the statements of this thread to ``seconds``."""
        before = getattr(self._limit, "seconds", None)
        self._limit.seconds = seconds if before is None else min(before, seconds)
        try:
            yield
        finally:
            self._limit.seconds = before

    @contextmanager
    def _within(self, link: L) -> Iterator[None]:
        """Apply the thread's limit. After an error the connection keeps it, and must be closed."""
        seconds = getattr(self._limit, "seconds", None)
        if seconds is None:
            yield
            return
        self._set_timeout(link, seconds)
        yield
        self._set_timeout(link, self.timeout)

    # --- closing

    def close(self) -> None:
        """Close all connections, those in use after their use. A later operation opens others."""
        self._closed = next(numbers)
        with self.lock:
            self.drop_writer()
            self.close_idle()

    def close_idle(self) -> None:
        """Close the connections for reading that no thread uses."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def renew_after_fork(self) -> None:
        """Start over, in a forked child: the parent's connections are neither used nor closed."""
        self._inherited += [self._writer, self._idle]
        self._writer, self._idle = None, []
        self.lock = threading.RLock()
        self._limit = threading.local()


class _Hurries(threading.local):
    """True for a thread that wants to be told of locks at once."""

    now = False


class PoolLinks(Links, News, House, Forks, Generic[L]):
    """The transactions of a process on its own connections to a database.

    Args:
        connections: the connections.
        timing: the intervals of its work.

    Attributes:
        doubtful: the writes of which nobody knows if they took place, by identity, each as it was sent.
        commits: how many transactions were committed.
    """

    #: True if a commit may take place without an answer.
    may_commit_unseen = True

    def __init__(self, connections: Connections[L], timing: Timing) -> None:
        self.connections = connections
        self.timing = timing
        self.hurries = _Hurries()
        self.doubtful: Pairs = {}
        self.commits = 0

    # --- what a kind of database does

    @abstractmethod
    def _begin(self, link: L, durable: bool) -> None:
        """Begin a transaction."""

    def _commits_itself(self, link: L) -> bool:
        """Return True if a single statement may commit itself."""
        return False

    def _set_durable(self, link: L, durable: bool) -> None:
        """Choose if the next statement that commits itself waits until it is on the disk."""

    def _is_undone(self, link: L, error: BaseException) -> bool:
        """Undo a transaction. Return True if the database has certainly done so."""
        if not isinstance(error, Exception):
            return False
        link.execute("ROLLBACK")
        return True

    def _ended(self) -> None:
        """Do what follows each transaction, also one that has failed."""

    # --- writing

    @property
    def entered(self) -> bool:
        return self.connections.entered

    def transaction(
        self, work: Callable[[Link], T], durable: bool, sent: Sent = None, single: bool = False
    ) -> T:
        """Do work in one transaction. Nothing is committed if it raises, unless the error is in doubt."""
        pairs = {
            id(given): (given, coded) for given, coded in zip(*(sent or ((), ())), strict=True)
        }
        for last in (False,) * (_TRIES - 1) + (True,):
            try:
                with self.connections.writing() as link:
                    alone = single and self._commits_itself(link)
                    return self._once(link, work, durable, pairs, alone)
            except BaseException as error:  # also one of opening the connection
                if last or not self.connections.may_be_repeated(error):
                    if self.connections.is_failure(error):
                        raise self.connections.translated(error) from error
                    raise
        raise AssertionError

    def _once(
        self,
        link: L,
        work: Callable[[Link], T],
        durable: bool,
        sent: Pairs,
        single: bool,
    ) -> T:
        committing = False
        # An earlier copy of a write that was in doubt before may still be committed.
        new = [number for number in sent if number not in self.doubtful]
        try:
            self.ensure_there()
            if single:
                self._set_durable(link, durable)
                committing = True
                self.doubtful.update(sent)
                result = work(link)
            else:
                self._begin(link, durable)
                result = work(link)
                committing = True
                self.doubtful.update(sent)
                link.execute("COMMIT")
            self.commits += 1
            self.forget(sent)
            return result
        except BaseException as error:
            if not self._rolled_back(link, error) and committing and self.may_commit_unseen:
                self.forget([*self.doubtful][:-_MOST_IN_DOUBT])
                if self.connections.is_failure(error):
                    raise self.connections.translated(error, in_doubt=True) from error
            elif isinstance(error, Exception):
                self.forget(new)
            raise
        finally:
            self._ended()

    def forget(self, sent: Iterable[int]) -> None:
        """Note that the outcome of writes is known, or that nobody asks for it."""
        for number in sent:
            self.doubtful.pop(number, None)

    def _rolled_back(self, link: L, error: BaseException) -> bool:
        """Undo a transaction. Return True if the database has certainly done so.

        The connection is closed if it cannot be used any more.
        """
        try:
            if self._is_undone(link, error):
                return True
        except Exception as second:
            if not self.connections.is_failure(second) and not isinstance(second, AttributeError):
                raise
        self.connections.drop_writer()
        return False

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of committed writes."""

    # --- reading

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self.connections.read(lambda link: [*link.rows(sql, values)])

    # --- the house, and forks

    def within(self, seconds: float) -> AbstractContextManager[object]:
        return self.connections.within(seconds)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        before, self.hurries.now = self.hurries.now, True
        try:
            yield
        finally:
            self.hurries.now = before

    def close(self) -> None:
        """Close the connections."""
        self.connections.close()

    def before_fork(self) -> None:
        lock = self.connections.lock
        self._forking = not self.entered and lock.acquire(timeout=self.timing.fork_within)

    def after_fork(self) -> None:
        if self._forking:
            self.connections.lock.release()

    def renew_after_fork(self) -> None:
        self.connections.renew_after_fork()


class PooledRepository(SQLRepository):
    """A repository on the connections of a process, which waits patiently for locks of others."""

    def __init__(
        self,
        statements: Any,
        pool: PoolLinks[Any],
        durability: str,
        lease_timeout: Duration,
        run_folder: str | os.PathLike[str] | None,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | Codecs | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        if durability not in get_args(Durability):
            raise ConfigurationError(
                f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}"
            )
        super().__init__(statements, pool, clock, codec, timing)
        self.durability = durability
        self.lease_timeout = check_number(lease_timeout, "lease_timeout", minimum=_SHORTEST_LEASE)
        self.timeout = pool.connections.timeout
        self.run_folder = None if run_folder is None else os.fspath(run_folder)
        self._pool = pool
        # Of owners and types whose ready tasks are slow to find: the first one's number, and until when a
        # look may begin there.
        self._looks: dict[tuple[str, ...], tuple[int, float]] = {}
        self._open_for = (float("-inf"), 0.0)

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction."""
        return self._patiently(lambda: self._apply_new(writes, all_or_nothing))

    def _ready_rows(
        self, kinds: Sequence[str], limit: int, owner: str, since: int | None = None
    ) -> Rows:
        """Return the rows of ready tasks.

        As long as a transaction stays open, PostgreSQL keeps an index entry of each task that was ready
        since then, and a look passes over all of them. So after a slow look that found all tasks, the next
        ones begin at the first of these. They find no earlier task that is ready again, until they find
        nothing, or ten times the time of the slow look has passed.
        """
        look = partial(super()._ready_rows, kinds, limit, owner)
        if not self.statements.dialect.has_arrays:
            return look()
        where, began = (owner, *kinds), time.monotonic()
        first, until = self._looks.get(where, (0, 0.0))
        if began < until and (rows := look(first)):
            return rows
        began = time.monotonic()
        rows = look()
        ended = time.monotonic()
        if ended - began < _SLOW_LOOK or len(rows) >= limit or not self._is_held_back(ended):
            self._looks.pop(where, None)
        elif rows:
            rest = _REST * (ended - began)
            self._looks[where] = min(row[-1] for row in rows), ended + rest
        return rows

    def _is_held_back(self, now: float) -> bool:
        """Return True if a transaction has been open for long; the server is asked once a second."""
        asked, seconds = self._open_for
        if now - asked > _ASK_EVERY:
            seconds = self._pool.held_back()
            self._open_for = now, seconds
        return seconds > _LONG_OPEN

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        put = super().put_notes
        return self._patiently(lambda: put(changes))

    def _patiently(self, work: Callable[[], T]) -> T:
        """Do work, again and again while another transaction keeps a lock.

        Between two tries the connection is free for the writes of other threads.
        """
        try:
            return work()
        except Locked as error:
            if self._pool.hurries.now:
                raise
            return try_again(work, error, self.timing)

    def _durable(self, writes: Sequence[Write]) -> bool:
        """Return True if one of the writes must survive a power cut, or the death of the server.

        Runs live on when a server dies. A start that it forgets would be made again, and two runs would
        have the same fence.
        """
        if self.durability == "full" or super()._durable(writes):
            return True
        return not self._pool.one_host and any("starts" in write.changes for write in writes)

    def _apply_new(self, writes: Sequence[Write], whole: bool) -> Sequence[bool]:
        """Apply the writes except those in doubt that the records show."""
        doubtful = self._pool.doubtful
        again: dict[int, Write] = {}
        if doubtful:
            pairs = ((number, doubtful.get(id(write))) for number, write in enumerate(writes))
            again = {number: pair[1] for number, pair in pairs if pair}
        if not again:
            return super().apply(writes, all_or_nothing=whole)
        known = self._shown(again)
        self._pool.tell_others([writes[number] for number in known])
        results = [True] * len(writes)
        if new := [number for number in range(len(results)) if number not in known]:
            given = [writes[number] for number in new]
            told = super().apply(given, all_or_nothing=whole)
            for number, held in zip(new, told, strict=True):
                results[number] = held
        # The first copy of a write may have been committed late, while the second one waited for it.
        for number in self._shown({n: write for n, write in again.items() if not results[n]}):
            results[number] = True
        self._pool.forget([id(writes[number]) for number in known])
        return results

    def _coded(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Encode writes. One in doubt passes over no lock, which may be that of its own first copy."""
        coded = super()._coded(writes)
        if not (doubtful := self._pool.doubtful):
            return coded
        return [
            write._replace(skips=False)
            if id(given) in doubtful and not isinstance(write, Insert)
            else write
            for given, write in zip(writes, coded, strict=True)
        ]

    def _shown(self, sent: Mapping[int, Write]) -> set[int]:
        """Return the numbers of the writes, as they were sent, that the records show."""
        if not sent:
            return set()
        ids = list({write.id for write in sent.values()})
        stored = {
            row[0]: dict(zip(COLUMNS, row, strict=True)) for row in self.find("id", ids, COLUMNS)
        }
        same = lambda name, value, sent: value == sent  # noqa: E731
        return {n for n, write in sent.items() if shows(stored.get(write.id), write, same)}
