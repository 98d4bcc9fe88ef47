"""``taskx.run``: a program that only runs queues, and ends on a signal."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import PATIENCE, SOON, eventually, node_of, run_in_thread

import taskx
from taskx import (
    CancelReason,
    Config,
    ConfigurationError,
    MemoryRepository,
    Queue,
    QueueStopped,
    RepositoryUnavailable,
    SchemaMismatch,
    SQLiteRepository,
    TaskStatus,
)
from taskx.queue import foreground
from taskx.tasks.timing import Timing

# Real processes

# Started with the path of the file, and a script.
PROGRAM = """
import sys, threading, time
import taskx
from taskx import Config, Queue, SQLiteRepository
from taskx.node import node
from taskx.tasks.timing import Timing

timing = Timing(at_once_within=float(sys.argv[2]))
queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=2), timing=timing)

def say(word):
    sys.stdout.write(word + "\\n")  # in one piece, as several threads print
    sys.stdout.flush()

@queue.executor()
def hold():
    say("running")
    sys.stdin.readline()
    return "held"

@queue.executor()
def listen(ctx):
    say("running")
    ctx.sleep(120)

@queue.executor()
def hang():
    say("running")
    threading.Event().wait()
"""

# The clock of a stop jumps so many seconds when it is told to.
JUMPS = """
class Clock:
    jumped = 0.0

    def monotonic(self):
        return time.monotonic() + self.jumped

def jump():
    node.time.jumped = float(sys.stdin.readline())

node.time = Clock()
threading.Thread(target=jump, daemon=True).start()
"""

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def run(spawn, database):
    """Return a function that starts the program with more lines, and a time-out for the second signal."""
    return lambda more, at_once_within=1.0: spawn(PROGRAM + more, database, at_once_within)


@pytest.fixture
def repository(database):
    with SQLiteRepository(database) as made:
        yield made


def is_stopping(repository):
    return [node.stopping for node in repository.liveness.nodes()] == [True]


def code_of(child):
    _, errors = child.ends()
    assert errors.count("Traceback") == 0, errors
    return child.process.returncode


def counts(task):
    return task.errors, task.interruptions, task.crashes


@pytest.mark.parametrize("number", CODES)
def test_a_running_task_ends_after_a_signal_and_the_exit_code_is_zero(run, repository, number):
    child = run("queue.submit('hold', id='x'); sys.exit(taskx.run(queue, timeout=120))")
    assert child.read() == "running"
    child.signal(number)
    eventually(lambda: is_stopping(repository))
    child.tell()
    assert code_of(child) == 0
    task = repository.get_by_id("x")
    assert (task.status, task.result) == (TaskStatus.COMPLETED, "held")
    assert repository.liveness.nodes() == []


def test_a_task_that_heeds_its_token_is_handed_back_at_the_time_out(run, repository):
    """The clock of the stop jumps to four fifths of the time-out, so that the rest is long enough."""
    child = run(JUMPS + 'queue.submit("listen", id="x"); sys.exit(taskx.run(queue, timeout=600))')
    assert child.read() == "running"
    child.signal(signal.SIGTERM)
    eventually(lambda: is_stopping(repository))
    child.tell(480)
    assert code_of(child) == 0
    task = repository.get_by_id("x")
    assert (task.status, counts(task)) == (TaskStatus.PENDING, (0, 1, 0))


def runs_elsewhere(repository, kind):
    """Run the task ``x`` to its end, and return its record."""
    queue = Queue(repository)
    queue.executor(kind)(lambda: "elsewhere")
    with queue:
        assert queue.handle("x").result(PATIENCE) == "elsewhere"
    return repository.get_by_id("x")


def test_the_exit_code_is_one_if_a_task_still_runs_at_the_time_out(run, repository):
    child = run(JUMPS + 'queue.submit("hang", id="x"); sys.exit(taskx.run(queue, timeout=600))')
    assert child.read() == "running"
    child.signal(signal.SIGTERM)
    eventually(lambda: is_stopping(repository))  # else the task would count as crashed
    child.tell(600)
    assert code_of(child) == 1
    assert counts(runs_elsewhere(repository, "hang")) == (0, 1, 0)


@pytest.mark.parametrize("kind", ["listen", "hang"])
@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_the_program_at_once(run, repository, number, kind):
    """The task is pending again, and no attempt is spent."""
    child = run(
        f"queue.submit({kind!r}, id='x'); sys.exit(taskx.run(queue, timeout=600))",
        60.0 if kind == "listen" else 1.0,  # the first one ends as soon as the machine lets it
    )
    assert child.read() == "running"
    child.signal(signal.SIGTERM)
    eventually(lambda: is_stopping(repository))
    assert child.process.poll() is None
    child.signal(number)
    began = time.monotonic()
    assert code_of(child) == CODES[number]
    assert time.monotonic() - began < SOON  # the time-out is 600 s
    if kind == "listen":
        assert repository.get_by_id("x").status is TaskStatus.PENDING
    assert counts(runs_elsewhere(repository, kind)) == (0, 1, 0)


def test_signals_that_come_at_random_moments_lose_no_task(run, repository):
    """Each process gets its signals at another moment of its start and its stop."""
    submit = "[queue.submit('quick', id=f'{sys.argv[0]}{n}') for n in range(50)]"
    for round_ in range(6):
        child = run(
            f"""
queue.executor("quick")(lambda: "done")
sys.argv[0] = "{round_}-"
{submit}
say("ready")
sys.exit(taskx.run(queue, timeout=60))
"""
        )
        assert child.read() == "ready"
        threading.Event().wait(0.02 * round_)  # blocks on purpose
        child.signal(signal.SIGINT)
        child.ends()
        assert child.process.returncode in (0, -signal.SIGINT, 1)
    queue = Queue(repository)
    queue.executor("quick")(lambda: "done")
    with queue:
        assert queue.drain(PATIENCE)
    tasks = [repository.get_by_id(f"{round_}-{n}") for round_ in range(6) for n in range(50)]
    assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    assert {task.errors for task in tasks} == {0}


def test_a_program_that_ignores_a_signal_ignores_it_in_run_too(run, repository):
    """A shell starts a job in the background so, to keep the Ctrl-C of its user from the job."""
    child = run(
        """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
queue.submit("hold", id="x")
sys.exit(taskx.run(queue, timeout=120))
"""
    )
    assert child.read() == "running"
    child.signal(signal.SIGINT)
    child.tell()
    eventually(lambda: repository.get_by_id("x").status is TaskStatus.COMPLETED)
    assert not is_stopping(repository)
    child.signal(signal.SIGTERM)
    assert code_of(child) == 0


# In this process: pytest runs tests in the main thread


def do_nothing(number, frame):
    """The handler of a program."""


@pytest.fixture(autouse=True)
def handlers():
    """Fail a test that leaves other signal handlers behind; no test may end this process."""
    usual = {number: signal.getsignal(number) for number in CODES}
    for number in CODES:
        signal.signal(number, do_nothing)
    yield
    left = {number: signal.getsignal(number) for number in CODES}
    for number, handler in usual.items():
        signal.signal(number, handler)
    assert left == dict.fromkeys(CODES, do_nothing)


def in_run():
    return signal.getsignal(signal.SIGTERM).__qualname__ == "Signals._hear"


def test_run_starts_and_stops_all_its_queues(make_queue):
    queues = [make_queue(MemoryRepository()) for _ in range(3)]
    queues[2].start()

    def end():
        eventually(lambda: all(node_of(queue) for queue in queues) and in_run())
        os.kill(os.getpid(), signal.SIGTERM)

    ended = run_in_thread(end)
    assert taskx.run(*queues, queues[0], timeout=PATIENCE) == 0
    ended()
    assert ["stopped" in repr(queue) for queue in queues] == [True] * 3


def test_run_returns_if_other_threads_stop_all_queues(make_queue):
    queues = [make_queue(MemoryRepository()) for _ in range(2)]

    def end():
        for queue in queues:
            eventually(lambda queue=queue: node_of(queue))
            queue.stop(PATIENCE)

    ended = run_in_thread(end)
    assert taskx.run(*queues) == 0
    ended()


def test_the_exit_code_is_one_if_a_newer_taskx_has_migrated_the_file(make_queue):
    queue = make_queue(MemoryRepository())
    retired = run_in_thread(
        lambda: eventually(lambda: node_of(queue)).pool.retire(SchemaMismatch("newer"))
    )
    assert taskx.run(queue) == 1
    retired()


def test_if_a_queue_cannot_start_the_others_are_stopped(make_queue):
    fine, broken = (make_queue(MemoryRepository()) for _ in range(2))
    begun, started = threading.Event(), threading.Event()

    @fine.executor("listen")
    def listen(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        return ctx.token.reason

    def prepare():
        assert started.wait(PATIENCE)
        raise RepositoryUnavailable("away")

    prepare_well, broken.repository.house.prepare = broken.repository.house.prepare, prepare
    handle = fine.submit("listen")
    run_in_thread(lambda: (begun.wait(PATIENCE), started.set()))
    with pytest.raises(RepositoryUnavailable, match="away"):
        taskx.run(fine, broken)
    assert "stopped" in repr(fine)
    assert handle.task().status is TaskStatus.COMPLETED
    assert handle.task().result == CancelReason.STOP.value
    broken.repository.house.prepare = prepare_well
    broken.start()  # as after a start that fails
    broken.stop(PATIENCE)
    with pytest.raises(QueueStopped):
        taskx.run(broken)


def test_a_start_that_takes_long_ends_at_the_first_signal(make_queue):
    queue = make_queue(MemoryRepository())
    begun, go_on = threading.Event(), threading.Event()
    prepare = queue.repository.house.prepare
    queue.repository.house.prepare = lambda: (begun.set(), go_on.wait(PATIENCE), prepare())
    signalled = run_in_thread(lambda: (begun.wait(PATIENCE), os.kill(os.getpid(), signal.SIGINT)))
    assert taskx.run(queue) == 0
    signalled()
    go_on.set()
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "taskx-run"])
    assert node_of(queue) is None


def test_an_exception_of_another_signal_handler_stops_the_queue(make_queue):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    queue = make_queue(MemoryRepository())
    usual = signal.signal(signal.SIGUSR1, ring)
    try:
        rung = run_in_thread(
            lambda: (
                eventually(lambda: node_of(queue) and in_run()),
                os.kill(os.getpid(), signal.SIGUSR1),
            )
        )
        with pytest.raises(Alarm):
            taskx.run(queue)
        rung()
    finally:
        signal.signal(signal.SIGUSR1, usual)
    assert "stopped" in repr(queue)


class Strikes:
    """A trace function that sends SIGTERM to this process at chosen lines of ``run``, counted from 0."""

    def __init__(self, *lines):
        self._left, self._count = list(lines), 0
        #: The functions that the signals struck.
        self.struck = []

    def __call__(self, frame, event, argument):
        if Path(frame.f_code.co_filename) != Path(foreground.__file__):
            return None
        if event == "line" and frame.f_code.co_name != "_note":
            if self._left and self._count == self._left[0]:
                self._left.pop(0)
                self.struck.append(frame.f_code.co_name)
                signal.raise_signal(signal.SIGTERM)
            self._count += 1
        return self


def run_with(strikes):
    """Run a new queue until it ends, and return the exit code; None if it was stopped before its start."""
    timing = Timing(signals_every=0.01)
    queue = Queue(MemoryRepository(), Config(worker_num=1), timing=timing)
    # The program's own handler gets the signals before and after those that run() handles.
    own = lambda *_: run_in_thread(lambda: queue.stop(PATIENCE))  # noqa: E731
    signal.signal(signal.SIGTERM, own)
    before = sys.gettrace()
    sys.settrace(strikes)
    try:
        return taskx.run(queue)
    except QueueStopped:
        return None
    finally:
        sys.settrace(before)
        assert signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, do_nothing)
        eventually(lambda: "stopped" in repr(queue))


def test_a_signal_at_any_line_before_the_wait_stops_the_queue():
    codes = []
    for line in itertools.count():
        strikes = Strikes(line)
        codes.append(run_with(strikes))
        if strikes.struck == ["wait"] and codes.count(0) > 20:
            break
    assert set(codes) <= {0, None}


def test_a_second_signal_at_any_line_ends_run_at_once_or_too_late():
    waits = next(line for line in itertools.count() if struck_at(line) == ["wait"])
    codes = []
    for line in itertools.count(waits + 1):
        strikes = Strikes(waits, line)
        codes.append(run_with(strikes))
        if len(strikes.struck) == 1:
            break
    assert set(codes) == {0, 143}


def struck_at(line):
    strikes = Strikes(line)
    run_with(strikes)
    return strikes.struck


def test_run_is_refused_outside_the_main_thread(make_queue):
    queue = make_queue(MemoryRepository())
    with pytest.raises(ConfigurationError, match="main thread"):
        run_in_thread(lambda: taskx.run(queue))()
    assert node_of(queue) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "at least one queue"), (("tasks.db",), "not str"), ((MemoryRepository(),), "not Memory")],
)
def test_run_refuses_what_is_no_queue(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        taskx.run(*arguments)


def test_run_refuses_an_invalid_time_out(make_queue):
    queue = make_queue(MemoryRepository())
    with pytest.raises(ConfigurationError, match="timeout"):
        taskx.run(queue, timeout=-1)
    assert node_of(queue) is None
