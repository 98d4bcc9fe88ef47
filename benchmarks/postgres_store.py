"""The store in databases of Django on a PostgreSQL server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from benchmarks.mongo.store import database_of
from benchmarks.stores import Store

if TYPE_CHECKING:
    from benchmarks.loops import Loop
    from taskx.stores.base import Repository


class OnPostgres(Store):
    """A store with one database for each folder.

    Args:
        url: the server, ``postgresql://user:password@host:port``. The user makes and drops databases there.
    """

    durability = "accepted"

    def __init__(self, url: str) -> None:
        self.url = url
        where = urlsplit(url)
        given = {"HOST": where.hostname, "PORT": where.port, "USER": where.username}
        given["PASSWORD"] = unquote(where.password or "")
        self._place = {name: str(value or "") for name, value in given.items()}

    @contextmanager
    def repository(self, folder: str) -> Iterator[Repository]:
        alias = self._database(database_of(folder))
        from taskx.contrib.django import DjangoRepository

        nodes = os.path.join(folder, "nodes")
        with DjangoRepository(alias, run_folder=nodes) as repository:
            yield repository

    def loop(self, folder: str, count: int) -> Loop:
        raise NotImplementedError("there is no floor on PostgreSQL")

    def name(self) -> str:
        return self.url

    def drop(self, folder: str) -> None:
        """Drop the databases of a folder and of its subfolders."""
        with self._maintenance() as connection:
            for (name,) in connection.execute("SELECT datname FROM pg_database").fetchall():
                if name.startswith(database_of(folder)):
                    connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _maintenance(self) -> Any:
        import psycopg

        return psycopg.connect(self.url, dbname="postgres", autocommit=True)

    def _database(self, name: str) -> str:
        """Return the alias in Django of a database, which is made if it does not exist."""
        with self._maintenance() as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            if not found.fetchone():
                connection.execute(f'CREATE DATABASE "{name}"')
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.postgres_settings")
        os.environ.setdefault("TASKX_BENCH_APPS", "taskx.contrib.django")
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        default = connections.databases["default"]
        connections.databases[name] = {**default, **self._place, "NAME": name}
        call_command("migrate", database=name, verbosity=0)
        return name
