"""Nodes, the interface of liveness, and the strategy for a store that only one process uses."""

from __future__ import annotations

import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import attrs

from taskx.stores.liveness.began import Began
from taskx.tasks.in_use import InUse
from taskx.tasks.rate import Limit, limit_from_json, limit_to_json
from taskx.tasks.writes import Note, NoteChange, Write

#: The prefix of the names of the notes about nodes.
PREFIX = "node/"


@attrs.frozen(kw_only=True)
class About:
    """Facts about a node that do not change, for people; empty or 0 if the node did not record them.

    Attributes:
        host: the name of its host.
        pid: the id of its process.
        python: the version of Python.
        version: the version of TaskX.
        started_at: the time of its start, in milliseconds.
        buffer_size: the number of submitted tasks that fit into its buffer.
        worker_num: the number of workers that its program configured.
        engine: the name of the engine that brings tasks to it; empty if it fetches them itself.
    """

    host: str = ""
    pid: int = 0
    python: str = ""
    version: str = ""
    started_at: int = 0
    buffer_size: int = 0
    worker_num: int = 0
    engine: str = ""


@attrs.frozen(kw_only=True)
class Node:
    """One running queue in one process, as the repository knows it.

    Attributes:
        id: unique for every start.
        name: a name for people: host, process and start.
        types: the task types that it runs.
        limits: the limits that it knows, by name.
        limited: the names of the limits of each of its types that has some.
        declared: the limits with a name, as its program declares them.
        own_limits: the limits that its program set for the types whose limits are overridden; None for
            none.
        workers: the number of workers that it shall have now.
        about: facts that do not change.
        stopping: True after it was asked to stop.
        alive: True while its process lives, False once it is known to be dead, None if neither is known.
            No task is taken from a node of which nothing is known.
        beat_at: the time of its last heartbeat by its own clock, in milliseconds; None if it sends none.
        late: True if it is alive, but its heartbeat has stood still for longer than usual.
        broker_error: the error of the broker of its engine, if that could not be used; else empty.
    """

    id: str
    name: str
    types: tuple[str, ...] = ()
    limits: Mapping[str, Limit] = attrs.field(factory=dict, hash=False)
    limited: Mapping[str, Sequence[str]] = attrs.field(factory=dict, hash=False)
    declared: Mapping[str, Limit] = attrs.field(factory=dict, hash=False)
    own_limits: Mapping[str, Limit | None] = attrs.field(factory=dict, hash=False)
    workers: int = 0
    about: About = About()
    stopping: bool = False
    alive: bool | None = None
    beat_at: int | None = None
    late: bool = False
    broker_error: str = ""

    def limits_of(self, type: str) -> dict[str, Limit]:
        """Return the limits of a type, by name."""
        names = self.limited.get(type, ())
        return {name: self.limits[name] for name in names if name in self.limits}

    @property
    def silent(self) -> bool:
        """True if its last heartbeat is so old that nobody who looks rarely can know if it lives."""
        return self.alive is None and self.beat_at is not None

    @property
    def lives(self) -> bool:
        """True if it counts as alive: it is neither dead nor silent."""
        return self.alive is not False and not self.silent

    @property
    def only_sends(self) -> bool:
        """True if this node only sends tasks to the workers of a broker."""
        return bool(self.about.engine) and not self.about.worker_num

    @property
    def serves_broker(self) -> bool:
        """True if this node is in a worker process of a broker, which is started and ended by others."""
        return bool(self.about.engine and self.about.worker_num)


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

    @property
    def house(self) -> _House: ...


class _House(Protocol):
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

    def has(self, node: str) -> bool:
        """Return True if a node is one of this process, and recorded here."""
        return node in self._own

    #: Seconds between two calls of :meth:`tend` that are soon enough.
    interval = math.inf

    @abstractmethod
    def join(self, node: Node, *, tended: bool = False) -> None:
        """Record a node, and prove that it is alive until :meth:`leave` or the death of the process.

        With ``tended``, the caller calls :meth:`tend` again and again, which saves a thread.
        """

    def tend(self, node: str) -> None:
        """Do what is due to prove that a node of this process is alive, if it was joined as tended."""

    @abstractmethod
    def record(self, node: Node) -> None:
        """Record the types, limits and workers that a node of this process has now."""

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

    def seems_dead(self, node: str) -> bool:
        """Return True if a node of this process is recorded as dead: so its tasks must be taken back."""
        return False

    def come_back(self, node: str) -> None:
        """Have a node of this process that seems dead recorded anew, after its tasks were taken back."""

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

    def join(self, node: Node, *, tended: bool = False) -> None:
        self._own[node.id] = attrs.evolve(node, alive=True)

    def record(self, node: Node) -> None:
        if node.id in self._own:
            self._own[node.id] = attrs.evolve(node, alive=True)

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
        known = {"name": node.name, "stopping": node.stopping, "about": attrs.asdict(node.about)}
        self.facts = {**known, **_changing_facts(node), **facts}
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

    def record(self, node: Node) -> None:
        self._amend(node.id, _changing_facts(node))

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


def described(
    name: str, facts: Mapping[str, Any], alive: bool | None, *, late: bool = False
) -> Node:
    """Return the node that the note with this name describes."""
    about = facts.get("about", {})
    own_limits = facts.get("own_limits", {})
    return Node(
        id=name.removeprefix(PREFIX),
        name=facts["name"],
        types=tuple(facts["types"]),
        limits=_limits_of(facts, "limits"),
        limited={type: tuple(names) for type, names in facts.get("limited", {}).items()},
        declared=_limits_of(facts, "declared"),
        own_limits={type: value and limit_from_json(value) for type, value in own_limits.items()},
        workers=facts.get("workers", 0),
        about=About(**{name: about[name] for name in _ABOUT if name in about}),
        stopping=facts["stopping"],
        alive=alive,
        beat_at=facts.get("beat_at"),
        late=late,
        broker_error=facts.get("broker_error", ""),
    )


def _changing_facts(node: Node) -> dict[str, Any]:
    """Return the facts about a node that may change while it runs, as JSON values."""
    return {
        "types": list(node.types),
        "limits": {name: limit_to_json(limit) for name, limit in node.limits.items()},
        "limited": {type: list(names) for type, names in node.limited.items()},
        "declared": {name: limit_to_json(limit) for name, limit in node.declared.items()},
        "own_limits": {
            type: limit and limit_to_json(limit) for type, limit in node.own_limits.items()
        },
        "workers": node.workers,
        "broker_error": node.broker_error,
    }


def _limits_of(facts: Mapping[str, Any], what: str) -> dict[str, Limit]:
    return {name: limit_from_json(value) for name, value in facts.get(what, {}).items()}


_ABOUT = tuple(field.name for field in attrs.fields(About))


_all = InUse[Recorded[Any]]()


def _renew_all_after_fork() -> None:
    for one in _all:
        one.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
