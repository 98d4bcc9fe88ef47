"""Django in the process of the tests, with the settings of ``tests/contrib/django/project``."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskx.contrib.django import DjangoRepository

#: The folder of the project's ``manage.py``.
FOLDER = Path(__file__).parent / "contrib" / "django"
#: The variable ``TZ`` before Django changed it.
TZ_BEFORE = os.environ.get("TZ")


def set_up() -> None:
    """Set Django up once in this process. The environment and the time zone stay as they were.

    Other tests may run in the same process, and must not notice.
    """
    import django
    from django.conf import settings

    if settings.configured:
        return
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    with same_environment():
        os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
        django.setup()


@contextmanager
def same_environment() -> Iterator[None]:
    """Undo what Django changes in the environment when settings are read or replaced."""
    before = {name: os.environ.get(name) for name in ("DJANGO_SETTINGS_MODULE", "TZ")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        time.tzset()


def add_database(alias: str, **settings: Any) -> None:
    """Add a database to those of the project, or change the settings of one."""
    from django.db import connections

    if "mysql" in settings.get("ENGINE", ""):
        from project.settings import use_pymysql

        use_pymysql()
    known = connections.settings.get(alias, connections.settings["other"])
    connections.settings[alias] = {**known, **settings}


def migrate(alias: str) -> None:
    """Make the tables in a database."""
    from django.core.management import call_command
    from django.db import connections

    set_up()
    call_command("migrate", database=alias, verbosity=0)
    connections[alias].close()


@functools.cache
def _migrated_file() -> Path:
    """Return an SQLite file with the tables, to copy."""
    folder = Path(tempfile.mkdtemp(prefix="taskx-django-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_sqlite(folder / "tables.db", "template", migrated=True)


def make_sqlite(path: Path, alias: str, *, migrated: bool = False) -> Path:
    """Make an SQLite file with the tables and a write-ahead log, and add it as a database."""
    from django.db import connections

    set_up()
    add_database(alias, NAME=str(path))
    if migrated:
        migrate(alias)
        with connections[alias].cursor() as cursor:
            cursor.execute("PRAGMA journal_mode = WAL")
        connections[alias].close()
    elif not path.exists():
        shutil.copy(_migrated_file(), path)
    return path


def on_sqlite(folder: Path, **options: Any) -> DjangoRepository:
    """Return a repository in an SQLite file of its own; in the same folder, on the same file."""
    set_up()
    from taskx.contrib.django.repository import DjangoRepository

    alias = f"sqlite {folder}"
    make_sqlite(folder / "site.db", alias)
    return DjangoRepository(alias, **options)


@functools.cache
def postgres_alias() -> str:
    """Return the alias of a database with the tables on the PostgreSQL server of this process."""
    import postgres_server

    set_up()
    server = postgres_server.shared()
    name = server.new_database()
    add_postgres("postgres", server.port, name)
    migrate("postgres")
    return "postgres"


def add_postgres(alias: str, port: int, name: str, host: str = "127.0.0.1") -> None:
    """Add a database on a PostgreSQL server."""
    settings = {"ENGINE": "django.db.backends.postgresql", "HOST": host, "PORT": port}
    add_database(alias, **settings, NAME=name, USER="postgres", PASSWORD="", OPTIONS={})


@functools.cache
def mariadb_alias() -> str:
    """Return the alias of a database with the tables on the MariaDB server of this process."""
    import mariadb_server

    set_up()
    server = mariadb_server.shared()
    add_url("mariadb", server.url(server.new_database()))
    migrate("mariadb")
    return "mariadb"


def add_url(alias: str, url: str) -> None:
    """Add a database on a server."""
    from project.settings import on_server

    add_database(alias, **on_server(url))


def on_mariadb(folder: Path, **options: Any) -> DjangoRepository:
    """Return a repository in the MariaDB database of this process; ``clear`` empties it."""
    import mariadb_server

    mariadb_server.shared()  # says that this test uses it
    return _on_server(mariadb_alias(), folder, **options)


def on_postgres(folder: Path, **options: Any) -> DjangoRepository:
    """Return a repository in the PostgreSQL database of this process; ``clear`` empties it."""
    import postgres_server

    postgres_server.shared()  # says that this test uses it
    return _on_server(postgres_alias(), folder, **options)


def _on_server(alias: str, folder: Path, *, clear: bool = True, **options: Any) -> DjangoRepository:
    from taskx.contrib.django.repository import DjangoRepository

    made = DjangoRepository(alias, run_folder=folder / "run", **options)
    if clear:
        empty(made)
    return made


#: The makers of repositories in each kind of database.
MAKERS = {"sqlite": on_sqlite, "postgres": on_postgres, "mariadb": on_mariadb}


def empty(repository: DjangoRepository) -> None:
    """Remove all rows."""
    with repository._connections.writing() as link:
        for table in ("taskx_task", "taskx_parent", "taskx_tag", "taskx_note"):
            link.execute(f"DELETE FROM {table}")
