"""Guarded writes: how ``lifecycle`` tells a repository what to change, and under which condition.

A repository applies them and knows no rules. A guard names columns and what they must hold: a value
(None included), a tuple of values of which it must be one, or :data:`PRESENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple


class _Present(Enum):
    PRESENT = "present"


#: In a guard: the column must hold something, whatever it is.
PRESENT = _Present.PRESENT


class Insert(NamedTuple):
    """Store a new record; holds if no record has its id, and none a unique column's value.

    ``row`` has the columns of :data:`CREATED`, in that order, and any others after them; the rest take
    their defaults. Its ``owner`` may be set until it is applied.
    """

    row: dict[str, Any]
    durable: bool = True

    @property
    def id(self) -> str:
        """The id of the record."""
        id_: str = self.row["id"]
        return id_


class Update(NamedTuple):
    """Change columns of the record with that id, if its guard holds.

    It holds not either where another record has the value that it would give a unique column.

    ``durable`` marks what a caller was told, so that a power cut must not undo it.
    """

    id: str
    guard: Mapping[str, Any]
    changes: Mapping[str, Any]
    durable: bool = False


class Delete(NamedTuple):
    """Remove the record with that id, if its guard holds."""

    id: str
    guard: Mapping[str, Any]
    durable: bool = True


Write = Insert | Update | Delete

#: The columns that every creation sets.
CREATED = (
    "id",
    "type",
    "params",
    "created_by",
    "created_at",
    "priority",
    "run_at",
    "timeout",
    "max_attempts",
    "max_crashes",
    "retry",
    "owner",
    "held",
)


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
    row: Mapping[str, Any], write: Insert | Update, same: Callable[[str, Any, Any], bool]
) -> bool:
    """Whether a row shows that a write took place, where ``same(column, stored, plain)`` compares."""
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
