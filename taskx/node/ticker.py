"""The ticking of schedules: each tick gets one task, from the node that comes first."""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from typing import NamedTuple

import attrs

from taskx.node.hooks import Hooks
from taskx.node.moving import Moves
from taskx.node.schedules import PREFIX, Entry, entry_of, tick_id
from taskx.tasks.bell import Agenda
from taskx.tasks.clock import Clock, to_datetime
from taskx.tasks.errors import ConfigurationError, RepositoryCorrupt, RepositoryUnavailable
from taskx.tasks.lifecycle import FINISHED
from taskx.tasks.log import GuardedLogger, is_told
from taskx.tasks.ticks import BATCH, Ticks, decide, latest
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Note, NoteChange

# If there are very many schedules, the polling interval is this many times the duration of the last
# refresh, so that refreshes take half a percent of a core.
_REFRESH_FACTOR = 200.0

# Most schedules that tick at the same time have the same spec.
_decide = lru_cache(maxsize=64)(decide)


@attrs.define(eq=False, repr=False)
class Read:
    """A schedule that was read from its note.

    Attributes:
        name, version: the name and version of the note.
        entry, ticks: the schedule and its ticks; None if this process cannot read when it ticks.
        failures: number of failures in a row to make its tasks.
        again_at: the time of the next try after a failure, on the monotonic clock.
        due: the time of the next work on it, in milliseconds; None for never.
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
        read: the schedule as it was read.
        entry: its stored form.
        since: the first tick that was not decided before.
        run: the ticks that get a task.
        next: the first tick that is not decided afterwards.
        earlier: the ticks whose tasks must have ended first; None if tasks may overlap.
    """

    read: Read
    entry: Entry
    since: int
    run: Sequence[int]
    next: int | None
    earlier: Sequence[int] | None = None

    def moved(self, *, making: bool = False) -> Entry:
        """Return the schedule to store: it has ticked, or (``making``) its task is being made."""
        return attrs.evolve(
            self.entry,
            next=self.next,
            last=self.run[-1] if self.run else self.entry.last,
            making=self.run[0] if making else None,
        )


class Ticker:
    """Makes the tasks of the ticks that have come. There is no leader: all nodes do it.

    The tasks are stored first. The id of a task is made from its tick, so it is stored only once. Then the
    schedules are moved on by compare-and-set. If that did not happen, another node does both again. If
    tasks must not overlap, the schedule is moved on first, and names the tick until its task is stored.

    Schedules that tick at the same time are processed in batches. Each node takes them in its own random
    order, so the nodes share the work and seldom do the same. A refresh reads all schedules, one page after
    the other. Each call of :meth:`tick` ends after a while, and the next call continues where it stopped.
    """

    def __init__(
        self,
        moves: Moves,
        agenda: Agenda,
        hooks: Hooks,
        clock: Clock,
        log: GuardedLogger,
        timing: Timing,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._moves = moves
        self._agenda = agenda
        self._hooks = hooks
        self._clock = clock
        self._log = log
        self._timing = timing
        self._chance = chance
        self._longest_gap = round(1000 * timing.longest_gap)  # in milliseconds
        # The start of the time without a gap between rounds, and the last round, in milliseconds.
        self._running_since, self._last_round = 0, -self._longest_gap
        # True if a schedule may have changed; the time of the next refresh on the monotonic clock (0: now).
        self._stale, self._refresh_at = True, 0.0
        # Names of schedules that this process changed, or that another node moved on first.
        self._changed = agenda.schedules
        # True while due ticks are searched and their tasks are made: nothing else shows them to a drain.
        self._making = False
        self._read: dict[str, Read] = {}
        # State of a refresh: the name of the last note that was read, None if no refresh is under way; the
        # seconds that it has taken; the names that were known before and are not found yet.
        self._after: str | None = None
        self._refresh_took, self._missing = 0.0, set[str]()
        # The due time of each schedule, a random number, and the name of its note. Outdated entries are
        # skipped.
        self._next: list[tuple[int, float, str]] = []
        #: The next tick of all schedules, in milliseconds; None if there is none. A drain asks for it on a
        #: thread of its own, which must not look at a heap that changes.
        self.next: int | None = None

    def _note_next(self) -> None:
        """Note the next tick, after the heap has changed."""
        self.next = self._next[0][0] if self._next else None

    def was_there(self) -> None:
        """Note that this node was running since the last round, so that no tick in between was missed."""
        self._last_round = self._clock.now_ms()

    def refresh_now(self) -> None:
        """Read all schedules again in the next round, as one may have changed."""
        self._stale, self._refresh_at = True, 0.0

    def refresh_soon(self) -> None:
        """Read all schedules again at the next polling time; another process may have changed one."""
        self._stale = True

    def until_refresh(self) -> float:
        """Return the seconds until all schedules are read again; infinite if none may have changed."""
        return self._refresh_at - time.monotonic() if self._stale else math.inf

    @property
    def waiting(self) -> bool:
        """True if a refresh is not finished; :meth:`tick` continues it."""
        return bool(self._changed) or self._after is not None

    def behind(self, now: int) -> bool:
        """Return True if a tick may have come that has no task yet; ``now`` is in milliseconds."""
        asked = self.waiting or (self._stale and not self._refresh_at)
        coming = self.next
        # _making is read last: another thread sets it before it takes up a tick.
        return asked or (coming is not None and coming <= now) or self._making

    def tick(self, until: float = math.inf) -> bool:
        """Make the tasks that are due; return True if it made any.

        Args:
            until: the time, on the monotonic clock, from which the rest is left to the next call.

        Raises:
            RepositoryError: the repository failed; a later round does the rest.
        """
        made = False
        try:
            self._making = self.behind(self._now())
            self._refresh(until)
            while names := self._due_names():
                made = self._make(self._still_due(names)) or made
                if time.monotonic() >= until:
                    break
        except BaseException:
            self.refresh_now()
            raise
        finally:
            self._making = False
        self._last_round = self._now()
        return made

    def _now(self) -> int:
        """Return the time, and note a gap since the last round that succeeded."""
        now = self._clock.now_ms()
        if not self._last_round <= now <= self._last_round + self._longest_gap:
            self._running_since = now
        return now

    # --- reading

    def _refresh(self, until: float) -> None:
        """Read schedules that have changed, or may have changed."""
        while self._changed:
            some = range(min(len(self._changed), self._timing.tick_batch))
            names = [PREFIX + self._changed[i] for i in some]
            self._read_named(names)
            for _ in names:  # only now: until then a drain must wait for them
                self._changed.popleft()
            if time.monotonic() >= until:
                return
        if self._after is None and self._stale and time.monotonic() >= self._refresh_at:
            self._after, self._refresh_took, self._missing = PREFIX, 0.0, set(self._read)
            # Before reading: a change from now on sets them again.
            self._stale, self._refresh_at = False, math.inf
        while self._after is not None:
            self._read_page(self._after)
            if time.monotonic() >= until:
                break

    def _read_page(self, after: str) -> None:
        """Read the next page of a refresh."""
        began = time.monotonic()
        page = self._moves.repository.reads.notes_after(PREFIX, after, self._timing.batch)
        for name, note in page.items():
            self._take_in(name, note)
        self._refresh_took += time.monotonic() - began
        if len(page) == self._timing.batch:
            self._after = next(reversed(page))
            return
        for name in self._missing:
            self._read.pop(name, None)
        if len(self._next) > 2 * len(self._read) + self._timing.batch:  # most entries are outdated
            self._next = [
                (due, lot, name) for due, lot, name in self._next if self._is_due(name, due)
            ]
            heapq.heapify(self._next)
            self._note_next()
        if self._refresh_at:  # else another refresh was requested
            pause = max(self._timing.schedules_every, _REFRESH_FACTOR * self._refresh_took)
            pause = min(pause, self._timing.longest_schedules_every)
            self._refresh_at = time.monotonic() + pause
        self._after = None

    def _read_named(self, names: Sequence[str]) -> None:
        found = self._moves.repository.reads.notes_named(names)
        for name in names:
            if name in found:
                self._take_in(name, found[name])
            else:
                self._read.pop(name, None)

    def _take_in(self, name: str, note: Note) -> None:
        self._missing.discard(name)
        read = self._read[name] = self._known(name, note)
        self._expect(read)

    def _known(self, name: str, note: Note) -> Read:
        """Return the schedule of a note; parse the note only if it has changed."""
        known = self._read.get(name)
        if known is not None and known.version == note.version:
            return known
        due = None if known is None else known.due
        try:
            entry = entry_of(note)
            return Read(name, note.version, entry, _ticks_of(entry, known), due=due)
        except (RepositoryCorrupt, ConfigurationError) as error:
            # Other processes may understand it, and change it at each tick: warn only once.
            if known is None or known.entry is not None:
                self._log.warning("%s does not tick in this process: %s", name, error)
            return Read(name, note.version, None, None, due=due)

    def _expect(self, read: Read) -> None:
        """Put the next due time of a schedule into the heap."""
        entry = read.entry
        clock = self._clock
        if entry is None:
            due = None
        elif entry.making is not None:
            due = clock.now_ms()
        else:
            due = None if entry.paused else entry.next
        if due is not None and read.failures:
            pause = math.ceil((read.again_at - clock.monotonic()) * 1000)
            due = max(due, clock.now_ms() + pause)
        if due != read.due:
            read.due = due
            if due is not None:
                heapq.heappush(self._next, (due, self._chance(), read.name))
                self._note_next()

    def _due_names(self) -> list[str]:
        """Return the schedules whose tick has come, by what is known in memory; at most a batch."""
        names, now = dict[str, None](), self._clock.now_ms()
        while self._next and self._next[0][0] <= now and len(names) < self._timing.tick_batch:
            self._making = True  # before the pop: a drain must wait for this tick
            due, _, name = heapq.heappop(self._next)
            self._note_next()
            if self._is_due(name, due):
                self._read[name].due = None
                names[name] = None
        return list(names)

    def _still_due(self, names: Sequence[str]) -> list[Read]:
        """Return the named schedules whose tick has come, as they are now."""
        self._read_named(names)  # other processes may have moved on, paused or changed them
        now = self._clock.now_ms()
        read = (self._read.get(name) for name in names)
        return [one for one in read if one is not None and one.due is not None and one.due <= now]

    def _is_due(self, name: str, due: int) -> bool:
        """Return True if the schedule, as it was last read, is due at exactly this time."""
        read = self._read.get(name)
        return read is not None and read.due == due

    # --- making

    def _make(self, due: Sequence[Read]) -> bool:
        """Make the tasks of schedules; the failure of one does not stop the others."""
        if not due:
            return False
        try:
            return self._run(due)
        except RepositoryUnavailable:
            raise
        except Exception as error:  # noqa: BLE001  (for example, a user's codec refuses the params)
            if len(due) == 1:
                self._fail(due[0], error)
                return False
        half = len(due) // 2
        return True in [self._make(due[:half]), self._make(due[half:])]

    def _fail(self, read: Read, error: Exception) -> None:
        read.failures += 1
        pause = min(2.0**read.failures, self._timing.longest_schedule_pause)
        read.again_at = self._clock.monotonic() + pause
        self._expect(read)
        if is_told(read.failures):
            self._log.warning(
                "schedule %r: its tasks could not be made; trying again later: %s",
                read.name[len(PREFIX) :],
                error,
            )

    def _run(self, due: Sequence[Read]) -> bool:
        """Make the tasks of due schedules in a few transactions; return True if it made any."""
        now = self._now()
        plans = self._without_overlap(self._plans(due, now))
        # Schedules that must not overlap are stored first: who decides a later tick must see this one.
        first = [plan for plan in plans if plan.earlier is not None and plan.run]
        held = dict(zip((p.read.name for p in first), self._put(first, making=True), strict=True))
        going = [plan for plan in plans if held.get(plan.read.name, True)]
        inserts = [p.entry.insert(tick, now) for p in going for tick in p.run]
        made = bool(inserts) and any(self._moves.commit(inserts))
        if made:
            self._agenda.fetch_soon()
        moved_on = self._put(going)
        self._last_round = now
        for plan in compress(going, moved_on):  # of several nodes, one tells
            self._warn_if_missed(plan, now)
        return made

    def _plans(self, due: Sequence[Read], now: int) -> list[Plan]:
        """Return the work for as many schedules as fit into one transaction; the others stay due."""
        plans, tasks = [], 0
        for read in due:
            if (plan := self._plan(read, now)) is not None:
                plans.append(plan)
                tasks += len(plan.run if plan.earlier is None else plan.earlier)
            if tasks >= self._timing.tick_batch:
                break
        return plans

    def _plan(self, read: Read, now: int) -> Plan | None:
        """Return the work for a schedule; None if it is not due."""
        entry, ticks = read.entry, read.ticks
        if entry is None or ticks is None:
            return None
        if entry.making is not None:  # the node that was making the task may have died
            return Plan(read, entry, now, [entry.making], entry.next)
        if entry.next is None:
            return None
        misfire = entry.misfire if self._was_missed(entry.next) else "all"
        run, next_ = _decide(ticks, entry.next, now, misfire, entry.grace)
        if not run or entry.overlap == "allow":
            return Plan(read, entry, entry.next, run, next_)
        # Not only the last tick: a node may have stored a task and died before it moved the schedule on.
        earlier = {entry.last, *latest(ticks, entry.next, now, BATCH)} - {run[0]}
        undone = [tick for tick in earlier if tick is not None]
        return Plan(read, entry, entry.next, run=run[:1], next=next_, earlier=undone)

    def _put(self, plans: Sequence[Plan], *, making: bool = False) -> Sequence[bool]:
        """Store schedules; read those again that another node has moved on or a user has changed."""
        if not plans:
            return []
        entries = [plan.moved(making=making) for plan in plans]
        results = self._moves.repository.put_notes(
            [
                NoteChange(plan.read.name, entry.to_text(), plan.read.version)
                for plan, entry in zip(plans, entries, strict=True)
            ]
        )
        for plan, entry, stored in zip(plans, entries, results, strict=True):
            read = plan.read
            if stored:
                read.version, read.entry, read.failures = read.version + 1, entry, 0
                if not making:
                    self._expect(read)
            else:
                self._changed.append(read.name[len(PREFIX) :])
        return results

    def _without_overlap(self, plans: Sequence[Plan]) -> list[Plan]:
        """Return the plans without the ticks for which the task of an earlier tick has not ended."""
        asked = [
            tick_id(plan.entry.name, tick)
            for plan in plans
            if plan.earlier is not None
            for tick in (*plan.run, *plan.earlier)
        ]
        statuses = self._moves.repository.statuses(asked) if asked else {}
        return [p if self._may_run(p, statuses) else p._replace(run=()) for p in plans]

    def _may_run(self, plan: Plan, statuses: Mapping[str, str]) -> bool:
        """Return True if all tasks of earlier ticks have ended, or this tick has its task already."""
        name = plan.entry.name
        earlier = (statuses.get(tick_id(name, tick)) for tick in plan.earlier or ())
        over = all(status is None or status in FINISHED for status in earlier)
        if over or tick_id(name, plan.run[0]) in statuses:
            return True
        self._log.info(
            "schedule %r: the tick at %s gets no task, because the task of an earlier tick has not ended",
            name,
            to_datetime(plan.run[0]),
        )
        return False

    def _was_missed(self, tick: int) -> bool:
        """Return True if this node was not running at a tick; otherwise it was only busy and is late."""
        return tick < self._running_since

    def _warn_if_missed(self, plan: Plan, now: int) -> None:
        if self._was_missed(plan.since) and now - plan.since > self._longest_gap:
            self._log.warning(
                "schedule %r: ticks since %s were missed; tasks for them: %d",
                plan.entry.name,
                to_datetime(plan.since),
                len(plan.run),
            )
            if listeners := self._hooks.ticks_missed:
                since = to_datetime(plan.since)
                self._hooks.tell(listeners, lambda: plan.entry.name, since)


def _ticks_of(entry: Entry, known: Read | None) -> Ticks:
    """Return the ticks of a schedule; reuse the known object if its ticks have not changed."""
    old = None if known is None else known.entry
    if known is None or old is None or known.ticks is None:
        return entry.ticks
    same = (old.spec, old.tz, old.since) == (entry.spec, entry.tz, entry.since)
    return known.ticks if same else entry.ticks
