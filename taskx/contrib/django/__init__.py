"""TaskX in Django: tasks in the site's database. It needs Django: ``pip install 'taskx-queue[django]'``.

The names are imported at their first use, because models need settings. Add ``"taskx.contrib.django"`` to
``INSTALLED_APPS`` and run ``manage.py migrate`` to make the tables.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskx.contrib.django.backend import TaskxBackend as TaskxBackend
    from taskx.contrib.django.inline import InlineBackend as InlineBackend
    from taskx.contrib.django.queues import get_queue as get_queue
    from taskx.contrib.django.queues import load_queue as load_queue
    from taskx.contrib.django.repository import DjangoRepository as DjangoRepository
    from taskx.contrib.django.schedules import schedule as schedule
    from taskx.contrib.django.tasks import task as task
    from taskx.contrib.django.views import dashboard as dashboard

# The module of each public name.
_MODULES = {
    "DjangoRepository": "repository",
    "InlineBackend": "inline",
    "TaskxBackend": "backend",
    "dashboard": "views",
    "get_queue": "queues",
    "load_queue": "queues",
    "schedule": "schedules",
    "task": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
