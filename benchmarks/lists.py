"""``python -m benchmarks.lists``: what a list of tasks costs on a SQLite file with a million waiting tasks.

Each list is asked for in three ways: the newest tasks alone, with a total of at most 10,000, as pages show
it, and with the exact total. The times are processor times, medians of several calls.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import attrs

from taskx import Queue, SQLiteRepository, Task, TaskFilter, TaskStatus

#: The longest time, in milliseconds, of the tasks of a list, and with its exact total.
GOAL, GOAL_EXACT = 5.0, 150.0

_TYPES, _USERS, _FEW, _BATCH, _ROWS = 20, 100, 30, 1000, 20
# A call that takes long is made less often.
_MOST_CALLS, _MOST_SECONDS = 15, 1.0

_PENDING = TaskStatus.PENDING
#: The lists, by what they are called. The rare tasks are the oldest ones.
LISTS: tuple[tuple[str, TaskFilter], ...] = (
    ("all", TaskFilter()),
    ("pending", TaskFilter(status=_PENDING)),
    ("pending, one of 20 types", TaskFilter(status=_PENDING, type="type-3")),
    ("pending, a rare type", TaskFilter(status=_PENDING, type="rare")),
    ("pending, no such type", TaskFilter(status=_PENDING, type="none")),
    ("pending, one of 100 creators", TaskFilter(status=_PENDING, created_by="user-7")),
    ("pending, a rare creator", TaskFilter(status=_PENDING, created_by="rare")),
    ("pending, no such creator", TaskFilter(status=_PENDING, created_by="none")),
    ("pending, a rare tag", TaskFilter(status=_PENDING, tag="rare")),
    ("pending, no such tag", TaskFilter(status=_PENDING, tag="none")),
    ("one of 20 types", TaskFilter(type="type-3")),
    ("a rare type", TaskFilter(type="rare")),
    ("no such type", TaskFilter(type="none")),
    ("one of 100 creators", TaskFilter(created_by="user-7")),
    ("a rare creator", TaskFilter(created_by="rare")),
    ("no such creator", TaskFilter(created_by="none")),
    ("failed, none has failed", TaskFilter(status=TaskStatus.FAILED)),
    ("no such error type", TaskFilter(error_type="none")),
    ("no such error", TaskFilter(error="none")),
    ("no such start of an id", TaskFilter(id_prefix="none")),
)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.lists", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000, help="number of waiting tasks")
    parser.add_argument("--file", type=Path, help="the file of the tasks; it is kept")
    options = parser.parse_args()
    logging.getLogger("taskx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        queue = Queue(SQLiteRepository(options.file or Path(folder) / "tasks.db", "process"))
        if not queue.list_tasks(limit=1).tasks:
            fill(queue, options.tasks)
        for line in measured(queue):
            print(line, flush=True)
        queue.close()


def fill(queue: Queue, number: int) -> None:
    """Submit tasks, first the few rare ones."""
    queue.declare("rare", *(f"type-{n}" for n in range(_TYPES)))
    queue.submit_many([Task(type="rare", created_by="rare", tags=["rare"]) for _ in range(_FEW)])
    tasks = (
        Task(type=f"type-{n % _TYPES}", created_by=f"user-{n % _USERS}", params={"order": n})
        for n in range(number - _FEW)
    )
    while some := list(islice(tasks, _BATCH)):
        queue.submit_many(some)


def measured(queue: Queue) -> Iterator[str]:
    """Yield the lines of the table."""
    head = f"{'milliseconds':31}  {'tasks':>8}  {'to 10,000':>9}  {'exact':>8}"
    yield f"{head}  at most {GOAL:g} and {GOAL_EXACT:g}"
    for name, wanted in LISTS:
        page = partial(queue.list_tasks, attrs.evolve(wanted, limit=_ROWS))
        alone, capped, exact = (
            timed(call) for call in (partial(page, at_most=1), partial(page, at_most=10_000), page)
        )
        verdict = "yes" if alone <= GOAL and exact <= GOAL_EXACT else "NO"
        yield f"{name:31}  {alone:8.2f}  {capped:9.2f}  {exact:8.2f}  {verdict}"


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of processor time of a call."""
    call()
    times: list[float] = []
    while len(times) < _MOST_CALLS and sum(times) < 1000 * _MOST_SECONDS:
        began = time.process_time()
        call()
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times)


if __name__ == "__main__":
    main()
