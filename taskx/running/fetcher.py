"""From the repository into the buffer: which tasks a node fetches, and when."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice

from taskx.core import lifecycle
from taskx.core.record import Stub
from taskx.limiting.admission import Admission
from taskx.moving import Services
from taskx.running.buffer import Buffer
from taskx.running.starter import Runs, Starter
from taskx.storage import queries


class Fetcher:
    """Keeps the buffer of a node filled with what is stored and may start.

    Args:
        services: what it works with.
        node: the id of the node.
        workers: how many threads there are to run what it fetches.
        buffer: where it puts tasks.
        runs: those of the node.
        starter: knows which tasks must wait for others.
        admission: how many may start of the types that have limits.
    """

    def __init__(
        self,
        services: Services,
        node: str,
        workers: int,
        buffer: Buffer,
        runs: Runs,
        starter: Starter,
        admission: Admission,
    ) -> None:
        self._services = services
        self._agenda = services.agenda
        self._node = node
        self._workers = workers
        self._buffer = buffer
        self._runs = runs
        self._starter = starter
        self._admission = admission
        self._refilling = threading.Lock()
        #: The number of tasks fetched so far.
        self.fetched = 0
        #: Whether no other node is known to live.
        self.alone = False

    def takes(self, type: str) -> bool:
        """Return whether it may start tasks of this type at present."""
        return type not in self._services.pauses.known

    def buffers(self, type: str) -> bool:
        """Return whether a task of this type may lie in the buffer whenever it comes."""
        services = self._services
        return type not in services.registry.limits and type not in services.pauses.known

    def has_room(self, type: str) -> bool:
        """Return whether a task of this type might start now."""
        limited = type in self._services.registry.limits
        return self.takes(type) and (not limited or self._admission.open(type))

    def look_for_pauses(self) -> None:
        """See what is paused, and leave to the repository what lies in the buffer and is.

        After a ``RepositoryError`` workers pass over what is in the buffer all the same.
        """
        if self._services.pauses.refresh():
            self._agenda.more_stored = True  # what is paused no longer
            paused = self._services.pauses.known
            swept = self._buffer.sweep(lambda type: type in paused)
            self._starter.give_up([item.id for item in swept])

    def unmarked(self) -> set[str]:
        """Return the pending tasks in memory that the repository may list as free, and some more, by id."""
        buffer, suspects = self._buffer, self._starter.suspects
        return {
            *buffer.fetched_ids,
            *(item.id for item in [*buffer.starting, *suspects.waiting]),
        }

    def types(self) -> list[str]:
        """The types that it runs and that are not paused."""
        return [type for type in self._services.registry.types if self.takes(type)]

    def refill(self) -> bool:
        """Fetch free tasks from the repository as far as there is room; False if another thread does."""
        if not self._refilling.acquire(blocking=False):
            return False
        try:
            room = self._buffer.room_to_fetch()
            if room <= 0:
                return True
            self._agenda.more_stored = False  # before looking: a spill from now on sets it again
            try:
                found = self._fetch(room)
            except BaseException:  # an interrupt, too: nobody else knows that there is more
                self._agenda.more_stored = True
                raise
            for stub in found:
                if stub.type in self._services.registry.limits:
                    self._admission.fetched(stub.type, stub.id)
                self._buffer.add_fetched(stub)
            self.fetched += len(found)
            if len(found) == room:
                self._agenda.more_stored = True
            return True
        finally:
            self._refilling.release()

    def refill_if_low(self) -> None:
        """Fetch more if little is left of what was fetched.

        A fetch reads what is there already, too, so it pays to have little; but beside other nodes it
        may wait for the file, and is begun early.
        """
        share = 0.25 if self.alone else 0.5
        if self._agenda.more_stored and self._buffer.fetched < self._buffer.fetch_size * share:
            self.refill()

    def _fetch(self, room: int) -> list[Stub]:
        """Free tasks that this node does not hold yet.

        Beside other nodes they are marked as taken, so that two do not go for the same ones. Alone,
        that write is saved: the start is the guard in any case.
        """
        services = self._services
        stubs = self._offered(room)
        if self.alone:
            return stubs
        if not stubs:
            return self._take_over()
        taken = services.ledger.commit([lifecycle.take(stub.id, self._node) for stub in stubs])
        if not all(taken):
            self._agenda.fetch_soon()  # there may be others, or none for which it has places
        return [stub for stub, mine in zip(stubs, taken, strict=True) if mine]

    def _offered(self, room: int, owner: str = "") -> list[Stub]:
        """The best of the tasks that this node does not hold and may start, at most ``room``.

        Those that no node holds, or those in the buffer of one.
        """
        repository, limits = self._services.repository, self._services.registry.limits
        known, types, ageing = self.unmarked(), self.types(), self._buffer.ageing
        free = [type for type in types if type not in limits] if limits else types
        found = self._others(repository.ready(free, room + len(known), owner, ageing), known, room)
        if len(free) == len(types):
            return found
        for type in types:
            if type in limits:
                most, waiting = self._admission.room(type, known)
                if (most := min(most, room)) > 0:
                    stubs = repository.ready([type], most + waiting, owner, ageing)
                    some = self._others(stubs, known, most)
                    found += some
                    if not owner:
                        self._admission.looked(type, most, len(some))
        found.sort(key=self._best_first)
        return found[:room]

    def _others(self, stubs: Sequence[Stub], known: set[str], most: int) -> list[Stub]:
        """Return the first tasks that this node does not hold yet, at most ``most``."""
        others = (stub for stub in stubs if stub.id not in known and stub.id not in self._buffer)
        return list(islice(others, most))

    def _best_first(self, stub: Stub) -> tuple[int, int]:
        return stub.rank(self._buffer.ageing), stub.created_at

    def _take_over(self) -> list[Stub]:
        """With nothing to do: what is next in line in the buffers of other nodes, one for each idle worker.

        They find it started, or gone, when they come to it.
        """
        wanted = self._workers - len(self._runs.executing)
        if wanted <= 0 or len(self._buffer):
            return []
        services = self._services
        found = [
            (stub, owner)
            for owner in queries.owners(services.repository)
            if owner != self._node
            for stub in self._offered(wanted, owner)
        ]
        found.sort(key=lambda pair: self._best_first(pair[0]))
        writes = [lifecycle.take(stub.id, self._node, owner) for stub, owner in found[:wanted]]
        taken = services.ledger.commit(writes) if writes else []
        if any(taken):
            self._agenda.more_stored = True  # look again when these are done
        return [stub for (stub, _), mine in zip(found[:wanted], taken, strict=True) if mine]
