"""Helpers for tests of queues: repositories, queues that are stopped at the end, waits with a time limit.

``conftest.py`` registers this module as a plugin, for its fixtures.
"""

from __future__ import annotations

import gc
import os
import queue as queues
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import attrs
import mongomock
import pytest
from mongo_server import REAL, new_database
from workers import Workers, on_mongo, on_sqlite

from taskx import (
    Config,
    MemoryRepository,
    MongoRepository,
    Queue,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
)
from taskx.attempt.registry import Registry
from taskx.attempt.runner import Run, Runner
from taskx.node.ahead import Ahead
from taskx.node.broker import Threads
from taskx.node.hooks import Hooks
from taskx.node.housekeeper import Housekeeper
from taskx.node.ledger import Ledger
from taskx.node.moving import Moves
from taskx.node.node import LocalNode
from taskx.node.pool import WorkerPool
from taskx.node.watcher import Watcher
from taskx.stores.base import Lookup, Repository
from taskx.stores.controls import Controls
from taskx.stores.sqlite.connections import Connection, Connections
from taskx.tasks.bell import Agenda
from taskx.tasks.clock import Clock
from taskx.tasks.log import GuardedLogger
from taskx.tasks.timing import Timing
from taskx.testing import ManualClock

ROOT = Path(__file__).parent.parent

#: Time limit of all waits, in seconds: longer than anything takes on a loaded machine.
PATIENCE = 120.0
#: Seconds within which a loaded machine does what an idle one does at once.
SOON = PATIENCE / 4


def eventually(condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Call ``condition`` until its result is true, and return it. Fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{condition} was not true within {timeout:g} s", pytrace=True)
        pause.wait(0.005)
    return answer


def nested(depth: int) -> list[Any]:
    """Return a list of so many levels."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def settle_references() -> None:
    """Let go of objects whose last reference another thread dropped: a Python without a lock is late."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        gc.collect()


def ids(queue: Queue) -> set[str]:
    return {task.id for task in queue.list_tasks()[0]}


def run_once(queue: Queue, function: Callable[..., Any], **options: Any) -> Task:
    """Start a queue, run a function as an executor, and return the task's record after it."""
    queue.executor("t", **options)(function)
    with queue:
        handle = queue.submit("t")
        with suppress(Exception):
            handle.result(timeout=PATIENCE)
        return queue.get_task_status(handle.id)


# --- access to internal parts: tests use only these functions for it


class Parts(NamedTuple):
    """The parts of a queue that its calls and its node share; the queue need not be started."""

    repository: Repository
    moves: Moves
    controls: Controls
    agenda: Agenda
    registry: Registry
    runner: Runner
    watcher: Watcher
    hooks: Hooks
    clock: Clock
    log: GuardedLogger
    timing: Timing


def parts_of(queue: Queue) -> Parts:
    """Return the parts of a queue."""
    inner = (
        "moves",
        "controls",
        "agenda",
        "registry",
        "runner",
        "watcher",
        "hooks",
        "log",
        "timing",
    )
    known = {name: getattr(queue, f"_{name}") for name in inner}
    return Parts(repository=queue.repository, clock=queue.clock, **known)


def storing(queue: Queue) -> Queue:
    """Have a queue store its schedules at once although it is not started; return it."""
    declare = queue.schedule

    def schedule(*given: Any, **options: Any) -> Any:
        made = declare(*given, **options)
        if not made.stored:
            made.store()
        return made

    queue.schedule = schedule  # type: ignore[method-assign]
    return queue


def node_of(queue: Queue) -> LocalNode:
    """Return the node of a started queue; None if the queue is not started."""
    return queue._node if queue._node.pool else None  # type: ignore[return-value]


def prepared_node(queue: Queue) -> LocalNode:
    """Return a node beside that of a queue: it has its parts, and nothing was started."""
    make_pool, parts = queue._node._make_pool, parts_of(queue)
    about = (parts.moves, parts.hooks, parts.log, parts.timing)
    node = LocalNode(queue, Threads(), make_pool, *about)
    node.forget()
    node._prepare()
    return node


def joined_node(queue: Queue) -> LocalNode:
    """Return a node beside that of a queue: it has joined the repository, and has no threads."""
    node = prepared_node(queue)
    node._join()
    node.pool = node._pool
    return node


def pool_of(queue: Queue) -> WorkerPool:
    """Return the worker pool of a started queue."""
    pool = node_of(queue).pool
    assert pool is not None
    return pool


def housekeeper_of(queue: Queue) -> Housekeeper:
    return node_of(queue)._housekeeper


def connections_of(repository: SQLiteRepository) -> Connections:
    return repository._file_links.connections


def open_readers(repository: SQLiteRepository) -> list[Connection]:
    return connections_of(repository).open_readers()


@contextmanager
def reading(repository: SQLiteRepository) -> Iterator[Connection]:
    """Keep one read connection in use, in a thread of its own."""
    taken: queues.SimpleQueue[Connection] = queues.SimpleQueue()
    over = threading.Event()
    read = connections_of(repository).read
    result = run_in_thread(lambda: read(lambda one: (taken.put(one), over.wait(PATIENCE))))
    try:
        yield taken.get(timeout=PATIENCE)
    finally:
        over.set()
        result()


def whole_round(queue: Queue) -> None:
    """Wait until the queue's housekeeper has done one whole round that starts from now on."""
    housekeeper, over = housekeeper_of(queue), threading.Event()
    tick = housekeeper.tick

    def watched() -> None:
        tick()
        over.set()

    housekeeper.tick = watched
    parts_of(queue).agenda.wake()
    assert over.wait(PATIENCE)
    del housekeeper.tick


@contextmanager
def no_rounds(queue: Queue) -> Iterator[None]:
    """Hold the queue's housekeeper between two rounds."""
    housekeeper, held, over = housekeeper_of(queue), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        over.wait(PATIENCE)

    housekeeper.tick = hold
    parts_of(queue).agenda.wake()
    try:
        assert held.wait(PATIENCE)
        yield
    finally:
        over.set()
        del housekeeper.tick


class Spy:
    """A mix-in for repositories: it records the applied writes, and can be made unavailable.

    Attributes:
        batches: the writes of every committed transaction.
        before: called with the writes before they are applied.
        after: called with the writes after they are committed.
        down: while it is True, the repository is unavailable.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[list[Any]] = []
        self.before: Callable[[list[Any]], object] = lambda writes: None
        self.after: Callable[[list[Any]], object] = lambda writes: None
        self.down = False

    def check(self) -> None:
        if self.down:
            raise RepositoryUnavailable("down for a while")

    def apply(self, writes: Any, *, all_or_nothing: bool = False) -> Any:
        self.check()
        self.before(writes)
        batch = list(writes)
        self.batches.append(batch)  # before the commit: other threads see the writes at once
        try:
            results = super().apply(writes, all_or_nothing=all_or_nothing)  # type: ignore[misc]
        except BaseException:
            self.batches.remove(batch)
            raise
        self.after(writes)
        return results

    def find(self, *args: Any) -> Any:
        self.check()
        return super().find(*args)  # type: ignore[misc]


class SpyMemory(Spy, MemoryRepository):
    pass


class SpySQLite(Spy, SQLiteRepository):
    pass


class SpyMongo(Spy, MongoRepository):
    """A spy on a mock of the driver, or on the real server that the environment names."""

    def __init__(self, timing: Timing) -> None:
        self.database = new_database(REAL) if REAL else mongomock.MongoClient().db
        super().__init__(self.database, timing=timing)

    def close(self) -> None:
        super().close()
        if REAL:
            self.database.client.drop_database(self.database.name)


MAKERS: dict[str, Callable[[Path, Timing], Repository]] = {
    "memory": lambda path, timing: SpyMemory(timing=timing),
    "sqlite": lambda path, timing: SpySQLite(path, timing=timing),
    "mongomock": lambda path, timing: SpyMongo(timing),
}


@pytest.fixture
def clock() -> ManualClock:
    """A clock that only the tests move."""
    return ManualClock()


@pytest.fixture
def timing(request: pytest.FixtureRequest) -> Timing:
    """The timing of a test's repository and queues.

    The marks ``timing`` of the test, its class and its module set fields. So does a parameter of the test
    that is named like a field.
    """
    marks = reversed([*request.node.iter_markers("timing")])  # those of the test itself come last
    changes = {name: value for mark in marks for name, value in mark.kwargs.items()}
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    fields = attrs.fields_dict(Timing).keys()
    return Timing(**changes, **{name: parameters[name] for name in parameters.keys() & fields})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "tasks.db"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with the mark ``every_store`` on memory, SQLite and MongoDB."""
    if "timing" not in metafunc.fixturenames and any(
        not isinstance(node, pytest.Module)
        for node, _ in metafunc.definition.iter_markers_with_node("timing")
    ):
        pytest.fail(f"{metafunc.definition.name}: no fixture uses its marks", pytrace=False)
    if metafunc.definition.get_closest_marker("every_store"):
        metafunc.parametrize("repository", MAKERS, indirect=True)


@pytest.fixture
def repository(
    request: pytest.FixtureRequest, database: Path, timing: Timing
) -> Iterator[Repository]:
    """The repository of most tests: in memory, because no rule of a queue depends on the store.

    The contract of the stores holds that. A room has the mark ``every_store`` on a few tests that go all
    its ways, and names the stores of tests that are about a store, a file or a transaction.
    """
    made = MAKERS[getattr(request, "param", "memory")](database, timing)
    yield made
    made.close()


@pytest.fixture
def make_queue(repository: Repository, timing: Timing) -> Iterator[Callable[..., Queue]]:
    """Return a function that makes queues, with options of ``Config`` and ``Queue``.

    All of them are stopped at the end.
    """
    made: list[Queue] = []

    def make(on: Any = None, *, logger: Any = None, **options: Any) -> Queue:
        names = options.keys() & {"clock", "find_executor", "hooks", "middleware", "timing"}
        more = {"timing": timing, **{name: options.pop(name) for name in names}}
        made.append(Queue(on or repository, Config(**options), logger, **more))
        return made[-1]

    yield make
    for queue in made:
        queue.stop(timeout=PATIENCE, cancel=True)
        parts_of(queue).watcher.close()  # no test waits for unfinished tasks any more
    # A thread that works after the repository is closed would open it again and leave it open.
    _wait_for_threads()


def _wait_for_threads() -> None:
    """Wait until the threads of all queues have ended. Else fail, and show what they do."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while remaining := [t for t in threading.enumerate() if t.name.startswith(_AT_WORK)]:
        if time.monotonic() > deadline:
            pytest.fail("\n".join(["threads have not ended", *map(_described, remaining)]))
        pause.wait(0.005)


def _described(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else "  (runs no Python code)"
    return f"{thread!r}:\n{stack}"


_AT_WORK = (
    *("taskx-worker", "taskx-housekeeper", "taskx-stop", "taskx-watch", "taskx-listen"),
    *("taskx-dispatch", "taskx-join"),
)


#: Makes no task count as short. Then no task is started ahead, and the order of runs is strict.
no_batches = pytest.mark.timing(short_task=0.0)
#: Makes all slow periodic checks run every 50 ms, so that tests that depend on one wait less.
frequent_checks = pytest.mark.timing(
    **dict.fromkeys(("audit_every", "recover_every", "schedules_every", "handles_every"), 0.05)
)


#: Makes the housekeeper look only for what it is told of. It takes no part while nothing happens.
undisturbed = pytest.mark.timing(
    **dict.fromkeys(("poll_every", "recover_every", "audit_every"), 3600.0)
)


@pytest.fixture
def calm() -> Iterator[threading.Event]:
    """Hand back started tasks only while the event is set; so a slow machine starts no task twice.

    A queue that stops hands them back in any case.
    """
    clear, calm = Ahead.clear, threading.Event()

    def clear_in_the_calm(ahead: Ahead, older_than: float = 0.0) -> list[Run]:
        return clear(ahead, older_than) if calm.is_set() or not older_than else []

    with pytest.MonkeyPatch.context() as patched:  # its own, which a test's ``undo()`` does not end
        patched.setattr(Ahead, "clear", clear_in_the_calm)
        yield calm


@pytest.fixture
def queue(make_queue: Callable[..., Queue]) -> Queue:
    """A queue with two workers, not started."""
    return make_queue(worker_num=2)


class Gate:
    """A place in an executor at which it waits until the gate is open."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self) -> None:
        self._arrived.release()
        assert self._open.wait(PATIENCE)

    def wait_for(self, tasks: int = 1) -> None:
        """Wait until this number of further executors have come to the gate."""
        for _ in range(tasks):
            assert self._arrived.acquire(timeout=PATIENCE)

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        """Stop executors that come from now on."""
        self._open.clear()


@pytest.fixture
def started(queue):
    """A started queue with an executor ``fine``."""
    queue.executor("fine")(lambda: "fine")
    queue.start()
    return queue


@pytest.fixture
def gate(make_queue: Any) -> Iterator[Gate]:
    """A gate. It is always opened at the end, before the queues are stopped."""
    made = Gate()
    yield made
    made.open()


class Waiting:
    """An executor ``hold`` that waits at the gate, to keep workers busy."""

    def __init__(self, queue: Queue, gate: Gate) -> None:
        self.gate = gate
        self.queue = queue
        queue.executor("hold")(self._hold)

    def _hold(self) -> None:
        self.gate()

    def fill(self, workers: int) -> list[Any]:
        handles = []
        for _ in range(workers):
            handles.append(self.queue.submit("hold"))
            self.gate.wait_for(1)
        return handles


@pytest.fixture
def busy(make_queue: Any, gate: Gate) -> Callable[..., Queue]:
    """Return a function that makes a started queue whose only worker is busy until the gate opens.

    The queue has an executor ``note``, which appends its argument to ``queue.ran``.
    """

    def make(**config: Any) -> Queue:
        queue = make_queue(worker_num=1, **config)
        queue.ran = []
        queue.executor("note")(lambda n=0: queue.ran.append(n))
        queue.start()
        Waiting(queue, gate).fill(1)
        return queue

    return make


# Other processes


@pytest.fixture(params=["sqlite", "mongo"])
def url(request: pytest.FixtureRequest, database: Path) -> Iterator[str]:
    """The URL of an empty repository that several processes can share."""
    if request.param == "sqlite":
        yield f"sqlite:///{database}"
        return
    server = request.getfixturevalue("mongo_server")("standalone")
    made = new_database(server)
    yield urlsplit(server)._replace(path=f"/{made.name}", query=f"timeout={PATIENCE / 2}").geturl()
    made.client.drop_database(made.name)


class Child:
    """A Python program in a process of its own."""

    def __init__(self, program: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        self._lines: queues.SimpleQueue[str] = queues.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self._lines.put(line)
        self._lines.put("")

    def _read_errors(self) -> None:
        self._errors.append(self.process.stderr.read())  # type: ignore[union-attr]

    def read(self) -> str:
        """Return the next line that the program prints."""
        try:
            line = self._lines.get(timeout=PATIENCE)
        except queues.Empty:
            pytest.fail("the child is silent")
        if not line:
            pytest.fail(f"the child ended: {self.ends()[1]}")
        return line.strip()

    def tell(self, *words: object) -> None:
        """Let the program go on that waits for a line of input."""
        self.process.stdin.write(" ".join(map(str, words)) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ends(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait until the program ends. Return its remaining output, and everything from stderr."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(timeout)
        for reader in self._readers:
            reader.join(PATIENCE)
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return "".join(lines), "".join(self._errors)


@pytest.fixture
def spawn() -> Iterator[Callable[..., Child]]:
    """Return a function that starts programs. End the remaining programs at the end."""
    children: list[Child] = []

    def start(program: str, *args: object) -> Child:
        children.append(Child(program, *args))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
        child.ends()
        # A process that it has forked may hang, and keep the pipes open: a close would wait for the reader.
        if not any(reader.is_alive() for reader in child._readers):
            child.process.stdout.close()  # type: ignore[union-attr]
            child.process.stderr.close()  # type: ignore[union-attr]


@pytest.fixture(params=["sqlite", "mongo"])
def workers(request: pytest.FixtureRequest, spawn: Any, tmp_path: Path) -> Iterator[Workers]:
    """Worker programs on a repository that several processes share."""
    make = {"sqlite": on_sqlite, "mongo": on_mongo}[request.param]
    with make(spawn, tmp_path) as made:
        yield made


def suspend(child: Child, database: Path) -> None:
    """Stop a process at a moment at which it does not hold the write lock of a file."""
    with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:

        def stopped() -> bool:
            child.signal(signal.SIGSTOP)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                child.signal(signal.SIGCONT)
                return False
            connection.execute("ROLLBACK")
            return True

        eventually(stopped)


@pytest.fixture
def threads_begun(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that the thread of the test starts. What other threads do meanwhile does not count."""
    me, begun, start = threading.current_thread(), list[threading.Thread](), threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        if threading.current_thread() is me:
            begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    return begun


def is_intact(database: Path) -> bool:
    """Return True if SQLite finds no error in a file."""
    with closing(sqlite3.connect(database)) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


def run_in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call a function in a thread. Return a function that waits for its result or raises its exception."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:  # noqa: BLE001  (handed to the test)
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE)
        assert outcome, "the thread hangs"
        fine, value = outcome[0]
        if not fine:
            raise value
        return value

    return result


# --- queries of a repository


def those_with(repository: Repository, column: Lookup, *values: str) -> list[str]:
    """Return the ids of the rows that have one of these values in a lookup column."""
    return [task_id for (task_id,) in repository.find(column, values, ("id",))]


def held_on(repository: Repository, node: str) -> list[str]:
    """Return the ids of the tasks that a node holds, the running ones first."""
    return [
        *those_with(repository, "running_on", node),
        *those_with(repository, "buffered_on", node),
    ]


def earliest_due(repository: Repository) -> int | None:
    """Return the earliest ``run_at`` of the tasks that wait for theirs."""
    return next((run_at for _, run_at in repository.due(None, 1)), None)


def key_holders(repository: Repository, keys: Sequence[str]) -> dict[str, str]:
    """Return the holder's id for each of these unique keys."""
    return dict(repository.find("unique_lock", keys, ("unique_lock", "id")))


def first_waiting(repository: Repository, key: str) -> str | None:
    """Return the id of the first task in a concurrency key's queue, or None."""
    return next((task_id for (task_id,) in repository.find("line", [key], ("id",), 1)), None)


def waiting_keys(repository: Repository, after: str = "", limit: int = 10) -> dict[str, bool]:
    """Return the concurrency keys that tasks wait for. A value is True if no task has the key's turn."""
    keys = repository.distinct("line", after, limit)
    turns = dict(repository.find("turn", keys, ("turn", "id")))
    return {key: key not in turns for key in keys}


class PlainLedger(Ledger):
    """A ledger of writes from which nothing follows. An outcome is a function that gets their results."""

    def follow(self, writes, tasks):
        pass

    def _concluded(self, outcome, writes, results, error):
        outcome(results, error)
