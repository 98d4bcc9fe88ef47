"""Dispatch: send tickets for the tasks that may start, as many as the workers can use.

The owner of a pending task is the node that has sent its ticket. So the store knows the tickets of all
nodes. A task without an owner has none. The tasks of a dead node become free, like those of any buffer.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import attrs

from taskx.common.bell import Signal
from taskx.core import lifecycle
from taskx.core.errors import RepositoryError
from taskx.core.log import Complaint
from taskx.core.record import Stub
from taskx.engines.pool import TicketPool
from taskx.engines.tickets import Ticket
from taskx.liveness.base import Node

#: Most tickets for each worker that no worker has used yet.
DEPTH = 2
#: Seconds between two looks at the store: the least while many tickets are used, and the most.
SHORTEST_REST, LONGEST_REST = 0.01, 0.5
#: Seconds for which a node leaves free tasks to the nodes that come first.
LEAVE = 1.0
#: Seconds for which the list of nodes is used, and the longest wait before a ticket is sent once more.
_FRESH, _LONGEST_WAIT = 0.5, 60.0
#: Seconds to wait after an error: first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


@attrs.define
class _Sent:
    """A ticket that was sent: when, by the monotonic clock, and how long to wait before the next one.

    ``starts`` is that of the task. If it is another one now, the ticket was used, and the task came back.
    """

    starts: int
    at: float
    wait: float


class Sender(Protocol):
    """The parts of an engine that send tickets."""

    name: str
    resend: float

    def send(self, ticket: Ticket) -> None: ...
    def disconnect(self) -> None: ...


class _Waiting(NamedTuple):
    """A task whose ticket this node has to send, or has sent."""

    type: str
    starts: int


class Crew:
    """The nodes of one engine: those that run tasks for tickets, and those that only send them."""

    def __init__(self, nodes: Sequence[Node], engine: str, me: str) -> None:
        mine = [node for node in nodes if node.about.engine == engine]
        self.ids = [*dict.fromkeys([*(node.id for node in mine), me])]
        alive = [node for node in mine if node.alive is not False and not node.stopping]
        self.workers = [node for node in alive if node.workers]
        senders = [node.id for node in alive if not node.workers]
        workers = sorted(node.id for node in self.workers)
        #: True if this node sends tickets at once. The others leave that to it for a moment.
        self.first = me in senders or (not senders and me in workers[:1])

    @property
    def types(self) -> list[str]:
        """The types that some worker runs."""
        return [*dict.fromkeys(type for node in self.workers for type in node.types)]

    def capacity(self, type: str) -> int:
        """Return the number of tasks of a type that all workers together run at a time."""
        total, most = 0, math.inf
        for node in self.workers:
            if type not in node.types:
                continue
            limit = node.limits.get(type)
            slots = None if limit is None else limit.max_concurrency
            if limit is None or slots is None:
                total += node.workers
            elif limit.scope == "global":
                total, most = total + node.workers, slots
            else:
                total += min(node.workers, slots)
        return int(min(total, most))

    def limited(self, type: str) -> bool:
        """Return True if a worker may run fewer tasks of a type than it has threads."""
        limits = (node.limits.get(type) for node in self.workers)
        return any(limit is not None and limit.max_concurrency is not None for limit in limits)


class Dispatcher:
    """The thread of a node that sends its tickets.

    A ticket is sent after the write that makes this node the owner of the task. It counts until the task
    has started or has another owner. It is sent again if this takes too long while workers are idle: the
    ticket, or the worker that had it, is lost. A second ticket finds nothing to start. While the broker
    fails, one ticket at a time tries it, and the other tasks are left free for nodes that can reach it.

    Args:
        pool: the node's pool.
        engine: the engine.
    """

    def __init__(self, pool: TicketPool, engine: Sender) -> None:
        self._pool = pool
        self._services = pool.services
        self._engine = engine
        #: The tickets of this node that no worker has used yet, by its knowledge.
        self.sent: dict[str, _Sent] = {}
        self.crew = Crew((), engine.name, pool.node.id)
        self._crew_at = -math.inf
        self._seen: dict[str, float] = {}
        self._complaint = Complaint(pool.services.log)
        self._broker = Complaint(pool.services.log)
        self._reached = True  # False if the broker refused the last ticket
        self._rest = SHORTEST_REST
        self._signal = Signal()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="taskx-dispatch", daemon=True)
        pool.tickets.ring = self._signal.set
        pool.tickets.sent = self.sent

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. It may be in the middle of sending a ticket, and then ends after that."""
        self._stopped = True
        self._signal.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped:
            try:
                fine = self.round()
                self._complaint.over()
            except RepositoryError as error:
                fine = False
                self._complaint.make("the repository fails, tickets are sent later: %s", error)
            except BaseException:  # a defect of ours: without this thread, no task is run
                fine = False
                self._services.log.exception("unexpected error in the dispatcher; it continues")
            pause = 0.0 if fine else min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._signal.wait(pause or self._rest)
        with suppress(Exception):  # the broker may be away
            self._engine.disconnect()

    def round(self) -> bool:
        """Send the tickets that are due; return False if the broker refused one."""
        pool, repository, me = self._pool, self._services.repository, self._pool.node.id
        pool.buffer.sweep(lambda type: True)  # what is put there is stored as this node's, too
        self._refresh_crew()
        rows = repository.find("buffered_on", self.crew.ids, ("id", "type", "starts", "owner"))
        waiting = Counter(type for _, type, _, _ in rows)
        mine = {i: _Waiting(type, starts) for i, type, starts, owner in rows if owner == me}
        used = [
            i for i, sent in self.sent.items() if i not in mine or mine[i].starts != sent.starts
        ]
        for task_id in used:
            del self.sent[task_id]
        due = {i: task for i, task in mine.items() if i not in self.sent}
        due.update(self._lost(mine))
        more = False
        if not pool.stopping:
            for type in self.crew.types:
                new, full = self._take(type, waiting[type])
                due.update(new)
                more = more or full
        self._set_rest(busy=bool(used) or (more and bool(due)), idle=not mine and not due)
        return self._send_all(due)

    def _set_rest(self, *, busy: bool, idle: bool) -> None:
        if busy and self.crew.first:
            self._rest = SHORTEST_REST
        else:
            self._rest = LONGEST_REST if idle else min(2 * self._rest, LONGEST_REST)

    def _refresh_crew(self) -> None:
        now = time.monotonic()
        if now - self._crew_at >= _FRESH:
            nodes = self._services.repository.nodes()
            self.crew = Crew(nodes, self._engine.name, self._pool.node.id)
            self._pool.tickets.senders = self.crew.ids
            self._crew_at = now

    def _take(self, type: str, waiting: int) -> tuple[dict[str, _Waiting], bool]:
        """Make this node the owner of the best free tasks of a type that workers have room for.

        Return them, and True if more tasks may be free.
        """
        services, crew = self._services, self.crew
        room = DEPTH * crew.capacity(type) - waiting
        if room <= 0 or type in services.controls.paused:
            return {}, room <= 0
        if crew.limited(type):
            room = crew.capacity(type) - waiting - self._running(type)
            if room <= 0:
                return {}, False
        if not self._reached:
            room = 1
        stubs = services.repository.ready([type], room, "", self._pool.buffer.ageing)
        stubs = stubs if crew.first else self._left_over(stubs)
        if not stubs:
            return {}, False
        node = self._pool.node.id
        taken = services.ledger.commit([lifecycle.take(stub.id, node) for stub in stubs])
        mine = {
            s.id: _Waiting(type, s.starts) for s, held in zip(stubs, taken, strict=True) if held
        }
        for task_id in mine:
            self._seen.pop(task_id, None)
            self.sent.pop(task_id, None)
        return mine, len(stubs) == room

    def _left_over(self, stubs: Sequence[Stub]) -> list[Stub]:
        """Return the tasks that the nodes which come first have not taken for some time."""
        now = time.monotonic()
        for task_id in [i for i, at in self._seen.items() if now - at > 10 * LEAVE]:
            del self._seen[task_id]
        return [s for s in stubs if now - self._seen.setdefault(s.id, now) >= LEAVE]

    def _running(self, type: str) -> int:
        nodes = [node.id for node in self.crew.workers]
        rows = self._services.repository.find("running_on", nodes, ("type",)) if nodes else ()
        return sum(kind == type for (kind,) in rows)

    def _lost(self, mine: Mapping[str, _Waiting]) -> dict[str, _Waiting]:
        """Return the tasks whose tickets are sent again: they have not started, and workers are idle."""
        now = time.monotonic()
        late = [i for i, sent in self.sent.items() if now - sent.at >= sent.wait]
        if not late:
            return {}
        idle = self._idle_types({mine[task_id].type for task_id in late})
        lost = [task_id for task_id in late if mine[task_id].type in idle]
        for task_id in lost:
            sent = self.sent[task_id]
            sent.at, sent.wait = now, min(2 * sent.wait, max(_LONGEST_WAIT, self._engine.resend))
        return {task_id: mine[task_id] for task_id in lost}

    def _idle_types(self, types: Collection[str]) -> set[str]:
        """Return the given types that some worker with a free thread runs."""
        nodes = {node.id: node for node in self.crew.workers}
        found = self._services.repository.find("running_on", [*nodes], ("owner",)) if nodes else ()
        busy: defaultdict[str, int] = defaultdict(int, Counter(owner for (owner,) in found))
        idle = [node for node in nodes.values() if busy[node.id] < node.workers]
        return {type for type in types if any(type in node.types for node in idle)}

    def _send_all(self, tasks: Mapping[str, _Waiting]) -> bool:
        unsent = dict(tasks)
        try:
            for task_id, task in tasks.items():
                if self._stopped:
                    break
                self._engine.send(Ticket(task_id, task.type))
                del unsent[task_id]
                sent = _Sent(task.starts, time.monotonic(), self._engine.resend)
                self.sent.setdefault(task_id, sent)
        except Exception as error:  # noqa: BLE001  (the libraries of brokers have no common class of errors)
            self._reached = False
            self._broker.make(
                "the broker fails, and %d ticket(s) are sent later: %s: %s",
                *(len(unsent), type(error).__name__, error),
            )
            self._free(unsent)
            return False
        if tasks:
            self._reached = True
            self._broker.over()
        return True

    def _free(self, task_ids: Collection[str]) -> None:
        """Free the tasks of tickets that were not sent."""
        node = self._pool.node.id
        for task_id in task_ids:
            self.sent.pop(task_id, None)
        self._services.ledger.commit([lifecycle.free(task_id, node) for task_id in task_ids])
