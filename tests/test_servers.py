"""Tests of the servers that other tests use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mariadb_server
import pymysql
import pytest
from helpers import ROOT, eventually
from postgres_server import private

pytestmark = pytest.mark.process


@pytest.mark.postgres
def test_a_killed_postgresql_starts_again_with_all_that_was_committed():
    psycopg = pytest.importorskip("psycopg")
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


@pytest.mark.mariadb
def test_a_killed_mariadb_starts_again_with_all_that_was_committed():
    with mariadb_server.private() as server:
        name = server.new_database()
        server.execute("CREATE TABLE written (n INTEGER)", name)
        server.execute("INSERT INTO written VALUES (1)", name)
        server.kill()
        with pytest.raises(pymysql.OperationalError):
            server.connect(name)
        server.start()
        assert server.execute("SELECT n FROM written", name) == ((1,),)


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_server_ends_when_the_tests_are_killed(kind):
    program = (
        f"import sys, {kind}_server as it\nprint(it.shared().folder, flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip())
    pid_file = {"postgres": "postmaster.pid", "mariadb": "pid"}[kind]
    server = int((folder / "data" / pid_file).read_text().split()[0])
    assert Path(f"/proc/{server}").exists()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    eventually(lambda: not Path(f"/proc/{server}").exists())
    # Another test process may have begun to remove it: no living process locks it.
    shutil.rmtree(folder, ignore_errors=True)
