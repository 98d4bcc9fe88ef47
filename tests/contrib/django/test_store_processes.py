"""Several processes on one Django database: shared work, deaths, forks, and restarts of the server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import django_project
import mariadb_server
import postgres_server
import pytest
from helpers import PATIENCE, eventually

from taskx import DuplicateTask, Queue, RepositoryUnavailable, Task, TaskFilter
from taskx.contrib.django import DjangoRepository

pytestmark = pytest.mark.process
SERVERS = {"postgres": postgres_server, "mariadb": mariadb_server}

# The arguments: the project's folder, a variable with the database, its value, the path of a log.
PROGRAM = """
import os, sys, threading
folder, variable, value, log = sys.argv[1:]
sys.path.insert(0, folder)
os.environ.update({variable: value, "DJANGO_SETTINGS_MODULE": "project.settings"})
import django
django.setup()
from taskx import Config, Queue
from taskx.contrib.django import DjangoRepository

queue = Queue(
    DjangoRepository(run_folder=log + ".run", lease_timeout=30.0), Config(worker_num=3, buffer_size=6)
)

def note(*words):
    line = " ".join(map(str, words)) + "\\n"
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())  # in one piece, as several processes write
    os.close(file)

@queue.executor()
def work(ctx, n):
    note("work", n)
    return n

@queue.executor(priority=5)
def hang(ctx, n=0):
    note("hang", n)
    ctx.sleep(300) if ctx.task.starts == 1 else None
    return "after a crash"

"""
RUN = """
queue.start()
print("started", flush=True)
sys.stdin.readline()
queue.stop()
"""


class Site:
    """A database, as this process and its workers use it."""

    def __init__(self, spawn, folder: Path, variable: str, value: str, repository) -> None:
        self._spawn, self._where = spawn, (variable, value)
        self._log = folder / "log"
        self.repository = repository

    def spawn(self, more=RUN):
        return self._spawn(PROGRAM + more, django_project.FOLDER, *self._where, self._log)

    def start(self, count):
        children = [self.spawn() for _ in range(count)]
        for child in children:
            assert child.read() == "started"
        return children

    def log(self):
        return self._log.read_text().splitlines() if self._log.exists() else []


def on_sqlite(spawn, folder):
    run = folder / "log.run"
    repository = django_project.on_sqlite(folder, run_folder=run)
    return Site(spawn, folder, "TASKX_DJANGO_SQLITE", str(folder / "site.db"), repository)


def on_server(spawn, folder, server, alias):
    """Return a site on a new database of a server."""
    django_project.set_up()
    url = server.url(server.new_database())
    django_project.add_url(alias, url)
    django_project.migrate(alias)
    repository = DjangoRepository(alias, run_folder=folder / "log.run")
    return Site(spawn, folder, "TASKX_DJANGO_SERVER", url, repository)


@pytest.fixture(params=["sqlite", *SERVERS])
def site(request, spawn, tmp_path):
    if request.param == "sqlite":
        made = on_sqlite(spawn, tmp_path)
    else:
        made = on_server(spawn, tmp_path, SERVERS[request.param].shared(), f"site {tmp_path}")
    with made.repository:
        yield made


@pytest.fixture(params=SERVERS)
def server(request):
    """A server that the test kills."""
    with SERVERS[request.param].private() as made:
        yield made


def submit(queue, numbers):
    queue.declare("work")
    queue.declare("hang")
    return queue.submit_many([Task(type="work", params={"n": n}) for n in numbers])


def ended(repository, count):
    return lambda: repository.count(TaskFilter(status="completed")) == count


def test_processes_share_the_tasks_and_run_each_once(site):
    queue = Queue(site.repository)
    handles = submit(queue, range(120))
    site.start(3)
    eventually(ended(site.repository, 120))
    assert Counter(site.log()) == Counter(f"work {n}" for n in range(120))
    assert [handle.task().result for handle in handles] == [*range(120)]


def test_tasks_of_a_killed_process_run_again_in_another_one(site):
    """Kernel locks show the death at once, on a server by the lock file of a node on the same host."""
    queue = Queue(site.repository)
    queue.declare("hang")
    hung = queue.submit("hang", {"n": 1})
    (child,) = site.start(1)
    eventually(lambda: site.log() == ["hang 1"])
    handles = submit(queue, range(40))
    child.kill()
    site.start(1)
    eventually(ended(site.repository, 41))
    task = hung.task()
    assert (task.crashes, task.result) == (1, "after a crash")
    assert {handle.task().result for handle in handles} == {*range(40)}


FORK = """
queue.declare("work")
queue.submit("work", {"n": 1})
child = os.fork()
queue.submit("work", {"n": 3 if child else 2})
if child:
    assert os.waitpid(child, 0)[1] == 0
    queue.submit("work", {"n": 4})
    print(queue.count_tasks(), flush=True)
else:
    os._exit(0 if queue.count_tasks() else 1)
"""


def test_a_forked_process_has_connections_of_its_own(site):
    """The parent's go on after the child has ended."""
    child = site.spawn(FORK)
    assert child.read() == "4"


def test_a_restart_of_the_server_under_load_loses_nothing(spawn, tmp_path, server):
    """The server and all its processes are killed three times while two workers run and tasks come in.

    A submit that fails in doubt is sent again with the same id.
    """
    site = on_server(spawn, tmp_path, server, f"killed {tmp_path}")
    with site.repository as repository:
        queue = Queue(repository)
        queue.declare("work")
        workers = site.start(2)
        for n in range(150):
            if n in (30, 70, 110):
                server.kill()
                server.start()
            eventually(lambda n=n: accepted(queue, n))
        eventually(ended(repository, 150))
        assert set(site.log()) == {f"work {n}" for n in range(150)}
        for worker in workers:
            worker.kill()


def accepted(queue, n):
    """Submit a task. Return True if it is stored, and False if it must be sent again."""
    try:
        queue.submit("work", {"n": n}, id=f"n{n}")
    except RepositoryUnavailable:
        return False
    except DuplicateTask:  # the server had stored it before it died
        return True
    return True


def test_an_outcome_that_the_server_did_not_take_waits_for_it(spawn, tmp_path, gate, server):
    """A task ends while the server is down, and is not run again."""
    alias = on_server(spawn, tmp_path, server, f"down {tmp_path}").repository.using
    # The lease is longer than any restart of the server.
    repository = DjangoRepository(alias, "full", run_folder=tmp_path, lease_timeout=10 * PATIENCE)
    queue = Queue(repository)
    ran = []

    @queue.executor()
    def work(ctx):
        ran.append(1)
        gate()
        return "done"

    try:
        queue.start()
        handle = queue.submit("work")
        gate.wait_for(1)
        server.kill()
        gate.open()
        with pytest.raises(RepositoryUnavailable):
            handle.task()
        server.start()
        assert handle.result(PATIENCE) == "done"
        assert ran == [1]
        assert handle.task().starts == 1
    finally:
        queue.stop(5)
        repository.close()
