"""django-tasks-db, the database backend of Django's tasks: its worker command, four times."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, until
from benchmarks.peers.services import Services

_SETTINGS = {"DJANGO_SETTINGS_MODULE": "benchmarks.peers.django_settings"}


class DjangoTasks(Apart):
    """Tasks and results in an SQLite file."""

    look_every = 0.02  # a look at the file holds the workers up

    def __init__(self, folder: str) -> None:
        self._env = {**_SETTINGS, "TASKX_BENCH_FOLDER": folder}
        os.environ.update(self._env)
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        from django_tasks_db.models import DBTaskResult

        from benchmarks.peers import django_tasks

        self._noop: Any = django_tasks.noop
        self._clock: Any = django_tasks.clock
        self._successful = DBTaskResult.objects.successful()
        self._services = Services(folder)

    def submit(self) -> object:
        return self._noop.enqueue()

    def work(self) -> None:
        for _ in range(WORKERS):
            self._services.python(
                ["-m", "django", "db_worker", "--no-startup-delay"], "Starting worker", **self._env
            )
        self._services.wait_until_ready()

    def finished(self) -> int:
        return int(self._successful.all().count())

    def clock(self) -> tuple[float, float | None]:
        result = self._clock.enqueue()

        def ended() -> bool:
            result.refresh()
            return bool(result.is_finished)

        until(ended, 0.002)
        return result.return_value, time.perf_counter()

    def close(self) -> None:
        self._services.close()
