"""Shares: which key gets the next turn, if keys divide the workers between them.

Each node gives turns for its own workers: one for each that runs no such task, less those that it has given
and that have not started. So few turns are out, a new key waits for none but the next end of a task, and no
turn is overtaken for ever, whatever the order of the tasks that may start.

The next turn is that of the key that is behind the others: each turn moves a key on by 1 / its weight. A
key that has not waited begins beside the others. So turns go round by key, whatever the number of keys, and
nothing about it is stored. Keys that run more than their part of all workers come last: their tasks may be
longer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from taskx.attempt.runner import Run
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.clock import Clock
from taskx.tasks.lifecycle import PENDING
from taskx.tasks.rate import MOST_TURNS, Limit
from taskx.tasks.record import FOR_TURN, FREE, Stub
from taskx.tasks.writes import Update

#: Most keys that are compared, and most turns that are looked up to compare them.
_MOST_KEYS, _MOST_NAMES = 200, 256
# A text after all keys.
_LAST = "\U0010ffff"
# How often further keys are looked at, if those before can have no turn.
_MOST_LOOKS = 4
#: Most keys whose turns are remembered.
_MOST_KNOWN = 10_000
# Seconds for which the number of all workers is not read again, and after which an interrupt has cut the
# commit of a turn short.
_SOON = 1.0


class Crew(Protocol):
    """The workers of a started node."""

    #: True if it takes no more tasks.
    stopping: bool

    @property
    def runs(self) -> Mapping[str, Run]:
        """Its runs, by the ids of their tasks."""

    @property
    def workers(self) -> int:
        """The number of its workers."""

    @property
    def taker(self) -> str:
        """The node that takes tasks as they get their turns; empty if they must be fetched."""

    def may_start(self, type: str, key: str) -> bool:
        """Return True if a task of this type and key might start there now."""

    def holds(self, task_id: str) -> bool:
        """Return True if a pending task is in their buffer."""

    def take_in(self, stub: Stub) -> None:
        """Put a task that was taken with its turn into their buffer, unless it is there or has begun."""


class _Given(NamedTuple):
    """A turn that was given to a task."""

    turn: str
    leaver: str  #: the task whose outcome gives it; empty if a write of its own does
    at: float  #: on the monotonic clock
    stub: Stub | None  #: the task; None if it waits for a time


class Candidate:
    """A key for which tasks wait."""

    def __init__(
        self, key: str, limit: Limit, part: int, taken: dict[str, str], read: int, leaver: str
    ) -> None:
        self.key, self.limit = key, limit
        self.weight = limit.share or 1
        #: The tasks that have its first turns, by turn; how many turns were read.
        self.taken, self.read = taken, read
        self.part = part
        self.held = sum(task_id != leaver for task_id in taken.values())


class Round:
    """The turns that a node may give now.

    Args:
        shares: what is known of earlier rounds.
        leaver: the task that ends; empty if none does.
        room: the number of turns.
        workers: the number of workers of all nodes.
    """

    def __init__(self, shares: Shares, leaver: str, room: int, workers: int) -> None:
        self._shares, self._leaver = shares, leaver
        self._room, self._workers = room, workers
        self._left: list[Candidate] = []
        self._seen: set[str] = set()
        self._looks = _MOST_LOOKS

    def next(self) -> Candidate | None:
        """Return the key that gets the next turn; None if none is left to give."""
        if self._room > 0 and not self._left and self._looks:
            self._looks -= 1
            found = self._shares.candidates(self._workers, self._leaver)
            self._left = [one for one in found if one.key not in self._seen]
            self._seen.update(one.key for one in found)
        if self._room <= 0 or not self._left:
            return None
        return min(self._left, key=lambda one: (one.held >= one.part, self._shares.place(one.key)))

    def pass_over(self, one: Candidate) -> None:
        """Note that a key can have no turn now."""
        self._left.remove(one)
        if not self._left:
            self._shares.cursor = one.key  # those after it come next

    def give(self, one: Candidate, write: Update, stub: Stub | None) -> None:
        """Note that a key gets a turn by this write. A task that waits for a time then takes no worker."""
        self._shares.given(one.key, one.weight, write, self._leaver, stub)
        one.held += 1
        if stub is None:
            self.pass_over(one)
        else:
            self._room -= 1


class Shares:
    """The keys that share the workers, and the turns that this node has given.

    Args:
        repository: stores the tasks.
        limits: returns the limits with a share, by name.
        limit_of: returns the limit of a key.
        crew: returns the workers of this process; None if its queue is not started.
        clock: measures for how long turns are given.
    """

    def __init__(
        self,
        repository: Repository,
        limits: Callable[[], Mapping[str, Limit]],
        limit_of: Callable[[str], Limit | None],
        crew: Callable[[], Crew | None],
        clock: Clock,
    ) -> None:
        self._repository = repository
        self._limits = limits
        self._limit_of = limit_of
        self._crew = crew
        self._clock = clock
        #: Held while turns are chosen. Reentrant: a finalizer that submits may run in any thread.
        self.lock = threading.RLock()
        #: The turns that were given and whose tasks have not started, by the ids of the tasks.
        self.mine: dict[str, _Given] = {}
        # How far each key has moved on, and the place where a new one begins.
        self._places: dict[str, float] = {}
        self._now = 0.0
        #: The key that got the last turn of its round.
        self.cursor = ""
        self._workers, self._counted = 0, -math.inf

    def has(self, key: str) -> bool:
        """Return True if a key shares the workers with others."""
        limit = self._limit_of(key)
        return limit is not None and limit.share is not None

    def begin(self, leaver: str = "") -> Round | None:
        """Return what may be given while the task ``leaver`` ends; None if nothing may. Hold the lock."""
        if not self._limits() or (crew := self._crew()) is None or crew.stopping:
            return None
        room = crew.workers - self._running(crew)
        if room > 0:
            self._forget_started(crew)
            room -= len(self.mine)
        return Round(self, leaver, room, self._number_of_workers(crew)) if room > 0 else None

    def may_start(self, type: str, key: str) -> bool:
        """Return True if a task of this type and key might start on this node now."""
        crew = self._crew()
        return crew is not None and crew.may_start(type, key)

    @property
    def taker(self) -> str:
        """The node that takes tasks as they get their turns; empty if they must be fetched."""
        crew = self._crew()
        return "" if crew is None else crew.taker

    def take_in(self, stub: Stub) -> None:
        """Put a task that this node took with its turn into its buffer."""
        if (crew := self._crew()) is not None:
            crew.take_in(stub)

    # --- this node

    def _running(self, crew: Crew) -> int:
        """Return the number of such tasks that have a worker: those that are about to end have none."""
        return sum(
            run.state not in ("stuck", "concluding")
            and run.task.concurrency_key is not None
            and self.has(run.task.concurrency_key)
            for run in [*crew.runs.values()]
        )

    def _forget_started(self, crew: Crew) -> None:
        """Forget the given turns whose tasks have started, or wait for something else."""
        held = {task_id for task_id in self.mine if crew.holds(task_id)}
        unknown = [i for i in self.mine if i not in held and i not in crew.runs]
        fields = ("id", "status", "held", "type", "crashes")
        found = self._repository.find("id", unknown, fields) if unknown else ()
        kept = held | {
            task_id
            for task_id, status, held, type, crashes in found
            if status == PENDING
            and (
                (held == FREE and not crashes and self._is_ready(task_id, type, crew))
                or (held == FOR_TURN and self._is_coming(self.mine[task_id], crew))
            )
        }
        self.mine = {task_id: given for task_id, given in self.mine.items() if task_id in kept}

    def _is_ready(self, task_id: str, type: str, crew: Crew) -> bool:
        return crew.may_start(type, lifecycle.key_of(self.mine[task_id].turn))

    def _is_coming(self, given: _Given, crew: Crew) -> bool:
        """Return True if the write that gives a turn may not be committed yet."""
        if given.leaver:
            return given.leaver in crew.runs
        return self._clock.monotonic() < given.at + _SOON

    def settle(self, writes: Iterable[Update]) -> None:
        """Note that the commit of these writes is over. Those that did not hold have given no turn."""
        with self.lock:
            for write in writes:
                if (given := self.mine.get(write.id)) is not None and not given.leaver:
                    self.mine[write.id] = given._replace(at=-math.inf)

    # --- all nodes

    def _number_of_workers(self, crew: Crew) -> int:
        now = self._clock.monotonic()
        if now >= self._counted + _SOON:
            nodes = self._repository.nodes()
            self._workers = sum(node.workers for node in nodes if node.lives and not node.stopping)
            self._counted = now
        return max(self._workers, crew.workers)

    # --- the keys for which tasks wait

    def candidates(self, workers: int, leaver: str) -> list[Candidate]:
        """Return the next keys, with their turns but for the leaver's, and their parts of all workers."""
        if not (waiting := self._waiting(workers)):
            return []
        total = sum(limit.share or 1 for limit in waiting.values())
        parts = {
            key: max(1, math.ceil(workers * (limit.share or 1) / total))
            for key, limit in waiting.items()
        }
        most = _MOST_NAMES // len(waiting)
        read = {key: min(workers + 1, MOST_TURNS, max(part, most)) for key, part in parts.items()}
        names = [name for key, number in read.items() for name in lifecycle.turns_of(key, number)]
        taken = dict[str, dict[str, str]]()
        for turn, task_id in self._repository.find("turn", names, ("turn", "id")):
            taken.setdefault(lifecycle.key_of(turn), {})[turn] = task_id
        return [
            Candidate(key, limit, parts[key], taken.get(key, {}), read[key], leaver)
            for key, limit in waiting.items()
        ]

    def _waiting(self, workers: int) -> dict[str, Limit]:
        """Return keys for which tasks wait, with their limits: those after the last one that had a turn."""
        most = min(2 * workers + 8, _MOST_KEYS)
        names = _outermost(self._limits())
        later = [name for name in names if name > self.cursor or self.cursor.startswith(name)]
        found: dict[str, Limit] = {}
        spans = [(name, self.cursor, _LAST) for name in later]
        spans += [(name, "", self.cursor) for name in names if name <= self.cursor]
        for span in spans:
            for key in self._keys(*span):
                limit = self._limit_of(key)
                if limit is not None and limit.share is not None:
                    found[key] = limit
                if len(found) >= most:
                    return found
        return found

    def _keys(self, name: str, after: str, until: str) -> Iterator[str]:
        """Yield the keys in line that begin with a name, from the first after ``after`` on."""
        after = max(after, _just_before(name))
        while after < until and (keys := self._repository.distinct("line", after, _MOST_KEYS)):
            for key in keys:
                if key > until or not key.startswith(name):
                    return
                yield key
            after = keys[-1]

    # --- the order

    def place(self, key: str) -> float:
        """Return how far a key has moved on; one that has not waited lately is beside the others."""
        return max(self._places.get(key, self._now), self._now - 1)

    def given(self, key: str, weight: int, write: Update, leaver: str, stub: Stub | None) -> None:
        """Note that a key gets a turn by this write."""
        now = self._clock.monotonic()
        self.mine[write.id] = _Given(write.changes["turn"], leaver, now, stub)
        place = self.place(key)
        if place >= self._now:  # else it catches up, out of the order of the round
            self.cursor = key
        self._now = max(self._now, place)
        self._places[key] = place + 1 / weight
        if len(self._places) > _MOST_KNOWN:
            self._places.clear()


def _outermost(names: Mapping[str, Limit]) -> list[str]:
    """Return these names but for those that begin with another one that is for all such keys."""
    every = [name for name in names if name.endswith(":")]
    return sorted(n for n in names if not any(n != e and n.startswith(e) for e in every))


def _just_before(name: str) -> str:
    """Return a text that comes before a name, and before few other texts that do."""
    last = ord(name[-1]) - 1
    if 0xD800 <= last <= 0xDFFF:  # no text has these
        last = 0xD7FF
    return name[:-1] + (chr(last) + "\U0010ffff" if last >= 0 else "")
