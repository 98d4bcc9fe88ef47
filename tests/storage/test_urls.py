"""Repositories of other packages, by the scheme of their URL."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli.conftest import call

from taskx import ConfigurationError, MemoryRepository, Queue, open_repository
from taskx.stores.options import seconds_of, split

PACKAGE = """
from taskx import ZlibCodec
from taskx.repository.example import ExampleRepository

def open_example(url, codec=None):
    return ExampleRepository(url.partition("://")[2], codec=codec)

def open_nothing(url, codec=None):
    return url

def open_locked(url, codec=None):
    raise KeyError("no lock")
"""
ENTRIES = """
[taskx.repositories]
shelf = taskx_shelf:open_example
nothing = taskx_shelf:open_nothing
locked = taskx_shelf:open_locked
gone = taskx_shelf:gone
missing = taskx_of_nobody:open
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that opens repositories."""
    folder = tmp_path / "site"
    about = folder / "taskx_shelf-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "taskx_shelf.py").write_text(PACKAGE)
    (about / "entry_points.txt").write_text(ENTRIES)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: taskx-shelf\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "taskx_shelf", raising=False)


def test_a_package_opens_the_urls_of_its_scheme(tmp_path):
    url = f"shelf://{tmp_path}/tasks.db"
    queue = Queue(open_repository(url))
    queue.declare("email")
    queue.submit("email", id="one")
    queue.close()
    assert call("list", "--json", "--repository", url).rows[0]["id"] == "one"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///jobs#2.db", "write %23 for a # in the name of a file"),
        ("duckdb:///tasks.db", r"or install the package for duckdb://, with an entry point"),
        ("nothing://x", "taskx_shelf:open_nothing must return a TaskRepository, not 'nothing://x'"),
        ("locked://user:secret@x", r"'\*\*\*@x': taskx_shelf:open_locked raised KeyError"),
        ("gone://user:secret@x", r"'\*\*\*@x': taskx_shelf:gone cannot be imported"),
        (
            "missing://x",
            "taskx_of_nobody:open cannot be imported: No module named 'taskx_of_nobody'",
        ),
    ],
)
def test_a_url_that_nothing_opens_is_refused(url, message):
    with pytest.raises(ConfigurationError, match=message):
        open_repository(url)
    assert call("list", "--repository", url).code == 2


@pytest.mark.parametrize("query", ["", "?host=/var/run/postgresql&prefix=taskx_"])
def test_a_url_of_postgresql_needs_no_host(query):
    """Then it is on this host, or where the query says."""
    pytest.importorskip("psycopg")
    made = open_repository(f"postgresql:///shop{query}")
    where = "@/var/run/postgresql" if query else ""
    assert repr(made) == f"PostgresRepository('shop{where}', prefix='taskx_')"


@pytest.mark.parametrize(
    "query", ["options=-c%20search_path%3Dtasks", "password=a+b%20c", "sslmode"]
)
def test_the_driver_gets_its_options_as_they_were_written(query):
    """Drivers differ in what a ``+`` is."""
    known = {"prefix": str, "timeout": seconds_of}
    url, options = split(f"postgresql://host/db?prefix=a%2Bb+c&{query}&timeout=5", known)
    assert (url, options) == (
        f"postgresql://host/db?{query}",
        {"prefix": "a+b c", "timeout": 5.0},
    )


def test_the_schemes_of_taskx_are_its_own(monkeypatch):
    assert isinstance(open_repository("memory://"), MemoryRepository)
