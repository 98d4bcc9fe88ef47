"""What a node is, what tells which of them live, and the nodes of a store of one process only."""

from __future__ import annotations

import json
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import attrs

from taskx.core.writes import Note, NoteChange, Write
from taskx.liveness.began import Began

#: How the names of the notes begin that are about nodes.
PREFIX = "node/"


@attrs.frozen(kw_only=True)
class Node:
    """One started queue in one process, as the repository knows it.

    Attributes:
        id: unique for every start.
        name: for people: host, process and start.
        types: the task types it runs.
        stopping: True once it was asked to stop.
        alive: True while its process lives, False once it is known to be dead, None where neither
            can be told.
    """

    id: str
    name: str
    types: tuple[str, ...] = ()
    stopping: bool = False
    alive: bool | None = None


class Applies(Protocol):
    """What a queue's writes are given to."""

    def apply(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Apply guarded writes; says for each whether its guard held."""


class Store(Applies, Protocol):
    """What liveness needs of a repository."""

    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store or remove notes, each if its version is still that one."""

    def within(self, seconds: float) -> AbstractContextManager[object]:
        """Have what is done inside raise after so many seconds, where the store can."""


OwnT = TypeVar("OwnT")


class Liveness(ABC, Generic[OwnT]):
    """The nodes on a repository, and which of them live."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._own: dict[str, OwnT] = {}

    @property
    def at_work(self) -> bool:
        """Whether a node of this process is on record."""
        return bool(self._own)

    @abstractmethod
    def join(self, node: Node) -> None:
        """Record a node, and prove it alive from now on until :meth:`leave` or process death."""

    @abstractmethod
    def record_types(self, node: str, types: Sequence[str]) -> None:
        """Record the types that a node of this process runs now, in place of those before."""

    @abstractmethod
    def mark_stopping(self, node: str) -> None:
        """Record that a node of this process is stopping: what it runs when it ends was interrupted."""

    @abstractmethod
    def leave(self, node: str) -> None:
        """Forget a node that holds nothing any more: one's own, or a dead one."""

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """All recorded nodes."""

    def watch(self, node: str, lost: Callable[[], object]) -> None:
        """Have ``lost()`` called when a node of this process may be taken for dead.

        That is before others may take over what it runs. Where only the death of the process lets
        them, it is never called.
        """

    def is_dead(self, node: str) -> bool:
        """Whether a node that was seen to be dead is so still; asked after its tasks were read."""
        return True

    def began(self, node: str) -> Began | None:
        """Return the tasks that the threads of a node began last: to note them, or to read a dead node's.

        None if they are not kept, or cannot be read here; then it may have executed any of its tasks.
        """
        return None

    @property
    def applies(self) -> Applies:
        """What applies writes: the repository, unless a node that may be taken for dead starts nothing."""
        return self._store


class InProcess(Liveness[Node]):
    """Nodes that share one process, so that none of them can be dead."""

    def join(self, node: Node) -> None:
        self._own[node.id] = attrs.evolve(node, alive=True)

    def record_types(self, node: str, types: Sequence[str]) -> None:
        if node in self._own:
            self._own[node] = attrs.evolve(self._own[node], types=tuple(types))

    def mark_stopping(self, node: str) -> None:
        """A node of this process cannot leave anything behind, so nothing to record."""

    def leave(self, node: str) -> None:
        self._own.pop(node, None)

    def nodes(self) -> Sequence[Node]:
        return list(self._own.values())


class Own:
    """A node of this process; ``facts`` is what its note says besides what it is.

    Attributes:
        version: that of its note, if nobody else has changed it; 0 if it is not known.
        left: True once it leaves.
        making: held by who may make its note, or removes it for good.
    """

    def __init__(self, node: Node, facts: Mapping[str, Any]) -> None:
        known = {"name": node.name, "types": list(node.types), "stopping": node.stopping}
        self.facts = {**known, **facts}
        self.version = 0
        self.left = False
        self.making = threading.Lock()


RecordT = TypeVar("RecordT", bound=Own)


class Recorded(Liveness[RecordT]):
    """Nodes that are notes, each written by its own process."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        _all.add(self)

    def renew(self) -> None:
        self._own = {}

    def record_types(self, node: str, types: Sequence[str]) -> None:
        self._amend(node, "types", list(types))

    def mark_stopping(self, node: str) -> None:
        self._amend(node, "stopping", True)

    def _amend(self, node: str, name: str, value: Any) -> None:
        if (own := self._own.get(node)) is not None:
            own.facts[name] = value
            self._write(node, own)

    def _write(self, node: str, own: RecordT) -> bool:
        """Write the note of a node of this process, anew if it is gone; False if it is marked as dead."""
        name = PREFIX + node
        while not own.left:
            if not own.version:
                note = self._store.notes(name).get(name)
                if note is not None and says_dead(note):
                    return False
                own.version = 0 if note is None else note.version
            # The version first: of two threads, the one that is refused writes what both have changed.
            version, text = own.version, json.dumps(own.facts)
            with nullcontext() if version else own.making:
                if own.left:  # it must not be recorded again
                    break
                done = self._put(name, text, version)
            if done:
                own.version = version and version + 1
                break
            own.version = 0
        return True

    def _remove(self, node: str, *, if_dead: bool = False) -> None:
        """Remove what is recorded of a node; with ``if_dead`` that of another process if it is dead."""
        name = PREFIX + node
        own = self._own.pop(node, None)
        if own is not None:
            own.left = True
        with nullcontext() if own is None else own.making:
            while name in (notes := self._store.notes(name)):
                if if_dead and own is None and not says_dead(notes[name]):
                    return
                if self._put(name, None, notes[name].version):
                    break
        for part in notes.keys() - {name}:
            if part.startswith(f"{name}/"):
                self._put(part, None, notes[part].version)

    def _put(self, name: str, text: str | None, version: int) -> bool:
        return self._store.put_notes([NoteChange(name, text, version)])[0]


def says_dead(note: Note) -> bool:
    """Whether a note says of its node that it is dead."""
    return bool(json.loads(note.text).get("dead"))


def described(name: str, facts: Mapping[str, Any], alive: bool | None) -> Node:
    """The node that a note of this name is about."""
    return Node(
        id=name.removeprefix(PREFIX),
        name=facts["name"],
        types=tuple(facts["types"]),
        stopping=facts["stopping"],
        alive=alive,
    )


_all: weakref.WeakSet[Recorded[Any]] = weakref.WeakSet()


def _renew_all_after_fork() -> None:
    for one in list(_all):
        one.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
