"""The time of a claim while a session sits idle in a transaction, beside a million finished tasks.

    python -m benchmarks.postgres_idle --finished 1000000 --before 30 --idle 600

One process submits 200 tasks a second, and another one runs them. A claim is the query that finds the next
tasks, and the transaction that starts them. An idle transaction keeps all rows that are changed meanwhile
from being removed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from benchmarks.children import environment
from benchmarks.peers.base import noop
from benchmarks.postgres import own_server
from taskx import Config, PostgresRepository, Queue, RepositoryUnavailable, TaskFilter
from taskx.tasks.record import COLUMNS

_URL = "TASKX_BENCH_URL"
_COPIED = [name for name in COLUMNS if name not in ("id", "created_at")]
_FILL = f"""
    INSERT INTO taskx_task (id, created_at, {", ".join(_COPIED)})
    SELECT 'f' || n, created_at - n, {", ".join(_COPIED)}
    FROM taskx_task, generate_series(1, %s) n WHERE id = 'first'
"""


class Timed(PostgresRepository):
    """Notes how long the parts of a claim take, in milliseconds."""

    looks: list[float]
    starts: list[float]

    def ready(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = super().ready(*args, **options)
        if found:
            self.looks.append(1000 * (time.perf_counter() - began))
        return found

    def apply(self, writes: Any, **options: Any) -> Any:
        began = time.perf_counter()
        results = super().apply(writes, **options)
        if any(write.move == "start" for write in writes):
            self.starts.append(1000 * (time.perf_counter() - began))
        return results


def work(window: float) -> None:
    """Run tasks, and print a line for each window of some seconds."""
    repository = Timed(os.environ[_URL])
    repository.looks, repository.starts = [], []
    queue = Queue(repository, Config(worker_num=4))
    queue.executor("noop")(noop)
    queue.start()
    rest = threading.Event()
    while not rest.wait(window):
        looks, starts = repository.looks, repository.starts
        repository.looks, repository.starts = [], []
        told = [statistics.median(looks or [0.0]), statistics.median(starts or [0.0])]
        print(*told, len(looks), flush=True)


def submit(rate: float) -> None:
    """Submit some tasks a second, without an end."""
    queue = Queue(PostgresRepository(os.environ[_URL]))
    queue.declare("noop")
    began, rest = time.monotonic(), threading.Event()
    for number in range(sys.maxsize):
        rest.wait(max(0.0, began + number / rate - time.monotonic()))
        with suppress(RepositoryUnavailable):  # a machine that was stopped for a while
            queue.submit("noop")


def fill(url: str, finished: int) -> None:
    """Store finished tasks: copies of one that has run."""
    import psycopg

    with Queue(PostgresRepository(url)) as queue:
        queue.executor("noop")(noop)
        queue.submit("noop", id="first").result(60)
        queue.stop()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(_FILL, [finished])
            connection.execute("VACUUM ANALYZE taskx_task")
        print(f"{queue.repository.count(TaskFilter()):,} finished tasks", flush=True)


def watch(url: str, before: float, idle: float, window: float, rate: float) -> None:
    """Print the time of a claim before and during an idle transaction."""
    import psycopg

    def child(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.postgres_idle", *arguments]
        made = environment(**{_URL: url})
        return subprocess.Popen(command, env=made, stdout=subprocess.PIPE, text=True)

    worker, submits = child("--work", str(window)), child("--submit", str(rate))
    assert worker.stdout is not None
    try:
        worker.stdout.readline()  # the first window has the start
        with psycopg.connect(url) as session, psycopg.connect(url, autocommit=True) as looks:
            began, sits = time.monotonic(), False
            base: list[float] = []
            while (seconds := time.monotonic() - began) < before + idle:
                if not sits and seconds >= before:
                    session.execute("SELECT txid_current()")
                    sits = True
                    worker.stdout.readline()
                look, start, count = map(float, worker.stdout.readline().split())
                if not sits:
                    base.append(look + start)
                [dead] = looks.execute(
                    "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'taskx_task'"
                ).fetchone()  # type: ignore[misc]
                ratio = (look + start) / statistics.median(base or [1.0])
                print(
                    f"{seconds:6.0f} s  {'idle' if sits else 'before':6}  look {look:7.2f} ms  start "
                    f"{start:6.2f} ms  {count / window:5.0f} looks/s  {dead:9,} dead  × {ratio:.2f}",
                    flush=True,
                )
    finally:
        worker.kill()
        submits.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--before", type=float, default=30.0, help="seconds without a transaction")
    parser.add_argument("--idle", type=float, default=600.0, help="seconds with one")
    parser.add_argument("--window", type=float, default=10.0, help="seconds of a line")
    parser.add_argument("--rate", type=float, default=200.0, help="tasks a second")
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--submit", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
    elif options.submit:
        submit(options.submit)
    else:
        with own_server() as server:
            url = server.url(server.new_database())
            fill(url, options.finished)
            watch(url, options.before, options.idle, options.window, options.rate)


if __name__ == "__main__":
    main()
