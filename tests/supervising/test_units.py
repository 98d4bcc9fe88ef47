"""The examples of ``taskx worker``: the unit of systemd, the container, and the program that they run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import PATIENCE, ROOT, eventually

from taskx import Queue, SQLiteRepository
from taskx.programs.cli.app import make_group

EXAMPLES = ROOT / "examples"
UNIT = (EXAMPLES / "taskx.service").read_text()
DOCKERFILE = (EXAMPLES / "Dockerfile").read_text()


def unit_command():
    """Return the words after the name of the program in the unit."""
    found = re.search(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    return shlex.split(found[1])[1:]


def container_command():
    """Return the words after the name of the program in the Dockerfile."""
    found = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(found[1])[1:]


@pytest.mark.process
def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOT VERIFIED: this system has no systemd-analyze, so the unit was not checked")
    unit = tmp_path / "taskx.service"
    # The program of the unit is not installed here, and verify asks for it.
    program, folder = "/srv/app/.venv/bin/taskx", "WorkingDirectory=/srv/app"
    assert program in UNIT
    unit.write_text(UNIT.replace(program, sys.executable).replace(folder, "WorkingDirectory=/"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    complaints = [line for line in ran.stderr.splitlines() if "taskx.service" in line]
    assert (ran.returncode, complaints) == (0, []), ran.stderr


@pytest.mark.parametrize("words", [unit_command(), container_command()], ids=["unit", "container"])
def test_the_command_line_accepts_the_commands(words, monkeypatch):
    started = []
    monkeypatch.setattr(
        "taskx.programs.cli.worker.supervise", lambda settings: started.append(settings)
    )
    result = CliRunner().invoke(make_group(), words)
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.target == "worker_app:queue"


def test_the_managers_wait_longer_than_the_stop_time_out():
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    words = unit_command()
    assert words[words.index("--stop-timeout") + 1] == "30s"
    assert int(seconds) > 35


@pytest.mark.process
def test_the_container_runs_tasks_and_is_healthy(tmp_path):
    shutil.copy(EXAMPLES / "worker_app.py", tmp_path)
    (tmp_path / "text").write_text("one two two three three three")
    health = tmp_path / "health"
    words = [word.replace("/tmp/taskx-health", str(health)) for word in container_command()]
    database = tmp_path / "tasks.db"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TASKX_DB": str(database)}
    command = [sys.executable, "-m", "taskx", *words]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, cwd=tmp_path, env=environment))
        stack.callback(process.kill)
        eventually(health.exists)
        check = re.search(r"CMD (test .*)$", DOCKERFILE, re.MULTILINE)[1]
        probe = check.replace("/tmp/taskx-health", str(health))
        assert subprocess.run(probe, shell=True).returncode == 0
        with SQLiteRepository(database) as repository:
            queue = Queue(repository)
            queue.declare("count_words")
            handle = queue.submit("count_words", {"path": str(Path(tmp_path, "text")), "most": 2})
            assert handle.result(timeout=PATIENCE) == {"three": 3, "two": 2}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert not health.exists()
