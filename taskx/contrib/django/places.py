"""The places of tasks: one queue for each alias in each process, made at its first use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from django.apps import apps
from django.conf import settings as site
from django.core.signals import setting_changed

from taskx import (
    ConfigurationError,
    Hook,
    MemoryRepository,
    Queue,
    SQLiteRepository,
    TaskRepository,
    open_repository,
)
from taskx.contrib.django.blocks import beside_blocks
from taskx.contrib.django.inline_repository import InlineRepository
from taskx.contrib.django.repository import DjangoRepository
from taskx.contrib.django.settings import APP, DEFAULT, Settings, in_tests, settings_of
from taskx.contrib.django.surroundings import Surroundings
from taskx.tasks.clock import Clock

# The settings that a queue depends on. They change only in tests.
_SETTINGS = frozenset({"TASKS", "DATABASES", "INSTALLED_APPS", "BASE_DIR"})


@attrs.frozen
class Place:
    """The queue of an alias in this process, and its options.

    Attributes:
        settings: the options of the alias.
        queue: the queue.
        queue_names: the queue names of the tasks that it runs; empty for all.
    """

    settings: Settings
    queue: Queue
    queue_names: set[str] = attrs.field(factory=set)
    _types: set[str] = attrs.field(factory=set, init=False, repr=False)

    def find(self, type: str) -> None:
        """Register the executor of a type, if it is the path of a task of Django that this queue may run.

        Raises:
            ImportError: there is no task of Django at this path.
        """
        path, _, queue_name = type.partition("@")
        if "." not in path or not all(part.isidentifier() for part in path.split(".")):
            return
        if self.runs(queue_name or "default"):
            from taskx.contrib.django.tasks import task_of

            self.register(task_of(type, self.settings.alias))

    def runs(self, queue_name: str) -> bool:
        """Return True if the queue runs the tasks of Django with a queue name."""
        return not self.queue_names or queue_name in self.queue_names

    def register(self, task: Any) -> str:
        """Register the executor of a task of Django, if there is none yet; return its type.

        A type with a queue name that this queue does not run is only declared.
        """
        from taskx.contrib.django.running import executor_of
        from taskx.contrib.django.tasks import executor_options, type_of

        type = type_of(task)
        if type not in self._types:
            with _lock:
                if type not in self._types:
                    if self.runs(task.queue_name):
                        self.queue.register_executor(executor_of(task), **executor_options(task))
                    else:
                        self.queue.declare(type)
                    self._types.add(type)
        return type


_lock = threading.RLock()
# By alias, and whether Django's test environment is set up: tests have queues of their own.
_places: dict[tuple[str, bool], Place] = {}


def place_of(alias: str) -> Place:
    """Return the place of an alias.

    Raises:
        ConfigurationError: there is no such alias, or an option is not valid.
    """
    key = (alias, in_tests())
    if (place := _places.get(key)) is None:
        # Without a lock: it imports modules of the site. The first one made is used.
        place = _places.setdefault(key, _make(settings_of(alias)))
    return place


def made() -> set[str]:
    """Return the aliases whose places are made."""
    return {alias for alias, tests in list(_places) if tests == in_tests()}


def has_tasks() -> bool:
    """Return False if this Django has no tasks, and the package that brings them is not installed."""
    try:
        from taskx.contrib.django import compat  # noqa: F401
    except ImportError:
        return False
    return True


def _make(settings: Settings) -> Place:
    found: list[Place] = []
    about: dict[str, Any] = {
        "find_executor": partial(_find, found),
        "hooks": (*_signals(settings.alias), *settings.hooks),
        "middleware": (Surroundings(), *settings.middleware),
    }
    if settings.inline:
        from taskx.testing import InlineQueue, ManualClock

        clock = ManualClock(datetime.now(timezone.utc))
        repository = _inline_repository(settings, clock)
        queue: Queue = InlineQueue(repository, settings.config, clock=clock, **about)
    else:
        queue = Queue(_repository(settings), settings.config, **about)
    found.append(Place(settings, queue))
    return found[0]


def _signals(alias: str) -> Iterator[Hook]:
    if has_tasks():
        from taskx.contrib.django.running import Signals

        yield Signals(alias)


def _find(found: list[Place], type: str) -> None:
    found[0].find(type)


def _repository(settings: Settings) -> TaskRepository:
    if settings.repository is None and apps.is_installed(APP):
        return DjangoRepository(
            settings.database, on_commit=settings.on_commit, codec=settings.codec
        )
    if settings.names_database:  # a file instead would not be part of the site's transactions
        raise ConfigurationError(
            f"TASKS[{settings.alias!r}]['OPTIONS']: database requires {APP!r} in INSTALLED_APPS"
        )
    outside: TaskRepository = beside_blocks(_outside(settings), settings.on_commit)
    return outside


def _inline_repository(settings: Settings, clock: Clock) -> TaskRepository | None:
    """Return the repository of the backend for tests; None if tasks are not in a database."""
    if settings.repository is not None or not apps.is_installed(APP):
        return None
    return InlineRepository(settings.database, clock)


def _outside(settings: Settings) -> Any:
    """Return a repository outside of Django's databases."""
    if in_tests():  # Django makes databases for tests, but no other files
        return MemoryRepository(codec=settings.codec)
    if settings.repository is not None:
        return open_repository(settings.repository, settings.codec)
    return SQLiteRepository(default_file(settings.alias), codec=settings.codec)


def default_file(alias: str) -> Path:
    """Return the file of the tasks of an alias, for a site that names no place.

    Raises:
        ConfigurationError: the site has no ``BASE_DIR``.
    """
    if (folder := getattr(site, "BASE_DIR", None)) is None:
        raise ConfigurationError(
            f"there is no place for the tasks: add {APP!r} to INSTALLED_APPS, or set BASE_DIR, or give "
            f"TASKS[{alias!r}]['OPTIONS']['repository']"
        )
    name = "taskx" if alias == DEFAULT else f"taskx-{alias}"
    return Path(folder) / f"{name}.sqlite3"


def forget(alias: str | None = None) -> None:
    """Stop and close the queue of an alias, or all of them. The next use makes a new one."""
    with _lock:
        keys = [key for key in _places if alias in (None, key[0])]
        places = [_places.pop(key) for key in keys]
    for place in places:
        place.queue.stop(cancel=True)
        place.queue.close()


def _forget_changed(*, setting: str, **more: Any) -> None:
    if setting in _SETTINGS:
        forget()


setting_changed.connect(_forget_changed, dispatch_uid="taskx")


def _renew_after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_after_fork)
