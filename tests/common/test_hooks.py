"""Hooks get each event once and in order, and cannot affect tasks."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import pytest
from executing.test_outcomes import ERRORS
from helpers import PATIENCE, Waiting, eventually, parts_of, pool_of

from taskx import (
    ConfigurationError,
    Hook,
    MemoryRepository,
    Queue,
    RepositoryUnavailable,
    Retry,
    Snooze,
    SQLiteRepository,
    Task,
    TaskStatus,
)
from taskx.node.buffer import Item
from taskx.node.hooks import Hooks
from taskx.tasks import lifecycle
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.testing import ManualClock

EVENTS = [name for name in vars(Hook) if not name.startswith("_")]


class Told(Hook):
    """A hook that notes each event as (event, id, facts), and the threads that call it."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.tasks: list[Task] = []
        self.threads: set[str] = set()

    def of(self, task_id: str) -> list[str]:
        """Return the names of a task's events."""
        return [event for event, id_, *_ in self.events if id_ == task_id]

    def last(self, event: str) -> Task:
        """Return the task of the last event with this name."""
        [*_, index] = [i for i, told in enumerate(self.events) if told[0] == event]
        return self.tasks[index]


def _note(event):
    def note(self, subject, *facts):
        self.events.append((event, getattr(subject, "id", subject), *facts))
        self.tasks.append(subject)
        self.threads.add(threading.current_thread().name)

    return note


for _event in EVENTS:
    setattr(Told, _event, _note(_event))


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def queue(make_queue, told):
    """A queue with two workers and the hook ``told``, not started."""
    return make_queue(worker_num=2, hooks=[told])


def finish(queue):
    """Wait until all tasks have run and all events are reported."""
    assert queue.drain(PATIENCE)


def wait_told(queue):
    """Wait until all events are reported."""
    assert parts_of(queue).hooks.wait(PATIENCE)


def listen(queue, task_id):
    """Start the queue, and run a task on it that runs until its token fires."""
    begun = threading.Event()

    @queue.executor()
    def listen(ctx):
        begun.set()
        ctx.sleep(PATIENCE)

    queue.start()
    queue.submit("listen", id=task_id)
    assert begun.wait(PATIENCE)


class TestEvents:
    def test_hooks_get_the_events_of_a_task_that_completes(self, started, told):
        started.submit("fine", id="a")
        finish(started)
        assert told.of("a") == ["submitted", "started", "finished"]
        submitted, running, finished = told.tasks[1:4]
        assert (submitted.status, submitted.type, submitted.starts) == ("pending", "fine", 0)
        assert (running.status, running.starts) == ("running", 1)
        assert running.started_at is not None
        assert finished == started.get_task_status("a")
        assert (finished.status, finished.result, finished.progress) == ("completed", "fine", 100)

    def test_hooks_get_the_events_of_a_task_that_fails(self, started, told):
        started.executor("bad")(lambda: 1 / 0)
        started.submit("bad", id="a")
        finish(started)
        assert told.of("a") == ["submitted", "started", "finished"]
        task = told.last("finished")
        assert task == started.get_task_status("a")
        assert (task.status, task.dead_letter) == (TaskStatus.FAILED, True)
        assert "ZeroDivisionError" in task.error

    def test_hooks_get_retries_and_snoozes(self, make_queue, told):
        clock = ManualClock()
        queue = make_queue(clock=clock, hooks=[told])
        errors = [Retry("one", delay=0), Retry("two", delay=60), Snooze(30)]

        @queue.executor("moody", max_attempts=3)
        def moody():
            if errors:
                raise errors.pop(0)

        queue.start()
        queue.submit("moody", id="a")
        for events, seconds in ((5, 60), (7, 30)):
            eventually(lambda n=events: len(told.of("a")) == n)
            clock.advance(seconds)
        eventually(lambda: "finished" in told.of("a"))
        assert [e for e in told.events if e[1] == "a"] == [
            ("submitted", "a"),
            ("started", "a"),
            ("retried", "a", "Retry: one", 0),
            ("started", "a"),
            ("retried", "a", "Retry: two", 60),
            ("started", "a"),
            ("snoozed", "a", 30),
            ("started", "a"),
            ("finished", "a"),
        ]
        snoozed = told.last("snoozed")
        assert (snoozed.status, snoozed.errors, snoozed.snoozes) == (TaskStatus.PENDING, 2, 1)
        assert snoozed.run_at is not None
        assert [a.outcome for a in snoozed.attempts] == ["retried", "retried", "snoozed"]

    def test_hooks_get_the_cancel_of_a_task_that_waits(self, queue, told):
        queue.declare("t")  # a queue that is not started reports events, too
        queue.submit("t", {"n": 1}, id="a")
        assert queue.cancel_task("a")
        cancelled = queue.get_task_status("a")
        queue.delete("a")
        wait_told(queue)
        assert told.of("a") == ["submitted", "finished"]
        assert told.last("finished") == cancelled
        assert cancelled.status is TaskStatus.CANCELLED

    def test_hooks_get_the_cancel_of_a_task_that_runs(self, queue, told):
        listen(queue, "a")
        assert not queue.cancel_task("a")
        finish(queue)
        assert told.of("a") == ["submitted", "started", "finished"]
        assert told.last("finished").status is TaskStatus.CANCELLED

    def test_hooks_get_an_interruption(self, queue, told):
        listen(queue, "a")
        queue.stop(PATIENCE, cancel=True)
        assert told.of("a") == ["submitted", "started", "interrupted"]
        assert told.last("interrupted").interruptions == 1

    def test_hooks_get_a_requeue(self, started, told):
        started.executor("bad")(lambda: 1 / 0)
        started.submit("bad", id="a")
        finish(started)
        started.requeue("a")
        finish(started)
        again = ["requeued", "started", "finished"]
        assert told.of("a") == ["submitted", "started", "finished", *again]
        task = told.last("requeued")
        assert (task.status, task.error, task.completed_at) == (TaskStatus.PENDING, "", None)

    def test_hooks_get_progress(self, queue, told):
        @queue.executor()
        def walk(ctx):
            ctx.progress(40, "nearly half")
            eventually(lambda: "progressed" in told.of("a"))

        queue.start()
        queue.submit("walk", id="a")
        finish(queue)
        assert told.of("a") == ["submitted", "started", "progressed", "finished"]
        assert ("progressed", "a", 40, "nearly half") in told.events
        task = told.last("progressed")
        assert (task.status, task.progress, task.message) == ("running", 40, "nearly half")

    def test_hooks_get_delayed_spilled_and_batched_tasks(self, make_queue, repository, told):
        queue = make_queue(worker_num=1, buffer_size=1, overflow="spill", hooks=[told])
        queue.executor("t")(lambda: None)
        queue.start()
        for n in range(20):
            queue.submit("t", id=f"s{n}")
        queue.submit("t", id="later", delay=0.001)
        queue.submit_many([Task(type="t", id=f"m{n}") for n in range(20)])
        eventually(lambda: told.of("later")[-1:] == ["finished"])
        finish(queue)
        ids = [f"{kind}{n}" for kind in "sm" for n in range(20)]
        for task_id in [*ids, "later"]:
            assert sorted(told.of(task_id)) == ["finished", "started", "submitted"]

    def test_hooks_get_the_events_of_a_task_that_the_caller_runs(self, make_queue, gate, told):
        queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs", hooks=[told])
        queue.executor("note")(lambda: None)
        queue.start()
        Waiting(queue, gate).fill(1)
        queue.submit("note", id="buffered")
        queue.submit("note", id="here")
        wait_told(queue)
        assert told.of("here") == ["submitted", "started", "finished"]
        assert told.of("buffered") == ["submitted"]

    def test_a_refused_submit_is_told_with_its_error_if_the_task_was_valid(
        self, queue, repository, told
    ):
        queue.declare("t")
        queue.submit("t", id="a")
        repository.down = True
        with pytest.raises(RepositoryUnavailable):
            queue.submit("t", id="b")
        repository.down = False
        for refused in (lambda: queue.submit("t", id="a"), lambda: queue.submit("?", id="c")):
            with pytest.raises(Exception, match=r"exists|registered"):
                refused()
        wait_told(queue)
        assert [event[:2] for event in told.events] == [
            ("submitted", "a"),
            ("refused", "b"),
            ("refused", "a"),
        ]
        assert [type(error).__name__ for _, _, *errors in told.events for error in errors] == [
            "RepositoryUnavailable",
            "DuplicateTask",
        ]

    def test_a_dropped_outcome_is_no_event(self, queue, repository, told):
        @queue.executor()
        def late(ctx):
            repository.update_status(ctx.task.id, TaskStatus.CANCELLED)

        queue.start()
        queue.submit("late", id="a")
        finish(queue)
        eventually(pool_of(queue).holds_nothing)
        wait_told(queue)
        assert told.of("a") == ["submitted", "started"]

    @pytest.mark.every_store
    @pytest.mark.parametrize(
        ("max_crashes", "asked", "events", "status"),
        [
            (2, False, ["rescued", "started", "finished"], "pending"),
            (1, False, ["rescued", "finished"], "failed"),
            (2, True, ["rescued", "finished"], "cancelled"),
        ],
    )
    def test_hooks_get_the_rescue_of_a_task_whose_process_died(
        self, queue, repository, told, max_crashes, asked, events, status
    ):
        queue.executor("t")(lambda: None)
        now = queue.clock.now_ms()
        repository.create(Task(id="a", type="t", max_crashes=max_crashes))
        start = lifecycle.start(repository.get_by_id("a"), now, "a node that died")
        assert list(repository.apply([start])) == [True]
        if asked:
            repository.apply(lifecycle.cancel("a", now))
        queue.start()
        finish(queue)
        assert told.of("a") == events
        rescued = told.tasks[[event for event, *_ in told.events].index("rescued")]
        assert (rescued.status, rescued.crashes) == (status, 1)

    def test_a_task_cancelled_before_a_worker_took_it_has_only_a_finished_event(
        self, make_queue, told
    ):
        queue = make_queue(worker_num=1, hooks=[told])
        queue.executor("t")(lambda: None)
        queue.start()
        queue.submit("t", id="first").result(PATIENCE)
        queue.stop(PATIENCE)
        starter, repository = pool_of(queue).starter, queue.repository
        repository.create(Task(id="a", type="t"))
        [run] = starter.start([Item(0, 0, 0, "a", "fine", True)], "worker")
        repository.apply(lifecycle.cancel("a", queue.clock.now_ms()))
        starter.hand_back([run])
        wait_told(queue)
        assert told.of("a") == ["finished"]
        assert told.last("finished").status is TaskStatus.CANCELLED

    def test_hooks_get_the_start_and_stop_of_the_queue(self, queue, told):
        queue.executor("t")(lambda: None)
        queue.submit("t", id="a")
        queue.start()
        queue.stop(PATIENCE)
        events = [told[0] for told in told.events]
        assert events[-1] == "queue_stopped"
        assert events.count("queue_started") == events.count("queue_stopped") == 1
        assert {subject for event, subject, *_ in told.events if "queue" in event} == {queue}

    def test_hooks_get_each_event_of_many_tasks_once_and_in_order(self, make_queue, told):
        """This holds even if tasks are started ahead, and other threads commit their outcomes."""
        queue = make_queue(worker_num=4, buffer_size=500, hooks=[told])
        queue.executor("t")(lambda: None)
        queue.start()
        ids = [queue.submit("t").id for _ in range(500)]
        finish(queue)
        assert Counter(told.events[1:]) == Counter(
            (event, id_) for id_ in ids for event in ("submitted", "started", "finished")
        )
        for id_ in ids[::29]:
            assert told.of(id_) == ["submitted", "started", "finished"]
        assert told.threads == {"taskx-hooks"}


@pytest.fixture
def hooked(make_queue):
    """Return a function that makes queues with hooks, and with an executor ``t``."""

    def make(*hooks: Hook) -> Queue:
        made = make_queue(hooks=hooks)
        made.executor("t")(lambda: None)
        return made

    return make


class TestCost:
    def test_a_hook_without_methods_costs_no_thread_and_no_call(self, hooked, monkeypatch):
        def never(*args):
            raise AssertionError("told, though no hook listens")

        monkeypatch.setattr(Hooks, "tell", never)

        class Deaf(Hook):
            """A hook that overrides nothing."""

        queue = hooked(Deaf())
        with queue:
            queue.submit("t").result(PATIENCE)
            queue.executor("bad", max_attempts=2)(lambda: 1 / 0)
            queue.submit("bad")
            assert queue.drain(PATIENCE)
        assert parts_of(queue).hooks._thread is None

    @pytest.mark.parametrize("event", EVENTS)
    def test_an_event_that_no_hook_overrides_has_no_listeners(self, event):
        hook = type("One", (Hook,), {event: lambda self, *_: None})()
        hooks = Hooks([hook, Hook()], logging.getLogger("taskx"), DEFAULT_TIMING)
        assert [name for name in EVENTS if getattr(hooks, name)] == [event]
        assert getattr(hooks, event)[0][0] == f"One.{event}"

    @pytest.mark.timing(keep_thread=0.0)
    def test_the_thread_for_hooks_ends_when_there_are_no_events(self, hooked, told):
        queue = hooked(told)
        queue.submit("t", id="a")
        eventually(lambda: parts_of(queue).hooks._thread is None)
        queue.submit("t", id="b")
        wait_told(queue)
        assert told.events == [("submitted", "a"), ("submitted", "b")]


class Fails(Hook):
    """A hook that raises ``error`` at each event of a task."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def submitted(self, task):
        raise self.error

    started = finished = submitted


class TestFailures:
    @pytest.mark.parametrize(
        "case",
        ["exception", "exit", "interrupt", "base", "unprintable", "no name", "no attributes"],
    )
    def test_an_error_in_a_hook_is_logged_and_affects_no_task(self, case, hooked, told, caplog):
        queue = hooked(Fails(ERRORS[case][0]), told)
        queue.start()
        assert queue.submit("t", id="a").result(PATIENCE) is None
        assert queue.drain(PATIENCE)
        assert told.of("a") == ["submitted", "started", "finished"]
        messages = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        for event in ("submitted", "started", "finished"):
            assert [m for m in messages if m.startswith(f"hook Fails.{event} failed")]
        assert queue.submit("t").result(PATIENCE) is None

    def test_each_error_in_a_hook_is_logged_once_with_its_traceback(self, hooked, caplog):
        queue = hooked(Fails(ValueError("bad")))
        queue.submit("t")
        queue.submit("t")
        wait_told(queue)
        records = [r for r in caplog.records if "hook" in r.getMessage()]
        assert [r.getMessage() for r in records] == ["hook Fails.submitted failed"] * 2
        assert "raise self.error" in caplog.text

    def test_a_cancel_succeeds_even_if_hooks_cannot_read_its_record(self, make_queue, told, caplog):
        queue = make_queue(hooks=[told])
        queue.declare("t")
        queue.submit("t", id="a")
        queue.repository.after = lambda writes: setattr(queue.repository, "down", True)
        assert queue.cancel_task("a")
        queue.repository.after, queue.repository.down = (lambda writes: None), False
        assert "cannot tell hooks that tasks have finished: a:" in caplog.text

    @pytest.mark.parametrize("wrong", [object(), Hook, None, "Hook"])
    def test_an_object_that_is_not_a_hook_is_refused(self, wrong):
        with pytest.raises(ConfigurationError, match="Hook"):
            Queue(MemoryRepository(), hooks=[wrong])

    def test_async_and_generator_hooks_are_refused(self):
        """A call would only create a coroutine or a generator, and never run the body."""

        async def told(task):
            pass

        class Async(Hook):
            async def finished(self, task):
                pass

        class Yields(Hook):
            def retried(self, task, error, delay):
                yield

        given = Hook()
        given.started = told
        for wrong, problem in (
            (Async(), "hook Async.finished is async"),
            (Yields(), "hook Yields.retried is a generator"),
            (given, "hook Hook.started is async"),
        ):
            with pytest.raises(ConfigurationError, match=problem):
                Queue(MemoryRepository(), hooks=[Hook(), wrong])


class Blocks(Hook):
    """A hook that hangs when a task has finished, until ``go_on`` is set."""

    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.go_on = threading.Event()
        self.finished_ones = 0

    def finished(self, task):
        self.hangs.set()
        assert self.go_on.wait(PATIENCE)
        self.finished_ones += 1


@pytest.fixture
def blocks():
    hook = Blocks()
    yield hook
    hook.go_on.set()


class TestHangingHook:
    def test_a_hanging_hook_delays_neither_tasks_nor_submits(self, hooked, blocks):
        queue = hooked(blocks)
        queue.start()
        for _ in range(20):
            assert queue.submit("t").result(PATIENCE) is None
        assert blocks.hangs.wait(PATIENCE)
        assert not queue.drain(0.01)
        blocks.go_on.set()
        assert queue.drain(PATIENCE)
        assert blocks.finished_ones == 20

    @pytest.mark.timing(stop_extra=0.01)
    def test_a_stop_ends_in_time_while_a_hook_hangs(self, hooked, blocks, caplog):
        queue = hooked(blocks)
        queue.start()
        queue.submit("t")
        queue.submit("t")
        eventually(lambda: len(parts_of(queue).hooks.waiting) == 1)
        eventually(lambda: not pool_of(queue).runs)
        assert queue.stop(0.1) == []
        assert "stopped with 1 event(s) not told to hooks yet" in caplog.text

    @pytest.mark.timing(most_events=5)
    def test_workers_wait_a_little_if_hooks_are_far_behind(self, hooked, blocks, monkeypatch):
        """Else the waiting events could fill the memory."""
        held = []
        wait = Hooks.wait

        def waits(self, timeout):
            held.append(timeout)
            return wait(self, 0.0 if timeout == DEFAULT_TIMING.hold_within else timeout)

        monkeypatch.setattr(Hooks, "wait", waits)
        queue = hooked(blocks)
        queue.start()
        for _ in range(7):
            assert queue.submit("t").result(PATIENCE) is None
        assert blocks.hangs.wait(PATIENCE)
        eventually(lambda: len(parts_of(queue).hooks.waiting) == 6)
        assert queue.submit("t").result(PATIENCE) is None
        eventually(lambda: DEFAULT_TIMING.hold_within in held)


class TestInsideHooks:
    def test_a_hook_can_submit_tasks_and_drain_waits_for_them(self, make_queue):
        class Chain(Hook):
            queue: Queue

            def finished(self, task):
                if task.params["n"]:
                    self.queue.submit("count", {"n": task.params["n"] - 1})

        chain = Chain()
        queue = chain.queue = make_queue(hooks=[chain])
        seen = []
        queue.executor("count")(lambda n: seen.append(n))
        queue.start()
        queue.submit("count", {"n": 30})
        assert queue.drain(PATIENCE)
        assert seen == list(range(30, -1, -1))

    def test_drain_and_stop_in_a_hook_do_not_wait_for_the_hook(self, hooked):
        said = []

        class Stops(Hook):
            def finished(self, task):
                try:
                    queue.drain()
                except ConfigurationError as error:
                    said.append(str(error))
                said.append(queue.stop(PATIENCE))

        queue = hooked(Stops())
        queue.start()
        queue.submit("t")
        eventually(lambda: len(said) == 2)
        assert "hook would wait for itself" in said[0]
        assert said[1] == []


def test_hooks_get_a_copy_of_the_task(hooked, told):
    class Rewrites(Hook):
        def started(self, task):
            task.type = task.id = "other"
            task.earlier_attempts.append("?")

    queue = hooked(Rewrites(), told)
    queue.start()
    assert queue.submit("t", id="a").result(PATIENCE) is None
    assert queue.drain(PATIENCE)
    assert queue.get_task_status("a").attempts[0].outcome == "completed"
    assert told.of("a") == ["submitted", "finished"]  # "started" came with the changed copy


def test_hooks_get_a_delayed_task_as_it_was_submitted(hooked, told):
    queue = hooked(told)
    queue.submit("t", {}, id="a", delay=60, created_by="me", priority=3)
    wait_told(queue)
    [task] = told.tasks
    assert task == queue.get_task_status("a")
    assert task.run_at > task.created_at


FORKS = """
import os, sys
from taskx import Hook, Queue, SQLiteRepository
from taskx.tasks.timing import Timing

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # one write, so that threads do not mix
    sys.stdout.flush()

class Says(Hook):
    def submitted(self, task):
        say(os.getpid() == parent, "submitted", task.id)

parent = os.getpid()
timing = Timing(exit_within=60.0)  # for the events that are left
queue = Queue(SQLiteRepository(sys.argv[1]), hooks=[Says()], timing=timing)
queue.executor("t")(lambda: None)
"""


class TestProcesses:
    @pytest.fixture
    def repository(self, database):
        with SQLiteRepository(database) as made:
            yield made

    def test_each_process_reports_only_its_own_events(self, spawn, database, make_queue, told):
        child = spawn(FORKS + "queue.submit('t', id='a'); sys.stdin.readline()", database)
        assert child.read() == "True submitted a"
        queue = make_queue(hooks=[told])
        queue.executor("t")(lambda: None)
        queue.start()
        finish(queue)
        child.tell()
        assert child.ends() == ("", "")
        assert told.of("a") == ["started", "finished"]

    def test_a_script_reports_all_events_before_it_ends(self, spawn, database):
        child = spawn(FORKS + "[queue.submit('t', id=str(n)) for n in range(100)]", database)
        said, errors = child.ends()
        assert said.splitlines() == [f"True submitted {n}" for n in range(100)]
        assert errors == ""

    def test_a_rescue_is_reported_by_the_process_that_did_it(
        self, spawn, database, make_queue, told
    ):
        program = """
@queue.executor()
def hang():
    say("hanging")
    sys.stdin.readline()

queue.start()
queue.submit("hang", id="a")
sys.stdin.readline()
"""
        child = spawn(FORKS + program, database)
        assert sorted([child.read(), child.read()]) == ["True submitted a", "hanging"]
        queue = make_queue(hooks=[told])
        queue.executor("hang")(lambda: None)
        queue.start()
        child.kill()
        eventually(lambda: told.of("a") == ["rescued", "started", "finished"])
        assert told.last("rescued").crashes == 1

    def test_a_forked_child_reports_its_own_events(self, spawn, database):
        program = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
queue.submit("t", id="before")
pid = os.fork()
queue.submit("t", id="child" if pid == 0 else "parent")
if pid:
    os.waitpid(pid, 0)
else:
    queue._node.wait_for_hooks(100)
    os._exit(0)
"""
        said, errors = spawn(FORKS + program, database).ends()
        assert sorted(said.splitlines()) == [
            "False submitted child",
            "True submitted before",
            "True submitted parent",
        ]
        assert errors == ""


def test_a_hook_can_read_and_delete_its_task(tmp_path):
    """A hook is called without any lock held, so it can use the queue freely."""
    seen = []

    class Asks(Hook):
        def finished(self, task):
            seen.append(queue.get_task_status(task.id).status)
            queue.delete(task.id)

    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        queue = Queue(repository, hooks=[Asks()])
        queue.executor("t")(lambda: None)
        with queue:
            for _ in range(10):
                queue.submit("t")
            assert queue.drain(PATIENCE)
            assert queue.list_tasks()[1] == 0
    assert seen == [TaskStatus.COMPLETED] * 10
