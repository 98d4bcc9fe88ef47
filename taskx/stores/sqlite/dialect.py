"""The SQL of TaskX's own tables in SQLite, whose indexes are named in queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from taskx.stores.sql import SQLite, Statements
from taskx.stores.sql.dialects import LAST, among
from taskx.tasks.ids import KEPT_ORDER, key_at, key_of
from taskx.tasks.lifecycle import PENDING
from taskx.tasks.model import CONDITIONS
from taskx.tasks.record import FREE, PLAIN, RARE, SMALL

FREE_PAGES = (
    "SELECT (SELECT freelist_count FROM pragma_freelist_count), "
    "(SELECT page_count FROM pragma_page_count)"
)

# Where the keys of the first and of the last moment begin, which all earlier and later moments share.
_ENDS = key_at(0), key_at(2**63)

_READY = f"status = '{PENDING}' AND held = {FREE}"


class OwnSQLite(SQLite):
    """The SQL of the tables that ``schema`` makes, whose names begin with a prefix.

    The number of a row, ``seq``, is its key (see ``ids``), so that no other index is needed for ids and for
    ``created_at``. If an id has a key in it and no other row has that, it is the row's key. Any other row
    has an odd key and is in an index of ids; there are few of them.
    """

    conditions = CONDITIONS
    dates = (int, float, str)  # a damaged date is a text
    stuck = "stuck_on <> ''"
    has_defaults = has_triggers = sorts_numbers = has_spans = True
    in_order = ("created_by",)
    newest_first = "ORDER BY seq DESC"
    following = (("seq < ?", slice(1, 2)),)
    all_following = "seq < ?", slice(2, 3)
    tag_columns: Mapping[str, str] = {"task": "seq"}
    child = "seq"
    plain: Sequence[str] = (
        "CASE WHEN "
        + " AND ".join(["starts = 0", *(f"{name} IS NULL" for name in RARE)])
        + f" AND length(params) <= {SMALL} THEN params END",
        *(f"+{name}" for name in PLAIN[1:]),
    )

    def __init__(self, prefix: str) -> None:
        super().__init__(*(f"{prefix}{name}" for name in ("tasks", "parents", "tagged", "notes")))
        # The owners of the tasks that may start, one step in the index for each.
        ready = f"FROM {self.tasks}{self.index('ready')} WHERE {_READY}"
        self._owners = (
            f"(WITH RECURSIVE owners (owner) AS (SELECT min(owner) {ready} UNION ALL SELECT (SELECT "
            f"min(owner) {ready} AND owner > owners.owner) FROM owners WHERE owners.owner IS NOT NULL) "
            "SELECT owner FROM owners)"
        )

    # Listing or counting the few unfinished tasks costs nothing for the many finished ones.
    def span(self, status: str, columns: str = "*", *, typed: bool = False) -> str:
        """Return a subquery for columns of the tasks of a status that names their indexes.

        The index of what may start begins with the owner. If a type is wanted, all owners are named, so
        that its tasks are found at once.
        """
        parts = {status: f"status = '{status}'"}
        if status == PENDING:
            owners = f" AND owner IN {self._owners}" if typed else ""
            parts = {"ready": _READY + owners, "held": f"status = '{PENDING}' AND held > {FREE}"}
        texts = (
            f"SELECT {columns} FROM {self.tasks}{self.index(name)} WHERE {which}"
            for name, which in parts.items()
        )
        return f"({' UNION ALL '.join(texts)})"

    def named(self, task_ids: Sequence[str]) -> tuple[str, Sequence[Any]]:
        if len(task_ids) == 1:
            key = key_of(task_ids[0])
            if key is None:
                return "seq & 1 AND id = ?", task_ids
            return "seq = ? AND id = ?", (key, task_ids[0])
        keys = [key for task_id in task_ids if (key := key_of(task_id)) is not None]
        text = among("id", len(task_ids))
        if not keys:
            return f"seq & 1 AND {text}", task_ids
        keyed = f"{among('seq', len(keys))} AND {text}"
        if len(keys) == len(task_ids):
            return keyed, [*keys, *task_ids]
        return f"({keyed} OR seq & 1 AND {text})", [*keys, *task_ids, *task_ids]

    def elsewhere(self, task_ids: Sequence[str]) -> tuple[str, Sequence[Any]] | None:
        keyed = [task_id for task_id in task_ids if key_of(task_id) is not None]
        return (f"seq & 1 AND {among('id', len(keyed))}", keyed) if keyed else None

    def prefixed(self, prefix: str) -> tuple[str, Sequence[Any]]:
        texts = prefix, prefix + LAST
        other = f"SELECT seq FROM {self.tasks}{self.index('named')} WHERE seq & 1 AND id >= ? AND id < ?"
        digits = prefix.replace("-", "")[:12]
        try:
            first, last = (int(digits.ljust(12, digit), 16) for digit in "0f")
        except ValueError:
            return f"seq IN ({other})", texts
        keyed = f"SELECT seq FROM {self.tasks} WHERE seq BETWEEN ? AND ? AND id >= ? AND id < ?"
        keys = key_at(first), key_at(last + 1)
        return f"seq IN ({keyed} UNION ALL {other})", (*keys, *texts, *texts)

    def created(self, sign: str, moment: int) -> tuple[str, Sequence[Any]]:
        # The key of a task may be a little later than its time.
        key = key_at(moment) if sign == ">=" else key_at(moment + KEPT_ORDER + 1)
        if sign == "<=" and key in _ENDS:
            return "created_at <= ?", (moment,)
        return f"created_at {sign} ? AND seq {sign} ?", (moment, key)

    def place_at(self, moment: int) -> tuple[int, int]:
        return moment, key_at(moment + KEPT_ORDER + 1)

    def index(self, name: str) -> str:
        if name in ("id", "created"):  # the order of the rows themselves
            return " NOT INDEXED" if name == "created" else ""
        return f" INDEXED BY {self.tasks}_{name}"

    def of_status(self, status: str) -> str:
        return f"status = '{status}'"


@lru_cache(maxsize=16)
def statements(prefix: str = "") -> Statements:
    """Return the statements for tables with a prefix."""
    return Statements(OwnSQLite(prefix))
