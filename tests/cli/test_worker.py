"""``taskx worker``: from its options to the settings of the supervisor, and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from helpers import PATIENCE, ROOT, eventually

from cli.conftest import call
from taskx import SQLiteRepository
from taskx.programs.worker.settings import Settings


@pytest.fixture
def supervised(monkeypatch):
    """The settings of each supervisor that was started; none is really started."""
    started = []

    def supervise(settings):
        started.append(settings)
        return 75

    monkeypatch.setattr("taskx.programs.cli.worker.supervise", supervise)
    return started


def test_the_defaults_are_one_process_and_thirty_seconds_to_stop(supervised):
    said = call("worker", "app:queue")
    assert said.code == 75
    assert supervised == [Settings(target="app:queue")]


def test_every_option_becomes_a_setting(supervised):
    words = (
        "worker app:queue --processes 4 --threads 8 --stop-timeout 2m --max-tasks 1000 --max-memory 500M "
        "--max-age 12h --health-file health --health-port 8080 --health-host 0.0.0.0 --reload "
        "--log-level debug"
    )
    call(*words.split())
    assert supervised == [
        Settings(
            target="app:queue",
            processes=4,
            threads=8,
            stop_timeout=120.0,
            max_tasks=1000,
            max_memory=500 << 20,
            max_age=43200.0,
            health_file="health",
            health_port=8080,
            health_host="0.0.0.0",
            reload=True,
            log_level="DEBUG",
        )
    ]


def test_the_queue_may_be_named_by_the_option_of_all_commands(supervised):
    call("--app", "app:queue", "worker")
    assert supervised == [Settings(target="app:queue")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("worker", "which queue? Write taskx worker module:queue"),
        ("worker app", "write module:name, such as app:queue"),
        ("--repository sqlite:///a.db worker app:queue", "leave out --repository"),
        ("worker app:queue --processes 0", "Invalid value for '--processes'"),
        ("worker app:queue --max-memory much", "is not a size: write it as 500M or 2G"),
        ("worker app:queue --stop-timeout soon", "is not a duration"),
    ],
)
def test_a_wrong_call_starts_nothing_and_says_what_is_wrong(supervised, words, said):
    answer = call(*words.split())
    assert (answer.code, answer.out, supervised) == (2, "", [])
    assert said in answer.err


@pytest.mark.process
def test_the_command_runs_tasks_until_it_is_told_to_stop(tmp_path):
    (tmp_path / "app.py").write_text(
        "from taskx import Queue, SQLiteRepository\n"
        "queue = Queue(SQLiteRepository('tasks.db'))\n"
        "queue.executor('fine')(lambda: 'fine')\n"
        "queue.submit('fine', id='x', on_conflict='return', unique_key='x')\n"
    )
    command = [sys.executable, "-m", "taskx", "worker", "app:queue", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
        stack.callback(process.kill)
        repository = stack.enter_context(SQLiteRepository(tmp_path / "tasks.db"))
        eventually(repository.nodes)
        eventually(lambda: repository.get_by_id("x").result == "fine")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "1 workers, types fine" in errors
    assert "Traceback" not in errors


@pytest.mark.process
def test_a_queue_that_does_not_exist_is_a_wrong_call(tmp_path):
    command = [sys.executable, "-m", "taskx", "worker", "no_such_app:queue"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "there is no module 'no_such_app'" in ran.stderr
    assert "Traceback" not in ran.stderr
