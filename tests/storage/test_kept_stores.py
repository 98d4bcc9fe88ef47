"""The kept tasks in PostgreSQL, MongoDB and Django's database: they are opened, migrated, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import django_project
import pytest

from taskx import Queue, TaskFilter
from taskx.stores.mongo.documents import PATHS
from taskx.stores.postgres import schema
from taskx.tasks.record import DEFAULTS

from .kept import run_all, schema_of
from .kept_stores import KEPT, Kept

#: A migration as a later TaskX may have one.
NEXT = (
    "ALTER TABLE {0}task ADD COLUMN mood text NOT NULL DEFAULT ''",
    "CREATE INDEX {0}mood ON {0}task (mood) WHERE mood <> ''",
)


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Kept:
    return KEPT[request.param]


@pytest.fixture
def place(kept: Kept, tmp_path: Path) -> Any:
    """A database with the kept tasks."""
    return kept.load(kept.file, tmp_path)


def test_kept_tasks_can_be_read_and_new_ones_submitted(kept, place, tmp_path):
    with kept.open(place, tmp_path / "run") as repository:
        tasks = repository.list(TaskFilter(limit=100))
        assert len(tasks) == 22
        assert not [task.damage for task in tasks if task.damage]
        queue = Queue(repository)
        queue.declare("later")
        new = queue.submit("later", tags=["new", "red"])
        assert [task.id for task in queue.iter_tasks(tag="new")] == [new.id]
        assert queue.count_tasks(tag="red") == 2


def test_kept_tasks_run_to_their_ends(kept, place, tmp_path):
    run_all(kept.open(place, tmp_path / "run"))


def test_every_column_of_kept_tasks_holds_something(kept, place):
    found = kept.contents(place)
    rows = found.get("task", found.get("tasks"))
    for column in PATHS.keys() - {"flow", "stopping"}:
        values = {repr(row.get(column)) for row in rows}
        assert values - {repr(DEFAULTS.get(column)), repr(None)}, column


# Migrations


#: What tells the schema of a database: its indexes, its columns, and its tables with their comments.
SCHEMA = (
    "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    """
    SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity, collation_name
    FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2
    """,
    """
    SELECT relname, reloptions, obj_description(oid) FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1
    """,
)


def postgres_schema(url: str) -> list[list[Any]]:
    import psycopg  # not every Python has a wheel of it

    with psycopg.connect(url) as connection:
        return [connection.execute(sql).fetchall() for sql in SCHEMA]


@pytest.mark.parametrize("kept", ["postgres"], indirect=True)
def test_the_tables_in_postgres_do_not_change_without_a_new_version(kept, place, tmp_path):
    new = kept.new(tmp_path)
    with kept.open(new, tmp_path / "run") as repository:
        repository.notes("")  # makes the tables
    how = f"python tests/storage/versions/make.py postgres-{schema.VERSION}.sql postgres"
    assert postgres_schema(place) == postgres_schema(new), (
        f"the tables were changed. If their version was released, add another one; else: {how}"
    )


@pytest.mark.parametrize("kept", ["postgres"], indirect=True)
def test_tables_in_postgres_are_migrated_with_their_tasks(kept, place, tmp_path, monkeypatch):
    before = kept.contents(place)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, NEXT))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    for url in (place, new := kept.new(tmp_path)):
        with kept.open(url, tmp_path / "run") as repository:
            repository.notes("")
    after = kept.contents(place)
    assert {row.pop("mood") for row in after["task"]} == {""}
    assert after == before
    assert postgres_schema(place) == postgres_schema(new)


@pytest.mark.parametrize("kept", ["django"], indirect=True)
def test_tables_of_django_are_migrated_with_their_tasks(kept, place, tmp_path):
    before = kept.contents(place)
    django_project.migrate(place)
    assert kept.contents(place) == before
    (tmp_path / "other").mkdir()
    new = kept.new(tmp_path / "other")
    old_tables, new_tables = (
        [row for row in schema_of(Path(path)) if row[1].startswith("taskx_")]
        for path in (place, new)
    )
    assert old_tables == new_tables
