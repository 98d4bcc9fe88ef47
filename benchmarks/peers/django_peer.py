"""Backends of Django's tasks: django-tasks-db and django-ox on SQLite, threadmill on Redis."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from typing import Any

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, until
from benchmarks.peers.services import Redis, Services

#: Seconds between two checks of a result: Django's tasks have no way to wait for one.
_POLL_INTERVAL = 0.002


class _Django(Apart):
    """A project with one of the backends.

    Attributes:
        app: the Django app that contains the backend.
    """

    app: str

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._workers = workers
        self._services = self.services(folder)
        self._env = {
            "DJANGO_SETTINGS_MODULE": "benchmarks.peers.django_settings",
            "TASKX_BENCH_FOLDER": folder,
            "TASKX_BENCH_APP": self.app,
        }
        os.environ.update(self._env)
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        from benchmarks.peers import django_tasks

        self._tasks: Any = django_tasks

    def services(self, folder: str) -> Services:
        return Services(folder)

    def command(self, ready: str, *args: str) -> None:
        """Start a command of the project, which prints ``ready`` when it is ready."""
        self._services.python(["-m", "django", *args], ready, **self._env)

    def submit(self, task: str = "noop") -> object:
        return getattr(self._tasks, task).enqueue()

    @abstractmethod
    def ended(self, result: Any) -> bool:
        """Read a result again. Return True if its task has ended."""

    def clock(self) -> tuple[float, float | None]:
        result = self._tasks.clock.enqueue()
        until(lambda: self.ended(result), _POLL_INTERVAL)
        return result.return_value, time.perf_counter()

    def close(self) -> None:
        self._services.close()


class _InDatabase(_Django):
    poll_interval = 0.02  # each check of the file delays the workers

    def ended(self, result: Any) -> bool:
        result.refresh()
        return bool(result.is_finished)


class DjangoTasks(_InDatabase):
    """django-tasks-db with four worker processes, because its worker has no threads."""

    app = "django_tasks_db"

    def work(self) -> None:
        for _ in range(self._workers):
            self.command("Starting worker", "db_worker", "--no-startup-delay")
        self._services.wait_until_ready()

    def finished(self) -> int:
        from django_tasks_db.models import DBTaskResult

        return int(DBTaskResult.objects.successful().count())


class DjangoOx(_InDatabase):
    """django-ox: one worker process with threads, which polls every 10 ms instead of every second."""

    app = "django_ox"

    def work(self) -> None:
        options = ("--concurrency", str(self._workers), "--interval", "0.01")
        self.command("", "ox_worker", "--verbosity", "0", *options)
        self._services.wait_until_ready()

    def finished(self) -> int:
        from django_ox.models import OxTask

        return int(OxTask.objects.filter(status="SUCCESSFUL").count())


class Threadmill(_Django):
    """threadmill: one worker process with threads, which polls every 1 to 10 ms."""

    app = "threadmill"
    _services: Redis

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        super().__init__(folder, workers)
        from django.tasks import default_task_backend

        self._backend: Any = default_task_backend
        self._finished = "threadmill:{default}:default:successful"

    def services(self, folder: str) -> Services:
        return Redis(folder)

    def work(self) -> None:
        self.command(
            "Starting workers",
            *("threadmill", "worker", "--workers", "1", "--threads", str(self._workers)),
            *("--prefetch-count", str(16 * self._workers)),
            *("--poll-interval", "0.001", "--poll-max-interval", "0.01"),
        )
        self._services.wait_until_ready()

    def finished(self) -> int:
        return int(self._backend.client.zcard(self._finished))

    def ended(self, result: Any) -> bool:
        from django.tasks.exceptions import TaskResultDoesNotExist

        try:
            result.refresh()
        except TaskResultDoesNotExist:
            return False
        return bool(result.is_finished)

    def close(self) -> None:
        self._backend.close()
        super().close()
