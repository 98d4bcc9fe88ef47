"""Actions on all tasks that match: within the request, or after it on a thread if they are many."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from django.db import connections, transaction

from taskx.contrib.django.admin.finding import MOST
from taskx.contrib.django.blocks import commit_implicit
from taskx.contrib.django.surroundings import surroundings
from taskx.queue.queue import Queue
from taskx.tasks.errors import RepositoryError

#: Most tasks that an action changes within its request.
AT_ONCE = 1_000

#: A method of the queue that changes tasks, and returns how many it has changed.
Change = Callable[[Sequence[str]], int]

_log = logging.getLogger("taskx")


def pages(rows: Any) -> Iterator[list[str]]:
    """Yield the ids of the tasks that match, some at a time, the newest first."""
    rows = rows.order_by("-pk")
    below = rows
    while found := [*below.values_list("pk", "task_id")[:AT_ONCE]]:
        yield [task_id for _, task_id in found]
        below = rows.filter(pk__lt=found[-1][0])


def how_many(rows: Any) -> str:
    """Return the number of rows in words; those of a large table are not counted."""
    number: int = rows.order_by()[: MOST + 1].count()
    return f"more than {MOST:,}" if number > MOST else f"{number:,}"


def begin(queue: Queue, name: str, rows: Any, change: Change, by: str) -> None:
    """Change all tasks that match on a thread, which begins after the transaction of the request.

    The log and the log of changes say how many were changed. The thread does not keep the process alive.

    Args:
        name: the name of the action, such as ``"cancel"``.
        rows: the rows of the tasks.
        change: changes some of them.
        by: the user's name.
    """
    work = partial(_work_through, queue, name, rows, change, by)
    thread = threading.Thread(target=work, name=f"taskx-admin-{name}", daemon=True)
    if connections[rows.db].in_atomic_block:
        transaction.on_commit(thread.start, using=rows.db)
    else:
        thread.start()


def _work_through(queue: Queue, name: str, rows: Any, change: Change, by: str) -> None:
    matched = changed = 0
    try:
        with surroundings():
            for ids in pages(rows):
                changed += change(ids)
                matched += len(ids)
                commit_implicit()
        _log.info("admin: %s by %s is done: %d of %d tasks changed", name, by, changed, matched)
    except Exception:  # noqa: BLE001  (nobody else would be told)
        _log.exception(
            "admin: %s by %s has stopped after %d tasks; take the action again to go on",
            name,
            by,
            matched,
        )
    finally:
        try:
            queue.note_change(by, name, f"{matched} in the admin", {"changed": changed})
            commit_implicit()
        except RepositoryError as error:
            _log.warning("admin: %s by %s is not in the log of changes: %s", name, by, error)
        connections.close_all()
