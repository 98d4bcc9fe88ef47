"""Controls: what people have set for the nodes of a repository. Each control is a note.

There are pauses, overrides of limits and numbers of workers, and requests to single nodes. The names of the
notes share a prefix, so that a node reads all of them at once. The prefix is as old as the pauses, which
came first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import attrs

from taskx.core.ids import new_id
from taskx.core.model import check_key
from taskx.core.overrides import Overrides, from_text
from taskx.core.writes import Note
from taskx.storage.base import Repository

_PAUSE = "pause"
_OVERRIDES = "pause.overrides"
#: The prefix of the names of requests.
REQUEST = "pause.request/"
#: The kinds of requests.
STACKS, STOP = "stacks", "stop"


@attrs.frozen
class Paused:
    """The paused types. It is false if nothing is paused; ``"type" in paused`` checks one type.

    Attributes:
        everything: True if the whole queue is paused.
        types: the types that are paused individually.
    """

    everything: bool = False
    types: frozenset[str] = frozenset()

    def __contains__(self, type: str) -> bool:
        return self.everything or type in self.types

    def __bool__(self) -> bool:
        return self.everything or bool(self.types)


class Request(NamedTuple):
    """A request to a node.

    Attributes:
        node: the id of the node.
        id: the id of the request.
        what: the kind of the request.
        note: its note.
    """

    node: str
    id: str
    what: str
    note: Note

    @property
    def name(self) -> str:
        """The name of its note."""
        return f"{REQUEST}{self.node}/{self.id}"


class Controls:
    """Reads and changes the controls of a repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._refreshing = threading.Lock()
        self._text: str | None = None  # of the known overrides
        #: The pauses as they were at the last refresh.
        self.paused = Paused()
        #: The overrides as they were at the last refresh.
        self.overrides = Overrides()
        #: The requests to all nodes as they were at the last refresh.
        self.requests: Sequence[Request] = ()

    def read_paused(self) -> Paused:
        """Read the current pauses from the repository."""
        return _paused(self._repository.notes(_PAUSE))

    def read_overrides(self) -> Overrides:
        """Read the current overrides from the repository."""
        note = self._read_note(_OVERRIDES)
        return Overrides() if note is None else from_text(note.text)

    def refresh(self) -> bool:
        """Read all controls again. Return True if the pauses changed."""
        # Else a thread that read before a change might set its result after another one that read later.
        with self._refreshing:
            notes = self._repository.notes(_PAUSE)
            text = notes[_OVERRIDES].text if _OVERRIDES in notes else None
            if text != self._text:
                self.overrides = Overrides() if text is None else from_text(text)
                self._text = text
            self.requests = _requests(notes)
            before, self.paused = self.paused, _paused(notes)
            return self.paused != before

    # --- pauses

    def pause(self, type: str | None) -> None:
        """Pause a type, or with None everything.

        Raises ``ConfigurationError`` if the repository cannot store pauses.
        """
        self._repository.put_note(_pause(type), "", 0)  # does nothing if it is already paused

    def resume(self, type: str | None) -> None:
        """Lift the pause of a type, or with None the pause of everything."""
        name = _pause(type)
        while note := self._read_note(name):
            if self._repository.put_note(name, None, note.version):
                break

    # --- overrides

    def override(self, change: Callable[[Overrides], Overrides]) -> None:
        """Change the overrides.

        Raises ``ConfigurationError`` if the repository cannot store overrides.
        """
        done = False
        while not done:
            note = self._read_note(_OVERRIDES)
            wanted = change(Overrides() if note is None else from_text(note.text))
            if note is None and not wanted:
                return
            text = wanted.to_text() if wanted else None
            done = self._repository.put_note(_OVERRIDES, text, note.version if note else 0)

    # --- requests

    def request(self, node: str, what: str) -> Request:
        """Ask a node for something."""
        request = Request(node, new_id(), what, Note(what, 0))
        self._repository.put_note(request.name, what, 0)
        return request

    def withdraw(self, request: Request) -> None:
        """Take a request back, if the node has not taken it yet."""
        if note := self._read_note(request.name):
            self._repository.put_note(request.name, None, note.version)

    def _read_note(self, name: str) -> Note | None:
        return self._repository.notes(name).get(name)


def _pause(type: str | None) -> str:
    return _PAUSE if type is None else f"{_PAUSE}/{check_key(type, 'type')}"


def _paused(notes: Mapping[str, Note]) -> Paused:
    start = len(_PAUSE) + 1
    types = frozenset(name[start:] for name in notes if name.startswith(_PAUSE + "/"))
    return Paused(_PAUSE in notes, types)


def _requests(notes: Mapping[str, Note]) -> list[Request]:
    found = []
    for name, note in notes.items():
        if name.startswith(REQUEST):
            node, _, request = name.removeprefix(REQUEST).partition("/")
            found.append(Request(node, request, note.text, note))
    return found
