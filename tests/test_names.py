"""The names that Tab offers on the objects of a user: each of them is in the documentation."""

from __future__ import annotations

import enum
import re
import sqlite3
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE

import taskx
from taskx import Config, Queue, SQLiteRepository, Task

ROOT = Path(taskx.__file__).parent.parent
#: The pages for users. Pages of the design are for maintainers.
PAGES = [p for p in [ROOT / "README.rst", *ROOT.glob("docs/*.rst")] if "design" not in p.name]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)


def names(thing: Any) -> list[str]:
    """Return the public names of an object or a class, without those of classes that are not ours."""
    kind = thing if isinstance(thing, type) else type(thing)
    others = [set(vars(base)) for base in kind.__mro__ if not base.__module__.startswith("taskx")]
    return [name for name in dir(thing) if name[0] != "_" and name not in set().union(*others)]


def undocumented(thing: Any, before: str) -> list[str]:
    """Return the names of an object that no page has after one of these texts."""
    return [n for n in names(thing) if not re.search(rf"({before}){n}\b", TEXT)]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The objects that a user holds, by the name that the pages give them."""
    path = tmp_path_factory.mktemp("names") / "app.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE rows (n)")
    repository = SQLiteRepository(path, prefix="taskx_")
    queue = Queue(repository, Config(worker_num=1))
    found: dict[str, Any] = {"queue": queue}

    @queue.executor()
    def look(ctx, n: int = 0):
        with ctx.transaction() as tx:
            found.update(ctx=ctx, token=ctx.token, tx=tx)

    found["handle"] = look.submit()
    found["executor"], found["bound"] = look, look.using(priority=1)
    found["flow"] = queue.submit_flow(taskx.group(Task(type="look"), Task(type="look")))
    found["schedule"] = queue.schedule("s", taskx.every(60), "look")
    found["results"] = queue.map(look, [{"n": 1}])
    queue.start()
    found["handle"].result(PATIENCE)
    yield found
    queue.close()
    repository.close()


@pytest.mark.parametrize("name", ["queue", "handle", "ctx", "tx"])
def test_the_pages_call_each_name_on_the_object(held, name):
    assert undocumented(held[name], rf"\b{name}\.|\b(later|first)\.") == []


def test_a_handle_offers_no_method_that_sets_its_result(held):
    assert {*dir(held["handle"])} & {*dir(Future)} > {"result", "add_done_callback"}
    assert not [name for name in dir(held["handle"]) if name.startswith("set_")]


@pytest.mark.parametrize("name", ["token", "executor", "bound", "flow", "schedule", "results"])
def test_the_pages_have_each_name_of_the_object(held, name):
    assert undocumented(held[name], r"\.|``") == []


def test_the_pages_have_each_name_of_the_public_classes():
    classes = [c for c in map(vars(taskx).get, taskx.__all__) if isinstance(c, type)]
    found = {
        c.__name__: undocumented(c, r"\.|``|\b(?=\w+=)")
        for c in classes
        if not (issubclass(c, (enum.Enum, int)) or c.__name__.endswith("Repository"))
    }
    assert {name: missing for name, missing in found.items() if missing} == {}
