"""Terms of filter lines, for links to lists of tasks."""

from __future__ import annotations

from typing import Any

from taskx.insight.query import query_of
from taskx.tasks.model import TaskFilter

# The fields of a TaskFilter that have another name in a filter line.
_FIELDS = {"by": "created_by", "id": "id_prefix"}


def term(name: str, value: str) -> str:
    """Return a term such as ``type:email``, with quotes around a value that needs them."""
    if name in ("newer", "older"):
        return f"{name}:{value}"
    fields: dict[str, Any] = {_FIELDS.get(name, name): value}
    return query_of(TaskFilter(**fields))
