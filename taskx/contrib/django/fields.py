"""Fields whose text every database compares and sorts by its characters."""

from __future__ import annotations

from typing import Any

from django.db import models

# The collation by which each database compares characters, not letters. A space at the end counts, too.
_BINARY = {"postgresql": "C", "sqlite": "BINARY"}


def _with_collation(parameters: dict[str, Any], connection: Any) -> dict[str, Any]:
    collation = _BINARY.get(connection.vendor)
    if connection.vendor == "mysql":
        collation = "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
    return {**parameters, "collation": collation}


class NameField(models.CharField):
    """A short text, such as an id. Upper and lower case are different, and the order is that of Unicode.

    TaskX reads spans of names in their order, and the order must be the same in Python and in SQL.
    """

    def db_parameters(self, connection: Any) -> dict[str, Any]:
        return _with_collation(super().db_parameters(connection), connection)


class LongField(models.TextField):
    """A long text, compared like a :class:`NameField`."""

    def db_parameters(self, connection: Any) -> dict[str, Any]:
        return _with_collation(super().db_parameters(connection), connection)
