"""Fields whose text every database compares and sorts by its characters."""

from __future__ import annotations

from typing import Any

from django.db import models

# The collation by which each database compares characters, not letters.
_BINARY = {"postgresql": "C", "mysql": "utf8mb4_bin", "sqlite": "BINARY"}


def _with_collation(parameters: dict[str, Any], vendor: str) -> dict[str, Any]:
    return {**parameters, "collation": _BINARY.get(vendor)}


class NameField(models.CharField):
    """A short text, such as an id. Upper and lower case are different, and the order is that of Unicode.

    TaskX reads spans of names in their order, and the order must be the same in Python and in SQL.
    """

    def db_parameters(self, connection: Any) -> dict[str, Any]:
        return _with_collation(super().db_parameters(connection), connection.vendor)


class LongField(models.TextField):
    """A long text, compared like a :class:`NameField`."""

    def db_parameters(self, connection: Any) -> dict[str, Any]:
        return _with_collation(super().db_parameters(connection), connection.vendor)
