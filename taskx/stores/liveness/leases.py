"""Leases: the liveness of nodes that may run on several hosts.

**Heartbeat.** A thread writes the note of each node again and again, so that the note's version rises. This
is one write, to a note that no other process writes. The thread is one of this module, or that of a caller
who tends the node.

**Death.** A node is dead when its heartbeat has stood still for a whole lease. Each observer measures this
with its own monotonic clock. It counts only the time between two successful polls that were close
together, so that the time during which the server was away does not count.

**Count.** The observers add up their times in a second note of the node, by compare-and-set. A poll
counts only if heartbeat and count have not changed, so that the sum never exceeds the time that passed.
The count names the heartbeat that it belongs to.

**Mark.** A dead node is marked, by compare-and-set against its heartbeat, before its tasks are taken
over. No heartbeat revives a marked note. The node comes back when that note is gone.

**Look.** A process that looks rarely, such as a command, can never count a whole lease. So it says neither
"alive" nor "dead" if the time in a note is more than two leases away from its own clock, unless it has
itself seen the heartbeat change. No rescue depends on that time: only a count of a whole lease does.

A node starts nothing while it is marked, or while none of its heartbeats was acknowledged for a lease minus
a margin. Its running tasks are asked to end.

On one host the lock of :mod:`taskx.stores.liveness.locks` shows a death sooner.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs

from taskx.stores.liveness.base import (
    PREFIX,
    Applies,
    Node,
    Own,
    Recorded,
    Store,
    described,
    says_dead,
)
from taskx.stores.liveness.began import Began
from taskx.stores.liveness.locks import HostLocks
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.errors import RepositoryError
from taskx.tasks.log import Complaint, log
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Delete, Insert, Note, Write

#: The length of a lease in seconds, unless the repository has another one.
LEASE = 30.0
#: The suffix of the name of a node's second note: how long its heartbeat has stood still.
_STILL = "/still"


class _Leased(Own):
    """A node of this process, with the state of its lease."""

    def __init__(
        self, node: Node, facts: Mapping[str, Any], acknowledged: float, tended: bool
    ) -> None:
        super().__init__(node, facts)
        #: True if the caller has the heartbeats sent; then the time of the next one.
        self.tended = tended
        self.next_beat = acknowledged
        #: The time at which the last acknowledged heartbeat was sent.
        self.acknowledged = acknowledged
        self.dead = False
        self.told = False
        self.complaint = Complaint(log, "heartbeats are written again")
        self.tell: Callable[[], Any] = lambda: None


@attrs.define(eq=False, repr=False)
class _Observation:
    """The time for which this process has seen a heartbeat of another node stand still.

    ``moved`` is a time before the heartbeat changed to what it is; None if this process has not seen that.
    """

    beat: int
    still: int
    moved: float | None = None
    counted: float = 0.0
    at: float | None = None


class Leases(Recorded[_Leased]):
    """The strategy that uses leases: a node without a heartbeat for ``lease`` seconds is dead."""

    def __init__(
        self,
        store: Store,
        lease: float,
        locks: HostLocks,
        monotonic: Callable[[], float],
        now_ms: Callable[[], int] = SYSTEM_CLOCK.now_ms,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        super().__init__(store)
        self._timing = timing
        self._lease = lease
        self._locks = locks
        self._monotonic = monotonic
        self._now_ms = now_ms  # for people: no rescue depends on it
        # Observers cannot be expected to poll more often than housekeepers do.
        self._longest_gap = 2 * max(lease / timing.lease_beats, timing.recover_every)
        self._trusted = lease * (1 - timing.lease_margin)  # seconds after a heartbeat
        self.interval = lease / timing.lease_beats
        self.renew()

    def renew(self) -> None:
        super().renew()
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._observations: dict[str, _Observation] = {}
        self._thread: threading.Thread | None = None
        self._telling = threading.Lock()
        self._watcher: threading.Thread | None = None

    # --- own nodes

    def join(self, node: Node, *, tended: bool = False) -> None:
        host, lock = self._locks.hold(node.id)
        facts = {"host": host, "lock": lock, "beat_at": self._now_ms()}
        own = _Leased(node, facts, self._monotonic(), tended)
        try:
            self._write(node.id, own)
        except BaseException:
            self._locks.release(node.id)
            raise
        try:
            with self._changed:
                self._own[node.id] = own
                if tended:
                    self._start_watch()
                elif self._thread is None:
                    thread = threading.Thread(target=self._run, name="taskx-beat", daemon=True)
                    thread.start()
                    self._thread = thread
        except BaseException:  # the thread did not start, so nothing would send heartbeats
            self.leave(node.id)
            raise

    def tend(self, node: str) -> None:
        own = self._own.get(node)
        if own is None or not own.tended or (began := self._monotonic()) < own.next_beat:
            return
        with self._changed:
            self._start_watch()  # a system with too many threads may have refused it
        self._beat_on(node, own)
        own.next_beat = self._monotonic() + self._until_next(began)

    def watch(self, node: str, lost: Callable[[], object]) -> None:
        self._own[node].tell = lost

    def leave(self, node: str) -> None:
        try:
            self._remove(node, if_dead=True)
        finally:  # if the record remains, its lease expires
            with self._changed:
                self._changed.notify_all()
                thread = None if self._own else self._thread
            self._locks.release(node)
            if thread is not None:  # a heartbeat on its way would open a closed repository again
                thread.join(self._timing.close_within)

    def seems_dead(self, node: str) -> bool:
        return (own := self._own.get(node)) is not None and own.dead

    def come_back(self, node: str) -> None:
        """Remove the record, if it says so still: the next heartbeat writes another one."""
        note = self._store.notes(PREFIX + node).get(PREFIX + node)
        if note is not None and says_dead(note):
            self._put(PREFIX + node, None, note.version)

    def began(self, node: str) -> Began | None:
        return self._locks.began(node)

    @property
    def applies(self) -> Applies:
        return self

    def apply(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Apply writes, except those by which a node with a lost lease would take or start a task."""
        refused = [self._needs_lost_lease(write) for write in writes]
        if True not in refused:
            return self._store.apply(writes)
        allowed = [write for write, no in zip(writes, refused, strict=True) if not no]
        held = iter(self._store.apply(allowed))
        return [False if no else next(held) for no in refused]

    def _needs_lost_lease(self, write: Write) -> bool:
        owner = write.changes.get("owner")
        if not owner or isinstance(write, Delete):
            return False
        if isinstance(write, Insert):
            begins = write.row.get("status") == "running"
        else:
            begins = write.guard.get("status") == "pending"
        return begins and self.lost(owner)

    def lost(self, node: str) -> bool:
        """Return True if a node of this process must not start a task now."""
        own = self._own.get(node)
        return own is not None and (own.dead or self._monotonic() >= self._deadline(own))

    def _deadline(self, own: _Leased) -> float:
        return own.acknowledged + self._trusted

    # --- heartbeats

    def _run(self) -> None:
        while True:
            with self._changed:
                nodes = {node: own for node, own in self._own.copy().items() if not own.tended}
                if not nodes:
                    self._thread = None
                    return
                self._start_watch()
            began = self._monotonic()
            for node, own in nodes.items():
                self._beat_on(node, own)
            with self._changed:
                wait = self._until_next(began)
                if self._own:
                    self._changed.wait(wait)

    def _until_next(self, began: float) -> float:
        return max(began + self.interval - self._monotonic(), self.interval / 10)

    def _beat_on(self, node: str, own: _Leased) -> None:
        try:
            self.beat(node, own)
        except BaseException:  # noqa: BLE001  (without this thread all nodes here would count as dead)
            log.exception("the heartbeat of node %s failed; its thread continues", node)

    def beat(self, node: str, own: _Leased | None = None) -> None:
        """Send the heartbeat of a node; report a lost lease if none has succeeded for too long."""
        own = own or self._own[node]
        self._tell(node, own)
        sent = self._monotonic()
        left = self._deadline(own) - sent
        # The time-out makes sure that a lost lease is reported in time. After that, it may be longer.
        timeout = 2 * self.interval if left <= 0 else min(2 * self.interval, left)
        try:
            own.facts["beat_at"] = self._now_ms()
            with self._store.house.within(max(timeout, 0.01)):
                own.dead = not self._write(node, own)
        except RepositoryError as error:
            name = own.facts["name"]
            own.complaint.make("node %s cannot write its heartbeat: %s", name, error)
        else:
            own.complaint.over()
            if not own.dead:
                own.acknowledged = sent
        self._tell(node, own)

    def _tell(self, node: str, own: _Leased) -> None:
        with self._telling:
            lost = self.lost(node)
            changed, own.told = lost is not own.told, lost
        if changed and not lost:
            log.info("node %s has its lease again", own.facts["name"])
        elif changed:
            log.warning(
                "node %s lost its lease: other nodes may run its tasks, so its running tasks are asked "
                "to end",
                own.facts["name"],
            )
        if lost:
            own.tell()

    # --- the time limit of a heartbeat that hangs

    def _start_watch(self) -> None:
        if self._watcher is None:
            watcher = threading.Thread(target=self._watch, name="taskx-lease", daemon=True)
            with suppress(RuntimeError):  # too many threads: the next heartbeat tries again
                watcher.start()
                self._watcher = watcher

    def _watch(self) -> None:
        """Report lost leases in time: the network may hold a heartbeat longer than its time-out."""
        while True:
            with self._changed:
                if not self._own:
                    self._watcher = None
                    return
                nodes, now = dict(self._own), self._monotonic()
                ends = (self._deadline(own) - now for own in nodes.values())
                self._changed.wait(min((end for end in ends if end > 0), default=self.interval))
            for node, own in nodes.items():
                if not own.told:
                    self._watch_over(node, own)

    def _watch_over(self, node: str, own: _Leased) -> None:
        try:
            self._tell(node, own)
        except BaseException:  # noqa: BLE001  (this thread watches over all nodes here)
            log.exception("node %s could not be told of its lost lease", node)

    # --- nodes of other processes

    def nodes(self) -> Sequence[Node]:
        asked = self._monotonic()
        try:
            notes = self._store.notes(PREFIX)
            with self._lock:
                return self._judge_all(notes, asked)
        except RepositoryError:
            with self._lock:
                for seen in self._observations.values():
                    seen.at = None
            raise

    def _judge_all(self, notes: Mapping[str, Note], asked: float) -> list[Node]:
        self._observations = {
            name: seen for name, seen in self._observations.items() if name in notes
        }
        nodes = []
        for name, note in sorted(notes.items()):
            if not name.endswith(_STILL):
                facts = json.loads(note.text)
                alive = self._alive(name, facts, notes, asked)
                late = alive is True and self._is_late(name.removeprefix(PREFIX), name)
                nodes.append(described(name, facts, alive, late=late))
            elif name.removesuffix(_STILL) not in notes:  # it was counted after the node had left
                self._put(name, None, note.version)
        return nodes

    def _is_late(self, node: str, name: str) -> bool:
        """Return True if the heartbeat of a live node has stood still for some intervals."""
        if node in self._own:
            return self.lost(node)
        seen = self._observations.get(name)
        return (
            seen is not None
            and seen.still / 1000 + seen.counted > self._timing.lease_late * self.interval
        )

    def is_dead(self, node: str) -> bool:
        """Return True if a node is dead now: its note is marked, or gone."""
        note = self._store.notes(PREFIX + node).get(PREFIX + node)
        return note is None or says_dead(note)

    def _alive(
        self, name: str, facts: dict[str, Any], notes: Mapping[str, Note], asked: float
    ) -> bool | None:
        node = name.removeprefix(PREFIX)
        if node in self._own:
            return True
        if facts.get("dead"):
            return False
        here = self._locks.alive(node, facts["host"], facts["lock"])
        if here is None and self._lives_yet(name, notes, asked):
            return self._is_heard(name, facts.get("beat_at"), asked) or None
        if here is not None:
            self._observations.pop(name, None)
        return here or not self._mark_dead(name, notes[name])

    def _lives_yet(self, name: str, notes: Mapping[str, Note], asked: float) -> bool:
        """Count how long the heartbeat of a node has stood still; return False if it is a whole lease."""
        beat, count = notes[name].version, notes.get(name + _STILL)
        still = _still(count, beat)
        seen = self._observations.get(name)
        if seen is None or (seen.beat, seen.still) != (beat, still):
            moved = None if seen is None else seen.moved if seen.beat == beat else seen.at
            seen = self._observations[name] = _Observation(beat, still, moved)
        elif seen.at is not None and asked - seen.at <= self._longest_gap:
            seen.counted += max(0.0, asked - seen.at)
        seen.at = self._monotonic()
        total = still + int(seen.counted * 1000)
        if total >= self._lease * 1000:
            return False
        if seen.counted >= self.interval / 2 and self._put(
            name + _STILL, json.dumps([beat, total]), 0 if count is None else count.version
        ):
            seen.counted -= (total - still) / 1000
            seen.still = total
        return True

    def _is_heard(self, name: str, beat_at: int | None, asked: float) -> bool:
        """Return True if a heartbeat was seen to change lately, or is recent by its own time."""
        most, moved = self._timing.lease_silent * self._lease, self._observations[name].moved
        if moved is not None and asked - moved <= most:
            return True
        return beat_at is None or abs(self._now_ms() - beat_at) <= most * 1000

    def _mark_dead(self, name: str, note: Note) -> bool:
        """Mark a node as dead, unless it sent a heartbeat after its note was read."""
        return self._put(name, json.dumps({**json.loads(note.text), "dead": True}), note.version)


def _still(count: Note | None, beat: int) -> int:
    """Return the milliseconds that all observers together have counted for a heartbeat."""
    about, still = (0, 0) if count is None else json.loads(count.text)
    return still if about == beat else 0
