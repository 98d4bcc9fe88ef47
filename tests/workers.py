"""Worker programs: several processes on one repository that write what they do to one log file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mongo_server import new_database, shared

from taskx import MongoRepository, SQLiteRepository
from taskx.stores.base import Repository

# The program's arguments are the repository's URL or path, the path of the log without ".log", and the
# number of threads.
_BEGIN = """
import os, sys
from taskx import Config, MongoRepository, Queue, SQLiteRepository

url, path, threads = sys.argv[1:4]
if url.startswith("mongodb"):
    import pymongo
    database = pymongo.MongoClient(url)[path.rsplit("/", 1)[1]]
    repository = MongoRepository(database, poll_interval=0.05, timeout=60)
elif url.startswith("postgresql"):
    sys.path.append(os.path.join(sys.path[0] or os.getcwd(), "tests"))
    import workers
    repository = workers.on_django(url)
else:
    repository = SQLiteRepository(url)
queue = Queue(repository, Config(worker_num=int(threads)))

def note(*words):
    line = " ".join(map(str, words)) + "\\n"
    log = os.open(path + ".log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line.encode())  # a single write, so that lines of several processes do not mix
    os.close(log)
"""

_RUN = """
queue.start()
print("started", flush=True)
sys.stdin.readline()
"""

# It forks processes that run the program of its last argument, and that end when it ends.
_NURSERY = """
import os, signal, sys, threading
from taskx import Config, Queue, SQLiteRepository

program = sys.argv.pop()
if sys.argv[1].startswith("mongodb"):
    import pymongo
    from taskx import MongoRepository
elif sys.argv[1].startswith("postgresql"):
    sys.path.append(os.path.join(sys.path[0] or os.getcwd(), "tests"))
    import django_project, workers
    django_project.set_up()
    import taskx.contrib.django.repository

end, held = os.pipe()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
for _ in sys.stdin:
    if not os.fork():
        os.close(held)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        threading.Thread(target=lambda: (os.read(end, 1), os._exit(0)), daemon=True).start()
        exec(program, {"__name__": "__main__"})
"""
_BORN = """
queue.start()
print(os.getpid(), flush=True)
import threading
threading.Event().wait()
"""


class Nursery:
    """Starts worker programs that have imported everything, so that each is replaced in no time."""

    def __init__(self, child: Any) -> None:
        self._child = child

    def start(self) -> int:
        """Start one program. Return the id of its process when its queue has started."""
        self._child.tell()
        return int(self._child.read())


class Workers:
    """Worker programs, on a repository that the test can use, too.

    Attributes:
        threads: the number of worker threads of each program.
    """

    def __init__(self, spawn: Callable[..., Any], url: str, path: str, repository: Repository):
        self.repository = repository
        self.threads = 4
        self._spawn, self._where = spawn, (url, path)
        self._log = Path(path + ".log")

    def spawn(self, executors: str) -> Any:
        """Start one program with these executors. Their code can use ``queue`` and ``note``."""
        return self._spawn(_BEGIN + executors + _RUN, *self._where, self.threads)

    def nursery(self, executors: str) -> Nursery:
        """Return what starts programs with these executors, as often as is wanted."""
        program = _BEGIN + executors + _BORN
        return Nursery(self._spawn(_NURSERY, *self._where, self.threads, program))

    def start(self, executors: str, count: int = 1) -> list[Any]:
        """Start ``count`` programs. Return them when all their queues have started."""
        children = [self.spawn(executors) for _ in range(count)]
        for child in children:
            assert child.read() == "started"
        return children

    def log(self) -> list[list[str]]:
        """Return the words of each line in the log."""
        if not self._log.exists():
            return []
        return [line.split() for line in self._log.read_text().splitlines()]


@contextmanager
def on_sqlite(spawn: Callable[..., Any], folder: Path) -> Iterator[Workers]:
    path = str(folder / "tasks.db")
    with SQLiteRepository(path) as repository:
        yield Workers(spawn, path, path, repository)


@contextmanager
def on_mongo(spawn: Callable[..., Any], folder: Path) -> Iterator[Workers]:
    url = shared("set")
    database = new_database(url)
    with MongoRepository(database, poll_interval=0.05, timeout=60) as repository:
        yield Workers(spawn, url, str(folder / database.name), repository)
    database.client.drop_database(database.name)


def on_django(url: str) -> Repository:
    """Return a repository of Django's on a PostgreSQL database."""
    import django_project

    django_project.set_up()
    from taskx.contrib.django.repository import DjangoRepository

    parts = urlsplit(url)
    assert parts.port is not None
    django_project.add_postgres("workers", parts.port, parts.path[1:])
    return DjangoRepository("workers")


@contextmanager
def on_postgres(spawn: Callable[..., Any], folder: Path) -> Iterator[Workers]:
    """Make the tables in a new database, through Django."""
    import django_project
    import postgres_server

    server = postgres_server.shared()
    name = server.new_database()
    url = server.url(name)
    repository = on_django(url)
    django_project.migrate("workers")
    yield Workers(spawn, url, str(folder / name), repository)
    repository.close()
    server.drop_database(name)
