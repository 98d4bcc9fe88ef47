"""The SQL of TaskX's own tables in SQLite, whose indexes are named in queries."""

from __future__ import annotations

from functools import lru_cache

from taskx.stores.sql import SQLite, Statements
from taskx.tasks.lifecycle import FINISHED, PENDING, RUNNING
from taskx.tasks.model import CONDITIONS
from taskx.tasks.record import FREE

FREE_PAGES = (
    "SELECT (SELECT freelist_count FROM pragma_freelist_count), "
    "(SELECT page_count FROM pragma_page_count)"
)


class OwnSQLite(SQLite):
    """The SQL of the tables that ``schema`` makes, whose names begin with a prefix."""

    conditions = CONDITIONS
    dates = (int, float, str)  # a damaged date is a text
    stuck = "stuck_on <> ''"
    has_defaults = has_triggers = sorts_numbers = True

    def __init__(self, prefix: str) -> None:
        super().__init__(*(f"{prefix}{name}" for name in ("tasks", "parents", "tagged", "notes")))
        # Listing or counting the few unfinished tasks costs nothing for the many finished ones.
        self.spans = {
            PENDING: self._span(("ready", f"held = {FREE}"), ("held", f"held > {FREE}")),
            RUNNING: self._span(("running", ""), status=RUNNING),
            **{status: self._span((status, ""), status=status) for status in FINISHED},
        }

    def _span(self, *parts: tuple[str, str], status: str = PENDING) -> str:
        texts = (
            f"SELECT * FROM {self.tasks}{self.index(name)} WHERE status = '{status}'"
            + (f" AND {held}" if held else "")
            for name, held in parts
        )
        return f"({' UNION ALL '.join(texts)})"

    def index(self, name: str) -> str:
        if name == "id":  # SQLite's own index of the unique ids
            return f" INDEXED BY sqlite_autoindex_{self.tasks}_1"
        return f" INDEXED BY {self.tasks}_{name}"

    def of_status(self, status: str) -> str:
        return f"status = '{status}'"


@lru_cache(maxsize=16)
def statements(prefix: str = "") -> Statements:
    """Return the statements for tables with a prefix."""
    return Statements(OwnSQLite(prefix))
