"""Each public call in each state of a caller's connection.

The tables of ``docs/design-transactions.rst`` are the specification: each cell is compared with what the
call does on a file of SQLite.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from helpers import PATIENCE, eventually, run_in_thread, settle_references
from kinds import NO_MANUAL_COMMITS
from sqlalchemy.orm import Session

from taskx import (
    Config,
    ConfigurationError,
    Executor,
    FlowHandle,
    NodeNotFound,
    Queue,
    RepositoryUnavailable,
    Schedule,
    SQLiteRepository,
    Task,
    TaskHandle,
    TaskNotFound,
    TaskStatus,
    chain,
    every,
    executor,
)
from taskx.attempt.executors import BoundExecutor
from taskx.stores.sqlite import joining
from taskx.tasks.timing import Timing

PAGE = Path(__file__).parents[2] / "docs" / "design-transactions.rst"

# --- the page


def table(title: str) -> dict[str, dict[str, str]]:
    """Return the cells of the table below a heading, by the names of row and column."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n{title}\n---", 1)[1]
    _, head, body, _ = re.split(r"^=+ .*=\n", text, maxsplit=3, flags=re.M)
    columns = re.split(r"  +", head.strip())[1:]
    rows = (re.split(r"  +", line.strip()) for line in body.splitlines())
    return {name.strip("`*"): dict(zip(columns, cells, strict=True)) for name, *cells in rows}


def groups() -> dict[str, list[str]]:
    """Return the names of the calls of each group, which is a row of the table of calls without it."""
    found = re.findall(r"^\*\*(\w+)\*\*.*\n((?:    .*\n)+)", PAGE.read_text(encoding="utf-8"), re.M)
    return {group: re.findall(r"``([\w.]+)``", names) for group, names in found}


WITH_IT = table("Calls with a connection")
WITHOUT_IT = table("Calls without it")
OF_ITS_TASK = table("Calls for a task of the transaction")

# --- the file, and a connection in each state


@executor("echo")
def echo(n: int = 0) -> int:
    return n


def queue_on(path: Path, busy_timeout: float = PATIENCE) -> Queue:
    repository = SQLiteRepository(
        path, prefix="taskx_", busy_timeout=busy_timeout, timing=Timing(examine_within=0.01)
    )
    queue = Queue(repository, Config(worker_num=1))
    queue.register_executor(echo)
    return queue


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a table, a paused type, a schedule, a flow, and tasks of three statuses."""
    path = tmp_path_factory.mktemp("template") / "app.db"
    with closing(sqlite3.connect(path)) as connection, closing(queue_on(path)) as queue:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        for status in ("pending", "completed", "failed"):
            queue.submit("echo", id=status)
        for status in (TaskStatus.COMPLETED, TaskStatus.FAILED):
            queue.repository.update_status(status.value, TaskStatus.RUNNING)
            queue.repository.update_status(status.value, status)
        queue.submit("echo", id="delayed", delay=3600)
        queue.submit_flow(chain(Task(type="echo", id="first"), Task(type="echo", id="second")))
        queue.schedule("hourly", every(3600), "echo").store()
        queue.pause("echo")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


class Scene:
    """A queue, and a connection of the caller, which records the statements that run on it."""

    def __init__(self, path: Path, state: str, busy_timeout: float | None = None) -> None:
        options, self._enter = STATES[state]
        self.path = path
        if busy_timeout is None:
            # Only a call that waits for a lock that is not released needs a short time-out.
            busy_timeout = 0.01 if state in ("writing", "shared") else PATIENCE
        self.queue = queue_on(path, busy_timeout)
        self.statements: list[str] = []
        self.other = ThreadPoolExecutor(1)  # another thread
        self.connection = sqlite3.connect(path, timeout=PATIENCE, **options)
        self.connection.set_trace_callback(self.statements.append)
        self._watcher = sqlite3.connect(path)
        self.own: TaskHandle[Any] | None = None  # of a task of the transaction

    def enter(self) -> None:
        """Bring the connection into its state."""
        self._enter(self)
        self.statements.clear()

    def give(self) -> None:
        """Give the connection to TaskX, in a transaction that then ends."""
        if not self.connection.in_transaction:
            self.connection.execute("BEGIN")
        self.queue.submit("echo", connection=self.connection)
        self.commit()

    def commit(self) -> None:
        if getattr(self.connection, "autocommit", None) is True:  # commit() does nothing
            self.connection.execute("COMMIT")
        else:
            self.connection.commit()

    def version(self) -> Any:
        """Return a number that changes with each commit to the file."""
        return self._watcher.execute("PRAGMA data_version").fetchone()

    def has_node(self) -> bool:
        """Return True if the store has a node that has not ended, as far as it knows."""
        with closing(queue_on(self.path)) as another:
            return bool(another.nodes())

    def tasks(self) -> list[tuple[str, str]]:
        """Return the tasks that are committed, and their statuses."""
        return self._watcher.execute("SELECT id, status FROM taskx_tasks ORDER BY id").fetchall()

    @property
    def pending(self) -> TaskHandle[Any]:
        return self.own or self.queue.handle("pending")

    @property
    def flow(self) -> FlowHandle:
        return self.queue.flow_handle({"chain": ["first", "second"]})

    @property
    def hourly(self) -> Schedule:
        return self.queue.schedules()["hourly"]

    def close(self) -> None:
        try:
            self.connection.close()
        except sqlite3.ProgrammingError:  # it is another thread's
            self.other.submit(self.connection.close).result()
        self._watcher.close()
        self.other.shutdown()
        self.queue.close()


def stay(scene: Scene) -> None:
    """Change nothing."""


def read(scene: Scene) -> None:
    scene.connection.execute("BEGIN")
    scene.connection.execute("SELECT * FROM orders").fetchall()


def be_overtaken(scene: Scene) -> None:
    read(scene)
    with closing(sqlite3.connect(scene.path)) as another:
        another.execute("INSERT INTO orders DEFAULT VALUES")
        another.commit()


def write(scene: Scene) -> None:
    scene.connection.execute("INSERT INTO orders DEFAULT VALUES")


def hand_over(scene: Scene) -> None:
    scene.connection.close()
    scene.connection = scene.other.submit(sqlite3.connect, scene.path).result()


def write_elsewhere(scene: Scene) -> None:
    scene.other.submit(write, scene).result()


def close(scene: Scene) -> None:
    scene.connection.close()


#: For each column: the options of the connection, and what brings it into the state.
STATES: dict[str, tuple[dict[str, Any], Callable[[Scene], None]]] = {
    "idle": ({}, stay),
    "reading": ({}, read),
    "overtaken": ({}, be_overtaken),
    "writing": ({}, write),
    "foreign": ({}, hand_over),
    "shared": ({"check_same_thread": False}, write_elsewhere),
    "closed": ({}, close),
    "autocommit": ({"isolation_level": None}, stay),
    "autocommit=True": ({"autocommit": True}, stay),
    "manual": ({"autocommit": False}, stay),
}


def states(columns: Mapping[str, str]) -> list[Any]:
    """Return the states of a table as parameters: the name of one, and that of its column."""
    names = [(name, name) for name in columns] + [("autocommit=True", "autocommit")]
    old = pytest.mark.skipif(sys.version_info < (3, 12), reason=NO_MANUAL_COMMITS)
    return [
        pytest.param(*each, id=each[0], marks=old if "autocommit" in STATES[each[0]][0] else ())
        for each in names
    ]


@pytest.fixture
def scenes(template, tmp_path) -> Iterator[Callable[..., Scene]]:
    """Return a function that makes a scene. The one before is closed."""
    made: list[Scene] = []

    def make(state: str, busy_timeout: float | None = None) -> Scene:
        path = tmp_path / f"{len(made)}.db"
        shutil.copy(template, path)
        if made:
            made[-1].close()
        made.append(Scene(path, state, busy_timeout))
        return made[-1]

    yield make
    made[-1].close()


# --- the calls

Call = Callable[[Scene], object]

GIVEN: dict[str, Callable[[Queue, Any], object]] = {
    "queue.submit": lambda queue, given: queue.submit("echo", connection=given),
    "queue.submit_many": lambda queue, given: queue.submit_many(
        [Task(type="echo"), Task(type="echo")], connection=given
    ),
    "queue.submit_flow": lambda queue, given: queue.submit_flow(
        chain(Task(type="echo"), Task(type="echo")), connection=given
    ),
    "queue.cancel_task": lambda queue, given: queue.cancel_task("pending", connection=given),
}
AN_HOUR = (datetime(2024, 1, 1, tzinfo=timezone.utc), datetime(2024, 1, 1, 1, tzinfo=timezone.utc))

CALLS: dict[str, Call] = {
    "queue.submit": lambda s: s.queue.submit("echo"),
    "queue.submit_many": lambda s: s.queue.submit_many([Task(type="echo")]),
    "queue.submit_flow": lambda s: s.queue.submit_flow(chain(Task(type="echo"), Task(type="echo"))),
    "queue.map": lambda s: next(s.queue.map(echo, [1], timeout=0)),
    "executor.submit": lambda s: echo.on(s.queue).submit(),
    "queue.cancel_task": lambda s: s.queue.cancel_task("pending"),
    "queue.cancel_many": lambda s: s.queue.cancel_many(["pending"]),
    "queue.cancel_all": lambda s: s.queue.cancel_all(type="echo"),
    "handle.cancel": lambda s: s.pending.cancel(),
    "flow.cancel": lambda s: s.flow.cancel(),
    "queue.requeue": lambda s: s.queue.requeue("failed"),
    "queue.requeue_many": lambda s: s.queue.requeue_many(["failed"]),
    "queue.requeue_all": lambda s: s.queue.requeue_all(type="echo"),
    "queue.requeue_failures": lambda s: s.queue.requeue_failures(s.queue.failures().groups[0]),
    "queue.requeue_dead_letters": lambda s: s.queue.requeue_dead_letters(),
    "flow.requeue": lambda s: s.flow.requeue(),
    "queue.delete": lambda s: s.queue.delete("completed"),
    "queue.delete_many": lambda s: s.queue.delete_many(["completed"]),
    "queue.delete_all": lambda s: s.queue.delete_all(type="echo"),
    "queue.discard_dead_letters": lambda s: s.queue.discard_dead_letters(),
    "queue.finish": lambda s: s.queue.finish("event/x", 1),
    "queue.wake": lambda s: s.queue.wake("delayed"),
    "queue.prune": lambda s: s.queue.prune(AN_HOUR[1]),
    "queue.pause": lambda s: s.queue.pause(),
    "queue.resume": lambda s: s.queue.resume("echo"),
    "queue.tune": lambda s: s.queue.tune("echo", max_concurrency=1),
    "queue.untune": lambda s: s.queue.untune("echo"),
    "queue.hold": lambda s: s.queue.hold("type/echo", 1),
    "queue.release": lambda s: s.queue.release("type/echo"),
    "queue.note_change": lambda s: s.queue.note_change("ann", "look", "tasks"),
    "queue.stop_node": lambda s: s.queue.stop_node("gone"),
    "schedule.store": lambda s: s.queue.schedule("daily", every(86400), "echo").store(),
    "schedule.pause": lambda s: s.hourly.pause(),
    "schedule.resume": lambda s: s.hourly.resume(),
    "schedule.remove": lambda s: s.hourly.remove(),
    "schedule.trigger": lambda s: s.hourly.trigger(),
    "schedule.backfill": lambda s: s.hourly.backfill(*AN_HOUR),
    "handle.result": lambda s: s.pending.result(0),
    "handle.exception": lambda s: s.pending.exception(0),
    "handle.await": lambda s: asyncio.run(begin_to_wait(s.pending)),
    "flow.result": lambda s: s.flow.result(0),
    "flow.wait": lambda s: s.flow.wait(0),
    "queue.drain": lambda s: s.queue.drain(0),
    "queue.follow": lambda s: s.queue.follow(0),
    "queue.start": lambda s: s.queue.start(),
    "handle.done": lambda s: s.pending.done(),
    "handle.cancelled": lambda s: s.pending.cancelled(),
    "handle.follow": lambda s: s.pending.follow(0),
    "handle.add_done_callback": lambda s: s.pending.add_done_callback(lambda handle: None),
    "queue.watch": lambda s: s.queue.watch(s.pending),
    "queue.get_task_status": lambda s: s.queue.get_task_status("pending"),
    "queue.list_tasks": lambda s: s.queue.list_tasks(),
    "queue.count_tasks": lambda s: s.queue.count_tasks(),
    "queue.iter_tasks": lambda s: [*s.queue.iter_tasks()],
    "queue.dead_letters": lambda s: s.queue.dead_letters(),
    "queue.failures": lambda s: s.queue.failures(),
    "queue.flows": lambda s: s.queue.flows(),
    "queue.stats": lambda s: s.queue.stats(),
    "queue.history": lambda s: s.queue.history(),
    "queue.usage": lambda s: s.queue.usage("k:"),
    "queue.nodes": lambda s: s.queue.nodes(),
    "queue.changes": lambda s: s.queue.changes(),
    "queue.paused": lambda s: s.queue.paused,
    "queue.limits": lambda s: s.queue.limits(),
    "queue.tuned": lambda s: s.queue.tuned(),
    "queue.why": lambda s: s.queue.why("pending"),
    "queue.health": lambda s: s.queue.health(),
    "queue.diagnose": lambda s: s.queue.diagnose(),
    "queue.schedules": lambda s: s.queue.schedules(),
    "schedule.last": lambda s: s.hourly.last(),
    "handle.running": lambda s: s.pending.running(),
    "handle.task": lambda s: s.pending.task(),
    "handle.why": lambda s: s.pending.why(),
    "handle.stream": lambda s: s.pending.stream(),
    "flow.status": lambda s: s.flow.status(),
    "flow.progress": lambda s: s.flow.progress(),
    "queue.executor": lambda s: s.queue.executor("twice")(lambda: 2),
    "queue.limit": lambda s: s.queue.limit("api", concurrency=1),
    "queue.register_executor": lambda s: s.queue.register_executor(executor("once")(lambda: 1)),
    "queue.declare": lambda s: s.queue.declare("elsewhere"),
    "queue.types": lambda s: s.queue.types,
    "queue.handle": lambda s: s.queue.handle("pending"),
    "queue.flow_handle": lambda s: s.flow,
    "queue.buffered": lambda s: s.queue.buffered,
    "queue.running": lambda s: s.queue.running,
    "queue.events_waiting": lambda s: s.queue.events_waiting,
    "queue.healthy": lambda s: s.queue.healthy,
    "queue.stopped": lambda s: s.queue.stopped,
    "queue.stacks": lambda s: s.queue.stacks(),
    "queue.schedule": lambda s: s.queue.schedule("daily", every(86400), "echo"),
    "schedule.next": lambda s: s.hourly.next(),
    "queue.stop": lambda s: s.queue.stop(PATIENCE),
    "queue.close": lambda s: s.queue.close(),
}
#: Calls that need a started queue. They and ``start`` have a scene of their own: such a queue has threads.
ON_STARTED = {"queue.drain", "queue.stop", "queue.close"}


async def begin_to_wait(handle: TaskHandle[Any]) -> None:
    """Await a handle until it raises, or has begun to wait."""
    waiting = asyncio.ensure_future(_awaited(handle))
    while not waiting.done() and not handle._listeners:
        await asyncio.sleep(0)
    if waiting.done():
        waiting.result()
    waiting.cancel()


async def _awaited(handle: TaskHandle[Any]) -> None:
    await handle


def error_of(call: Callable[[], object]) -> str:
    """Return what a call raises, in the words of the tables; empty if it returns or would wait."""
    try:
        call()
    except ConfigurationError:
        return "refused"
    except RepositoryUnavailable:
        return "locked"
    except TaskNotFound:
        return "TaskNotFound"
    except (Late, NodeNotFound):
        return ""
    return ""


# --- the tables


def test_each_public_call_has_a_row():
    owners = {"queue": Queue, "handle": TaskHandle, "flow": FlowHandle, "schedule": Schedule}
    methods = {
        f"{owner}.{name}": found
        for owner, kind in {**owners, "executor": Executor, "bound": BoundExecutor}.items()
        for name in dir(kind)
        if not name.startswith("_")
        and (callable(found := getattr(kind, name)) or (owner == "queue"))
    }
    of_runtime = {  # it calls them, or they read memory
        "conclude",
        "conclude_closed",
        "forget_listeners",
        "listen",
        "note_watched",
        "refuse_endless_wait",
        "set_exception",
        "set_result",
        "set_running_or_notify_cancel",
        "signal",
        "tell",
    }
    without = {
        name
        for name in methods
        if name.partition(".")[0] in owners
        and name not in {f"handle.{each}" for each in of_runtime}
    }
    rows = [name for names in groups().values() for name in names]
    assert sorted(rows) == sorted({*without, "executor.submit", "handle.await"})
    assert sorted(rows) == sorted(CALLS)
    assert [*groups()] == [*WITHOUT_IT]
    taking = [
        name
        for name, method in methods.items()
        if callable(method) and "connection" in inspect.signature(method).parameters
    ]
    assert sorted(taking) == sorted(WITH_IT) == sorted(GIVEN)
    assert {name for name in rows if name.startswith("handle.")} >= {*OF_ITS_TASK}


@pytest.mark.parametrize(("state", "column"), states(WITH_IT["queue.submit"]))
def test_calls_with_a_connection(scenes, state, column):
    seen = {name: with_it(scenes(state), call) for name, call in GIVEN.items()}
    assert seen == {name: cells[column] for name, cells in WITH_IT.items()}


@pytest.mark.parametrize("state", ["idle", "reading", "overtaken", "writing"])
def test_a_session_is_like_the_connection_that_it_leads_to(scenes, state):
    seen = {}
    for name, call in GIVEN.items():
        scene = scenes(state)
        engine = sa.create_engine(
            "sqlite://", creator=lambda scene=scene: scene.connection, poolclass=sa.StaticPool
        )
        with Session(engine) as session:
            session.connection()  # SQLAlchemy looks at a new connection, and rolls back
            seen[name] = with_it(scene, call, session)
    assert seen == {name: cells[state] for name, cells in WITH_IT.items()}


def with_it(scene: Scene, call: Callable[[Queue, Any], object], given: Any = None) -> str:
    """Return what a call does with a connection, in the words of the table."""
    scene.enter()
    given = scene.connection if given is None else given
    before, began = scene.tasks(), "BEGIN IMMEDIATE"
    if error := error_of(lambda: call(scene.queue, given)):
        assert scene.tasks() == before
        assert began not in scene.statements
        return error
    assert scene.tasks() == before
    given.commit()
    assert scene.tasks() != before
    return "begins" if began in scene.statements else "joins"


@pytest.mark.parametrize(("state", "column"), states(WITHOUT_IT["reads"]))
def test_calls_without_it(scenes, capsys, state, column):
    seen = {}
    scene = None
    for group, names in groups().items():
        for name in names:
            alone = name in ON_STARTED or name == "queue.start"
            if scene is None or alone:
                scene = scenes(state)
                if name in ON_STARTED:
                    scene.queue.start()
                scene.give()
                scene.enter()
            version = scene.version()
            seen[name] = without_it(scene, CALLS[name])
            if WITHOUT_IT[group][column] == "locked" and scene.version() == version:
                seen[name] = "locked"  # also a call that has nothing to store
            if group == "stops" and scene.has_node():
                seen[name] = "unrecorded"
            if alone or scene.version() != version:
                scene = None  # the next call needs the file as it was
    cells = {name: WITHOUT_IT[group][column] for group, names in groups().items() for name in names}
    assert seen == cells


def without_it(scene: Scene, call: Call) -> str:
    """Return what a call does beside a connection that it was not given, in the words of the table."""
    scene.statements.clear()
    return error_of(lambda: call(scene)) or ("inside" if scene.statements else "works")


@pytest.mark.parametrize("name", OF_ITS_TASK)
def test_calls_for_a_task_of_the_transaction(scenes, capsys, name):
    seen = {}
    for column, end in (("committed", "commit"), ("rolled back", "rollback")):
        scene = scenes("writing")
        scene.enter()
        handle = scene.own = scene.queue.submit("echo", connection=scene.connection)
        seen["open"] = without_it(scene, CALLS[name])
        getattr(scene.connection, end)()
        seen[column] = error_of(lambda handle=handle: handle.result(0)) or "waits"
    assert seen == OF_ITS_TASK[name]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_callback_that_was_added_before_the_end_of_the_transaction_is_called(scenes, end):
    scene, told = scenes("writing"), threading.Event()
    scene.enter()
    handle = scene.queue.submit("echo", connection=scene.connection)
    handle.add_done_callback(lambda handle: told.set())
    assert not told.is_set()
    getattr(scene.connection, end)()
    if end == "commit":
        scene.queue.cancel_task(handle.id)
    assert told.wait(PATIENCE)


def test_another_thread_waits_for_a_task_of_the_transaction(scenes):
    """Its handle must not say that the task does not exist."""
    scene = scenes("idle")
    scene.queue.resume("echo")
    with scene.queue:
        handle = scene.queue.submit("echo", {"n": 3}, connection=scene.connection)
        assert not scene.other.submit(handle.done).result()
        waiting = scene.other.submit(handle.result, PATIENCE)
        scene.connection.commit()
        assert waiting.result(PATIENCE) == 3


# --- whose transaction it is


def test_the_transaction_of_another_thread_on_the_same_connection_is_left_alone(scenes):
    """A pool has handed the connection on. Reads over it would leave a snapshot in that transaction."""
    scene = scenes("shared")
    scene.give()
    handle = scene.queue.submit("echo")
    scene.other.submit(scene.connection.execute, "BEGIN").result()
    scene.statements.clear()
    assert not handle.done()
    assert not handle.cancelled()
    assert scene.statements == []
    scene.queue.submit("echo")  # another connection commits
    scene.other.submit(write, scene).result()
    scene.other.submit(scene.connection.commit).result()


def test_plain_calls_wait_for_the_transaction_of_another_thread_on_the_same_connection(scenes):
    scene = scenes("shared", busy_timeout=PATIENCE)
    scene.give()
    scene.enter()
    submitting = run_in_thread(lambda: scene.queue.submit("echo", id="late"))
    scene.other.submit(scene.connection.commit).result()
    assert submitting().id == "late"


@pytest.mark.skipif(sys.version_info < (3, 12), reason=NO_MANUAL_COMMITS)
def test_nothing_is_kept_of_transactions_that_were_rolled_back_without_autocommit(scenes):
    scene = scenes("manual")
    for _ in range(20):
        write(scene)
        scene.queue.submit("echo", connection=scene.connection)
        scene.connection.rollback()
    # One that was seen between its rollback and the next transaction is forgotten a moment later.
    eventually(lambda: len(scene.queue.repository.transactions.units) <= 1)
    assert scene.queue.submit("echo", id="after").id == "after"


def test_a_call_that_stores_nothing_leaves_no_transaction_behind(scenes):
    scene = scenes("idle")
    scene.queue.submit("echo", unique_key="same")
    scene.queue.submit("echo", unique_key="same", on_conflict="return", connection=scene.connection)
    assert not scene.connection.in_transaction
    scene.queue.submit("echo")


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # a recorded warning would keep the connection
def test_a_connection_that_was_dropped_in_the_middle_frees_the_file_at_once(scenes):
    scene = scenes("idle")

    def careless():
        connection = sqlite3.connect(scene.path)
        connection.execute("INSERT INTO orders DEFAULT VALUES")
        scene.queue.submit("echo", id="gone", connection=connection)

    for thread in (lambda call: call(), lambda call: scene.other.submit(call).result()):
        thread(careless)
        settle_references()
        scene.queue.submit("echo")
        with pytest.raises(TaskNotFound):
            scene.queue.get_task_status("gone")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dropped_connection_frees_the_file_after_a_collection_of_another_thread(
    scenes, monkeypatch
):
    """That may miss what has just become garbage, and meanwhile the collector returns 0 at once."""
    scene = scenes("idle")
    answers = [0, 0]
    collect = lambda: answers.pop() if answers else gc.collect()  # noqa: E731
    monkeypatch.setattr(joining, "gc", SimpleNamespace(collect=collect))

    def careless():
        connection = sqlite3.connect(scene.path)
        connection.execute("INSERT INTO orders DEFAULT VALUES")
        scene.queue.submit("echo", connection=connection)

    scene.other.submit(careless).result()
    scene.queue.submit("echo")
    assert len(answers) < 2  # it was asked, and Python may have collected it by itself since


def test_a_queue_is_stopped_inside_a_transaction_without_a_wait_for_its_lock(scenes, caplog):
    scene = scenes("idle")
    scene.queue.start()
    scene.queue.submit("echo", connection=scene.connection)
    began = time.monotonic()
    assert scene.queue.stop(PATIENCE) == []
    assert time.monotonic() - began < PATIENCE / 2  # the time-out of the lock is PATIENCE
    assert "could not be recorded" in caplog.text
