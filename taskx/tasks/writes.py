"""Guarded writes: ``lifecycle`` makes them, and a repository applies each one if its condition holds.

A repository knows no rules about tasks. A guard maps columns to conditions: a value that the column must
have (possibly None), a tuple with the allowed values, or :data:`PRESENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeVar

from taskx.tasks.options import CHECKS

T = TypeVar("T")


class _Present(Enum):
    PRESENT = "present"


#: In a guard: the column must have a value other than None.
PRESENT = _Present.PRESENT


def maker(kind: type[T]) -> Callable[[tuple[Any, ...]], T]:
    """Return a maker of named tuples from all their fields, at a third of the cost of the class."""
    return partial(tuple.__new__, kind)  # type: ignore[type-var]


class Insert(NamedTuple):
    """Store a new record, unless another record has its id or the same value in a unique column.

    ``row`` has the columns of :data:`CREATED`, in that order, and then any other columns; a record that is
    stored as started has more of them. The remaining columns get their defaults. The row's ``owner`` may be
    changed until the insert is applied. A store may then note the record's number in it, as ``seq``: see
    :class:`Update`.

    ``key`` is the number in its id, if ``ids.keyed_id`` made that for it: no record has that id. 0 if the
    id was chosen.
    """

    row: dict[str, Any]
    durable: bool = True
    key: int = 0

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
        """The columns that the write sets."""
        return self.row


class Update(NamedTuple):
    """Change columns of the record with this id, if the guard holds.

    The guard also fails if another record already has the same value in a unique column.

    ``durable`` is True if a caller was told about the write: a power cut must not undo it. ``move`` names
    the move, for the code that acts on its consequences; a repository ignores it.

    ``skips`` is True if the write may be refused while another transaction has locked the record, so that
    nobody waits: its maker looks at the record again later. A repository without locked records ignores it.

    ``seq`` is the number of the record, if its store has given one with the row of the record; otherwise 0.
    Then the write is for the record with that number, and for no later one with its id.
    """

    id: str
    guard: Mapping[str, Any]
    changes: Mapping[str, Any]
    durable: bool = False
    move: str = ""
    skips: bool = False
    seq: int = 0


class Delete(NamedTuple):
    """Remove the record with this id, if the guard holds. ``skips`` is as in :class:`Update`."""

    id: str
    guard: Mapping[str, Any]
    durable: bool = True
    move: str = ""
    skips: bool = False

    @property
    def changes(self) -> Mapping[str, Any]:
        """The columns that the write sets: none."""
        return {}


Write = Insert | Update | Delete


class Note(NamedTuple):
    """A short text that is stored under a name."""

    text: str
    version: (
        int  #: rises with every change; never 0, never a version of an earlier note of this name
    )


class NoteChange(NamedTuple):
    """A change of a note, applied only if the note still has the given version."""

    name: str
    text: str | None  #: the text to store; None to remove the note
    version: int  #: the version that the note must have now; 0 if there must be no note


#: The columns that every creation sets.
CREATED = ("id", "type", "params", "created_by", "created_at", *CHECKS, "owner", "held")
#: The columns of an insert by which it is recognised: no move changes them.
IDENTITY = ("type", "created_by", "created_at")


def traces(write: Insert | Update) -> dict[str, Any]:
    """Return the columns that a record has after this write, to check a write that failed midway.

    A new record may have been started, taken or amended since its insert; this must not hide the insert.
    After an update, a later update may have changed the columns; then the first one can no longer be seen.
    """
    if isinstance(write, Insert):
        return {name: write.row[name] for name in IDENTITY}
    return dict(write.changes)


def shows(
    row: Mapping[str, Any] | None, write: Write, same: Callable[[str, Any, Any], bool]
) -> bool:
    """Return True if a row (None: no record) shows that a write took place.

    ``same(column, stored, plain)`` compares a stored value with a plain one.
    """
    if row is None or isinstance(write, Delete):
        return row is None and isinstance(write, Delete)
    return all(same(name, row[name], value) for name, value in traces(write).items())


def matches(row: Mapping[str, Any], guard: Mapping[str, Any]) -> bool:
    """Return True if a row satisfies a guard, for repositories that test guards in Python."""
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
