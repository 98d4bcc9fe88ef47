"""The indexes of the tasks. Those that running looks at hold unfinished tasks only."""

from __future__ import annotations

from functools import partial
from typing import Any

from pymongo import ASCENDING, IndexModel
from pymongo.errors import OperationFailure

from taskx.core.record import FOR_TURN, UNIQUE, UNTIL_DUE
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.filters import BEST_FIRST, NEWEST_FIRST

_THERE_UNDER_ANOTHER_NAME = 85


def make_indexes(connection: Connection) -> None:
    """Make those that are not there.

    Raises:
        RepositoryError: the server cannot be reached, or refuses.
    """
    there = connection.run(connection.tasks.index_information)
    for index in _indexes():
        name, keys = index.document["name"], _keys(index)
        if name not in there or list(there[name]["key"]) != keys:
            connection.run(partial(_make, connection, index))


def _keys(index: IndexModel) -> list[tuple[str, int]]:
    return list(index.document["key"].items())


def _make(connection: Connection, index: IndexModel) -> None:
    options = dict(index.document)
    keys = _keys(index)
    del options["key"]
    if options.get("unique") and not connection.is_real:
        options["sparse"] = True  # a mock forgets the filter for what is there already
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
            [("taskx.concurrency_key", ASCENDING), ("taskx.seq", ASCENDING)],
            name="taskx_in_line",
            partialFilterExpression={"status": "pending", "taskx.held": FOR_TURN},
        ),
        *(
            _of_those_with(name)
            for name in ("owner", "batch", "depends_on", "waiting_on", "stuck_on")
        ),
        *(_of_those_with(name, unique=True) for name in UNIQUE),
    ]


def _of_those_with(name: str, **options: Any) -> IndexModel:
    """Of documents where this is a text that is not empty."""
    path = f"taskx.{name}"
    return IndexModel(
        [(path, ASCENDING)],
        name=f"taskx_{name}",
        partialFilterExpression={path: {"$gt": ""}},
        **options,
    )
