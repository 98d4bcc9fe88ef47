"""Wake-ups: a commit of one process wakes the others; in these tests no node polls."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import CancelledError
from string import ascii_uppercase
from types import SimpleNamespace

import pytest
from helpers import (
    PATIENCE,
    eventually,
    housekeeper_of,
    no_rounds,
    parts_of,
    pool_of,
    run_in_thread,
)

from taskx import (
    Queue,
    QueueStopped,
    RepositoryUnavailable,
    SQLiteRepository,
    TaskFailed,
    TaskFilter,
    TaskStatus,
)
from taskx.node import listening
from taskx.node.node import LocalNode
from taskx.stores.parts import Listener
from taskx.stores.sqlite.links import FileLinks
from taskx.tasks import bell, ids
from taskx.tasks.bell import Rest
from taskx.tasks.lifecycle import CANCEL_REQUESTED, FREED, freed_of
from taskx.tasks.timing import DEFAULT_TIMING, Timing

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")

NEVER = 3600.0


#: Makes no node and no waiting thread poll.
no_polling = pytest.mark.timing(
    **dict.fromkeys(
        ("poll_every", "recover_every", "audit_every", "handles_every", "watch_every"), NEVER
    )
)


@pytest.fixture
def repository(database):
    with SQLiteRepository(database, timing=Timing(listeners_every=0.0)) as made:
        yield made


@pytest.fixture
def elsewhere(database, timing):
    """A queue that is not started, on a second connection as in another process."""
    with SQLiteRepository(database, timing=Timing(listeners_every=0.0)) as made:
        queue = Queue(made, timing=timing)
        yield queue
        parts_of(queue).watcher.close()


@pytest.fixture
def listens(make_queue):
    """Return a function that makes a started queue which hears the others and has nothing to do."""

    def make(register=lambda queue: None, **config):
        queue = make_queue(**config)
        register(queue)
        queue.start()
        eventually(lambda: housekeeper_of(queue)._listening._listener)
        eventually(lambda: parts_of(queue).agenda._asleep_long)
        return queue

    return make


@no_polling
def test_a_task_that_another_process_submits_starts_at_once(listens, elsewhere):
    ran = threading.Event()
    listens(lambda queue: queue.executor("t")(ran.set))
    elsewhere.declare("t")
    for _ in range(3):
        elsewhere.submit("t")
        assert ran.wait(PATIENCE)
        ran.clear()


@no_polling
def test_a_task_that_another_process_submits_after_its_pause_does_not_start(listens, elsewhere):
    """No event told this node of the pause: it reads the pauses before it fetches."""
    began = []

    def register(queue):
        for kind in ("paused", "other"):
            queue.executor(kind)(lambda kind=kind: began.append(kind))

    queue = listens(register, worker_num=1)  # one worker runs the tasks in order
    elsewhere.declare("paused")
    elsewhere.declare("other")
    elsewhere.pause("paused")
    waits = elsewhere.submit("paused")
    elsewhere.submit("other")
    eventually(lambda: "other" in began)
    assert began == ["other"]
    assert queue.get_task_status(waits.id).status is TaskStatus.PENDING


@no_polling
def test_a_cancel_by_another_process_fires_the_token_at_once(listens, elsewhere):
    begun = threading.Event()

    def wait(ctx):
        begun.set()
        assert ctx.token.wait(PATIENCE)
        ctx.token.raise_if_cancelled()

    queue = listens(lambda queue: queue.executor("t")(wait))
    handle = queue.submit("t")
    assert begun.wait(PATIENCE)
    assert not elsewhere.cancel_task(handle.id)
    assert eventually(handle.cancelled)


@no_polling
def test_a_token_that_fires_is_a_result_so_the_next_cancel_waits_for_no_rest(
    listens, elsewhere, monkeypatch
):
    begun, told, after = threading.Event(), [], Rest.after

    def wait(ctx):
        begun.set()
        assert ctx.token.wait(PATIENCE)

    def noted(rest, *, vain):
        after(rest, vain=vain)
        if threading.current_thread().name == "taskx-listen":
            told.append(vain)

    monkeypatch.setattr(Rest, "after", noted)
    queue = listens(lambda queue: queue.executor("t")(wait))
    handle = queue.submit("t")
    assert begun.wait(PATIENCE)
    elsewhere.cancel_task(handle.id)
    eventually(lambda: told)
    assert told == [False]


@no_polling
@pytest.mark.parametrize("fails", [False, True])
def test_an_outcome_in_another_process_ends_a_wait_at_once(listens, elsewhere, fails):
    going_on = threading.Event()

    def work():
        assert going_on.wait(PATIENCE)
        return 7 // (not fails)

    listens(lambda queue: queue.executor("t", max_attempts=1)(work))
    elsewhere.declare("t")
    waits = run_in_thread(elsewhere.submit("t").result)
    eventually(lambda: parts_of(elsewhere).watcher._listener)
    going_on.set()
    if fails:
        with pytest.raises(TaskFailed):
            waits()
    else:
        assert waits() == 7


@no_polling
def test_a_process_can_wait_for_one_result_after_another(listens, elsewhere):
    listens(lambda queue: queue.executor("t")(lambda n: n))
    elsewhere.declare("t")
    assert [elsewhere.submit("t", {"n": n}).result(PATIENCE) for n in range(10)] == [*range(10)]


def test_a_node_that_hears_nothing_polls(make_queue, elsewhere, monkeypatch):
    monkeypatch.setattr(FileLinks, "listen", lambda self, news: None)
    queue = make_queue()
    queue.executor("t")(lambda: "fine")
    elsewhere.declare("t")
    with queue:
        assert elsewhere.submit("t").result(PATIENCE) == "fine"


def test_a_queue_polls_if_the_repository_fails_to_listen(
    make_queue, elsewhere, monkeypatch, caplog
):
    monkeypatch.setattr(FileLinks, "listen", lambda self, news: 1 // 0)
    queue = make_queue()
    queue.executor("t")(lambda: "fine")
    elsewhere.declare("t")
    # The handle is watched before a queue is there that could end the task.
    result = run_in_thread(elsewhere.submit("t").result)
    eventually(lambda: "gets no wake-ups" in caplog.text)
    with queue:
        eventually(lambda: "this node only polls" in caplog.text)
        assert result() == "fine"


def test_a_queue_polls_if_its_listener_fails(make_queue, elsewhere, monkeypatch, caplog):
    failed = threading.Event()

    def fails(self, timeout=None):
        if threading.current_thread().name == "taskx-watch":
            failed.set()
        raise ZeroDivisionError

    monkeypatch.setattr("taskx.stores.sqlite.wakeups.Pipe.wait", fails)
    queue = make_queue()
    queue.executor("t")(lambda: failed.wait(PATIENCE))
    elsewhere.declare("t")
    with queue:
        eventually(lambda: "this node only polls" in caplog.text)
        assert elsewhere.submit("t").result(PATIENCE)
    eventually(
        lambda: "gets no wake-ups" in caplog.text
    )  # a waiting thread may look before its watcher
    assert caplog.text.count("gets no wake-ups") == 1


@no_polling
def test_a_stop_ends_the_thread_and_removes_the_pipe(listens, database):
    queue = listens()
    pipes = lambda: [*database.with_name("tasks.db-nodes").glob("*.pipe")]  # noqa: E731
    assert len(pipes()) == 1
    queue.stop(PATIENCE)
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "taskx-listen"])
    assert pipes() == []


@no_polling
def test_closing_a_queue_that_waited_removes_its_pipe(elsewhere, listens, database):
    queue = listens(lambda queue: queue.executor("t")(lambda: None))
    elsewhere.declare("t")
    elsewhere.submit("t").result(PATIENCE)
    queue.stop(PATIENCE)
    parts_of(elsewhere).watcher.close()
    eventually(lambda: [*database.with_name("tasks.db-nodes").glob("*.pipe")] == [])


def test_a_start_that_fails_leaves_no_listener(make_queue, monkeypatch, database):
    queue = make_queue()
    monkeypatch.setattr(LocalNode, "_publish", lambda self: False)
    with pytest.raises(QueueStopped, match="while it started"):
        queue.start()
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "taskx-listen"])
    assert [*database.with_name("tasks.db-nodes").glob("*.pipe")] == []


# --- rests between fetches


@pytest.fixture
def spent(monkeypatch):
    """A rest with its clocks: a call lets time pass, and uses processor time."""
    now = SimpleNamespace(wall=100.0, used=5.0)
    clock = SimpleNamespace(monotonic=lambda: now.wall, thread_time=lambda: now.used)
    monkeypatch.setattr(bell, "time", clock)

    def spent(wall=0.0, used=0.0):
        now.wall += wall
        now.used += used

    spent.rest = Rest(DEFAULT_TIMING)
    return spent


def rests(spent, used):
    """Return the rests after fetches in vain that each use ``used`` seconds of processor time."""
    seconds = []
    for _ in range(7):
        spent(0.01, used)
        spent.rest.after(vain=True)
        seconds.append(round(spent.rest.seconds, 6))
    return seconds


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        pytest.param(0.0001, [2, 4, 8, 15, 15, 15, 15], id="until the rest is 150 times the cost"),
        pytest.param(0.0, [2] * 7, id="fetches that cost nothing"),
        pytest.param(0.5, [2, 4, 8, 16, 32, 64, 90], id="expensive fetches: until the next poll"),
    ],
)
def test_fetches_in_vain_come_less_and_less_often(spent, used, expected):
    assert spent.rest.seconds == 0
    assert rests(spent, used) == [pytest.approx(milliseconds / 1000) for milliseconds in expected]


def test_after_a_fetch_that_found_a_task_there_is_no_rest(spent):
    rests(spent, 0.0002)
    spent(used=0.0002)
    spent.rest.after(vain=False)
    assert spent.rest.seconds == 0
    spent(used=0.0002)
    spent.rest.after(vain=True)
    assert spent.rest.seconds == 0.002


def test_after_a_second_of_quiet_there_is_no_rest(spent):
    rests(spent, 0.0002)
    spent(0.99)
    assert spent.rest.seconds > 0
    spent(0.02)
    assert spent.rest.seconds == 0
    spent.rest.after(vain=True)
    assert spent.rest.seconds == 0.002


class Told(Listener):
    """A listener that hears the given news, one after another, and then ends its thread."""

    def __init__(self, listening, *news):
        self._listening, self._news = listening, list(news)
        self.timeouts = []

    def wait(self, timeout=None):
        self.timeouts.append(timeout)
        if self._news:
            return self._news.pop(0)
        self.close()
        return ""

    def close(self):
        self._listening._stopped = True


@pytest.fixture
def heard(monkeypatch):
    """Return a function that lets a thread hear some news.

    It returns the thread's actions in order, and the time-outs of its waits.
    """

    def heard(*news, brings):
        fetcher, done = SimpleNamespace(fetched=0), []
        timing = Timing(rest_within=NEVER)
        thread = listening.Listening(SimpleNamespace(fetcher=fetcher, timing=timing))

        def process(news):
            done.append(news)
            fetcher.fetched += brings

        monkeypatch.setattr(thread, "_process", process)
        monkeypatch.setattr(
            listening, "time", SimpleNamespace(sleep=lambda _: done.append("rests"))
        )
        listener = Told(thread, *news)
        monkeypatch.setattr(thread, "_listener", listener)
        thread._listen(listener)
        return done, listener.timeouts

    return heard


def test_news_is_processed_at_once_while_fetches_find_tasks(heard):
    done, timeouts = heard("f", "c", brings=True)
    assert done == ["f", "rests", "c", "rests"]
    assert timeouts == [None] * 3


def test_after_a_fetch_in_vain_the_listener_rests_before_the_next_one(heard):
    """In the meantime other nodes had a chance. All news of that time is processed together."""
    done, timeouts = heard("f", "f", "c", brings=False)
    assert done == ["f", "rests", "rests", "fc", "rests"]
    assert timeouts == [None, None, 0, None]


@pytest.fixture
def process(busy, monkeypatch):
    """Return a function that processes news in a queue with a busy worker, and returns its actions."""
    queue = busy()
    pool, seen = pool_of(queue), []

    def note(action):
        seen.append((threading.get_ident(), action))  # the threads of the queue act, too
        return queue.free

    def process(news):
        seen.clear()
        listening.Listening(pool)._process(news)
        return [action for thread, action in seen if thread == threading.get_ident()]

    with no_rounds(queue):  # a late round would fetch, and forget that more is stored
        monkeypatch.setattr(pool.fetcher, "refill", lambda: note("refill"))
        monkeypatch.setattr(pool, "fire_cancelled", lambda: note("cancels"))
        monkeypatch.setattr(parts_of(queue).agenda, "wake", lambda: note("wake"))
        queue.free, process.queue = True, queue
        yield process


@no_polling
def test_the_listener_reacts_to_the_kind_of_news(process):
    assert process(2 * FREED) == ["refill"]
    assert process(freed_of("t")) == ["refill"]
    assert process(CANCEL_REQUESTED) == ["cancels"]
    assert process(FREED + CANCEL_REQUESTED) == ["cancels", "refill"]
    assert process("\n?") == []


@no_polling
def test_without_room_in_the_buffer_the_listener_fetches_nothing(process, monkeypatch):
    monkeypatch.setattr(pool_of(process.queue).buffer, "room_to_fetch", lambda: 0)
    assert process(FREED) == []


@no_polling
def test_with_no_running_task_the_listener_ignores_cancels(process, monkeypatch):
    monkeypatch.setattr(pool_of(process.queue), "runs", {})
    assert process(CANCEL_REQUESTED) == []


@no_polling
def test_the_housekeeper_fetches_if_another_thread_is_fetching(process):
    process.queue.free = False
    assert process(FREED) == ["refill", "wake"]
    assert parts_of(process.queue).agenda.more_stored


@no_polling
def test_the_housekeeper_retries_a_fetch_that_failed(process, monkeypatch):
    def fails():
        raise RepositoryUnavailable("down")

    monkeypatch.setattr(pool_of(process.queue).fetcher, "refill", fails)
    assert process(FREED) == ["wake"]


def heard_by(queue) -> str:
    return housekeeper_of(queue)._listening._wanted


@no_polling
def test_a_new_task_wakes_only_the_nodes_that_run_its_type(listens, elsewhere):
    queue = listens(lambda queue: queue.executor("t")(lambda: None))
    assert heard_by(queue) == FREED + CANCEL_REQUESTED + freed_of("t")
    other = next(kind for kind in "abc" if freed_of(kind) != freed_of("t"))
    elsewhere.declare(other, "t")
    woken = []
    housekeeper_of(queue)._listening._process = woken.append
    elsewhere.submit(other)
    elsewhere.submit("t")
    eventually(lambda: woken)
    assert woken == [freed_of("t")]


def test_a_node_that_finds_executors_hears_of_every_type(make_queue):
    queue = make_queue(find_executor=lambda type: None)
    queue.start()
    eventually(lambda: {*ascii_uppercase} <= {*heard_by(queue)})


@no_polling
def test_a_node_hears_at_once_of_a_type_that_it_runs_from_now_on(listens, elsewhere):
    ran = threading.Event()
    queue = listens(lambda queue: queue.executor("t")(lambda: None))
    other = next(kind for kind in "abc" if freed_of(kind) != freed_of("t"))
    queue.executor(other)(ran.set)
    eventually(lambda: {freed_of(other), freed_of("t")} <= {*heard_by(queue)})
    elsewhere.declare(other)
    elsewhere.submit(other)
    assert ran.wait(PATIENCE)


@no_polling
def test_a_node_that_cannot_listen_anew_hears_what_it_heard_and_tries_again(
    listens, elsewhere, monkeypatch
):
    ran, tried = threading.Event(), []
    queue = listens(lambda queue: queue.executor("t")(ran.set))
    other = next(kind for kind in "abc" if freed_of(kind) != freed_of("t"))
    with monkeypatch.context() as full:
        full.setattr(queue.repository.news, "listen", tried.append)  # returns None
        queue.executor(other)(lambda: None)
        eventually(lambda: tried)
        elsewhere.declare("t")
        elsewhere.submit("t")
        assert ran.wait(PATIENCE)
        assert freed_of(other) not in heard_by(queue)
    parts_of(queue).agenda.wake()  # to the next round
    eventually(lambda: freed_of(other) in heard_by(queue))


def test_a_stop_while_a_node_listens_anew_leaves_no_listener_open(monkeypatch):
    registry = SimpleNamespace(finds=False, types=["t"])
    made = []

    def listen(kinds):
        if made:
            thread.stop()
        made.append(Told(thread))
        return made[-1]

    news = SimpleNamespace(listen=listen)
    moves = SimpleNamespace(repository=SimpleNamespace(news=news))
    thread = listening.Listening(SimpleNamespace(registry=registry, moves=moves))
    closed = []
    monkeypatch.setattr(Told, "close", lambda listener: closed.append(listener))
    monkeypatch.setattr(thread, "_listener", listen(""))
    thread.follow()
    assert {*closed} == {*made}
    assert len(made) == 2


# --- two processes

RUNS = """
import sys, threading
from taskx import Context, Queue, SQLiteRepository
from taskx.tasks.timing import Timing

timing = Timing(listeners_every=0.0, poll_every=3600.0, recover_every=3600.0, audit_every=3600.0)
queue = Queue(SQLiteRepository(sys.argv[1], timing=timing))
queue.executor("fine")(lambda n: n)

@queue.executor("waits")
def waits(ctx: Context):
    print("running", flush=True)
    ctx.token.wait(60)
    ctx.token.raise_if_cancelled()

with queue:
    while not queue._node._housekeeper._listening._listener:
        threading.Event().wait(0.001)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timing(watch_every=NEVER, handles_every=NEVER)
@pytest.mark.process
def test_two_processes_wake_each_other(spawn, elsewhere, database):
    """They do so for a submit, a cancel and outcomes."""
    child = spawn(RUNS, database)
    assert child.read() == "ready"
    for type in ("fine", "waits"):
        elsewhere.declare(type)
    assert [elsewhere.submit("fine", {"n": n}).result(PATIENCE) for n in range(20)] == [*range(20)]
    handle = elsewhere.submit("waits")
    assert child.read() == "running"
    assert not handle.cancel()
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert child.ends() == ("", "")


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_makes_an_id_does_not_hang(repository):
    """The child starts over, also its wake-ups, without the locks of its parent's threads."""
    repository.count(TaskFilter())
    held, over = threading.Event(), threading.Event()

    def hold():
        with ids._lock:
            held.set()
            assert over.wait(2 * PATIENCE)

    holding = run_in_thread(hold)
    assert held.wait(PATIENCE)
    if not (child := os.fork()):
        os._exit(0 if ids.new_id() else 1)
    try:
        assert eventually(lambda: os.waitpid(child, os.WNOHANG)[0] and "ended")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        over.set()
        holding()


@pytest.mark.process
def test_a_killed_process_does_not_prevent_wake_ups_of_others(spawn, elsewhere, database):
    killed = spawn(RUNS, database)
    assert killed.read() == "ready"
    killed.kill()
    child = spawn(RUNS, database)
    assert child.read() == "ready"
    elsewhere.declare("fine")
    assert elsewhere.submit("fine", {"n": 5}).result(PATIENCE) == 5
    assert len([*database.with_name("tasks.db-nodes").glob("*.fc*.pipe")]) == 1
