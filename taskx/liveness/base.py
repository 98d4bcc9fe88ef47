"""Nodes, the interface of liveness, and the strategy for a store that only one process uses."""

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

from taskx.core.rate import Limit, LimitScope, Rate
from taskx.core.writes import Note, NoteChange, Write
from taskx.liveness.began import Began

#: The prefix of the names of the notes about nodes.
PREFIX = "node/"
NO_LIMITS: Mapping[str, Limit] = {}


@attrs.frozen(kw_only=True)
class Node:
    """One running queue in one process, as the repository knows it.

    Attributes:
        id: unique for every start.
        name: a name for people: host, process and start.
        types: the task types that it runs.
        limits: the limits of its types that have one.
        stopping: True after it was asked to stop.
        alive: True while its process lives, False once it is known to be dead, None if neither is known.
    """

    id: str
    name: str
    types: tuple[str, ...] = ()
    limits: Mapping[str, Limit] = attrs.field(factory=dict, hash=False)
    stopping: bool = False
    alive: bool | None = None


class Applies(Protocol):
    """The receiver of a queue's writes."""

    def apply(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Apply guarded writes; return for each whether its guard held."""


class Store(Applies, Protocol):
    """The methods of a repository that liveness uses."""

    def notes(self, prefix: str) -> dict[str, Note]:
        """Return all notes whose name begins with ``prefix``, by name."""

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store or remove notes, each only if its version has not changed; return for each if so."""

    def within(self, seconds: float) -> AbstractContextManager[object]:
        """Make operations inside this context raise after ``seconds``, if the store supports it."""


OwnT = TypeVar("OwnT")


class Liveness(ABC, Generic[OwnT]):
    """The nodes on a repository, and the knowledge of which ones are alive."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._own: dict[str, OwnT] = {}

    @property
    def at_work(self) -> bool:
        """True if a node of this process is recorded."""
        return bool(self._own)

    @abstractmethod
    def join(self, node: Node) -> None:
        """Record a node, and prove that it is alive until :meth:`leave` or the death of the process."""

    @abstractmethod
    def record_types(
        self, node: str, types: Sequence[str], limits: Mapping[str, Limit] = NO_LIMITS
    ) -> None:
        """Record the types that a node of this process runs now; they replace the earlier ones."""

    @abstractmethod
    def mark_stopping(self, node: str) -> None:
        """Record that a node of this process is stopping: a task that it still runs then is interrupted."""

    @abstractmethod
    def leave(self, node: str) -> None:
        """Forget a node that no longer owns any task: a node of this process, or a dead one."""

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """Return all recorded nodes."""

    def watch(self, node: str, lost: Callable[[], object]) -> None:
        """Call ``lost()`` when other nodes may soon treat a node of this process as dead.

        The call comes before they can take over its tasks. It never comes if they can do so only after
        the death of the process.
        """

    def is_dead(self, node: str) -> bool:
        """Return True if a node that was found dead is still dead; to be called after reading its tasks."""
        return True

    def began(self, node: str) -> Began | None:
        """Return the tasks that a node's threads began last: to note more, or to read those of a dead node.

        Return None if they are not kept or cannot be read here. Then the node may have executed any of
        its tasks.
        """
        return None

    @property
    def applies(self) -> Applies:
        """The object that applies writes: the repository, or one that refuses starts after a lost lease."""
        return self._store


class InProcess(Liveness[Node]):
    """The nodes of a store that only one process uses: none of them can be dead."""

    def join(self, node: Node) -> None:
        self._own[node.id] = attrs.evolve(node, alive=True)

    def record_types(
        self, node: str, types: Sequence[str], limits: Mapping[str, Limit] = NO_LIMITS
    ) -> None:
        if node in self._own:
            self._own[node] = attrs.evolve(self._own[node], types=tuple(types), limits={**limits})

    def mark_stopping(self, node: str) -> None:
        """Do nothing: a node of this process cannot leave a task behind when the process ends."""

    def leave(self, node: str) -> None:
        self._own.pop(node, None)

    def nodes(self) -> Sequence[Node]:
        return list(self._own.values())


class Own:
    """A node of this process; ``facts`` are additional values for its note.

    Attributes:
        version: the version of its note if no other process has changed it; 0 if it is unknown.
        left: True once the node leaves.
        making: a lock that a thread holds while it creates the note, or removes it for good.
    """

    def __init__(self, node: Node, facts: Mapping[str, Any]) -> None:
        known = {"name": node.name, "types": list(node.types), "stopping": node.stopping}
        self.facts = {**known, **_limits_to_json(node.limits), **facts}
        self.version = 0
        self.left = False
        self.making = threading.Lock()


RecordT = TypeVar("RecordT", bound=Own)


class Recorded(Liveness[RecordT]):
    """Nodes that are stored as notes, each written by its own process."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        _all.add(self)

    def renew(self) -> None:
        self._own = {}

    def record_types(
        self, node: str, types: Sequence[str], limits: Mapping[str, Limit] = NO_LIMITS
    ) -> None:
        self._amend(node, {"types": list(types), **_limits_to_json(limits)})

    def mark_stopping(self, node: str) -> None:
        self._amend(node, {"stopping": True})

    def _amend(self, node: str, facts: Mapping[str, Any]) -> None:
        if (own := self._own.get(node)) is not None:
            own.facts.update(facts)
            self._write(node, own)

    def _write(self, node: str, own: RecordT) -> bool:
        """Write the note of a node of this process, anew if it is gone; return False if marked dead."""
        name = PREFIX + node
        while not own.left:
            if not own.version:
                note = self._store.notes(name).get(name)
                if note is not None and says_dead(note):
                    return False
                own.version = 0 if note is None else note.version
            # Read the version first: of two threads, the refused one then writes both changes.
            version, text = own.version, json.dumps(own.facts)
            with nullcontext() if version else own.making:
                if own.left:  # the note must not be created again
                    break
                done = self._put(name, text, version)
            if done:
                own.version = version and version + 1
                break
            own.version = 0
        return True

    def _remove(self, node: str, *, if_dead: bool = False) -> None:
        """Remove the notes of a node; with ``if_dead``, those of another process only if it is dead."""
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
    """Return True if a note marks its node as dead."""
    return bool(json.loads(note.text).get("dead"))


def described(name: str, facts: Mapping[str, Any], alive: bool | None) -> Node:
    """Return the node that the note with this name describes."""
    return Node(
        id=name.removeprefix(PREFIX),
        name=facts["name"],
        types=tuple(facts["types"]),
        limits={type: _limit_of(*values) for type, values in facts.get("limits", {}).items()},
        stopping=facts["stopping"],
        alive=alive,
    )


def _limits_to_json(limits: Mapping[str, Limit]) -> dict[str, Any]:
    """Return the fact about a node's limits; no fact if it has none."""
    known = {
        type: [
            limit.max_concurrency,
            None if limit.rate is None else attrs.astuple(limit.rate),
            limit.scope,
        ]
        for type, limit in limits.items()
    }
    return {"limits": known} if known else {}


def _limit_of(most: int | None, rate: Sequence[Any] | None, scope: LimitScope) -> Limit:
    return Limit(most, None if rate is None else Rate(*rate), scope)


_all: weakref.WeakSet[Recorded[Any]] = weakref.WeakSet()


def _renew_all_after_fork() -> None:
    for one in list(_all):
        one.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
