"""Fetching: move free tasks from the repository into a node's buffer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import compress

from taskx.attempt.registry import Registry
from taskx.node.admission import Admission, Names
from taskx.node.ahead import Ahead
from taskx.node.buffer import Buffer
from taskx.node.moving import Moves
from taskx.node.starter import Runs, Starter
from taskx.stores import queries
from taskx.stores.controls import Controls
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda
from taskx.tasks.record import Stub

# Most tasks of a type without tokens among which those are sought that go on with an attempt.
_FEW_RESUMED = 16


class Fetcher:
    """Keeps a node's buffer filled with stored tasks that may start.

    Args:
        node: the id of the node.
        buffer: receives the tasks.
        runs: the runs of the node.
        admission: knows how many tasks of each limited type may start.
        ahead: knows the number of workers.
        starter: knows the suspects that wait for their turn.
        moves, controls, agenda, registry: as for :class:`WorkerPool`.
    """

    def __init__(
        self,
        node: str,
        buffer: Buffer,
        runs: Runs,
        admission: Admission,
        *,
        ahead: Ahead,
        starter: Starter,
        moves: Moves,
        controls: Controls,
        agenda: Agenda,
        registry: Registry,
    ) -> None:
        self._moves = moves
        self._controls = controls
        self._agenda = agenda
        self._registry = registry
        self._node = node
        self._ahead = ahead
        self._buffer = buffer
        self._runs = runs
        self._starter = starter
        self._admission = admission
        self._refilling = threading.Lock()
        #: The number of tasks fetched so far.
        self.fetched = 0
        #: True if no other node is known to be alive.
        self.alone = False

    def found_nodes(self, *, others: bool) -> None:
        """Note if any other node may be alive."""
        self.alone = not others

    def takes(self, type: str) -> bool:
        """Return True if the node may start tasks of this type now: the type is not paused."""
        return type not in self._controls.paused

    def serves(self, type: str) -> bool:
        """Return True if the node gets tasks of this type to an executor."""
        return self._registry.runs(type)

    def has_room(self, type: str) -> bool:
        """Return True if a task of this type might start now."""
        limited = type in self._registry.limited
        return self.takes(type) and (not limited or self._admission.open(type))

    def follow_pauses(self) -> None:
        """Fetch tasks of types that were resumed, and free the buffered tasks of paused types.

        After a ``RepositoryError`` tasks stay in the buffer; workers pass over them in any case.
        """
        self._agenda.expect_more()
        paused = self._controls.paused
        swept = self._buffer.sweep(lambda type: type in paused)
        self._starter.free([item.id for item in swept])

    def unmarked(self) -> set[str]:
        """Return the ids of pending tasks in memory that the repository may list as free, and some more."""
        suspects = self._starter.suspects
        return {*self._buffer.fetched_ids, *(item.id for item in list(suspects.waiting))}

    def types(self) -> list[str]:
        """Return the types that this node runs and that are not paused."""
        return [type for type in self._registry.types if self.takes(type)]

    def refill(self) -> bool:
        """Fetch as many free tasks as fit into the buffer; return False if another thread is fetching."""
        if not self._refilling.acquire(blocking=False):
            return False
        try:
            room = self._buffer.room_to_fetch()
            if room <= 0:
                return True
            self._moves.turns.share_out()  # before the fetch, which finds what they free
            self._agenda.begin_fetch()  # before the fetch: a spill from now on sets it again
            try:
                found = self._fetch(room)
            except BaseException:  # an interrupt, too: no other thread knows that there is more
                self._agenda.expect_more()
                raise
            if limited := self._registry.limited:
                for stub in found:
                    if stub.type in limited:
                        self._admission.fetched(stub.type, stub.id)
            self._buffer.add_fetched(found)
            self.fetched += len(found)
            self._agenda.leave_rest(some=len(found) == room)
            if len(found) < room and self._registry.finds:
                self._seek()
            return True
        finally:
            self._refilling.release()

    def let_refill(self) -> None:
        """Let :meth:`refill` fetch again, after an interrupt of the only thread that calls it."""
        with suppress(RuntimeError):  # it was not cut short
            self._refilling.release()

    def _seek(self) -> None:
        """Find the executors of waiting types that have none here; fetch again if one was found."""
        if self._registry.seek(queries.every(self._moves.repository, "ready_type")):
            self._agenda.fetch_soon()

    def refill_if_low(self) -> None:
        """Fetch more tasks if few fetched ones are left.

        A node that is alone fetches late, and not while a worker is about to start tasks: its fetch also
        reads those and what the buffer has. If there are other nodes, a fetch may have to wait for the
        file, so it begins earlier.
        """
        buffer, share = self._buffer, 0.125 if self.alone else 0.5
        if not self._agenda.more_stored or (self.alone and buffer.starting):
            return
        if buffer.fetched < buffer.fetch_size * share:
            self.refill()

    def _fetch(self, room: int) -> list[Stub]:
        """Return at most ``room`` free tasks that this node does not hold yet.

        If there are other nodes, mark the tasks as taken, so that two nodes do not try to start the same
        ones. A node that is alone saves this write: the start is guarded in any case.
        """
        stubs = self._offered(room)
        if self.alone:
            return stubs
        if not stubs:
            return self._take_over()
        taken = self._moves.commit([lifecycle.take(stub.id, self._node) for stub in stubs])
        if not all(taken):
            self._agenda.fetch_soon()  # other nodes took some: there may be further tasks
        return self._taken(stubs, taken)

    def _taken(self, stubs: Iterable[Stub], taken: Sequence[bool]) -> list[Stub]:
        """Return the tasks that are in this node's buffer now."""
        found = list(compress(stubs, taken))
        for stub in found:
            if stub.row is not None:
                stub.row["owner"] = self._node
        return found

    def _offered(self, room: int, owner: str = "") -> list[Stub]:
        """Return the first tasks, at most ``room``, that this node does not hold and may start.

        They are free, or in the buffer of the node ``owner``.
        """
        repository, limited = self._moves.repository, self._registry.limited
        known, types, ageing = self.unmarked(), self.types(), self._buffer.ageing
        free = [type for type in types if type not in limited] if limited else types
        # The tasks that it holds are marked, and so are not listed, unless it was alone a short time ago.
        most = room + (len(known) if self.alone else 0)
        found = self._others(stubs := repository.ready(free, most, owner, ageing), known, room)
        if len(found) < room and len(stubs) == most == room:
            stubs = repository.ready(free, room + len(known), owner, ageing)
            found = self._others(stubs, known, room)
        if len(free) < len(types):
            found += self._offered_limited(types, known, room, owner)
            found.sort(key=self._best_first)
        return found[:room]

    def _offered_limited(
        self, types: Sequence[str], known: set[str], room: int, owner: str
    ) -> list[Stub]:
        """Return such tasks of limited types, as many as their limits have room for."""
        limited, admission = self._registry.limited, self._admission
        sharing: dict[Names, list[str]] = {}
        for type in types:
            if type in limited:
                sharing.setdefault(limited[type], []).append(type)
        chosen: list[Stub] = []
        some: list[tuple[Stub, Names]] = []
        asked: dict[Names, int] = {}
        for names, alike in sharing.items():
            most, waiting = admission.room(names, known)
            if not most and admission.only_tokens_lack(names):
                chosen += self._resumed(alike, known, room, owner)
            if (most := min(most, room)) > 0:
                ageing = self._buffer.ageing
                stubs = self._moves.repository.ready(alike, most + waiting, owner, ageing)
                asked[names] = most
                some += [(stub, names) for stub in self._others(stubs, known, most)]
        found = dict.fromkeys(asked, 0)
        if len(asked) > 1:
            some.sort(key=lambda pair: self._best_first(pair[0]))
            fitting = admission.fitting([names for _, names in some])
            for (_, names), fits in zip(some, fitting, strict=True):
                if not fits:
                    asked[names] = 0  # there is more than fits
            some = [*compress(some, fitting)]
        for _, names in some:
            found[names] += 1
        if not owner:
            admission.fetch_done(
                {names: most or found[names] for names, most in asked.items()}, found
            )
        return chosen + [stub for stub, _ in some]

    def _resumed(self, types: Sequence[str], known: set[str], room: int, owner: str) -> list[Stub]:
        """Return tasks of types without tokens that go on with an attempt, among the first of the types."""
        some = min(room, _FEW_RESUMED) + len(known)
        stubs = self._moves.repository.ready(types, some, owner, self._buffer.ageing)
        others = self._others(stubs, known, room)
        ids = [stub.id for stub in others]
        rows = self._moves.repository.find("id", ids, ("id", "started_at")) if ids else ()
        waited = {task_id for task_id, started_at in rows if started_at is not None}
        return [stub for stub in others if stub.id in waited]

    def _others(self, stubs: Sequence[Stub], known: set[str], most: int) -> list[Stub]:
        """Return the first of these tasks, at most ``most``, that this node does not hold yet."""
        held = known | self._buffer.ids
        return [stub for stub in stubs if stub.id not in held][:most]

    def _best_first(self, stub: Stub) -> tuple[int, int]:
        return stub.rank(self._buffer.ageing), stub.created_at

    def _take_over(self) -> list[Stub]:
        """Take the next tasks out of other nodes' buffers, one for each idle worker.

        Only a node with nothing in its own buffer does this. When the other nodes come to these tasks, they
        find them started, or gone.
        """
        wanted = self._ahead.workers - len(self._runs.executing)
        if wanted <= 0 or len(self._buffer):
            return []
        found = [
            (stub, owner)
            for owner in queries.every(self._moves.repository, "buffered_on")
            if owner != self._node
            for stub in self._offered(wanted, owner)
        ]
        found.sort(key=lambda pair: self._best_first(pair[0]))
        writes = [lifecycle.take(stub.id, self._node, owner) for stub, owner in found[:wanted]]
        taken = self._moves.commit(writes) if writes else []
        if any(taken):
            self._agenda.expect_more()  # fetch again when these are done
        return self._taken([stub for stub, _ in found], taken)
