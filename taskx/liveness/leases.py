"""Which nodes live, where they may be on several hosts.

Every node has a beat: a thread writes its note anew, so that the note's version rises. To whoever looks,
a node is dead when its beat has stood still for a whole lease: by the looker's own monotonic clock, and
counting only the time between two successful looks that were close together, so that a server that was
away ages nobody. What was counted is added up in a second note of the node, by compare-and-set: a look
counts only while beat and count stay as they were, so that the sum never exceeds what passed. The count
says which beat it is about, so that a beat is one write to a note that nobody else writes.

A node that is dead is so marked, by compare-and-set against its beat, before anything is taken from it,
and no beat revives a marked note. It comes back when that note is gone. Until then, and whenever no beat
of its own was acknowledged for a lease less a margin, it starts nothing, and what it runs is told to end.

On one host the lock of :mod:`taskx.liveness.locks` tells sooner.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from taskx.core.errors import RepositoryError
from taskx.core.log import Complaint, log
from taskx.core.writes import Delete, Insert, Note, Write
from taskx.liveness.base import PREFIX, Applies, Node, Own, Recorded, Store, described, says_dead
from taskx.liveness.began import Began
from taskx.liveness.locks import HostLocks

#: Seconds of a lease, unless the repository says otherwise.
LEASE = 30.0
#: Beats in a lease, and the part of it that is kept as a margin.
BEATS, MARGIN = 10, 0.2
#: Seconds between looks that a housekeeper makes anyway: a closer interval cannot be expected.
_LOOKS_EVERY = 0.5
#: How the name of the note ends that says how long the beat of a node has stood still.
_STILL = "/still"


class _Leased(Own):
    """A node of this process."""

    def __init__(self, node: Node, facts: Mapping[str, Any], acknowledged: float) -> None:
        super().__init__(node, facts)
        #: When the last beat was sent that the server acknowledged.
        self.acknowledged = acknowledged
        self.dead = False
        self.told = False
        self.complaint = Complaint(log)
        self.tell: Callable[[], Any] = lambda: None


@attrs.define
class _Look:
    """How long this process has seen a beat of another node stand still."""

    beat: int
    still: int
    counted: float = 0.0
    at: float | None = None


class Leases(Recorded[_Leased]):
    """Keeps this process's nodes alive; one that does not beat for ``lease`` seconds is dead."""

    def __init__(
        self, store: Store, lease: float, locks: HostLocks, monotonic: Callable[[], float]
    ) -> None:
        super().__init__(store)
        self._lease = lease
        self._locks = locks
        self._monotonic = monotonic
        self.interval = lease / BEATS
        self.renew()

    def renew(self) -> None:
        super().renew()
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._looks: dict[str, _Look] = {}
        self._thread: threading.Thread | None = None

    # --- own nodes

    def join(self, node: Node) -> None:
        host, lock = self._locks.hold(node.id)
        own = _Leased(node, {"host": host, "lock": lock}, self._monotonic())
        try:
            self._write(node.id, own)
        except BaseException:
            self._locks.release(node.id)
            raise
        try:
            with self._changed:
                self._own[node.id] = own
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="taskx-beat", daemon=True)
                    thread.start()
                    self._thread = thread
        except BaseException:  # no thread to be had: nobody would show that it lives
            self.leave(node.id)
            raise

    def watch(self, node: str, lost: Callable[[], object]) -> None:
        self._own[node].tell = lost

    def leave(self, node: str) -> None:
        try:
            self._remove(node, if_dead=True)
        finally:  # if the record stays, its lease runs out
            with self._changed:
                self._changed.notify_all()
            self._locks.release(node)

    def began(self, node: str) -> Began | None:
        return self._locks.began(node)

    @property
    def applies(self) -> Applies:
        return self

    def apply(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Apply writes, but none by which a node that lost its lease would take a task or start one."""
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
        """Whether a node of this process must not start anything now."""
        own = self._own.get(node)
        return own is not None and (own.dead or self._monotonic() >= self._deadline(own))

    def _deadline(self, own: _Leased) -> float:
        return own.acknowledged + self._lease * (1 - MARGIN)

    # --- beating

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._own:
                    self._thread = None
                    return
                nodes = dict(self._own)
            began = self._monotonic()
            for node, own in nodes.items():
                self._beat_on(node, own)
            with self._changed:
                wait = self._until_next(began)
                if self._own:
                    self._changed.wait(wait)

    def _until_next(self, began: float) -> float:
        now = self._monotonic()
        next_beat = began + self.interval
        # Wake up at a deadline that comes sooner; one that has passed was told of.
        ends = [end for own in list(self._own.values()) if (end := self._deadline(own)) > now]
        return max(min([next_beat, *ends]) - now, self.interval / 10)

    def _beat_on(self, node: str, own: _Leased) -> None:
        try:
            self.beat(node, own)
        except BaseException:  # noqa: BLE001  (without this thread all nodes here would be taken for dead)
            log.exception("node %s stumbled at its beat; it goes on", node)

    def beat(self, node: str, own: _Leased | None = None) -> None:
        """Show that a node lives; tell it where that failed for too long."""
        own = own or self._own[node]
        self._tell(node, own)
        sent = self._monotonic()
        left = self._deadline(own) - sent
        # Bounded, so that it is told in time; once that has passed, there is all the time.
        timeout = 2 * self.interval if left <= 0 else min(2 * self.interval, left)
        try:
            with self._store.within(max(timeout, 0.01)):
                own.dead = not self._write(node, own)
        except RepositoryError as error:
            name = own.facts["name"]
            own.complaint.make("node %s cannot show that it lives: %s", name, error)
        else:
            own.complaint.over()
            if not own.dead:
                own.acknowledged = sent
        self._tell(node, own)

    def _tell(self, node: str, own: _Leased) -> None:
        if not self.lost(node):
            if own.told:
                own.told = False
                log.info("node %s has its lease again", own.facts["name"])
            return
        if not own.told:
            own.told = True
            log.warning(
                "node %s lost its lease: others may run its tasks, so those that run are told to end",
                own.facts["name"],
            )
        own.tell()

    # --- the others

    def nodes(self) -> Sequence[Node]:
        asked = self._monotonic()
        try:
            notes = self._store.notes(PREFIX)
            with self._lock:
                return self._judge_all(notes, asked)
        except RepositoryError:
            with self._lock:
                for look in self._looks.values():
                    look.at = None
            raise

    def _judge_all(self, notes: Mapping[str, Note], asked: float) -> list[Node]:
        self._looks = {name: look for name, look in self._looks.items() if name in notes}
        nodes = []
        for name, note in sorted(notes.items()):
            if not name.endswith(_STILL):
                facts = json.loads(note.text)
                nodes.append(described(name, facts, self._alive(name, facts, notes, asked)))
            elif name.removesuffix(_STILL) not in notes:  # who counted came after the node had gone
                self._put(name, None, note.version)
        return nodes

    def is_dead(self, node: str) -> bool:
        """Whether a node is dead now: marked so, or gone."""
        note = self._store.notes(PREFIX + node).get(PREFIX + node)
        return note is None or says_dead(note)

    def _alive(
        self, name: str, facts: dict[str, Any], notes: Mapping[str, Note], asked: float
    ) -> bool:
        node = name.removeprefix(PREFIX)
        if node in self._own:
            return True
        if facts.get("dead"):
            return False
        here = self._locks.alive(node, facts["host"], facts["lock"])
        if here is None and self._lives_yet(name, notes, asked):
            return True
        if here is not None:
            self._looks.pop(name, None)
        return here or not self._mark_dead(name, notes[name])

    def _lives_yet(self, name: str, notes: Mapping[str, Note], asked: float) -> bool:
        """Count how long the beat of a node has stood still; False if that is a whole lease."""
        beat, count = notes[name].version, notes.get(name + _STILL)
        still = _still(count, beat)
        look = self._looks.get(name)
        if look is None or (look.beat, look.still) != (beat, still):
            look = self._looks[name] = _Look(beat, still)
        elif look.at is not None and asked - look.at <= 2 * max(self.interval, _LOOKS_EVERY):
            look.counted += max(0.0, asked - look.at)
        look.at = self._monotonic()
        total = still + int(look.counted * 1000)
        if total >= self._lease * 1000:
            return False
        if look.counted >= self.interval / 2 and self._put(
            name + _STILL, json.dumps([beat, total]), 0 if count is None else count.version
        ):
            look.counted -= (total - still) / 1000
            look.still = total
        return True

    def _mark_dead(self, name: str, note: Note) -> bool:
        """Mark a node as dead, if it has not beaten since its note was read."""
        return self._put(name, json.dumps({**json.loads(note.text), "dead": True}), note.version)


def _still(count: Note | None, beat: int) -> int:
    """For how many milliseconds a beat has stood still, as far as all have counted."""
    about, still = (0, 0) if count is None else json.loads(count.text)
    return still if about == beat else 0
