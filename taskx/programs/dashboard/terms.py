"""Terms of filter lines, for links to lists of tasks."""

from __future__ import annotations

import re
from collections.abc import Collection
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


def words_of(line: str) -> list[str]:
    """Return the terms of a filter line as they are written."""
    return [word[0] for word in re.finditer(r'(?:"(?:[^"\\]|\\.)*"|[^\s"])+', line)]


def without(line: str, fields: Collection[str]) -> str:
    """Return a filter line without its terms of some fields."""
    return " ".join(word for word in words_of(line) if word.partition(":")[0] not in fields)
