"""Guarded writes: how ``lifecycle`` tells a repository what to change, and under which condition.

A repository applies them and knows no rules. A guard names columns and what they must hold: a value
(None included), a tuple of values of which it must be one, or :data:`PRESENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from taskx.core.options import CHECKS


class _Present(Enum):
    PRESENT = "present"


#: In a guard: the column must hold something, whatever it is.
PRESENT = _Present.PRESENT


class Insert(NamedTuple):
    """Store a new record; holds if no record has its id, and none a unique column's value.

    ``row`` has the columns of :data:`CREATED`, in that order, and any others after them; the rest take
    their defaults: one that is stored as started has more. Its ``owner`` may be set until it is applied.
    """

    row: dict[str, Any]
    durable: bool = True

    @property
    def id(self) -> str:
        """The id of the record."""
        id_: str = self.row["id"]
        return id_

    @property
    def move(self) -> str:
        """The name of the move: see :class:`Update`."""
        return "create"

    @property
    def changes(self) -> Mapping[str, Any]:
        """The columns that it sets."""
        return self.row


class Update(NamedTuple):
    """Change columns of the record with that id, if its guard holds.

    The guard also fails if another record has the value that this would give a unique column.

    ``durable`` marks what a caller was told, so that a power cut must not undo it. ``move`` names the move
    that it makes, for those who must do what follows; to a repository it says nothing.
    """

    id: str
    guard: Mapping[str, Any]
    changes: Mapping[str, Any]
    durable: bool = False
    move: str = ""


class Delete(NamedTuple):
    """Remove the record with that id, if its guard holds."""

    id: str
    guard: Mapping[str, Any]
    durable: bool = True
    move: str = ""

    @property
    def changes(self) -> Mapping[str, Any]:
        """The columns that it sets: none."""
        return {}


Write = Insert | Update | Delete


class Note(NamedTuple):
    """A short text kept under a name."""

    text: str
    version: int  #: rises with every change; never 0, nor what an earlier note of its name had


class NoteChange(NamedTuple):
    """A change of a note, which holds if the note still has a version."""

    name: str
    text: str | None  #: what to store; None to remove it
    version: int  #: the one that it must have now; 0 if there must be none


#: The columns that every creation sets.
CREATED = ("id", "type", "params", "created_by", "created_at", *CHECKS, "owner", "held")
#: The columns of an insert by which it is known again: those that no move changes.
IDENTITY = ("type", "created_by", "created_at")


def traces(write: Insert | Update) -> dict[str, Any]:
    """What a record shows after that write took place: by this, one cut short is settled.

    An insert may have been started, taken or amended since, which must not hide it; an update that
    another one has followed meanwhile no longer shows.
    """
    if isinstance(write, Insert):
        return {name: write.row[name] for name in IDENTITY}
    return dict(write.changes)


def shows(
    row: Mapping[str, Any] | None, write: Write, same: Callable[[str, Any, Any], bool]
) -> bool:
    """Whether a row, or that there is none, shows that a write took place.

    ``same(column, stored, plain)`` compares.
    """
    if row is None or isinstance(write, Delete):
        return row is None and isinstance(write, Delete)
    return all(same(name, row[name], value) for name, value in traces(write).items())


def matches(row: Mapping[str, Any], guard: Mapping[str, Any]) -> bool:
    """Whether a row satisfies a guard: the meaning of guards, for repositories that test them in Python."""
    for column, wanted in guard.items():
        value = row[column]
        if value == wanted:
            continue
        if wanted is PRESENT:
            if value is None:
                return False
        elif not isinstance(wanted, tuple) or value not in wanted:
            return False
    return True
