"""Pauses: the paused types of tasks, stored in the repository for all of its nodes."""

from __future__ import annotations

import threading

import attrs

from taskx.core.model import check_key
from taskx.storage.base import Repository

_NOTE = "pause"


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


class Pauses:
    """Reads, sets and lifts the pauses of a repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._refreshing = threading.Lock()
        #: The pauses as they were at the last refresh.
        self.known = Paused()

    def read(self) -> Paused:
        """Read the current pauses from the repository."""
        names = self._repository.notes(_NOTE)
        start = len(_NOTE) + 1
        types = frozenset(name[start:] for name in names if name.startswith(_NOTE + "/"))
        return Paused(_NOTE in names, types)

    def refresh(self) -> bool:
        """Bring :attr:`known` up to date. Return True if it changed."""
        # Else a thread that read before a change might set ``known`` after another one that read later.
        with self._refreshing:
            before, self.known = self.known, self.read()
            return self.known != before

    def set(self, type: str | None) -> None:
        """Pause a type, or with None everything.

        Raises ``ConfigurationError`` if the repository cannot store pauses.
        """
        self._repository.put_note(_name(type), "", 0)  # does nothing if it is already paused

    def lift(self, type: str | None) -> None:
        """Lift the pause of a type, or with None the pause of everything."""
        name = _name(type)
        while note := self._repository.notes(name).get(name):
            if self._repository.put_note(name, None, note.version):
                break


def _name(type: str | None) -> str:
    return _NOTE if type is None else f"{_NOTE}/{check_key(type, 'type')}"
