"""What the documentation says of systems other than Linux, as far as it can be tested on Linux."""

from __future__ import annotations

import configparser

import pytest
from helpers import ROOT

# Started with the path of a file. It hides what Windows does not have, before TaskX is imported.
ELSEWHERE = """
import os, select, sys

sys.modules["fcntl"] = sys.modules["pwd"] = sys.modules["resource"] = None
MISSING = "fork register_at_fork getuid killpg mkfifo O_CLOEXEC O_NOFOLLOW O_NONBLOCK"
for name in MISSING.split():
    delattr(os, name)
for name in ("poll", "epoll"):
    delattr(select, name)

import taskx
from taskx import MemoryRepository, MongoRepository, Queue, SQLiteRepository

assert all(getattr(taskx, name) for name in taskx.__all__)

def run(repository):
    queue = Queue(repository)

    @queue.executor()
    def add(a, b):
        return a + b

    with queue:
        assert add.submit(a=1, b=2).result(60) == 3
        assert list(queue.map(add, [{"a": 1, "b": n} for n in range(3)])) == [1, 2, 3]
    repository.close()
    print("ran", flush=True)
"""


def test_a_system_without_posix_calls_can_import_taskx_and_run_tasks(spawn, database):
    child = spawn(
        f"""{ELSEWHERE}
run(MemoryRepository())
run(SQLiteRepository(sys.argv[1]))
""",
        database,
    )
    assert [child.read(), child.read()] == ["ran", "ran"]
    _, errors = child.ends()
    assert (child.process.returncode, "Traceback" in errors) == (0, False), errors


@pytest.mark.mongo
def test_a_system_without_posix_calls_can_use_mongodb(spawn, mongo_server):
    """Leases tell which nodes live."""
    child = spawn(
        f"""{ELSEWHERE}
import pymongo
client = pymongo.MongoClient(sys.argv[1])
database = client["taskx_without_posix"]
run(MongoRepository(database))
client.drop_database(database.name)
client.close()
""",
        mongo_server("standalone"),
    )
    assert child.read() == "ran"
    _, errors = child.ends()
    assert (child.process.returncode, "Traceback" in errors) == (0, False), errors


def test_the_page_names_the_systems_and_pythons_of_the_package():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    classifiers = settings["metadata"]["classifiers"].split("\n")
    prefix = "Programming Language :: Python :: 3."
    pythons = [line.removeprefix(prefix) for line in classifiers if line.startswith(prefix)]
    page = (ROOT / "docs" / "guarantees.rst").read_text()
    said = page.partition("Platforms\n---------\n")[2]
    assert f"CPython 3.{pythons[0]} to 3.{pythons[-1]}" in said
    assert "Operating System :: POSIX :: Linux" in classifiers
    assert not [line for line in classifiers if "Windows" in line]
    assert ("Free-threaded Python  tested" in said) == any(
        "Free Threading" in c for c in classifiers
    )
