"""Schedules tick here: each tick becomes one task, whichever of the nodes comes first."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import attrs

from taskx.core.clock import to_datetime
from taskx.core.errors import ConfigurationError, RepositoryCorrupt, RepositoryUnavailable
from taskx.core.lifecycle import FINISHED
from taskx.core.ticks import BATCH, Ticks, decide, latest
from taskx.runtime.schedules import PREFIX, Entry, entry_of, store, tick_id
from taskx.runtime.starter import Services
from taskx.storage.base import Note

#: Seconds between looks whether another process changed a schedule.
LOOK_EVERY = 1.0
# Seconds that a tick may be late without a warning.
_TOLD_AFTER = 10.0
# Seconds at most until one whose tasks could not be made is tried again.
_LONGEST_PAUSE = 60.0


@attrs.define
class Read:
    """A schedule as its note was read.

    Attributes:
        version: that of the note.
        entry: the schedule; None where this process cannot tell when it ticks.
        ticks: its ticks.
        failures: how often its tasks could not be made since.
        again_at: when that is tried again, on the monotonic clock.
    """

    version: int
    entry: Entry | None
    ticks: Ticks | None
    failures: int = 0
    again_at: float = 0.0


class Due(NamedTuple):
    """A schedule whose tick has come.

    Attributes:
        entry: as it is stored.
        ticks: its ticks.
        since: the first tick that nobody has decided about: ``entry.next``.
        now: what time it is.
    """

    entry: Entry
    ticks: Ticks
    since: int
    now: int


def _due_at(entry: Entry, now: int) -> int | None:
    """When there is something to do about a schedule; None for never."""
    if entry.making is not None:
        return now
    return None if entry.paused else entry.next


class Ticker:
    """Makes the tasks of the ticks that have come. There is no leader: all nodes do it.

    The task is stored first; its id is that of the tick, so it is stored once. Then the schedule is
    moved on by compare-and-set. Whoever finds that undone does both again. Where tasks must not overlap,
    the schedule is moved on first, and says so until the task is stored.

    Args:
        services: what it works with.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        #: The next tick of all schedules, in milliseconds; None if there is none.
        self.next: int | None = None
        self._stale = True
        self._look_at = 0.0
        # How often it was asked to look, and how many of these askings it has heeded.
        self._asked, self._heeded = 1, 0
        self._read: dict[str, Read] = {}

    def look(self) -> None:
        """A schedule was changed in this process: see which is next."""
        self._stale, self._look_at = True, 0.0
        self._asked += 1

    def look_soon(self) -> None:
        """Another process may have changed a schedule."""
        self._stale = True

    def behind(self, now: int) -> bool:
        """Whether a tick may have come that has not got its task yet, at a moment in milliseconds."""
        return self._heeded != self._asked or (self.next is not None and self.next <= now)

    def tick(self) -> bool:
        """Make the tasks that are due, if any are; whether it made some.

        Raises:
            RepositoryError: the repository failed; what was not done is done in a later round.
        """
        now = self._services.clock.now_ms()
        due = self.next is not None and self.next <= now
        if not due and not (self._stale and time.monotonic() >= self._look_at):
            return False
        self._stale = False  # before reading: what is changed from now on sets it again
        self._look_at = time.monotonic() + LOOK_EVERY
        asked = self._asked
        try:
            made = self._go_through(now)
        except BaseException:
            self.look()
            raise
        self._heeded = asked
        return made

    def _go_through(self, now: int) -> bool:
        made = False
        upcoming: list[int] = []
        notes = self._services.repository.notes(PREFIX)
        self._read = {name: self._known(name, note) for name, note in notes.items()}
        for read in self._read.values():
            entry, ticks = read.entry, read.ticks
            if entry is None or ticks is None:
                continue
            next_ = _due_at(entry, now)
            if next_ is not None and next_ <= now:
                next_, some = self._try(Due(entry, ticks, next_, now), read)
                made = made or some
            if next_ is not None:
                upcoming.append(next_)
        self.next = min(upcoming, default=None)
        return made

    def _known(self, name: str, note: Note) -> Read:
        """What a note says; where it was not changed, it is not read again."""
        known = self._read.get(name)
        if known is not None and known.version == note.version:
            return known
        try:
            entry = entry_of(note)
            return Read(note.version, entry, entry.ticks)
        except (RepositoryCorrupt, ConfigurationError) as error:  # other processes may know better
            if known is None or known.entry is not None:  # others change it at each of its ticks
                self._services.log.warning("%s does not tick in this process: %s", name, error)
            return Read(note.version, None, None)

    def _try(self, due: Due, read: Read) -> tuple[int | None, bool]:
        """As :meth:`_run`; what fails about one schedule keeps no other from ticking."""
        clock = self._services.clock
        if read.again_at <= clock.monotonic():
            try:
                return self._run(due, read.version)
            except RepositoryUnavailable:
                raise
            except Exception as error:  # noqa: BLE001  (a codec of the user's, say, that refuses its params)
                read.failures += 1
                read.again_at = clock.monotonic() + min(2.0**read.failures, _LONGEST_PAUSE)
                self._complain(due.entry.name, read.failures, error)
        return due.now + math.ceil((read.again_at - clock.monotonic()) * 1000), False

    def _complain(self, name: str, failures: int, error: Exception) -> None:
        if failures & (failures - 1) == 0:  # the 1st, 2nd, 4th, 8th …
            self._services.log.warning(
                "schedule %r: its tasks could not be made, which is tried again: %s", name, error
            )

    def _run(self, due: Due, version: int) -> tuple[int | None, bool]:
        """Make the tasks that are due; the next tick, and whether there was a task to make."""
        entry = due.entry
        if entry.making is not None:  # by a node that may have died since
            return self._make(entry, entry.making, version, due.now)
        run, next_ = decide(due.ticks, due.since, due.now, entry.misfire, entry.grace)
        if run and entry.overlap == "skip":
            run = self._without_overlap(due, run[0])
        moved = attrs.evolve(entry, next=next_, last=run[-1] if run else entry.last)
        if run and entry.overlap == "skip":
            # First, so that whoever decides about a later tick knows of this one.
            moved = attrs.evolve(moved, making=run[0])
            made = self._put(moved, version)
            if made:
                next_, made = self._make(moved, run[0], version + 1, due.now)
        else:
            inserts = [entry.insert(tick, due.now) for tick in run]
            made = bool(run) and any(store(self._services, inserts))
            self._put(moved, version)
        self._tell_missed(due, len(run))
        return next_, made

    def _make(self, entry: Entry, tick: int, version: int, now: int) -> tuple[int | None, bool]:
        """Make the task of a tick that was taken up: the next tick, and whether it was there not yet."""
        made = any(store(self._services, [entry.insert(tick, now)]))
        done = attrs.evolve(entry, making=None)
        self._put(done, version)
        return _due_at(done, now), made

    def _put(self, entry: Entry, version: int) -> bool:
        """Store a schedule; if another node moved it on, or somebody changed it, look again."""
        repository = self._services.repository
        stored = repository.put_note(PREFIX + entry.name, entry.to_text(), version)
        if not stored:
            self.look()
        return stored

    def _without_overlap(self, due: Due, tick: int) -> list[int]:
        """The tick, unless the task of an earlier one has not ended."""
        name = due.entry.name
        # Beside the last one: a node that died may have stored a task and not moved the schedule on.
        earlier = {due.entry.last, *latest(due.ticks, due.since, due.now, BATCH)} - {tick}
        own = tick_id(name, tick)
        ids = [own, *(tick_id(name, one) for one in earlier if one is not None)]
        statuses = self._services.repository.statuses(ids)
        if own in statuses or all(status in FINISHED for status in statuses.values()):
            return [tick]
        self._services.log.info(
            "schedule %r: the task of an earlier tick has not ended, so that of %s gets none",
            *(name, to_datetime(tick)),
        )
        return []

    def _tell_missed(self, due: Due, tasks: int) -> None:
        if due.now - due.since > _TOLD_AFTER * 1000:
            self._services.log.warning(
                "schedule %r: nobody was there at %s; of its ticks until now %d get a task",
                *(due.entry.name, to_datetime(due.since), tasks),
            )
