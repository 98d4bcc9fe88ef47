"""The statements, built once for each dialect and each shape of a filter or of a write.

They have ``?`` for their values. A partial index is used only if its own conditions are repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from taskx.stores.base import Listed, Lookup, Timed
from taskx.stores.sql.dialects import Dialect, among
from taskx.tasks.clock import to_ms
from taskx.tasks.conditions import Scalar
from taskx.tasks.lifecycle import PENDING, RUNNING
from taskx.tasks.model import TASK_FIELDS, TaskFilter, TaskStatus
from taskx.tasks.record import COLUMNS, DEFAULTS, FOR_PARENTS, FOR_TURN, FREE, UNIQUE, UNTIL_DUE
from taskx.tasks.tags import FLOW
from taskx.tasks.writes import PRESENT

#: A statement and its values.
Query = tuple[str, Sequence[Any]]
#: A column, or ``tag``, and the value by which an index finds tasks; ANYWHERE for another index. The tasks
#: that a type finds must be sorted, the others are in the order of lists.
By = tuple[str, str]
ANYWHERE: By = ("", "")

_READY = f"status = '{PENDING}' AND held = {FREE}"
_RUNNING = f"status = '{RUNNING}'"
_WAITING = f"waiting_on IS NOT NULL AND status = '{PENDING}' AND held = {FOR_PARENTS}"
_IN_LINE = f"status = '{PENDING}' AND held = {FOR_TURN}"
_OWNED = "owner <> '' AND "
_LOWER = str.maketrans({n: n + 32 for n in range(ord("A"), ord("Z") + 1)})
# Tasks that meet a condition which are counted to find the fewest.
_MANY = 20_000
#: Tasks up to which sorting takes no time.
FEW = 5_000


class Statements:
    """The statements in one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = d = dialect
        self.find_by = lru_cache(maxsize=256)(self._find_by)
        self.ready = lru_cache(maxsize=64)(self._ready)
        self.insert = lru_cache(maxsize=64)(self._insert)
        self._shapes: dict[tuple[Any, ...], str] = {}
        stuck = d.stuck
        #: For each lookup column: the conditions of its rows, its own name, and the order.
        self._lookups: dict[Lookup, tuple[str, str, str]] = {
            "id": ("", "id", ""),
            "unique_lock": ("", "unique_lock", ""),
            "turn": ("", "turn", ""),
            "waiting_on": (f"{_WAITING} AND ", "waiting_on", ""),
            "parent": ("", "parent", ""),
            "line": (f"{_IN_LINE} AND ", "concurrency_key", " ORDER BY seq"),
            "running_on": (f"{_RUNNING} AND {_OWNED}", "owner", ""),
            "buffered_on": (f"{_READY} AND {_OWNED}", "owner", ""),
            "stuck_on": (f"{stuck} AND ", "stuck_on", ""),
        }
        #: For each column, the query for the value that comes after a given one, without that.
        self.steps: dict[Listed, str] = {
            "waiting_on": self._least("waiting_on", _WAITING, d.index("waiting")),
            "line": self._least("concurrency_key", _IN_LINE),
            "running_on": self._least("owner", _RUNNING),
            "buffered_on": self._least("owner", _READY),
            "stuck_on": self._least("stuck_on", stuck),
            "ready_type": self._least("type", f"{_READY} AND owner = ?"),
        }
        #: The query for the last label of a flow before a given one, without that.
        self.last_flow = f"SELECT max(tag) FROM {d.tags} WHERE tag > '{FLOW}' AND tag < "
        of_type = f"FROM {d.tasks} WHERE {_READY} AND owner = ? AND type = ?"
        #: The query for the greatest priority below a given one of ready tasks of an owner and a type.
        self.lower_priority = f"SELECT max(priority) {of_type} AND priority < "
        self._ready_of_type = (
            f"SELECT {', '.join((d.stub, *d.plain, d.columns(('seq',))))} {of_type}"
        )
        self.ready_at = f"{self._ready_of_type} AND priority = ? ORDER BY seq LIMIT ?"
        # The order is that of the index, so that it is used.
        few = f"SELECT 1 {of_type} ORDER BY priority DESC, seq LIMIT ?"
        self.count_ready = f"SELECT count(*) FROM ({few}) AS few"
        due = f"status = '{PENDING}' AND held > {FREE} AND held = {UNTIL_DUE}"
        expiring = f"expires_at IS NOT NULL AND status = '{PENDING}'"
        self.due: dict[Timed, str] = {
            "run_at": self._due("run_at", due),
            "expires_at": self._due("expires_at", expiring),
        }
        self.ready_types = self._ready_types()
        notes = f"SELECT {d.columns(('name', 'text', 'version'))} FROM {d.notes} WHERE "
        self.notes = f"{notes}name >= ? AND name < ?"
        self.notes_after = f"{notes}name > ? AND name < ? ORDER BY name LIMIT ?"
        self._named_notes = notes
        self.has_note = f"SELECT 1 FROM {d.notes} WHERE name = ?"
        self.new_note = f"INSERT INTO {d.notes} (name, text, version) VALUES (?, ?, ?)"
        self.new_note += d.unless_taken
        this = "WHERE name = ? AND version = ?"
        self.changed_note = f"UPDATE {d.notes} SET text = ?, version = version + 1 {this}"
        self.gone_note = f"DELETE FROM {d.notes} {this}"
        self.new_parent = f"INSERT INTO {d.parents} (parent, child) VALUES (?, ?){d.unless_taken}"
        self.gone_parents = f"DELETE FROM {d.parents} WHERE child = ?"
        self.gone_tags = f"DELETE FROM {d.tags} WHERE task = ?"
        self.gone_task = f"DELETE FROM {d.tasks} WHERE seq = ?"
        self._row = d.columns((*TASK_FIELDS, "seq"))
        known = d.tag_columns
        others = ", ".join(f"{d.tasks}.{name}" for name in COLUMNS if name not in known.values())
        own = (f"{d.tags}.{column} AS {name}" for column, name in known.items())
        tag = f"{d.tags}.tag, {', '.join(own)} FROM {d.tags}"
        # The tasks of a tag, in the order of the table of tags; and what that table knows of them.
        joined = f"{d.join} {d.tasks} ON {d.tasks}.seq = {d.tags}.task"
        self._tagged = f"(SELECT {others}, {tag} {joined}) AS found"
        self._tags = f"(SELECT {tag}) AS found"
        same = " AND ".join(f"{column} = {name}" for column, name in known.items())
        self._has_tag = f"EXISTS (SELECT 1 FROM {d.tags} WHERE tag = ? AND {same})"
        # The conditions of a filter that the table of tags decides.
        dates = {"start_date", "end_date"} if "created_at" in known.values() else set()
        self._of_tags = frozenset({"tag", "flow"} | dates)

    # --- finding

    def find(
        self, column: Lookup, values: Sequence[str], fields: tuple[str, ...], limited: bool
    ) -> Query:
        """Select fields of the rows that have one of these values in a lookup column."""
        if column == "id":
            which, values = self.dialect.named(values)
        else:
            which = among(self._lookups[column][1], len(values))
        return self.find_by(column, which, fields, limited), values

    def find_elsewhere(self, task_ids: Sequence[str], fields: tuple[str, ...]) -> Query | None:
        """Select fields of tasks by their ids where few tasks are; None if there is no such place."""
        if (place := self.dialect.elsewhere(task_ids)) is None:
            return None
        which, values = place
        return self.find_by("id", which, fields, False), values

    def _find_by(self, column: Lookup, which: str, fields: tuple[str, ...], limited: bool) -> str:
        d = self.dialect
        more, _, order = self._lookups[column]
        table = d.tasks + (d.index("waiting") if column == "waiting_on" else "")
        if column == "parent":
            table = f"(SELECT parent, child AS id FROM {d.parents}) AS pairs"
            if d.child != "id":
                joined = f"{d.join} {d.tasks} ON {d.tasks}.{d.child} = child"
                table = f"(SELECT parent, id FROM {d.parents} {joined}) AS pairs"
        limit = " LIMIT ?" if limited else ""
        return f"SELECT {d.columns(fields)} FROM {table} WHERE {more}{which}{order}{limit}"

    # --- one step in an index for each value

    def _least(self, name: str, which: str, index: str = "") -> str:
        return f"SELECT min({name}) FROM {self.dialect.tasks}{index} WHERE {which} AND {name} > "

    @staticmethod
    def walk(step: str) -> str:
        """Take a step after a given value, and further ones, up to a limit."""
        return f"WITH RECURSIVE {_each(f'{step}?', f'{step}steps.value')}"

    def _ready_types(self) -> str:
        """Select the types after a given one of tasks that may start.

        The first column of the index is the owner, so this takes a step for each type of each owner.
        """
        tasks = self.dialect.tasks
        least = (
            f"SELECT min(kind) FROM (SELECT (SELECT min(type) FROM {tasks} WHERE {_READY} "
            f"AND {tasks}.owner = owners.owner AND type > {{}}) AS kind FROM owners) AS kinds"
        )
        return (
            f"WITH RECURSIVE owners (owner) AS (SELECT min(owner) FROM {tasks} WHERE {_READY} UNION "
            f"ALL SELECT (SELECT min(owner) FROM {tasks} WHERE {_READY} AND owner > owners.owner) "
            "FROM owners WHERE owners.owner IS NOT NULL), "
            f"{_each(least.format('?'), least.format('steps.value'))}"
        )

    # --- what may start, what waits for a time, and what has ended

    def _ready(self, types: int, later: bool = False) -> str:
        """Select the best tasks of each of several types, in one query; ``later`` ones from a number on."""
        # The order names all columns after the type, so that the index is read in its order.
        since = " AND seq >= ?" if later else ""
        one = f"{self._ready_of_type}{since} ORDER BY priority DESC, seq LIMIT ?"
        if types == 1:
            return one
        return " UNION ALL ".join(f"SELECT * FROM ({one}) AS of_type_{n}" for n in range(types))

    def _due(self, column: str, which: str) -> str:
        d = self.dialect
        return (
            f"SELECT {d.columns(('id', column))} FROM {d.tasks} WHERE {which} AND {column} <= ? "
            f"ORDER BY {column} LIMIT ?"
        )

    def ended(self, status: str) -> str:
        """Select tasks of a status that ended before a moment, and follow a place.

        The index of the status is by ``created_at``: a task was created before it ended. MySQL uses it only
        for the first comparison with the place.
        """
        d = self.dialect
        more = d.columns(("depends_on", "unique_lock", "unique_scope", "created_at", "seq"))
        return (
            f"SELECT {d.stub}, {more} FROM {d.tasks}{d.index(status)} WHERE status = '{status}' "
            f"AND {d.all_following[0]} AND completed_at < ? AND stuck_on = '' {d.newest_first} LIMIT ?"
        )

    def newest(self, status: str, fields: tuple[str, ...]) -> str:
        """Select fields of the newest tasks of a finished status."""
        d = self.dialect
        return (
            f"SELECT {d.columns(fields)} FROM {d.tasks}{d.index(status)} WHERE status = '{status}' "
            f"{d.newest_first} LIMIT ?"
        )

    def notes_named(self, count: int) -> str:
        """Select notes by their names."""
        return f"{self._named_notes}{among('name', count)}"

    # --- lists and counts

    def list_tasks(
        self,
        filter: TaskFilter,
        after: str = "",
        place: Sequence[Any] = (),
        by: By = ANYWHERE,
        *,
        in_order: bool = False,
    ) -> Query:
        """Return the query for the tasks that match a filter, each with its ``seq``, and its values.

        ``after`` is a further condition, and ``place`` has its values. ``by`` names the tasks that are
        read, or ANYWHERE to use another index. ``in_order`` says that so many tasks are pending that
        all tasks are better read from the newest on than the pending ones sorted.
        """
        in_order = in_order or (bool(after) and not self.dialect.has_spans)
        source, values = self._meeting(filter, after, place, by, in_order=in_order)
        order = self.dialect.newest_first
        page = f"{source} {order} LIMIT ? OFFSET ?"
        pending = filter.status == PENDING and (not in_order or bool(filter.labels))
        sorts = by[0] == "type" or (by is ANYWHERE and (pending or _by_id(filter)))
        if sorts and self.dialect.sorts_numbers:
            # Sorting many of them without the other columns takes half the time.
            page = f"{self.dialect.tasks} WHERE seq IN (SELECT seq FROM {page}) {order}"
        limit = int(filter.limit)  # MySQL's drivers write numbers of another class as texts
        return f"SELECT {self._row} FROM {page}", [*values, limit, filter.offset]

    def count_tasks(self, filter: TaskFilter, most: int | None = None, by: By = ANYWHERE) -> Query:
        """Return the query for the number of tasks that match a filter, at most ``most``."""
        source, values = self._meeting(filter, by=by, counts=True)
        if most is None:
            return f"SELECT count(*) FROM {source}", values
        # With an order the index of the status is used. Otherwise the planner may read the table from its
        # beginning, where the oldest tasks are, which have ended.
        free = filter.status is None or by is not ANYWHERE or self.dialect.has_spans
        order = "" if free else f" {self.dialect.newest_first}"
        return f"SELECT count(*) FROM (SELECT 1 FROM {source}{order} LIMIT ?) AS few", [
            *values,
            most,
        ]

    def count_by_status(self, filter: TaskFilter, most: int, by: By = ANYWHERE) -> Query:
        """Return the query for the number of tasks of each status among ``most`` that match a filter."""
        source, values = self._meeting(filter, by=by)
        some = f"SELECT status FROM {source} LIMIT ?"
        status = self.dialect.columns(("status",))
        return f"SELECT {status}, count(*) FROM ({some}) AS few GROUP BY status", [*values, most]

    def indexed(self, filter: TaskFilter) -> list[By]:
        """Return the conditions of a filter whose tasks an index has in the order of lists."""
        tags = [("tag", label) for label in filter.labels]
        others = [(name, getattr(filter, name) or "") for name in self.dialect.in_order]
        return tags + [(name, value) for name, value in others if value]

    def fewest(self, filter: TaskFilter, some: Sequence[By]) -> Query:
        """Return the query for how many tasks meet each of some conditions of a filter, up to a bound.

        If the index of its status can be named, their number is the last one.
        """
        sources, values = [self._by(name) for name, _ in some], [value for _, value in some]
        if filter.status is not None and self.dialect.has_spans:
            source, more = self._meeting(TaskFilter(status=filter.status, type=filter.type))
            sources.append(source)
            values += more
        return _up_to(_MANY, sources), values

    def of_type(self, type: str) -> Query:
        """Return the query for how many tasks of a type are pending, and how many tasks are not pending.

        Both are counted up to a bound.
        """
        pending, values = self._meeting(TaskFilter(status=TaskStatus(PENDING), type=type))
        others = (f"SELECT * FROM {self.dialect.span(s)}" for s in TaskStatus if s != PENDING)
        return _up_to(FEW, [pending, f"({' UNION ALL '.join(others)})"]), values

    def _by(self, name: str) -> str:
        d = self.dialect
        if name == "tag":
            return f"{d.tags} WHERE tag = ?"
        return f"{d.tasks}{d.index(name)} WHERE {name} <> '' AND {name} = ?"

    def _meeting(
        self,
        filter: TaskFilter,
        after: str = "",
        place: Sequence[Any] = (),
        by: By = ANYWHERE,
        *,
        counts: bool = False,
        in_order: bool = False,
    ) -> tuple[str, list[Any]]:
        d = self.dialect
        conditions = [after] if after else []
        values = [*place]
        status = None if filter.status is None else filter.status.value
        name, wanted = by
        if name == "tag":
            source = self._tags if counts and filter.given <= self._of_tags else self._tagged
            conditions.append("tag = ?")
            values.append(wanted)
        elif name == "type":
            each = (f"SELECT * FROM {d.span(status, typed=True)}" for status in TaskStatus)
            source = f"({' UNION ALL '.join(each)})"
        elif name:
            source = d.tasks + d.index(name)
            conditions.append(f"{name} <> ''")
        elif _by_id(filter):
            source = d.tasks + d.index("id")
        elif in_order and status == PENDING and not filter.labels:
            source = d.tasks + d.index("created")
        elif status is not None and d.has_spans:
            few = counts and filter.given <= {"status", "type"}
            columns = "seq, type" if few else "*"  # so few that the index alone is read
            source, status = d.span(status, columns, typed=filter.type is not None), None
        else:
            source = d.tasks
        if status is not None:
            conditions.append(d.of_status(status))
        if filter.id_prefix:
            condition, more = d.prefixed(filter.id_prefix)
            conditions.append(condition)
            values += more
        if filter.parent is not None:
            conditions.append(f"{d.child} IN (SELECT child FROM {d.parents} WHERE parent = ?)")
            values.append(filter.parent)
        for label in filter.labels:
            if by != ("tag", label):
                conditions.append(self._has_tag)
                values.append(label)
        for name in ("type", "created_by", "error_type"):
            if (text := getattr(filter, name)) is not None:
                conditions.append(f"{name} = ?")
                values.append(text)
        for sign, moment in (">=", filter.start_date), ("<=", filter.end_date):
            if moment is not None:
                condition, more = d.created(sign, to_ms(moment))
                conditions.append(condition)
                values += more
        if filter.error is not None:
            conditions.append(d.error_contains)
            values.append(filter.error.translate(_LOWER))
        for path, value in filter.params or ():
            condition, more = _has(value, path)
            conditions.append(condition)
            values += more
        return source + (f" WHERE {' AND '.join(conditions)}" if conditions else ""), values

    # --- writes

    def _insert(self, given: tuple[str, ...]) -> str:
        """Return an ``INSERT`` of these columns that does nothing if a unique value is taken."""
        d = self.dialect
        rest = () if d.has_defaults else [name for name in COLUMNS if name not in given]
        values = (*("?" * len(given)), *(literal(DEFAULTS[name]) for name in rest))
        columns = ", ".join((*given, *rest))
        return f"INSERT INTO {d.tasks} ({columns}) VALUES ({', '.join(values)}){d.unless_taken}"

    def update(
        self,
        task_ids: Sequence[str],
        guard: Mapping[str, Any],
        changes: Mapping[str, Any],
        *,
        passes: bool = False,
        place: Query | None = None,
    ) -> Query:
        """Return an ``UPDATE`` of one or several tasks, and its values.

        With ``passes`` it passes over rows that another transaction has locked, on PostgreSQL. ``place`` is
        the condition for the tasks, and its values, if it is not that of their ids.
        """
        which, keys = place or self.dialect.named(task_ids)
        shape = (which, *changes, None, *guard)
        sql = self._shapes.get(shape)
        if sql is None or passes or has_special(guard):
            where, wanted = self.conditions(guard)
            sql = self._update(which + where, where, changes, passes)
            if not (passes or has_special(guard)):
                self._shapes[shape] = sql
            return sql, [*changes.values(), *keys, *wanted, *(wanted if passes else ())]
        return sql, [*changes.values(), *keys, *guard.values()]

    def _update(self, which: str, where: str, changes: Mapping[str, Any], passes: bool) -> str:
        d = self.dialect
        verb = d.update_unique if any(name in changes for name in UNIQUE) else "UPDATE"
        settings = ", ".join(f"{name} = ?" for name in changes)
        if passes:
            found = f"SELECT seq FROM {d.tasks} WHERE {which} FOR NO KEY UPDATE SKIP LOCKED"
            which = f"seq = ({found}){where}"
        return f"{verb} {d.tasks} SET {settings} WHERE {which}"

    def delete(self, task_id: str, guard: Mapping[str, Any], place: Query | None = None) -> Query:
        """Return a ``DELETE`` and its values; ``place`` is as in :meth:`update`."""
        return self._of_task(f"DELETE FROM {self.dialect.tasks}", task_id, guard, place)

    def lock(self, task_id: str, guard: Mapping[str, Any]) -> Query:
        """Return a ``SELECT`` that locks a task: its number, its id, its parents and its tags."""
        d = self.dialect
        sql, values = self._of_task(
            f"SELECT seq, id, depends_on, tags FROM {d.tasks}", task_id, guard
        )
        return f"{sql}{d.locks}", values

    def untag(self, task_id: str) -> Query:
        """Return the statement that removes the tags of a task from their table."""
        sql, values = self._of_task(f"SELECT seq FROM {self.dialect.tasks}", task_id, {})
        return f"DELETE FROM {self.dialect.tags} WHERE task = ({sql})", values

    def tags(self, pairs: Sequence[tuple[str, str]]) -> tuple[str, list[Sequence[Any]]]:
        """Return the statement that stores a tag of a task, and its values for each tag and id."""
        d = self.dialect
        made = [
            self._of_task(f"SELECT ?, created_at, seq FROM {d.tasks}", id_, {}) for _, id_ in pairs
        ]
        sql = f"INSERT INTO {d.tags} (tag, at, task) {made[0][0]}{d.unless_taken}"
        return sql, [(tag, *values) for (tag, _), (_, values) in zip(pairs, made, strict=True)]

    def _of_task(
        self, what: str, task_id: str, guard: Mapping[str, Any], place: Query | None = None
    ) -> Query:
        which, keys = place or self.dialect.named((task_id,))
        where, values = self.conditions(guard)
        return f"{what} WHERE {which}{where}", [*keys, *values]

    def conditions(self, guard: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """Return a guard as SQL that follows another condition, and its values."""
        text, values = "", []
        for name, wanted in guard.items():
            if wanted is PRESENT:
                text += f" AND {name} IS NOT NULL"
            elif isinstance(wanted, tuple):
                some = [value for value in wanted if value is not None]
                parts = [among(name, len(some))] if some else []
                parts += [f"{name} IS NULL"] if len(some) < len(wanted) else []
                text += f" AND ({' OR '.join(parts) or '1 = 0'})"
                values += some
            else:
                text += f" AND {name} {self.dialect.same} ?"
                values.append(wanted)
        return text, values


def _each(first: str, next_: str) -> str:
    """Select values that each follow from the one before, until there are no more."""
    return (
        f"steps (value) AS ({first} UNION ALL SELECT ({next_}) FROM steps WHERE steps.value IS NOT "
        "NULL) SELECT value FROM steps WHERE value IS NOT NULL LIMIT ?"
    )


def _up_to(most: int, sources: Iterable[str]) -> str:
    """Select how many rows some sources have, each counted up to a bound."""
    counts = (f"(SELECT count(*) FROM (SELECT 1 FROM {s} LIMIT {most}) AS few)" for s in sources)
    return f"SELECT {', '.join(counts)}"


def _by_id(filter: TaskFilter) -> bool:
    """Return True if the index of ids finds the tasks."""
    return bool(filter.id_prefix) or filter.parent is not None


def _has(value: Scalar, path: Sequence[str]) -> tuple[str, list[Any]]:
    """Return the condition that params have a value at a path, and its values.

    Its functions are SQLite's: stores in other databases do not search in params.
    """
    place = "$" + "".join(f'."{key}"' for key in path)
    if value is None or isinstance(value, bool):
        name = {None: "null", True: "true", False: "false"}[value]
        condition = f"json_type(params, ?) = '{name}'"
        values: list[Any] = [place]
    else:
        kinds = "'text'" if isinstance(value, str) else "'integer', 'real'"
        condition = f"json_extract(params, ?) = ? AND json_type(params, ?) IN ({kinds})"
        values = [place, value, place]
    # Damaged params match nothing; without the check, they would be an error.
    return f"CASE WHEN json_valid(params) THEN {condition} END", values


def has_special(guard: Mapping[str, Any]) -> bool:
    """Return True if the SQL of a guard depends on its values."""
    for value in guard.values():  # noqa: SIM110  (any() of a generator costs four times as much)
        if value is PRESENT or value.__class__ is tuple:
            return True
    return False


def literal(value: Any) -> str:
    """Return the default of a column as SQL."""
    return "NULL" if value is None else repr(value)  # defaults are numbers and short texts
