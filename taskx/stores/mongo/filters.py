"""Guards, filters and indexes in MongoDB's form. Values are data, so only scalars are accepted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from bson import encode, json_util
from bson.codec_options import DatetimeConversion
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.errors import OperationFailure

from taskx.stores.mongo.connection import Connection
from taskx.stores.mongo.documents import PATHS, Document, escape, fields, is_odd, plain
from taskx.tasks.clock import to_datetime, to_ms, within_calendar
from taskx.tasks.conditions import Scalar
from taskx.tasks.errors import ConfigurationError, RepositoryError, RepositoryUnavailable
from taskx.tasks.model import TaskFilter
from taskx.tasks.record import DEFAULTS, FOR_TURN, UNIQUE, UNTIL_DUE
from taskx.tasks.writes import PRESENT

#: The documents that no batch hides.
VISIBLE: Document = {"taskx.batch": None}
#: The documents that a batch hides. The index has the same condition, so the server can use it.
HIDDEN: Document = {"taskx.batch": {"$gt": ""}}

NEWEST_FIRST = [("created_at", DESCENDING), ("_id", DESCENDING)]
OLDEST_FIRST = [(name, ASCENDING) for name, _ in NEWEST_FIRST]
BEST_FIRST = [("taskx.priority", DESCENDING), ("taskx.seq", ASCENDING), ("_id", ASCENDING)]

_JSON = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
_THERE_UNDER_ANOTHER_NAME = 85


def text(value: Any, what: str) -> str:
    """Return a str, or raise ``ConfigurationError``: a dict would be an operator in a query."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} must be a str, not {type(value).__name__}")
    return value


def texts(values: Iterable[Any], what: str) -> list[str]:
    """Check each value as :func:`text` does."""
    return [text(value, what) for value in values]


def guarded(task_id: str, guard: Mapping[str, Any]) -> Document:
    """Return the filter that finds a document if its guard holds."""
    found: Document = {"_id": text(task_id, "id"), **VISIBLE}
    for name, wanted in guard.items():
        found.update(_condition(name, wanted))
    return found


def _condition(name: str, wanted: Any) -> Document:
    path = PATHS[name]
    if wanted is PRESENT:
        return {path: {"$nin": [None]}}
    if isinstance(wanted, tuple):
        return {path: {"$in": [_scalar(name, value) for value in wanted]}}
    if name in ("params", "result", "duration") and wanted is not None:
        return fields({name: wanted})
    value = _scalar(name, wanted)
    # Documents of the original lack our fields, and an absent field means its default. `held` is the
    # exception: a start requires it to be stored, so tasks that were never adopted do not start.
    if value is not None and name not in ("held", "status") and value == DEFAULTS.get(name):
        return {path: {"$in": [value, None]}}
    return {path: value}


def _scalar(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, (str, int, float)):
        raise ConfigurationError(f"{name} cannot be {type(value).__name__}")
    return plain(name, value)


def matching(filter: TaskFilter) -> Document:
    """Return the query for the tasks that match a filter, including hidden ones."""
    wanted: Document = {}
    if filter.type is not None:
        wanted["type"] = filter.type
    if filter.status is not None:
        wanted["status"] = filter.status.value
    if filter.created_by is not None:
        wanted["created_by"] = filter.created_by
    dates = {}
    if filter.start_date is not None:
        dates["$gte"] = _whole_ms(filter.start_date)
    if filter.end_date is not None:
        dates["$lte"] = _whole_ms(filter.end_date)
    if dates:
        wanted["created_at"] = dates
    if filter.error is not None:
        wanted["error"] = {"$regex": _containing(filter.error)}
    if filter.error_type is not None:
        wanted.update(_condition("error_type", filter.error_type))
    if filter.id_prefix is not None:
        wanted["_id"] = {"$regex": f"^{re.escape(filter.id_prefix)}"}
    if filter.parent is not None:
        wanted["taskx.depends_on"] = filter.parent
    if filter.tag is not None:
        wanted["taskx.tags"] = {"$all": [*filter.tag]}
    if filter.flow is not None:
        wanted["taskx.flow"] = filter.flow
    if filter.params is not None:
        wanted["$and"] = [_has(path, value) for path, value in filter.params]
    return wanted


def _containing(part: str) -> str:
    """Return the regular expression of a text, whatever the case of the letters A to Z."""
    return "".join(
        f"[{c.lower()}{c.upper()}]" if c.isascii() and c.isalpha() else re.escape(c) for c in part
    )


def _has(path: Sequence[str], value: Scalar) -> Document:
    """Return the condition that params have a value at a path."""
    escaped = [*map(escape, path)]
    if escaped == [*path]:
        return _at(path, value)
    in_escaped = {"taskx.params_as": "escaped", **_at(escaped, value)}
    if any(is_odd(key) for key in path):
        return in_escaped
    return {"$or": [in_escaped, {"taskx.params_as": {"$ne": "escaped"}, **_at(path, value)}]}


def _at(path: Sequence[str], value: Scalar) -> Document:
    places = [".".join(("params", *path[:length])) for length in range(1, len(path) + 1)]
    # The server looks into lists, too, and a mock takes True for 1.
    others: list[Document] = [{place: {"$type": "array"}} for place in places]
    if value is None:
        equal: Document = {"$in": [None], "$exists": True}
    elif isinstance(value, bool):
        equal = {"$eq": value, "$type": "bool"}
    else:
        equal = {"$eq": value}
        others.append({places[-1]: {"$type": "bool"}})
    return {places[-1]: equal, "$nor": others}


# A place in a list is ``created_at`` and ``_id`` of a document, as JSON text: both may have any type.


def place_of(document: Mapping[str, Any]) -> str:
    """Return the place of a document in the list."""
    return json_util.dumps([document.get("created_at"), document["_id"]], json_options=_JSON)


def _place(after: Any) -> tuple[Any, Any]:
    try:
        created_at, task_id = json_util.loads(after, json_options=_JSON)
        if isinstance(created_at, (dict, list)) or isinstance(task_id, (dict, list)):
            raise ValueError("not two plain values")
        encode({"place": [created_at, task_id]})
    except Exception as error:
        raise ConfigurationError(
            f"after is not a place in a list of this repository: {after!r:.100}"
        ) from error
    return created_at, task_id


def following(wanted: Document, after: Any) -> list[Document]:
    """Return the queries for the documents that follow a place in the list of a query, in order.

    They are several, because an index finds the documents of each one at once.
    """
    if after is None:
        return [wanted]
    created_at, task_id = _place(after)
    prefix = wanted.get("_id", {})
    same = {**wanted, "created_at": created_at, "_id": {**prefix, "$lt": task_id}}
    if created_at is None:
        return [same]
    dates = wanted.get("created_at", {})
    others = [] if dates else _NO_DATES[_types_passed(created_at) :]
    rest = [{**dates, "$lt": created_at}, *others]
    return [same, *({**wanted, "created_at": condition} for condition in rest)]


# What another program may store as ``created_at`` instead of a date, in the order of a list: a text, a
# number, nothing. A condition compares values of one type only.
_NO_DATES = ({"$gte": ""}, {"$gte": float("-inf")}, None)


def _types_passed(created_at: Any) -> int:
    if isinstance(created_at, str):
        return 1
    return 2 if isinstance(created_at, (int, float)) else 0


def _whole_ms(moment: datetime) -> datetime:
    return to_datetime(within_calendar(to_ms(moment)))


#: Pending tasks that the original stored and no node has adopted. A document whose id is not text is
#: not a task.
FOREIGN: Document = {
    "status": "pending",
    "taskx.owner": None,
    "_id": {"$type": "string"},
    **VISIBLE,
}


def held(why: int, **more: Any) -> Document:
    """Return the query for the pending tasks with this value of ``held``, and more of our fields."""
    wanted = {f"taskx.{name}": condition for name, condition in more.items()}
    return {"status": "pending", "taskx.held": why, **wanted, **VISIBLE}


#: The condition on ``expires_at`` for the tasks that can expire. The index has the same one.
EXPIRES: Document = {"$gt": to_datetime(0)}


# --- indexes


def make_indexes(connection: Connection) -> None:
    """Make the indexes that are missing. The indexes used to run tasks hold only unfinished tasks."""
    there = connection.run(connection.tasks.index_information)
    missing = [
        index
        for index in _indexes()
        if (found := there.get(index.document["name"])) is None or [*found["key"]] != _keys(index)
    ]
    if len(missing) > 1 and connection.is_real:
        # All together, so that the server reads the tasks only once; the time-out is the sum of theirs.
        try:
            patience = len(missing) * connection.timeout
            connection.run(lambda: connection.tasks.create_indexes(missing), patience)
            return
        except RepositoryUnavailable:
            raise
        except RepositoryError:
            pass  # one by one below: an index that exists under another name does not stop the others
    for index in missing:
        connection.run(partial(_make, connection, index))


def _keys(index: IndexModel) -> list[tuple[str, int]]:
    return list(index.document["key"].items())


def _make(connection: Connection, index: IndexModel) -> None:
    options = dict(index.document)
    keys = _keys(index)
    del options["key"]
    if options.get("unique") and not connection.is_real:
        options["sparse"] = (
            True  # a mock ignores the partial filter for documents that exist already
        )
    try:
        connection.tasks.create_index(keys, **options)
    except OperationFailure as error:
        if error.code != _THERE_UNDER_ANOTHER_NAME:
            raise


def _indexes() -> list[IndexModel]:
    return [
        IndexModel(NEWEST_FIRST, name="taskx_newest"),
        *(
            IndexModel([(name, ASCENDING), *NEWEST_FIRST], name=f"taskx_{name}")
            for name in ("status", "type", "created_by")
        ),
        IndexModel(
            [
                *((name, ASCENDING) for name in ("type", "taskx.owner", "taskx.held")),
                *BEST_FIRST,
            ],
            name="taskx_ready",
            partialFilterExpression={"status": "pending"},
        ),
        IndexModel(
            [("taskx.run_at", ASCENDING), ("_id", ASCENDING)],
            name="taskx_due",
            partialFilterExpression={"status": "pending", "taskx.held": UNTIL_DUE},
        ),
        IndexModel(
            [("taskx.expires_at", ASCENDING), ("_id", ASCENDING)],
            name="taskx_expiring",
            partialFilterExpression={"status": "pending", "taskx.expires_at": EXPIRES},
        ),
        IndexModel(
            [("taskx.concurrency_key", ASCENDING), ("taskx.seq", ASCENDING)],
            name="taskx_in_line",
            partialFilterExpression={"status": "pending", "taskx.held": FOR_TURN},
        ),
        *(
            IndexModel(
                [(f"taskx.{name}", ASCENDING), *NEWEST_FIRST],
                name=f"taskx_{name}",
                partialFilterExpression={f"taskx.{name}": {"$gt": ""}},
            )
            for name in ("tags", "flow")
        ),
        *(
            _index_of_set(name)
            for name in ("owner", "batch", "depends_on", "waiting_on", "stuck_on")
        ),
        *(_index_of_set(name, unique=True) for name in UNIQUE),
    ]


def _index_of_set(name: str, **options: Any) -> IndexModel:
    """Return an index of the documents in which this field is a text that is not empty."""
    path = f"taskx.{name}"
    return IndexModel(
        [(path, ASCENDING)],
        name=f"taskx_{name}",
        partialFilterExpression={path: {"$gt": ""}},
        **options,
    )
