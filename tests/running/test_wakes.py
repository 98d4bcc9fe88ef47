"""Waking: a started task wakes the one worker that gets it, and no thread wakes to find nothing."""

from __future__ import annotations

import math
import threading
from collections import deque
from itertools import count
from queue import SimpleQueue

import pytest
from helpers import (
    PATIENCE,
    Waiting,
    eventually,
    housekeeper_of,
    joined_node,
    no_batches,
    no_rounds,
    pool_of,
    run_in_thread,
    undisturbed,
    whole_round,
)
from strikes import every_strike

from taskx import RepositoryUnavailable, RetryPolicy, Task, TaskFailed
from taskx.node.ahead import Ahead
from taskx.node.buffer import Buffer
from taskx.tasks.timing import DEFAULT_TIMING


class Line:
    """Workers that wait in a line, and what each of them got."""

    def __init__(self, workers):
        self.ahead = Ahead(workers, DEFAULT_TIMING)
        self.got = {}
        self.ended = {}
        for name in range(workers):
            self.ended[name] = run_in_thread(lambda name=name: self._wait(name))
            eventually(lambda name=name: len(self.ahead.waiting) == name + 1)

    def _wait(self, name):
        self.got[name] = self.ahead.wait(lambda: False)


class Started:
    """A run, as far as a line is concerned."""

    state = "starting"


@pytest.fixture
def line():
    made = Line(3)
    yield made
    made.ahead.wake_all()


@pytest.fixture
def node(make_queue):
    """A node without threads, with six tasks in its buffer."""
    queue = make_queue(worker_num=8)
    queue.executor("t")(lambda: None)
    for name in "abcdef":
        queue.submit("t", id=name)
    node = joined_node(queue)
    yield node
    node.withdraw()


# One task wakes one worker


def test_each_started_task_goes_to_one_worker(line):
    runs = [Started(), Started()]
    assert line.ahead.lay_out(runs)
    line.ended[2]()
    line.ended[1]()
    assert line.got == {2: runs[0], 1: runs[1]}
    assert len(line.ahead.waiting) == 1
    assert line.ahead.take() is None  # no other worker can take what these two were woken for


class Joined(deque):
    """The hands of workers that wait. Another one comes when their number has just been read."""

    def __len__(self):
        number = super().__len__()
        self.append(SimpleQueue())
        return number


def test_all_that_wait_are_woken_even_if_others_come_meanwhile(line):
    """Else a stop, which has closed the buffer before, would wait for a worker that nobody wakes."""
    line.ahead.waiting = Joined(line.ahead.waiting)
    line.ahead.wake_all()
    for name in range(3):
        line.ended[name]()
    assert line.got == {0: None, 1: None, 2: None}


def test_the_worker_that_came_last_is_served_first(line):
    """So few threads do the work, and stay warm, if few are enough."""
    assert line.ahead.serve(run := Started())
    line.ended[2]()
    assert line.got == {2: run}


def test_a_task_for_which_no_worker_waits_is_offered_to_all():
    ahead = Ahead(1, DEFAULT_TIMING)
    assert not ahead.serve(run := Started())
    assert run.state == "ahead"
    assert ahead.take() is run


def test_an_interrupted_submit_loses_no_worker():
    """The interrupt strikes while the worker is woken: it waits still, or it has its task."""
    line = Line(1)
    offered = []

    def serve(point):
        offered.append(Started())
        line.ahead.serve(offered[-1])

    for _ in every_strike(serve):
        if line.ahead.waiting:
            continue
        line.ended[0]()
        assert line.got[0] is offered[-1]
        line = Line(1)
    line.ended[0]()


@undisturbed
def test_submits_one_after_another_wake_one_thread(make_queue):
    queue, ran = make_queue(worker_num=8), []
    queue.executor("note")(lambda: ran.append(threading.current_thread().name))
    queue.start()
    pool = pool_of(queue)
    whole_round(queue)  # the first one checks everything
    for _ in range(20):
        eventually(lambda: len(pool.ahead.waiting) == 8 and pool.holds_nothing())
        queue.submit("note").result(PATIENCE)
    assert len(set(ran)) == 1


# No thread wakes for nothing


def test_a_task_that_arrives_while_another_worker_starts_some_wakes_nobody():
    """That worker looks for the next task when it has started these."""
    woken = []
    buffer = Buffer(10, 10, lambda: woken.append(1) or True)
    buffer.add("first", "t", 0, 0, None, 0)
    assert woken == [1]
    assert [item.id for item in buffer.take(1)] == ["first"]
    buffer.add("second", "t", 0, 0, None, 1)
    buffer.started()
    assert woken == [1]


def test_a_fetch_that_finds_nothing_wakes_nobody():
    woken = []
    buffer = Buffer(10, 10, lambda: woken.append(1) or True)
    buffer.add_fetched([])
    buffer.put_back([])
    assert woken == []


def test_the_worker_that_starts_tasks_goes_on_while_others_wait_for_them(node):
    """It keeps no task: to wake one of them only to start the next tasks would cost one more switch."""
    pool, got = node.pool, []
    waiting = [run_in_thread(lambda: got.append(pool.ahead.wait(lambda: False))) for _ in range(4)]
    eventually(lambda: len(pool.ahead.waiting) == 4)
    assert pool.start(pool.buffer.take(2), "worker") is None
    eventually(lambda: len(got) == 2)
    assert len(pool.ahead.waiting) == 2
    last = pool.start(pool.buffer.take(3), "worker")
    for done in waiting:
        done()
    assert {run.task.id for run in [last, *got]} == set("abcde")


@undisturbed
def test_the_end_of_a_task_wakes_no_worker(make_queue, gate, monkeypatch):
    """The others have nothing to do, whatever the commit of its outcome has brought."""
    queue, woken = make_queue(worker_num=8), []
    Waiting(queue, gate)
    wait = Ahead.wait

    def counted(ahead, ready, timeout=None):
        run = wait(ahead, ready, timeout)
        woken.append(run)
        return run

    monkeypatch.setattr(Ahead, "wait", counted)
    queue.start()
    pool = pool_of(queue)
    whole_round(queue)  # the first one checks everything
    eventually(lambda: len(pool.ahead.waiting) == 8 and pool.holds_nothing())
    woken.clear()
    handles = [queue.submit("hold") for _ in range(3)]
    gate.wait_for(3)
    gate.open()
    for handle in handles:
        handle.result(PATIENCE)
    eventually(lambda: len(pool.ahead.waiting) == 8)
    assert sorted(run.task.id for run in woken) == sorted(handle.id for handle in handles)


def test_while_something_waits_for_a_short_sleep_no_commit_ends_it(make_queue, gate, monkeypatch):
    """A sleep that is longer than a short one, by however little, ends as soon as something is due."""
    queue = make_queue(worker_num=1)
    queue.executor("t")(gate)
    queue.start()
    queue.submit("t")
    gate.wait_for(1)
    with no_rounds(queue):
        housekeeper, short = housekeeper_of(queue), DEFAULT_TIMING.hand_back_after
        monkeypatch.setattr(housekeeper, "_dues", [lambda: short])
        clock = count(1234.5678, 0.1 + 2**-30)
        monkeypatch.setattr(queue.clock, "monotonic", lambda: next(clock))
        for _ in range(1000):
            housekeeper._due_at = -math.inf
            assert housekeeper._until_next() <= short
        gate.open()


# The thread that waits for a result reads nothing


@pytest.mark.timing(handles_every=10 * PATIENCE)
def test_who_waits_for_a_task_that_runs_here_reads_no_record(make_queue, gate, monkeypatch):
    """The worker knows the record when it has stored the outcome."""
    queue, read = make_queue(worker_num=1), []
    queue.executor("t")(lambda: gate() or {"n": [1, None]})
    queue.start()
    handle = queue.submit("t")
    gate.wait_for(1)
    with no_rounds(queue):  # the housekeeper reads what has changed, and nobody was told of yet
        for name in ("get_many", "statuses"):
            ask = getattr(queue.repository, name)
            monkeypatch.setattr(
                queue.repository, name, lambda ids, ask=ask: read.extend(ids) or ask(ids)
            )
        assert not handle.done()
        gate.open()
        assert handle.result(PATIENCE) == {"n": [1, None]}
    assert handle.id not in read


@pytest.mark.every_store
def test_a_failure_that_was_not_read_looks_like_one_that_was(make_queue, gate):
    queue = make_queue(worker_num=1)

    @queue.executor("t", max_attempts=2, retry=RetryPolicy(base=0.0))
    def t():
        gate()
        raise ValueError("no")

    queue.start()
    handle = queue.submit("t")
    gate.wait_for(1)
    assert not handle.done()
    gate.open()
    known = handle.exception(PATIENCE)
    again = queue.handle(handle.id).exception(PATIENCE)
    assert isinstance(known, TaskFailed)
    assert vars(known) == vars(again) != {}
    assert str(known) == str(again)


# Short tasks wake nobody


@pytest.mark.parametrize(
    ("started", "waiting", "part"),
    [(1, 0, 0), (2, 0, 1 / 8), (8, 3, 1 / 2), (16, 3, 1), (100, 3, 1), (100, 128, 0)],
)
def test_short_tasks_gather_for_longer_if_many_have_come(monkeypatch, started, waiting, part):
    """Few came: waiting for more would only hold them up. A whole portion waits: it starts."""
    naps = []
    monkeypatch.setattr("taskx.node.ahead.time.sleep", naps.append)
    ahead = Ahead(1, DEFAULT_TIMING)
    ahead.begin(started)
    ahead.let_gather(waiting, 128)
    assert naps == ([DEFAULT_TIMING.gather * part] if part else [])


def end(ahead, number, seconds):
    """Let tasks of some length end; return how often they were short, and then no more."""
    before, turns = ahead.short, 0
    for _ in range(number):
        ahead.ended(Started(), seconds)
        turns += before and not ahead.short
        before = ahead.short
    return turns


def test_a_slow_task_among_short_ones_wakes_nobody():
    ahead = Ahead(4, DEFAULT_TIMING)
    end(ahead, 50, 0.00003)
    assert ahead.short
    end(ahead, 1, 60.0)
    assert ahead.short
    end(ahead, 2, 60.0)
    assert not ahead.short


def test_tasks_that_only_look_long_are_tried_by_one_worker():
    """Those that release the interpreter wait for it, if several workers run them."""
    ahead = Ahead(8, DEFAULT_TIMING)
    end(ahead, 63, 0.001)
    assert not ahead.short
    end(ahead, 1, 0.001)
    assert ahead.short
    end(ahead, 1000, 0.00003)
    assert ahead.short


def test_tasks_that_are_long_in_the_trial_are_tried_more_and_more_seldom():
    ahead = Ahead(8, DEFAULT_TIMING)
    assert end(ahead, 1000, 0.001) == 4
    assert end(ahead, 10_000, 0.001) == 4


def test_long_tasks_are_not_tried():
    ahead = Ahead(8, DEFAULT_TIMING)
    assert end(ahead, 1000, 0.01) == 0
    assert not ahead.short


# A fetch only for the last free places


@no_batches
def test_a_worker_without_a_task_fetches_nothing_while_the_buffer_has_some(node, monkeypatch):
    """Another worker is just starting some; a fetch would read the tasks of the buffer again."""
    pool, fetched = node.pool, []
    monkeypatch.setattr(pool.fetcher, "refill", lambda: fetched.append(1))
    pool.agenda.expect_more()
    taken = pool.buffer.take(1)
    assert pool.buffer.take(1) == []
    pool._finish()
    assert fetched == []
    pool.buffer.started()
    pool.buffer.take(9)
    pool._finish()
    assert fetched == [1]
    assert taken


@no_batches
def test_nothing_is_fetched_while_a_worker_is_about_to_start_tasks(node, monkeypatch):
    """A fetch would read these tasks again. The worker fetches when they are started."""
    pool, fetched = node.pool, []
    monkeypatch.setattr(pool.fetcher, "refill", lambda: fetched.append(1))
    pool.fetcher.found_nodes(others=False)
    pool.agenda.expect_more()
    assert pool.buffer.take(9)
    pool.fetcher.refill_if_low()
    assert fetched == []
    pool.buffer.started()
    pool.fetcher.refill_if_low()
    assert fetched == [1]


@undisturbed
def test_tasks_that_are_started_run_even_if_the_fetch_after_that_fails(make_queue, monkeypatch):
    queue = make_queue(worker_num=1)
    queue.executor("t")(lambda: None)
    queue.start()
    pool, failed = pool_of(queue), []
    pool.fetcher.found_nodes(others=False)

    def fails():
        if not pool.buffer.starting:
            failed.append(threading.current_thread().name)
            raise RepositoryUnavailable("the disk is away")

    monkeypatch.setattr(pool.fetcher, "refill_if_low", fails)
    handles = queue.submit_many([Task(type="t") for _ in range(9)])
    assert [handle.result(PATIENCE) for handle in handles] == [None] * 9
    assert "taskx-worker-1" in failed


@no_batches
@undisturbed
def test_a_backlog_is_read_in_few_fetches(make_queue, monkeypatch):
    """Each fetch reads the tasks that the buffer has already, too."""
    queue = make_queue(worker_num=8)
    queue.executor("t")(lambda: None)
    queue.submit_many([Task(type="t") for _ in range(600)])
    asked, ready = [], queue.repository.ready
    monkeypatch.setattr(
        queue.repository, "ready", lambda *a: asked.append(len(rows := ready(*a))) or rows
    )
    # Else the node would look several times a second for what other queues have stored in this memory.
    monkeypatch.setattr(queue.repository, "version", lambda: 0)
    queue.start()
    assert queue.drain(PATIENCE)
    assert sum(asked) < 4 * 600


def test_a_node_among_others_starts_half_as_many_short_tasks_at_once():
    """The others wait for the file meanwhile."""
    ahead = Ahead(1, DEFAULT_TIMING)
    ahead.short = True
    assert [ahead.portion(alone=alone) for alone in (True, False)] == [128, 64]


@pytest.mark.parametrize(
    ("workers", "seconds", "portion"), [(32, 0.01, 9), (128, 0.01, 33), (32, 1.0, 1), (2, 0.01, 1)]
)
def test_a_start_also_starts_tasks_for_workers_that_are_free_soon(workers, seconds, portion):
    """At most for a quarter of them, and for none if tasks are long."""
    ahead = Ahead(workers, DEFAULT_TIMING)
    for _ in range(200):
        ahead.ended(object(), seconds)
    assert ahead.portion(alone=True) == portion
