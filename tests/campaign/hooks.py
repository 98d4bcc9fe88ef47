"""Changes to the library inside a worker process, and only there, that provoke errors.

They are points at which the process kills itself, interrupts of a leader, pauses that widen races, and
broken parts that the campaign must notice. All wrap functions from outside: the library has no hooks.
"""

from __future__ import annotations

import _thread
import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from taskx import CancelReason
from taskx.attempt.runner import Runner
from taskx.node.ahead import Ahead
from taskx.node.buffer import Slots
from taskx.node.fetcher import Fetcher
from taskx.node.ledger import Ledger, _Entry
from taskx.node.node import LocalNode
from taskx.node.pool import WorkerPool
from taskx.node.starter import Starter, Suspects
from taskx.stores.liveness import locks
from taskx.stores.liveness.leases import Leases
from taskx.stores.liveness.locks import KernelLocks
from taskx.stores.sqlite import writing
from taskx.stores.sqlite.links import FileLinks
from taskx.stores.sqlite.repository import SQLiteRepository
from taskx.tasks import lifecycle
from taskx.tasks.writes import Insert

from .sidelog import SideLog

Strike = Callable[[], None]
Points = dict[str, Callable[[Strike], None]]
Parts = dict[str, Callable[[], None]]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by ``around(function, *args, **kwargs)``."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    setattr(owner, name, wrapper)


def before(owner: Any, name: str, strike: Strike) -> None:
    def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
        strike()
        return inner(*args, **kwargs)

    wrap(owner, name, around)


def after(owner: Any, name: str, strike: Strike) -> None:
    """Strike after the function returned something other than an empty list."""

    def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
        returned = inner(*args, **kwargs)
        if returned != []:
            strike()
        return returned

    wrap(owner, name, around)


# Points at which the process dies


COMMON_POINTS: Points = {
    "after commit, before buffer": lambda strike: before(Slots, "fill", strike),
    "after start, before execute": lambda strike: after(Starter, "start", strike),
    # Before, because a task that was laid out may have run to its end when the strike comes.
    "started ahead": lambda strike: before(Ahead, "lay_out", strike),
    "after result, before finish": lambda strike: after(Runner, "run", strike),
    "while stopping": lambda strike: after(LocalNode, "_begin_stop", strike),
}


def _in_commit(strike: Strike) -> None:
    """Strike in a transaction, and before a statement that commits itself; the file is locked."""
    before(FileLinks, "_refuse_if_newer", strike)
    before(writing, "_put_alone", strike)
    before(writing.KeyedWriter, "_change_alone", strike)


KILL_POINTS: Points = {
    **COMMON_POINTS,
    "inside a commit": _in_commit,
    "after a commit": lambda strike: after(SQLiteRepository, "apply", strike),
    "before leaving": lambda strike: before(KernelLocks, "leave", strike),
}


class Countdown:
    """Strikes when a point is passed for the n-th time."""

    def __init__(self, passings: int, strike: Strike) -> None:
        self._left = passings
        self._lock = threading.Lock()
        self._strike = strike

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            due = self._left == 0
        if due:
            self._strike()


def die(log: SideLog, note: str) -> None:
    log.tell("dying", note=note)
    os.kill(os.getpid(), signal.SIGKILL)


def death(point: str, passings: int, log: SideLog) -> Strike:
    """Return a strike that kills this process when a point is passed for the n-th time."""
    return Countdown(passings, lambda: die(log, point))


# Errors in the leader of a group commit

INTERRUPTS = ("before the commit", "inside the commit", "after the commit")


def interrupt(
    where: str, passings: int, log: SideLog, error: type[BaseException], repository: type
) -> Strike:
    """Raise an error in a thread that commits; a KeyboardInterrupt only in the main thread, as Python does.

    Return the function that raises inside the commit, for the caller to place there.
    """

    def strike() -> None:
        log.tell("interrupt", note=where)
        raise error("the campaign's")

    countdown = Countdown(passings, strike)
    inside = threading.local()

    def point() -> None:
        main = threading.current_thread() is threading.main_thread()
        if getattr(inside, "leads", False) and (main or issubclass(error, Exception)):
            countdown()

    def lead(inner: Any, *args: Any, **kwargs: Any) -> Any:
        inside.leads = True
        try:
            if where == "before the commit":
                point()
            returned = inner(*args, **kwargs)
            if where == "after the commit":
                point()
            return returned
        finally:
            inside.leads = False

    wrap(repository, "apply", lead)
    return point


class Interrupter:
    """Interrupts the main thread at random moments, as Ctrl-C would.

    None strikes in a step of ``spared`` itself, which catches those that strike in what it calls. None
    strikes from the time ``until`` of the monotonic clock on.
    """

    def __init__(
        self, seed: int, longest: float, log: SideLog, spared: Callable[..., Any], until: float
    ) -> None:
        self._rng, self._longest, self._log = random.Random(seed), longest, log
        self._spared, self._until = spared.__code__, until
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        # The start of a thread waits for an event: see sleep.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._thread.start()
        signal.signal(signal.SIGINT, self._strike)

    def _strike(self, number: int, frame: FrameType) -> None:
        if frame.f_code is not self._spared and time.monotonic() < self._until:
            raise KeyboardInterrupt

    def _run(self) -> None:
        while time.monotonic() < self._until:
            sleep(self._rng.random() * self._longest)
            self._log.tell("interrupt", note="at random")
            _thread.interrupt_main()


def sleep(seconds: float) -> None:
    """Sleep. An interrupt of an event's wait may leave the lock of that event broken."""
    time.sleep(seconds)  # blocks on purpose


# Pauses that widen the windows of races


def dawdle(seed: int, longest: float) -> None:
    """Pause now and then at points where another process or thread could interfere."""
    rng = random.Random(seed)

    def pause() -> None:
        if rng.random() < 0.2:
            sleep(rng.random() * longest)

    before(lifecycle, "start", pause)
    before(Ledger, "commit", pause)
    before(Ledger, "later", pause)
    before(Runner, "run", pause)
    before(Slots, "fill", pause)


def ignore_owners() -> None:
    """Make every node believe that it is alone, so that all compete for the same tasks."""
    Fetcher.alone = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


# Leases


def tell_lost_leases(log: SideLog) -> None:
    """Write to the side log when the running tasks are asked to end because the lease is lost."""

    def fire(inner: Any, self: WorkerPool, reason: CancelReason) -> None:
        if reason is CancelReason.LEASE_LOST:
            log.tell("lease lost")
        inner(self, reason)

    wrap(WorkerPool, "fire_all", fire)


def _heartbeats_ignored() -> None:
    wrap(Leases, "_lives_yet", lambda inner, self, name, notes, asked: False)


def _lost_lease_ignored() -> None:
    wrap(Leases, "lost", lambda inner, self, node: False)


#: The broken parts of stores with leases.
BROKEN_LEASES: Parts = {
    "heartbeats ignored": _heartbeats_ignored,
    "lost lease ignored": _lost_lease_ignored,
}

# Broken parts: with each of them the campaign must fail


def _no_start_guard() -> None:
    def around(inner: Any, *args: Any) -> Any:
        update = inner(*args)
        return update and update._replace(guard={})

    wrap(lifecycle, "start", around)


def _no_fence() -> None:
    def conclude(inner: Any, *args: Any) -> Any:
        return [write._replace(guard={}) for write in inner(*args)]

    wrap(lifecycle, "conclude", conclude)


def _no_lock() -> None:
    def around(inner: Any, self: Any, node: str, *more: Any) -> int:
        inode: int = inner(self, node, *more)
        os.close(locks._held.pop(node))
        return inode

    wrap(locks.NodeLocks, "hold", around)


def _told_before_commit() -> None:
    """Acknowledge a task before it is stored, as the original does."""

    def around(inner: Any, self: Any, writes: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(writes[0], Insert):
            return inner(self, writes, *args, **options)
        entry: Any = _Entry(writes, None)
        entry.deserted = True
        self._waiting.append(entry)
        return [True] * len(writes)

    wrap(Ledger, "commit", around)


def _cancel_without_guard() -> None:
    def around(inner: Any, *args: Any) -> Any:
        pending, *others = inner(*args)
        return [pending._replace(guard={}), *others]

    wrap(lifecycle, "cancel", around)


def _expiry_after_start() -> None:
    def around(inner: Any, *args: Any) -> Any:
        again, cancelled = inner(*args)
        return [again._replace(changes={**again.changes, "expires_at": 1}), cancelled]

    wrap(lifecycle, "_again", around)


def _suspects_together() -> None:
    wrap(Suspects, "admit", lambda inner, self, item: True)
    wrap(Suspects, "go_alone", lambda inner, self: None)


def _last_chance_beside_others() -> None:
    wrap(Suspects, "go_alone", lambda inner, self: None)


BROKEN: Parts = {
    "start without guard": _no_start_guard,
    "outcome without fence": _no_fence,
    "node without lock": _no_lock,
    "acknowledged before the commit": _told_before_commit,
    "cancel without guard": _cancel_without_guard,
    "expiry after the start": _expiry_after_start,
    "suspects run together": _suspects_together,
    "a last chance beside others": _last_chance_beside_others,
}
