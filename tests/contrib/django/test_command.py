"""``manage.py taskx``: the command line on the queue of a backend, and the worker."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import django
import pytest
from django.core.management import CommandError, call_command
from django.db import transaction
from helpers import ROOT, eventually

from taskx import Queue, SQLiteRepository, TaskStatus
from taskx.contrib.django.management.commands.taskx import Command, _without_settings
from taskx.contrib.django.queues import get_queue

HAS_TASKS = django.VERSION >= (6, 0) or find_spec("django_tasks") is not None


# --- in this process


def call(*words: str) -> str:
    out = io.StringIO()
    call_command("taskx", *words, stdout=out)
    return out.getvalue()


def test_a_command_is_about_the_tasks_of_the_site(site):
    queue = get_queue()
    queue.declare("mail")
    task_id = queue.submit("mail", {"to": "ann"}).id
    [line] = call("list", "type:mail", "--json").splitlines()
    assert json.loads(line)["id"] == task_id
    assert "cancelled" in call("cancel", task_id)
    assert queue.get_task_status(task_id).status is TaskStatus.CANCELLED


def test_a_command_that_fails_raises_command_error_with_its_exit_code(site):
    with pytest.raises(CommandError, match="nobody") as caught:
        call("show", "nobody")
    assert caught.value.returncode == 3
    with pytest.raises(CommandError, match="there is no command 'lst'"):
        call("lst")


def test_an_alias_that_does_not_exist_is_a_wrong_call(site):
    with pytest.raises(CommandError, match="TASKS has no alias 'reports'") as caught:
        call("list", "--backend", "reports")
    assert caught.value.returncode == 2


def test_help_texts_say_what_to_type(site):
    text = call("requeue", "--help")
    assert "$ manage.py taskx requeue" in text
    assert "$ taskx" not in text
    assert "--backend ALIAS" in text
    assert "--repository" not in text
    worker = call("worker", "--help")
    assert "$ manage.py taskx worker --queue emails" in worker
    assert "--backend ALIAS" in worker
    assert "QUEUE is module:name" not in worker
    with redirect_stdout(io.StringIO()) as out:
        Command().print_help("manage.py", "taskx")
    assert "import-beat" in out.getvalue()


def test_a_command_commits_what_it_does_without_autocommit_too(site, capsys):
    get_queue().declare("mail")
    transaction.set_autocommit(False)
    with pytest.raises(SystemExit) as ended:
        Command().run_from_argv(["manage.py", "taskx", "submit", "mail", "-p", "to=ann"])
    assert ended.value.code == 0
    task_id = capsys.readouterr().out.strip()
    assert get_queue().get_task_status(task_id).params == {"to": "ann"}


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["list", "--settings", "other", "-x"], ["list", "-x"]),
        (["--settings=other", "list", "--pythonpath", "a"], ["list"]),
        (["submit", "mail", "--", "--settings", "x"], ["submit", "mail", "--", "--settings", "x"]),
        (["list", "--settings"], ["list"]),
    ],
    ids=str,
)
def test_djangos_own_options_are_left_to_django(words, left):
    assert _without_settings(words) == left


# --- programs


SETTINGS = """\
from pathlib import Path

BASE_DIR = Path(__file__).parent
SECRET_KEY = "tests"
USE_TZ = True
INSTALLED_APPS = ["taskx.contrib.django", "shop"]
TASKS = {
    "default": {
        "BACKEND": "taskx.contrib.django.TaskxBackend",
        "QUEUES": ["default", "emails"],
        "OPTIONS": {"repository": f"sqlite:///{BASE_DIR}/tasks.db"},
    },
    "other": {
        "BACKEND": "taskx.contrib.django.TaskxBackend",
        "OPTIONS": {"repository": f"sqlite:///{BASE_DIR}/other.db"},
    },
}
"""

TASKS = """\
import os

from taskx import every
from taskx.contrib.django import schedule, task

@task
def report():
    return ["report", os.getpid()]

@task(queue_name="emails")
def mail(to):
    return ["mail", to]

schedule("nightly", every(3600), report)
"""

MANAGE = """\
import os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site whose tasks are in a file of their own."""
    (tmp_path / "shop").mkdir()
    for name, text in {
        "settings.py": SETTINGS,
        "manage.py": MANAGE,
        "shop/__init__.py": "",
        "shop/tasks.py": TASKS,
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def command(*words: str) -> list[str]:
    return [sys.executable, "manage.py", "taskx", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@contextmanager
def worker(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker in the folder; it is killed at the end if it still runs."""
    with subprocess.Popen(
        command("worker", *words),
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def submit(folder: Path, *words: str) -> str:
    done = run(folder, "submit", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tasks_of(folder: Path, name: str = "tasks.db") -> Any:
    return Queue(SQLiteRepository(folder / name))


needs_tasks = pytest.mark.skipif(not HAS_TASKS, reason="this Django has no tasks")


@needs_tasks
@pytest.mark.process
def test_a_worker_sets_django_up_in_its_processes_and_runs_the_tasks_of_all_queue_names(folder):
    with worker(folder, "--processes", "2") as process:
        queue = tasks_of(folder)
        eventually((folder / "tasks.db").exists)
        eventually(lambda: len(queue.nodes()) == 2)
        ids = [
            submit(folder, "shop.tasks.report"),
            submit(folder, "shop.tasks.mail@emails", "-p", "to=ann"),
        ]
        (kind, pid), mail = (queue.handle(task_id).result(timeout=60) for task_id in ids)
        assert (kind, mail) == ("report", ["mail", "ann"])
        assert pid in {node.pid for node in queue.nodes()} - {process.pid}
        assert queue.schedules()["nightly"].type == "shop.tasks.report"
        process.terminate()
        assert process.wait(60) == 0
        queue.close()


@needs_tasks
@pytest.mark.process
def test_a_worker_may_be_for_some_queue_names_only(folder):
    with worker(folder, "--queue", "emails"):
        queue = tasks_of(folder)
        eventually((folder / "tasks.db").exists)
        eventually(queue.nodes)
        report = submit(folder, "shop.tasks.report")
        mail = submit(folder, "shop.tasks.mail@emails", "-p", "to=ann")
        assert queue.handle(mail).result(timeout=60) == ["mail", "ann"]
        assert queue.get_task_status(report).status is TaskStatus.PENDING
        assert [reason.kind for reason in queue.why(report)] == ["no_node"]
        queue.close()


@needs_tasks
@pytest.mark.process
def test_the_backend_is_chosen_by_its_alias(folder):
    with worker(folder, "--backend", "other"):
        eventually((folder / "other.db").exists)
        queue = tasks_of(folder, "other.db")
        eventually(queue.nodes)
        queue.close()
    done = run(folder, "nodes", "--backend", "other", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert run(folder, "list").returncode == 5  # the file of the backend "default" does not exist


@needs_tasks
@pytest.mark.process
def test_a_misspelt_queue_name_ends_the_worker_at_once(folder):
    done = run(folder, "worker", "--queue", "email")
    assert done.returncode == 2
    assert done.stderr == (
        "taskx: TASKS['default']['QUEUES'] has no queue name 'email'; did you mean 'emails'?\n"
    )


@needs_tasks
@pytest.mark.process
def test_a_wrong_call_is_one_line_that_names_the_program(folder):
    done = run(folder, "list", "--lmit", "3")
    assert done.returncode == 2
    assert done.stderr.endswith("; see manage.py taskx list --help\n")
    assert len(done.stderr.splitlines()) == 1
    assert "$ manage.py taskx list" in run(folder, "list", "--help").stdout
