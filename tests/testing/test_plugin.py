"""The pytest plugin: how it is found, its fixtures, and what it leaves alone."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from taskx import MemoryRepository, Queue
from taskx.testing import (
    InlineQueue,
    ManualClock,
    ManualQueue,
    PrimitivesContract,
    RepositoryContract,
)

ROOT = Path(__file__).parent.parent.parent

app_queue = Queue(MemoryRepository())


@app_queue.executor("add")
def add(a, b):
    return a + b


# The fixtures


def test_taskx_queue_is_a_manual_queue(taskx_queue, taskx_clock):
    assert type(taskx_queue) is ManualQueue
    assert isinstance(taskx_clock, ManualClock)
    assert taskx_queue.clock is taskx_clock


@pytest.mark.taskx(mode="inline")
def test_the_marker_makes_it_an_inline_queue(taskx_queue):
    assert type(taskx_queue) is InlineQueue


@pytest.mark.taskx(queue=app_queue)
def test_the_marker_gives_the_queue_to_replace(taskx_queue, taskx_clock):
    assert taskx_queue is app_queue
    handle = add.submit(a=1, b=2)
    taskx_clock.advance(5)
    assert [task.result for task in taskx_queue.run_all()] == [3]
    assert handle.result() == 3


@pytest.mark.taskx(queue=f"{__name__}:app_queue", mode="inline")
def test_the_marker_gives_the_name_of_the_queue(taskx_queue):
    assert add.submit(a=1, b=2).result() == 3
    taskx_queue.assert_submitted("add", times=1)


def test_the_queue_is_restored_after_each_test():
    assert type(app_queue) is Queue
    assert app_queue.list_tasks()[1] == 0


# Found by pytest itself


def entry_points() -> dict[str, str]:
    """The entry points for pytest that the project declares: modules by name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["pytest11"].split("\n")
    return dict(line.split(" = ") for line in lines if line)


def test_the_plugin_is_declared_and_loads():
    """And is in the package that is built."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    [(name, module)] = entry_points().items()
    assert name == "taskx"
    assert module in config["options"]["py_modules"].split()
    assert hasattr(importlib.import_module(module), "taskx_queue")


class Project:
    """A folder with tests, in which TaskX is as good as installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        installed = folder / "site" / "taskx_queue-0.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: taskx-queue\nVersion: 0\n"
        )
        lines = [f"{name} = {module}" for name, module in entry_points().items()]
        (installed / "entry_points.txt").write_text("[pytest11]\n" + "\n".join(lines) + "\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(textwrap.dedent(text))

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder / "site"), str(self.folder), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-X", "utf8", *args],
            cwd=self.folder,
            env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def pytest(self, *args: str) -> str:
        """Run its tests, all warnings being errors; return what pytest says."""
        ran = self.run("-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *args)
        assert ran.stderr == ""
        return ran.stdout


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


APP = """
from taskx import Queue, SQLiteRepository

queue = Queue(SQLiteRepository("production.db"))
mails = []

@queue.executor("mail", timeout=10)
def mail(ctx, to):
    ctx.progress(50)
    mails.append(to)

def sign_up(name):
    mail.submit(to=name)
"""


@pytest.mark.process
@pytest.mark.parametrize("more", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_project_uses_the_fixtures_without_any_import(project, more):
    project.write("app.py", APP)
    project.write("pytest.ini", "[pytest]\ntaskx_queue = app:queue\naddopts = --strict-markers\n")
    project.write(
        "test_app.py",
        """
        import app, pytest

        @pytest.mark.parametrize("number", range(4))
        def test_manual(taskx_queue, number):
            app.sign_up("ann")
            taskx_queue.assert_submitted("mail", params={"to": "ann"}, times=1)
            assert [task.progress for task in taskx_queue.run_all()] == [100]

        @pytest.mark.taskx(mode="inline")
        def test_inline(taskx_queue):
            app.sign_up("bob")
            assert app.mails[-1] == "bob"
        """,
    )
    said = project.pytest("--strict-config", *more)
    assert "5 passed" in said, said
    assert not (project.folder / "production.db").exists()


@pytest.mark.process
def test_pytest_lists_the_fixtures_and_the_marker(project):
    fixtures = project.pytest("--fixtures")
    assert "taskx_queue" in fixtures
    assert "taskx_clock" in fixtures
    assert "@pytest.mark.taskx(mode=..., queue=...)" in project.pytest("--markers")


@pytest.mark.process
def test_a_failed_assertion_shows_the_line_of_the_test_only(project):
    project.write(
        "test_failing.py",
        """
        def test_submitted(taskx_queue):
            taskx_queue.assert_submitted("mail")

        def test_not_submitted(taskx_queue):
            taskx_queue.declare("mail")
            taskx_queue.submit("mail")
            taskx_queue.assert_not_submitted("mail")

        def test_in_order(taskx_queue):
            taskx_queue.assert_submitted_in_order("mail")
        """,
    )
    told = project.pytest()
    assert "3 failed" in told
    assert '>       taskx_queue.assert_submitted("mail")' in told
    assert "no task of type 'mail' was submitted" in told
    assert "raise AssertionError" not in told


@pytest.mark.process
def test_a_project_that_does_not_use_it_does_not_pay_for_it(project):
    """TaskX is not even imported; nothing is collected from it."""
    project.write("test_other.py", "def test_nothing(): pass")
    project.write(
        "conftest.py",
        """
        import sys

        def pytest_sessionfinish():
            assert "pytest_taskx" in sys.modules
            assert [name for name in sys.modules if name.startswith("taskx")] == []
        """,
    )
    said = project.pytest()
    assert "1 passed" in said, said


@pytest.mark.process
def test_names_of_the_kit_are_not_collected_as_tests(project):
    project.write(
        "test_import.py", "from taskx.testing import *\n\ndef test_one(taskx_queue): pass\n"
    )
    said = project.pytest()
    assert "1 passed" in said, said


@pytest.mark.process
@pytest.mark.parametrize(
    ("ini", "marks"),
    [
        ("taskx_mode = eager", {"": "must be 'manual' or 'inline', not 'eager'"}),
        ("taskx_queue = app.queue", {"": "must name a module and a queue in it"}),
        (
            "",
            {
                "mode='never'": "must be 'manual' or 'inline', not 'never'",
                "clock=1": "takes mode=... and queue=... only",
                "'inline'": "takes mode=... and queue=... only",
            },
        ),
    ],
)
def test_a_mistake_in_the_settings_is_explained(project, ini, marks):
    project.write("pytest.ini", f"[pytest]\n{ini}\n")
    test = "@pytest.mark.taskx({})\ndef test_{}(taskx_queue): pass\n"
    tests = [test.format(mark, number) for number, mark in enumerate(marks)]
    project.write("test_app.py", "\n".join(["import pytest", *tests]))
    _, *said = re.split(r"^_+ ERROR at setup of ", project.pytest(), flags=re.MULTILINE)
    assert len(said) == len(marks)
    assert all(map(str.__contains__, said, marks.values()))


@pytest.mark.process
def test_the_kit_works_without_pytest(project):
    project.write(
        "program.py",
        """
        import sys
        from taskx import SQLiteRepository
        from taskx.testing import ManualQueue

        queue = ManualQueue(SQLiteRepository("tasks.db"))
        queue.executor("fine")(lambda: None)
        queue.submit("fine")
        queue.submit("fine", delay=60)
        assert len(queue.run_all()) == 1
        assert "pytest" not in sys.modules
        """,
    )
    ran = project.run("-W", "error", "program.py")
    assert (ran.returncode, ran.stderr) == (0, "")


# Other test runners


UNITTEST = """
import unittest
import app
from taskx.testing import inline, manual

class Base(unittest.TestCase):
    def setUp(self):
        replaced = manual(app.queue)
        self.queue = replaced.__enter__()
        self.addCleanup(replaced.__exit__, None, None, None)

    def test_manual(self):
        app.sign_up("ann")
        self.assertEqual([], self.queue.list_tasks()[0][0].attempts)
        self.queue.run_all()
        self.assertEqual(["ann"], app.mails)
        app.mails.clear()

@inline(app.queue)
def in_a_function():
    app.sign_up("bob")
    return app.mails.pop()

class Functions(unittest.TestCase):
    def test_inline(self):
        self.assertEqual("bob", in_a_function())

    @inline(app.queue)
    def test_decorated(self):
        app.sign_up("eve")
        self.assertEqual("eve", app.mails.pop())
"""


@pytest.mark.process
@pytest.mark.parametrize("runner", ["unittest", "pytest"])
def test_it_works_in_a_unittest_test_case(project, runner):
    project.write("app.py", APP)
    project.write("test_unit.py", UNITTEST)
    ran = project.run("-W", "error", "-m", runner, "test_unit.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Ran 3 tests" in ran.stderr or "3 passed" in ran.stdout
    assert not (project.folder / "production.db").exists()


@pytest.mark.process
def test_a_unittest_test_case_can_use_the_fixture(project):
    project.write("app.py", APP)
    project.write(
        "test_unit.py",
        """
        import app, pytest, unittest

        @pytest.mark.taskx(queue=app.queue, mode="inline")
        @pytest.mark.usefixtures("taskx_queue")
        class Tasks(unittest.TestCase):
            def test_inline(self):
                app.sign_up("ann")
                self.assertEqual("ann", app.mails.pop())
                app.queue.assert_submitted("mail")
        """,
    )
    said = project.pytest()
    assert "1 passed" in said, said


SETTINGS = """
SECRET_KEY = "for tests"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
"""

DJANGO_APP = """
from django.contrib.auth.models import User
from django.db import transaction
from taskx import Queue, SQLiteRepository

queue = Queue(SQLiteRepository("production.db"))

@queue.executor("create user")
def create_user(name):
    return User.objects.create(username=name).pk

@queue.executor("count users")
def count_users():
    return User.objects.count()

def sign_up(name):
    with transaction.atomic():
        User.objects.create(username=name)
        transaction.on_commit(lambda: create_user.submit(name=name + " friend"))
"""

DJANGO_TESTS = """
from django.contrib.auth.models import User
from django.test import TestCase
from taskx.testing import inline, manual

class Tasks(TestCase):
    @classmethod
    def setUpTestData(cls):
        User.objects.create(username="first")

    def setUp(self):
        import app
        self.app = app
        replaced = inline(app.queue)
        self.queue = replaced.__enter__()
        self.addCleanup(replaced.__exit__, None, None, None)

    def test_an_executor_sees_what_the_test_has_not_committed(self):
        User.objects.create(username="second")
        self.assertEqual(2, self.app.count_users.submit().result())

    def test_what_an_executor_writes_is_rolled_back_after_the_test(self):
        self.app.create_user.submit(name="third").result()
        self.assertEqual(2, User.objects.count())

    def test_what_is_submitted_on_commit_runs(self):
        with self.captureOnCommitCallbacks(execute=True):
            self.app.sign_up("ann")
            self.queue.assert_not_submitted()
        self.queue.assert_submitted("create user", params={"name": "ann friend"})
        self.assertTrue(User.objects.filter(username="ann friend").exists())

    def test_manual(self):
        with manual(self.app.queue) as queue:
            handle = self.app.create_user.submit(name="later")
            self.assertFalse(User.objects.filter(username="later").exists())
            queue.run_all()
            self.assertEqual(handle.result(), User.objects.get(username="later").pk)
"""


@pytest.mark.process
def test_it_works_in_a_django_test_case(project):
    """With the test runner of Django."""
    project.write("settings.py", SETTINGS)
    project.write("app.py", DJANGO_APP)
    project.write("test_django.py", DJANGO_TESTS)
    ran = project.run("-W", "error", "-m", "django", "test", "--settings", "settings")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Ran 4 tests" in ran.stderr
    assert not (project.folder / "production.db").exists()


@pytest.mark.process
@pytest.mark.parametrize("name", ["testing", "faults", "own-repository"])
def test_the_examples_of_a_page_are_tests_that_pass(project, name):
    """All snippets of a page together are a test module, or those with the contracts of repositories."""
    page = (ROOT / "docs" / f"{name}.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", page, re.M)
    if name == "own-repository":
        blocks = [block for block in blocks if "Contract" in block]
    project.write("test_page.py", "\n".join(textwrap.dedent(block) for block in blocks))
    said = project.pytest()
    [passed] = map(int, re.findall(r"(\d+) passed", said))
    inherited = passed - page.count("    def test_")
    contracts = len([*RepositoryContract.__dict__, *PrimitivesContract.__dict__])
    assert 0 < inherited < contracts if name == "own-repository" else inherited == 0, said
    assert re.search("failed|error", said) is None
