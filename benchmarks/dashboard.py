"""``python -m benchmarks.dashboard``: the time of each page of the dashboard on a large file.

A page is asked for by a client in the same process, so the time is that of the app: processor time, which
other programs disturb less. A page may take 50 ms.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from werkzeug.test import Client

from taskx import Queue, SQLiteRepository
from taskx.programs.dashboard import ALL, Dashboard
from taskx.programs.dashboard.screens import SCREENS
from taskx.stores.sqlite.connections import Connections
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.ids import key_of, new_id

#: The longest time of a page, in milliseconds.
GOAL = 50.0
#: Requests of each page. The first one reads the pages of the file and does not count.
REQUESTS = 15

_TYPES = 20
_FRAMES = "".join(
    f'  File "/srv/shop/module_{n}.py", line {n}, in step_{n}\n    step({n})\n'
    for n in range(1, 16)
)
_TRACEBACK = f"Traceback (most recent call last):\n{_FRAMES}ValueError: no such order\n"

_DONE = (
    "INSERT INTO tasks (seq, id, created_at, started_at, completed_at, type, params, status, result,"
    " progress, duration, max_attempts, max_crashes, starts, created_by, worker, error, error_type,"
    " traceback, dead_letter) VALUES (?, ?, ?, ? + 5, ? + 20, ?, ?, ?, '1', 100, 0.015, 1, 3, 1, ?,"
    " 'host:1:aaaaaa taskx-worker-1', ?, ?, ?, ?)"
)
_WAITING = (
    "INSERT INTO tasks (seq, id, created_at, type, params, status, max_attempts, max_crashes)"
    " VALUES (?, ?, ?, ?, ?, 'pending', 1, 3)"
)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.dashboard", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000, help="number of stored tasks")
    parser.add_argument("--waiting", type=int, default=10_000, help="number of them that wait")
    options = parser.parse_args()
    logging.getLogger("taskx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for line in measured(Path(folder), options.tasks, options.waiting):
            print(line)


def measured(folder: Path, number: int, waiting: int) -> Iterator[str]:
    """Yield the lines of the table of all pages."""
    queue = Queue(SQLiteRepository(folder / "tasks.db"))
    queue.list_tasks()  # creates the file
    failed = fill(folder / "tasks.db", number, waiting)
    client = Client(Dashboard(queue, permissions=ALL))
    yield f"{number:,} tasks, {waiting:,} of them wait"
    yield f"{'page':56} {'median':>9} {'longest':>9}   at most {GOAL:g} ms"
    for path, query in pages(failed):
        times = [timed(client, path, query) for _ in range(REQUESTS + 1)][1:]
        median = statistics.median(times)
        shown = f"{path} {query}" if query else path
        verdict = "yes" if median <= GOAL else "NO"
        yield f"{shown[:56]:56} {median:6.1f} ms {max(times):6.1f} ms   {verdict}"
    yield f"{'an unchanged page':56} {unchanged(client):6.2f} ms"
    queue.repository.close()


def pages(failed: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the pages: their paths and queries."""
    for screen in SCREENS:
        if screen.letter:
            yield screen.path or f"/{screen.name}", {}
    yield "/task", {"id": failed}
    for line in (
        "status:failed",
        "type:type-3 status:failed",
        "type:type-3",
        "newer:1h",
        "by:user-7",
    ):
        yield "/tasks", {"q": line}
    for line in ("error:order", "error:nothing", "params.order:999", f"id:{failed[:13]}"):
        yield "/tasks", {"q": line}


def timed(client: Client, path: str, query: Mapping[str, str]) -> float:
    """Return the milliseconds of one request."""
    began = time.process_time()
    answer = client.get(path, query_string=dict(query))
    spent = 1000 * (time.process_time() - began)
    assert answer.status_code == 200, (path, query, answer.status)
    return spent


def unchanged(client: Client) -> float:
    """Return the median of the milliseconds of a request for a page that has not changed."""
    times = []
    while len(times) < REQUESTS:
        etag = client.get("/tasks").headers["ETag"]
        began = time.perf_counter()
        answer = client.get("/tasks", headers={"If-None-Match": etag})
        if answer.status_code == 304:  # else a step of five seconds has ended
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def fill(path: Path, number: int, waiting: int) -> str:
    """Write tasks, as fast as SQLite can: ended ones, 2 % of which failed, and then waiting ones.

    Return the id of a failed one.
    """
    connections = Connections(DatabaseFile(str(path), create=False), 10.0)
    writer = connections.writer()
    now, failed = time.time_ns() // 1_000_000 - number, ""
    writer.execute("BEGIN IMMEDIATE")
    for n in range(number):
        at, type, params = (
            now + n,
            f"type-{n % _TYPES}",
            f'{{"order": {n}, "user": {{"id": {n % 1000}}}}}',
        )
        task_id = new_id(at)
        if n >= number - waiting:
            writer.execute(_WAITING, (key_of(task_id), task_id, at, type, params))
            continue
        bad = n % 50 == 0
        failed = task_id if bad else failed
        error = ("no such order", "ValueError", _TRACEBACK, 1) if bad else ("", "", "", 0)
        status = "failed" if bad else "completed"
        values = (
            key_of(task_id),
            task_id,
            at,
            at,
            at,
            type,
            params,
            status,
            f"user-{n % 100}",
            *error,
        )
        writer.execute(_DONE, values)
    writer.execute("COMMIT")
    connections.close()
    return failed


if __name__ == "__main__":
    main()
