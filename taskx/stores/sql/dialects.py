"""The differences between databases in the text of statements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from string import ascii_uppercase
from typing import Any

from taskx.tasks.lifecycle import PENDING
from taskx.tasks.model import CONDITIONS
from taskx.tasks.record import FREE, STUB

#: A text that begins with a prefix comes before the prefix and this.
LAST = "\U0010ffff"


class Dialect:
    """The SQL of one kind of database, as far as the statements of the store differ from others.

    Args:
        tasks: the name of the table of tasks.
        parents: the name of the table with the pairs of a parent and a task.
        tags: the name of the table of tags.
        notes: the name of the table of notes.
    """

    #: The operator that compares two values, and finds NULL equal to NULL.
    same = "IS NOT DISTINCT FROM"
    #: The end of an ``INSERT`` that does nothing if a unique value is taken; empty if it fails then.
    unless_taken = " ON CONFLICT DO NOTHING"
    #: The beginning of an ``UPDATE`` that sets a unique value.
    update_unique = "UPDATE"
    #: The end of a ``SELECT`` that locks its rows.
    locks = " FOR UPDATE"
    #: The join of the table of tags with that of tasks, in this order.
    join = "JOIN"
    #: Compares a lower-case text with a part of the column ``error``. Only A to Z have lower case.
    error_contains = "instr(lower(error), ?) > 0"
    #: The condition of the index of stuck tasks.
    stuck = "stuck_on > ''"
    #: A value that comes after all priorities.
    after_all: Any = 2**63 - 1
    #: The conditions of a filter that the statements apply.
    conditions = CONDITIONS - {"params"}
    #: The types that a date may have in a place of a list.
    dates: type | tuple[type, ...] = int

    #: True if a query may follow an index by a recursion, one step for each value.
    recursive = True
    #: True if the tables know the defaults of their columns.
    has_defaults = False
    #: True if triggers keep the pairs and tags of tasks that are removed, and new tags of others.
    has_triggers = False
    #: True if writes of the same form are one statement with arrays.
    has_arrays = False
    #: True if a transaction can go on after an error only at a savepoint before it.
    needs_savepoints = False
    #: True if an ``UPDATE`` cannot pass over locked rows, and a ``SELECT`` before it must.
    locks_first = False
    #: True if lists of tasks in no order of an index are sorted by number and date alone.
    sorts_numbers = False
    #: The most types of tasks in one query, and the most writes in one statement without arrays.
    most_types, most_together = 50, 1
    #: True if :meth:`span` returns the tasks of a status.
    has_spans = False
    #: The columns that have an index of the rows in which they are not empty, in the order of lists.
    in_order: tuple[str, ...] = ()

    #: The newest tasks first; and the conditions for those that follow a place, which is a ``created_at``
    #: and a ``seq``, with the values of it that they need. There are two, first for the tasks of the same
    #: moment and then for the earlier ones, as an index finds those of each one at once.
    newest_first = "ORDER BY created_at DESC, seq DESC"
    following: Sequence[tuple[str, slice]] = (
        ("created_at = ? AND seq < ?", slice(2)),
        ("created_at < ?", slice(1)),
    )
    #: The condition of the tasks that follow a place, in one query; and which of the ``created_at`` and the
    #: ``created_at`` and ``seq`` of the place it needs. MySQL uses an index only for the first comparison.
    all_following = "created_at <= ? AND (created_at, seq) < (?, ?)", slice(3)
    #: The columns of the table of tags besides the tag, and what they are in the table of tasks.
    tag_columns: Mapping[str, str] = {"at": "created_at", "task": "seq"}
    #: The column of tasks that the pairs of a parent and a task have for the task.
    child = "id"

    #: The expressions of the columns of a stub.
    stub = ", ".join(STUB)

    #: The expressions of the further columns of a stub's row, the first of which is NULL if there is none.
    #: Empty if each task must be read before its start, because another one may have its id by then.
    plain: Sequence[str] = ()

    def __init__(self, tasks: str, parents: str, tags: str, notes: str) -> None:
        self.tasks, self.parents, self.tags, self.notes = tasks, parents, tags, notes

    def columns(self, names: Iterable[str]) -> str:
        """Return columns as a query selects them."""
        return ", ".join(names)

    def named(self, task_ids: Sequence[str]) -> tuple[str, Sequence[Any]]:
        """Return the condition for the rows of tasks with these ids, and its values."""
        return "id = ?" if len(task_ids) == 1 else among("id", len(task_ids)), task_ids

    def elsewhere(self, task_ids: Sequence[str]) -> tuple[str, Sequence[Any]] | None:
        """Return what :meth:`named` does, for a place where few tasks are; None if there is none."""
        return None

    def prefixed(self, prefix: str) -> tuple[str, Sequence[Any]]:
        """Return the condition for the tasks whose ids begin with a prefix, and its values."""
        return "id >= ? AND id < ?", (prefix, prefix + LAST)

    def created(self, sign: str, moment: int) -> tuple[str, Sequence[Any]]:
        """Return the condition for the tasks created since (``>=``) or until a moment, and its values."""
        return f"created_at {sign} ?", (moment,)

    def place_at(self, moment: int) -> tuple[int, int]:
        """Return a place of a list that the tasks created before a moment follow."""
        return moment, 0

    def index(self, name: str) -> str:
        """Return what follows the name of the table of tasks, so that a query uses an index."""
        return ""

    def span(self, status: str, columns: str = "*", *, typed: bool = False) -> str:
        """Return a subquery for columns of the tasks of a status that names their indexes.

        ``typed`` says that the query looks for the tasks of one type.
        """
        raise NotImplementedError

    def of_status(self, status: str) -> str:
        """Return the condition for the tasks of a status."""
        if status == PENDING:
            # The indexes of what may start and of what waits hold all pending tasks between them.
            return f"status = '{PENDING}' AND (held = {FREE} OR held > {FREE})"
        return f"status = '{status}'"


class Postgres(Dialect):
    """PostgreSQL."""

    error_contains = "strpos(lower(error), ?) > 0"
    has_arrays = needs_savepoints = True


class MySQL(Dialect):
    """MariaDB and MySQL."""

    # ``lower`` changes all letters, whatever the collation is; a filter ignores the case of A to Z only.
    error_contains = (
        "instr("
        + reduce(lambda text, x: f"replace({text}, '{x}', '{x.lower()}')", ascii_uppercase, "error")
        + ", ?) > 0"
    )
    same = "<=>"
    unless_taken = ""
    recursive = False
    locks_first = True


class SQLite(Dialect):
    """SQLite. Any value may be in any column."""

    same = "IS"
    update_unique = "UPDATE OR IGNORE"
    locks = ""
    join = "CROSS JOIN"
    after_all = LAST  # a damaged number is a text, which comes after all numbers
    most_types, most_together = 1, 128
    # Casts, as one damaged record must not prevent the others from being sorted.
    stub = (
        "+id, +status, CAST(starts AS INTEGER), CAST(priority AS INTEGER), CAST(created_at AS INTEGER), "
        "+cancel_requested_at, CAST(type AS TEXT), CAST(run_at AS INTEGER)"
    )

    def columns(self, names: Iterable[str]) -> str:
        """Return columns as expressions, which have no declared type.

        A connection of a caller may have ``PARSE_DECLTYPES``, and converters for the types of our columns.
        """
        return ", ".join(f"+{name}" for name in names)


def among(name: str, count: int) -> str:
    """Return the condition that a column has one of some values."""
    return f"{name} = ?" if count == 1 else f"{name} IN ({', '.join('?' * count)})"
