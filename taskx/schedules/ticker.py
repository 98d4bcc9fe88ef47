"""Schedules tick here: each tick becomes one task, whichever of the nodes comes first."""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import attrs

from taskx.core.clock import to_datetime
from taskx.core.errors import ConfigurationError, RepositoryCorrupt, RepositoryUnavailable
from taskx.core.lifecycle import FINISHED
from taskx.core.log import is_told
from taskx.core.ticks import BATCH, Ticks, decide, latest
from taskx.core.writes import Note, NoteChange
from taskx.moving import Services
from taskx.schedules.stored import PREFIX, Entry, entry_of, store, tick_id

#: Polling interval, in seconds, for schedules that another process changed; and, where there are very
#: many, the multiple of the time that a look takes.
LOOK_EVERY, LOOK_SELDOM = 1.0, 50.0
#: Schedules whose ticks are made in one transaction; more than a few are read together.
TOGETHER, FEW = 200, 20
#: Most milliseconds between two looks that succeed. After a longer gap the ticks in between were missed:
#: the process, the machine or the repository was stopped, or the clock was set.
GAP = 10_000
# Seconds at most until one whose tasks could not be made is tried again.
_LONGEST_PAUSE = 60.0


@attrs.define
class Read:
    """A schedule as its note was read.

    Attributes:
        name, version: those of the note.
        entry, ticks: the schedule and its ticks; None where this process cannot tell when it ticks.
        failures: how often its tasks could not be made since.
        again_at: when that is tried again, on the monotonic clock.
        due: when there is something to do about it, in milliseconds; None for never.
    """

    name: str
    version: int
    entry: Entry | None
    ticks: Ticks | None
    failures: int = 0
    again_at: float = 0.0
    due: int | None = None


class Plan(NamedTuple):
    """The work to do for a schedule whose tick has come.

    Attributes:
        read: the schedule.
        moved: what is to be stored of it then.
        since: the first tick that nobody has decided about.
        run: the ticks that get a task.
    """

    read: Read
    moved: Entry
    since: int
    run: Sequence[int]


class Ticker:
    """Makes the tasks of the ticks that have come. There is no leader: all nodes do it.

    The tasks are stored first; the id of each is that of its tick, so it is stored once. Then the
    schedules are moved on by compare-and-set. Whoever finds that undone does both again. Where tasks must
    not overlap, the schedule is moved on first, and says so until the task is stored.

    Many that tick at the same time are done in batches, and each node takes them in an order of its own: so
    the nodes share them, and seldom do the same.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        # The time from which it has looked without a gap, and that of its last look, in milliseconds.
        self._there_since, self._seen = 0, -GAP
        # True if one may have been changed; the time to look at that, on the monotonic clock; 0: at once.
        self._stale, self._look_at = True, 0.0
        # Names of schedules that were changed in this process, or by another one that came first.
        self._told = services.agenda.schedules
        # True while ticks that may have come are looked for, and their tasks made: they lie nowhere else.
        self._making = False
        self._read: dict[str, Read] = {}
        self._all_read_at = -math.inf
        # The due time of each schedule, a lot, and the name of its note; outdated entries are passed over.
        self._next: list[tuple[int, float, str]] = []

    @property
    def next(self) -> int | None:
        """The next tick of all schedules, in milliseconds; None if there is none."""
        first = self._next[:1]  # in one step: a drain asks, on a thread of its own
        return first[0][0] if first else None

    def look(self) -> None:
        """A schedule may have been changed: look at all of them in the next round."""
        self._stale, self._look_at = True, 0.0

    def look_soon(self) -> None:
        """Another process may have changed a schedule."""
        self._stale = True

    def behind(self, now: int) -> bool:
        """Return True if a tick may have come that has no task yet, at a moment in milliseconds."""
        asked = self._told or (self._stale and not self._look_at)
        coming = self.next
        # Last: another thread may take up a tick in between, and says so before.
        return bool(asked) or (coming is not None and coming <= now) or self._making

    def tick(self, patience: float = math.inf) -> bool:
        """Make the tasks that are due, if any are; whether it made some.

        Args:
            patience: seconds after which the rest is left to the next call.

        Raises:
            RepositoryError: the repository failed; what was not done is done in a later round.
        """
        began, made = time.monotonic(), False
        try:
            self._making = self.behind(self._now())
            self._look_again()
            while due := self._take_due(began):
                made = self._make(due) or made
                if time.monotonic() >= began + patience:
                    break
        except BaseException:
            self.look()
            raise
        finally:
            self._making = False
        self._seen = self._now()
        return made

    def _now(self) -> int:
        """The time; notes where there was a gap since the last look that succeeded."""
        now = self._services.clock.now_ms()
        if not self._seen <= now <= self._seen + GAP:
            self._there_since = now
        return now

    # --- reading

    def _look_again(self) -> None:
        """Read what was changed, or may have been."""
        if len(self._told) > FEW:
            self.look()
        if self._stale and time.monotonic() >= self._look_at:
            self._stale = False  # before reading: what is changed from now on sets it again
            self._read_all()
        while self._told:
            self._read_one(PREFIX + self._told[0])
            self._told.popleft()

    def _read_all(self) -> None:
        self._all_read_at = began = time.monotonic()
        told = len(self._told)
        notes = self._services.repository.notes(PREFIX)
        self._read = {name: self._known(name, note) for name, note in notes.items()}
        self._next = []
        for read in self._read.values():
            self._expect(read)
        for _ in range(told):
            self._told.popleft()
        now = time.monotonic()
        self._look_at = now + max(LOOK_EVERY, LOOK_SELDOM * (now - began))

    def _read_one(self, name: str) -> Read | None:
        note = self._services.repository.notes(name).get(name)
        if note is None:
            self._read.pop(name, None)
            return None
        read = self._read[name] = self._known(name, note)
        self._expect(read)
        return read

    def _known(self, name: str, note: Note) -> Read:
        """Return the schedule of a note, which is not read again if it was not changed."""
        known = self._read.get(name)
        if known is not None and known.version == note.version:
            return known
        try:
            entry = entry_of(note)
            return Read(name, note.version, entry, entry.ticks)
        except (RepositoryCorrupt, ConfigurationError) as error:  # other processes may know better
            if known is None or known.entry is not None:  # others change it at each of its ticks
                self._services.log.warning("%s does not tick in this process: %s", name, error)
            return Read(name, note.version, None, None)

    def _expect(self, read: Read) -> None:
        """Note when there is something to do about a schedule."""
        entry = read.entry
        clock = self._services.clock
        if entry is None:
            read.due = None
        elif entry.making is not None:
            read.due = clock.now_ms()
        else:
            read.due = None if entry.paused else entry.next
        if read.due is not None:
            if read.failures:
                pause = math.ceil((read.again_at - clock.monotonic()) * 1000)
                read.due = max(read.due, clock.now_ms() + pause)
            heapq.heappush(self._next, (read.due, random.random(), read.name))

    def _take_due(self, since: float) -> list[Read]:
        """The next schedules whose tick has come, as they are now; a batch at most.

        Args:
            since: if all were read together since then, on the monotonic clock, that is recent enough.
        """
        names = self._due_names()
        if len(names) < FEW:
            read = [*filter(None, map(self._read_one, names))]
            now = self._services.clock.now_ms()
            return [one for one in read if one.due is not None and one.due <= now]
        if self._all_read_at < since:
            self._read_all()  # what others have done, paused or changed
            names = self._due_names()
        return [self._read[name] for name in names]

    def _due_names(self) -> list[str]:
        names, now = dict[str, None](), self._services.clock.now_ms()
        while self._next and self._next[0][0] <= now and len(names) < TOGETHER:
            self._making = True  # before: a drain waits for it
            due, _, name = heapq.heappop(self._next)
            if (read := self._read.get(name)) is not None and read.due == due:
                names[name] = None
        return list(names)

    # --- making

    def _make(self, due: Sequence[Read]) -> bool:
        """Make the tasks of schedules; what fails about one keeps no other from ticking."""
        try:
            return self._run(due)
        except RepositoryUnavailable:
            raise
        except Exception as error:  # noqa: BLE001  (a codec of the user's, say, that refuses its params)
            if len(due) == 1:
                self._fail(due[0], error)
                return False
        return True in [self._make([read]) for read in due]

    def _fail(self, read: Read, error: Exception) -> None:
        read.failures += 1
        pause = min(2.0**read.failures, _LONGEST_PAUSE)
        read.again_at = self._services.clock.monotonic() + pause
        self._expect(read)
        if is_told(read.failures):
            self._services.log.warning(
                "schedule %r: its tasks could not be made, which is tried again: %s",
                *(read.name[len(PREFIX) :], error),
            )

    def _run(self, due: Sequence[Read]) -> bool:
        """Make the tasks of schedules that are due, in a few transactions; whether it made some."""
        now = self._now()
        plans = [plan for read in due if (plan := self._plan(read, now)) is not None]
        # Schedules that must not overlap come first: who decides about a later tick then knows of this one.
        first = [plan for plan in plans if plan.moved.making is not None and plan.run]
        held = dict(zip((p.read.name for p in first), self._put(first), strict=True))
        going = [
            plan._replace(moved=attrs.evolve(plan.moved, making=None))
            for plan in plans
            if held.get(plan.read.name, True)
        ]
        inserts = [p.moved.insert(tick, now) for p in going for tick in p.run]
        made = bool(inserts) and store(self._services, inserts)
        self._put(going)
        self._seen = now
        for plan in going:
            self._tell_missed(plan, now)
        return made

    def _plan(self, read: Read, now: int) -> Plan | None:
        """Return the work to do for a schedule; None if it is not due."""
        entry, ticks = read.entry, read.ticks
        if entry is None or ticks is None:
            return None
        if entry.making is not None:  # by a node that may have died since
            return Plan(read, attrs.evolve(entry, making=None), now, [entry.making])
        if entry.next is None:
            return None
        misfire = entry.misfire if self._was_missed(entry.next) else "all"
        run, next_ = decide(ticks, entry.next, now, misfire, entry.grace)
        moved = attrs.evolve(entry, next=next_)
        if run and entry.overlap == "skip":
            run = self._without_overlap(entry, latest(ticks, entry.next, now, BATCH), run[0])
            moved = attrs.evolve(moved, making=run[0] if run else None)
        return Plan(read, attrs.evolve(moved, last=run[-1]) if run else moved, entry.next, run)

    def _put(self, plans: Sequence[Plan]) -> Sequence[bool]:
        """Store schedules; if another node moved one on, or somebody changed it, look again."""
        if not plans:
            return []
        changes = [NoteChange(p.read.name, p.moved.to_text(), p.read.version) for p in plans]
        results = self._services.repository.put_notes(changes)
        for plan, stored in zip(plans, results, strict=True):
            if stored:
                read = plan.read
                read.version, read.entry, read.failures = read.version + 1, plan.moved, 0
                if plan.moved.making is None:
                    self._expect(read)
            else:
                self._told.append(plan.read.name[len(PREFIX) :])
        return results

    def _without_overlap(self, entry: Entry, undecided: Sequence[int], tick: int) -> list[int]:
        """The tick, unless the task of an earlier one has not ended."""
        # Beside the last one: a node that died may have stored a task and not moved the schedule on.
        earlier = {entry.last, *undecided} - {tick}
        own = tick_id(entry.name, tick)
        ids = [own, *(tick_id(entry.name, one) for one in earlier if one is not None)]
        statuses = self._services.repository.statuses(ids)
        if own in statuses or all(status in FINISHED for status in statuses.values()):
            return [tick]
        self._services.log.info(
            "schedule %r: the task of an earlier tick has not ended, so that of %s gets none",
            *(entry.name, to_datetime(tick)),
        )
        return []

    def _was_missed(self, tick: int) -> bool:
        """Return whether no housekeeper was at work at a tick; otherwise one was only busy, and is late."""
        return tick < self._there_since

    def _tell_missed(self, plan: Plan, now: int) -> None:
        if self._was_missed(plan.since) and now - plan.since > GAP:
            self._services.log.warning(
                "schedule %r: nobody was there at %s; of its ticks until now %d get a task",
                *(plan.moved.name, to_datetime(plan.since), len(plan.run)),
            )
