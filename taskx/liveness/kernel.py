"""Nodes on one host, whose lock files lie beside the file that they share: the kernel tells who lives."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from taskx.core.errors import RepositoryError
from taskx.liveness.base import PREFIX, Node, Own, Recorded, Store, described
from taskx.liveness.began import Began
from taskx.liveness.locks import NodeLocks


class KernelLocks(Recorded[Own]):
    """Nodes that live as long as their processes hold their locks.

    Args:
        store: the repository. To read notes opens its file; only then the place is known.
        place: returns the folder of lock files, and the inode number of the file that nodes share.
        others: names of lock files that are no node's.
    """

    def __init__(
        self, store: Store, place: Callable[[], tuple[str, int]], others: Collection[str]
    ) -> None:
        super().__init__(store)
        self._place = place
        self._others = others

    @property
    def _locks(self) -> NodeLocks:
        return NodeLocks(self._place()[0])

    def join(self, node: Node) -> None:
        """Record a node, and prove it alive until :meth:`leave` or process death."""
        self._on_record()
        _, file = self._place()
        own = Own(node, {"file": file, "lock": self._locks.hold(node.id, file)})
        try:
            self._write(node.id, own)
            self._own[node.id] = own
        except BaseException:
            self._own.pop(node.id, None)
            self._locks.release(node.id)
            raise
        with suppress(RepositoryError):  # the next node does it
            self._locks.clear_orphans(file, lambda: {*self._others, *self._on_record()})

    def leave(self, node: str) -> None:
        """Forget a node that holds nothing any more."""
        try:
            self._remove(node)
        except BaseException:
            self._locks.let_go(node)  # still on record, it is a dead one from now on
            raise
        self._locks.release(node)

    def began(self, node: str) -> Began | None:
        """Return the tasks that the threads of a node began last."""
        return self._locks.began(node)

    def nodes(self) -> Sequence[Node]:
        """Return all recorded nodes. In a copy of a file, the nodes of the original are dead.

        A node that holds its lock beside this file lives: the copy was put in the original's place.
        """
        nodes = []
        for name, note in sorted(self._store.notes(PREFIX).items()):
            facts = json.loads(note.text)
            nodes.append(described(name, facts, self._alive(name, facts)))
        if any(node.alive is None for node in nodes):
            # One that leaves goes from the record before its lock file goes.
            still = self._on_record()
            nodes = [node for node in nodes if node.alive is not None or node.id in still]
        return nodes

    def _alive(self, name: str, facts: dict[str, Any]) -> bool | None:
        alive = self._locks.alive(name.removeprefix(PREFIX), facts["lock"])
        return False if alive is None and facts["file"] != self._place()[1] else alive

    def _on_record(self) -> set[str]:
        return {name.removeprefix(PREFIX) for name in self._store.notes(PREFIX)}
