"""Blocks of transactions for the tests, and looks from outside of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from django.db import connections, transaction

from taskx import Queue

LONG = 60
T = TypeVar("T")


class _Undo(Exception):
    pass


@contextmanager
def rolled_back(using: str) -> Iterator[None]:
    """Run the block inside ``atomic()``, and roll it back by an error at its end."""
    with suppress(_Undo), transaction.atomic(using=using):
        yield
        raise _Undo


def elsewhere(call: Callable[[], T]) -> T:
    """Return what a call returns on a thread of its own, which is in no block."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(call())
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LONG)
    return results[0]


def ids(queue: Queue) -> set[str]:
    """Return the ids of all tasks that the calling thread sees."""
    return {task.id for task in queue.list_tasks()[0]}
