"""Concurrency keys: one task of each at a time, in the order of submission, whoever runs them."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Queue,
    RepositoryUnavailable,
    Retry,
    Task,
    TaskFilter,
    TaskStatus,
)

pytestmark = pytest.mark.every_store


class Track:
    """Where tasks leave their traces: what began and what ended, in order."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.events: list[str] = []
        queue.executor("note")(self.note)

    def note(self, n=0):
        self.events.append(f"begin {n}")
        self.events.append(f"end {n}")

    def submit(self, n, key="k", **options):
        return self.queue.submit("note", {"n": n}, id=str(n), concurrency_key=key, **options)

    def took_turns(self, order):
        return self.events == [event for n in order for event in (f"begin {n}", f"end {n}")]


@pytest.fixture
def track(make_queue, clock):
    return Track(make_queue(worker_num=4, clock=clock))


def held_up(queue, n):
    """A task that runs until its gate opens has the turn; others wait in line."""
    return queue.repository.find("line", ["k"], ("id",), 1) == [(str(n),)]


# One at a time, in order


def test_many_of_one_key_take_turns(track):
    track.queue.start()
    for n in range(60):
        track.submit(n)
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(60))


def test_many_that_were_stored_before_take_turns(track):
    """Submitted to a queue that is not started, some of them in one transaction."""
    track.submit(0)
    tasks = [Task(id=str(n), type="note", params={"n": n}, concurrency_key="k") for n in (1, 2, 3)]
    track.queue.submit_many(tasks)
    track.submit(4)
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(5))


def test_other_keys_and_tasks_without_one_do_not_wait(make_queue, gate):
    queue = make_queue(worker_num=4)
    queue.executor("hold")(lambda: gate())
    queue.start()
    for key in ("a", "a", "b", "b", None):
        queue.submit("hold", concurrency_key=key)
    gate.wait_for(3)
    assert queue.running == 3
    gate.open()
    assert queue.drain(PATIENCE)


def test_priorities_change_nothing_within_a_line(track):
    for n in range(5):
        track.submit(n, priority=n)
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(5))


def test_a_line_takes_no_room_in_the_buffer(busy):
    queue = busy(buffer_size=2)
    for n in range(10):
        queue.submit("note", {"n": n}, concurrency_key="k")
    queue.submit("note")
    queue.submit("note")
    assert queue.buffered == 2


def test_tasks_of_several_types_stand_in_one_line(track):
    track.queue.executor("other")(track.note)
    for n in range(6):
        track.queue.submit("other" if n % 2 else "note", {"n": n}, concurrency_key="k")
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(6))


# However a task ends


def test_a_retry_keeps_the_turn(track, clock):
    """At once, or after a wait: those behind it wait for the end of its last attempt."""

    @track.queue.executor("fails", max_attempts=3)
    def fails(ctx):
        track.events.append(f"attempt {ctx.task.attempt}")
        if ctx.task.attempt == 1:
            raise ValueError("at once")
        raise Retry(delay=60)

    track.queue.start()
    failing = track.queue.submit("fails", concurrency_key="k")
    track.submit("next")
    eventually(lambda: failing.task().errors == 2)
    assert track.queue.drain(PATIENCE)
    assert track.events == ["attempt 1", "attempt 2"]
    clock.advance(61)
    eventually(lambda: track.events[2:] == ["attempt 3", "begin next", "end next"])
    assert failing.task().status is TaskStatus.FAILED


def test_one_that_is_delayed_holds_up_those_behind_it(track, clock):
    track.queue.start()
    track.submit("late", delay=60)
    track.submit("behind")
    track.submit("elsewhere", key="other")
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(["elsewhere"])
    clock.advance(61)
    eventually(lambda: track.took_turns(["elsewhere", "late", "behind"]))


def test_a_time_that_has_come_meanwhile_is_no_more_waited_for(track, gate, clock):
    """Its delay and its place in line go by together."""
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    track.queue.submit("hold", concurrency_key="k")
    gate.wait_for(1)
    track.submit("late", delay=60)
    clock.advance(61)
    gate.open()
    eventually(lambda: track.took_turns(["late"]))


@pytest.mark.parametrize("started", [True, False])
def test_a_cancel_lets_the_next_one_go(track, clock, started):
    """Of the one whose turn it is, before it begins; and of one in the middle."""
    if started:
        track.queue.start()
    first = track.submit("first", delay=60)
    middle = track.submit("middle")
    track.submit("last")
    assert middle.cancel()
    assert first.cancel()
    track.queue.start()
    eventually(lambda: track.took_turns(["last"]))


def test_many_cancels_let_the_next_one_go(track, look_every):
    look_every(audit=3600)  # the slow look makes good for nothing
    track.queue.start()
    handles = [track.submit(n, delay=60) for n in range(3)]
    track.submit("last")
    track.queue.cancel_many([handle.id for handle in handles])
    eventually(lambda: track.took_turns(["last"]))


def test_a_running_one_that_is_cancelled_lets_the_next_one_go(track):
    track.queue.executor("sleeps")(lambda ctx: ctx.sleep(PATIENCE))
    track.queue.start()
    running = track.queue.submit("sleeps", concurrency_key="k")
    track.submit("next")
    eventually(lambda: track.queue.running == 1)
    running.cancel()
    eventually(lambda: track.took_turns(["next"]))


def test_a_record_that_is_removed_lets_the_next_one_go(track, look_every):
    look_every(audit=3600)
    track.queue.start()
    track.submit("first", delay=60)
    track.submit("next")
    track.queue.delete("first")
    eventually(lambda: track.took_turns(["next"]))


def test_one_that_is_requeued_stands_in_line_again(track, gate):
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    cancelled = [track.submit(n, delay=60) for n in (1, 2)]
    for handle in cancelled:
        assert handle.cancel()
    track.queue.submit("hold", concurrency_key="k")
    gate.wait_for(1)
    track.queue.requeue("2")
    track.queue.requeue("1")
    assert held_up(track.queue, 1)  # where it stood
    gate.open()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns([1, 2])


def test_a_lone_one_that_is_requeued_runs(track, look_every):
    look_every(audit=3600)
    track.queue.start()
    assert track.submit(1, delay=60).cancel()
    track.queue.requeue("1")
    eventually(lambda: track.took_turns([1]))


def test_dead_letters_that_are_requeued_together_take_turns(track, look_every):
    look_every(audit=3600)
    broken = [True]

    @track.queue.executor("maybe")
    def maybe(n):
        if broken:
            raise ValueError("broken")
        track.note(n)

    track.queue.start()
    for n in range(5):
        track.queue.submit("maybe", {"n": n}, concurrency_key="k")
    assert track.queue.drain(PATIENCE)
    broken.clear()
    assert track.queue.requeue_dead_letters() == 5
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(5))


@pytest.mark.usefixtures("frequent_looks")
def test_what_ended_by_hand_lets_the_next_one_go(track, repository):
    """Nobody is told, so it takes the slow look."""
    track.queue.start()
    track.submit("first", delay=3600)
    track.submit("next")
    repository.update_status("first", TaskStatus.CANCELLED, "by hand")
    eventually(lambda: track.took_turns(["next"]))


def test_by_hand_none_starts_beside_another(track, repository):
    """It would be two at once."""
    from taskx import InvalidTransition

    track.submit("first", delay=3600)
    track.submit("second")
    with pytest.raises(InvalidTransition):
        repository.update_status("second", TaskStatus.RUNNING)
    repository.update_status("first", TaskStatus.RUNNING)
    repository.update_status("first", TaskStatus.COMPLETED)
    repository.update_status("second", TaskStatus.RUNNING)
    assert not track.queue.repository.distinct("line", "", 10)


# What comes together with it


def test_a_child_stands_in_line_from_when_its_parents_have_completed(track, gate):
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    parent = track.queue.submit("hold")
    gate.wait_for(1)
    track.submit("child", depends_on=[parent])
    track.submit("stranger")
    eventually(lambda: track.took_turns(["stranger"]))
    gate.open()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(["stranger", "child"])


def test_a_parent_may_stand_in_line(track):
    parent = track.submit("parent")
    track.submit("child", depends_on=[parent])
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(["parent", "child"])


def test_what_replaces_a_task_of_a_key_takes_its_place(track):
    """In the line of the same key; there is no place for it in another one, nor without one in any."""
    track.submit("a", unique_key="u")
    track.submit("b")
    track.queue.submit("note", {"n": "old"}, unique_key="v")
    for unique, key in (("u", "other"), ("u", None), ("v", "k")):
        new = {"unique_key": unique, "on_conflict": "replace", "concurrency_key": key}
        with pytest.raises(DuplicateTask):
            track.queue.submit("note", {"n": "no"}, **new)
    track.submit("new a", unique_key="u", on_conflict="replace")
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    begun = [event for event in track.events if event.startswith("begin ")]
    assert sorted(begun) == ["begin b", "begin new a", "begin old"]
    assert begun.index("begin new a") < begun.index("begin b")


def test_a_paused_type_stops_its_lines(track):
    track.queue.executor("other")(track.note)
    track.queue.pause("other")
    track.queue.start()
    track.queue.submit("other", {"n": 0}, concurrency_key="k")
    track.submit(1)
    assert track.queue.drain(PATIENCE)
    assert track.events == []
    track.queue.resume("other")
    assert track.queue.drain(PATIENCE)
    eventually(lambda: track.took_turns([0, 1]))


# Faults


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_line_whose_repository_failed_goes_on(
    track, repository, gate, monkeypatch, look_every, failures
):
    """It was down when a task had ended and the next one was looked for, once or again and again."""
    look_every(audit=3600)
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    track.queue.submit("hold", concurrency_key="k")
    gate.wait_for(1)
    track.submit(0)
    look, fails = repository.find, [True] * failures

    def shaky(column, *args):
        if column == "line" and fails:
            fails.pop()
            raise RepositoryUnavailable("down for a moment")
        return look(column, *args)

    monkeypatch.setattr(repository, "find", shaky)
    gate.open()
    eventually(lambda: track.took_turns([0]))
    assert not fails


def test_a_submit_into_a_failing_line_is_accepted(track, repository, monkeypatch):
    """The task is stored; whose turn it is shows later."""
    look = repository.find

    def shaky(column, *args):
        if column == "line":
            raise RepositoryUnavailable("down for a moment")
        return look(column, *args)

    monkeypatch.setattr(repository, "find", shaky)
    track.submit(0)
    monkeypatch.undo()
    track.queue.start()
    eventually(lambda: track.took_turns([0]))


def test_a_drain_ends_after_the_last_in_line(track, make_queue):
    """Also that of another queue, between the end of one and the turn of the next."""
    other = make_queue(worker_num=1)
    other.executor("note")(track.note)
    for n in range(30):
        track.submit(n)
    track.queue.start()
    other.start()
    assert other.drain(PATIENCE)
    assert track.took_turns(range(30))


def test_a_task_without_a_key_asks_nobody(queue, repository, monkeypatch):
    """Not when it is submitted, and not when it ends."""
    asked, find = [], repository.find

    def counted(column, *args):
        asked.append(column)
        return find(column, *args)

    monkeypatch.setattr(repository, "find", counted)
    queue.executor("t")(lambda: None)
    queue.start()
    queue.submit("t").result(PATIENCE)
    queue.submit_many([Task(type="t")])[0].result(PATIENCE)
    assert "id" in asked
    assert "line" not in asked


@pytest.mark.parametrize("key", ["", 5, "a\0", "k" * 256, "\ud800"])
def test_what_is_no_key_is_refused(queue, key):
    queue.declare("t")
    with pytest.raises(ConfigurationError, match="concurrency_key"):
        queue.submit("t", concurrency_key=key)
    assert queue.list_tasks()[1] == 0


def test_eight_methods_cannot_hold_a_key():
    queue = Queue(TinyRepository())
    queue.declare("t")
    with pytest.raises(ConfigurationError, match="concurrency_key"):
        queue.submit("t", concurrency_key="k")
    assert queue.list_tasks()[1] == 0


# Several processes

WORK = """
@queue.executor("work", max_crashes=100)
def work(ctx, key, n, seconds=0.0):
    note("begin", key, n, os.getpid())
    ctx.sleep(seconds)
    note("end", key, n, os.getpid())
"""


def broken_rules(log):
    """Where two of a key ran at once, or one began after one that was submitted after it.

    What a process was doing when it died has no end; the next line of its key must be its next attempt.
    """
    broken, running, last = [], {}, {}
    for event, key, n, who in log:
        if event == "begin":
            if running.get(key) not in (None, n) or int(n) < last.get(key, -1):
                broken.append((event, key, n, who))
            running[key], last[key] = n, int(n)
        elif running.pop(key, None) != n:
            broken.append((event, key, n, who))
    return broken


def test_the_check_of_the_log_finds_what_is_wrong():
    sound = ["begin k 0 x", "begin j 0 y", "end k 0 x", "begin k 1 y", "end j 0 y", "end k 1 y"]
    assert broken_rules([line.split() for line in sound]) == []
    assert broken_rules([line.split() for line in ["begin k 0 x", "begin k 1 y"]])
    assert broken_rules(
        [line.split() for line in ["begin k 1 x", "end k 1 x", "begin k 0 y", "end k 0 y"]]
    )


KEYS, EACH = ("a", "b", "c"), 25


def test_processes_take_turns(workers):
    """Three that work and one that submits: of each key one at a time, and in order."""
    repository = workers.repository
    children = workers.start(WORK, 3)
    queue = Queue(repository)
    queue.declare("work")
    for n in range(EACH):
        for key in KEYS:
            queue.submit("work", {"key": key, "n": n}, concurrency_key=key)
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 3 * EACH, 60)
    log = workers.log()
    assert broken_rules(log) == []
    assert len(log) == 2 * 3 * EACH
    assert {len(task.attempts) for task in repository.list(TaskFilter())} == {1}
    for child in children:
        child.tell()
        child.ends()


def test_a_line_goes_on_when_a_process_was_killed_in_its_turn(workers):
    """Its task is run again by another one, before the next in line."""
    repository = workers.repository
    [child] = workers.start(WORK)
    queue = Queue(repository)
    queue.declare("work")
    for n in range(4):
        params = {"key": "k", "n": n, "seconds": 0.0 if n else 600.0}
        queue.submit("work", params, concurrency_key="k", id=str(n))
    eventually(lambda: repository.get_by_id("0").status is TaskStatus.RUNNING)
    eventually(lambda: len(workers.log()) == 1)
    child.kill()
    [other] = workers.start(WORK)
    eventually(lambda: len(workers.log()) == 2)  # it runs again
    assert queue.cancel_task("0") is False
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 3)
    log = workers.log()
    assert [line[:3] for line in log[:2]] == [["begin", "k", "0"]] * 2
    assert broken_rules([*log[1:2], ["end", "k", "0", "-"], *log[2:]]) == []
    other.tell()
    other.ends()


def test_a_process_that_died_between_the_end_and_the_next_turn_holds_up_nobody(workers):
    """It cannot on SQLite, where both are one transaction; so it is made to end without."""
    repository = workers.repository
    queue = Queue(repository)
    queue.declare("work")
    for n in range(3):  # before it starts: who submits to a line that stands still moves it
        queue.submit("work", {"key": "k", "n": n}, concurrency_key="k", id=str(n))
    dies = """
queue._services.turns.next_turn = lambda key: ()
queue._services.turns.advance = lambda keys: os._exit(9)
"""
    child = workers.spawn(WORK + dies)
    assert child.process.wait(PATIENCE) == 9
    assert repository.get_by_id("0").status is TaskStatus.COMPLETED
    assert repository.distinct("line", "", 10) == ["k"]
    assert repository.find("turn", ["k"], ("id",)) == []
    [other] = workers.start(WORK)
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 3)
    assert broken_rules(workers.log()) == []
    other.tell()
    other.ends()
