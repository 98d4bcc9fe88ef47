"""Pipes between the processes on one SQLite file, which tell of commits."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from string import ascii_uppercase

import pytest
from helpers import PATIENCE, eventually, run_in_thread

from taskx import Queue, SQLiteRepository, Task
from taskx.stores.sqlite import wakeups
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import CANCEL_REQUESTED, ENDED, FREED, Ending, freed_of
from taskx.tasks.timing import Timing

NOW = 1_700_000_000_000
NEW = freed_of("t")
ALL = FREED + CANCEL_REQUESTED + ENDED + NEW

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")


@pytest.fixture
def mine(database):
    with SQLiteRepository(database) as made:
        made.house.prepare()
        made.version()
        yield made


@pytest.fixture
def listeners_every():
    """The seconds between scans of another process for listeners: it scans at each write."""
    return 0.0


@pytest.fixture
def theirs(database, listeners_every):
    """The repository as another process has it."""
    timing = Timing(listeners_every=listeners_every)
    with SQLiteRepository(database, timing=timing) as made:
        yield made


@pytest.fixture
def listen(mine):
    made = []

    def listen(news=ALL):
        made.append(mine.news.listen(news))
        return made[-1]

    yield listen
    for listener in made:
        listener.close()


def pipes(database):
    return sorted(database.with_name("tasks.db-nodes").glob("*.pipe"))


def created(task_id="a", **columns):
    return lifecycle.create(task_id=task_id, type="t", now=NOW, **columns)


def started(repository, task_id="a"):
    """Store and start a task. Return the running task."""
    repository.apply([created(task_id)])
    repository.apply([lifecycle.start(repository.get_by_id(task_id), NOW, "node")])
    return repository.get_by_id(task_id)


def owned(insert):
    insert.row["owner"] = "node"
    return insert


# --- news


def test_a_task_that_no_node_holds_is_news(listen, theirs):
    listener = listen()
    theirs.apply([created()])
    assert listener.wait(PATIENCE) == NEW


def test_a_new_task_is_news_for_those_who_listen_for_its_type(listen, theirs):
    other = next(kind for kind in "abc" if freed_of(kind) != NEW)
    here, elsewhere = listen(freed_of(other)), listen(NEW)
    theirs.apply([created()])
    assert elsewhere.wait(PATIENCE) == NEW
    assert here.wait(0) == ""


@pytest.mark.parametrize("type", ["t", "ü", "\ud800", "x" * 200], ids=["t", "ü", "bad", "long"])
def test_the_news_of_a_type_is_a_capital_letter(type):
    """It is a part of the name of a pipe."""
    assert freed_of(type) in ascii_uppercase


def test_the_news_of_a_type_is_the_same_in_every_process():
    assert freed_of("t") == "M"


def test_a_task_that_waits_for_its_turn_is_news(listen, theirs):
    """Other nodes may have workers for it."""
    listener = listen()
    theirs.apply([created(concurrency_key="k")])
    assert listener.wait(PATIENCE) == FREED


def test_a_request_to_cancel_is_news(theirs, listen):
    started(theirs)
    listener = listen()
    theirs.apply(lifecycle.cancel("a", NOW))
    assert listener.wait(PATIENCE) == CANCEL_REQUESTED


def test_the_end_of_a_task_is_news(theirs, listen):
    task = started(theirs)
    listener = listen()
    theirs.apply(lifecycle.conclude(task, Ending(returned=True), NOW))
    assert listener.wait(PATIENCE) == ENDED


def test_the_deletion_of_a_task_is_news(theirs, listen):
    theirs.apply([created()])
    listener = listen()
    theirs.apply([lifecycle.delete("a")])
    assert listener.wait(PATIENCE) == ENDED


def test_several_kinds_of_news_arrive_together(theirs, listen):
    task = started(theirs)
    listener = listen()
    theirs.apply([*lifecycle.conclude(task, Ending(returned=True), NOW), created("b")])
    heard = listener.wait(PATIENCE)
    assert set(heard) == {ENDED, NEW}


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda task: owned(created("b")), id="a task that its node holds"),
        pytest.param(lambda task: created("b", run_at=NOW + 10**9), id="a delayed task"),
        pytest.param(lambda task: lifecycle.take("waiting", "node"), id="a task that is taken"),
        pytest.param(lambda task: lifecycle.progress("a", task.starts, 5, ""), id="progress"),
        pytest.param(lambda task: lifecycle.checkpoint(task, "{}", durable=False), id="checkpoint"),
    ],
)
def test_a_write_that_nobody_waits_for_is_no_news(theirs, listen, write):
    task = started(theirs)
    theirs.apply([created("waiting")])
    listener = listen()
    assert theirs.apply([write(task)]) == [True]
    assert listener.wait(0) == ""


def test_a_start_is_no_news(theirs, listen):
    theirs.apply([created()])
    listener = listen()
    theirs.apply([lifecycle.start(theirs.get_by_id("a"), NOW, "node")])
    assert listener.wait(0) == ""


@pytest.mark.parametrize(
    "free",
    [
        pytest.param(lambda: lifecycle.release("a"), id="release"),
        pytest.param(lambda: lifecycle.free("a", "node"), id="free"),
        pytest.param(lambda: lifecycle.give_turn("a", "k")[0], id="give turn"),
    ],
)
def test_a_write_that_lets_a_task_start_is_news(free):
    assert lifecycle.news_of([free()]) == {FREED}


def test_a_retry_is_news_if_another_node_may_start_it():
    task = Task(type="t", id="a", created_at=None, max_attempts=5, owner="node", starts=1)
    at_once, _ = lifecycle.conclude(task, Ending(returned=False), NOW)
    later, _ = lifecycle.conclude(task, Ending(returned=False, delay=60), NOW)
    assert lifecycle.news_of([at_once, later]) == set()
    freed = at_once._replace(changes={**at_once.changes, "owner": ""})
    assert lifecycle.news_of([freed]) == {FREED}


def test_a_write_whose_guard_failed_is_no_news(theirs, listen):
    theirs.apply([created()])
    listener = listen()
    assert theirs.apply([created()]) == [False]
    assert listener.wait(0) == ""


# --- listeners


def test_a_listener_hears_only_the_news_it_asked_for(theirs, listen):
    work, ends = listen(NEW), listen(ENDED)
    theirs.apply([created()])
    assert work.wait(PATIENCE) == NEW
    assert ends.wait(0) == ""


def test_every_listener_hears_the_news(theirs, listen):
    listeners = [listen() for _ in range(3)]
    theirs.apply([created()])
    assert [listener.wait(PATIENCE) for listener in listeners] == [NEW] * 3


def test_news_from_before_the_wait_is_heard(theirs, listen):
    listener = listen()
    theirs.apply([created("a")])
    theirs.apply([created("b")])
    assert listener.wait(PATIENCE) == 2 * NEW
    assert listener.wait(0) == ""


def test_a_queue_does_not_hear_its_own_writes(mine, listen):
    queue = Queue(mine)
    listener = listen()
    queue.declare("t")
    queue.submit("t")
    assert listener.wait(0) == ""


def test_queues_on_one_repository_hear_one_another(mine, listen):
    queues = [Queue(mine), Queue(mine)]
    listener = listen()
    queues[0].declare("t")
    queues[0].submit("t")
    assert listener.wait(PATIENCE) == NEW


@pytest.mark.parametrize("listeners_every", [1000.0])
def test_a_busy_writer_scans_for_listeners_now_and_then(theirs, listen, monkeypatch):
    theirs.apply([created("a")])
    listener = listen()
    theirs.apply([created("b")])
    assert listener.wait(0) == ""
    monkeypatch.setattr(theirs._file_links.wakeups, "_scan_at", 0.0)
    theirs.apply([created("c")])
    assert listener.wait(PATIENCE) == NEW


# --- errors are ignored


def test_a_full_pipe_does_not_block_a_writer(theirs, listen):
    listener = listen()
    fd = os.open(listener._path, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while os.write(fd, b"f" * 4096):
            pass
    os.close(fd)
    assert theirs.apply([created()]) == [True]
    listener.close()  # although the pipe is full


def test_a_removed_pipe_is_ignored(theirs, listen, database):
    gone, there = listen(), listen()
    theirs.apply([created("a")])
    os.unlink(gone._path)
    theirs.apply([created("b")])
    assert there.wait(PATIENCE) == 2 * NEW


def test_the_pipe_of_a_dead_process_is_removed_by_the_next_listener(listen, theirs, database):
    alive = listen()
    dead = database.with_name("tasks.db-nodes") / f"dead.{NEW}.pipe"
    os.mkfifo(dead)
    assert theirs.apply([created()]) == [True]
    listen()
    assert not dead.exists()
    assert alive.wait(PATIENCE) == NEW
    assert len(pipes(database)) == 2


def test_without_a_folder_for_pipes_there_is_no_listener(database, tmp_path):
    with SQLiteRepository(database) as repository:
        (tmp_path / "tasks.db-nodes").touch()
        assert repository.news.listen(ALL) is None
        assert repository.apply([created()]) == [True]


def test_without_named_pipes_there_is_no_listener(mine, monkeypatch):
    monkeypatch.setattr(wakeups, "_FLAGS", 0)
    assert mine.news.listen(ALL) is None


# --- the end


def test_closing_wakes_the_waiting_thread_and_removes_the_pipe(listen, database):
    listener = listen()
    waiting = threading.Event()
    wait = run_in_thread(lambda: (waiting.set(), listener.wait()))
    assert waiting.wait(PATIENCE)
    assert len(pipes(database)) == 1
    listener.close()
    wait()
    assert pipes(database) == []
    listener.close()


def test_a_pipe_stays_open_as_long_as_its_listener_exists(mine):
    """``close`` must not close the file: a thread may wait on it, and another file may get its number."""
    listener = mine.news.listen(ALL)
    closes = listener._close_fd
    listener.close()
    assert closes.alive
    assert not closes.atexit
    del listener
    eventually(lambda: not closes.alive)


FORKS = """
import os, sys, warnings
from taskx import SQLiteRepository

warnings.simplefilter("ignore", DeprecationWarning)
with SQLiteRepository(sys.argv[1]) as repository:
    repository.version()
    listener = repository.news.listen("f")
    if not (pid := os.fork()):
        try:
            os.fstat(listener._fd)
        except OSError:
            listener.close()  # nothing of the parent's
            own = repository.news.listen("f")
            print(os.path.exists(listener._path), os.path.exists(own._path), flush=True)
        sys.exit()  # as at the end of a program
    os.waitpid(pid, 0)
    left = [name for name in os.listdir(sys.argv[1] + "-nodes") if name.endswith(".pipe")]
    print(left == [os.path.basename(listener._path)], flush=True)
print(os.path.exists(listener._path), flush=True)
"""


@pytest.mark.process
def test_a_forked_child_leaves_its_parents_pipe_alone(spawn, database):
    child = spawn(FORKS, database)
    assert child.read() == "True True"
    assert child.read() == "True"
    assert child.read() == "True"
    assert child.ends() == ("", "")
    assert pipes(database) == []  # removed as the program ended
