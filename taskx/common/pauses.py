"""Which types of task are paused: kept in the repository, for all who run tasks from it."""

from __future__ import annotations

import threading

import attrs

from taskx.core.model import check_key
from taskx.storage.base import Repository

_NOTE = "pause"


@attrs.frozen
class Paused:
    """The types that are paused; false if none is. ``"type" in paused`` says it of a type.

    Attributes:
        everything: True if the whole queue is.
        types: the types that are paused by themselves.
    """

    everything: bool = False
    types: frozenset[str] = frozenset()

    def __contains__(self, type: str) -> bool:
        return self.everything or type in self.types

    def __bool__(self) -> bool:
        return self.everything or bool(self.types)


class Pauses:
    """Reads, sets and lifts pauses."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._refreshing = threading.Lock()
        #: What was paused at the last look.
        self.known = Paused()

    def read(self) -> Paused:
        """Read what is paused now."""
        names = self._repository.notes(_NOTE)
        start = len(_NOTE) + 1
        types = frozenset(name[start:] for name in names if name.startswith(_NOTE + "/"))
        return Paused(_NOTE in names, types)

    def refresh(self) -> bool:
        """Bring :attr:`known` up to date; whether it changed."""
        with self._refreshing:  # else one who read before a change might tell after it
            before, self.known = self.known, self.read()
            return self.known != before

    def set(self, type: str | None) -> None:
        """Pause a type, or with None everything; ``ConfigurationError``: the repository keeps none."""
        self._repository.put_note(_name(type), "", 0)  # if there is one, it is paused already

    def lift(self, type: str | None) -> None:
        """End the pause of a type, or with None of everything."""
        name = _name(type)
        while note := self._repository.notes(name).get(name):
            if self._repository.put_note(name, None, note.version):
                break


def _name(type: str | None) -> str:
    return _NOTE if type is None else f"{_NOTE}/{check_key(type, 'type')}"
