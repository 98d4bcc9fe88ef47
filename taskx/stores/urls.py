"""Repositories by URL, for settings files and command lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

from taskx.stores.base import Repository
from taskx.stores.eight import TaskRepository
from taskx.stores.memory import MemoryRepository
from taskx.stores.sqlite import SQLiteRepository
from taskx.tasks.codec import Codec
from taskx.tasks.errors import ConfigurationError, TaskxError

# The entry points of packages that open repositories. Their names are schemes of URLs.
_GROUP = "taskx.repositories"
_BOOLEANS = {"true": True, "false": False}


def open_repository(url: str, codec: Codec | Iterable[Codec] | None = None) -> Repository:
    """Return the repository that a URL names. It is opened at its first operation.

    - ``sqlite:///tasks.db`` is a file in the working folder.
    - ``sqlite:////var/lib/tasks.db`` is a file with an absolute path. Both may end in
      ``?durability=full&create=false&prefix=taskx_``, which are arguments of :class:`SQLiteRepository`.
    - ``memory://`` keeps tasks in this process's memory.
    - ``mongodb://host/database?collection=tasks``, or ``mongodb+srv://…``, is a MongoDB collection.
    - ``postgresql://user@host/database?prefix=taskx_`` is a PostgreSQL database.
    - Any other scheme is that of an installed package, which names it in its entry points
      ``taskx.repositories``: a function that is called with the URL and ``codec=``.

    Args:
        url: the URL of the repository.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.

    Raises:
        ConfigurationError: the URL has none of these forms, or has an option that is not valid, or the
            package that opens it cannot be imported.
    """
    from urllib.parse import parse_qsl, unquote, urlsplit  # slow to load, and seldom needed

    if not isinstance(url, str):
        raise ConfigurationError(
            f"url must be a str, such as 'sqlite:///tasks.db', not {type(url).__name__}"
        )
    try:
        parts = urlsplit(url)
    except ValueError as error:  # of an address in brackets
        raise _unknown(url) from error
    if parts.scheme == "memory" and url.rstrip("/") in ("memory:", "memory://"):
        return MemoryRepository(codec=codec)
    # Else "sqlite:tasks.db" would name another file than it seems to.
    is_file = parts.scheme == "sqlite" and url[len("sqlite:") :].startswith("///")
    if is_file and len(parts.path) > 1:
        if parts.fragment:
            raise ConfigurationError(f"{_shown(url)!r}: write %23 for a # in the name of a file")
        options = _options(parse_qsl(parts.query, keep_blank_values=True), url)
        return SQLiteRepository(unquote(parts.path[1:]), codec=codec, **options)
    if parts.scheme in ("mongodb", "mongodb+srv"):
        from taskx.stores.mongo import MongoRepository

        return MongoRepository.from_url(url, codec=codec)
    if parts.scheme in ("postgresql", "postgres"):
        from taskx.stores.postgres import PostgresRepository

        return PostgresRepository.from_url(url, codec=codec)
    if parts.scheme not in ("", "sqlite", "memory"):
        return _of_package(parts.scheme, url, codec)
    raise _unknown(url)


def _unknown(url: str, more: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"{_shown(url)!r} is not the URL of a repository; use sqlite:///relative.db, "
        f"sqlite:////absolute.db, postgresql://host/database, mongodb://host/database or memory://{more}"
    )


def _of_package(scheme: str, url: str, codec: Codec | Iterable[Codec] | None) -> Repository:
    """Return the repository that an installed package opens for a scheme."""
    from importlib.metadata import entry_points  # slow to load, and seldom needed

    found = [*entry_points(group=_GROUP, name=scheme)]
    if not found:
        raise _unknown(
            url, f", or install the package for {scheme}://, with an entry point {_GROUP}"
        )
    try:
        function = found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"{_shown(url)!r}: {found[0].value} cannot be imported: {error}"
        ) from error
    try:
        opened = function(url, codec=codec)
    except TaskxError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{_shown(url)!r}: {found[0].value} raised {error!r:.200}"
        ) from error
    if not isinstance(opened, TaskRepository):
        raise ConfigurationError(
            f"{_shown(url)!r}: {found[0].value} must return a TaskRepository, not {opened!r:.80}"
        )
    return cast("Repository", opened)  # one of eight methods gets the rest from its queue


def _options(query: list[tuple[str, str]], url: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(query)
    if unknown := options.keys() - {"durability", "create", "prefix"}:
        raise ConfigurationError(
            f"{_shown(url)!r}: unknown option {', '.join(sorted(unknown))}; use durability, create or "
            "prefix"
        )
    if "create" in options:
        if options["create"] not in _BOOLEANS:
            raise ConfigurationError(
                f"{_shown(url)!r}: create must be true or false, not {options['create']!r}"
            )
        options["create"] = _BOOLEANS[options["create"]]
    return options


def _shown(url: str) -> str:
    """Return a URL for a message, without the user and password in it."""
    return re.sub("(//|^).*@", r"\1***@", url)
