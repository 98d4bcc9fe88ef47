"""The tasks of the Django project; its worker imports them by their path."""

from __future__ import annotations

import time

from benchmarks.peers.base import noop as do_nothing

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task


@task()
def noop() -> int:
    return do_nothing()


@task()
def clock() -> float:
    return time.perf_counter()
