"""The processes of a supervisor, and the rules by which they are started, replaced and stopped.

A fleet has a number of places. Each has one process in service. This module starts no process and reads no
clock by itself, so that tests can drive it.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs

from taskx.programs.worker.settings import RECYCLE
from taskx.tasks.timing import DEFAULT_TIMING, Timing

log = logging.getLogger("taskx.worker")


class Handle(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def say(self, *message: Any) -> None:
        """Send it an order."""

    def kill(self) -> None:
        """Kill it, and the programs that it has started."""


@attrs.define(eq=False)
class Member:
    """One process of the fleet.

    Attributes:
        handle: the process.
        place: the number of its place.
        started_at: the time of its start, by the supervisor's clock.
        beat_at: the time of its last beat; None: its queue has not started yet.
        facts: what its last beat said.
        failure: the exit code and the sentence of a process that cannot start.
        kill_at: the time at which it is killed; None: it was not told to stop.
    """

    handle: Handle
    place: int
    started_at: float
    beat_at: float | None = None
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    failure: tuple[int, str] | None = None
    kill_at: float | None = None

    @property
    def ready(self) -> bool:
        """True if its queue has started."""
        return self.beat_at is not None

    @property
    def name(self) -> str:
        """Its name in the log."""
        return f"process {self.place} (pid {self.handle.pid})"


@attrs.define(eq=False)
class Place:
    """A place in the fleet: the process in service, and the one that will replace it."""

    number: int
    member: Member | None = None
    successor: Member | None = None
    start_at: float = 0.0
    started: bool = False  #: True once it had a process whose queue has started
    deaths: int = 0  #: early deaths since a process proved itself
    trouble: str = ""  #: the reason why no process is in service


class Fleet:
    """All processes of one supervisor.

    Args:
        count: the number of places.
        stop_timeout: seconds that a process has to end after the order ``stop``.
        spawn: starts a process for the place of this number. It may raise ``OSError``.
        now: the clock, in seconds.
        patient: True if a process that cannot start waits for a change by itself.
        timing: says how long processes may take, and when they are started again.
    """

    def __init__(
        self,
        count: int,
        stop_timeout: float,
        spawn: Callable[[int], Handle],
        now: Callable[[], float],
        *,
        patient: bool = False,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._timing = timing
        self._spawn = spawn
        self._now = now
        self._stop_timeout = stop_timeout
        self._patient = patient
        self.places = [Place(number) for number in range(1, count + 1)]
        #: The processes that were told to stop, or asked to be replaced.
        self.leaving: list[Member] = []
        #: True once each place had a process whose queue has started.
        self.begun = False
        #: The number of orders to stop so far.
        self.stops = 0
        self._outdated: list[Place] = []  # places whose process must be replaced
        self._unclean = False  # True if a process was killed or left a task running at the stop
        #: The exit code and the sentence of a start that failed.
        self.fatal: tuple[int, str] | None = None

    # --- the state

    def members(self) -> Iterator[Member]:
        """Yield all processes that have not ended."""
        for place in self.places:
            yield from filter(None, (place.member, place.successor))
        yield from self.leaving

    @property
    def replacing(self) -> bool:
        """True while processes are being replaced on request."""
        return bool(self._outdated) or any(
            place.successor or not (place.member and place.member.ready) for place in self.places
        )

    @property
    def over(self) -> bool:
        """True if the fleet was told to stop, and no process is left."""
        return self.stops > 0 and not any(True for _ in self.members())

    @property
    def code(self) -> int:
        """The exit code of a fleet that is over, without the numbers of signals."""
        return self.fatal[0] if self.fatal else int(self._unclean)

    def problems(self) -> Sequence[str]:
        """Return a sentence for everything that is wrong. The first start is not a problem."""
        found = [*self.broken()]
        for place in self.places:
            if (member := place.member) is not None:
                found += (f"In {member.name}: {one}" for one in member.facts.get("problems", ()))
        return found

    def broken(self) -> Sequence[str]:
        """Return a sentence for each process that another one in its place could do better than."""
        found = []
        for place in self.places:
            member = place.member
            if place.trouble:
                if not self.stops:
                    found.append(f"Process {place.number} is down: {place.trouble}.")
                continue
            if member is None or not (member.ready or self.begun):
                continue  # it may take its time for the first start
            silent = self._now() - (member.beat_at or member.started_at)
            if silent > self._timing.beat_within:
                found.append(f"The {member.name} has said nothing for {silent:.0f} s.")
            elif not member.facts.get("healthy", True):
                found.append(f"The queue of {member.name} is not healthy.")
        return found

    # --- events

    def heard(self, member: Member, kind: str, *facts: Any) -> None:
        """Note a message of a process."""
        if kind == "beat":
            first, member.beat_at = not member.ready, self._now()
            (member.facts,) = facts
            if first:
                self._became_ready(member)
        elif kind == "leaving":
            log.info("%s is replaced: %s", member.name, facts[0])
            self._let_go(member)
        elif kind == "failed":
            member.failure = facts[0], facts[1]
            if self._patient:
                place = self._place(member)
                place.trouble = facts[1]
                log.error("%s cannot start: %s; it waits for a change", member.name, facts[1])

    def _became_ready(self, member: Member) -> None:
        place = self._place(member)
        place.trouble, place.started = "", True
        log.info("%s is ready", member.name)
        if place.successor is member:
            before, place.member, place.successor = place.member, member, None
            if before is not None:
                self._retire(before)
        self.begun = all(one.started for one in self.places)

    def ended(self, member: Member, status: int) -> None:
        """Note the end of a process; a negative status is the number of the signal that killed it."""
        how = _how(status, member)
        if member in self.leaving:
            self.leaving.remove(member)
            clean = status in (0, RECYCLE) or not member.ready
            self._unclean = self._unclean or (self.stops > 0 and not clean)
            log.log(logging.INFO if clean else logging.WARNING, "%s %s", member.name, how)
            return
        place = self._place(member)
        if place.successor is member:
            place.successor = None
            self._outdated.clear()
            log.error("%s %s: the replacement ends, and the old processes go on", member.name, how)
            return
        place.member, place.successor = place.successor, None
        if place.member is not None:
            log.warning("%s %s; %s takes its place", member.name, how, place.member.name)
            return
        if status == RECYCLE:
            place.start_at = self._now()
            return
        place.trouble = f"it {how}"
        if self.begun:
            proven = member.ready and self._now() - member.started_at >= self._timing.proven_after
            self._start_later(place, f"{member.name} {how}", proven=proven)
        else:
            self._give_up(f"{member.name} {how}", member.failure[0] if member.failure else 1)

    def _give_up(self, sentence: str, code: int) -> None:
        self.fatal = code, sentence
        log.error("%s: the worker ends", sentence)
        self.stop()

    def _start_later(self, place: Place, sentence: str, *, proven: bool) -> None:
        place.deaths = 0 if proven else place.deaths + 1
        wait = backoff(place.deaths, self._timing.longest_restart_pause)
        place.start_at = self._now() + wait
        log.warning("%s; another one starts %s", sentence, f"in {wait:g} s" if wait else "now")

    # --- orders

    def replace(self) -> None:
        """Replace all processes, one by one: the next one starts when the one before is ready.

        A process stops when its successor is ready, or before that one starts if it must be alone.
        """
        if self.stops:
            return
        self._outdated = [place for place in self.places if place.member is not None]
        for place in self.places:
            place.start_at, place.deaths = self._now(), 0
            if place.successor is not None:  # its code is outdated, too, and its start may hang
                self._retire(place.successor)
                place.successor = None

    def stop(self) -> None:
        """Tell all processes to stop; a second time, to stop at once; a third time, kill them."""
        self.stops += 1
        self._outdated.clear()
        for place in self.places:
            for member in filter(None, (place.member, place.successor)):
                self.leaving.append(member)
            place.member = place.successor = None
        for member in self.leaving:
            self._order(member)

    def _order(self, member: Member) -> None:
        if self.stops >= 3:
            member.handle.kill()
            return
        member.handle.say("stop" if self.stops < 2 else "now")
        patience = self._timing.end_within + (self._stop_timeout if self.stops < 2 else 0)
        deadline = self._now() + patience
        member.kill_at = deadline if member.kill_at is None else min(member.kill_at, deadline)

    def _retire(self, member: Member) -> None:
        member.handle.say("stop")
        member.kill_at = self._now() + self._stop_timeout + self._timing.end_within
        self.leaving.append(member)

    def _let_go(self, member: Member) -> None:
        """Free the place of a process that stops by itself."""
        if member in self.leaving:
            return
        place = self._place(member)
        if place.successor is not None:  # it comes in any case
            place.member, place.successor = place.successor, None
        else:
            place.member, place.start_at = None, self._now()
        if place in self._outdated:
            self._outdated.remove(place)
        member.kill_at = self._now() + self._stop_timeout + self._timing.end_within
        self.leaving.append(member)

    def step(self) -> None:
        """Do what is due now: start processes, and kill those whose time is over."""
        now = self._now()
        for member in list(self.leaving):
            if member.kill_at is not None and now >= member.kill_at:
                log.warning("%s has not stopped in time, and is killed", member.name)
                member.kill_at = None
                member.handle.kill()
        for place in self.places:
            here = (one for one in self.leaving if one.place == place.number)
            free = not any(map(self._must_be_alone, here))
            if not self.stops and place.member is None and now >= place.start_at and free:
                place.member = self._start(place)
        if self._outdated and not any(place.successor for place in self.places):
            place = self._outdated.pop(0)
            if place.member is not None and self._must_be_alone(place.member):
                self._retire(place.member)
                place.member = None  # the next one starts when this one has ended
            elif place.member is not None:  # else a new one has started or will start
                place.successor = self._start(place)

    def _must_be_alone(self, member: Member) -> bool:
        """Return True if no process may start beside one: its repository is for one, or not known yet.

        A process of several refuses such a repository before it is ready.
        """
        return len(self.places) == 1 and not (member.ready and member.facts.get("shared", True))

    def _start(self, place: Place) -> Member | None:
        """Start a process. Return None if the system cannot, for example because memory is short."""
        try:
            member = Member(self._spawn(place.number), place.number, self._now())
        except OSError as error:
            self._not_started(place, f"cannot be started: {error}")
            return None
        log.info("%s starts", member.name)
        return member

    def _not_started(self, place: Place, how: str) -> None:
        if place.member is not None:
            self._outdated.clear()
            log.error("process %d %s: the old processes go on", place.number, how)
            return
        place.trouble = f"it {how}"
        sentence = f"process {place.number} {how}"
        if self.begun:
            self._start_later(place, sentence, proven=False)
        else:
            self._give_up(sentence, 1)

    def _place(self, member: Member) -> Place:
        return self.places[member.place - 1]


def backoff(deaths: int, longest: float) -> float:
    """Return the seconds before the next start, after a number of early deaths: 0, 1, 2, 4, …."""
    return 0.0 if deaths <= 1 else min(longest, 2.0 ** min(deaths - 2, 10))


def _how(status: int, member: Member) -> str:
    """Return how a process ended, for a sentence."""
    if member.failure:
        return f"cannot start: {member.failure[1]}"
    if status < 0:
        names = {known.value: known.name for known in signal.Signals}
        return f"was killed by {names.get(-status, f'signal {-status}')}"
    return f"has ended with exit code {status}"
