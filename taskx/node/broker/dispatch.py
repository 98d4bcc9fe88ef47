"""Dispatch: send tickets for the tasks that may start, as many as the workers can use.

The owner of a pending task is the node that has sent its ticket. So the store knows the tickets of all
nodes. A task without an owner has none. The tasks of a dead node become free, like those of any buffer.

A node without workers is there to send tickets, and has a thread for it. In a worker process the
housekeeper looks twice a second if this node has to send any, because no other one does, and starts the
thread then.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from taskx.node.broker.crew import Crew
from taskx.node.broker.tickets import Sent, Ticket, Tickets
from taskx.node.pool import WorkerPool
from taskx.tasks import lifecycle
from taskx.tasks.bell import Signal
from taskx.tasks.errors import RepositoryError
from taskx.tasks.log import Complaint
from taskx.tasks.payload import clean_text
from taskx.tasks.record import Stub

#: Most tickets of a type, for each worker, that no worker has used yet: at first, and while the tasks are
#: so short that workers use all tickets between two looks at the store.
DEPTH, DEEPEST = 2, 8
#: Most characters of an error that are recorded.
_MOST_WORDS = 300


class Sender(Protocol):
    """The parts of an engine that send tickets."""

    name: str
    resend: float

    def connect(self) -> None: ...
    def tend(self) -> None: ...
    def send(self, ticket: Ticket) -> None: ...
    def disconnect(self) -> None: ...


class _Waiting(NamedTuple):
    """A task whose ticket this node has to send, or has sent."""

    type: str
    starts: int


class Dispatcher:
    """Sends the tickets of a node, on a thread.

    A ticket is sent after the write that makes this node the owner of the task. It counts until the task
    has started or has another owner. It is sent again if this takes too long while workers are idle: the
    ticket, or the worker that had it, is lost. A second ticket finds nothing to start. While the broker
    fails, one ticket at a time tries it, and the other tasks are left free for nodes that can reach it.

    Args:
        pool: the node's pool.
        tickets: the tickets of the node.
        engine: the engine.
    """

    def __init__(self, pool: WorkerPool, tickets: Tickets, engine: Sender) -> None:
        self._pool = pool
        self._timing = pool.timing
        self._engine = engine
        self._tickets, self._sent = tickets, tickets.sent
        self._depths: dict[str, int] = {}
        self.crew = Crew((), engine.name, pool.node.id)
        self._crew_at = self._looked_at = -math.inf
        self._needed_at = math.inf
        self._seen: dict[str, float] = {}
        self._complaint = Complaint(pool.log, "the repository can be used again")
        self._broker = Complaint(pool.log, "the broker can be used again")
        #: The last error of the broker, if it could not be used when it was tried last.
        self.error = ""
        self._reached: bool | None = None  # what the last contact with the broker showed
        self._rest = self._timing.tickets_every
        self._signal = Signal()
        self._stopped = True
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Send tickets from now on."""
        self._stopped = False
        if self._pool.node.only_sends:
            self._start_thread()

    def stop(self) -> None:
        """End the thread. It may be in the middle of sending a ticket, and then ends after that."""
        self._stopped = True
        self._signal.set()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(1.0)

    def ring(self) -> None:
        """Have tickets sent soon if there are any to send. The housekeeper calls this, twice a second.

        Raises:
            RepositoryError: the repository failed.
        """
        if not self._stopped and self._thread is None and self._is_needed():
            self._start_thread()
        self._signal.set()

    def _start_thread(self) -> None:
        self._needed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="taskx-dispatch", daemon=True)
        self._thread.start()

    def _is_needed(self) -> bool:
        """Return True if this node has to send tickets now; only called while there is no thread."""
        now = time.monotonic()
        if now - self._looked_at < self._timing.crew_every:
            return False
        self._looked_at = now
        waiting, mine = self._waiting()
        if self.crew.first or mine:
            return True
        return any(self._free_tasks(type, number)[0] for type, number in waiting.items())

    def _run(self) -> None:
        pause, first, longest = 0.0, self._timing.broker_pause, self._timing.longest_pause
        while not self._stopped and self._goes_on():
            try:
                fine = self.round()
                self._complaint.over()
            except RepositoryError as error:
                fine = False
                self._complaint.make("the repository fails, tickets are sent later: %s", error)
            except BaseException:  # a defect of ours: without this thread, no task is run
                fine = False
                self._pool.log.exception("unexpected error in the dispatcher; it continues")
            pause = 0.0 if fine else min(max(2 * pause, first), longest)
            self._signal.wait(pause or self._rest)
        with suppress(Exception):  # the broker may be away
            self._engine.disconnect()
        self._thread = None

    def _goes_on(self) -> bool:
        """Return False if the thread may end: in a worker process, while others send the tickets."""
        return (
            self._pool.node.only_sends
            or time.monotonic() - self._needed_at < self._timing.keep_thread
        )

    def round(self) -> bool:
        """Send the tickets that are due; return False if the broker refused one."""
        pool = self._pool
        waiting, mine = self._waiting()
        used = [
            i for i, sent in self._sent.items() if i not in mine or mine[i].starts != sent.starts
        ]
        self._set_depths(Counter(self._sent.pop(task_id).type for task_id in used))
        due = {i: task for i, task in mine.items() if i not in self._sent}
        due.update(self._lost(mine))
        more = False
        if not pool.stopping:
            for type, number in waiting.items():
                new, full = self._take(type, number)
                due.update(new)
                more = more or full
        if self.crew.first or mine or due:
            self._needed_at = time.monotonic()
        self._set_rest(busy=bool(used) or (more and bool(due)), idle=not mine and not due)
        return self._send_all(due) if due else self._reach()

    def _waiting(self) -> tuple[Counter[str], dict[str, _Waiting]]:
        """Return the number of tickets of each type that some worker runs, and the tasks of this node."""
        pool, me = self._pool, self._pool.node.id
        pool.buffer.sweep(lambda type: True)  # what is put there is stored as this node's, too
        self._refresh_crew()
        fields = ("id", "type", "starts", "owner")
        rows = self._pool.moves.repository.find("buffered_on", self.crew.ids, fields)
        waiting = Counter(dict.fromkeys(self.crew.types, 0))
        waiting.update(type for _, type, _, _ in rows if type in waiting)
        kept = self._tickets.kept
        mine = {
            i: _Waiting(type, starts)
            for i, type, starts, owner in rows
            if owner == me and i not in kept
        }
        return waiting, mine

    def _set_depths(self, used: Counter[str]) -> None:
        """Have more tickets sent at a time while tasks are so short that workers use all between two looks.

        ``used`` is the number of tickets of each type that were used since the last look.
        """
        left, before = Counter(sent.type for sent in self._sent.values()), self._depths
        self._depths = {}
        for type in used | left:
            depth = before.get(type, DEPTH)
            if not left[type] and used[type] > self.crew.capacity(type):
                depth = min(2 * depth, DEEPEST)
            elif used[type] < left[type]:
                depth = DEPTH
            self._depths[type] = depth

    def _set_rest(self, *, busy: bool, idle: bool) -> None:
        if busy and self.crew.first:
            self._rest = self._timing.tickets_every
        else:
            longest = self._timing.longest_tickets_every
            self._rest = longest if idle else min(2 * self._rest, longest)

    def _refresh_crew(self) -> None:
        now = time.monotonic()
        if now - self._crew_at >= self._timing.crew_every:
            nodes = self._pool.moves.repository.nodes()
            self.crew = Crew(nodes, self._engine.name, self._pool.node.id)
            self._crew_at = now

    def _take(self, type: str, waiting: int) -> tuple[dict[str, _Waiting], bool]:
        """Make this node the owner of the best free tasks of a type that workers have room for.

        Return them, and True if more tasks may be free.
        """
        stubs, more = self._free_tasks(type, waiting)
        if not stubs:
            return {}, more
        node = self._pool.node.id
        taken = self._pool.moves.commit([lifecycle.take(stub.id, node) for stub in stubs])
        mine = {
            s.id: _Waiting(type, s.starts) for s, held in zip(stubs, taken, strict=True) if held
        }
        for task_id in mine:
            self._seen.pop(task_id, None)
            self._sent.pop(task_id, None)
        return mine, more

    def _free_tasks(self, type: str, waiting: int) -> tuple[Sequence[Stub], bool]:
        """Return the best free tasks that workers have room for, and True if there may be more.

        ``waiting`` is the number of tickets of this type that were not used yet.
        """
        pool, crew = self._pool, self.crew
        room = self._depths.get(type, DEPTH) * crew.capacity(type) - waiting
        if room <= 0 or type in pool.controls.paused:
            return (), room <= 0
        if crew.limited(type):
            room = crew.capacity(type) - waiting - self._running(type)
            if room <= 0:
                return (), False
        if self._reached is False:
            room = 1
        stubs = pool.moves.repository.ready([type], room, "", pool.buffer.ageing)
        stubs = stubs if crew.first else self._left_over(stubs)
        return stubs, len(stubs) == room

    def _left_over(self, stubs: Sequence[Stub]) -> list[Stub]:
        """Return the tasks that the nodes which come first have not taken for some time."""
        now = time.monotonic()
        for task_id in [
            i for i, at in self._seen.items() if now - at > 10 * self._timing.leave_tasks
        ]:
            del self._seen[task_id]
        return [
            s for s in stubs if now - self._seen.setdefault(s.id, now) >= self._timing.leave_tasks
        ]

    def _running(self, type: str) -> int:
        nodes = [node.id for node in self.crew.workers]
        rows = self._pool.moves.repository.find("running_on", nodes, ("type",)) if nodes else ()
        return sum(kind == type for (kind,) in rows)

    def _lost(self, mine: Mapping[str, _Waiting]) -> dict[str, _Waiting]:
        """Return the tasks whose tickets are sent again: they have not started, and workers are idle."""
        now = time.monotonic()
        late = [i for i, sent in self._sent.items() if now - sent.at >= sent.wait]
        if not late:
            return {}
        idle = self._idle_types({mine[task_id].type for task_id in late})
        lost = [task_id for task_id in late if mine[task_id].type in idle]
        for task_id in lost:
            sent = self._sent[task_id]
            sent.again(now, max(self._timing.longest_resend, self._engine.resend))
        return {task_id: mine[task_id] for task_id in lost}

    def _idle_types(self, types: Collection[str]) -> set[str]:
        """Return the given types that some worker with a free thread runs."""
        nodes = {node.id: node for node in self.crew.workers}
        found = (
            self._pool.moves.repository.find("running_on", [*nodes], ("owner",)) if nodes else ()
        )
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
                sent = Sent(task.type, task.starts, time.monotonic(), self._engine.resend)
                self._sent.setdefault(task_id, sent)
        except Exception as error:  # noqa: BLE001  (the libraries of brokers have no common class of errors)
            self._note(error)
            self._free(unsent)
            return False
        self._note(None)
        return True

    def _reach(self) -> bool:
        """Be connected to the broker, so that a program learns soon if it cannot be reached."""
        try:
            if self._reached:
                self._engine.tend()
                return True
            self._engine.connect()
        except Exception as error:  # noqa: BLE001  (as above)
            self._note(error)
            return False
        self._note(None)
        return True

    def _note(self, error: Exception | None) -> None:
        """Note what a contact with the broker has shown, and record it with the node if that is news."""
        self._reached = error is None
        self.error = "" if error is None else _text(error)
        if error is None:
            self._broker.over()
        else:
            self._broker.make(
                "the broker cannot be used: tasks are stored, and start when it can: %s",
                self.error,
            )

    def _free(self, task_ids: Collection[str]) -> None:
        """Free the tasks of tickets that were not sent."""
        node = self._pool.node.id
        for task_id in task_ids:
            self._sent.pop(task_id, None)
        self._pool.moves.commit([lifecycle.free(task_id, node) for task_id in task_ids])


def _text(error: Exception) -> str:
    """Return an error of a broker's library, of which some have no message of their own."""
    kind, words = type(error).__name__, str(error) or repr(error.__cause__ or error)
    named = words if words.startswith(kind) else f"{kind}: {words}"
    return clean_text(named.rstrip("."), _MOST_WORDS)
