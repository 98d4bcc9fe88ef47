"""The tasks of the Django project; its workers import them by their path."""

from __future__ import annotations

from benchmarks.peers import base

try:
    from django.tasks import task
except ImportError:  # Django 5.2
    from django_tasks import task


@task()
def noop() -> int:
    return base.noop()


@task()
def nap() -> int:
    return base.nap()


@task()
def clock() -> float:
    return base.tell_time()
