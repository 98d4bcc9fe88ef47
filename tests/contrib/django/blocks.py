"""Blocks of transactions for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from django.db import transaction


class _Undo(Exception):
    pass


@contextmanager
def rolled_back(using: str) -> Iterator[None]:
    """Run the block inside ``atomic()``, and roll it back by an error at its end."""
    with suppress(_Undo), transaction.atomic(using=using):
        yield
        raise _Undo
