"""Django's system checks of the options of an alias. Their ids begin with ``taskx.``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import django
from django.apps import apps
from django.core import checks
from django.db import connections

from taskx import ConfigurationError, open_repository
from taskx.contrib.django.places import default_file, place_of
from taskx.contrib.django.settings import APP, KEYS, Settings, entries, ours, settings_of


@attrs.frozen
class _Alias:
    """The object that a message is about."""

    alias: str

    def __str__(self) -> str:
        return f"TASKS[{self.alias!r}]"


def check_alias(alias: str) -> Sequence[Any]:
    """Return what is wrong with the options of an alias, as messages of Django's check framework."""
    misplaced = list(_of_keys(alias))
    try:
        settings = settings_of(alias)
    except ConfigurationError as error:
        hint = f"The options are {', '.join(KEYS)}."
        text = _sentence(str(error).removeprefix(f"{_Alias(alias)}['OPTIONS']: "))
        return [*misplaced, checks.Error(f"OPTIONS: {text}", hint, _Alias(alias), "taskx.E001")]
    return [*misplaced, *_of_place(settings), *_of_others(settings)]


def _sentence(text: str) -> str:
    """Return a text that ends like a sentence."""
    return text if text.endswith((".", "?")) else f"{text}."


def _of_keys(alias: str) -> Iterator[Any]:
    """Yield a warning for each option that is next to ``OPTIONS``, where Django ignores it."""
    for key in entries().get(alias, {}):
        if key in KEYS:
            text = f"The key {key!r} has no effect here."
            yield checks.Warning(text, "Put it into OPTIONS.", _Alias(alias), "taskx.W003")


def _of_place(settings: Settings) -> Iterator[Any]:
    """Yield errors if the tasks cannot be stored at the place that the options name."""
    about = _Alias(settings.alias)
    try:
        if settings.repository is not None:
            open_repository(settings.repository).close()
        elif not (settings.inline or apps.is_installed(APP)):
            default_file(settings.alias)
    except (ConfigurationError, ImportError) as error:
        text = _sentence(f"The tasks cannot be stored: {error}")
        yield checks.Error(text, None, about, "taskx.E002")
    if settings.database not in connections:
        hint = f"Use one of {', '.join(map(repr, connections))}."
        text = f"The option database names {settings.database!r}, which is not in DATABASES."
        yield checks.Error(text, hint, about, "taskx.E003")
    elif settings.names_database and not apps.is_installed(APP):
        hint = f"Add {APP!r} to INSTALLED_APPS, and run manage.py migrate."
        text = "The option database needs the tables of TaskX's app, which is not installed."
        yield checks.Error(text, hint, about, "taskx.E004")


def _of_others(settings: Settings) -> Iterator[Any]:
    """Yield a warning if an earlier alias in ``TASKS`` stores its tasks at the same place."""
    for other in ours():
        if other == settings.alias:
            return
        try:
            same = _place(settings_of(other)) == _place(settings)
        except ConfigurationError:  # its own check tells it
            continue
        if same:
            text = f"The alias {other!r} stores its tasks at the same place: each runs the other's."
            hint = "Use one alias with several QUEUES, or give each alias a repository of its own."
            yield checks.Warning(text, hint, _Alias(settings.alias), "taskx.W001")
            return


def _place(settings: Settings) -> object:
    """Return a value that is equal for aliases that store their tasks at the same place."""
    if settings.inline:
        return settings.alias
    if settings.repository is not None:
        return settings.repository
    return (settings.database,) if apps.is_installed(APP) else settings.alias


def _check_without_django(app_configs: Any = None, **more: Any) -> list[Any]:
    """Check the aliases where Django itself does not, because the app ``django_tasks`` is missing."""
    if django.VERSION >= (6, 0) or apps.is_installed("django_tasks") or not entries():
        return []
    try:
        from taskx.contrib.django import compat  # noqa: F401
    except ImportError as error:
        hint = "The native API, get_queue(), works without it."
        return [checks.Warning(f"TASKS has no effect: {error}.", hint, "TASKS", "taskx.W002")]
    return [message for alias in ours() for message in check_alias(alias)]


def _tell_place(app_configs: Any = None, **more: Any) -> list[Any]:
    """Tell where the tasks are stored, for ``manage.py check --deploy``."""
    found = []
    for alias in ours():
        if not check_alias(alias):
            place = place_of(alias)
            how = "run in the processes that serve" if place.settings.embedded else "need a worker"
            text = f"The tasks are stored in {place.queue.repository!r}, and {how}."
            found.append(checks.Info(text, None, _Alias(alias), "taskx.I001"))
    return found


if django.VERSION >= (6, 0):
    import django.tasks  # registers Django's check of TASKS, before the checks run
checks.register(_check_without_django, "taskx")
checks.register(_tell_place, "taskx", deploy=True)
