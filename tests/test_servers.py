"""Tests of the servers that other tests use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from helpers import ROOT, eventually
from postgres_server import private

pytestmark = [pytest.mark.postgres, pytest.mark.process]


def test_a_killed_postgresql_starts_again_with_all_that_was_committed():
    with private() as server:
        name = server.new_database()
        connection = server.connect(name)
        connection.execute("CREATE TABLE written (n INTEGER)")
        connection.execute("INSERT INTO written VALUES (1)")
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("INSERT INTO written VALUES (2)")
        connection.close()
        with pytest.raises(psycopg.OperationalError):
            server.connect(name)
        server.start()
        with server.connect(name) as again:
            assert again.execute("SELECT n FROM written").fetchall() == [(1,)]


def test_postgresql_ends_when_the_tests_are_killed():
    program = (
        "import sys, postgres_server as it\nprint(it.shared().data, flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert child.stdout is not None
    process = Path(child.stdout.readline().strip(), "postmaster.pid")
    assert process.exists()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    eventually(lambda: not process.exists())
    # Another test process may have begun to remove it: no living process locks it.
    shutil.rmtree(process.parents[1], ignore_errors=True)
