"""``taskx bench``: what it measures, and that it leaves the user's own tasks alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import PATIENCE, ROOT
from storage.repositories import TinyRepository

from cli.conftest import call
from taskx import ConfigurationError, MemoryRepository, Queue, SQLiteRepository, open_repository
from taskx.cli.measures import measure
from taskx.storage.adapter import EightMethodAdapter

NAMES = ["sync", "submit", "submit, 8 threads", "submit_many", "run", "start", "two processes"]


@pytest.mark.process
def test_every_measure_of_a_file_has_a_rate_and_a_meaning_and_nothing_stays_behind(database):
    with SQLiteRepository(database) as repository:
        queue = Queue(repository)
        queue.declare("mail")
        queue.submit("mail", id="mine")
    before = sorted(os.listdir(database.parent)), database.read_bytes()
    said = call("bench", "--repository", f"sqlite:///{database}", "--seconds", "0.6", "--json")
    assert said.code == 0
    assert [row["name"] for row in said.rows] == NAMES
    assert all(row["rate"] > 0 and row["meaning"].endswith(".") for row in said.rows)
    timed = [row["name"] for row in said.rows if row["p50"] is not None]
    assert timed == ["sync", "submit", "submit, 8 threads", "start"]
    assert all(row["p50"] <= row["p99"] for row in said.rows if row["p50"] is not None)
    assert (sorted(os.listdir(database.parent)), database.read_bytes()) == before
    assert said.err == ""


def test_memory_is_measured_in_this_process_alone():
    found = [each.name for each in measure(MemoryRepository(), 0.05, 2)]
    assert found == NAMES[1:-1]


def test_the_table_has_a_line_for_each_measure(taskx):
    said = taskx("bench", "--seconds", "0.05", "--workers", "2")
    assert said.lines[0].split() == ["MEASURE", "PER", "SECOND", "P50", "P99", "MEANING"]
    assert [line.split("  ")[0] for line in said.lines[1:]] == NAMES[1:-1]
    assert "ms" in said.lines[1]


def test_a_repository_of_eight_methods_cannot_be_measured():
    with pytest.raises(ConfigurationError, match="none to make a repository to measure on"):
        list(measure(EightMethodAdapter(TinyRepository()), 0.05, 2))


@pytest.mark.process
def test_a_measurement_that_is_interrupted_leaves_nothing_behind(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from taskx import SQLiteRepository\n"
        "from taskx.cli.measures import measure\n"
        "for found in measure(SQLiteRepository(sys.argv[1]), 0.6, 2):\n"
        "    if found.name == 'submit':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tasks.db")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "KeyboardInterrupt" in ran.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["mongo"], indirect=True)
def test_a_collection_beside_the_users_own_is_measured_and_dropped(url):
    with open_repository(url) as repository:
        queue = Queue(repository)
        queue.declare("mail")
        queue.submit("mail", id="mine")
        database = repository._connection.tasks.database
        before = sorted(database.list_collection_names())
        assert [each.name for each in measure(repository, 0.6, 2)] == NAMES[1:]
        assert sorted(database.list_collection_names()) == before
        assert [task.id for task in queue.iter_tasks()] == ["mine"]
