"""Which nodes live, where they may be on several hosts.

Every node has a record with a counter, its beat, which a thread raises. To whoever looks, a node is
dead when its beat has stood still for a whole lease: by the looker's own monotonic clock, and counting
only the time between two successful looks that were close together, so that a server that was away
ages nobody. What was counted is added up on the node's record (``still``), by compare-and-set: a look
counts only while record and count stay as they were, so that the sum never exceeds what passed.

A node that is dead is so marked before anything is taken from it, and no beat revives a marked record.
It comes back when that record is gone. Until then, and whenever no beat of its own was acknowledged
for a lease less a margin, it starts nothing, and what it runs is told to end.

On one host the lock of :mod:`taskx.storage.sqlite.liveness` tells sooner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from pymongo.errors import DuplicateKeyError

from taskx.core.errors import RepositoryError
from taskx.core.log import log
from taskx.storage.base import Node
from taskx.storage.began import Began
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.documents import Document
from taskx.storage.mongo.hosts import HostLocks

#: Beats in a lease, and the part of it that is kept as a margin.
BEATS, MARGIN = 10, 0.2
#: Seconds between looks that a scheduler makes anyway: a closer interval cannot be expected.
_LOOKS_EVERY = 0.5


class Leases:
    """Keeps this process's nodes alive, and judges the others.

    Args:
        connection: the way to the server.
        lease: seconds after which a node that does not beat is dead.
        locks: what tells of nodes on the same host.
        monotonic: what time is measured by.
    """

    def __init__(
        self,
        connection: Connection,
        lease: float,
        locks: HostLocks,
        monotonic: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._lease = lease
        self._locks = locks
        self._monotonic = monotonic
        self.interval = lease / BEATS
        self.renew()

    def renew(self) -> None:
        """In a forked child: it has no nodes."""
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._own: dict[str, _Own] = {}
        self._looks: dict[str, _Look] = {}
        self._thread: threading.Thread | None = None

    # --- own nodes

    def join(self, node: Node) -> None:
        """Record a node and keep it alive."""
        host, inode = self._locks.hold(node.id)
        own = _Own(_record(node, host, inode), self._monotonic())
        try:
            self._connection.run(lambda: self._insert(own))
        except BaseException:
            self._locks.release(node.id)
            raise
        try:
            self._keep_alive(node.id, own)
        except BaseException:  # no thread to be had: nobody would show that it lives
            self.leave(node.id)
            raise

    def _keep_alive(self, node: str, own: _Own) -> None:
        with self._changed:
            self._own[node] = own
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="taskx-beat", daemon=True)
                thread.start()
                self._thread = thread

    def watch(self, node: str, lost: Callable[[], object]) -> None:
        """Have ``lost()`` called whenever a node of this process has lost its lease."""
        self._own[node].tell = lost

    def leave(self, node: str) -> None:
        """Forget a node: one's own, or one that is dead."""
        with self._changed:
            own = self._own.pop(node, None)
            self._changed.notify_all()
        try:
            if own is None:
                self._delete({"_id": node, "dead": 1})
            else:
                with own.beating:  # one under way must not find its record gone, and make it again
                    self._delete({"_id": node})
        finally:  # if the record stays, its lease runs out
            self._locks.release(node)

    def _delete(self, wanted: Document) -> None:
        self._connection.run(lambda: self._connection.nodes.delete_one(wanted))

    def began(self, node: str) -> Began | None:
        """Return the tasks that a node's threads began last; None for a node on another host."""
        return self._locks.began(node)

    def record_types(self, node: str, types: Sequence[str]) -> None:
        """Record the types that a node runs now."""
        self._amend(node, "types", list(types))

    def mark_stopping(self, node: str) -> None:
        """Record that a node is stopping."""
        self._amend(node, "stopping", True)

    def _amend(self, node: str, name: str, value: Any) -> None:
        if (own := self._own.get(node)) is not None:
            own.record[name] = value
        self._connection.run(
            lambda: self._connection.nodes.update_one({"_id": node}, {"$set": {name: value}})
        )

    def lost(self, node: str) -> bool:
        """Whether a node of this process must not start anything now."""
        own = self._own.get(node)
        return own is not None and (own.dead or self._monotonic() >= self._deadline(own))

    def _deadline(self, own: _Own) -> float:
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
        ends = [end for own in self._own.values() if (end := self._deadline(own)) > now]
        return max(min([next_beat, *ends]) - now, self.interval / 10)

    def _beat_on(self, node: str, own: _Own) -> None:
        try:
            self.beat(node, own)
        except BaseException:  # noqa: BLE001  (without this thread all nodes here would be taken for dead)
            log.exception("node %s stumbled at its beat; it goes on", node)

    def beat(self, node: str, own: _Own | None = None) -> None:
        """Show that a node lives; tell it where that failed for too long."""
        own = own or self._own[node]
        self._tell(node, own)
        left = self._deadline(own) - self._monotonic()
        # Bounded, so that it is told in time; once that has passed, there is all the time.
        timeout = 2 * self.interval if left <= 0 else min(2 * self.interval, left)
        try:
            with own.beating:
                if node not in self._own:
                    return
                self._connection.run(lambda: self._beat(node, own), max(timeout, 0.01))
        except RepositoryError as error:
            own.failures += 1
            if own.failures & (own.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th …
                log.warning("node %s cannot show that it lives: %s", own.record["name"], error)
        else:
            own.failures = 0
        self._tell(node, own)

    def _beat(self, node: str, own: _Own) -> None:
        nodes, sent = self._connection.nodes, self._monotonic()
        beaten = nodes.update_one(
            {"_id": node, "dead": 0}, {"$inc": {"beat": 1}, "$set": {"still": 0}}
        )
        if beaten.matched_count:
            own.acknowledged, own.dead = sent, False
        elif nodes.find_one({"_id": node}) is None:
            # Whoever took its tasks is through with it.
            if self._insert(own):
                own.acknowledged, own.dead = sent, False
        else:
            own.dead = True

    def _insert(self, own: _Own) -> bool:
        """Record a node; says whether its record was not there, as it is if the driver sent it twice."""
        try:
            self._connection.nodes.insert_one(dict(own.record))
        except DuplicateKeyError:
            return False
        return True

    def _tell(self, node: str, own: _Own) -> None:
        if not self.lost(node):
            if own.told:
                own.told = False
                log.info("node %s has its lease again", own.record["name"])
            return
        if not own.told:
            own.told = True
            log.warning(
                "node %s lost its lease: others may run its tasks, so those that run are told to end",
                own.record["name"],
            )
        own.tell()

    # --- the others

    def nodes(self) -> Sequence[Node]:
        """All recorded nodes, each with what can be said of it."""
        asked = self._monotonic()
        try:
            records = self._connection.run(lambda: list(self._connection.nodes.find().sort("_id")))
        except RepositoryError:
            with self._lock:
                for look in self._looks.values():
                    look.at = None
            raise
        with self._lock:
            ids = {record["_id"] for record in records}
            self._looks = {node: look for node, look in self._looks.items() if node in ids}
            return [self._node(record, asked) for record in records]

    def is_dead(self, node: str) -> bool:
        """Whether a node is dead now: marked so, or gone."""
        record = self._connection.run(lambda: self._connection.nodes.find_one({"_id": node}))
        return record is None or record["dead"] == 1

    def _node(self, record: Document, asked: float) -> Node:
        return Node(
            id=record["_id"],
            name=record["name"],
            types=tuple(record["types"]),
            stopping=record["stopping"],
            alive=self._alive(record, asked),
        )

    def _alive(self, record: Document, asked: float) -> bool:
        if record["_id"] in self._own:
            return True
        if record["dead"]:
            return False
        here = self._locks.alive(record["_id"], record["host"], record["lock"])
        if here is None:
            return not self._judge(record, asked)
        self._looks.pop(record["_id"], None)
        return here or not self._mark_dead({"_id": record["_id"], "dead": 0})

    def _judge(self, record: Document, asked: float) -> bool:
        """Count how long the beat of a node has stood still; True if it is dead by that."""
        node, beat, still = record["_id"], record["beat"], record["still"]
        look = self._looks.get(node)
        if look is None or (look.beat, look.still) != (beat, still):
            look = self._looks[node] = _Look(beat, still)
        elif look.at is not None and asked - look.at <= 2 * max(self.interval, _LOOKS_EVERY):
            look.counted += max(0.0, asked - look.at)
        look.at = self._monotonic()
        total = still + int(look.counted * 1000)
        unchanged = {"_id": node, "beat": beat, "still": still, "dead": 0}
        if total >= self._lease * 1000:
            return self._mark_dead(unchanged)
        if look.counted >= self.interval / 2 and self._set(unchanged, {"still": total}):
            look.counted -= (total - still) / 1000
            look.still = total
        return False

    def _mark_dead(self, unchanged: Document) -> bool:
        return self._set(unchanged, {"dead": 1})

    def _set(self, unchanged: Document, changes: Document) -> bool:
        def work() -> int:
            return self._connection.nodes.update_one(unchanged, {"$set": changes}).matched_count

        return self._connection.run(work) == 1


class _Own:
    """A node of this process."""

    def __init__(self, record: Document, acknowledged: float) -> None:
        self.record = record
        #: When the last beat was sent that the server acknowledged.
        self.acknowledged = acknowledged
        self.beating = threading.Lock()
        self.dead = False
        self.told = False
        self.failures = 0
        self.tell: Callable[[], Any] = lambda: None


class _Look:
    """How long this process has seen a record of another node stand still."""

    def __init__(self, beat: int, still: int) -> None:
        self.beat = beat
        self.still = still
        self.counted = 0.0
        self.at: float | None = None


def _record(node: Node, host: str, lock: int) -> Document:
    return {
        "_id": node.id,
        "name": node.name,
        "types": list(node.types),
        "stopping": node.stopping,
        "host": host,
        "lock": lock,
        "beat": 0,
        "still": 0,
        "dead": 0,
    }
