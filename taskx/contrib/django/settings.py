"""The options of an alias: ``TASKS[alias]["OPTIONS"]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import attrs
from django.conf import settings as site
from django.utils.module_loading import import_string

from taskx import Config, ConfigurationError
from taskx.contrib.django.blocks import OnCommit, check_on_commit

#: The Django app with TaskX's tables.
APP = "taskx.contrib.django"
#: The alias of the queue that code gets which names none.
DEFAULT = "default"

# The options that set a field of Config.
_FIELDS: Mapping[str, str] = {
    "workers" if field.name == "worker_num" else field.name: field.name
    for field in attrs.fields(Config)
}
# A full buffer must not make enqueue() fail: Django's API has no such error.
_CONFIG: Mapping[str, Any] = {"overflow": "spill"}


@attrs.frozen(kw_only=True)
class Settings:
    """The options of an alias.

    Attributes:
        alias: the key in ``TASKS``.
        inline: True if its backend runs tasks within ``enqueue``.
        repository: the URL of the repository; None for the default.
        database: the alias of the database with TaskX's tables, if its app is installed.
        names_database: True if the options name that database.
        embedded: True if processes that serve requests run tasks, too.
        on_commit: what an ``enqueue`` does inside ``atomic()`` of another database: ``"wait"`` for its
            commit, or ``"refuse"``.
        hooks, middleware, codec: arguments of the queue and of its repository.
        config: the settings of the queue.
    """

    alias: str
    inline: bool = False
    repository: str | None = None
    database: str = "default"
    names_database: bool = False
    embedded: bool = True
    on_commit: OnCommit = "wait"
    hooks: tuple[Any, ...] = ()
    middleware: tuple[Any, ...] = ()
    codec: tuple[Any, ...] | None = None
    config: Config


_OWN = tuple(
    field.name
    for field in attrs.fields(Settings)
    if field.name not in ("alias", "inline", "names_database", "config")
)
#: All options.
KEYS: tuple[str, ...] = (*_OWN, *_FIELDS)


def in_tests() -> bool:
    """Return True if Django's test environment is set up: by its test runner, or by pytest-django."""
    utils = sys.modules.get("django.test.utils")
    return utils is not None and hasattr(utils._TestState, "saved_data")


def entries() -> Mapping[str, Mapping[str, Any]]:
    """Return the setting ``TASKS``; empty if it is not set."""
    found: Mapping[str, Mapping[str, Any]] = getattr(site, "TASKS", None) or {}
    return found


def backend_class(alias: str) -> Any:
    """Return the class of the backend of an alias; None if it has none, or if it cannot be imported."""
    try:
        return import_string(entries()[alias]["BACKEND"])
    except (ImportError, KeyError):
        return None


def ours() -> list[str]:
    """Return the aliases of ``TASKS`` with a backend of TaskX."""
    return [alias for alias in entries() if hasattr(backend_class(alias), "inline")]


def settings_of(alias: str) -> Settings:
    """Return the options of an alias.

    Raises:
        ConfigurationError: ``TASKS`` has no such alias, or an option is unknown or not valid.
    """
    if alias not in entries() and alias != DEFAULT:
        known = ", ".join(map(repr, entries())) or "none"
        raise ConfigurationError(f"TASKS has no alias {alias!r} (it has: {known})")
    given = entries().get(alias, {}).get("OPTIONS", {})
    inline = bool(getattr(backend_class(alias), "inline", False))
    try:
        return _checked(alias, given, inline=inline)
    except ConfigurationError as error:
        raise ConfigurationError(f"TASKS[{alias!r}]['OPTIONS']: {error}") from None


def _checked(alias: str, given: Mapping[str, Any], *, inline: bool) -> Settings:
    for key in given:
        if key not in KEYS:
            close = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(KEYS)}"
            raise ConfigurationError(f"there is no option {key!r}; {hint}")
    own = {key: given[key] for key in _OWN if key in given}
    for key, kind in {"repository": str, "database": str, "embedded": bool}.items():
        if key in own and not isinstance(own[key], kind):
            raise ConfigurationError(f"{key} must be a {kind.__name__}, not {own[key]!r}")
    check_on_commit(own.get("on_commit", "wait"))
    if own.keys() >= {"repository", "database"}:
        raise ConfigurationError("repository and database say the same: give only one of them")
    for key in ("hooks", "middleware", "codec"):
        if key in own:
            own[key] = _imported(key, own[key])
    own["names_database"] = "database" in own
    return Settings(alias=alias, inline=inline, config=_config(given), **own)


def _imported(key: str, given: Any) -> tuple[Any, ...]:
    """Return the objects of a list. Each is given as itself, or by its path; a class is called."""
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ConfigurationError(
            f"{key} must be a list, such as ['shop.tasks.Alert'], not {given!r}"
        )
    found = []
    for one in given:
        try:
            made = import_string(one) if isinstance(one, str) else one
        except ImportError as error:
            raise ConfigurationError(f"{key}: {error}") from error
        found.append(made() if isinstance(made, type) else made)
    return tuple(found)


def _config(given: Mapping[str, Any]) -> Config:
    wanted = {key: given[key] for key in _FIELDS if key in given}
    for key, value in wanted.items():  # one by one, so that the error names the option
        try:
            Config(**{_FIELDS[key]: value})
        except ConfigurationError as error:
            text = str(error)
            raise ConfigurationError(
                text if text.startswith(f"{key} ") else f"{key}: {text}"
            ) from None
    return Config(**{**_CONFIG, **{_FIELDS[key]: value for key, value in wanted.items()}})
