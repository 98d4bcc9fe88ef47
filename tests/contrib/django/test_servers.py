"""The queue in real servers: one in each process that serves requests, none in commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django_project
import pytest
from helpers import PATIENCE, ROOT, eventually
from mongo_server import free_port

from taskx import SQLiteRepository, Task, TaskStatus
from taskx.contrib.django import DjangoRepository
from taskx.stores.base import Repository

pytestmark = pytest.mark.process

FILES = {
    "settings.py": """
        from pathlib import Path

        BASE_DIR = Path(__file__).parent
        SECRET_KEY = "tests"
        DEBUG = True
        ALLOWED_HOSTS = ["*"]
        USE_TZ = True
        ROOT_URLCONF = "urls"
        INSTALLED_APPS = ["shop"]
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "site.db"}}
        DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
        TASKS = {"default": {"BACKEND": "taskx.contrib.django.TaskxBackend"}}
    """,
    "manage.py": """
        import os, sys
        from django.core.management import execute_from_command_line

        os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
        execute_from_command_line(sys.argv)
    """,
    "served.py": """
        import os
        from django.core.asgi import get_asgi_application
        from django.core.wsgi import get_wsgi_application

        os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
        wsgi, asgi = get_wsgi_application(), get_asgi_application()
    """,
    "shop/__init__.py": "",
    "shop/tasks.py": """
        import os, time
        try:
            from django.tasks import task
        except ImportError:
            from django_tasks import task

        VERSION = 1

        @task
        def who():
            return [VERSION, os.getpid()]

        @task(takes_context=True)
        def slow(context):
            context.taskx.logger.info("begins")
            if VERSION == 1 and context.attempt == 1:
                context.taskx.sleep(300)
            return [VERSION, os.getpid()]

        @task(takes_context=True)
        def hold(context):
            if context.attempt == 1:
                time.sleep(300)  # blocks on purpose
            return [VERSION, os.getpid()]
    """,
    "shop/letters.py": """
        from shop.tasks import task

        @task
        def letter(name):
            return f"Dear {name}"
    """,
    "urls.py": """
        import os
        from django.http import JsonResponse
        from django.urls import path
        from shop import tasks

        def enqueue(request, name):
            return JsonResponse({"id": getattr(tasks, name).enqueue().id, "pid": os.getpid()})

        async def aenqueue(request, name):
            result = await getattr(tasks, name).aenqueue()
            return JsonResponse({"id": result.id, "pid": os.getpid()})

        urlpatterns = [path("enqueue/<name>", enqueue), path("aenqueue/<name>", aenqueue)]
    """,
}


class Site:
    """A Django project in a folder, and the programs that were started on it.

    Attributes:
        repository: the file with the tasks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in FILES.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(text))
        self.file = folder / "taskx.sqlite3"
        self.repository: Repository = SQLiteRepository(self.file)
        self.address = f"127.0.0.1:{free_port()}"
        self._log = (folder / "log").open("w+")
        self._started: list[subprocess.Popen[str]] = []
        paths = [str(folder), str(ROOT)]
        self._env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self._env.pop("DJANGO_SETTINGS_MODULE", None)

    def move_into_database(self) -> None:
        """Have the tasks stored in the database of the site."""
        with (self.folder / "settings.py").open("a") as file:
            file.write("INSTALLED_APPS += ['taskx.contrib.django']\n")
        self.run("manage.py", "migrate", "--verbosity", "0")
        self.repository.close()
        alias = f"server {self.folder}"
        django_project.make_sqlite(self.folder / "site.db", alias)
        self.repository = DjangoRepository(alias)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a server with ``python``; it has a group of processes of its own."""
        started = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self._env,
            stdout=self._log,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._started.append(started)
        return started

    def run(self, *arguments: str) -> str:
        """Run a program to its end; return what it printed."""
        ran = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def get(self, path: str) -> dict[str, Any]:
        """Return the answer to a request, once the server answers."""

        def answer() -> Any:
            try:
                with urllib.request.urlopen(
                    f"http://{self.address}/{path}", timeout=PATIENCE
                ) as page:
                    return json.load(page)
            except OSError:
                return None

        found: dict[str, Any] = eventually(answer)
        return found

    def record(self, task_id: str) -> Task:
        return self.repository.get_by_id(task_id)

    def result(self, task_id: str) -> Any:
        """Return the value of a task, once it has completed."""
        eventually(lambda: self.record(task_id).status is TaskStatus.COMPLETED)
        return self.record(task_id).result

    def pids(self) -> list[int]:
        """Return the processes that have a started queue."""
        return [node.about.pid for node in self.repository.liveness.nodes() if node.alive]

    def change(self, file: Path, text: str, pid: int) -> None:
        """Change a file of the program, until the process with this id has noticed and ended."""
        changed, log = 0.0, self.folder / "log"
        already = log.read_text().count(f"{file} changed, reloading")

        def noticed() -> bool:
            nonlocal changed
            if log.read_text().count(f"{file} changed, reloading") > already:
                return True
            if time.monotonic() - changed > 5:  # the reloader may not look at the files yet
                file.write_text(text)
                changed = time.monotonic()
            return False

        eventually(noticed)
        eventually(lambda: pid not in self.pids())  # without a change, which would reload it again

    def enqueue(self, call: str) -> str:
        """Enqueue a task with ``manage.py shell``; return its id."""
        code = f"from shop import letters, tasks; print(); print({call}.id)"
        return self.run("manage.py", "shell", "-c", code).split()[-1]

    def close(self) -> None:
        for started in self._started:
            try:
                os.killpg(started.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            started.wait(PATIENCE)
        self._log.seek(0)
        print(self._log.read()[-20_000:])
        self._log.close()
        self.repository.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def test_commands_start_nothing_and_make_no_file(site):
    site.run("manage.py", "check", "--deploy")
    site.run("manage.py", "migrate")
    site.run("-c", "import served, urls")  # what a server does before it serves
    assert not site.file.exists()
    code = (
        "import threading; from shop import tasks; result = tasks.who.enqueue(); print(); "
        "print(result.id, *[t.name for t in threading.enumerate() if 'taskx' in t.name])"
    )
    task_id = site.run("manage.py", "shell", "-c", code).split()[-1]
    assert site.record(task_id).status is TaskStatus.PENDING
    assert site.pids() == []


def test_under_runserver_tasks_run_with_no_request_and_go_on_after_a_reload(site):
    waiting = site.enqueue("tasks.who.enqueue()")
    server = site.start("manage.py", "runserver", site.address)
    version, first = site.result(waiting)
    assert version == 1
    assert first != server.pid  # the parent of the reloader runs nothing
    assert site.pids() == [first]
    answer = site.get("enqueue/slow")
    assert answer["pid"] == first
    eventually(lambda: site.record(answer["id"]).status is TaskStatus.RUNNING)
    tasks = site.folder / "shop" / "tasks.py"
    # Of another length: Python takes compiled code by the size of its file and the second of its change.
    site.change(tasks, tasks.read_text().replace("VERSION = 1", "VERSION  =  2"), first)
    version, second = site.result(answer["id"])
    assert version == 2
    assert second not in (first, server.pid)
    assert [attempt.outcome for attempt in site.record(answer["id"]).attempts] == [
        "interrupted",
        "completed",
    ]
    assert site.pids() == [second]
    assert site.result(site.get("enqueue/who")["id"]) == [2, second]


def test_each_worker_of_gunicorn_has_a_queue_and_a_killed_one_loses_no_task(site):
    site.move_into_database()
    arguments = ("-m", "gunicorn", "served:wsgi", "--bind", site.address, "--workers", "3")
    server = site.start(*arguments, "--preload")
    site.get("enqueue/who")
    eventually(lambda: site.get("enqueue/who") and len(site.pids()) == 3)
    assert server.pid not in site.pids()
    held = [site.get("enqueue/hold")["id"] for _ in range(3)]
    eventually(lambda: all(site.record(one).status is TaskStatus.RUNNING for one in held))
    victim = int(site.record(held[0]).worker.split(":")[1])
    ended = {one for one in held if int(site.record(one).worker.split(":")[1]) == victim}
    more = [site.get("enqueue/who")["id"] for _ in range(20)]
    os.kill(victim, signal.SIGKILL)
    for one in ended:
        assert site.result(one)[1] != victim
        assert site.record(one).crashes == 1
    for one in more:
        site.result(one)
    assert {site.record(one).status for one in {*held} - ended} <= {TaskStatus.RUNNING}
    assert not site.file.exists()


def test_under_asgi_the_first_request_starts_the_queue(site):
    host, port = site.address.split(":")
    site.start("-m", "uvicorn", "served:asgi", "--host", host, "--port", port, "--lifespan", "off")
    answer = site.get("aenqueue/who")
    assert site.result(answer["id"]) == [1, answer["pid"]]
    assert site.pids() == [answer["pid"]]
    answer = site.get("enqueue/who")
    assert site.result(answer["id"]) == [1, answer["pid"]]


def test_a_worker_imports_the_module_of_a_waiting_task(site):
    task_id = site.enqueue("letters.letter.enqueue('Ada')")
    program = """
        import django, os, sys
        os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
        django.setup()
        from taskx.contrib.django import load_queue
        queue = load_queue()
        assert "shop.tasks.who" in queue._registry.types
        assert "shop.letters" not in sys.modules
        queue.start()
        print(queue.handle(sys.argv[1]).result(60))
        queue.close()
    """
    assert site.run("-c", textwrap.dedent(program), task_id) == "Dear Ada\n"


def test_a_worker_writes_each_line_once(site):
    """Django has a handler of its own for these lines if ``DEBUG`` is on."""
    site.move_into_database()
    task_id = site.enqueue("tasks.who.enqueue()")
    worker = site.start("manage.py", "taskx", "worker")
    site.result(task_id)
    worker.terminate()
    assert worker.wait(PATIENCE) == 0
    lines = (site.folder / "log").read_text().splitlines()
    about = [line[line.index("Task id=") :] for line in lines if task_id in line]
    assert about
    assert len(about) == len({*about})
