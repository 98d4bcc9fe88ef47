"""The databases other than TaskX's own file in which tasks of earlier code are kept, and their kept forms.

``tests/storage/versions`` has such a form of each: a text with all that the database had, or a file. They
were made by the code of their time, by ``make.py`` there, and must not change.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import django_project
import mongo_server
import mongomock
import postgres_server
from bson import json_util

from taskx import MongoRepository, PostgresRepository
from taskx.stores.base import Repository

FOLDER = Path(__file__).parent / "versions"
#: Seconds after which the nodes in a copy are dead. Those that died have not left their lock files.
LEASE = 6.0
_COLLECTIONS = {"tasks": "tasks", "notes": "tasks.notes"}
#: Lines of a dump that are for psql, or for the session that reads it.
_SESSION = re.compile(r"(?m)^(?:--|\\|SET |SELECT pg_catalog\.set_config).*\n|^\n")

Rows = list[dict[str, Any]]


class Kept(NamedTuple):
    """A kind of database. A place is the path or the URL of one.

    Attributes:
        file: the kept form.
        new: makes a place in a folder, or on a server.
        load: makes one with what a kept form has.
        open: opens a place; a folder is for its lock files.
        contents: returns the rows of each table at a place.
        save: writes all that is at a place to a file.
    """

    file: Path
    new: Callable[[Path], Any]
    load: Callable[[Path, Path], Any]
    open: Callable[[Any, Path], Repository]
    contents: Callable[[Any], Mapping[str, Rows]]
    save: Callable[[Any, Path], None]


# --- PostgreSQL


def _new_postgres(folder: Path) -> str:
    server = postgres_server.shared()
    return server.url(server.new_database())


def _load_postgres(file: Path, folder: Path) -> str:
    import psycopg  # not every Python has a wheel of it

    url = _new_postgres(folder)
    with psycopg.connect(url) as connection:
        connection.execute(file.read_text("utf-8"))
    return url


def _postgres_contents(url: str) -> Mapping[str, Rows]:
    import psycopg  # as above
    from psycopg.rows import dict_row

    with psycopg.connect(url, row_factory=dict_row) as connection:
        return {
            table: connection.execute(f"SELECT * FROM taskx_{table}").fetchall()
            for table in ("task", "parent", "tag", "note")
        }


def _save_postgres(url: str, file: Path) -> None:
    server = postgres_server.shared()
    dump = [server._programs / "pg_dump", "--no-owner", "--no-privileges", "--column-inserts", url]
    done = subprocess.run(dump, check=True, capture_output=True, text=True, **server._as_user)
    file.write_text(_SESSION.sub("", done.stdout), "utf-8")


# --- MongoDB


def _new_mongo(folder: Path) -> str:
    database = mongo_server.new_database(mongo_server.shared("standalone"))
    return f"{mongo_server.shared('standalone')}/{database.name}"


def _database(place: Any) -> Any:
    """Return the database at a URL, or the given mock of one."""
    if not isinstance(place, str):
        return place
    url, _, name = place.rpartition("/")
    return mongo_server.client(url)[name]


def _load_mongo(file: Path, folder: Path) -> Any:
    database = mongomock.MongoClient().db
    for name, documents in json_util.loads(file.read_text("utf-8")).items():
        database[_COLLECTIONS[name]].insert_many(documents)
    return database


def _mongo_contents(place: Any) -> Mapping[str, Rows]:
    database = _database(place)
    found = {name: [*database[name_there].find()] for name, name_there in _COLLECTIONS.items()}
    return {
        name: [{"id": row["_id"], **row, **row.get("taskx", {})} for row in rows]
        for name, rows in found.items()
    }


def _save_mongo(place: Any, file: Path) -> None:
    found = {name: [*_database(place)[there].find()] for name, there in _COLLECTIONS.items()}
    file.write_text(json_util.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


# --- Django


def _new_django(folder: Path) -> str:
    path = folder / "django.sqlite"
    django_project.make_sqlite(path, str(path), migrated=True)
    return str(path)


def _load_django(file: Path, folder: Path) -> str:
    path = folder / "django.sqlite"
    shutil.copyfile(file, path)
    django_project.set_up()
    django_project.add_database(str(path), NAME=str(path))
    return str(path)


def _open_django(path: str, folder: Path) -> Repository:
    django_project.set_up()
    django_project.add_database(path, NAME=path)
    from taskx.contrib.django import DjangoRepository

    made: Repository = DjangoRepository(path, run_folder=folder, timeout=60.0)
    return made


def _django_contents(path: str) -> Mapping[str, Rows]:
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            table: [*map(dict, connection.execute(f"SELECT * FROM taskx_{table}"))]
            for table in ("task", "parent", "tag", "note")
        }


def _save_django(path: str, file: Path) -> None:
    """Copy the file without traces of the machine in its free pages, and with only TaskX's own tables."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (name,) in tables.fetchall():
            if not name.startswith(("taskx_", "sqlite_", "django_migrations")):
                connection.execute(f'DROP TABLE "{name}"')
        connection.execute("DELETE FROM django_migrations WHERE app <> 'taskx'")
        connection.execute("PRAGMA page_size = 1024")  # of the copy: most tables are small
        connection.execute("VACUUM INTO ?", (os.fspath(file),))


KEPT = {
    "postgres": Kept(
        FOLDER / "postgres-1.sql",
        _new_postgres,
        _load_postgres,
        lambda url, folder: PostgresRepository(url, run_folder=folder, lease_timeout=LEASE),
        _postgres_contents,
        _save_postgres,
    ),
    "mongomock": Kept(
        FOLDER / "mongo-1.json",
        _new_mongo,
        _load_mongo,
        lambda place, folder: MongoRepository(
            _database(place), run_folder=folder, lease_timeout=LEASE
        ),
        _mongo_contents,
        _save_mongo,
    ),
    "django": Kept(
        FOLDER / "django-4.sqlite",
        _new_django,
        _load_django,
        _open_django,
        _django_contents,
        _save_django,
    ),
}
